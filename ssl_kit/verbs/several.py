"""What several processes must have alike before they train together, a folder, the images, the size of a step; how
Lightning is told of them; and how they share the embedding of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.core.process import on_this_machine, processes_asked, started
from ssl_kit.core.sealed import read_object
from ssl_kit.data.labels import spread
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.evaluation.features import Pixels
from ssl_kit.evaluation.retrieval import TwoCrops
from ssl_kit.training.distributed import (
    FIND_UNUSED,
    PATIENCE,
    all_gather_object,
    broadcast,
    rank,
    rows_of_each,
    wait,
    world_size,
)
from ssl_kit.views.recipe import View, plain

if TYPE_CHECKING:
    from ssl_kit.verbs.pretrain import Settings

_BATCH = 256  # images, embedded together


def check_processes(options: dict[str, object]) -> None:
    """Raises `UserError` for options of the trainer that ask for processes which are not there, or for others' ways.

    Args:
        options: of the trainer; `devices` becomes the number of processes of this machine where it names no GPUs.
    """
    if started() == 1:
        count = processes_asked(options.get("devices", 1))
        if count > 1:
            raise UserError(
                f"--trainer.devices {options['devices']} from a program of one process: start the program by "
                f"torchrun --nproc-per-node {count}, or use the command ssl-kit pretrain, which starts them itself"
            )
        return
    if options.get("strategy", "auto") not in ("auto", "ddp", FIND_UNUSED):
        raise UserError(f"--trainer.strategy {options['strategy']}: several processes train by ddp or {FIND_UNUSED}")
    if not isinstance(options.get("devices"), list):
        options["devices"] = on_this_machine()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the run's folder, by the first process for all."""
    if rank() > 0:
        yield
        return
    with lock(folder):
        yield


def all_fit(fits: bool) -> bool:
    """Whether the images fit into the memory of every process: decoded when needed, they are not quite the same."""
    return all(all_gather_object(fits))


def check_images(source: Source) -> None:
    """Raises `UserError` unless all processes see the same images."""
    names = hashlib.sha256("\n".join(source.ids()).encode()).hexdigest()
    count, wanted = broadcast(lambda: [len(source), names])
    if [len(source), names] != [count, wanted]:
        raise UserError(
            f"{source.name} has {len(source):,} images here and {count:,} for process 0, or others: the processes need "
            "the same files, and nobody who changes them meanwhile"
        )


def images_per_step(settings: Settings, folder: Path) -> tuple[Settings, int]:
    """Images of a step over all processes. A resumed run keeps them, however many processes there are now.

    Args:
        settings: of the run, with the size of its batches.
        folder: of the run.

    Returns:
        The settings, where the size of a process's batch is its share; and the images of a step.
    """
    contrastive = settings.contrastive_batch is not None
    own = settings.contrastive_batch or settings.batch_size
    assert own is not None, "fit_to_data has chosen it"
    planned = own * world_size()
    begun = lambda: read_object(folder / "run.json").get("images_per_step", planned)
    kept = int(broadcast(begun)) if settings.resume else planned
    if kept == planned:
        return settings, kept
    share = -(-kept // world_size())
    option = "contrastive_batch" if contrastive else "batch_size"
    say(f"{option}: {share} on each of {world_size()} processes ({kept} images a step, as before)")
    return replace(settings, contrastive_batch=share) if contrastive else replace(settings, batch_size=share), kept


class Processes(DDPStrategy):
    """Data-parallel training: every step applies the mean of the processes' gradients, weighted by `share_weight`.

    Batch norm normalises each process's own samples. Its running statistics, like all buffers, are those of the first
    process: they are sent to the others before every forward pass, and updated once a step.

    Args:
        unused: look in each step for parameters that the loss does not depend on.
    """

    def __init__(self, unused: bool = False):
        super().__init__(timeout=PATIENCE, find_unused_parameters=unused)

    def barrier(self, *args: object, **kwargs: object) -> None:
        """Waits for all, also for a first process that measures or saves."""
        wait()

    @staticmethod
    def arguments(options: dict[str, object]) -> dict[str, object]:
        """The Trainer's arguments for the processes that were started.

        Args:
            options: the user's; taken from them are `strategy` and `devices`, of which only the GPUs' numbers matter.
        """
        strategy, devices = options.pop("strategy", "ddp"), options.pop("devices", None)
        return {
            "strategy": Processes(unused=strategy == FIND_UNUSED),
            "devices": devices if isinstance(devices, list) and torch.cuda.is_available() else on_this_machine(),
            "num_nodes": started() // on_this_machine(),
            "plugins": [TorchElasticEnvironment()],  # not whatever scheduler the machine belongs to
        }


class Share:
    """This process's share of some images: whole batches, so that features are those of one process, bit by bit."""

    def __init__(self, source: Source):
        batches = [np.arange(start, min(start + _BATCH, len(source))) for start in range(0, len(source), _BATCH)]
        self.rows = np.concatenate([*batches[rank() :: world_size()], np.empty(0, np.int64)]).astype(np.int64)
        self.count = len(source)
        self.source = source.subset(self.rows) if world_size() > 1 else source

    def embedded(
        self, encoder: Encoder | Wrapped | Pixels | TwoCrops, view: View, label: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, D) and labels (N,) of the images of all processes, in the order of the source."""
        return self._embedded(encoder, view, label)[1:]

    def scattered(self, encoder: Encoder, label: str) -> Tensor:
        """Features (N, D) of clean images of all processes, NaN where one cannot be read."""
        rows, vectors, _ = self._embedded(encoder, plain(encoder.image_size), label)
        made = torch.full((self.count, encoder.dim), torch.nan)
        made[torch.from_numpy(rows)] = torch.from_numpy(vectors)
        return made

    def _embedded(
        self, encoder: Encoder | Wrapped | Pixels | TwoCrops, view: View, label: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the source, ascending, and features and labels there."""
        rows, vectors, labels = self.rows[:0], np.empty((0, encoder.dim), np.float32), self.rows[:0]
        if len(self.rows):
            made = embed(encoder, self.source, view=view, batch_size=_BATCH, label=label)
            places = {name: place for place, name in enumerate(self.source.ids())}
            rows = self.rows[[places[name] for name in made.ids]]  # without those that could not be decoded
            vectors, labels = made.vectors, made.labels
        all_rows = _of_all(rows)
        order = np.argsort(all_rows)
        return all_rows[order], _of_all(vectors)[order], _of_all(labels)[order]


def _of_all(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in rank order."""
    return torch.cat(rows_of_each(torch.from_numpy(rows))).numpy()


def clean_features(training: Source, device: str) -> Callable[[Encoder, int | None], Tensor]:
    """What `Method.prepare` asks, of images that are trained on, by a device."""

    def embedded(encoder: Encoder, most: int | None) -> Tensor:
        images = training.subset(spread(len(training), most or len(training)))
        return Share(images).scattered(encoder.to(device).eval(), f"what {encoder.name} sees")

    return embedded
