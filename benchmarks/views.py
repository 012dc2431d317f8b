"""Views per second: ours beside lightly, kornia and torchvision, in one run.

    python benchmarks/views.py [--quick] [--json FILE] [--photos FOLDER]

Everybody makes one SimCLR view (crop, flip, jitter at strength 1, gray, blur with probability 0.5) as a float tensor
in [0, 1] without normalisation, from what their users hold in memory: uint8 arrays for us, PIL images for lightly and
torchvision v1, uint8 tensors for torchvision v2 and kornia; ours includes the sampling. Stored pictures are 32, 96 and
256 pixels for views of 32, 96 and 224. Rates on one core are per second of processor time, so that other work on the
machine disturbs them little; those on all cores are per second of wall time. Rounds are interleaved (ours, peer, ours,
peer, ...); ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_kit.core.console import table
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source
from ssl_kit.views.device import apply_device
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe
from ssl_kit.views.sample import sample

Make = Callable[[int], None]  # makes so many views
Row = dict[str, Any]

STORED = {32: 32, 96: 96, 224: 256}
BATCH = {32: 256, 96: 128, 224: 32}  # images per call of the batched engines; larger ones were not faster


def pictures(count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8: smooth colours, an edge and noise, because constant images flatter nobody."""
    rng = np.random.default_rng(0)
    made = np.empty((count, side, side, 3), np.uint8)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8)).resize((side, side), Image.BICUBIC)
        picture = np.asarray(coarse).astype(np.int16) + rng.integers(-10, 11, (side, side, 3))
        picture[: side // 3, : side // 2] //= 3
        made[n] = picture.clip(0, 255)
    return made


def ours_host(images: np.ndarray, size: int, blur: float) -> Make:
    view = ViewRecipe(blur=blur).build((size, size), 3, 1)[0]
    batch, stored = BATCH[size], images.shape[1]
    sides = np.full(batch, stored)
    out = np.empty((batch, 3, size, size), np.float32)

    def make(count: int) -> None:
        for start in range(0, count, batch):
            rows = np.arange(start, start + batch)
            params = sample(view, 0, 0, rows, 0, sides, sides)
            apply_host((images, rows % len(images)), params, view.size, out=out)

    return make


def ours_device(images: np.ndarray, size: int, blur: float) -> Make:
    view = ViewRecipe(blur=blur).build((size, size), 3, 1)[0]
    batch, stored = BATCH[size], images.shape[1]
    sides = np.full(batch, stored)
    tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def make(count: int) -> None:
        for start in range(0, count, batch):
            rows = np.arange(start, start + batch)
            params = sample(view, 0, 0, rows, 0, sides, sides)
            apply_device(tensors[torch.from_numpy(rows % len(images))], params, view.size)

    return make


def one_by_one(transform: Callable[[Any], Any], images: list[Any]) -> Make:
    def make(count: int) -> None:
        for n in range(count):
            transform(images[n % len(images)])

    return make


def lightly(images: np.ndarray, size: int, blur: float) -> Make:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    transform = SimCLRViewTransform(input_size=size, gaussian_blur=blur, normalize=None)
    return one_by_one(transform, [Image.fromarray(image) for image in images])


def blur_side(size: int) -> int:
    """Side of the blur kernel: a tenth of the view, odd (SimCLR, appendix A)."""
    return max(3, int(0.1 * size) // 2 * 2 + 1)


def torchvision_v1(size: int, blur: float) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms as v1

    smooth = [v1.RandomApply([v1.GaussianBlur(blur_side(size), (0.1, 2.0))], p=blur)] if blur else []
    colour = v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    crop = [v1.RandomResizedCrop(size), v1.RandomHorizontalFlip()]
    return v1.Compose([*crop, colour, v1.RandomGrayscale(0.2), *smooth, v1.ToTensor()])


def torchvision_v1_views(images: np.ndarray, size: int, blur: float) -> Make:
    return one_by_one(torchvision_v1(size, blur), [Image.fromarray(image) for image in images])


def torchvision_v2_views(images: np.ndarray, size: int, blur: float) -> Make:
    from torchvision.transforms import v2

    smooth = [v2.RandomApply([v2.GaussianBlur(blur_side(size), (0.1, 2.0))], p=blur)] if blur else []
    colour = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    last = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([*crop, colour, v2.RandomGrayscale(0.2), *smooth, last])
    return one_by_one(transform, list(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())))


def kornia(images: np.ndarray, size: int, blur: float, device: str = "cpu", batch: int | None = None) -> Make:
    import kornia.augmentation as K

    smooth = [K.RandomGaussianBlur((blur_side(size),) * 2, (0.1, 2.0), p=blur)] if blur else []
    colour = K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8)
    crop = [K.RandomResizedCrop((size, size), scale=(0.08, 1.0)), K.RandomHorizontalFlip(p=0.5)]
    transform = torch.nn.Sequential(*crop, colour, K.RandomGrayscale(p=0.2), *smooth)
    tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    together = batch or BATCH[size]

    def make(count: int) -> None:
        for start in range(0, count, together):
            rows = torch.arange(start, start + together, device=device) % len(tensors)
            with torch.inference_mode():
                transform(tensors[rows].float() / 255)

    return make


