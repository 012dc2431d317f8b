"""`ssl-kit doctor`: what is installed, what is chosen for this machine and why, how fast it is, and what limits it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ssl_kit.core.console import next_command, result, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import (
    Choice,
    available_cores,
    available_memory,
    choose_channels_last,
    choose_compile,
    choose_device,
    choose_precision,
    choose_tf32,
    choose_threads,
    keep_memory,
    size_text,
    use_tf32,
)
from ssl_kit.core.random import Key
from ssl_kit.core.reading import RGB
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb
from ssl_kit.data.listing import Ids, Skipped
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.sources import Listed, Source, pixels
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs.record import versions
from ssl_kit.views.batch import made_on_device
from ssl_kit.views.device import DeviceViews
from ssl_kit.views.recipe import View, ViewRecipe
from ssl_kit.views.sample import HEIGHT, WIDTH, sample

_PHOTOGRAPH = (375, 500)  # pixels: the median photograph of ImageNet
_IMAGES = 64  # that are measured, again and again
_BATCHES = 4  # of a measured pass: training makes two ahead
_CALLS = 3  # timed, at least, where there is time
_BATCH = {"cpu": 1, "cuda": 8, "mps": 2}  # factor on the batch of a step: a GPU is not full before
_NAMES = ("bfloat16", "float16")


class Subject(NamedTuple):
    """Images and a network that are measured.

    `side` of a view in pixels; `files`: JPEGs are decoded each time, otherwise the images are in memory and of that
    side; `network` and `args` for timm; `batch`: images of a step on a CPU.
    """

    name: str
    side: int
    files: bool
    network: str
    args: Entries
    batch: int


SUBJECTS = (
    Subject("32 px, in memory", 32, False, "resnet18_small", {"channels": [16, 32, 64, 128]}, 256),
    Subject("224 px, JPEG files", 224, True, "resnet18", {}, 8),
)


@dataclass(frozen=True)
class Settings:
    """What to look at.

    Args:
        seconds: of the measurements, all together, about, beside the first calls; 0 for none.

    Examples:
        ssl-kit doctor
        ssl-kit doctor --seconds 0 --json
    """

    _: KW_ONLY
    # What to measure
    seconds: float = 12.0


@verb(Settings)
def doctor(settings: Settings) -> Entries:
    """Tell versions, what is chosen for this machine and why, how fast it is, and what limits training on it.

    Decoding, views and a bare SimCLR step are measured one after the other, each with the threads, the place and the
    precision that a training here would choose (the step without `torch.compile`), after a first call that is not
    counted: the median of three calls or more, of one where three would take too long.

    Returns:
        `{"versions", "machine", "chosen": {name: {"value", "reason"}}, "speed": [...]}`; an entry of `speed` holds
        images/s of decode (None from memory), views (two of an image), loader (both) and step, and which of loader and
        step is the limit.
    """
    if not 0 <= settings.seconds < float("inf"):
        raise UserError(f"--seconds {settings.seconds}: wanted 0 (no measurement) or more, such as 12")
    installed = versions()
    table("versions", ["", "version"], [[name, value or "not installed"] for name, value in installed.items()])
    machine = {"cores": available_cores(), "memory": _memory(), "memory_available": available_memory()}
    sizes = f"{size_text(machine['memory'])} of memory, {size_text(machine['memory_available'])} available"
    result(f"machine: {machine['cores']} cores, {sizes}")
    chosen = _chosen()
    for name, choice in chosen.items():
        result(f"{name}: {choice.value} ({choice.reason})")
    speed = _speed(chosen, settings.seconds) if settings.seconds else []
    next_command("ssl-kit pretrain digits --minutes 1", own=False)
    return {
        "versions": installed,
        "machine": machine,
        "chosen": {name: choice._asdict() for name, choice in chosen.items()},
        "speed": speed,
    }


def _chosen() -> dict[str, Choice[Any]]:
    """What a training here would choose, in the order and words in which it says so."""
    device = choose_device()
    tf32 = choose_tf32("auto", device.value)
    blocks = choose_compile("auto", device.value, None)
    accelerator = Choice("device", "an accelerator, for images of one size that fit into memory; else the host")
    kept = Choice("kept", "page faults cost 10 % of a step") if keep_memory() else Choice("given back", "not glibc")
    return {
        "device": device,
        "precision": choose_precision("auto", device.value),
        "views on": Choice("host", "no accelerator") if device.value == "cpu" else accelerator,
        "threads of the loader": choose_threads(device.value),
        "tf32": Choice("on" if tf32.value else "off", tf32.reason),
        "torch.compile": Choice("on" if blocks.value else "off", blocks.reason),
        "freed memory": kept,
    }


def _speed(chosen: dict[str, Choice[Any]], seconds: float) -> list[Entries]:
    """Measures every subject; an entry each."""
    threads, precision, device = (chosen[name].value for name in ("threads of the loader", "precision", "device"))
    place = None if device == "cpu" else device  # of the views
    use_tf32(chosen["tf32"].value == "on")
    say(f"measuring for about {seconds:g} s, after a first call of everything")
    each = seconds / sum(2 + 2 * subject.files for subject in SUBJECTS)
    rows = []
    for subject in SUBJECTS:
        batch = subject.batch * _BATCH.get(device, 1)
        plan = np.split(np.arange(_BATCHES * batch) % _IMAGES, _BATCHES)
        count = _BATCHES * batch
        with tempfile.TemporaryDirectory(prefix="ssl_kit-") as folder:
            stored, files = _sources(subject, Path(folder))
            views = _rate(partial(_load, stored, plan, subject, threads, place), count, each)
            decoded, loader = None, views
            if files is not None:
                decoded = _rate(partial(_decode, files, plan, subject, threads), count, each)
                loader = _rate(partial(_load, files, plan, subject, threads, place), count, each)
        step = _rate(_step(subject, batch, device, precision), batch, each)
        row = {"images": subject.name, "decode": decoded, "views": views, "loader": loader, "step": step}
        network = f"{subject.network}, {precision}, batch {batch}"
        rows.append({**row, "threads": threads, "network": network, "limit": "loader" if loader < step else "step"})
    rates = ("decode", "views", "loader", "step")
    shown = [[row["images"], *("" if row[name] is None else f"{row[name]:,.0f}" for name in rates)] for row in rows]
    columns = ["images per second", "decode", "two views", "loader: both", "bare SimCLR step"]
    table(f"speed, the loader with {threads} thread{'s' if threads > 1 else ''}", columns, shown)
    for row in rows:
        result(f"{row['images']}: the {row['limit']} limits training ({row['network']})")
    return rows


def _sources(subject: Subject, folder: Path) -> tuple[Source, Source | None]:
    """Images (H, W, 3) of smooth colours and some noise in memory, and as JPEGs in `folder` where files are read."""
    generator = np.random.default_rng(0)
    height, width = _PHOTOGRAPH if subject.files else (subject.side, subject.side)
    images = np.empty((_IMAGES, height, width, 3), np.uint8)
    for image in images:
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        image[...] = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255)
    names, unknown = [f"{number}.jpg" for number in range(_IMAGES)], np.full(_IMAGES, -1)
    stored = Listed(subject.name, Ids(names), unknown, (), RGB, None, Skipped(_IMAGES, 0.0), np.arange(_IMAGES), images)
    if not subject.files:
        return stored, None
    for name, image in zip(names, images, strict=True):
        (folder / name).write_bytes(simplejpeg.encode_jpeg(image, quality=90))
    # photographs differ in size: in memory they are a list, and their views are the host's
    return replace(stored, images=list(images)), replace(stored, images=None, root=folder)


def _kinds(subject: Subject) -> tuple[View, ...]:
    size = (subject.side, subject.side)
    return ViewRecipe().fitted("simclr", size, 3).build(size, 3, 2)


def _load(source: Source, plan: Sequence[np.ndarray], subject: Subject, threads: int, place: str | None) -> None:
    """Two SimCLR views of each image, as training's loader makes them: on the device `place` where it can, if any."""
    kinds, make = _kinds(subject), DeviceViews()
    for batch in ViewLoader(source, plan, kinds, threads=threads, on_device=place is not None):
        if place is not None:
            stored, params = batch["views"], batch["params"]
            made = made_on_device(stored, params, kinds, cropped=batch["cropped"], make=make, device=place)
            made[-1][0, 0, 0, 0].item()  # waits for the device


