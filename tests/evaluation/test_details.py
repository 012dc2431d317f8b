"""`evaluate --only details,looks`: the files beside a run's scores, and the pictures that the report makes of them."""

import csv
import json
import sys

import numpy as np
import pytest

from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.report.page import render
from ssl_kit.report.read import read_run
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.verbs.pictures import flattened, write_classes, write_suspects


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def evaluated(images, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    record = evaluate(str(encoder), str(images), out=str(out), only="linear,details,looks", baselines="none")
    return record, read_run(out)


def test_everything_is_read_back_without_a_problem(evaluated):
    record, run = evaluated
    assert run.problems == []
    assert {one["evaluation"] for one in record["results"]} == {"linear", "details"}  # a look is no score


def test_the_mean_area_under_the_curves_is_the_probes_auroc(evaluated):
    record, run = evaluated
    linear = next(one for one in record["results"] if one["evaluation"] == "linear")
    assert run.roc.macro.auroc == pytest.approx(linear["metrics"]["auroc"], abs=1e-5)
    assert [line.name for line in run.roc.classes] == ["blue", "green", "red"]
    assert linear["metrics"]["top1"] == pytest.approx(np.trace(run.confusion.counts) / run.confusion.counts.sum())


def test_the_mistakes_have_their_pictures_in_the_order_of_the_table(evaluated):
    _, run = evaluated
    mistakes = rows_of(run.folder / "details" / "confidently_wrong.csv")
    wrong = run.wrong
    assert len(wrong["images"]) == min(24, len(mistakes)) > 0
    name = lambda label: wrong["classes"][label]
    found = [(name(label), name(other)) for label, other in zip(wrong["labels"], wrong["predicted"], strict=True)]
    assert found == [(row["label"], row["predicted"]) for row in mistakes[:24]]
    assert wrong["confidences"] == sorted(wrong["confidences"], reverse=True)
    ids = [f"{label}/{number:02d}.png" for label in ("blue", "green", "red") for number in range(10)]
    assert [ids[index] for index in wrong["indices"]] == [row["id"] for row in mistakes[:24]]


def test_a_convolutional_network_gets_maps_of_similarity(evaluated):
    _, run = evaluated
    assert [row["kind"] for row in run.looks["rows"]] == ["image", "neighbour", "similarity", "colours", "gradients"]
    assert all(len(row["images"]) == 8 for row in run.looks["rows"])
    assert set(run.looks["rows"][0]["notes"]) == {"blue", "green", "red"}
    page = render("looks.html", looks=run.looks)
    assert "at 2 x 2 positions" in page and "?" not in page
    assert [one["name"] for one in run.looks["prototypes"]] == ["blue", "green", "red"]
    assert all(one["counter_name"] != one["name"] for one in run.looks["prototypes"])


def test_a_transformer_gets_its_attention(images, tmp_path):
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    Encoder("vit_tiny_patch16_224", small, (16, 16)).save(tmp_path / "encoder")
    evaluate(str(tmp_path / "encoder"), str(images), out=str(tmp_path), only="looks", baselines="none")
    looks = read_run(tmp_path).looks
    assert [row["kind"] for row in looks["rows"]] == [
        "image", "neighbour", "attention", "patch", "colours", "gradients",
    ]  # fmt: skip
    assert "would give each 0.2500" in render("looks.html", looks=looks)  # 4 patches


def test_without_captum_the_extra_is_named_and_the_rest_is_drawn(images, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    evaluate(str(encoder), str(images), out=str(tmp_path), only="looks", baselines="none")
    assert "they need captum: pip install 'ssl-kit[explain]'" in capsys.readouterr().out
    assert "gradients" not in {row["kind"] for row in read_run(tmp_path).looks["rows"]}


def test_images_without_a_label_are_in_no_matrix(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    vectors = rng.normal(size=(60, 4)) + 2 * np.eye(4)[labels]
    partly = Embeddings.of(vectors, np.where(np.arange(60) < 15, -1, labels))
    probe = linear_probe(Embeddings.of(vectors, labels), partly, keep_probabilities=True)
    write_classes(tmp_path, partly, probe)
    counts = [[int(value) for value in list(row.values())[1:]] for row in rows_of(tmp_path / "confusion.csv")]
    assert np.sum(counts) == 45 and np.trace(counts) == (probe.predictions == labels[15:]).sum()
    share = write_suspects(tmp_path / "suspected.csv", partly)
    suspects = rows_of(tmp_path / "suspected.csv")
    assert share == len(suspects) / 45 and all(int(row["id"]) >= 15 for row in suspects)


def test_probabilities_are_kept_only_when_asked_for():
    rng = np.random.default_rng(0)
    data = Embeddings.of(rng.normal(size=(40, 3)), np.arange(40) % 2)
    assert linear_probe(data, data).probabilities is None
    kept = linear_probe(data, data, keep_probabilities=True)
    assert np.array_equal(kept.probabilities.argmax(axis=1), kept.predictions)
    assert np.array_equal(kept.probabilities.max(axis=1), kept.confidences)
    assert json.dumps(kept.to_json())


@pytest.mark.parametrize(
    ("vectors", "how"),
    [
        (np.full((200, 8), 0.3), "PCA"),  # a run that has collapsed: t-SNE would end the process
        (np.zeros((200, 8)), "PCA"),
        (np.linspace(0, 1, 200)[:, None], "PCA"),  # a code of one number
        (np.repeat(np.eye(2, 8), 100, axis=0), "t-SNE"),
        (1e-25 * np.random.default_rng(0).standard_normal((200, 8)), "t-SNE"),
        (1e25 * np.random.default_rng(0).standard_normal((200, 8)), "t-SNE"),
        (np.random.default_rng(0).standard_normal((99, 8)), "PCA"),
    ],
)
def test_every_kind_of_features_has_a_map(vectors, how):
    positions, projection = flattened(vectors.astype(np.float32), seed=0)
    assert positions.shape == (len(vectors), 2) and np.isfinite(positions).all() and projection.startswith(how)
    assert (np.ptp(positions) > 0) == (np.ptp(vectors, axis=0).max() > 0)
