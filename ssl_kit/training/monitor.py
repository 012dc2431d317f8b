"""What a run tells about itself: curves in `metrics.csv`, a progress bar, and signs of collapse.

Nothing here touches the device between logging intervals: losses stay tensors and are read once per interval.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ssl_kit.core.console import live, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.spectrum import effective_rank

COLUMNS = (
    *("step", "epoch", "images", "seconds", "loss", "lr", "images_per_second", "waiting_share"),
    *("effective_rank", "embedding_std", "uniformity", "knn_top1"),
)
_MEASURE_STEPS = 200  # between measurements, at least: with labels one costs about ten steps
_COLLAPSED_RANK = 0.02  # of the dimension; a healthy code is far above, one direction is 1 / dim
_LEARNED = 0.05  # of the way from chance to 0 that a loss must have come to count as learning

Score = Callable[[pl.LightningModule], dict[str, float]]


class Curves(pl.Callback):
    """Writes `metrics.csv`: a row per `interval` steps and one per measurement of features; rows go out at once.

    Args:
        path: of the CSV. A resumed run drops the rows after its step, then continues.
        interval: steps between rows.
        measure: given the method, returns scores of the current encoder (rank, kNN, ...).
        interrupted: whether the run is being stopped to go on later: then a half-collected row waits for that.
        measure_every: epochs between measurements; never more often than every 200 steps.
    """

    def __init__(
        self,
        path: Path,
        *,
        interval: int = 20,
        measure: Score | None = None,
        measure_every: float = 1.0,
        interrupted: Callable[[], bool] = lambda: False,
    ):
        self.path, self.interval, self.measure, self.measure_every = path, interval, measure, measure_every
        self.interrupted = interrupted
        self.row: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0  # of training, over all sittings
        self.finished: Callable[[dict[str, float]], None] | None = None
        self._losses: list[Tensor] = []
        self._images = self._interval_images = 0
        self._measured: tuple[float, float] = (0.0, 0.0)  # epoch and step of the last measurement

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the file, without the rows that a resumed run will write again."""
        self.history = [row for row in read_curves(self.path) if row["step"] <= trainer.global_step]
        self.row = next((row for row in reversed(self.history) if "loss" in row), {})
        self._losses = [loss.to(pl_module.device) for loss in self._losses]  # a checkpoint's are on the CPU
        self._rewrite()
        self._started = self._interval_started = time.perf_counter()
        self._waited = 0.0
        self._images = int(self.history[-1]["images"]) if self.history else 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the loss on the device; every `interval` steps reads it, the speed and the share of waiting."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._losses.append(loss.detach())
        self._interval_images += len(batch["key"].index) * trainer.world_size
        if trainer.global_step % self.interval and trainer.global_step != trainer.max_steps:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._log(trainer)
        if self.measure is not None and self._time_to_measure():
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A last row and a last measurement, when the run is complete."""
        if self.interrupted():
            return
        if self._losses:
            self._log(trainer)
        if self.measure is not None and self.history and "effective_rank" not in self.history[-1]:
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Seconds trained so far, and what is collected for the next row."""
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        return {
            "seconds": self.elapsed(),
            "losses": losses,
            "images": self._interval_images,
            "measured": self._measured,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the clock and the row that was being collected."""
        self.seconds = state_dict["seconds"]
        self._losses = list(state_dict["losses"])
        self._interval_images = state_dict["images"]
        self._measured = state_dict["measured"]

    def elapsed(self) -> float:
        """Seconds of training over all sittings."""
        return self.seconds + time.perf_counter() - getattr(self, "_started", time.perf_counter())

    def recall(self) -> None:
        """Takes the rows from the file when a resumed run had nothing left to train."""
        if not self.row:
            self.history = read_curves(self.path)
            self.row = next(row for row in reversed(self.history) if "loss" in row)

    def _log(self, trainer: pl.Trainer) -> None:
        data = cast(Any, trainer).datamodule
        epoch = trainer.global_step * trainer.accumulate_grad_batches / data.steps_per_epoch
        now = time.perf_counter()
        spent = max(now - self._interval_started, 1e-9)
        self._images += self._interval_images
        loss = float(torch.stack(self._losses).mean())  # the only sync of the interval
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} in the {self.interval} steps before step {trainer.global_step}; lower "
                "--method.optim.lr, or try --precision float32"
            )
        self.row = {
            "step": trainer.global_step,
            "epoch": round(epoch, 4),
            "images": self._images,
            "seconds": round(self.elapsed(), 3),
            "loss": loss,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": round(self._interval_images / spent, 1),
            "waiting_share": round((data.loader.waited - self._waited) / spent, 4),
        }
        self._losses, self._interval_images = [], 0
        self._interval_started, self._waited = now, data.loader.waited
        self._append(self.row)
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step=trainer.global_step)

    def _time_to_measure(self) -> bool:
        epochs, steps = self.row["epoch"] - self._measured[0], self.row["step"] - self._measured[1]
        return epochs >= self.measure_every and steps >= _MEASURE_STEPS

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        began = time.perf_counter()
        assert self.measure is not None
        scores = self.measure(pl_module)
        self._interval_started += time.perf_counter() - began  # not part of the training speed
        row = {key: self.row[key] for key in ("step", "epoch", "images", "seconds")} | scores
        self._measured = (self.row["epoch"], self.row["step"])
        self._append(row)
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
        if self.finished is not None:
            self.finished(row)

    def _append(self, row: dict[str, float]) -> None:
        self.history.append(row)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)

    def _rewrite(self) -> None:
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.history)

    def last(self, column: str) -> float | None:
        """The newest value of a column."""
        return next((row[column] for row in reversed(self.history) if column in row), None)


def read_curves(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without empty cells; [] when there is none."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _number(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def _number(cell: str) -> float:
    return int(cell) if cell.isdigit() else float(cell)  # a row that is written again must look the same


class Bar(pl.Callback):
    """One progress bar for the whole run: loss, images/s, share waiting, effective rank, kNN, time left.

    Without a terminal it prints a line per measurement instead.
    """

    def __init__(self, curves: Curves, total_steps: Callable[[], int]):
        self.curves, self.total_steps = curves, total_steps
        self.bar: Progress | None = None
        curves.finished = self._measured

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the bar on a terminal."""
        stderr = Console(stderr=True)
        if stderr.is_terminal and trainer.is_global_zero:
            columns = (TextColumn("epoch {task.fields[epoch]:.1f}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True)
            self.bar.add_task("", total=self.total_steps(), completed=trainer.global_step, epoch=0.0, text="")
            self.bar.start()
            live(True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        if self.bar is not None and self.curves.row:
            row = self.curves.row
            text = f"loss {row['loss']:.3f} · {row['images_per_second']:,.0f} images/s"
            text += f" · waiting {row['waiting_share']:.0%}"
            for column, label in (("effective_rank", "rank"), ("knn_top1", "kNN")):
                value = self.curves.last(column)
                text += f" · {label} {value:.3g}" if value is not None else ""
            step, total = trainer.global_step, self.total_steps()
            self.bar.update(self.bar.task_ids[0], completed=step, total=total, epoch=row["epoch"], text=text)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()
            live(False)
            self.bar = None

    def _measured(self, row: dict[str, float]) -> None:
        if self.bar is None:
            now = self.curves.row
            scores = " · ".join(f"{key} {value:.3f}" for key, value in row.items() if key not in COLUMNS[:4])
            say(
                f"epoch {row['epoch']:.1f} · {row['seconds']:.0f} s · loss {now['loss']:.3f} · "
                f"{now['images_per_second']:,.0f} images/s · waiting {now['waiting_share']:.1%} · {scores}"
            )


def feature_health(features: np.ndarray) -> dict[str, float]:
    """Label-free signs of life of (N, D) features: effective rank and mean per-dimension std on the unit sphere.

    The std of isotropic features is 1/sqrt(D); of collapsed ones 0.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return {"effective_rank": effective_rank(features), "embedding_std": float(unit.std(axis=0).mean())}


def verdict(curves: Curves, dim: int, chance_loss: float | None) -> dict[str, str]:
    """`learning`, `stuck` or `collapsed`, with the reason in words, from the newest measurements."""
    rank, loss = curves.last("effective_rank"), curves.last("loss")
    if rank is None or loss is None:
        return {"state": "unknown", "reason": "nothing was measured yet"}
    if rank < max(1.5, _COLLAPSED_RANK * dim):
        return {"state": "collapsed", "reason": f"the features span {rank:.1f} of {dim} dimensions"}
    if chance_loss is not None and loss > (1 - _LEARNED) * chance_loss:
        reason = f"the loss, {loss:.3f}, is where a model that sees nothing sits ({chance_loss:.3f})"
        return {"state": "stuck", "reason": reason}
    reason = f"effective rank {rank:.1f} of {dim}"
    if chance_loss is not None:
        reason += f", loss {loss:.3f} against {chance_loss:.3f} at chance"
    return {"state": "learning", "reason": reason}