def _decode(source: Source, plan: Sequence[np.ndarray], subject: Subject, threads: int) -> None:
    """The files alone, each as small as its views allow: the finest of their crops may not be below a view's size."""
    size, (height, width) = (subject.side, subject.side), _PHOTOGRAPH
    rows = np.concatenate(plan)
    sizes = np.full(len(rows), height), np.full(len(rows), width)
    crops = [sample(view, 0, 0, rows, which, *sizes)[:, [HEIGHT, WIDTH]] for which, view in enumerate(_kinds(subject))]
    least = [
        (math.ceil(height * size[0] / crop[0]), math.ceil(width * size[1] / crop[1])) for crop in np.min(crops, axis=0)
    ]
    with ThreadPoolExecutor(threads, "decode") as pool:
        list(pool.map(lambda row, least: pixels(source, row, least), rows.tolist(), least))


def _step(subject: Subject, batch: int, device: str, precision: str) -> Callable[[], None]:
    """Forward, backward and optimiser step of SimCLR on a fixed batch, nothing else; torch.compile left out."""
    size = (subject.side, subject.side)
    method = SimCLR(Encoder(subject.network, subject.args, size)).to(device).train()
    views = [torch.rand(batch, 3, *size, device=device) for _ in range(method.num_views)]
    if choose_channels_last(method.encoder.model, device).value:
        method.to(memory_format=torch.channels_last)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, fused=True)
    key = Key(0, 0, torch.arange(batch))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        kind = getattr(torch, precision)
        with torch.autocast(device, kind, enabled=precision in _NAMES, cache_enabled=False):
            loss = method.loss(views, key)["loss"]
        loss.backward()
        optimiser.step()
        loss.item()  # waits for the device

    return step


def _rate(
    work: Callable[[], None], count: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Images per second of `work` on `count` of them: the median of the calls in about `seconds`.

    Three of them at least where they take no more than three times as long; one on the slowest machines. A first call
    is not counted: it compiles, loads and allocates what later ones find there.
    """
    work()
    times: list[float] = []
    began = clock()
    while not times or clock() - began < (seconds if len(times) >= _CALLS else _CALLS * seconds):
        start = clock()
        work()
        times.append(clock() - start)
    return count / median(times)


def _memory() -> int:
    """Bytes of memory of this machine; what is available where the system does not tell."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available_memory()
