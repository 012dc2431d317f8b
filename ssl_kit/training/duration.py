"""How long a run is: so many steps, or what a time pays for.

The steps of a run by minutes are fixed before the first one, from the pace that was tried (`verbs/budget.py`), so that
schedule, views and looks at the features are those of a run of as many epochs, and to the bit the same. They are fitted
anew only where the end would be missed by more than a tenth, which is said and kept in `run.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytorch_lightning as pl

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError, check_numbers
from ssl_kit.training.checkpoint import State
from ssl_kit.training.distributed import world_size
from ssl_kit.training.optim import Schedule

_DEFAULT_EPOCHS = 100
_UNMEASURED = 5  # first steps of a sitting: compilation and caches
_HEARD, _PATIENT = 0.05, 3  # of the minutes must have been watched before a forecast is believed; times longer later on
PLANNED = 0.95  # of what is left is planned: the last look at the features and the encoder's folder come behind
_MISSED = 0.1  # of the planned end: a forecast that is further off is followed


class Pace(NamedTuple):
    """What steps are expected to cost.

    Attributes:
        seconds: first step -> seconds of a step from there on; views of another size cost another time.
        spent: seconds that went before training: reading, decoding, trying.
    """

    seconds: Mapping[int, float]
    spent: float = 0.0

    def work(self, step: int) -> float:
        """Seconds of the first `step` steps."""
        begins = sorted(self.seconds)
        ends = [*begins[1:], step]
        return sum(
            self.seconds[begin] * (min(step, end) - begin)
            for begin, end in zip(begins, ends, strict=True)
            if step > begin
        )

    def steps(self, seconds: float) -> int:
        """Whole steps that so much time pays for."""
        begins, made = sorted(self.seconds), 0
        for begin, end in zip(begins, [*begins[1:], None], strict=True):
            affordable = int(max(0.0, seconds) / self.seconds[begin])
            if end is None or affordable < end - begin:
                return made + affordable
            made, seconds = end, seconds - self.seconds[begin] * (end - begin)
        return made


_UNKNOWN = Pace({0: 1.0})  # until it is heard


class Duration:
    """Ends a run, and fits the learning-rate schedule to its length.

    Args:
        epochs: passes over the images; 100 when neither is given.
        minutes: from the command on, measurements included.
        steps_per_epoch: optimiser steps of one epoch.
        pace: with `minutes`: what was found by trying.

    Attributes:
        total: steps of the whole run.
        heard: seconds of several processes, the longest that one has said: they must have one schedule and one end.
        fitted: what the length was changed to on the way: {step, seconds, steps} each time.
        tell: is given `fitted` whenever that grows.
    """

    def __init__(self, epochs: float | None, minutes: float | None, steps_per_epoch: float, pace: Pace | None = None):
        if epochs is not None and minutes is not None:
            raise UserError(f"got --epochs {epochs:g} and --minutes {minutes:g}; give one of them")
        check_numbers({"epochs": epochs, "minutes": minutes})
        self.minutes, self.steps_per_epoch, self.pace = minutes, steps_per_epoch, pace or _UNKNOWN
        if minutes is not None:  # half of them are for training, whatever went before
            self.pace = self.pace._replace(spent=min(self.pace.spent, 30 * minutes))
        self.fitted: list[dict[str, float]] = []
        self.tell: Callable[[list[dict[str, float]]], None] = lambda fitted: None
        self.heard = 0.0
        self._before = self.pace.spent  # and seconds of earlier sittings
        self._first: tuple[int, float] | None = None  # step and seconds where the measured part begins
        self._began: float | None = None
        if minutes is None:
            self.total = max(1, round((_DEFAULT_EPOCHS if epochs is None else epochs) * steps_per_epoch))
        else:
            self.total = max(1, self.pace.steps(self._end - self.pace.spent))

    @property
    def max_steps(self) -> int:
        """For Lightning's Trainer; -1 when minutes decide."""
        return self.total if self.minutes is None else -1

    @property
    def _end(self) -> float:
        """Seconds at which the run is planned to end."""
        assert self.minutes is not None
        return self.pace.spent + PLANNED * (60 * self.minutes - self.pace.spent)

    def start(self, trainer: pl.Trainer) -> None:
        """Starts the clock; a run that had made its steps makes no further one."""
        self._began, self._first = time.perf_counter(), None
        if self.minutes is None:  # a resumed run may have been given another length
            self._plan(trainer, trainer.max_steps)
        else:
            self._plan(trainer, self.total)
            trainer.should_stop = trainer.should_stop or trainer.global_step >= self.total

    def after_step(self, trainer: pl.Trainer) -> None:
        """With `minutes`: ends the run; follows the clock where the plan misses it."""
        if self.minutes is None:
            return
        step, seconds = trainer.global_step, self.seconds() if world_size() == 1 else self.heard
        if self._first is None:
            self._first = (step + _UNMEASURED, 0.0)
        if step >= self.total:
            trainer.should_stop = True
        elif step == self._first[0]:
            self._first = (step, seconds)
        elif step > self._first[0]:
            patience = 1 + min(_PATIENT, len(self.fitted))  # a machine whose pace comes and goes is not run after
            if seconds - self._first[1] >= patience * _HEARD * 60 * self.minutes:
                self._follow(trainer, step, seconds)

    def _follow(self, trainer: pl.Trainer, step: int, seconds: float) -> None:
        assert self._first is not None
        done = self.pace.work(step)
        slower = (seconds - self._first[1]) / (done - self.pace.work(self._first[0]))
        forecast = seconds + slower * (self.pace.work(self.total) - done)
        if abs(forecast - self._end) <= _MISSED * self._end:
            return
        total = max(step + 1, self.pace.steps(done + (self._end - seconds) / slower))
        if total != self.total:
            self.fitted = [*self.fitted, {"step": step, "seconds": round(seconds, 1), "steps": total}]
            say(f"steps: {total:,} instead of {self.total:,} (one takes {slower:.2g} times what it took when tried)")
            self.total, self._first = total, (step, seconds)  # a mean over both paces would be corrected on and on
            self._plan(trainer, total)
            self.tell(self.fitted)

    def _plan(self, trainer: pl.Trainer, total: int) -> None:
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, Schedule)
        schedule.total_steps = total

    def say_again(self) -> None:
        """How a run by minutes is repeated without a clock; `--epochs` in the fewest digits that do."""
        if self.minutes is None:
            return
        texts = (f"{self.total / self.steps_per_epoch:.{digits}g}" for digits in range(1, 17))
        epochs = next(text for text in texts if round(float(text) * self.steps_per_epoch) == self.total)
        fitted = f"--epochs {epochs} makes as many steps; not to the bit, since the length was fitted on the way"
        say(fitted if self.fitted else f"--epochs {epochs} repeats this run to the bit")

    def seconds(self) -> float:
        """Spent since the command, over all sittings."""
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state_dict(self) -> State:
        """The horizon and the time spent."""
        pace = {"pace": [list(item) for item in self.pace.seconds.items()], "spent": self.pace.spent}
        return {"total": self.total, "seconds": self.seconds(), "fitted": self.fitted, "minutes": self.minutes} | pace

    def load_state_dict(self, state_dict: State) -> None:
        """Continues a run limited by minutes; other minutes make another length, epochs are the options'."""
        if self.minutes is None:
            return
        self._before = state_dict["seconds"]
        if "pace" in state_dict:  # 0.1 did not plan
            self.pace = Pace({int(step): cost for step, cost in state_dict["pace"]}, state_dict["spent"])
            self.fitted = state_dict["fitted"]
        same = state_dict.get("minutes", self.minutes) == self.minutes
        self.total = state_dict["total"] if same else max(1, self.pace.steps(self._end - self.pace.spent))
