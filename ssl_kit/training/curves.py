"""What a run tells about itself: curves in `metrics.csv`, a progress bar, and the verdict on them.

Nothing here waits for the device between logging intervals: what `loss` gives stays there and is read once per row.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ssl_kit.core.console import live, say, shows_bars, stderr_console, warn
from ssl_kit.core.files import atomic_file, if_room, sync
from ssl_kit.core.spectrum import effective_rank
from ssl_kit.training.checkpoint import State
from ssl_kit.training.chunked import Data, data_of
from ssl_kit.training.distributed import broadcast, counts, mean_of_all, rank
from ssl_kit.training.guard import Guard
from ssl_kit.training.verdict import Row, Verdict, angle, sketch

COLUMNS = (
    *("step", "epoch", "images", "seconds", "loss", "lr", "images_per_second", "waiting_share"),
    *("gradient_norm", "skipped_steps", "views_low", "views_high", "views_std"),
    *("effective_rank", "embedding_std", "images_std", "alignment", "uniformity", "turned", "grown", "knn_top1"),
    *("knn_pixels", "knn_pca", "crops_top1", "crops_pixels", "crops_pca"),
)
_PLACE = ("step", "epoch", "images", "seconds")  # of every row
_EARLY = (100, 200)  # steps after which the verdict may say something
_MEASURE_STEPS = 200  # between measurements that are asked for by epochs, at least
_SHARE, _PASSES = 0.02, 3  # of the training that looks may take, where a step costs a forward pass three times over

Score = Callable[[pl.LightningModule], dict[str, float]]
Judge = Callable[[Sequence[Row]], Verdict]


class Curves:
    """Writes `metrics.csv`: a row per `interval` steps and one per measurement of features; rows go out at once.

    Of several processes all have the rows, since they decide by them, and the first one writes them. What `loss` gave
    is the mean over the images of all, the speed that of all together; waiting and views are the first one's own.

    Args:
        path: of the CSV. A resumed run drops the rows after its step, then continues.
        interval: steps between rows.
        measure: given the method, returns scores of the current encoder (rank, kNN, ...); first called after the first
            step, for those of the untrained encoder, so that everything can be compared with it.
        judge: the verdict on the rows so far, asked after each measurement.
        measure_every: epochs between measurements, never more often than every 200 steps; None: after 100 steps, after
            200, at the end, and between where all of them stay under 2 % of the training, counted in images.
        measured: images that one measurement embeds.
        encoder: the part of a method whose weights are followed.
        data: where the batches of a training come from.
    """

    def __init__(
        self,
        path: Path,
        *,
        interval: int = 20,
        measure: Score | None = None,
        judge: Judge = lambda history: Verdict("unknown", "nothing was measured yet"),
        measure_every: float | None = None,
        measured: int = 0,
        encoder: Callable[[pl.LightningModule], nn.Module] = lambda method: method.get_submodule("encoder"),
        data: Callable[[pl.Trainer], Data] = data_of,
    ):
        self.path, self.interval, self.measure, self.measure_every = path, interval, measure, measure_every
        self.judge, self.encoder, self.data, self.measured = judge, encoder, data, measured
        self.row: Row = {}
        self.history: list[Row] = []
        self.verdict = Verdict("unknown", "nothing was measured yet")
        self.seconds = 0.0  # of training, over all sittings
        self.finished: Callable[[dict[str, float]], None] | None = None
        self._steps: dict[str, list[Tensor]] = {}  # what `loss` gave since the last row, on the device
        self._columns: tuple[str, ...] = COLUMNS
        self._behind = False  # the file lacks rows, for want of room
        self._images = self._interval_images = 0
        self._measured: tuple[float, float] = (0.0, 0.0)  # epoch and step of the last measurement
        self._start: Tensor | None = None  # sketch of the encoder's weights before the first step

    def start(self, step: int, device: torch.device) -> None:
        """Opens the file at `step`, without the rows that a resumed run will write again."""
        self.history = [row for row in read_curves(self.path) if step and row["step"] <= step]
        self._columns = COLUMNS + tuple(
            dict.fromkeys(name for row in self.history for name in row if name not in COLUMNS)
        )
        self.verdict = self.judge(self.history)
        self.row = next((row for row in reversed(self.history) if "loss" in row), {})
        for name, values in self._steps.items():  # a checkpoint's are on the CPU
            self._steps[name] = [value.to(device) for value in values]
        self._rewrite()
        self._started = self._interval_started = time.perf_counter()
        self._waited = 0.0
        self._images = int(self.history[-1]["images"]) if self.history else 0

    def begin(self, method: pl.LightningModule) -> None:
        """Before the first step: notes where the weights begin."""
        self._start = sketch(self.encoder(method).parameters()) if rank() == 0 else None

    def measure_untrained(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        """What the untrained encoder gives. It takes seconds, and whether a step can be made at all is known before."""
        if self.measure is not None:
            self._measure(trainer, method, untrained=True)

    def collect(self, outputs: dict[str, Tensor], images: int, accumulate: int) -> None:
        """Keeps what `loss` gave for a batch of so many images, on the device.

        Lightning has divided the loss, and nothing else, by the `accumulate` batches of a step.
        """
        for name, value in outputs.items():
            self._steps.setdefault(name, []).append(value.detach() * (accumulate if name == "loss" else 1))
        self._interval_images += images

    def after_step(
        self, trainer: pl.Trainer, method: pl.LightningModule, guard: Guard, views: Sequence[Tensor]
    ) -> None:
        """Every `interval` steps reads what was collected, the speed and the share of waiting."""
        if trainer.global_step % self.interval and trainer.global_step != trainer.max_steps:
            return
        if not self._log(trainer, guard, views):
            return
        if self.measure is not None and self._time_to_measure():
            self._measure(trainer, method)

    def at_end(self, trainer: pl.Trainer, method: pl.LightningModule, guard: Guard) -> None:
        """A last row and a last measurement, when the run is complete. One that is stopped collects on later."""
        if self._steps:
            self._log(trainer, guard)
        if self.measure is not None and self.row and "effective_rank" not in self.history[-1]:
            self._measure(trainer, method)

    def state_dict(self) -> State:
        """Seconds trained so far, and what is collected for the next row. The rows so far are on the disk before it."""
        if self.path.exists():
            sync(self.path)
        return {
            "seconds": self.elapsed(),
            "collected": self._everywhere(),
            "images": self._images_everywhere(),
            "measured": self._measured,
            "start": self._start,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Continues the clock and the row that was being collected."""
        self.seconds = state_dict["seconds"]
        self._steps = {name: list(values) for name, values in state_dict["collected"].items()}
        self._interval_images = state_dict["images"] if rank() == 0 else 0
        self._measured = state_dict["measured"]
        self._start = state_dict["start"]

    def elapsed(self) -> float:
        """Seconds of training over all sittings."""
        return self.seconds + time.perf_counter() - getattr(self, "_started", time.perf_counter())

    def recall(self) -> None:
        """Takes the rows from the file when a resumed run had nothing left to train."""
        if not self.row:
            self.history = read_curves(self.path)
            self.row = next(row for row in reversed(self.history) if "loss" in row)
            self.verdict = self.judge(self.history)

    def _everywhere(self) -> dict[str, Tensor]:
        """Name -> (steps,) of what `loss` gave since the last row: the mean over all processes, all of which ask."""
        return {name: mean_of_all(torch.stack(values)) for name, values in self._steps.items()}

    def _images_everywhere(self) -> int:
        """Images since the last row, of all processes."""
        return sum(counts(self._interval_images))

    def _log(self, trainer: pl.Trainer, guard: Guard, views: Sequence[Tensor] = ()) -> bool:
        """Writes a row; False when no step since the last one was good, so that there is no loss to tell."""
        data = self.data(trainer)
        epoch = trainer.global_step * trainer.accumulate_grad_batches / data.steps_per_epoch
        now = time.perf_counter()
        spent = max(now - self._interval_started, 1e-9)
        told = guard.look(trainer.global_step)
        means = {name: _mean(values) for name, values in self._everywhere().items()}
        if math.isnan(means["loss"]):
            return False
        images = self._images_everywhere()
        self._images += images
        self.row = {
            "step": trainer.global_step,
            "epoch": round(epoch, 4),
            "images": self._images,
            "seconds": round(self.elapsed(), 3),
            **means,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "images_per_second": round(images / spent, 1),
            "waiting_share": round((data.loader.waited - self._waited) / spent, 4),
            **told,
            **_range(views),
        }
        self._steps, self._interval_images = {}, 0
        self._interval_started, self._waited = now, data.loader.waited
        self._append(self.row)
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step=trainer.global_step)
        return True

    def _time_to_measure(self) -> bool:
        if self.measure_every is not None:
            epochs, steps = self.row["epoch"] - self._measured[0], self.row["step"] - self._measured[1]
            return epochs >= self.measure_every and steps >= _MEASURE_STEPS
        embedded = self.measured * (1 + sum("effective_rank" in row for row in self.history))
        return self.row["step"] in _EARLY or (
            self.row["step"] > max(_EARLY) and embedded / _PASSES < _SHARE * self.row["images"]
        )

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, untrained: bool = False) -> None:
        began = time.perf_counter()
        assert self.measure is not None
        moved = {"turned": 0.0, "grown": 1.0} if untrained else broadcast(lambda: self._moved(pl_module))
        scores = self.measure(pl_module) | moved
        self._interval_started += time.perf_counter() - began  # not part of the training speed
        row = {key: self.row.get(key, 0) for key in _PLACE} | scores
        self._measured = (row["epoch"], row["step"])
        self._append(row)
        former, self.verdict = self.verdict, self.judge(self.history)
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
        if self.finished is not None:
            self.finished(row)
        if self.verdict.state in ("stuck", "collapsed") and self.verdict.state != former.state:
            warn(f"step {trainer.global_step:,}: {self.verdict.state} - {self.verdict.reason}")

    def _moved(self, pl_module: pl.LightningModule) -> dict[str, float]:
        """How far the weights are from where they began."""
        if self._start is None:
            return {}
        weights = sketch(self.encoder(pl_module).parameters())
        return {"turned": angle(self._start, weights), "grown": float(weights.norm() / self._start.norm())}

    def _append(self, row: Row) -> None:
        self.history.append(row)
        if rank() > 0:
            return
        whole, self._behind = not self._behind and row.keys() <= set(self._columns), True
        # what this method's loss gives beside "loss" is told by the first row
        self._columns += tuple(name for name in row if name not in self._columns)
        with if_room(self.path):
            if whole:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._rewrite()
            self._behind = False

    def _rewrite(self) -> None:
        if rank() > 0:
            return
        with atomic_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.history)

    def last(self, column: str) -> float | None:
        """The newest value of a column."""
        return next((row[column] for row in reversed(self.history) if column in row), None)


