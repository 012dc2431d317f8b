"""`ssl-kit plan`: what a training would take, in time and bytes, before it is begun.

Nothing is looked up: a training step, the reading of images and the embedding of some are tried on this machine, and
the rest is arithmetic. Of a machine that is not at hand no figure is given; run the same command there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields, replace

import numpy as np
import torch

from ssl_kit.core.console import next_command, result, retyped, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores, choose_device, size_text
from ssl_kit.core.reading import reading_of
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.methods.method import Method
from ssl_kit.verbs.budget import step_cost
from ssl_kit.verbs.defaults import build_method, fit_to_data, view_size
from ssl_kit.verbs.pack import Settings as Packing
from ssl_kit.verbs.pack import packed_image
from ssl_kit.verbs.pretrain import Settings as Training
from ssl_kit.views.recipe import ViewRecipe

_TRIED = 256  # images that are embedded, and at most twice as many read
_PACKED = 64  # images that are packed
_STATES = {"adamw": 2, "sgd": 1, "lars": 1}  # numbers that an optimiser keeps of each weight
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Settings:
    """Which training to plan.

    Args:
        data: some images like those of the training, as for `pretrain`; a few hundred are enough.
        images: of the training, such as 1e8; as many as DATA has by default.
        epochs: of the training; 100 by default.
        processes: that train together: what they lose by waiting for each other is not counted.
        per_machine: how many of them share the cores of a machine like this one; each has its own GPU, where there are.
        method: as in a recipe; SimCLR by default.
        views: what may happen to an image, as in a recipe.
        init: encoder that the training would start from.
        image_size: side of a view in pixels, or height and width; chosen as `pretrain` chooses it by default.
        batch_size: images of a step of a process.
        ema: keep an average of the encoder's weights too, as for `pretrain`.
        packed_size: pixels of the shorter side in shards, see `ssl-kit pack`.
        channels: of the images: 3, 1, as many as a TIFF or array has bands, or names of bands: red,nir.
        range: of images of more than 8 bits: auto, full or LOW,HIGH; see `ssl-kit pretrain --help`.

    Examples:
        ssl-kit plan photos --images 1e6 --epochs 100
        ssl-kit plan photos -c mae --images 1e8 --epochs 300 --processes 64
    """

    data: str
    _: KW_ONLY
    # What to read
    channels: int | str = 3
    range: str = "auto"
    # What is planned
    images: float | None = None
    epochs: float = 100.0
    processes: int = 1
    per_machine: int = 1
    method: Entries | None = None
    views: ViewRecipe = ViewRecipe()  # noqa: RUF009 (frozen)
    init: str | None = None
    image_size: int | tuple[int, int] | None = None
    batch_size: int | None = None
    ema: float | None = None
    packed_size: int = 256


@verb(Settings)
def plan(settings: Settings) -> Entries:
    """Foretell time, bytes and traffic of a training from a trial on this machine; nothing is written.

    Returns:
        `{"images", "epochs", "processes", "device", "seconds": {"training", "embedding"}, "images_per_second",
        "bytes": {"originals", "packed", "checkpoint", "vectors", "index_flat", "index_sq8"},
        "bytes_per_second": {"originals", "packed"}, "parameters", "dim"}`; seconds and speeds of all processes.
    """
    if settings.processes < 1 or settings.epochs <= 0 or (settings.images or 1) < 1:
        raise UserError("--images, --epochs, --processes: wanted numbers above 0")
    if settings.processes % settings.per_machine or settings.per_machine > available_cores():
        raise UserError(
            f"--per-machine {settings.per_machine}: wanted a part of --processes {settings.processes}, and at most "
            f"{available_cores()}, the cores of this machine"
        )
    reading, measure = reading_of(settings.channels, settings.range)
    source = open_source(settings.data, reading=reading, measure=measure, in_memory=False)
    training, learner = _as_trained(settings, source)
    images, passes = int(settings.images or len(source)), settings.epochs / settings.processes
    assert training.batch_size is not None, "fit_to_data has chosen it"
    with _share_of(settings.per_machine):
        cost = step_cost(training, source, training.batch_size)
        embedding = _embedding_cost(learner, source)
    original, packed = _bytes_of(source, settings)
    sizes = {"originals": original * images, "packed": packed * images} | _kept(learner, training, images)
    record: Entries = {
        **{"images": images, "epochs": settings.epochs, "processes": settings.processes},
        "device": choose_device().value,
        "seconds": {"training": cost * images * passes, "embedding": embedding * images / settings.processes},
        "images_per_second": settings.processes / cost,
        "bytes": {name: round(value) for name, value in sizes.items()},
        "bytes_per_second": {
            name: value * settings.processes / cost for name, value in (("originals", original), ("packed", packed))
        },
        **{"parameters": sum(one.numel() for one in learner.parameters()), "dim": learner.encoder.dim},
    }
    _tell(record, settings)
    next_command(retyped("ssl-kit pretrain", "images", "processes", "per_machine", "packed_size"), own=False)
    return record


def _as_trained(settings: Settings, source: Source) -> tuple[Training, Method]:
    """What `pretrain` would make of the same options."""
    shared = {one.name for one in fields(Training)} & set(vars(settings))
    training = Training(**{name: getattr(settings, name) for name in shared})
    training = replace(training, image_size=view_size(training.image_size, source))
    training = fit_to_data(training, int(settings.images or len(source)), settings.processes)
    grey = (0.5,) * source.channels
    learner = build_method(training.method, image_size=training.size, channels=source.channels, mean=grey, std=grey)
    return training, learner


@contextmanager
def _share_of(count: int) -> Iterator[None]:
    """Inside, this process has the share of the cores that each of `count` has."""
    if count == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    mine, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(mine)[: len(mine) // count])
    torch.set_num_threads(len(mine) // count)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
        torch.set_num_threads(threads)


def _embedding_cost(learner: Method, source: Source) -> float:
    """Seconds an image, read and embedded; a few before them are not counted."""
    few = source.subset(np.arange(min(_TRIED, len(source))))
    encoder = learner.encoder.to(choose_device().value).eval()
    embed(encoder, few.subset(np.arange(min(16, len(few)))), label="first ones")
    began = time.perf_counter()
    made = embed(encoder, few, label="embedding")
    return (time.perf_counter() - began) / len(made)


def _bytes_of(source: Source, settings: Settings) -> tuple[float, float]:
    """(of an original as it lies there, of one as `pack` would store it), the mean of some."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(_PACKED, len(source))).astype(np.int64))
    how = Packing(settings.data, "", size=settings.packed_size)
    made = [data for data, _ in (packed_image(how, source, int(row)) for row in rows) if data]
    if not made:
        raise UserError(f"{source.name}: none of {len(rows)} images could be read")
    return float(source.lengths(rows).mean()), float(np.mean([len(data) for data in made]))


