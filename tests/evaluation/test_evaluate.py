"""The verb: every score beside its baselines, features reused only when they fit, one line for a user's mistake."""

import csv
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pretended import accelerator

import ssl_kit.verbs.evaluate as verb
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Choice
from ssl_kit.embeddings import embeddings, exact
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation import features
from ssl_kit.evaluation.catalog import AS_IT_CAME, ONLY
from ssl_kit.evaluation.fewshot import few_shot
from ssl_kit.evaluation.result import Result
from ssl_kit.verbs import scoring
from ssl_kit.verbs.evaluate import evaluate

pretended = pytest.fixture(accelerator)


@pytest.fixture(scope="module")
def evaluated(images, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return evaluate(str(encoder), str(images), out=str(out), dims=(2,)), out


def found(record, **wanted):
    """The one record with these entries, looked for in its settings too."""
    return [one for one in record["results"] if all({**one["settings"], **one}.get(k) == v for k, v in wanted.items())]


def test_every_score_stands_beside_every_baseline(evaluated):
    record, _ = evaluated
    for evaluation, rows in (("knn", 3), ("linear", 1)):
        for name in ("encoder", "random_init"):
            full = [one for one in found(record, evaluation=evaluation, features=name) if one["settings"]["dim"] == 8]
            assert len(full) == rows
        assert len(found(record, evaluation=evaluation, features="pixels", dim=768)) == rows
        assert len(found(record, evaluation=evaluation, features="pca", dim=8)) == rows
    for name in ("encoder", "random_init", "pca"):
        assert len(found(record, evaluation="knn", features=name, dim=2, reduced_by="pca")) == 2
    assert {one["features"] for one in found(record, evaluation="health")} == {"encoder", "random_init"}


def test_colours_are_found_and_the_gap_to_the_best_baseline_is_the_difference(evaluated):
    record, _ = evaluated
    assert found(record, evaluation="linear", features="pixels")[0]["metrics"]["top1"] > 0.9
    ours = found(record, evaluation="linear", features="encoder")[0]
    others = [one for one in found(record, evaluation="linear") if one["features"] != "encoder"]
    best = max(one["metrics"]["top1"] for one in others)
    assert ours["metrics"]["above_best_baseline"] == pytest.approx(ours["metrics"]["top1"] - best)
    low, high = (ours["metrics"][f"above_best_baseline_{end}"] for end in ("low", "high"))
    assert low <= ours["metrics"]["above_best_baseline"] <= high


def test_an_accelerator_searches_and_solves_and_finds_the_same(images, encoder, tmp_path, monkeypatch, pretended):
    monkeypatch.setattr(embeddings, "choose_precision", lambda *_: Choice("float32", "of which rounding is small"))
    names = tuple(name for name in ONLY if name not in ("attentive", "few_shot", "looks"))
    here = evaluate(str(encoder), str(images), out=str(tmp_path / "here"), only=names, dims=(2,))["results"]
    asked, knn = [], exact.faiss.knn
    counted = lambda queries, *rest, **named: asked.append(len(queries)) or knn(queries, *rest, **named)
    monkeypatch.setattr(exact.faiss, "knn", counted)
    monkeypatch.setattr(verb, "solver", lambda: "cuda")
    monkeypatch.setattr(embeddings, "_device", lambda encoder: torch.device("cuda"))
    there = evaluate(str(encoder), str(images), out=str(tmp_path / "there"), only=names, dims=(2,))["results"]
    assert max(asked) <= 12  # of the report's pictures; all other neighbours are found there
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert (one["evaluation"], one["features"]) == (other["evaluation"], other["features"])
        # all cosines of this encoder are above 0.999: which of two is larger, rounding decides for an image or two
        tolerance = 0.1 if one["features"] == "encoder" else 1e-4
        assert one["metrics"] == pytest.approx(other["metrics"], abs=tolerance)


def test_transformers_get_the_attentive_probe_beside_the_untrained_one(images, tmp_path):
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    Encoder("vit_tiny_patch16_224", small, (16, 16)).save(tmp_path / "encoder")
    record = evaluate(str(tmp_path / "encoder"), str(images), out=str(tmp_path), baselines="random_init")
    assert [one["features"] for one in found(record, evaluation="attentive")] == ["encoder", "random_init"]
    assert found(record, evaluation="attentive", features="encoder")[0]["settings"]["tokens"] == 5
    assert "above_best_baseline" in found(record, evaluation="attentive", features="encoder")[0]["metrics"]


def test_records_pictures_and_report_are_on_disk(evaluated):
    record, out = evaluated
    lines = [Result.from_json(json.loads(line)) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line.to_json() for line in lines] == json.loads(json.dumps(record["results"]))
    assert {path.name for path in (out / "pictures").iterdir()} == {"map.json", "neighbours.json"}
    neighbours = json.loads((out / "pictures" / "neighbours.json").read_text())
    assert set(neighbours["found"]) == {"encoder", "pixels"}
    assert len(neighbours["queries"]) == 12
    assert "<html" in (out / "report.html").read_text()


def test_features_are_made_once_and_again_when_an_image_changes(evaluated, images, encoder, tmp_path, monkeypatch):
    _, out = evaluated
    made = []
    monkeypatch.setattr(features, "embed", lambda *args, **kwargs: made.append(args) or embed(*args, **kwargs))
    evaluate(str(encoder), str(images), out=str(out), only="knn", baselines="random_init")
    assert made == []
    changed = shutil.copytree(images, tmp_path / "images")
    (changed / "test" / "red" / "00.png").write_bytes((images / "test" / "blue" / "00.png").read_bytes())
    evaluate(str(encoder), str(changed), out=str(out), only="knn", baselines="none")
    assert len(made) == 1  # test; train is as it was


def test_damaged_features_are_made_again(evaluated, images, encoder, tmp_path, capsys):
    _, out = evaluated
    shutil.copytree(out / "features", tmp_path / "features")
    for part in (tmp_path / "features").rglob("part-00000.parquet"):  # some are of other tests' images
        part.write_bytes(part.read_bytes()[:-8])
    again = evaluate(str(encoder), str(images), out=str(tmp_path), only="knn", baselines=("random_init",))
    assert "embedding again" in capsys.readouterr().err
    assert len(again["results"]) == 6


def test_results_lie_beside_an_encoder_outside_a_run_and_inside_its_run(images, encoder, tmp_path):
    alone = shutil.copytree(encoder, tmp_path / "mine")
    assert evaluate(str(alone), str(images), only="health", baselines="none")["out"] == str(
        tmp_path / "mine-evaluation"
    )
    shutil.copytree(encoder, tmp_path / "run" / "encoder")
    (tmp_path / "run" / "run.json").write_text("{}")
    result = evaluate(str(tmp_path / "run"), str(images), only=("health",), baselines="none", limit=40)
    assert result["out"] == str(tmp_path / "run")


def test_mistakes_are_one_line(images, encoder, tmp_path):
    with pytest.raises(
        UserError, match=r"--only lienar: did you mean linear. wanted some of knn, linear, attentive, few_shot"
    ):
        evaluate(str(encoder), str(images), only="knn,lienar")
    with pytest.raises(UserError, match="--dims eight"):
        evaluate(str(encoder), str(images), dims="eight")
    with pytest.raises(UserError, match="at least 1"):
        evaluate(str(encoder), str(images), dims=(0,))
    with pytest.raises(UserError, match="wanted at least two classes"):
        evaluate(str(encoder), str(images / "train" / "red"), out=str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        evaluate(str(tmp_path / "nothing"), str(images))


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def everything(images, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    names = [name for name in ONLY if name not in ("knn", "linear", "health")]
    with pytest.MonkeyPatch.context() as patch:  # fewer rows and draws: it is what takes most of the time
        patch.setattr(scoring, "few_shot", partial(few_shot, shots=(1, 5), fractions=(), draws=2))
        return evaluate(str(encoder), str(images), out=str(out), only=tuple(names), dims=(2, 4)), out


def test_every_name_of_only_gives_results_beside_the_baselines_they_can_have(everything):
    record, _ = everything
    measured = {}
    for one in record["results"]:
        measured.setdefault(one["evaluation"], set()).add(one["features"])
    every, networks = {"encoder", "pixels", "pca", "random_init"}, {"encoder", "random_init"}
    assert measured == {
        "attentive": networks,
        "sgd": every,
        "few_shot": every,
        "retrieval": every,
        "instances": networks | {"pixels"},
        "knn": every - {"pixels"},
        "linear": every - {"pixels"},
        "robustness": networks | {"pixels"},
        "details": {"encoder"},
    }
    assert set(measured) == set(ONLY) - {"health", "curve", "looks"}  # which is scored as kNN and probe, and drawn
    for one in found(record, evaluation="few_shot", features="encoder"):
        low, high = (one["metrics"][f"above_best_baseline_{end}"] for end in ("low", "high"))
        assert low <= one["metrics"]["above_best_baseline"] <= high


def test_dimension_curve_is_cut_only_where_there_is_a_code(everything, images, tmp_path):
    record, _ = everything
    ways = {one["settings"].get("reduced_by") for one in found(record, evaluation="linear", features="encoder")}
    assert ways == {"random", "pca", None}
    point = found(record, evaluation="knn", features="encoder", dim=4, reduced_by="pca")[0]
    assert point["settings"]["bytes_per_million_images"] == 16_000_000
    small = {"channels": [4, 4, 8, 8], "num_classes": 6}
    Encoder("resnet18_small", small, (16, 16)).save(tmp_path / "encoder")
    record = evaluate(str(tmp_path / "encoder"), str(images), out=str(tmp_path), only="curve", baselines="none")
    ways = {one["settings"].get("reduced_by") for one in found(record, evaluation="linear")}
    assert ways == {"random", "pca", "cut", None}


def test_details_lie_beside_the_results(everything):
    record, out = everything
    classes = rows_of(out / "details" / "classes.csv")
    assert [row["name"] for row in classes] == ["blue", "green", "red"]
    counts = np.array(
        [[int(row[name]) for name in ("blue", "green", "red")] for row in rows_of(out / "details" / "confusion.csv")]
    )
    assert counts.sum() == 30
    assert [float(row["recall"]) for row in classes] == pytest.approx(np.diag(counts) / 10)
    wrong = rows_of(out / "details" / "confidently_wrong.csv")
    assert len(wrong) == 30 - np.trace(counts)
    for row in wrong:
        assert row["id"].startswith(row["label"]) and row["predicted"] != row["label"]
    metrics = found(record, evaluation="details")[0]["metrics"]
    assert metrics["lowest_recall"] == pytest.approx(np.diag(counts).min() / 10)
    assert len(rows_of(out / "details" / "suspected_train.csv")) == round(72 * metrics["suspected_train"])


def test_leaks_are_counted_and_dropped_when_asked(images, encoder, tmp_path, capsys):
    leaky = shutil.copytree(images, tmp_path / "images")
    for name in ("blue", "red"):
        with Image.open(leaky / "train" / name / "03.png") as image:
            image.save(leaky / "test" / name / "03.png", compress_level=1)  # another file, the same pixels
    options = {"only": "knn", "baselines": "none"}
    counted = evaluate(str(encoder), str(leaky), out=str(tmp_path / "a"), **options)
    assert counted["leaks"] == {"count": 2, "of": 30}
    assert "2 of 30 test images (6.7%)" in capsys.readouterr().out
    assert [(row["test"], row["train"]) for row in rows_of(tmp_path / "a" / "leaks.csv")] == [
        (name, name) for name in ("blue/03.png", "red/03.png")
    ]
    dropped = evaluate(str(encoder), str(leaky), out=str(tmp_path / "b"), drop_leaks=True, **options)
    assert [one["results"][0]["settings"]["num_test"] for one in (counted, dropped)] == [30, 28]
    assert dropped["results"][0]["settings"]["leaks_dropped"]
    assert dropped["results"][0]["made_by"]["test"] != counted["results"][0]["made_by"]["test"]
    unchecked = evaluate(str(encoder), str(leaky), out=str(tmp_path / "c"), leaks=False, **options)
    assert unchecked["leaks"] is None and not (tmp_path / "c" / "leaks.csv").exists()


def test_layers_are_concatenated_and_kept_apart_and_a_balanced_probe_is_recorded(images, encoder, tmp_path):
    options = {"only": "linear,health", "baselines": "random_init,pca", "out": str(tmp_path)}
    record = evaluate(str(encoder), str(images), balanced=True, **options)
    settings = found(record, evaluation="linear")[0]["settings"]
    assert settings["balanced"] and "held_out_balanced_accuracy" in settings
    record = evaluate(str(encoder), str(images), layers=2, **options)
    for one in found(record, evaluation="linear"):
        assert one["settings"]["dim"] == 16
        assert one["settings"].get("layers") == (None if one["features"] == "pca" else 2)
    assert found(record, evaluation="health", features="encoder")[0]["metrics"]["lidar"] >= 1
    assert len(list((tmp_path / "features").iterdir())) == 8  # train and test of two networks, with one and two layers
    with pytest.raises(UserError, match="--layers 0"):
        evaluate(str(encoder), str(images), layers=0)


def test_several_runs_give_mean_spread_and_paired_differences(images, make_encoder, tmp_path, capsys):
    encoders = [str(make_encoder(seed)) for seed in (1, 2, 1)]
    record = evaluate(encoders, str(images), out=str(tmp_path), only="knn,linear", baselines="none")
    assert [one["out"] for one in record["runs"]] == [
        str(tmp_path / f"{number}-tiny-evaluation") for number in range(3)
    ]
    (row,) = [one for one in record["spread"] if one["name"] == "linear probe"]
    values = [found(one, evaluation="linear")[0]["metrics"]["top1"] for one in record["runs"]]
    assert row["values"] == values
    assert row["mean"] == pytest.approx(np.mean(values)) and row["std"] == pytest.approx(np.std(values, ddof=1))
    assert len(record["spread"]) == 4
    for value, (gap, low, high) in zip(values[1:], row["differences"], strict=True):
        assert gap == pytest.approx(value - values[0]) and low <= gap <= high
    assert row["differences"][1] == [0.0, 0.0, 0.0]  # the same encoder again
    assert "several runs" in capsys.readouterr().out


def test_the_command_line_takes_one_run_or_several(images, make_encoder, tmp_path, capsys):
    first, second = str(make_encoder(1)), str(make_encoder(2))
    told = "--only knn --baselines none --leaks false --json --out"
    options = [str(images), *told.split(), str(tmp_path)]
    assert cli.main(["evaluate", first, *options]) == 0
    assert "results" in json.loads(capsys.readouterr().out)
    assert cli.main(["evaluate", first, second, *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2


@pytest.mark.parametrize("right", [0.2, 0.75, 0.8, 0.95])
def test_training_that_harmed_is_warned_of_where_that_is_sure(right, capsys):
    labels, rng = np.arange(400) % 4, np.random.default_rng(0)
    results = []
    for name, share in (("encoder", right), (AS_IT_CAME, 0.8), ("pixels", 0.3)):
        predictions = np.where(rng.permutation(400) < share * 400, labels, (labels + 1) % 4)
        top1 = {"top1": float((predictions == labels).mean())}
        results.append(Result("knn", name, top1, {"chosen": True, "dim": 4}, {}, 0.0, predictions))
    scoring.print_gaps(scoring.compared(results, labels, 0))
    told = capsys.readouterr().err
    assert ("training has made worse what it began with: kNN" in told) == (right == 0.2)


@pytest.mark.parametrize(
    ("right", "told"),
    [
        (0.9, "by kNN the encoder is best, 0.900, surely 0.100 above pca"),
        (0.81, "by kNN the encoder is best, 0.810, but not surely 0.010 above pca"),
        (0.8, "by kNN the encoder and pca are level, 0.800"),
        (0.5, "by kNN pca is best, 0.800, surely 0.300 above the encoder"),
    ],
)
def test_an_evaluation_is_told_in_a_sentence(right, told):
    labels, rng = np.arange(400) % 4, np.random.default_rng(0)
    results = []
    for name, share in (("encoder", right), ("pca", 0.8), ("pixels", 0.3)):
        predictions = np.where(rng.permutation(400) < share * 400, labels, (labels + 1) % 4)
        for chosen in (True, False):  # the customary k is no figure to quote
            top1 = {"top1": float((predictions == labels).mean())}
            results.append(
                Result("knn", name, top1, {"chosen": chosen, "k": 20, "temperature": 1.0}, {}, 0.0, predictions)
            )
    assert scoring.in_words(scoring.compared(results, labels, 0)) == told