def read_curves(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without empty cells; [] when there is none."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a row that was cut off says something else
    return [{key: _number(cell) for key, cell in row.items() if cell} for row in csv.DictReader(io.StringIO(whole))]


def _number(cell: str) -> float:
    return int(cell) if cell.isdigit() else float(cell)  # a row that is written again must look the same


class Bar:
    """One progress bar for the whole run: loss, images/s, share waiting, effective rank, kNN, time left.

    Without a terminal it prints a line per measurement instead.
    """

    def __init__(self, curves: Curves):
        self.curves = curves
        self.bar: Progress | None = None
        self._epochs = self._images = 0.0  # of a step
        self._first: tuple[int, float] | None = None  # step of this sitting, and when it was made: it loads, compiles
        curves.finished = self._measured

    def start(self, trainer: pl.Trainer, total: int) -> None:
        """Shows the bar on a terminal."""
        if shows_bars() and trainer.is_global_zero:
            data, batches = self.curves.data(trainer), trainer.accumulate_grad_batches
            self._epochs, self._images = batches / data.steps_per_epoch, batches * data.images_per_step
            columns = (TextColumn("epoch {task.fields[epoch]:.1f}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=stderr_console(), transient=True)
            self.bar.add_task("", total=total, completed=trainer.global_step, epoch=0.0, text="")
            self.bar.start()
            live(True)

    def move(self, step: int, total: int) -> None:
        """Moves the bar to `step` of `total`; until there is a row, with the speed since the first step."""
        if self.bar is None:
            return
        row, now, text = self.curves.row, time.perf_counter(), ""
        self._first = self._first or (step, now)
        if row:
            text = f"loss {row['loss']:.3f} · {row['images_per_second']:,.0f} images/s"
            text += f" · waiting {row['waiting_share']:.0%}"
        elif step > self._first[0]:
            text = f"{self._images * (step - self._first[0]) / (now - self._first[1]):,.0f} images/s"
        for column, label in (("effective_rank", "rank"), ("knn_top1", "kNN"), ("crops_top1", "crops")):
            value = self.curves.last(column)
            text += f" · {label} {value:.3g}" if value is not None else ""
        if self.curves.verdict.state != "unknown":
            text += f" · {self.curves.verdict.state}"
        self.bar.update(self.bar.task_ids[0], completed=step, total=total, epoch=step * self._epochs, text=text)

    def stop(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()
            live(False)
            self.bar = None

    def _measured(self, row: dict[str, float]) -> None:
        if self.bar is None:
            now, state = self.curves.row, self.curves.verdict.state
            text = f"epoch {row['epoch']:.1f} · {row['seconds']:.0f} s"
            if now:
                text += f" · loss {now['loss']:.3f} · {now['images_per_second']:,.0f} images/s"
                text += f" · waiting {now['waiting_share']:.1%}"
            shown = ("effective_rank", "embedding_std", "alignment", "uniformity", "knn_top1", "crops_top1")
            scores = [f"{key} {row[key]:.3f}" for key in shown if key in row]
            say(" · ".join([text, *scores, state if now else "untrained"]))


def feature_health(features: np.ndarray) -> dict[str, float]:
    """Label-free signs of life of (N, D) features: effective rank and mean per-dimension std on the unit sphere.

    The std of isotropic features is 1/sqrt(D); of collapsed ones 0.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return {"effective_rank": effective_rank(features), "embedding_std": float(unit.std(axis=0).mean())}


def _mean(values: Tensor) -> float:
    """Over the steps with a finite value; nan when there is none."""
    return float(values[values.isfinite()].mean())


def _range(views: Sequence[Tensor]) -> Row:
    """The range and contrast of a batch's first view, which the method was given."""
    if not views:
        return {}
    low, high = torch.aminmax(views[0].float())
    low, high, std = torch.stack([low, high, views[0].float().std()]).tolist()
    return {"views_low": round(low, 5), "views_high": round(high, 5), "views_std": round(std, 5)}
