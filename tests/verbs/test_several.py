"""Pretraining in several processes on gloo: as one process, stopped, resumed by others, and when one of them fails."""

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file

from ssl_kit import cli
from ssl_kit.core.console import result, say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.named import agent, restarted
from ssl_kit.core.process import LOST
from ssl_kit.data import opening
from ssl_kit.data.listing import Skipped
from ssl_kit.data.opening import open_source
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.methods.mae import MAE as Method
from ssl_kit.training import distributed as together
from ssl_kit.training import joining
from ssl_kit.training.distributed import all_gather_object, rank
from ssl_kit.training.joining import joined
from ssl_kit.training.loop import Loop
from ssl_kit.verbs import monitor
from ssl_kit.verbs.monitor import Monitor, Share
from ssl_kit.views.recipe import plain

VIT = "{patch_size: 4, embed_dim: 16, depth: 1, num_heads: 1, class_token: false, global_pool: avg, fc_norm: false%s}"
MAE = [  # no batch statistics; plain gradient steps, which do not magnify roundings
    *("--method", "ssl_kit.methods.mae.MAE", "--method.encoder.name", "vit_tiny_patch16_224"),
    *("--method.encoder.args", VIT % "", "--method.decoder_width", "16", "--method.decoder_heads", "1"),
    *("--method.optim.name", "sgd", "--method.optim.lr", "2", "--method.optim.warmup_epochs", "0"),
    *("--precision", "float32", "--threads", "1", "--epochs", "5", "--evaluate-every", "2"),
]
STEPS = 35  # 152 images in steps of 22 (21 or 22)


def metrics(run, *columns):
    with open(run / "metrics.csv", newline="") as file:
        return [[float(row[column]) for column in columns] for row in csv.DictReader(file) if row["loss"]]


def weights(run):
    return load_file(run / "encoder" / "model.safetensors")


def error(one, other):
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in other)


def assert_alike(run, wanted):
    """To rounding: the order of sums differs."""
    places = ("step", "epoch", "images", "lr")
    assert metrics(run, *places) == metrics(wanted, *places)
    for (loss,), (expected,) in zip(metrics(run, "loss"), metrics(wanted, "loss"), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
    assert error(weights(run), weights(wanted)) <= 1e-5


def assert_same(run, wanted):
    assert metrics(run, "step", "images", "loss") == metrics(wanted, "step", "images", "loss")
    one, other = weights(run), weights(wanted)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def said(logs, rank=0):
    return (logs / f"{rank}.log").read_text()


def at_each_step(act):
    """Calls `act(trainer, batch)` when the optimiser has moved, before anything else is done."""
    end = Loop.on_train_batch_end

    def watched(self, trainer, module, outputs, batch, batch_idx):
        act(trainer, batch)
        end(self, trainer, module, outputs, batch, batch_idx)

    Loop.on_train_batch_end = watched


def stopping(victim, step, number, seen, *arguments):
    """One command line; process `victim` sends itself a signal after a step. What each step sees goes to `seen`."""

    def act(trainer, batch):
        with open(seen, "a", encoding="utf-8") as file:
            file.write(json.dumps([trainer.global_step, batch["key"].index.tolist()]) + "\n")
        if os.environ.get("RANK", "0") == str(victim) and trainer.global_step == step:
            os.kill(os.getpid(), number)

    at_each_step(act)
    ranks.command(*arguments)


def steps_seen(path):
    seen = {}
    for line in path.read_text().splitlines():
        step, rows = json.loads(line)
        seen.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in seen.items()}


