"""Sources in, batches of views out: the only place where views are made on the host.

Loading is done by threads, not worker processes: the numba kernel and the JPEG decoders release the GIL, nothing is
forked, pickled or copied, and since views are pure functions of their keys there is no worker state to restore.
A batch is a pure function of (seed, epoch, rows), whatever the number of threads.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores, in_order
from ssl_kit.core.random import Key
from ssl_kit.data.decode import decode
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.plan import Partners, Planned, following
from ssl_kit.data.sources import Source, Stored, is_deep, size_of
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View
from ssl_kit.views.sample import HEIGHT, LEFT, TOP, WIDTH, Params, columns_of, cropped, sample

Kind: TypeAlias = tuple[int, View]  # the number of a view, and what it is
_Made: TypeAlias = tuple[np.ndarray, list[np.ndarray], list[Params]]  # rows; views, or what they are made of; params
_TORCH = {"uint8": torch.uint8, "uint16": torch.uint16}
_PREFETCH = 2  # batches made ahead: one hides the making, the second hides its jitter
_TOGETHER = 4  # decoded images that go through the view kernel in one call: its overhead is 0.1 ms


class Batch(TypedDict):
    """One step's input: `views`, one (B, C, h, w) float32 in [0, 1] per view; `label` (B,) int64, -1 = unknown.

    With a loader's `chunk`, `views` is empty and `chunks` makes them. Where a device is to make them, `params` are
    those of each view and `views` what they are made of, see `made_on_device`.
    """

    views: list[Tensor]
    key: Key
    label: Tensor
    chunks: NotRequired[Chunks]
    params: NotRequired[list[Tensor]]
    cropped: NotRequired[bool]


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
        on_device: leave the views to `made_on_device`: batches hold parameters, and pixels as stored where all images
            have one size and are in memory, else crops. Both lie in pinned memory where there is a GPU.
        stored: the device has the pixels: batches name their rows.
        chunk: images whose views are held at a time: batches come as `Chunks`.
        paired: make all views but the first of another image of the group, where the source knows groups; keys then
            name the group.

    Attributes:
        waited: seconds that the consumer has spent waiting for batches and chunks.
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
        stored: bool = False,
        chunk: int | None = None,
        paired: bool = False,
    ):
        self.stored = stored
        self._crop_kind: np.dtype[Any] = np.dtype(np.float32)
        if on_device and source.stack is None:
            self._crop_kind = np.dtype(np.uint16 if is_deep(source) else np.uint8)
        self.source, self.plan, self.chunk = source, plan, chunk
        self.views = views if isinstance(views, Mapping) else {0: views}
        self.seed, self.epoch, self.bad, self.on_device = seed, epoch, bad, on_device
        self.threads = threads or available_cores()
        # a batch's Python and numpy parts run beside another batch's kernels, so that two threads are worth 1.9
        self._producers = min(_PREFETCH, self.threads)
        self._buffers = _Buffers()
        groups = source.groups() if paired else None
        self._partners = None if groups is None else Partners(groups)
        self.waited = 0.0
        for view in itertools.chain(*self.views.values()):
            view.check_channels(source.channels)

    def __iter__(self) -> Iterator[Batch]:
        makers = ThreadPoolExecutor(self._producers, "batches")
        with makers as producer, ThreadPoolExecutor(self.threads, "decode") as decoders:
            make = lambda batch: producer.submit(self._make, batch, decoders)
            start = make if self.chunk is None else lambda batch: self._in_chunks(batch, make)
            batches = in_order(start, self._planned(), _PREFETCH if self.chunk is None else 1)  # chunks see to theirs
            try:
                while True:
                    began = time.perf_counter()
                    if (made := next(batches, None)) is None:
                        break
                    self.waited += time.perf_counter() - began
                    yield made
            finally:  # the consumer may stop early
                producer.shutdown(wait=False, cancel_futures=True)

    def _in_chunks(self, planned: Planned, make: Callable[[Planned], Future[Batch]]) -> Future[Batch]:
        """The batch whose views are still to be made, chunk by chunk."""
        assert self.chunk is not None
        count = -(-len(planned.rows) // self.chunk)
        splits = np.array_split(planned.rows, count)
        starts = np.cumsum([0, *map(len, splits)])
        parts = [planned.part(rows, int(start)) for rows, start in zip(splits, starts, strict=False)]
        ready: Future[Batch] = Future()
        ready.set_result(
            {
                "views": [],
                "key": self._key(planned.epoch, np.array(planned.rows, np.int64)),
                "label": torch.from_numpy(self.source.labels(planned.rows)),
                "chunks": Chunks(self, parts, make),
            }
        )
        return ready

    def _planned(self) -> Iterable[Planned]:
        if callable(self.plan):
            return self.plan()
        if self.bad == "drop":
            return (Planned(self.epoch, rows) for rows in self.plan)
        return (Planned(self.epoch, rows, following(self.plan, number)) for number, rows in enumerate(self.plan))

    def _make(self, planned: Planned, decoders: ThreadPoolExecutor) -> Batch:
        stack = self.source.stack
        rows, made, params = self._stacked(planned, *stack) if stack else self._one_by_one(planned, decoders)
        batch: Batch = {
            "views": [torch.from_numpy(one) for one in made],
            "key": self._key(planned.epoch, rows),
            "label": torch.from_numpy(self.source.labels(rows)),
        }
        if self.on_device:
            if stack and not self.stored:  # (B, H, W, C)
                batch["views"] = [images.permute(0, 3, 1, 2) for images in batch["views"]]
            batch |= {"params": [torch.from_numpy(one) for one in params], "cropped": stack is None}
        return batch

    def _key(self, epoch: int, rows: np.ndarray) -> Key:
        groups = None if self._partners is None else torch.from_numpy(self._partners.groups[rows])
        return Key(self.seed, epoch, torch.from_numpy(rows), groups)

    def _partners_of(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The images that all views but the first are made of."""
        return rows if self._partners is None else self._partners.draw(self.seed, epoch, rows)

    def _stacked(self, planned: Planned, images: np.ndarray, places: np.ndarray) -> _Made:
        """Views of images that lie in one array; what they are made of, where the device makes them."""
        rows, views = np.array(planned.rows, np.int64), views_at(self.views, planned.epoch)
        heights, widths = (np.full(len(rows), side) for side in images.shape[1:3])
        params = self._sample([*enumerate(views)], planned.epoch, rows, heights, widths)
        others = self._partners_of(planned.epoch, rows)
        if self.on_device:  # pixels stay as stored until they are there: a quarter of the traffic, once for all views
            wanted = [places[one] for one in ([rows] if others is rows else [rows, others])]
            return rows, wanted if self.stored else [self._gathered(images, one) for one in wanted], params
        threads = self.threads // self._producers
        made = [self._empty(len(rows), (images.shape[3], *view.size), np.dtype(np.float32)) for view in views]
        for which, (param, view, out) in enumerate(zip(params, views, made, strict=True)):
            apply_host((images, places[others if which else rows]), param, view.size, out=out, threads=threads)
        return rows, made, params

    def _gathered(self, images: np.ndarray, places: np.ndarray) -> np.ndarray:
        out = self._empty(len(places), images.shape[1:], images.dtype)
        return np.take(images, places, axis=0, out=out, mode="clip")  # any other mode makes a copy of its own first

    def _empty(self, count: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        """(count, *shape) with arbitrary contents.

        What goes to a GPU is pinned by torch's own allocator, which gives memory out again only after its copy's event.
        """
        if not self.on_device:
            return self._buffers.take(count, shape)
        if not torch.cuda.is_available():
            return np.empty((count, *shape), kind)
        pinned: np.ndarray = torch.empty((count, *shape), dtype=_TORCH[kind.name], pin_memory=True).numpy()
        return pinned

    def _sample(
        self, kinds: Sequence[Kind], epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray
    ) -> list[Params]:
        return [sample(view, self.seed, epoch, rows, which, heights, widths) for which, view in kinds]

    def _one_by_one(self, planned: Planned, decoders: ThreadPoolExecutor) -> _Made:
        """Reads each image once, and cuts all its views out of one decoding at the smallest sufficient JPEG scale."""
        rows, views = np.array(planned.rows, np.int64), views_at(self.views, planned.epoch)
        made = [self._empty(len(rows), (self.source.channels, *view.size), self._crop_kind) for view in views]
        rest, kinds = [np.empty((len(rows), columns_of(view.bands)), np.float32) for view in views], [*enumerate(views)]
        own = kinds if self._partners is None else kinds[:1]
        good = np.zeros(len(rows), bool)
        pending = np.arange(len(rows))  # places in the batch
        spare: dict[int, Iterator[int]] = {}
        while len(pending):
            done = self._cut(planned.epoch, rows, rows, pending, own, (made, rest), decoders)
            good[pending[done]] = True
            pending = pending[~done]
            for place in pending.tolist():
                rows[place] = next(spare.setdefault(place, planned.substitutes(place)), -1)
            pending = pending[rows[pending] >= 0]
        if len(own) < len(kinds):
            others, lack = self._partners_of(planned.epoch, rows), np.flatnonzero(good)
            for images in (others, rows):  # a partner that cannot be decoded is the image itself, which just could be
                lack = lack[~self._cut(planned.epoch, rows, images, lack, kinds[1:], (made, rest), decoders)]
            good[lack] = False
        if not good.all():
            rows, made, rest = rows[good], [batch[good] for batch in made], [one[good] for one in rest]
        return rows, made, rest

    def _cut(
        self,
        epoch: int,
        rows: np.ndarray,
        images: np.ndarray,
        places: np.ndarray,
        kinds: Sequence[Kind],
        out: tuple[list[np.ndarray], list[Params]],
        decoders: ThreadPoolExecutor,
    ) -> np.ndarray:
        """Makes views of `images[places]`, drawn by `rows[places]`, at those places of `out`; or crops and the rest.

        Returns:
            (len(places),) bool: which images were good.
        """
        if not len(places):
            return np.empty(0, bool)
        in_memory, opening = self.source.in_memory, images[places].tolist()
        opened = dict(zip(places, (map if in_memory else decoders.map)(self._open, opening), strict=True))
        found = np.array([place for place in places if opened[place] is not None], np.int64)
        heights, widths = np.array([opened[place][1] for place in found], np.int64).reshape(-1, 2).T
        params = self._sample(kinds, epoch, rows[found], heights, widths)

        def load(number: int) -> np.ndarray | None:
            """One image, decoded as small as its views allow, their boxes scaled with it."""
            stored, (height, width) = opened[found[number]]
            if isinstance(stored, np.ndarray):
                return stored
            own = [param[number : number + 1] for param in params]
            try:
                image, scale_y, scale_x = decode(
                    stored, self.source.reading, smallest=_needed(own, [view for _, view in kinds], height, width)
                )
            except BadImageError as error:
                self.source.skip(int(images[found[number]]), str(error))  # stops the run when there are too many
                return None
            for param in own if (scale_y, scale_x) != (1, 1) else ():
                param[:, [TOP, HEIGHT]] *= scale_y
                param[:, [LEFT, WIDTH]] *= scale_x
            return image

        def cut(numbers: np.ndarray) -> np.ndarray:
            """The views of a few images; the places of those that could be decoded."""
            loaded = [load(number) for number in numbers]
            pixels = [image for image in loaded if image is not None]
            these = numbers[[image is not None for image in loaded]]
            at = found[these]
            for param, (which, view) in zip(params, kinds, strict=True) if pixels else ():
                made, now = out[0][which], param[these]
                if self.on_device:
                    now, out[1][which][at] = cropped(now, view.size)
                if at[-1] - at[0] == len(at) - 1:
                    apply_host(pixels, now, view.size, out=made[at[0] : at[-1] + 1])
                else:  # around a bad one
                    made[at] = apply_host(pixels, now, view.size, out=np.empty_like(made[: len(at)]))
            return at

        together = -(-len(places) // self.threads) if in_memory else _TOGETHER
        groups = np.array_split(np.arange(len(found)), max(1, -(-len(found) // together)))
        return np.isin(places, np.concatenate(list(decoders.map(cut, groups))))

    def _open(self, row: int) -> tuple[Stored, tuple[int, int]] | None:
        """An image as it is stored and its upright (height, width); None when it is bad, which is noted."""
        stored = self.source.read([row])[0]
        try:
            return stored, size_of(stored)
        except BadImageError as error:
            self.source.skip(row, str(error))
            return None


class Chunks:
    """The images of one step in chunks: views are made when they are asked for, and made again when asked for again.

    Chunk i is `(views, key)`. They are asked for in order (forward pass), then in reverse (backward pass): the loader's
    threads make the next one in the direction of travel meanwhile, so that at most two are held. Both passes see the
    same images, also where some cannot be decoded: the second pass asks for those that the first one got.

    Attributes:
        finish: what is done to a chunk's batch on the consumer's side: transfer, views on the device, memory format.
    """

    def __init__(self, loader: ViewLoader, parts: list[Planned], make: Callable[[Planned], Future[Batch]]):
        self.finish: Callable[[Batch], Batch] = lambda batch: batch
        self._loader, self._parts, self._make = loader, parts, make
        self._last = -1
        self._settled: set[int] = set()  # chunks whose images are known
        self._making: dict[int, Future[Batch]] = {0: make(parts[0])}

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> tuple[list[Tensor], Key]:
        ahead = number + 1 if number > self._last else number - 1
        if ahead == len(self):  # the last one will be asked for again, then the one before it
            ahead = number - 1
        self._last = number
        wanted = [chunk for chunk in (number, ahead) if chunk >= 0]
        self._making = {chunk: self._making.get(chunk) or self._make(self._parts[chunk]) for chunk in wanted}
        began = time.perf_counter()
        batch = self._making[number].result()
        self._loader.waited += time.perf_counter() - began
        part, rows = self._parts[number], batch["key"].index.numpy()
        if number in self._settled and not np.array_equal(rows, part.rows):
            raise UserError(
                f"{len(part.rows) - len(rows)} images could be read in the forward pass and not again in the backward "
                "pass; go on with --resume when the storage is reliable"
            )
        self._parts[number] = Planned(part.epoch, rows)  # no substitutes any more: it stays as it is
        self._settled.add(number)
        finished = self.finish(batch)
        return finished["views"], finished["key"]


class _Buffers:
    """Arrays for views, used again once nobody holds their batch any more.

    Fresh memory is dear: the kernel zeroes it page by page, 1 ms for the two 224-px views of an image against 2.3 ms
    for decoding and making them. A tensor made by `torch.from_numpy` holds its array, so the count of references says
    whether it is free.
    """

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, count: int, shape: tuple[int, ...]) -> np.ndarray:
        """A (count, *shape) float32 array with arbitrary contents."""
        with self._lock:
            free = [held for held in self._held if sys.getrefcount(held) == _UNUSED]
            fitting = [held for held in free if held.shape[1:] == shape and len(held) >= count]
            if not fitting:
                self._held = [held for held in self._held if not any(held is one for one in free)]  # another size's
                fitting = [np.empty((count + 1, *shape), np.float32)]  # one more: batches differ by one image
                self._held += fitting
            return fitting[0][:count]


# references of the list, the loop variable and getrefcount's argument; how many they are differs between Pythons
_UNUSED = next(iter([sys.getrefcount(held) for held in [np.empty(0)]]))


def views_at(schedule: Mapping[int, Sequence[View]], epoch: int) -> Sequence[View]:
    """The views of an epoch: those of the last entry that has begun. The first entry is for epoch 0."""
    return schedule[max(first for first in schedule if first <= epoch)]


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
