"""A run that is told to stop at any moment of its life ends as it should, and goes on as if nothing had happened.

Signals at random moments, and SIGKILL, are the matter of benchmarks/faults/resume.py; here they come at exact places.
"""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.core.owned import record_in
from ssl_kit.data.module import ImageData
from ssl_kit.encoders import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.report.page import write_report
from ssl_kit.report.read import read_run
from ssl_kit.training.checkpoint import Checkpoints, newest
from ssl_kit.verbs import monitor
from ssl_kit.verbs import pretrain as verb
from ssl_kit.verbs.monitor import Measure
from ssl_kit.verbs.record import settle

TINY = [
    *("--batch-size", "16", "--epochs", "1", "--method.encoder.args", "{channels: [8, 8, 8, 8]}"),
    *("--method.projection", "[16, 8]", "--image-size", "16"),
]
STEPS = 10


def pretrain(folder, run, *options):
    return cli.main(["pretrain", str(folder), "--run", str(run), *TINY, *options])


def outcome(run):
    """Everything of a run but its times."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)]
    weights = load_file(run / "encoder" / "model.safetensors")
    return rows, {name: value.tolist() for name, value in weights.items()}


TIMES = ("seconds", "images_per_second", "waiting_share")


def status(run):
    return json.loads((run / "run.json").read_text())["status"]


@pytest.fixture(scope="module", autouse=True)
def no_pages():
    """Half of the time of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (verb, monitor):
            patch.setattr(module, "write_report", lambda runs, path: None)
        yield