PEERS: dict[str, Callable[[np.ndarray, int, float], Make]] = {
    "lightly": lightly,
    "kornia": kornia,
    "torchvision-v1": torchvision_v1_views,
    "torchvision-v2": torchvision_v2_views,
}


def rate(make: Make, count: int, clock: Callable[[], float]) -> float:
    began = clock()
    make(count)
    return count / (clock() - began)


def calibrated(make: Make, multiple: int, seconds: float) -> int:
    """How many views take about `seconds`, a multiple of the batch; the first call warms up."""
    make(multiple)
    return max(1, round(seconds * rate(make, multiple, time.process_time) / multiple)) * multiple


def compare(
    name: str, what: str, ours: tuple[Make, int], peer: tuple[Make, int], peer_name: str, runs: int, wall: bool = False
) -> Row:
    """Interleaved rounds of `(make, count)` each; see the top of this file."""
    clock = time.perf_counter if wall else time.process_time
    pairs = [(rate(*ours, clock), rate(*peer, clock)) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    return {
        "id": name,
        "what": what,
        "ours": round(median(a for a, _ in pairs), 1),
        "peer": round(median(b for _, b in pairs), 1),
        "peer_name": peer_name,
        "unit": "views/s",
        "ratio": round(median(ratios), 2),
        "low": round(min(ratios), 2),
        "high": round(max(ratios), 2),
        "runs": runs,
    }


def in_memory(size: int, blur: float, runs: int, seconds: float, peers: list[str]) -> list[Row]:
    """One core: the host executor against every peer, the device executor against kornia."""
    images = pictures(64, STORED[size])
    suffix = "" if blur else "/no-blur"
    label = f"{size} px, one core{'' if blur else ', no blur'}"
    batch = BATCH[size]
    host = ours_host(images, size, blur)
    host_count = calibrated(host, batch, seconds)
    rows = []
    for peer_name in peers:
        peer = PEERS[peer_name](images, size, blur)
        step = batch if peer_name == "kornia" else 8
        pair = (host, host_count), (peer, calibrated(peer, step, seconds))
        rows.append(compare(f"views/host/{size}/{peer_name}{suffix}", f"host, {label}", *pair, peer_name, runs))
        if peer_name == "kornia":
            device = ours_device(images, size, blur)
            pair = (device, calibrated(device, batch, seconds)), pair[1]
            what = f"device executor on the CPU, {label}"
            rows.append(compare(f"views/device/{size}/kornia{suffix}", what, *pair, peer_name, runs))
    return rows


def loader_of(images: np.ndarray, size: int, threads: int) -> Make:
    """What training draws its batches from: the loader over images in memory, one view per image."""
    view = ViewRecipe(blur=0.5).build((size, size), 3, 1)
    source = open_source(images)

    def make(count: int) -> None:
        plan = np.array_split(np.arange(count) % len(images), count // BATCH[size])
        for _batch in ViewLoader(source, plan, view, threads=threads):
            pass

    return make


def two_at_once(images: np.ndarray, size: int) -> Make:
    """Two threads that share nothing, half of the views each: as far as this machine scales at this moment."""
    halves = [ours_host(images, size, 0.5) for _ in range(2)]

    def make(count: int) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda half: half(count // 2), halves))

    return make


def scaling(size: int, runs: int, seconds: float) -> list[Row]:
    """Two threads against one, in wall time: the loader, and the machine's own limit beside it."""
    images = pictures(64, STORED[size])
    one, two = loader_of(images, size, 1), loader_of(images, size, 2)
    two(4 * BATCH[size])
    count = calibrated(one, 8 * BATCH[size], seconds)
    name, pair = f"views/host/{size}/cores", ((two, count), (one, count))
    row = compare(name, f"loader, {size} px, two threads over one", *pair, "one thread", runs, wall=True)
    free = (two_at_once(images, size), count), (ours_host(images, size, 0.5), count)
    free[0][0](4 * BATCH[size])
    what = f"limit: two separate executors over one, {size} px"
    return [row, compare(f"{name}-limit", what, *free, "one executor", runs, wall=True)]


def photographs(source: Source, runs: int) -> Row:
    """From JPEG files to two 224-px views each, one thread: our loader against Pillow and torchvision v1."""
    transform = torchvision_v1(224, 0.5)
    views = ViewRecipe().build((224, 224), 3, 2)
    loader = ViewLoader(source, [rows for rows in np.array_split(np.arange(len(source)), 4)], views, threads=1)

    def ours(_: int) -> None:
        for _batch in loader:
            pass

    def peer(_: int) -> None:
        for row in range(len(source)):
            with Image.open(io.BytesIO(source.read([row])[0])) as image:
                upright = image.convert("RGB")
            transform(upright)
            transform(upright)

    ours(0)  # reads the files into the page cache
    pair = (ours, 2 * len(source)), (peer, 2 * len(source))
    return compare("views/photos/224/torchvision", "JPEG to two views, one core", *pair, "torchvision", runs)


_FIRST = """
import sys, time, numpy as np, torch
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import plain
from ssl_kit.views.sample import sample
images = np.zeros((1, 9, 9, 3), np.uint8)
params = sample(plain((8, 8)), 0, 0, np.arange(1), 0, np.full(1, 9), np.full(1, 9))
began = time.process_time()
apply_host(images, params, (8, 8))
print(time.process_time() - began)
"""


def compilation() -> list[Row]:
    """Seconds of processor time of the first call, with an empty cache and in the next process; numba's import too."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, limit in (("first", 10.0), ("later", 1.0)):
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            ran = subprocess.run([sys.executable, "-c", _FIRST], env=environment, capture_output=True, check=True)
            seconds = float(ran.stdout)
            what = "first call after installation" if name == "first" else "first call of a later process"
            row = {"id": f"views/compile/{name}", "what": what, "ours": round(seconds, 2), "peer": limit}
            row |= {"peer_name": "limit", "unit": "s", "ratio": round(limit / seconds, 2)}
            rows.append({**row, "low": row["ratio"], "high": row["ratio"], "runs": 1})
    return rows


def sampling(runs: int) -> Row:
    """A million views sampled on one core, against the limit of one second."""
    view, count = ViewRecipe().build((32, 32), 3, 1)[0], 1_000_000
    index, sides = np.arange(count), np.full(count, 32)
    rates = [rate(lambda _: sample(view, 0, 0, index, 0, sides, sides), count, time.process_time) for _ in range(runs)]
    row = {"id": "views/sample", "what": "views sampled, one core", "ours": round(median(rates)), "peer": count}
    row |= {"peer_name": "limit", "unit": "views/s", "ratio": round(median(rates) / count, 2), "runs": runs}
    return {**row, "low": round(min(rates) / count, 2), "high": round(max(rates) / count, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: short rounds, two peers, with blur only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photographs; without it that row is left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, photos = arguments.quick, None
    if arguments.photos is not None:
        photos = open_source(arguments.photos, limit=50 if quick else 150, in_memory=False)
    runs, seconds = 7, 0.1 if quick else 0.4
    peers = ["lightly", "kornia"] if quick else list(PEERS)
    rows = [*compilation(), sampling(3 if quick else 7)]
    for size in STORED:
        for blur in (0.5,) if quick else (0.5, 0.0):
            rows += in_memory(size, blur, runs, seconds, peers)
        if (os.cpu_count() or 1) > 1:
            rows += scaling(size, 2 * runs + 1, 2 * seconds)
    if photos is not None:
        rows.append(photographs(photos, runs))
    cells = [
        (row["id"], f"{row['ours']:,}", f"{row['peer']:,}", row["unit"], row["ratio"], f"{row['low']} .. {row['high']}")
        for row in rows
    ]
    table("views: the same SimCLR policy, interleaved", ("id", "ours", "peer", "unit", "ratio", "range"), cells)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