def _kept(learner: Method, training: Training, images: int) -> dict[str, float]:
    """Bytes of a checkpoint, of the vectors of all images, and of an index of them in full and in 8 bits a number."""
    trained = sum(one.numel() for one in learner.parameters() if one.requires_grad)
    weights = sum(one.numel() for one in learner.parameters()) + sum(one.numel() for one in learner.buffers())
    averaged = sum(one.numel() for one in learner.encoder.parameters()) if training.ema else 0
    checkpoint = _FLOAT * (weights + averaged + _STATES[learner.optim.name] * trained)
    vectors = _FLOAT * images * learner.encoder.dim
    return {"checkpoint": checkpoint, "vectors": vectors, "index_flat": vectors, "index_sq8": vectors / _FLOAT}


def _tell(record: Entries, settings: Settings) -> None:
    size, rate = record["bytes"], record["bytes_per_second"]
    rows = [
        ["training", _hours(record["seconds"]["training"]), f"{record['images_per_second']:,.0f} images/s"],
        ["embedding all of them", _hours(record["seconds"]["embedding"]), ""],
        ["images as they are", size_text(size["originals"]), f"{rate['originals'] / 1e6:,.1f} MB/s are read"],
        [f"packed, {settings.packed_size} px", size_text(size["packed"]), f"{rate['packed'] / 1e6:,.1f} MB/s are read"],
        ["a checkpoint", size_text(size["checkpoint"]), f"{record['parameters']:,} weights"],
        ["an index, exact", size_text(size["index_flat"]), f"{record['dim']:,} numbers an image"],
        ["an index, 8 bits a number", size_text(size["index_sq8"]), ""],
    ]
    each = settings.per_machine if settings.per_machine > 1 else "each"
    many = f"{record['processes']:,} processes, {each} on a machine like this one"
    where = f"this {record['device']}" if record["processes"] == 1 else many
    table(f"{record['images']:,} images, {record['epochs']:g} epochs, on {where}", ["", "takes", ""], rows)
    result(f"training takes about {_hours(record['seconds']['training'])}; tried on this machine just now")


def _hours(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:,.0f} minutes" if seconds >= 90 else f"{seconds:,.0f} s"
    return f"{seconds / 3600:,.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} days"
