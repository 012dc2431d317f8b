"""Runs by minutes: steps that are planned, and followed by the clock where they miss it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from ssl_kit.training import duration
from ssl_kit.training.duration import Duration, Pace
from ssl_kit.training.optim import Schedule


def trainer_at(step=0):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return SimpleNamespace(
        global_step=step,
        should_stop=False,
        lr_scheduler_configs=[SimpleNamespace(scheduler=Schedule(optimiser, 0, 1))],
    )


def run(planned: Duration, cost, monkeypatch, step=0):
    """Steps that take `cost(step)` seconds, until the run ends; the trainer and the seconds used."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = trainer_at(step)
    planned.start(trainer)
    while not trainer.should_stop and trainer.global_step < 100_000:
        clock.now += cost(trainer.global_step)
        trainer.global_step += 1
        planned.after_step(trainer)
    return trainer, clock.now


def test_work_and_steps_are_each_others_inverse():
    pace = Pace({0: 0.5, 10: 1.5, 30: 0.25})
    assert [pace.work(step) for step in (0, 4, 10, 12, 30, 34)] == [0, 2, 5, 8, 35, 36]
    assert all(pace.steps(pace.work(step)) == step for step in range(60))
    assert [pace.steps(seconds) for seconds in (-1.0, 0.4, 5.0, 6.4, 6.6)] == [0, 0, 10, 10, 11]


@pytest.mark.parametrize("off", [0.92, 1.0, 1.08])
def test_steps_are_those_planned_where_the_clock_agrees(off, monkeypatch, capsys):
    planned = Duration(None, 10, 50, Pace({0: 0.1, 2000: 0.3}, spent=20))
    total = planned.total
    assert total == Pace({0: 0.1, 2000: 0.3}).steps(0.95 * 580)
    trainer, seconds = run(planned, lambda step: off * (0.1 if step < 2000 else 0.3), monkeypatch)
    assert trainer.global_step == total == trainer.lr_scheduler_configs[0].scheduler.total_steps
    assert not planned.fitted and seconds == pytest.approx(off * 0.95 * 580, rel=0.01)
    planned.say_again()
    told = capsys.readouterr().out
    assert told.endswith("to the bit\n") and Duration(float(told.split()[1]), None, 50).total == total


@pytest.mark.parametrize("slower", [0.2, 0.5, 2.0, 7.0])
def test_a_plan_that_misses_the_clock_is_fitted_anew_and_told(slower, monkeypatch, capsys):
    planned, told = Duration(None, 10, 50, Pace({0: 0.1, 2000: 0.3}, spent=20)), []
    planned.tell = told.append
    trainer, seconds = run(planned, lambda step: slower * (0.1 if step < 2000 else 0.3), monkeypatch)
    assert 0.9 * 600 <= 20 + seconds <= 1.06 * 600
    assert told[-1] == planned.fitted and planned.fitted[-1]["steps"] == planned.total == trainer.global_step
    planned.say_again()
    assert len(planned.fitted) <= 3 and "not to the bit" in capsys.readouterr().out


def test_a_machine_that_slows_down_on_the_way_is_followed(monkeypatch):
    planned = Duration(None, 10, 50, Pace({0: 0.1}))
    trainer, seconds = run(planned, lambda step: 0.1 if step < 2000 else 0.4, monkeypatch)
    assert 0.9 * 600 <= seconds <= 1.1 * 600 and trainer.global_step == planned.total
    assert len(planned.fitted) <= 2


@pytest.mark.parametrize("busy", [0.3, 6.0])
def test_a_pace_that_changes_on_the_way_is_followed_once_or_twice(busy, monkeypatch):
    planned = Duration(None, 10, 50, Pace({0: 0.1}))
    clock = lambda step: 0.1 * (busy if len(planned.fitted) < 1 or step < planned.fitted[0]["step"] + 40 else 1.0)
    _, seconds = run(planned, clock, monkeypatch)
    assert 0.9 * 600 <= seconds <= 1.06 * 600 and len(planned.fitted) <= 3


def test_a_pace_that_comes_and_goes_is_not_run_after(monkeypatch):
    planned = Duration(None, 10, 50, Pace({0: 0.1}))
    _, seconds = run(planned, lambda step: 0.1 * (0.5 if step // 300 % 2 else 2.0), monkeypatch)
    assert 0.85 * 600 <= seconds <= 1.1 * 600 and len(planned.fitted) <= 6


def test_a_machine_that_stops_for_long_ends_the_run_at_the_next_step(monkeypatch):
    planned = Duration(None, 10, 50, Pace({0: 0.1}))
    trainer, seconds = run(planned, lambda step: 0.1 if step != 2000 else 900, monkeypatch)
    assert trainer.global_step == planned.total == 2002 and len(planned.fitted) == 1 and seconds < 1101


def test_half_of_the_minutes_are_for_training_whatever_went_before():
    assert Duration(None, 1, 10, Pace({0: 0.1}, spent=500)).total == int(0.95 * 30 / 0.1)


def test_a_resumed_run_goes_on_with_the_rest(monkeypatch):
    pace = Pace({0: 0.1, 2000: 0.3}, spent=20)
    begun, whole = Duration(None, 10, 50, pace), Duration(None, 10, 50, pace)
    clock = itertools.count(0, 100)
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    begun.start(trainer_at())
    state = begun.state_dict()
    assert state["seconds"] == 120
    resumed = Duration(None, 10, 50)  # its pace is in the checkpoint
    resumed.load_state_dict(state)
    assert resumed.total == whole.total and resumed.pace == pace and resumed.seconds() == 120
    trainer, _ = run(resumed, lambda step: 0.1 if step < 2000 else 0.3, monkeypatch, step=1000)
    assert trainer.global_step == whole.total and not resumed.fitted
    longer = Duration(None, 20, 50)
    longer.load_state_dict(state)
    assert longer.total == Duration(None, 20, 50, pace).total > whole.total
    older = Duration(None, 10, 50)
    older.load_state_dict({"total": 7, "seconds": 3.0})  # of 0.1
    assert older.total == 7 and older.seconds() == 3.0
    over = trainer_at(whole.total)
    resumed.start(over)
    assert over.should_stop