@pytest.fixture(scope="module")
def alone(labelled_folder, tmp_path_factory):
    """The run in one process, with steps of 22 images."""
    root = tmp_path_factory.mktemp("alone")
    options = ["pretrain", str(labelled_folder), "--run", str(root / "run"), *MAE, "--batch-size", "24"]
    assert ranks.ended(ranks.start(1, root, stopping, -1, 0, 0, str(root / "seen"), *options)) == [0]
    return root


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_as_one(labelled_folder, alone, tmp_path, count):
    run = tmp_path / "run"
    codes = ranks.pretrain(count, tmp_path, labelled_folder, "--run", run, *MAE, "--batch-size", 24 // count)
    assert codes == [0] * count, said(tmp_path)
    assert_alike(run, alone / "run")
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished" and record["world_size"] == count and record["images_per_step"] == 24
    assert record["chance_loss"] == json.loads((alone / "run" / "run.json").read_text())["chance_loss"]
    assert metrics(run, "step")[-1] == [STEPS]
    assert said(tmp_path, 1) == "" and said(tmp_path).count("verdict: ") == 1


def test_gradient_caching_in_two_processes_is_that_of_one(labelled_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in labelled_folder.rglob("*.png"):
        (images / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    options = [  # batch norm normalises chunks, and the chunks are the same
        *("--method.encoder.args", "{channels: [8, 8, 16, 16]}", "--method.projection", "[16]"),
        *("--batch-size", "8", "--trainer.max_steps", "2", "--precision", "float32", "--threads", "1"),
    ]
    for count in (1, 2):
        folder = tmp_path / str(count)
        codes = ranks.pretrain(
            count, folder, images, "--run", folder / "run", *options, "--contrastive-batch", 32 // count
        )
        assert codes == [0] * count, said(folder)
    runs = [tmp_path / count / "run" for count in "12"]
    assert metrics(runs[1], "step", "loss") == [
        pytest.approx(row, rel=1e-5) for row in metrics(runs[0], "step", "loss")
    ]
    learnt = [
        {name: value for name, value in weights(run).items() if "running" not in name and "tracked" not in name}
        for run in runs
    ]
    assert error(learnt[1], learnt[0]) <= 1e-4


def test_a_run_goes_on_with_any_number_of_processes_and_the_same_steps(labelled_folder, alone, tmp_path):
    run, seen = tmp_path / "run", str(tmp_path / "seen")
    begin = ["pretrain", str(labelled_folder), "--run", str(run), *MAE, "--batch-size", "12"]
    go_on = ["pretrain", "--run", str(run), "--resume"]
    for count, victim, step, options in (
        (2, 1, 9, begin),
        (1, 0, 17, [*go_on, "--trainer.devices", "1"]),
        (4, 2, 30, go_on),
    ):
        logs = tmp_path / str(count)
        codes = ranks.ended(ranks.start(count, logs, stopping, victim, step, signal.SIGTERM, seen, *options))
        assert codes == [143] * count, said(logs)
        assert f"stopped; step {step} is kept" in said(logs)
        assert count == 1 or said(logs, count - 1) == ""
        assert status(run) == "interrupted"
    assert "batch_size: 6 on each of 4 processes (24 images a step, as before)" in said(tmp_path / "4")
    assert ranks.ended(ranks.start(3, tmp_path / "3", stopping, -1, 0, 0, seen, *go_on)) == [0, 0, 0]
    assert steps_seen(Path(seen)) == steps_seen(alone / "seen")
    assert_alike(run, alone / "run")


def test_a_run_of_two_that_was_killed_goes_on_bit_by_bit(labelled_folder, tmp_path):
    options = [*MAE, "--method.encoder.args", VIT % ", proj_drop_rate: 0.2", "--batch-size", "12"]
    options += ["--checkpoint-minutes", "0.0001"]
    whole, broken, seen = tmp_path / "whole" / "run", tmp_path / "broken" / "run", str(tmp_path / "seen")
    assert ranks.pretrain(2, whole.parent, labelled_folder, "--run", whole, *options) == [0, 0]
    begin = ["pretrain", str(labelled_folder), "--run", str(broken), *options]
    processes = ranks.start(2, broken.parent, stopping, 1, 16, signal.SIGKILL, seen, *begin)
    assert ranks.ended(processes) == [LOST, -signal.SIGKILL]
    assert "process 0: another one has ended" in said(broken.parent) and said(broken.parent, 1) == ""
    assert status(broken) == "failed"
    assert ranks.pretrain(2, broken.parent, "--run", broken, "--resume") == [0, 0]
    assert_same(broken, whole)


def drawn(answers):
    """What each process draws when training starts, and when it goes on with what it had kept."""
    with joined():
        loops = SimpleNamespace(epoch_loop=SimpleNamespace())
        trainer = SimpleNamespace(global_step=3, fit_loop=loops, precision_plugin=None)
        module = SimpleNamespace(device="cpu", buffers=list)
        torch.manual_seed(0)
        first, again = Loop(seed=0), Loop(seed=0)
        first.on_train_start(trainer, module)
        again.load_state_dict(first.state_dict())
        numbers = [torch.rand(1).item()]
        again.on_train_start(trainer, module)
        numbers.append(torch.rand(1).item())
        (answers / f"{rank()}.json").write_text(json.dumps(numbers))


def test_each_process_has_its_own_generators_and_gets_them_back(tmp_path):
    assert ranks.ended(ranks.start(3, tmp_path, drawn, tmp_path)) == [0, 0, 0], said(tmp_path)
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert len({numbers[0] for numbers in found}) == 3
    assert all(numbers[0] == numbers[1] for numbers in found[1:])  # those of the first are in the checkpoint itself


def speaking():
    """A program of several processes, not our command line."""
    with joined():
        for speak in (say, result, warn):
            speak("hello")


def test_only_the_first_process_speaks(tmp_path):
    assert ranks.ended(ranks.start(2, tmp_path, speaking)) == [0, 0]
    assert said(tmp_path).count("hello") == 3 and said(tmp_path, 1) == ""


def connecting(late):
    """The first process takes its time to make the second group; `late` is there when it has."""
    make = joining.patient_group

    def slowly(everyone):
        group = make(everyone)
        if rank() == 0 and not late.exists():
            time.sleep(0.5)
            late.touch()
        return group

    slowly.cache_clear = make.cache_clear
    joining.patient_group = slowly
    with joined():
        assert late.exists()


def test_none_goes_on_before_all_are_connected(tmp_path):
    assert ranks.ended(ranks.start(2, tmp_path, connecting, tmp_path / "late")) == [0, 0], said(tmp_path, 1)


def leaving(threads, *arguments):
    """A run, and then the names of the threads that this process still has."""
    code = cli.main(arguments)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    (threads / f"{rank()}-{os.getpid()}.json").write_text(json.dumps([code, names]))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have no names there")
def test_no_thread_of_the_group_is_left_to_abort_the_end(labelled_folder, tmp_path):
    threads = tmp_path / "threads"
    threads.mkdir()
    options = ("pretrain", str(labelled_folder), "--run", str(tmp_path / "run"), *MAE, "--batch-size", "12")
    assert ranks.ended(ranks.start(2, tmp_path, leaving, threads, *options)) == [0, 0], said(tmp_path)
    found = [json.loads(path.read_text()) for path in threads.iterdir()]
    assert len(found) == 2 and all(code == 0 and not any("gloo" in name for name in names) for code, names in found)


def mistaken():
    """All processes make the same mistake."""
    try:
        with joined():
            raise UserError("the same mistake")
    except UserError as mistake:
        sys.exit(f"told: {mistake}")


def test_a_mistake_that_all_make_is_told_by_one(tmp_path):
    codes = ranks.ended(ranks.start(3, tmp_path, mistaken))
    assert sorted(codes)[1:] == [LOST, LOST] and min(codes) in (1, 2)
    assert sum(said(tmp_path, number).count("the same mistake") for number in range(3)) == 1


def damaging(step, names, *arguments):
    """One command line that decodes files while it trains; process 1 cuts some of them short after a step."""
    opening.fits_in_memory = lambda needed: (False, "as the test has it")

    def act(trainer, batch):
        if rank() == 1 and trainer.global_step == step:
            for name in names:
                Path(name).write_bytes(Path(name).read_bytes()[:90])

    at_each_step(act)
    ranks.command(*arguments)


@pytest.fixture
def files(labelled_folder, tmp_path):
    """A copy of the images that may be damaged."""
    return shutil.copytree(labelled_folder, tmp_path / "files")


def test_files_that_one_process_finds_bad_are_known_to_all(files, tmp_path):
    names = [str(files / "abcd"[number % 4] / f"{number:03d}.png") for number in range(0, 24, 4)]
    options = [*MAE, "--batch-size", "12", "--epochs", "3", "--max-bad", "0.1"]
    command = ["pretrain", str(files), "--run", str(tmp_path / "run"), *options]
    assert ranks.ended(ranks.start(2, tmp_path, damaging, 5, names, *command)) == [0, 0], said(tmp_path)
    with open(tmp_path / "run" / "skipped.csv", newline="") as file:
        assert {str(files / row["path"]) for row in csv.DictReader(file)} == set(names)
    assert status(tmp_path / "run") == "finished"


def test_one_process_with_a_bad_image_too_many_ends_all_with_one_reason(files, tmp_path):
    options = [*MAE, "--batch-size", "12", "--epochs", "30", "--max-bad", "0"]
    command = ["pretrain", str(files), "--run", str(tmp_path / "run"), *options]
    names = [str(files / "c" / "011.png")]
    codes = ranks.ended(ranks.start(2, tmp_path, damaging, 5, names, *command))
    assert sorted(codes) == [2, LOST]
    reasons = [line for number in (0, 1) for line in said(tmp_path, number).splitlines() if "could not be" in line]
    assert len(reasons) == 1 and "1 of 160 images could not be decoded" in reasons[0] and "011.png" in reasons[0]
    assert status(tmp_path / "run") == "failed"


def counted(answers):
    """Each of two processes has met two bad files, and three are allowed."""
    with joined():
        source = open_source(np.zeros((10, 8, 8, 3), np.uint8))
        source.bad = Skipped(10, 0.3)
        all_files = Monitor(None, SimpleNamespace(history=[]), None, None, source)
        for number in range(2):
            source.bad.add(f"{rank()}-{number}", "cut off")
        try:
            all_files.at_end(None, None)
        except UserError as error:
            (answers / str(rank())).write_text(str(error))


def test_the_budget_of_bad_files_is_that_of_the_run(tmp_path):
    assert ranks.ended(ranks.start(2, tmp_path, counted, tmp_path)) == [0, 0]
    for number in range(2):
        assert "4 of 10 images could not be decoded" in (tmp_path / str(number)).read_text()


def measured(folder, answers):
    """Features of a share of the images, joined, and their kNN accuracy."""
    with joined():
        torch.manual_seed(0)
        encoder = Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (8, 8)).eval()
        source = opening.open_source(folder, in_memory=False, max_bad=0.5)
        share = Share(source)
        vectors, labels = share.embedded(encoder, plain((8, 8)), "test")
        accuracy = knn_accuracy(vectors, labels, vectors[::3], labels[::3])
        seen = all_gather_object(share.rows.tolist())
        if rank() == 0:
            np.savez(answers, vectors=vectors, labels=labels, accuracy=accuracy, seen=np.concatenate(seen))


def test_evaluation_sees_every_image_once_and_scores_alike_in_any_number_of_processes(files, tmp_path):
    for label in "abcd":  # 640 images in batches of 256: the last one is short, and some processes may have none
        for number in range(40):
            data = (files / label / f"{number:03d}.png").read_bytes()
            for copy in range(1, 4):
                (files / label / f"{number + 40 * copy:03d}.png").write_bytes(data)
        (files / label / "007.png").write_bytes(b"")
    found = []
    for count in (1, 2, 4):
        answers = tmp_path / f"{count}.npz"
        assert ranks.ended(ranks.start(count, tmp_path / str(count), measured, str(files), str(answers))) == [0] * count
        found.append(dict(np.load(answers)))
    for other in found:
        assert sorted(other["seen"].tolist()) == list(range(640)) and len(other["labels"]) == 636
        for name in ("vectors", "labels", "accuracy"):
            assert np.array_equal(other[name], found[0][name]), name


def impatient(act, *arguments):
    """One command line whose collectives of a step wait two seconds only, and that shows it lives all the time."""
    together.TIMEOUT = timedelta(seconds=2)
    together.BEAT = joining.BEAT = timedelta(seconds=0.1)
    act()
    ranks.command(*arguments)


def dawdle():
    """The first process takes longer than that for a report."""
    write = monitor.write_report

    def slowly(*arguments):
        time.sleep(4)
        write(*arguments)

    monitor.write_report = slowly


def hang():
    """Process 1 stops moving at some step, and stays."""

    def act(trainer, batch):
        if rank() == 1 and trainer.global_step == 12:
            os.kill(os.getpid(), signal.SIGSTOP)

    at_each_step(act)


def vanish():
    """The first process stops moving in what it does alone, and stays, as on a host that is cut off."""
    monitor.write_report = lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP)


def test_the_others_wait_for_what_the_first_does_alone_but_not_for_one_that_hangs(labelled_folder, tmp_path):
    options = [*MAE, "--batch-size", "12"]
    command = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "slow"), *options]
    assert ranks.ended(ranks.start(2, tmp_path / "a", impatient, dawdle, *command)) == [0, 0], said(tmp_path / "a")
    command = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "hung"), *options]
    processes = ranks.start(2, tmp_path / "b", impatient, hang, *command)
    processes[0].join(30)
    assert ranks.ended(processes, 0)[0] == LOST and "another one has ended or hangs" in said(tmp_path / "b")
    command = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "gone"), *options]
    processes = ranks.start(2, tmp_path / "c", impatient, vanish, *command)
    processes[1].join(60)
    assert ranks.ended(processes, 0)[1] == LOST and "no sign of life of process 0" in said(tmp_path / "c", 1)


