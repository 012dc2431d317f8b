"""`evaluate --baseline`: pretrained models stand beside the encoder like the other baselines."""

import json
from html import unescape

import numpy as np
import pytest
import timm
import torch

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation import features
from ssl_kit.evaluation.features import pretrained_names
from ssl_kit.evaluation.result import Result
from ssl_kit.verbs import scoring
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.verbs.scoring import compared

THEIRS = "pretrained:their_model"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A timm folder of a network for 24 px, while the encoder sees 16 px."""
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=5)
    config = {"pretrained_cfg": {"input_size": [3, 24, 24], "mean": [0.3, 0.3, 0.3], "std": [0.2, 0.2, 0.2]}}
    folder = tmp_path_factory.mktemp("timm") / "their_model"
    timm.models.save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def beside(images, encoder, theirs, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = {"only": "knn,linear,robustness", "baselines": "pixels"}
    return evaluate(str(encoder), str(images), out=str(out), baseline=str(theirs), **options), out


def rows(record, evaluation):
    found = [one for one in record["results"] if one["evaluation"] == evaluation]
    return {one["features"]: one for one in found if one["settings"].get("chosen", True)}


def test_it_is_scored_like_the_other_baselines(beside, theirs):
    record, _ = beside
    for evaluation in ("knn", "linear", "robustness"):
        assert list(rows(record, evaluation)) == ["encoder", "pixels", THEIRS]
    row = rows(record, "linear")[THEIRS]
    assert row["settings"]["dim"] == timm.create_model("test_resnet").num_features
    assert row["made_by"]["encoder_sha256"] != rows(record, "linear")["encoder"]["made_by"]["encoder_sha256"]


def test_its_features_are_made_with_its_own_preprocessing_and_kept(beside, images, encoder, theirs, monkeypatch):
    record, out = beside
    manifests = [json.loads(path.read_text()) for path in (out / "features").glob("*/manifest.json")]
    sizes = sorted(one["preprocessing"]["image_size"][0] for one in manifests)
    assert sizes == [16, 16, 24, 24]
    assert {tuple(np.round(one["preprocessing"]["mean"], 3)) for one in manifests} == {(0.4, 0.4, 0.4), (0.3, 0.3, 0.3)}
    made = []
    monkeypatch.setattr(features, "embed", lambda *args, **kwargs: made.append(args) or embed(*args, **kwargs))
    again = evaluate(
        str(encoder), str(images), out=str(out), only="linear", baselines="none", baseline=(str(theirs), str(theirs))
    )
    assert made == [] and len(again["results"]) == 2
    assert rows(again, "linear")[THEIRS]["metrics"] == rows(record, "linear")[THEIRS]["metrics"]


def test_it_is_compared_by_paired_differences_and_can_be_the_best():
    labels = np.arange(200) % 4
    right = lambda count: np.where(np.arange(200) < count, labels, (labels + 1) % 4)
    scored = lambda name, count: Result("linear", name, {"top1": count / 200}, predictions=right(count))
    results = [scored("encoder", 120), scored("pixels", 100), scored("pretrained:big", 150)]
    ours = compared(results, labels, 0)[0]
    assert ours.settings["best_baseline"] == "pretrained:big"
    for name, gap in (("best_baseline", -0.15), ("pixels", 0.1), ("pretrained:big", -0.15)):
        assert ours.metrics[f"above_{name}"] == pytest.approx(gap)
        assert ours.metrics[f"above_{name}_low"] < gap < ours.metrics[f"above_{name}_high"]
        # paired: the images on which both are right tell nothing apart
        assert ours.metrics[f"above_{name}_high"] - ours.metrics[f"above_{name}_low"] < 0.12


def test_table_lines_and_report_show_it(beside, images, encoder, theirs, capsys):
    _, out = beside
    evaluate(str(encoder), str(images), out=str(out), only="knn,linear", baselines="pixels", baseline=str(theirs))
    told = capsys.readouterr().out
    assert THEIRS in next(line for line in told.splitlines() if "95 % intervals" in line)
    lines = [line for line in told.splitlines() if "encoder above" in line]
    assert [line.split(",")[0] for line in lines] == ["kNN", "linear probe"]
    assert all("; pretrained:their_model " in line and "pixels " in line for line in lines)
    assert "pretrained their_model" in unescape((out / "report.html").read_text())


def test_names_are_short_and_differ():
    assert pretrained_names(["timm:vit_small.x", "runs/a/encoder", "b/"]) == [
        "pretrained:vit_small.x",
        "pretrained:a",
        "pretrained:b",
    ]
    assert pretrained_names(["x/a", "y/a"]) == ["pretrained:x/a", "pretrained:y/a"]


def test_mistakes_come_before_anything_is_embedded(images, encoder, tmp_path):
    with pytest.raises(UserError, match="no weights of resnet18 in timm's cache"):
        evaluate(str(encoder), str(images), out=str(tmp_path / "out"), baseline="timm:resnet18")
    with pytest.raises(UserError, match="nowhere is not on this disk"):
        evaluate(str(encoder), str(images), out=str(tmp_path / "out"), baseline=("nowhere",))
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_it_repeated_or_with_commas(images, encoder, theirs, make_encoder, tmp_path, capsys):
    other = make_encoder(4)
    names = ["encoder", THEIRS, "pretrained:tiny"]
    options = ["--out", str(tmp_path), "--only", "linear", "--baselines", "none", "--leaks", "false", "--json"]
    for given in (["--baseline", str(theirs), "--baseline", str(other)], ["--baseline", f"{theirs},{other}"]):
        assert cli.main(["evaluate", str(encoder), str(images), *options, *given]) == 0
        assert [one["features"] for one in json.loads(capsys.readouterr().out)["results"]] == names


def test_a_run_is_named_by_its_folder_and_needs_the_same_channels(images, encoder, tmp_path):
    grey = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16), channels=1)
    grey.save(tmp_path / "grey" / "encoder")
    with pytest.raises(UserError, match="takes images of 1 channels, here they have 3"):
        evaluate(str(encoder), str(images), out=str(tmp_path / "out"), baseline=str(tmp_path / "grey"))


def test_a_baseline_too_large_for_its_tokens_costs_the_encoder_nothing(
    images, encoder, theirs, tmp_path, capsys, monkeypatch
):
    tokens = 4.0 * 8 * 2 * 2 * 102  # bytes of the encoder's: 8 channels at 2 x 2 positions, 102 images
    monkeypatch.setattr(scoring, "available_memory", lambda: 2 * tokens)
    options = {"only": "attentive", "baselines": "none", "baseline": str(theirs), "out": str(tmp_path)}
    record = evaluate(str(encoder), str(images), **options)
    assert [one["features"] for one in record["results"]] == ["encoder"]
    assert "pretrained:their_model has no attentive probe" in capsys.readouterr().err
    monkeypatch.setattr(scoring, "available_memory", lambda: 2 * tokens - 2)
    with pytest.raises(UserError, match="leave attentive out of --only"):
        evaluate(str(encoder), str(images), **options)
