"""Sources in, batches of views out: the only place where views are made on the host.

Loading is done by threads, not worker processes: the numba kernel and the JPEG decoders release the GIL, nothing is
forked, pickled or copied, and since views are pure functions of their keys there is no worker state to restore.
A batch is a pure function of (seed, epoch, rows), whatever the number of threads.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores
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
        views: what to make of each image; a batch holds one tensor per view. A mapping {epoch: views} changes them
            from that epoch on.
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
        views: Sequence[View] | Mapping[int, Sequence[View]],
        *,
        seed: int = 0,
        epoch: int = 0,
        threads: int | None = None,
        bad: Literal["replace", "drop"] = "drop",
        on_device: bool = False,
    ):
        self.source, self.plan = source, plan
        self.views = views if isinstance(views, Mapping) else {0: views}
        self.seed, self.epoch, self.bad, self.on_device = seed, epoch, bad, on_device
        self.threads = threads or available_cores()
        self.waited = 0.0
        for view in itertools.chain(*self.views.values()):
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
        images, rows, views = (
            self.source.images,
            np.asarray(planned.rows, np.int64),
            views_at(self.views, planned.epoch),
        )
        if isinstance(images, np.ndarray):
            heights, widths = np.full(len(rows), images.shape[1]), np.full(len(rows), images.shape[2])
            params = self._sample(views, planned.epoch, rows, heights, widths)
            if self.on_device:  # pixels stay uint8 until they are there: a quarter of the traffic, once for all views
                stored = torch.from_numpy(np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)))
                return rows, [stored, *(torch.from_numpy(param) for param in params)]
            return rows, [self._apply((images, rows), param, view) for param, view in zip(params, views, strict=True)]
        assert images is not None
        chosen = [images[row] for row in rows]
        params = self._sample(views, planned.epoch, rows, *_sizes([image.shape[:2] for image in chosen]))
        return rows, [self._apply(chosen, param, view) for param, view in zip(params, views, strict=True)]

    def _sample(
        self, views: Sequence[View], epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> list[Params]:
        return [sample(view, self.seed, epoch, rows, which, heights, widths) for which, view in enumerate(views)]

    def _apply(self, images: Any, params: Params, view: View) -> Tensor:
        return torch.from_numpy(apply_host(images, params, view.size, threads=self.threads))

    def _from_files(self, planned: Planned, decoders: ThreadPoolExecutor) -> tuple[np.ndarray, list[Tensor]]:
        """Reads each file once and cuts all its views out of one decoding at the smallest sufficient JPEG scale."""
        rows, spare = np.array(planned.rows, np.int64), iter(planned.spare)
        views = views_at(self.views, planned.epoch)
        made = [np.empty((len(rows), self.source.channels, *view.size), np.float32) for view in views]
        good = np.zeros(len(rows), bool)
        pending = np.arange(len(rows))  # places in the batch
        while len(pending):
            done = self._cut(planned.epoch, rows, pending, made, decoders)
            good[pending[done]] = True
            pending = pending[~done]
            instead = list(itertools.islice(spare, len(pending)))
            pending = pending[: len(instead)]
            rows[pending] = instead
        if not good.all():
            rows, made = rows[good], [batch[good] for batch in made]
        return rows, [torch.from_numpy(batch) for batch in made]

    def _cut(
        self, epoch: int, rows: np.ndarray, places: np.ndarray, made: list[np.ndarray], decoders: ThreadPoolExecutor
    ) -> np.ndarray:
        """Makes the views of `rows[places]` at those places of `made`; (len(places),) bool: which files were good."""
        opened = dict(zip(places, decoders.map(self._open, rows[places]), strict=True))
        found = np.array([place for place in places if opened[place] is not None], np.int64)
        heights, widths = _sizes([opened[place][1] for place in found])
        kinds = views_at(self.views, epoch)
        params = self._sample(kinds, epoch, rows[found], heights, widths)

        def cut(number: int) -> bool:
            place = found[number]
            data, (height, width) = opened[place]
            own = [param[number : number + 1] for param in params]
            try:
                image, scale_y, scale_x = decode(
                    data, self.source.channels, smallest=_needed(own, kinds, height, width)
                )
            except BadImageError as error:
                self.source.skip(int(rows[place]), str(error))  # stops the run when there are too many
                return False
            for param, view, views in zip(own, kinds, made, strict=True):
                param[:, [TOP, HEIGHT]] *= scale_y
                param[:, [LEFT, WIDTH]] *= scale_x
                apply_host([image], param, view.size, out=views[place : place + 1])
            return True

        cut_well = dict(zip(found, decoders.map(cut, range(len(found))), strict=True))
        return np.array([cut_well.get(place, False) for place in places], bool)

    def _open(self, row: int) -> tuple[bytes, tuple[int, int]] | None:
        """An image file and its upright (height, width); None when it is bad, which is noted."""
        try:
            data = self.source.read(int(row))
            return data, image_size(data)
        except BadImageError as error:
            self.source.skip(int(row), str(error))
            return None


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
        if batch_size < 1:
            raise UserError(f"--batch_size {batch_size}: wanted at least 1")
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


def views_at(schedule: Mapping[int, Sequence[View]], epoch: int) -> Sequence[View]:
    """The views of an epoch: those of the last entry that has begun. The first entry is for epoch 0."""
    return schedule[max(first for first in schedule if first <= epoch)]


def _sizes(shapes: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    heights, widths = np.array(shapes, np.int64).reshape(-1, 2).T
    return heights, widths


def _needed(params: list[Params], views: Sequence[View], height: int, width: int) -> tuple[int, int] | None:
    """The smallest (height, width) of the decoded image that serves all views; None for the full size.

    The finest crop decides: its box may not be decoded below its view's size. Views without random crops are those
    of evaluation: they come from the full size, so that features do not depend on where the images were kept.
    """
    if not any(view.crop for view in views):
        return None
    scale_y = max(view.size[0] / param[0, HEIGHT] for param, view in zip(params, views, strict=True))
    scale_x = max(view.size[1] / param[0, WIDTH] for param, view in zip(params, views, strict=True))
    return min(height, int(np.ceil(height * scale_y))), min(width, int(np.ceil(width * scale_x)))
