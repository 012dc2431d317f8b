"""The order of a step, with real parts; what a method is told after it; the state of the whole."""

import numpy as np
import pytest
import torch
from tiny_runs import Tiny, train
from torch import nn

from ssl_kit.data.opening import open_source
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, newest
from ssl_kit.training.curves import Bar, Curves
from ssl_kit.training.duration import Duration
from ssl_kit.training.guard import Diagnose, Guard
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import EMA, LARS, Optim, Schedule
from ssl_kit.verbs.monitor import Monitor

SGD = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0)
NAN = float("nan")
SOURCE = open_source(np.zeros((2, 8, 8, 3), np.uint8))

START = "diagnose.start guard.start duration.start curves.start bar.start monitor.start checkpoints.start"
PART_OF_A_STEP = "diagnose.watch {first} method.forward guard.see method.backward diagnose.write curves.collect"
STEP = (
    "diagnose.watch method.forward guard.see method.backward diagnose.take_norms guard.decide optimiser.step "
    "schedule.step diagnose.write curves.collect method.after_step ema.move duration.after_step curves.after_step "
    "bar.move monitor.after_step checkpoints.after_step"
)
END = "curves.at_end monitor.at_end checkpoints.at_end bar.stop"


class Teacher(Tiny):
    """Has a state of its own, a frozen copy of the head and a counter, that moves after steps."""

    def __init__(self, *args):
        super().__init__(*args)
        self.teacher = nn.Linear(4, 1).requires_grad_(False)
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))
        self.told = []

    def after_step(self, progress):
        self.told.append(progress)
        self.moves += 1
        with torch.no_grad():
            self.teacher.weight.lerp_(self.head.weight, 0.5)


def recorded(monkeypatch, calls, part, name, names):
    """Notes the calls of a part's methods, which do what they do; of a class, those of its instances."""
    for called in names.split():
        original = getattr(part, called)

        def noted(*args, original=original, called=called, **kwargs):
            value = original(*args, **kwargs)  # an optimiser's has the passes in it
            calls.append(f"{name}.{called}")
            return value

        monkeypatch.setattr(part, called, noted)


def test_a_step_of_two_batches_calls_the_parts_in_the_order_that_is_documented(tmp_path, monkeypatch):
    calls, curves = [], Curves(tmp_path / "metrics.csv", interval=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    monitor = Monitor(None, curves, checkpoints, None, SOURCE)
    parts = {
        "guard": Guard(),
        "checkpoints": checkpoints,
        "ema": EMA(0.9),
        "duration": Duration(0.2, None, 10),
        "curves": curves,
        "bar": Bar(curves),
        "monitor": monitor,
        "diagnose": Diagnose(tmp_path / "diagnose.csv", interval=1),
    }
    module = Teacher(Optim(name="lars", lr=0.1, lr_per=None, warmup_epochs=0, accumulate=2))
    for part, names in {
        "guard": "start before_step see decide",
        "checkpoints": "start after_step at_end",
        "ema": "move",
        "duration": "start after_step",
        "curves": "start begin measure_untrained collect after_step at_end",
        "bar": "start move stop",
        "monitor": "start after_step at_end",
        "diagnose": "start watch take_norms write",
    }.items():
        recorded(monkeypatch, calls, parts[part], part, names)
    recorded(monkeypatch, calls, module, "method", "after_step")
    recorded(monkeypatch, calls, Schedule, "schedule", "step")
    recorded(monkeypatch, calls, LARS, "optimiser", "step")
    module.encoder.register_forward_hook(lambda *_: calls.append("method.forward"))
    module.head.bias.register_hook(lambda _: calls.append("method.backward"))
    train(module, Loop(**parts), 4, accumulate=2, plugins=[SafeCheckpointIO()])
    first, second = (PART_OF_A_STEP.format(first=f"guard.before_step{more}") for more in (" curves.begin", ""))
    after_first = STEP.replace("method.after_step", "curves.measure_untrained method.after_step")
    wanted = " ".join([START, first, after_first, second, STEP, END]).split()
    assert calls[calls.index("diagnose.start") :] == wanted


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_method_is_told_once_of_each_step_that_was_not_held_back(device, accumulate, monkeypatch):
    optim = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0, accumulate=accumulate)
    module = Teacher(optim, {2: ("loss", NAN), 3: ("gradient", NAN)})
    twin = Teacher(optim)
    if device == "accelerator":  # where nobody waits to know whether the step was held back
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    teachers = []

    class Moves(EMA):
        """Comes right after the method."""

        def move(self, trained, step, total, held):
            teachers.append((bool(held), int(module.moves), module.teacher.weight.clone(), module.head.weight.clone()))
            return super().move(trained, step, total, held)

    train(module, Loop(ema=Moves(0.9)), accumulate=accumulate)
    held = [step in ((2, 3) if accumulate == 1 else (1,)) for step in range(8 // accumulate)]
    assert [step for step, *_ in teachers] == held
    wanted, moves = twin.teacher.weight.detach().clone(), 0
    for bad, found, teacher, head in teachers:
        if not bad:
            moves, wanted = moves + 1, torch.lerp(wanted, head, 0.5)
        assert found == moves and torch.equal(teacher, wanted)
    everyone = [(step + 1) / len(held) for step in range(len(held))]
    good = [progress for progress, bad in zip(everyone, held, strict=True) if not bad]
    assert module.told == (good if device == "cpu" else everyone)


def test_progress_never_falls_though_a_run_by_minutes_learns_that_it_is_longer():
    class Learning(Duration):
        def after_step(self, trainer):
            self.total = {4: 16}.get(trainer.global_step, self.total)

    module = Teacher(SGD)
    loop = Loop(duration=Learning(0.8, None, 10))
    train(module, loop, 10)
    assert module.told == [*(step / 8 for step in (1, 2, 3, 4, 4, 4, 4, 4)), 9 / 16, 10 / 16]
    resumed, again = Loop(duration=Duration(3.2, None, 10)), Teacher(SGD)
    resumed.load_state_dict(loop.state_dict())
    train(again, resumed, 2)
    assert again.told == [10 / 16] * 2  # of 32 steps now


def test_all_parts_with_state_are_in_the_checkpoint_and_go_on_from_it(tmp_path):
    def loop():
        curves = Curves(tmp_path / "metrics.csv")
        monitor = Monitor(None, curves, None, None, SOURCE)
        return Loop(Guard(), ema=EMA(0.9), duration=Duration(None, 1, 10), curves=curves, monitor=monitor)

    one, other = loop(), loop()
    one.checkpoints = Checkpoints(tmp_path)
    train(Tiny(SGD), one, plugins=[SafeCheckpointIO()])
    one.monitor.best = 0.5
    state = SafeCheckpointIO().load_checkpoint(newest(tmp_path))["callbacks"]["Loop"]
    assert state.keys() == {"guard", "ema", "duration", "curves", "monitor", "progress", "generators"}
    other.load_state_dict(one.state_dict())
    assert other.monitor.best == 0.5 and other.duration.total == one.duration.total
    for part in ("guard", "ema"):
        mine, its = (loop.state_dict()[part] for loop in (one, other))
        tensors = zip(*(torch.utils._pytree.tree_leaves(each) for each in (mine, its)), strict=True)
        assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in tensors)
    Loop().load_state_dict(one.state_dict())  # parts that are left out now are nothing to complain of
