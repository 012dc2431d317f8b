"""The only place where views are applied: sources in, batches of views out.

Loading is done by threads, not worker processes: the numba kernel and the JPEG decoders release the GIL, nothing is
forked, pickled or copied, and since views are pure functions of their keys there is no worker state to restore.
A batch is a pure function of (seed, epoch, rows), whatever the number of threads.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key, permutation
from ssl_kit.data.decode import BadImageError, decode, image_size
from ssl_kit.data.sources import Source
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View
from ssl_kit.views.sample import HEIGHT, LEFT, TOP, WIDTH, Params, sample

_PREFETCH = 2  # batches made ahead: one hides the making, the second hides its jitter


class Batch(TypedDict):
    """One step's input: `views`, one (B, C, h, w) float32 in [0, 1] per view; `label` (B,) int64, -1 = unknown."""

    views: list[Tensor]
    key: Key
    label: Tensor


class Planned(NamedTuple):
    """A batch before it is made.

    `rows`: (B,) positions in the source. `spare`: positions that stand in for images that cannot be decoded, in
    order; when it is empty, rows of bad images are dropped.
    """

    epoch: int
    rows: np.ndarray
    spare: Iterable[int]


class ViewLoader:
    """Makes planned batches in a background thread, two batches ahead, in order. Can be iterated again.

    Args:
        source: where the images come from.
        plan: one array of positions in `source` per batch; or a function that returns an iterator of `Planned`.
        views: what to make of each image; a batch holds one tensor per view.
        seed: of the run; with the epoch and the position it determines every view.
        epoch: of all batches, when `plan` does not say it.
        threads: for decoding and for the view kernel; None uses all cores of this process.
        bad: for a plan of arrays: "drop" the rows of images that cannot be decoded, or "replace" them by the images of
            the following batches (so that batches keep their size).
        on_device: leave the views to `ImageData.on_after_batch_transfer`: batches hold stored pixels and parameters.

    Attributes:
        waited: seconds that the consumer has spent waiting for batches.
    """

    def __init__(
        self,
        source: Source,
        plan: Sequence[np.ndarray] | Callable[[], Iterable[Planned]],
        views: Sequence[View],
        *,
        seed: int = 0,
        epoch: int = 0,
        threads: int | None = None,
        bad: Literal["replace", "drop"] = "drop",
        on_device: bool = False,
    ):
        self.source, self.plan, self.views = source, plan, tuple(views)
        self.seed, self.epoch, self.bad, self.on_device = seed, epoch, bad, on_device
        self.threads = threads or available_cores()
        self.waited = 0.0
        for view in self.views:
            view.check_channels(source.channels)

    def __iter__(self) -> Iterator[Batch]:
        planned = iter(self._planned())
        with ThreadPoolExecutor(1, "batches") as producer, ThreadPoolExecutor(self.threads, "decode") as decoders:
            pending: deque[Future[Batch]] = deque()
            try:
                for batch in itertools.islice(planned, _PREFETCH):
                    pending.append(producer.submit(self._make, batch, decoders))
                while pending:
                    began = time.perf_counter()
                    made = pending.popleft().result()
                    self.waited += time.perf_counter() - began
                    for batch in itertools.islice(planned, 1):
                        pending.append(producer.submit(self._make, batch, decoders))
                    yield made
            finally:  # the consumer may stop early
                for future in pending:
                    future.cancel()

    def _planned(self) -> Iterable[Planned]:
        if callable(self.plan):
            return self.plan()
        plan = self.plan
        return (
            Planned(self.epoch, rows, itertools.chain(*plan[number + 1 :]) if self.bad == "replace" else ())
            for number, rows in enumerate(plan)
        )

    def _make(self, planned: Planned, decoders: ThreadPoolExecutor) -> Batch:
        in_memory = self.source.images is not None
        rows, views = self._from_memory(planned) if in_memory else self._from_files(planned, decoders)
        return {
            "views": views,
            "key": Key(self.seed, planned.epoch, torch.from_numpy(rows)),
            "label": torch.from_numpy(self.source.labels[rows]),
        }

    def _from_memory(self, planned: Planned) -> tuple[np.ndarray, list[Any]]:
        images, rows = self.source.images, np.asarray(planned.rows, np.int64)
        if isinstance(images, np.ndarray):
            heights, widths = np.full(len(rows), images.shape[1]), np.full(len(rows), images.shape[2])
            params = self._sample(planned.epoch, rows, heights, widths)
            if self.on_device:  # pixels stay uint8 until they are there: a quarter of the traffic, once for all views
                stored = torch.from_numpy(np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)))
                return rows, [stored, *(torch.from_numpy(param) for param in params)]
            return rows, [
                self._apply((images, rows), param, view) for param, view in zip(params, self.views, strict=True)
            ]
        assert images is not None
        chosen = [images[row] for row in rows]
        params = self._sample(planned.epoch, rows, *_sizes([image.shape[:2] for image in chosen]))
        return rows, [self._apply(chosen, param, view) for param, view in zip(params, self.views, strict=True)]

    def _sample(self, epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> list[Params]:
        return [sample(view, self.seed, epoch, rows, which, heights, widths) for which, view in enumerate(self.views)]

    def _apply(self, images: Any, params: Params, view: View) -> Tensor:
        return torch.from_numpy(apply_host(images, params, view.size, threads=self.threads))

    def _from_files(self, planned: Planned, decoders: ThreadPoolExecutor) -> tuple[np.ndarray, list[Tensor]]:
        """Reads each file once and cuts all its views out of one decoding at the smallest sufficient JPEG scale."""
        made = list(decoders.map(lambda row: self._cut(planned.epoch, int(row)), planned.rows))
        spare = iter(planned.spare)
        for position in range(len(made)):
            while made[position] is None and (row := next(spare, None)) is not None:
                made[position] = self._cut(planned.epoch, int(row))
        kept = [item for item in made if item is not None]
        rows = np.array([row for row, _ in kept], np.int64)
        if not kept:
            return rows, [torch.zeros(0, self.source.channels, *view.size) for view in self.views]
        stacked = [np.stack([views[which] for _, views in kept]) for which in range(len(self.views))]
        return rows, [torch.from_numpy(views) for views in stacked]

    def _cut(self, epoch: int, row: int) -> tuple[int, list[np.ndarray]] | None:
        """All views of one image file, each (C, h, w); None when it cannot be decoded, which is noted."""
        source = self.source
        try:
            data = source.read(row)
            height, width = image_size(data)
            index, heights, widths = np.array([row]), np.array([height]), np.array([width])
            params = self._sample(epoch, index, heights, widths)
            box, smallest = _needed(params, self.views, height, width)
            decoded = decode(data, source.channels, box=box, smallest=smallest)
        except (BadImageError, OSError) as error:
            source.skip(row, str(error))  # stops the run when there are too many
            return None
        views = []
        for param, view in zip(params, self.views, strict=True):
            param[:, [TOP, HEIGHT]] *= decoded.scale_y
            param[:, [LEFT, WIDTH]] *= decoded.scale_x
            views.append(apply_host([decoded.image], param, view.size, threads=1)[0])
        return row, views


class TrainingPlan:
    """Which images each step sees: a pure function of (seed, step), so that resuming needs the step alone.

    An epoch shows every image once, shuffled anew, in steps of nearly equal size (they differ by at most one image, so
    that no image is left out and no step is tiny).

    Args:
        count: images of the source.
        batch_size: images per process and step, at most.
        seed: of the run.
        rank: this process's number.
        world_size: number of processes; each takes a contiguous part of every step.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        together = batch_size * world_size
        if count < together:
            raise UserError(
                f"{count} images are fewer than one step of {together} (batch_size {batch_size} x {world_size} "
                f"processes); lower --batch_size to at most {count // world_size}, or add images"
            )
        self.count, self.seed, self.rank, self.world_size = count, seed, rank, world_size
        self.steps_per_epoch = -(-count // together)

    def batches(self, start: int = 0) -> Iterator[Planned]:
        """All steps from number `start` on, without end."""
        for epoch in itertools.count(start // self.steps_per_epoch):
            order = permutation(self.seed, epoch, self.count)
            bounds = np.linspace(0, self.count, self.steps_per_epoch + 1).round().astype(np.int64)
            for step in range(start - epoch * self.steps_per_epoch, self.steps_per_epoch):
                rows = np.array_split(order[bounds[step] : bounds[step + 1]], self.world_size)[self.rank]
                yield Planned(epoch, rows, itertools.chain(order[bounds[step + 1] :], order[: bounds[step]]))
            start = (epoch + 1) * self.steps_per_epoch


class ImageData(pl.LightningDataModule):
    """Endless training batches for Lightning; a run is one stream of steps, epochs are counted by `TrainingPlan`.

    Args:
        source: unlabelled or labelled images; labels travel in the batch and no method reads them.
        views: of each image, as many as the method takes.
        batch_size: images per process and step.
        seed: of the run.
        threads: for decoding and views; None uses all cores of this process.
        views_on: where views are made.
        channels_last: memory format of the views, faster for convolutional networks.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        batch_size: int,
        seed: int,
        threads: int | None = None,
        views_on: Literal["host", "device"] = "host",
        channels_last: bool = False,
    ):
        super().__init__()
        self.source, self.views = source, tuple(views)
        self.batch_size, self.seed, self.threads = batch_size, seed, threads
        self.views_on, self.channels_last = views_on, channels_last
        self.steps_per_epoch = TrainingPlan(len(source), batch_size, seed).steps_per_epoch
        self.loader: ViewLoader | None = None

    def train_dataloader(self) -> ViewLoader:
        """The stream of steps, from the trainer's own count of finished batches on."""
        trainer = self.trainer
        assert trainer is not None
        plan = TrainingPlan(len(self.source), self.batch_size, self.seed, trainer.global_rank, trainer.world_size)
        self.steps_per_epoch = plan.steps_per_epoch
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        self.loader = ResumableLoader(
            self.source,
            lambda: plan.batches(progress.total.processed),
            self.views,
            seed=self.seed,
            threads=self.threads,
            on_device=self.views_on == "device",
        )
        return self.loader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Makes the views on the device when they are made there, and sets their memory format."""
        if self.views_on == "device":
            from ssl_kit.views.device import apply_device

            stored, *params = batch["views"]
            batch["views"] = [
                apply_device(stored, param, view.size) for param, view in zip(params, self.views, strict=True)
            ]
        if self.channels_last:
            batch["views"] = [view.contiguous(memory_format=torch.channels_last) for view in batch["views"]]
        return batch


class ResumableLoader(ViewLoader):
    """Tells Lightning that a resumed run continues at its step; there is nothing to store, the plan knows."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: views and order are pure functions of the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


def available_cores() -> int:
    """Cores this process may use (a container or `taskset` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sizes(shapes: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    heights, widths = np.array(shapes).T
    return heights, widths


def _needed(
    params: list[Params], views: Sequence[View], height: int, width: int
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """What one decoding must give for all views: (whole image as the box, pixels it must still have).

    The finest crop decides: its box may not be decoded below its view's size.
    """
    scale_y = max(view.size[0] / param[0, HEIGHT] for param, view in zip(params, views, strict=True))
    scale_x = max(view.size[1] / param[0, WIDTH] for param, view in zip(params, views, strict=True))
    smallest = (min(height, int(np.ceil(height * scale_y))), min(width, int(np.ceil(width * scale_x))))
    return (0.0, 0.0, float(height), float(width)), smallest
