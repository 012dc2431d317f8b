"""The options of training as a user gives them: average, diagnose, compile, accumulation; the verdict in the run."""

import csv
import json
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import stopped_after

from ssl_kit import cli
from ssl_kit.training import chunked
from ssl_kit.training.curves import read_curves

TINY = [
    *("--batch-size", "16", "--epochs", "4", "--method.encoder.args", "{channels: [8, 8, 16, 16]}"),
    *("--method.projection", "[32, 16]", "--method.optim.lr", "0.1", "--evaluate-every", "2"),
]


def pretrain(folder, run, *options):
    assert cli.main(["pretrain", str(folder), "--run", str(run), *TINY, *options]) == 0
    return run


def weights(run):
    return load_file(run / "encoder" / "model.safetensors")


def test_the_average_is_exported_and_survives_a_restart(labelled_folder, tmp_path, capsys):
    options = ["--ema", "0.9", "--ema-cosine", "true", "--diagnose", "true", "--compile", "off"]
    options += ["--tf32", "auto", "--verbose"]
    averaged = pretrain(labelled_folder, tmp_path / "averaged", *options)
    said = capsys.readouterr().out
    for choice in ("tf32: off (", "torch.compile: off (diagnose", "fused optimiser: on (", "freed memory: "):
        assert said.count(choice) == 1
    recipe = yaml.safe_load((averaged / "recipe.yaml").read_text())
    assert recipe["ema"] == 0.9 and recipe["compile"] == "off" and recipe["diagnose"] is True
    with open(averaged / "diagnose.csv", newline="") as file:
        assert {row["layer"] for row in csv.DictReader(file)} >= {"encoder.model.conv1", "encoder.model.layer1.0.act1"}
    plain = pretrain(labelled_folder, tmp_path / "plain")
    assert not torch.equal(weights(averaged)["conv1.weight"], weights(plain)["conv1.weight"])
    longer = pretrain(labelled_folder, averaged, "--resume", "--epochs", "6")
    assert not torch.equal(weights(longer)["conv1.weight"], weights(plain)["conv1.weight"])


def test_a_stopped_average_goes_on_where_its_cosine_was(labelled_folder, tmp_path):
    options = ["--epochs", "2", "--ema", "0.5", "--ema-cosine", "true"]
    whole = pretrain(labelled_folder, tmp_path / "whole", *options)
    with stopped_after(13):
        cli.main(["pretrain", str(labelled_folder), "--run", str(tmp_path / "run"), *TINY, *options])
    run = tmp_path / "run"
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("views_on", ["host", "device"])
def test_all_shapes_are_compiled_before_the_first_step(labelled_folder, tmp_path, monkeypatch, views_on, capsys):
    """142 images in steps of 17 and 18, views that grow; looks at the features compile nothing."""
    graphs, at_start = [], []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(chunked, "detail", lambda line: at_start.append((line, len(graphs))))
    options = ["--compile", "on", "--views-on", views_on, "--limit", "150", "--batch-size", "19", "--grow", "{1: 8}"]
    options += ["--precision", "float32", "--method.optim.lr", "0.01"]
    run = pretrain(labelled_folder, tmp_path / views_on, *options)
    ((line, before),) = at_start
    assert line.startswith("compiled for 17 and 18 images at once in") and len(graphs) == before > 8
    assert "anew" not in capsys.readouterr().err
    torch._dynamo.reset()
    monkeypatch.undo()
    plain = pretrain(labelled_folder, tmp_path / "plain", *options[4:])
    losses = [next(row["loss"] for row in read_curves(one / "metrics.csv") if "loss" in row) for one in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_verdict_and_what_it_rests_on_are_in_the_run(labelled_folder, tmp_path):
    run = pretrain(labelled_folder, tmp_path / "run")
    verdict = json.loads((run / "run.json").read_text())["verdict"]
    assert verdict["state"] in ("learning", "unknown") and verdict["reason"]  # too few steps to be stuck
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["effective_rank"]]
    assert [row["step"] for row in measured] == ["0", "40"] and measured[0]["turned"] == "0.0"
    for name in ("alignment", "uniformity", "images_std", "turned", "grown", "knn_top1"):
        assert all(row[name] for row in measured), name
    assert all(row["gradient_norm"] and row["skipped_steps"] == "0" for row in rows if row["loss"])


def test_what_has_a_place_of_its_own_is_refused_elsewhere(labelled_folder, tmp_path, capsys):
    for option, instead in (("accumulate_grad_batches", "accumulate"), ("gradient_clip_val", "clip")):
        asked = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "r"), *TINY, f"--trainer.{option}", "2"]
        assert cli.main(asked) == 2
        assert f"use --method.optim.{instead}" in capsys.readouterr().err
