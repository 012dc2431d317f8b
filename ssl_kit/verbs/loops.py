"""Our parts in somebody else's loop: `ViewLoader` feeds it. (`Views` is in views/batch.py.)

for views, labels in ssl_kit.ViewLoader("photos", "simclr", batch_size=256, epochs=100):
    loss = criterion(*(network(view) for view in views))
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ssl_kit.core.console import result
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import choose_threads
from ssl_kit.core.reading import reading_of
from ssl_kit.data import loader
from ssl_kit.data.opening import Data, open_source
from ssl_kit.data.plan import Planned, TrainingPlan
from ssl_kit.data.sources import Listed, Source
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.report.page import write_report
from ssl_kit.training.checkpoint import State
from ssl_kit.training.curves import Bar, Curves
from ssl_kit.training.distributed import rank, world_size
from ssl_kit.training.guard import Guard
from ssl_kit.training.verdict import Row, verdict
from ssl_kit.verbs.defaults import view_size
from ssl_kit.verbs.monitor import Measure, asked_apart
from ssl_kit.verbs.record import RunRecord, versions
from ssl_kit.verbs.several import held
from ssl_kit.views.batch import made_on_device, recipe_of
from ssl_kit.views.recipe import Preset, ViewRecipe, plain

_COLLECTED = 2_048, 16  # images, and batches, that are kept of a training whose images nobody has named
_NAMES = ("encoder", "backbone")  # what the encoder of a LightningModule is usually called


class ViewLoader:
    """Batches of views for any loop: each item is `(views, labels)`; it takes the place of a `DataLoader`.

    Iterating it once goes through `epochs` epochs, iterating it again goes on with the next ones; its length is the
    number of batches of one iteration. An epoch shows each image once, shuffled anew, in batches of nearly equal size.
    Where torch.distributed has several processes each gets its part of every batch. What is yielded is a pure function
    of (data, seed, epoch), whatever the number of threads. (`data/loader.py` has the loader of our own runs, which
    knows plans and keys.)

    Args:
        data: whatever `ssl_kit.pretrain` takes, or an opened `Source`.
        recipe: what may happen to an image, or the name of a preset.
        batch_size: images per process and batch, at most.
        size: (height, width) of a view in pixels, or its side; None = chosen from the images, said.
        count: views of each image, 1 to 10.
        seed: of order and views.
        epochs: of one iteration.
        channels: see `ssl_kit.pretrain`; of an opened source its own.
        device: where the views are to be; on an accelerator they are made there, of images of several sizes from crops
            that the host has cut.
        threads: for decoding and views; None = all cores, half of them without a `device`: the CPU trains too.

    Attributes:
        source: the images; `source.classes` are the names of the labels, `source.bad.rows` what could not be decoded.
        epoch: that the next iteration begins with, from 0; set it to go on after a stop.

    Yields:
        views: `count` tensors (B, C, h, w) float32 in [0, 1].
        labels: (B,) int64, -1 = unknown.

    Raises:
        UserError: there are no images, fewer than a batch, or more bad ones than 5 %.
    """

    def __init__(
        self,
        data: Data | Listed,
        recipe: ViewRecipe | Preset = "simclr",
        *,
        batch_size: int = 256,
        size: int | tuple[int, int] | None = None,
        count: int = 2,
        seed: int = 0,
        epochs: int = 1,
        channels: int | str = 3,
        device: torch.device | str | None = None,
        threads: int | None = None,
    ):
        if epochs < 1:
            raise UserError(f"epochs {epochs}: wanted at least 1")
        self.source = opened(data, channels)
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.device = torch.device(device or "cpu")
        self.threads = threads or choose_threads(self.device.type).value
        height_width = view_size(size, self.source)
        chosen = recipe_of(recipe)
        chosen = chosen.fitted(chosen.preset or "simclr", height_width, self.source.channels)
        self.views = chosen.build(height_width, self.source.channels, count)
        self.epoch = 0
        self._plan()  # raises for a batch that is too large

    def __len__(self) -> int:
        return self._plan().steps_per_epoch * self.epochs

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor]]:
        first, self.epoch = self.epoch, self.epoch + self.epochs  # at once: a loop that stops early has seen this epoch
        return self._batches(first)

    def _plan(self) -> TrainingPlan:
        return TrainingPlan(
            len(self.source), self.batch_size, self.seed, rank(), world_size(), blocks=self.source.blocks
        )

    def _batches(self, first: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        plan = self._plan()
        steps: Iterable[Planned] = itertools.islice(plan.batches(first * plan.steps_per_epoch), len(self))
        there = self.device.type != "cpu"
        batches = loader.ViewLoader(
            self.source, lambda: steps, self.views, seed=self.seed, threads=self.threads, on_device=there
        )
        for batch in batches:
            if there:
                made = made_on_device(
                    batch["views"], batch["params"], self.views, cropped=batch["cropped"], device=self.device
                )
            else:
                made = batch["views"]
            yield made, batch["label"].to(self.device, non_blocking=True)


def opened(data: Data | Listed, channels: int | str = 3) -> Source:
    """A source as it is, or what `open_source` takes, opened; the range of deep images is measured."""
    if isinstance(data, Listed):
        return data
    reading, measured = reading_of(channels)
    return open_source(data, reading=reading, measure=measured)


class Monitor(pl.Callback):
    """Watches the training of any LightningModule as our own runs are watched, and ends in the same report.

    Before the first step, early, at the end, and now and then between, it looks at fixed images through the encoder:
    effective rank and spread, whether crops of an image find each other, kNN where there are labels; `metrics.csv` has
    the curves, and the verdict follows from them. Training goes on to the bit as it would without: no weight, mode or
    random number of it is touched.

    Args:
        data: the images that are looked at: whatever `ssl_kit.pretrain` takes. Better not those that are trained on;
            kNN asks a twentieth of the labelled ones among the others. None: the first 2,048 of the training batches,
            as they come. Several processes need it.
        folder: of run.json, metrics.csv and report.html; by default `monitor` where the trainer logs to.
        encoder: the submodule that is looked at, or a function that picks it; `encoder` or `backbone` by default. It
            makes (B, dim), or (B, dim, 1, 1), of (B, C, h, w).
        size: (height, width) of its input in pixels, or its side; None = chosen from the images, said.
        channels: of the images in `data`.
        mean: that the program's own transform subtracts, per channel or one number for all; images here are in [0, 1].
        std: that it divides by likewise.
        every: epochs between looks, never more often than every 200 steps; by default they come early, at the end, and
            between as often as 2 % of the training pays for.
        overwrite: replace what an earlier training has left in `folder`.

    Raises:
        UserError: no encoder is found, its input is not in [0, 1] and nobody said why, or the folder holds a run.
    """

    def __init__(
        self,
        data: Data | Listed | None = None,
        folder: str | Path | None = None,
        *,
        encoder: str | Callable[[Any], nn.Module] | None = None,
        size: int | tuple[int, int] | None = None,
        channels: int | str = 3,
        mean: Sequence[float] | float = 0.0,
        std: Sequence[float] | float = 1.0,
        every: float | None = None,
        overwrite: bool = False,
    ):
        self.data, self.folder, self.encoder, self.size = data, folder, encoder, size
        self.channels, self.every, self.overwrite = channels, every, overwrite
        self.mean, self.std = ([one] if isinstance(one, int | float) else list(one) for one in (mean, std))
        self.curves: Curves | None = None  # once there are images to look at
        self.waited = 0.0  # seconds that training has waited for its batches
        self._stack, self._opened = ExitStack(), False
        self._state: State | None = None  # of a checkpoint
        self._kept: list[tuple[Tensor, Tensor]] = []  # images and labels of the first batches
        self._untrained: nn.Module | None = None
        self._left = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the folder; looks at the untrained encoder, or keeps a copy of it until there are images."""
        if self.data is None and world_size() > 1:
            raise UserError("Monitor in several processes: name the images that all of them look at, as `data`")
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "monitor")
        self._open(folder)
        self._untrained = None
        self._untrained = copy.deepcopy(self._network(pl_module))
        self._left = time.perf_counter()
        if self.data is not None:
            self._begin(trainer, pl_module, opened(self.data, self.channels))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, _: int) -> None:
        """Keeps the first images, where no others are named."""
        self.waited += time.perf_counter() - self._left
        if self.curves is None:
            self._kept.append(_images_and_labels(batch))
            enough = sum(len(images) for images, _ in self._kept) >= _COLLECTED[0]
            if enough or len(self._kept) == _COLLECTED[1]:
                self._begin(trainer, pl_module, self._collected())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Notes the loss; every 20 steps writes a row, and looks when it is time to."""
        told = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        scalars = {name: one for name, one in told.items() if isinstance(one, Tensor) and one.ndim == 0}
        if "loss" not in scalars:
            raise UserError("Monitor: training_step returns no loss; return it, also where you optimise by hand")
        if self.curves is not None:
            accumulate = trainer.accumulate_grad_batches
            self.curves.collect(scalars, len(_images_and_labels(batch)[0]), accumulate)
            if (batch_idx + 1) % accumulate == 0:
                self.curves.after_step(trainer, pl_module, Guard(), ())
        self._left = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last look, and the report."""
        if self.curves is None:
            self._begin(trainer, pl_module, self._collected())
        assert self.curves is not None
        self.curves.at_end(trainer, pl_module, Guard())
        self._record.update(status="finished")
        self._write()
        self._stack.close()
        told = self.curves.verdict
        result(f"verdict: {told.state} - {told.reason}; report: {self._record.folder / 'report.html'}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Notes that the training was interrupted, or failed."""
        if self.curves is None and self._opened:
            self._record.former.settle(False)
        self._stack.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> State:
        """For Lightning's checkpoints: a resumed training goes on with its curves."""
        return {} if self.curves is None else self.curves.state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Goes on with them."""
        self._state = state_dict or None

    def _open(self, folder: Path) -> None:
        if (folder / "recipe.yaml").exists() or (
            (folder / "run.json").exists() and not (self._state or self.overwrite)
        ):
            raise UserError(f"{folder} holds a run already; give Monitor another folder, or overwrite=True for its own")
        folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(held(folder))
        self._record = self._stack.enter_context(RunRecord(folder, resume=self._state is not None))
        self._opened = True
        if self._state is None and rank() == 0:
            self._record.former.set_aside()

    def _network(self, method: pl.LightningModule) -> nn.Module:
        """What is looked at: the untrained copy as long as there is one."""
        if self._untrained is not None:
            return self._untrained
        if callable(self.encoder):
            return self.encoder(method)
        known = dict(method.named_modules())
        name = self.encoder or next((name for name in _NAMES if name in known), None)
        if name not in known or name is None:
            inside = ", ".join(name for name, _ in method.named_children())
            raise UserError(f"Monitor: {type(method).__name__} has no {name or 'encoder'}; encoder= may be {inside}")
        return known[name]

    def _begin(self, trainer: pl.Trainer, method: pl.LightningModule, source: Source) -> None:
        """Everything that depends on the images that are looked at; then the first look."""
        size = view_size(self.size, source)
        network: Callable[[pl.LightningModule], Wrapped] = lambda method: Wrapped(
            self._network(method), size, source.channels, self.mean, self.std
        )
        measure, dim = Measure(*asked_apart(source), plain(size), encoder=network), network(method).dim
        judge = lambda rows: verdict(rows, dim=dim, held_out=measure.held_out, cropped=measure.cropped)
        fed = _Fed(trainer.num_training_batches, self)
        curves = self.curves = Curves(
            self._record.folder / "metrics.csv",
            measure=measure,
            judge=judge,
            measure_every=self.every,
            measured=measure.embedded,
            encoder=network,
            data=lambda _: fed,
        )
        facts = {"root": source.name, "images": len(source), "classes": len(source.classes)}
        self._record.begin(
            method=type(method).__name__,
            judged_by=["knn"],
            encoder=network(method).name,
            dim=dim,
            data=facts,
            versions=versions(),
            device=str(method.device),
            world_size=world_size(),
            verdict=curves.verdict._asdict(),
        )
        self._record.update(status="running")
        if self._state is not None:
            curves.load_state_dict(self._state)
        curves.start(trainer.global_step if self._state is not None else 0, method.device)
        Bar(curves)  # says each look
        if self._state is None:
            curves.begin(method)
            curves.measure_untrained(trainer, method)
        self._untrained, self._kept = None, []
        self._record.former.settle(True)
        said = curves.finished

        def finished(row: Row) -> None:
            assert said is not None, "Bar has set it"
            said(row)
            self._write()

        curves.finished = finished

    def _write(self) -> None:
        assert self.curves is not None
        if self.curves.row:  # a few steps make none
            self._record.progress(self.curves)
        if rank() == 0:
            write_report([self._record.folder], self._record.folder / "report.html")

    def _collected(self) -> Source:
        """The first images of the training as a source."""
        images, labels = (torch.cat(part).cpu() for part in zip(*self._kept, strict=True))
        mean, std = (torch.tensor(one).reshape(1, -1, 1, 1) for one in (self.mean, self.std))
        images = images[: _COLLECTED[0]].float() * std + mean
        if images.min() < -0.01 or images.max() > 1.01:
            span = f"{images.min():.3g} to {images.max():.3g}"
            raise UserError(
                f"Monitor: the images of a batch hold {span}; wanted [0, 1], or the mean= and std= that were used"
            )
        stored = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        reading, _ = reading_of(stored.shape[3])
        return open_source((stored, labels[: _COLLECTED[0]].numpy()), reading=reading)


@dataclass
class _Fed:
    """What curves ask of where batches come from (`Data`), of a training that is fed by others."""

    steps_per_epoch: Any  # batches; infinite for an endless stream
    loader: Any
    images_per_step: int = 0
    total_steps: int = -1


def _images_and_labels(batch: object) -> tuple[Tensor, Tensor]:
    """The first images (B, C, H, W) of a batch of any make, and its labels (B,) int64, -1 where it has none.

    Raises:
        UserError: it has no images.
    """
    tensors = [one for one in _flat(batch) if isinstance(one, Tensor)]
    images = next((one for one in tensors if one.ndim == 4 and one.is_floating_point()), None)
    if images is None:
        raise UserError("Monitor: a batch has no tensor of images (B, C, H, W); name images to look at, as `data`")
    labels = next((one for one in tensors if one.dtype == torch.int64 and one.shape == images.shape[:1]), None)
    return images.detach(), torch.full((len(images),), -1) if labels is None else labels.detach().cpu()


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, Tensor | str) or not isinstance(value, Iterable):
        yield value
        return
    for one in value:
        yield from _flat(one)
