"""Photographs as they are against the same ones packed: decoded, and delivered as views of 224 px, on two threads.

    python benchmarks/shards.py --photos FOLDER [--quick] [--json FILE]

Packed by `ssl-kit pack` with --size 256, as JPEG of quality 90 and with --raw; files are in the page cache. Decoding is
at full size, as `embed` and `evaluate` do it. Views are those of SimCLR, two of each image, which decode a JPEG at the
smallest scale that they can be cut from. Every round measures the three kinds one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.record import tell
from ssl_kit.core.console import spoken
from ssl_kit.core.machine import keep_memory
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source, pixels
from ssl_kit.verbs.pack import pack
from ssl_kit.views.recipe import ViewRecipe

SIDE, BATCH, THREADS = 224, 32, 2
BARS = {"decode": {"jpeg": 3.0, "raw": 10.0}, "views": {"jpeg": 1.7, "raw": 2.3}}


def decoded(source: Source) -> None:
    """All images, once."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda row: pixels(source, row).shape, range(len(source)), chunksize=8))


def delivered(source: Source) -> None:
    """Two views of all images, once."""
    views = ViewRecipe().build((SIDE, SIDE), 3, 2)
    plan = np.array_split(np.arange(len(source)), max(1, len(source) // BATCH))
    for _ in ViewLoader(source, plan, views, threads=THREADS):
        pass


def rate(work: Callable[[Source], None], source: Source) -> float:
    """Images per second."""
    began = time.perf_counter()
    work(source)
    return len(source) / (time.perf_counter() - began)


def rows_of(sources: dict[str, Source], runs: int) -> list[dict[str, Any]]:
    """A row for each kind of packed image and of work."""
    rows = []
    for what, work in (("decode", decoded), ("views", delivered)):
        for source in sources.values():
            work(source)  # files into memory, code compiled
        rates = [{name: rate(work, source) for name, source in sources.items()} for _ in range(runs)]
        for name in ("jpeg", "raw"):
            ratios = [one[name] / one["photos"] for one in rates]
            row = {"id": f"shards/{what}/{name}", "what": f"{what} of images packed as {name}, {THREADS} threads"}
            row |= {"ours": round(median(one[name] for one in rates)), "peer_name": "the photographs"}
            row |= {"peer": round(median(one["photos"] for one in rates)), "unit": "images/s"}
            row |= {"ratio": round(median(ratios), 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)}
            rows.append({**row, "wanted": BARS[what][name], "runs": runs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # as a training has it
    with tempfile.TemporaryDirectory() as folder, spoken(False):
        sources = {"photos": open_source(arguments.photos, in_memory=False)}
        for name, options in (("jpeg", {}), ("raw", {"raw": True})):
            pack(str(arguments.photos), f"{folder}/{name}", **options)
            sources[name] = open_source(f"{folder}/{name}", in_memory=False)
        rows = rows_of(sources, 3 if arguments.quick else 9)
    tell(rows, arguments.json)


if __name__ == "__main__":
    main()
