"""Every item of the training state is needed: without any one of them, a resumed run is another run."""

import itertools
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import stopped_after

from ssl_kit.core.files import read_json
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.training import curves, duration
from ssl_kit.training.checkpoint import SafeCheckpointIO, newest
from ssl_kit.training.curves import Curves, read_curves
from ssl_kit.verbs import monitor
from ssl_kit.verbs import pretrain as verb

TIMES = ("seconds", "images_per_second", "waiting_share")
STEPS, STOPPED = 30, 13  # in the middle of a row and of an epoch
SETTINGS = {
    "evaluate_every": 1,
    "method": {
        "class_path": "ssl_kit.methods.simclr.SimCLR",
        "init_args": {
            "encoder": {"name": "resnet18_small", "args": {"channels": [16, 16, 16, 16], "drop_rate": 0.1}},
            "projection": [16, 8],
            "optim": {"name": "sgd", "lr": 0.5, "warmup_epochs": 1.0},
        },
    },
    **{"image_size": 16, "batch_size": 16, "epochs": 3, "ema": 0.9, "threads": 1},
}


@pytest.fixture(scope="module", autouse=True)
def drawing():
    """Rows and measurements often; a loss that draws from numpy's and Python's generators; no pages."""
    loss = SimCLR.loss

    def noisy(self, views, key):
        return {"loss": loss(self, views, key)["loss"] * (1 + 0.01 * np.random.rand() + 0.01 * random.random())}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimCLR, "loss", noisy)
        patch.setattr(curves, "_MEASURE_STEPS", 8)
        patch.setitem(Curves.__init__.__kwdefaults__, "interval", 5)
        for module in (verb, monitor):
            patch.setattr(module, "write_report", lambda runs, path: None)
        yield


def pretrain(folder, run, resume=False, **settings):
    verb.pretrain(str(folder), run=str(run), resume=resume, **{**SETTINGS, **settings})
    return outcome(run)


def pretrain_until(step, folder, run, **settings):
    with stopped_after(step):
        pretrain(folder, run, **settings)
    return run


def outcome(run):
    """The rows and the last state, without what keeps time."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_curves(run / "metrics.csv")]
    last = newest(run / "checkpoints")
    return rows, read_json(last / "manifest.json")["files"]["state.safetensors"], last.name


@pytest.fixture(scope="module")
def undisturbed(labelled_folder, tmp_path_factory):
    return pretrain(labelled_folder, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture(scope="module")
def stopped(labelled_folder, tmp_path_factory):
    """A run that was stopped."""
    return pretrain_until(STOPPED, labelled_folder, tmp_path_factory.mktemp("runs") / "stopped")


def _zero(tensors, word):
    for name, value in tensors.items():
        if word in name:
            value.zero_()


def _counters(state, name):
    """All counters of one of Lightning's loops."""
    for counter in state["loops"]["fit_loop"][f"epoch_loop.{name}"].values():
        if isinstance(counter, dict):
            counter.update(dict.fromkeys(counter, 0))


