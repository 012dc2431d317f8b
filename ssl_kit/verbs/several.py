"""What several processes must have alike before they train together: a folder, the images, the size of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.core.process import on_this_machine, processes_asked, started
from ssl_kit.core.sealed import read_object
from ssl_kit.data.sources import Source
from ssl_kit.training.distributed import FIND_UNUSED, all_gather_object, broadcast, rank, world_size

if TYPE_CHECKING:
    from ssl_kit.verbs.pretrain import Settings


def check_processes(options: dict[str, Any]) -> None:
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
