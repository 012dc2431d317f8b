"""Retrieval against pytorch-metric-learning and values by hand; crops found among crops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from ssl_kit.core.errors import UserError
from ssl_kit.data.opening import open_source
from ssl_kit.evaluation.features import Network, Pixels
from ssl_kit.evaluation.retrieval import TwoCrops, _ranks, crops_top1, instance_retrieval, retrieval


def clusters(count, dim=8, num_classes=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((num_classes, dim))
    labels = rng.choice(num_classes, count, p=np.arange(1, num_classes + 1) / sum(range(num_classes + 1)))
    return (centres[labels] + 1.2 * rng.standard_normal((count, dim))).astype(np.float32), labels


def as_embeddings(vectors, labels):
    return SimpleNamespace(vectors=vectors, labels=np.asarray(labels), classes=tuple("abcde"), info={}, groups=None)


@pytest.mark.parametrize("separate", [False, True])
def test_equals_pytorch_metric_learning(separate):
    vectors, labels = clusters(300)
    queries, query_labels = clusters(80, seed=1) if separate else (vectors, labels)
    units, query_units = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (vectors, queries))
    calculator = AccuracyCalculator(("mean_average_precision_at_r", "r_precision", "precision_at_1"), k="max_bin_count")
    arguments = (query_units, query_labels, units, labels) if separate else (units, labels)
    wanted = calculator.get_accuracy(*arguments)
    result = retrieval(as_embeddings(vectors, labels), as_embeddings(queries, query_labels) if separate else None)
    assert result.metrics["map_at_r"] == pytest.approx(wanted["mean_average_precision_at_r"], abs=1e-6)
    assert result.metrics["r_precision"] == pytest.approx(wanted["r_precision"], abs=1e-6)
    assert result.metrics["recall_at_1"] == pytest.approx(wanted["precision_at_1"], abs=1e-6)


def test_scores_by_hand():
    angles = np.radians([0, 10, 25, 45, 80])
    vectors = np.stack((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
    query = as_embeddings(vectors[:1], [0])
    gallery = as_embeddings(vectors[1:], [1, 0, 1, 0])  # by nearness: wrong, right, wrong, right; R = 2
    metrics = retrieval(gallery, query, ks=(1, 2, 4)).metrics
    assert (metrics["recall_at_1"], metrics["recall_at_2"]) == (0.0, 1.0)
    assert (metrics["precision_at_2"], metrics["precision_at_4"]) == (0.5, 0.5)
    assert metrics["r_precision"] == 0.5
    assert metrics["map_at_r"] == 0.25  # (0 + 1/2) / 2


def test_blocks_do_not_change_the_scores(monkeypatch):
    embeddings = as_embeddings(*clusters(200))
    whole = retrieval(embeddings).metrics
    monkeypatch.setitem(retrieval.__globals__, "_BLOCK_BYTES", 100_000)
    assert retrieval(embeddings).metrics == whole


def test_an_image_is_not_its_own_neighbour_even_among_copies():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)  # four copies each, two of either class
    metrics = retrieval(as_embeddings(vectors, [0, 0, 1, 1] * 3), ks=(1, 3)).metrics
    assert metrics["precision_at_3"] == pytest.approx(1 / 3)


def test_images_alone_in_their_class_ask_nothing():
    vectors, labels = clusters(100)
    labels = labels % 2
    labels[7] = 4
    metrics = retrieval(as_embeddings(vectors, labels)).metrics
    rest = np.arange(100) != 7
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(100)
    assert metrics["recall_at_1"] == pytest.approx((labels[cosines.argmax(1)] == labels)[rest].mean())
    with pytest.raises(UserError, match="nothing to find"):
        retrieval(as_embeddings(vectors[:5], range(5)))


def test_features_that_know_nothing_find_at_chance():
    vectors = np.random.default_rng(0).standard_normal((1_000, 16)).astype(np.float32)
    metrics = retrieval(as_embeddings(vectors, np.arange(1_000) % 5)).metrics
    assert abs(metrics["recall_at_1"] - 0.2) < 3 * np.sqrt(0.16 / 1_000)
    assert abs(metrics["r_precision"] - 0.2) < 0.01


def test_cut_offs_beyond_the_images_are_left_out():
    made = retrieval(as_embeddings(np.eye(4), [0, 0, 1, 1]), ks=(1, 2, 5))
    assert made.settings["ks"] == [1, 2] and not any("_5" in name for name in made.metrics)


def test_ranks_count_the_nearer_ones_and_ties_win_nothing():
    queries = np.eye(4, dtype=np.float32)
    assert _ranks(queries, queries).tolist() == [1, 1, 1, 1]
    assert _ranks(queries, queries[[1, 0, 2, 3]]).tolist() == [3, 3, 1, 1]  # another at 1, three at 0: the middle one
    collapsed = np.ones((9, 4), np.float32)
    assert _ranks(collapsed, collapsed).tolist() == [5.0] * 9


def test_two_crops_share_half_and_a_network_sees_each_alone():
    crops = TwoCrops(Pixels((4, 6), 3))
    assert crops.size == (4, 9) and crops.dim == 144
    images = torch.arange(2 * 3 * 4 * 9.0).reshape(2, 3, 4, 9)
    made = crops(images)
    assert made.shape == (2, 144)
    assert torch.equal(made[:, :72], images[..., :6].flatten(1)) and torch.equal(
        made[:, 72:], images[..., 3:].flatten(1)
    )


def test_crops_find_each_other_around_the_mean_of_their_side_and_ties_win_nothing():
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((50, 8)).astype(np.float32)
    noise = rng.standard_normal((50, 8)).astype(np.float32)
    assert crops_top1(np.hstack((codes, codes))) == 1.0
    assert crops_top1(np.hstack((codes + 9, codes - 5))) == 1.0  # what all of a side have in common tells nothing apart
    mixed = np.where(np.arange(50)[:, None] < 30, codes, noise)
    left, right = codes - codes.mean(axis=0), mixed - mixed.mean(axis=0)
    cosines = left @ right.T / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    found = crops_top1(np.hstack((codes, mixed)))
    assert found == pytest.approx((cosines.argmax(axis=1) == np.arange(50)).mean()) and 0.5 < found < 0.8
    assert crops_top1(np.hstack((noise, np.ones_like(noise)))) == 0.0


def test_crops_are_found_by_pixels_when_they_are_large_and_repeat_by_the_seed():
    rng = np.random.default_rng(0)
    source = open_source(np.repeat(np.repeat(rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8), 2, 1), 2, 2))
    network = Network(Pixels((16, 16), 3))
    whole = instance_retrieval(network, source, area=(1.0, 1.0), features="pixels")
    small = instance_retrieval(network, source, area=(0.05, 0.1), features="pixels")
    assert whole.metrics["recall_at_1"] > 0.3 > small.metrics["recall_at_1"]  # half are mirrored in one view only
    assert small.metrics["recall_at_1"] < small.metrics["recall_at_10"]
    assert instance_retrieval(network, source, area=(0.05, 0.1)).metrics == small.metrics
    assert (
        instance_retrieval(network, source, area=(0.05, 0.1), seed=1).metrics["mean_reciprocal_rank"]
        != small.metrics["mean_reciprocal_rank"]
    )
    assert whole.settings["num_images"] == 60
