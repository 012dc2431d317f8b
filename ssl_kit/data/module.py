"""ImageData: what Lightning trains on. With `loader.py` the only place where views are applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from ssl_kit.core.errors import UserError
from ssl_kit.data.loader import ViewLoader, views_at
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.data.sources import Source
from ssl_kit.views.device import apply_device
from ssl_kit.views.recipe import View


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
                f"--contrastive_batch {contrastive_batch} is made of chunks of --batch_size {batch_size}; wanted a "
                "smaller batch size, or leave --contrastive_batch out"
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
        self.loader: ViewLoader | None = None

    def _plan(self, rank: int, world_size: int) -> TrainingPlan:
        option: Literal["batch_size", "contrastive_batch"] = "batch_size" if self.chunk is None else "contrastive_batch"
        return TrainingPlan(
            len(self.source), self._per_process, self.seed, rank, world_size, option, self.images_per_step
        )

    def train_dataloader(self) -> ViewLoader:
        """The stream of steps, from the trainer's own count of finished batches on."""
        trainer = self.trainer
        assert trainer is not None
        self.plan = self._plan(trainer.global_rank, trainer.world_size)
        self.loader = ResumableLoader(
            self.source,
            lambda: self.plan.batches(self._done()),
            self.views,
            seed=self.seed,
            threads=self.threads,
            on_device=self.views_on == "device",
            chunk=self.chunk,
            paired=self.paired,
        )
        return self.loader

    def _done(self) -> int:
        """Batches that training has finished."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return int(progress.total.processed)

    def images_of_each(self) -> list[int]:
        """Of the batch at hand, of every process; empty where a file could turn out to be bad."""
        return self.plan.images_of_each(self._done()) if self.source.in_memory else []

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Makes the views on the device when they are made there, and sets their memory format; of chunks, later."""
        if "chunks" in batch:
            device = batch["key"].index.device
            batch["chunks"].finish = lambda chunk: self._finished(move_data_to_device(chunk, device))
            return batch
        return self._finished(batch)

    def _finished(self, batch: Any) -> Any:
        if self.views_on == "device":
            stored, *params = batch["views"]
            views = views_at(self.views, batch["key"].epoch)
            count = len(params[0])  # of twice as many images the second half are the partners
            shown = [stored[:count], *[stored[-count:]] * (len(views) - 1)]
            batch["views"] = [
                apply_device(images, param, view.size) for images, param, view in zip(shown, params, views, strict=True)
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
