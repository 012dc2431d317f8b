"""`ssl-kit doctor`: what is installed, what is chosen for this machine and why, how fast it is, and what limits it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    choose_compile,
    choose_device,
    choose_precision,
    choose_tf32,
    choose_threads,
    keep_memory,
)
from ssl_kit.core.random import Key
from ssl_kit.data.decode import decode
from ssl_kit.data.loading import available_memory, size_text
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs.recipes import packaged
from ssl_kit.verbs.record import versions
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe
from ssl_kit.views.sample import sample

_PHOTOGRAPH = (375, 500)  # pixels: the median photograph of ImageNet
_FILES = 64  # JPEGs, or stored images, of a measurement
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
    args: dict[str, Any]
    batch: int


SUBJECTS = (
    Subject("32 px, in memory", 32, False, "resnet18_small", {"channels": [16, 32, 64, 128]}, 256),
    Subject("224 px, JPEG files", 224, True, "resnet18", {}, 8),
)


def doctor(*, seconds: float = 12.0) -> dict[str, Any]:
    """Tell versions, what is chosen for this machine and why, how fast it is, and what limits training on it.

    Decoding, views and a bare SimCLR step are measured one after the other; views are made as many threads as a
    training here would use make them, by the host.

    Args:
        seconds: of the measurements, all together, about; 0 for none.

    Returns:
        `{"versions", "machine", "chosen": {name: {"value", "reason"}}, "speed": [...], "recipes": {name: first line}}`;
        an entry of `speed` holds images/s of decode (None from memory), views (two of an image), loader (both) and
        step, and which of loader and step is the limit.
    """
    if not 0 <= seconds < float("inf"):
        raise UserError(f"--seconds {seconds}: wanted 0 (no measurement) or more, such as 12")
    installed = versions()
    table("versions", ["", "version"], [[name, value or "not installed"] for name, value in installed.items()])
    machine = {"cores": available_cores(), "memory": _memory(), "memory_available": available_memory()}
    sizes = f"{size_text(machine['memory'])} of memory, {size_text(machine['memory_available'])} available"
    result(f"machine: {machine['cores']} cores, {sizes}")
    chosen = _chosen()
    for name, choice in chosen.items():
        result(f"{name}: {choice.value} ({choice.reason})")
    speed = _speed(chosen, seconds) if seconds else []
    recipes = {name: _first_line(path) for name, path in packaged().items()}
    result("packaged recipes, for -c:")
    for name, text in recipes.items():
        result(f"  {name:<{max(map(len, recipes))}}  {text}")
    next_command("ssl-kit pretrain DATA")
    return {
        "versions": installed,
        "machine": machine,
        "chosen": {name: choice._asdict() for name, choice in chosen.items()},
        "speed": speed,
        "recipes": recipes,
    }


def _chosen() -> dict[str, Choice]:
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
        "tf32": tf32._replace(value="on" if tf32.value else "off"),
        "torch.compile": blocks._replace(value="on" if blocks.value else "off"),
        "freed memory": kept,
    }


def _speed(chosen: dict[str, Choice], seconds: float) -> list[dict[str, Any]]:
    """Measures every subject; an entry each."""
    threads, precision = chosen["threads of the loader"].value, chosen["precision"].value
    say(f"measuring for about {seconds:g} s")
    each = seconds / sum(2 + subject.files for subject in SUBJECTS)
    rows = []
    for subject in SUBJECTS:
        stored, files = _images(subject)
        decoded = _rate(partial(_decode, files, subject, threads), len(files), each) if files else None
        views = _rate(partial(_views, stored, subject, threads), len(stored), each)
        loader = views if decoded is None else 1 / (1 / decoded + 1 / views)
        batch = subject.batch * _BATCH.get(chosen["device"].value, 1)
        step = _rate(_step(subject, batch, chosen["device"].value, precision), batch, each)
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


def _images(subject: Subject) -> tuple[list[np.ndarray], list[bytes]]:
    """Images (H, W, 3) uint8 of smooth colours and some noise, and their JPEGs where files are read."""
    generator = np.random.default_rng(0)
    height, width = _PHOTOGRAPH if subject.files else (subject.side, subject.side)
    images = []
    for _ in range(_FILES if subject.files else 4 * _FILES):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + generator.normal(0, 8, smooth.shape)
        images.append(np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8)))
    files = [simplejpeg.encode_jpeg(image, quality=90) for image in images] if subject.files else []
    return images, files


def _decode(files: list[bytes], subject: Subject, threads: int) -> None:
    """All of them, as training does where images do not fit into memory."""
    size = (subject.side, subject.side)
    with ThreadPoolExecutor(threads, "decode") as pool:
        list(pool.map(lambda data: decode(data, smallest=size), files))


def _views(images: list[np.ndarray], subject: Subject, threads: int) -> None:
    """Two SimCLR views of each image."""
    size, rows = (subject.side, subject.side), np.arange(len(images))
    heights, widths = np.array([image.shape[:2] for image in images]).T
    for which, view in enumerate(ViewRecipe().fitted("simclr", size, 3).build(size, 3, 2)):
        apply_host(images, sample(view, 0, 0, rows, which, heights, widths), size, threads=threads)


def _step(subject: Subject, batch: int, device: str, precision: str) -> Callable[[], None]:
    """Forward, backward and optimiser step of SimCLR on a fixed batch, nothing else."""
    size = (subject.side, subject.side)
    method = SimCLR(Encoder(subject.network, subject.args, size)).to(device).train()
    method.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    key = Key(0, 0, torch.arange(batch))
    views = [torch.rand(batch, 3, *size, device=device) for _ in range(method.num_views)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        kind = getattr(torch, precision)
        with torch.autocast(device, kind, enabled=precision in _NAMES):
            loss = method.loss(views, key)["loss"]
        loss.backward()
        optimiser.step()
        loss.item()  # waits for the device

    return step


def _rate(work: Callable[[], None], count: int, seconds: float) -> float:
    """Images per second of `work` on `count` of them: the median over `seconds`; the first call, a warm-up, is left
    out where there is time for another."""
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return count / median(times[1:] or times)


def _memory() -> int:
    """Bytes of memory of this machine; what is available where the system does not tell."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available_memory()


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
