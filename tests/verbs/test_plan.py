"""`ssl-kit plan`: figures that follow from what was tried, and grow with what is asked for."""

import json
import os

import pytest
import torch

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.training.checkpoint import newest
from ssl_kit.verbs import plan as module
from ssl_kit.verbs.plan import plan
from ssl_kit.verbs.pretrain import pretrain

NET = {"name": "resnet18_small", "args": {"channels": [8, 8, 16, 16]}}
METHOD = {"class_path": "ssl_kit.methods.simclr.SimCLR", "init_args": {"encoder": NET, "projection": [16, 8]}}


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.setattr(module, "step_cost", lambda *_: 0.002)
    monkeypatch.setattr(module, "_embedding_cost", lambda *_: 0.0005)


def test_figures_follow_from_the_trial(labelled_folder, tried):
    how = {"method": METHOD, "image_size": 16, "epochs": 50}
    one, more = (
        plan(str(labelled_folder), images=1e6, **how),
        plan(str(labelled_folder), images=4e6, processes=2, **how),
    )
    assert one["seconds"] == {"training": 1e6 * 50 * 0.002, "embedding": 500.0}
    assert more["seconds"] == {"training": 2 * one["seconds"]["training"], "embedding": 1000.0}
    assert more["images_per_second"] == 2 * one["images_per_second"] == 1000.0
    originals = [path.stat().st_size for path in labelled_folder.rglob("*.png")]
    assert min(originals) * 1e6 <= one["bytes"]["originals"] <= max(originals) * 1e6
    assert one["bytes_per_second"]["originals"] == pytest.approx(one["bytes"]["originals"] / 1e6 * 500)
    assert one["bytes"]["vectors"] == 4 * one["bytes"]["index_sq8"] == 1_000_000 * 16 * 4


def test_processes_that_share_a_machine_share_its_cores(labelled_folder, monkeypatch):
    found = []
    monkeypatch.setattr(module, "available_cores", lambda: 4)
    monkeypatch.setattr(module, "step_cost", lambda *_: found.append(shares()) or 0.002)
    monkeypatch.setattr(module, "_embedding_cost", lambda *_: found.append(shares()) or 0.0005)
    shares = lambda: (len(os.sched_getaffinity(0)), torch.get_num_threads())
    cores, threads = shares()
    made = plan(str(labelled_folder), method=METHOD, image_size=16, processes=2 * cores, per_machine=cores)
    assert found == [(1, 1)] * 2 and shares() == (cores, threads)
    assert made["images_per_second"] == 2 * cores / 0.002
    for wrong in (3, 8):
        with pytest.raises(UserError, match=f"--per-machine {wrong}: wanted a part of --processes 4, and at most 4"):
            plan(str(labelled_folder), processes=4, per_machine=wrong)


def test_a_checkpoint_is_as_large_as_foretold(labelled_folder, tmp_path, tried):
    how = {"method": METHOD, "image_size": 16, "epochs": 1, "batch_size": 16}
    wanted = plan(str(labelled_folder), ema=0.9, **how)["bytes"]["checkpoint"]
    pretrain(str(labelled_folder), run=str(tmp_path / "run"), ema=0.9, threads=1, **how)
    folder = newest(tmp_path / "run" / "checkpoints")
    assert (folder / "state.safetensors").stat().st_size == pytest.approx(wanted, rel=0.25)  # of a small network


def test_it_tries_and_tells(labelled_folder, capsys):
    words = ["plan", str(labelled_folder), "--images", "1e5", "-c", "mae", "--image-size", "16", "--epochs", "2"]
    words += ["--method.encoder.args", "{embed_dim: 48, depth: 2, num_heads: 2, patch_size: 4}"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "100,000 images, 2 epochs, on this cpu" in told and "training takes about" in told
    assert told.splitlines()[-1].startswith("next: ssl-kit pretrain") and "--images" not in told.splitlines()[-1]
    assert cli.main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["seconds"]["training"] == pytest.approx(2e5 / record["images_per_second"])
    with pytest.raises(UserError, match="--processes 0: wanted a number in"):
        plan(str(labelled_folder), processes=0)
