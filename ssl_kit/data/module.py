"""ImageData: what Lightning trains on. With `loader.py` the only place where views are applied."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ssl_kit.core.console import detail, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import size_text
from ssl_kit.data.loader import ViewLoader, views_at
from ssl_kit.data.plan import Planned, TrainingPlan
from ssl_kit.data.sources import Source
from ssl_kit.views.batch import made_on_device
from ssl_kit.views.device import DeviceViews
from ssl_kit.views.recipe import View

_TRIED, _TOGETHER = 512, 64  # images that views are tried on, and of them in a batch
_STORED = 0.25  # of the device's free memory that all pixels may take


class ImageData(pl.LightningDataModule):
    """Endless training batches for Lightning; a run is one stream of steps, epochs are counted by `TrainingPlan`.

    Args:
        source: unlabelled or labelled images; labels travel in the batch; few methods read them.
        views: {first epoch: views} of each image, as many as the method takes.
        batch_size: images per process and step; with `contrastive_batch` per chunk.
        seed: of the run.
        threads: for decoding and views; None uses all cores of this process.
        views_on: where views are made.
        channels_last: memory format of the views, faster for convolutional networks.
        contrastive_batch: images per process and step where a step is made of chunks; batches then come as `Chunks`.
        world_size: number of processes.
        images_per_step: images of a step over all processes, if not so many for each.
        paired: see `ViewLoader`.

    Attributes:
        images_per_step: images of a step over all processes.
        steps_per_epoch: batches of one epoch.
        total_steps: optimiser steps of the run as first planned, for runs whose end Lightning does not know.
    """

    def __init__(
        self,
        source: Source,
        views: Mapping[int, Sequence[View]],
        *,
        batch_size: int,
        seed: int,
        threads: int | None = None,
        views_on: Literal["host", "device"] = "host",
        channels_last: bool = False,
        contrastive_batch: int | None = None,
        world_size: int = 1,
        images_per_step: int | None = None,
        paired: bool = False,
    ):
        super().__init__()
        if contrastive_batch is not None and contrastive_batch <= batch_size:
            raise UserError(
                f"--contrastive-batch {contrastive_batch} is made of chunks of --batch-size {batch_size}; wanted a "
                "smaller batch size, or leave --contrastive-batch out"
            )
        self.source, self.views = source, views
        self.batch_size, self.seed, self.threads = batch_size, seed, threads
        self.views_on, self.channels_last, self.paired = views_on, channels_last, paired
        self.chunk = None if contrastive_batch is None else batch_size
        self._per_process = contrastive_batch or batch_size
        self.images_per_step = images_per_step or self._per_process * world_size
        self.plan = self._plan(0, world_size)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = -1
        self._make = DeviceViews()
        self._compiled = False  # what runs in a step, for the shapes that are planned
        self._store: Tensor | None = None  # all pixels, where the device has them
        self.loader: ViewLoader | None = None

    def _plan(self, rank: int, world_size: int) -> TrainingPlan:
        option: Literal["batch_size", "contrastive_batch"] = "batch_size" if self.chunk is None else "contrastive_batch"
        return TrainingPlan(
            len(self.source),
            self._per_process,
            self.seed,
            rank,
            world_size,
            option,
            self.images_per_step,
            self.source.blocks,
        )

    def train_dataloader(self) -> ViewLoader:
        """The stream of steps, from the trainer's own count of finished batches on."""
        trainer = self.trainer
        assert trainer is not None
        self.plan = self._plan(trainer.global_rank, trainer.world_size)
        device = trainer.strategy.root_device
        self._store = _on(device, self.source) if self.views_on == "device" else None
        self.loader = self._loader(lambda: self.plan.batches(self._done()), chunk=self.chunk)
        self.loader.device = device
        return self.loader

    def _loader(
        self, plan: Sequence[np.ndarray] | Callable[[], Iterable[Planned]], epoch: int = 0, chunk: int | None = None
    ) -> ResumableLoader:
        return ResumableLoader(
            self.source,
            plan,
            self.views,
            seed=self.seed,
            epoch=epoch,
            threads=self.threads,
            on_device=self.views_on == "device",
            stored=self._store is not None,
            chunk=chunk,
            paired=self.paired,
        )

    def expect_compiled(self) -> None:
        """From now on a step's code is of the planned shapes: that of the views on the device, too."""
        self._make, self._compiled = DeviceViews(compiled=True), True

    def trial(self, device: torch.device) -> Iterator[object]:
        """Batches, or chunks, as training will be given them: one of each shape that the plan has."""
        sizes = self.plan.sizes
        if self.chunk is not None:
            sizes = {len(part) for size in sizes for part in np.array_split(np.arange(size), -(-size // self.chunk))}
        for epoch in self.views:
            for count in sorted(sizes):
                batch = next(iter(self._loader([np.arange(count)], epoch, chunk=None)))
                yield self._finished(move_data_to_device(batch, device))

    def _done(self) -> int:
        """Batches that training has finished."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return int(progress.total.processed)

    def images_of_each(self) -> list[int]:
        """Of the batch at hand, of every process; empty where a file could turn out to be bad."""
        return self.plan.images_of_each(self._done()) if self.source.in_memory else []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Makes the views on the device when they are made there, and sets their memory format; of chunks, later."""
        if "chunks" in batch:
            device = batch["key"].index.device
            batch["chunks"].finish = lambda chunk: self._finished(move_data_to_device(chunk, device))
            return batch
        arrived = batch.pop("arrived", None)
        if arrived is not None:
            arrived.wait()  # the stream that trains, not the host
            for tensor in _tensors(batch):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self._finished(batch)

    def _finished(self, batch: Any) -> Any:
        if self.views_on == "device":
            count = len(batch["key"].index)
            if self._compiled and count not in self.plan.sizes and self.chunk is None:
                warn(f"a step of {count} images: code is compiled for {sorted(self.plan.sizes)}, and anew for this one")
            batch["views"] = made_on_device(
                batch["views"],
                batch.pop("params"),
                views_at(self.views, batch["key"].epoch),
                cropped=batch.pop("cropped"),
                make=self._make,
                store=self._store,
            )
        if self.channels_last:
            batch["views"] = [view.contiguous(memory_format=torch.channels_last) for view in batch["views"]]
        return batch


def _on(device: torch.device, source: Source) -> Tensor | None:
    """All pixels of a source on an accelerator, (M, H, W, C), where they lie in one array and leave it room enough."""
    if device.type != "cuda" or source.stack is None:
        return None
    images, free = source.stack[0], torch.cuda.mem_get_info(device)[0]
    if images.nbytes > _STORED * free:
        return None
    detail(f"pixels: {size_text(images.nbytes)}, on the device ({size_text(free)} free there)")
    return torch.from_numpy(images).to(device)


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch."""
    for value in batch.values() if isinstance(batch, dict) else batch:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _tensors(value)


class ResumableLoader(ViewLoader):
    """Tells Lightning that a resumed run continues at its step; there is nothing to store, the plan knows.

    On a GPU batches are copied on a stream of their own: Lightning asks for a batch before it trains on the one before
    it, so that it arrives meanwhile.
    """

    device = torch.device("cpu")

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        if self.device.type != "cuda" or self.chunk is not None:
            yield from batches
            return
        side = torch.cuda.Stream(self.device)
        move = lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True)  # what is pinned stays as it is
        for batch in batches:
            with torch.cuda.stream(side):
                moved: Any = apply_to_collection(batch, Tensor, move)
            moved["arrived"] = side.record_event()
            yield moved

    def state_dict(self) -> dict[str, object]:
        """Empty: views and order are pure functions of the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing to restore."""


def views_speed(
    training: Source, views: Sequence[View], threads: int, device: str, place: Literal["host", "device"]
) -> float:
    """Images per second of a few batches on `device`, made there or on the host, after one that is not counted."""
    count = min(len(training), _TRIED)
    plan = np.array_split(np.arange(count), max(2, count // _TOGETHER))
    make, done, began = DeviceViews(), 0, 0.0
    for batch in ViewLoader(training, plan, views, threads=threads, on_device=place == "device"):
        made = batch["views"]
        if place == "device":
            made = made_on_device(made, batch["params"], views, cropped=batch["cropped"], make=make, device=device)
        made[-1].to(device).sum().item()  # waits for it
        done += len(batch["label"]) if began else 0
        began = began or time.perf_counter()
    return done / (time.perf_counter() - began)