@pytest.fixture(scope="module")
def finished(labelled_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain(labelled_folder, run) == 0
    return outcome(run)


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """The steps that are counted here are those of the training, not the one that is tried before it."""
    monkeypatch.setattr(verb, "rehearse", lambda *args: None)


@pytest.fixture(autouse=True)
def guard():
    """A signal that nobody heeds fails the test instead of ending them all."""

    def unheeded(number, frame):
        raise AssertionError(f"nobody heeds signal {number}")

    former = {number: signal.signal(number, unheeded) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def send_in(patch, owner, name, number, call=1):
    """Sends a signal to this process when a function begins for the call-th time."""
    original, calls = getattr(owner, name), []

    def sending(*args, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    patch.setattr(owner, name, sending)


def ended_by(work):
    """The exit code of a command."""
    try:
        return work()
    except SystemExit as end:
        return end.code


# place -> (owner, function, which call, the step that is saved, None where the run ends before it has begun)
BEFORE = {
    "the images are opened": (verb, "open_source", 1),
    "the first picture is drawn": (verb, "draw_first", 1),
    "the first report is written": (verb, "write_report", 1),
    "Lightning has its own handlers": (ImageData, "train_dataloader", 1),
}
DURING = {
    "the untrained encoder is measured": (Measure, "__call__", 1, 1),
    "the first step": (SimCLR, "loss", 1, 1),
    "a later step": (SimCLR, "loss", 7, 7),
    "a step is over": (Checkpoints, "after_step", 9, 9),
}
AFTER = {
    "the last step is over": (Checkpoints, "after_step", STEPS),
    "the last measurement": (Measure, "__call__", 2),
    "the last state is saved": (Checkpoints, "at_end", 1),
    "the encoder is written": (Encoder, "save", 1),
    "the last report is written": (verb, "write_report", 2),
}


@pytest.mark.parametrize(
    ("place", "number"), [(place, signal.SIGTERM) for place in BEFORE] + [(list(BEFORE)[-1], signal.SIGINT)]
)
def test_before_the_first_step_a_run_ends_at_once(finished, labelled_folder, tmp_path, monkeypatch, place, number):
    owner, name, call = BEFORE[place]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in(patch, owner, name, number, call)
        assert ended_by(lambda: pretrain(labelled_folder, run)) == 128 + number
    assert not list(run.glob("checkpoints/*"))
    begun = (run / "run.json").exists()
    assert begun == (place != "the images are opened") and (not begun or status(run) == "interrupted")
    assert pretrain(labelled_folder, run, *(["--resume"] if begun else [])) == 0
    assert outcome(run) == finished and status(run) == "finished"


@pytest.mark.parametrize(
    ("place", "number"),
    [(place, signal.SIGTERM) for place in DURING] + [("a later step", signal.SIGINT), ("a later step", signal.SIGUSR1)],
)
def test_a_run_stops_at_the_next_step_boundary(finished, labelled_folder, tmp_path, monkeypatch, place, number):
    owner, name, call, step = DURING[place]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in(patch, owner, name, number, call)
        assert ended_by(lambda: pretrain(labelled_folder, run)) == 128 + number
    assert status(run) == "interrupted"
    assert [path.name for path in run.glob("checkpoints/step-*")] == [f"step-{step:08d}"]
    assert pretrain(labelled_folder, run, "--resume") == 0
    assert outcome(run) == finished and status(run) == "finished"


@pytest.mark.parametrize("place", AFTER)
def test_after_the_last_step_a_run_ends_well(finished, labelled_folder, tmp_path, monkeypatch, place):
    owner, name, call = AFTER[place]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in(patch, owner, name, signal.SIGTERM, call)
        assert pretrain(labelled_folder, run) == 0
    assert outcome(run) == finished and status(run) == "finished"


def test_a_signal_whose_exception_was_swallowed_still_stops_the_run(finished, labelled_folder, tmp_path, monkeypatch):
    run, draw = tmp_path / "run", verb.draw_first

    def swallowing(*args):  # as a finaliser or a callback from C does
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(verb, "draw_first", swallowing)
        assert ended_by(lambda: pretrain(labelled_folder, run)) == 128 + signal.SIGTERM
    assert status(run) == "interrupted" and not list(run.glob("checkpoints/*"))
    assert pretrain(labelled_folder, run, "--resume") == 0 and outcome(run) == finished


def test_a_resumed_run_that_is_stopped_at_once_keeps_its_state(finished, labelled_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_in(patch, SimCLR, "loss", signal.SIGTERM, 7)
        assert ended_by(lambda: pretrain(labelled_folder, run)) == 128 + signal.SIGTERM
    for owner, name in ((verb, "draw_first"), (ImageData, "train_dataloader")):
        with monkeypatch.context() as patch:
            send_in(patch, owner, name, signal.SIGTERM)
            assert ended_by(lambda: pretrain(labelled_folder, run, "--resume")) == 128 + signal.SIGTERM
        assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000007"]
    assert pretrain(labelled_folder, run, "--resume") == 0 and outcome(run) == finished


def test_a_run_stopped_in_a_bad_step_goes_on_from_before_it(labelled_folder, tmp_path, monkeypatch):
    """The state after a held step is good, too; but after three of them it would hold back all that follow."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        loss, calls = SimCLR.loss, []

        def spoilt(self, *args):
            calls.append(None)
            if len(calls) == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            losses = loss(self, *args)
            return {"loss": losses["loss"] * float("nan")} if 4 <= len(calls) <= 6 else losses

        patch.setattr(SimCLR, "loss", spoilt)
        assert ended_by(lambda: pretrain(labelled_folder, run, "--checkpoint-minutes", "0")) == 128 + signal.SIGTERM
    assert [path.name for path in sorted(run.glob("checkpoints/step-*"))] == ["step-00000002", "step-00000003"]


def test_nan_in_three_steps_in_a_row_is_an_error_of_the_command(labelled_folder, tmp_path, monkeypatch, capsys):
    run, loss = tmp_path / "run", SimCLR.loss
    monkeypatch.setattr(SimCLR, "loss", lambda self, *args: {"loss": loss(self, *args)["loss"] * float("nan")})
    assert pretrain(labelled_folder, run) == 2
    assert "not finite in 3 steps in a row (first at step 0)" in capsys.readouterr().err and status(run) == "failed"
    assert not list(run.glob("checkpoints/step-*"))


def test_a_run_that_fails_says_so(labelled_folder, tmp_path, monkeypatch):
    def fails(*args):
        raise UserError("got a mistake, wanted none")

    monkeypatch.setattr(SimCLR, "loss", fails)
    monkeypatch.setattr(verb, "write_report", write_report)
    assert pretrain(labelled_folder, tmp_path / "run") == 2
    assert status(tmp_path / "run") == "failed"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<span>failed</span>" in page and "<body>" in page  # it looks at the run no more


def test_a_run_that_was_killed_as_it_began_is_none(labelled_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(labelled_folder, run, "--trainer.max_steps", "3") == 0
    (run / "recipe.yaml").unlink()  # the record is written first
    assert pretrain(labelled_folder, run, "--resume") == 2 and "holds no run" in capsys.readouterr().err
    assert list(run.glob("checkpoints/step-*"))
    assert pretrain(labelled_folder, run, "--seed", "1", "--trainer.max_steps", "2") == 0  # and takes nothing from it
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-00000002"]


def test_a_run_that_was_killed_is_not_said_to_be_running(labelled_folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = [*TINY, "--trainer.max_steps", "100000", "--checkpoint-minutes", "0"]
    command = [sys.executable, "-m", "ssl_kit", "pretrain", str(labelled_folder), "--run", str(run), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not newest(run / "checkpoints"):
            assert process.poll() is None
            time.sleep(0.1)
        assert read_run(run).info["status"] == "running"
        process.kill()
    assert status(run) == "running"  # it could tell nobody
    assert cli.main(["report", str(run), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert told["status"].startswith("broken off")
    assert told["next"] == f"ssl-kit pretrain {labelled_folder} --run {run} --resume"
    assert "data-reload" not in (run / "report.html").read_text()
    assert cli.main(["evaluate", str(run), str(labelled_folder)]) == 2
    assert "let `ssl-kit pretrain" in capsys.readouterr().err
    with lock(run), record_in(run) as record:  # as `evaluate` does once there is an encoder
        settle(record)
    assert status(run) == "broken off"
    assert (
        cli.main(
            [*shlex.split(told["next"])[1:], "--trainer.max_steps", str(int(newest(run / "checkpoints").name[5:]) + 1)]
        )
        == 0
    )
    assert status(run) == "finished"