def with_unused_weights(*arguments):
    """One command line of a method with a weight that its loss does not see."""
    build = Method.__init__

    def built(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.unused = torch.nn.Parameter(torch.zeros(1))

    Method.__init__ = functools.wraps(build)(built)  # with its signature, which is the recipe's
    ranks.command(*arguments)


def test_weights_that_the_loss_does_not_see_are_named_with_the_way_out(labelled_folder, tmp_path):
    command = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "run"), *MAE, "--batch-size", "12"]
    command += ["--trainer.max_steps", "3"]
    codes = ranks.ended(ranks.start(2, tmp_path, with_unused_weights, *command))
    assert 2 in codes and 0 not in codes
    way_out = "--trainer.strategy ddp_find_unused_parameters_true"
    assert (said(tmp_path) + said(tmp_path, 1)).count(way_out) == 1
    command += [*way_out.split(), "--overwrite"]
    assert ranks.ended(ranks.start(2, tmp_path / "found", with_unused_weights, *command)) == [0, 0]


def status(run):
    return json.loads((run / "run.json").read_text())["status"]


def real(*arguments, program=("-m", "ssl_kit")):
    """The command line as a user starts it."""
    command = [sys.executable, *program, "pretrain", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_line_starts_its_processes_and_torchrun_goes_on(labelled_folder, alone, tmp_path):
    run = tmp_path / "run"
    for _ in range(5):  # a run that ended well before this process got its turn is no trial
        launcher = real(labelled_folder, "--run", run, *MAE, "--batch-size", 12, "--trainer.devices", 2)
        limit = time.monotonic() + 300
        while not (run / "metrics.csv").exists() and launcher.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        launcher.kill()  # by SIGKILL: it can tell nobody
        while status(run) == "running" and time.monotonic() < limit:
            time.sleep(0.05)
        if status(run) != "finished":
            break
        shutil.rmtree(run)
    assert status(run) == "interrupted"
    begun = any((run / "checkpoints").glob("step-*"))  # not if it ended before its first step did
    elastic = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ssl_kit", "--")
    process = real("--run", run, "--resume", program=elastic)
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert told.count(" trains ") == told.count("verdict: ") == 1 and told.count("resumed at step") == begun
    assert_alike(run, alone / "run")
    assert "ssl-kit pretrain --run" in json.loads((run / "run.json").read_text())["command"]


def test_torchrun_starts_a_dead_process_anew_and_the_run_goes_on_by_itself(labelled_folder, alone, tmp_path):
    run, limit = tmp_path / "run", time.monotonic() + 300
    elastic = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts", "3")
    elastic += ("-m", "ssl_kit", "--")
    for _ in range(5):  # a run that ended before a process could be killed is no trial
        agent = real(labelled_folder, "--run", run, *MAE, "--batch-size", 12, program=elastic)
        while not (run / "metrics.csv").exists() and agent.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        told, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors
        if told.count(" trains ") == 2:
            break
        shutil.rmtree(run)
    assert told.count(" trains ") == 2 and told.count("verdict: ") == 1  # begun twice, ended once
    assert_alike(run, alone / "run")


def test_a_run_of_another_job_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / "run.json").write_text(json.dumps({"agents": []}))
    assert agent() is None and not restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not restarted(tmp_path) and not restarted(tmp_path / "nothing")
    (tmp_path / "run.json").write_text(json.dumps({"agents": ["elsewhere 1 2", agent()]}))
    assert restarted(tmp_path)
    monkeypatch.setattr("os.getppid", lambda before=os.getppid(): before + 1)
    assert not restarted(tmp_path)


def test_a_mistake_is_told_once(labelled_folder, tmp_path):
    process = real(labelled_folder, "--run", tmp_path / "run", *MAE, "--batch-size", 300, "--trainer.devices", 2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "152 images are fewer than one step of 600 (batch_size 300 x 2 processes)" in errors
