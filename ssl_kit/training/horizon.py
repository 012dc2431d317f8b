"""How long a run is: so many steps, or as many as some minutes allow at the measured speed."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl

from ssl_kit.core.errors import UserError
from ssl_kit.training.distributed import largest

_DEFAULT_EPOCHS = 100
_UNMEASURED = 5  # first steps: compilation and caches


class Horizon(pl.Callback):
    """Ends the run, and fits the learning-rate schedule to `minutes` while it goes.

    Args:
        epochs: passes over the images; 100 when neither is given.
        minutes: of training, measurements included.
        steps_per_epoch: optimiser steps of one epoch.

    Attributes:
        total: steps of the whole run, as far as known.
    """

    def __init__(self, epochs: float | None, minutes: float | None, steps_per_epoch: float):
        if epochs is not None and minutes is not None:
            raise UserError(f"got --epochs {epochs:g} and --minutes {minutes:g}; give one of them")
        for name, value in (("epochs", epochs), ("minutes", minutes)):
            if value is not None and value <= 0:
                raise UserError(f"got --{name} {value:g}; wanted more than 0")
        self.minutes = minutes
        self.total = max(1, round((_DEFAULT_EPOCHS if epochs is None else epochs) * steps_per_epoch))
        self._first: tuple[int, float] | None = None  # step and seconds where the measured part begins
        self._before = 0.0  # seconds of earlier sittings
        self._began: float | None = None

    @property
    def max_steps(self) -> int:
        """For Lightning's Trainer; -1 when minutes decide."""
        return self.total if self.minutes is None else -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock; a run that had used up its minutes makes no further step."""
        self._began = time.perf_counter()
        self._first = None
        if self.minutes is None:  # a resumed run may have been given another length
            trainer.lr_scheduler_configs[0].scheduler.total_steps = trainer.max_steps  # type: ignore[union-attr]
        elif self._before >= 60 * self.minutes:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With `minutes`: sets the schedule's horizon from the speed so far."""
        if self.minutes is None:
            return
        # clocks differ, and all processes must have one schedule and one end
        step, seconds, limit = trainer.global_step, largest(self.seconds()), 60 * self.minutes
        if self._first is None:
            self._first = (step + _UNMEASURED, 0.0)
        if step == self._first[0]:
            self._first = (step, seconds)
        elif step > self._first[0]:
            speed = (step - self._first[0]) / (seconds - self._first[1])
            self.total = max(step + 1, step + round(speed * (limit - seconds)))
            trainer.lr_scheduler_configs[0].scheduler.total_steps = self.total  # type: ignore[union-attr]
        if seconds >= limit or step >= self.total:
            trainer.should_stop = True

    def seconds(self) -> float:
        """Spent in training, over all sittings."""
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """The horizon and the time spent."""
        return {"total": self.total, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a run limited by minutes; one limited by epochs takes its length from the options."""
        if self.minutes is not None:
            self.total, self._before = state_dict["total"], state_dict["seconds"]