def _steps(state):
    progress = state["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    progress["optimizer"]["step"]["total"] = {"ready": 0, "completed": 0}


def _dense(state):
    for entry in state["optimizer_states"][0]["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()


def _part(state, name):
    return next(parts for key, parts in state["callbacks"].items() if key.startswith("Loop"))[name]


def _fresh_generator(state):
    state["generators"]["torch"] = torch.Generator().manual_seed(0).get_state()


ITEMS = {
    "weights": lambda state: _zero(state["state_dict"], "conv1.weight"),
    "running statistics": lambda state: _zero(state["state_dict"], "running_mean"),
    "momentum": lambda state: state["optimizer_states"][0]["state"].clear(),
    "its memory format": _dense,
    "the schedule": lambda state: state["lr_schedulers"][0].update(last_epoch=0),
    "the place in the data": lambda state: _counters(state, "batch_progress"),
    "the steps": _steps,
    "the average": lambda state: _zero(_part(state, "ema")["encoder"], "weight"),
    "the guard's counts": lambda state: _part(state, "guard")["counts"].zero_(),
    "the losses of the row": lambda state: _part(state, "curves").update(collected={}),
    "the images of the row": lambda state: _part(state, "curves").update(images=0),
    "the last measurement": lambda state: _part(state, "curves").update(measured=(0.0, 0.0)),
    "where the weights began": lambda state: _part(state, "curves").update(start=None),
    "torch's generator": _fresh_generator,
    "numpy's generator": lambda state: state["generators"].update(
        numpy=np.random.RandomState(0).get_state(legacy=False)
    ),
    "Python's generator": lambda state: state["generators"].update(python=random.Random(0).getstate()),
}


def resumed(folder, stopped, run, patch, forget):
    """The outcome of the stopped run, resumed from a state that `forget` has changed."""
    shutil.copytree(stopped, run)
    load = SafeCheckpointIO.load_checkpoint

    def forgetful(self, *args, **options):
        state = load(self, *args, **options)
        forget(state)
        return state

    patch.setattr(SafeCheckpointIO, "load_checkpoint", forgetful)
    return pretrain(folder, run, resume=True)


def test_with_all_of_it_the_run_is_the_undisturbed_one(labelled_folder, stopped, undisturbed, tmp_path, monkeypatch):
    assert newest(stopped / "checkpoints").name == f"step-{STOPPED:08d}"
    assert resumed(labelled_folder, stopped, tmp_path / "run", monkeypatch, lambda state: None) == undisturbed
    assert undisturbed[2] == f"step-{STEPS:08d}"


def test_a_run_that_was_stopped_where_a_row_is_written_keeps_it(labelled_folder, undisturbed, tmp_path):
    run = pretrain_until(20, labelled_folder, tmp_path / "run")
    rows = [row for row in read_curves(run / "metrics.csv") if row["step"] == 20]
    assert ["loss" in row for row in rows] == [True, False]  # and a measurement
    assert pretrain(labelled_folder, run, resume=True) == undisturbed


def test_a_run_by_minutes_goes_on_at_the_rate_it_had(labelled_folder, tmp_path, monkeypatch):
    """From the very next step: the horizon is measured anew only some steps later."""
    clock = (0.05 * look for look in itertools.count())  # it goes on when it is looked at, once a step
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setitem(Curves.__init__.__kwdefaults__, "interval", 1)
    timed = {"epochs": None, "minutes": 0.1}
    run = pretrain_until(30, labelled_folder, tmp_path / "run", **timed)
    pretrain(labelled_folder, run, resume=True, **timed)
    rates = [row["lr"] for row in read_curves(run / "metrics.csv") if "lr" in row]
    assert 56 <= len(rates) <= 120  # 6 s, of which up to half went before, 0.05 s a step
    falls = [one - other for one, other in itertools.pairwise(rates[15:])]
    # half a cosine: at most pi / 2 / 50 of the peak; a length that is fitted anew moves it by as little
    assert all(abs(fall) < 0.05 * max(rates) for fall in falls) and sum(fall < 0 for fall in falls) <= 2


@pytest.mark.parametrize("item", ITEMS)
def test_without_one_item_it_is_another_run(labelled_folder, stopped, undisturbed, tmp_path, monkeypatch, item):
    assert resumed(labelled_folder, stopped, tmp_path / "run", monkeypatch, ITEMS[item]) != undisturbed


@pytest.mark.parametrize("forgotten", [False, True])
def test_without_the_best_score_an_equal_one_replaces_it(labelled_folder, stopped, tmp_path, monkeypatch, forgotten):
    best = _part(SafeCheckpointIO().load_checkpoint(newest(stopped / "checkpoints")), "monitor")["best"]
    monkeypatch.setattr(monitor, "knn_accuracy", lambda *args: best)

    def forget(state):
        if forgotten:
            _part(state, "monitor")["best"] = -1.0

    resumed(labelled_folder, stopped, tmp_path / "run", monkeypatch, forget)
    before, after = (read_json(run / "checkpoints" / "best" / "manifest.json") for run in (stopped, tmp_path / "run"))
    assert (before["step"] == after["step"]) is not forgotten
