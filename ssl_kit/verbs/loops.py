"""Our parts in somebody else's loop: `ViewLoader` feeds it. (`Views` is in views/batch.py.)

for views, labels in ssl_kit.ViewLoader("photos", "simclr", batch_size=256, epochs=100):
    loss = criterion(*(network(view) for view in views))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import choose_threads
from ssl_kit.core.reading import reading_of
from ssl_kit.data import loader
from ssl_kit.data.opening import Data, open_source
from ssl_kit.data.plan import Planned, TrainingPlan
from ssl_kit.data.sources import Listed, Source
from ssl_kit.training.distributed import rank, world_size
from ssl_kit.verbs.defaults import view_size
from ssl_kit.views.batch import recipe_of
from ssl_kit.views.device import apply_device
from ssl_kit.views.recipe import Preset, ViewRecipe


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
        device: where the views are to be; on an accelerator they are made there, if the images are in memory and of one
            size.
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
        return TrainingPlan(len(self.source), self.batch_size, self.seed, rank(), world_size())

    def _batches(self, first: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        plan = self._plan()
        steps: Iterable[Planned] = itertools.islice(plan.batches(first * plan.steps_per_epoch), len(self))
        there = self.device.type != "cpu" and self.source.stack is not None
        batches = loader.ViewLoader(
            self.source, lambda: steps, self.views, seed=self.seed, threads=self.threads, on_device=there
        )
        for batch in batches:
            made = [view.to(self.device, non_blocking=True) for view in batch["views"]]
            if there:
                stored, *params = made
                made = [apply_device(stored, one, view.size) for one, view in zip(params, self.views, strict=True)]
            yield made, batch["label"].to(self.device, non_blocking=True)


def opened(data: Data | Listed, channels: int | str = 3) -> Source:
    """A source as it is, or what `open_source` takes, opened; the range of deep images is measured."""
    if isinstance(data, Listed):
        return data
    reading, measured = reading_of(channels)
    return open_source(data, reading=reading, measure=measured)
