"""What is chosen on a part of train is chosen with whole groups in it or out of it, by every probe."""

import numpy as np
import pytest
from PIL import Image

from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation import fewshot
from ssl_kit.evaluation.attentive import attentive_probe, sgd_probe
from ssl_kit.evaluation.features import feature_sets
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import knn
from ssl_kit.evaluation.result import holdout


def test_groups_are_held_out_whole():
    groups = np.repeat(np.arange(40), 5)
    groups[-20:] = -1
    labels = np.arange(200) // 5 % 2
    fitted, held = holdout(labels, 0.2, 3, groups)
    assert not set(groups[fitted]) & set(groups[held]) - {-1} and len(fitted) + len(held) == 200
    assert {0, 1} == set(labels[held]) and 25 <= len(held) <= 60
    same = holdout(labels, 0.2, 3, np.full(200, -1)), holdout(labels, 0.2, 3)
    assert all(np.array_equal(one, other) for one, other in zip(*same, strict=True))
    for one, other in zip(holdout(labels, 0.2, 3, labels), holdout(labels, 0.2, 3), strict=True):
        assert np.array_equal(one, other)  # a group per class leaves nothing to choose on


@pytest.fixture
def noise():
    """60 groups of 6 nearly equal vectors with a label by chance: whoever has seen a group knows its label."""
    rng, chance = np.random.default_rng(1), np.random.default_rng(1)
    vectors = (np.repeat(rng.normal(size=(60, 1, 96)), 6, axis=1) + 1e-3 * rng.normal(size=(60, 6, 96))).reshape(-1, 96)
    train = Embeddings.of(vectors, np.repeat(chance.integers(0, 2, 60), 6))
    train.groups = np.repeat(np.arange(60), 6)
    return train


PROBES = {
    "knn": lambda train: knn(train, train).settings,
    "linear": lambda train: linear_probe(train, train).settings,
    "sgd": lambda train: sgd_probe(train, train, lr=(0.1, 1.0), epochs=40).settings,
    "attentive": lambda train: attentive_probe(train, train, width=12, lr=(0.01, 0.1), epochs=40, queries=2).settings,
}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_no_probe_chooses_by_what_it_has_seen(noise, probe):
    assert np.max(probe(noise)["held_out_top1"]) < 0.8
    noise.groups = None
    assert np.max(probe(noise)["held_out_top1"]) > 0.9


def test_few_shot_folds_keep_groups_whole(noise):
    for rows in (np.arange(36), np.arange(360)):
        groups = noise.groups[rows]
        folds = list(fewshot._folds(noise.labels[rows], groups, 0))
        assert folds and not any(set(groups[fitted]) & set(groups[held]) for fitted, held in folds)
    assert not list(fewshot._folds(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), 0))


def test_the_groups_of_a_table_reach_the_probes(tmp_path):
    lines = ["path,label,group"]
    for n in range(24):
        Image.fromarray(np.full((8, 8, 3), 9 * n, np.uint8)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,{'ab'[n // 3 % 2]},g{n // 3}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    train, test = open_labelled(tmp_path / "list.csv")
    encoder = Encoder.load(Encoder("resnet18_small", {"channels": [4, 4, 4, 4]}, (8, 8)).save(tmp_path / "encoder"))
    for _ in range(2):  # the second time the features are read from disk
        for features in feature_sets(encoder, train, test, tmp_path / "features"):
            wanted = {name: train.groups()[row] for row, name in enumerate(train.ids())}
            assert features.train.groups.tolist() == [wanted[name] for name in features.train.ids]
