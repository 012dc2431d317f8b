"""Decoding a whole source into memory, in parallel, and deciding whether it fits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from ssl_kit.core.console import progress
from ssl_kit.core.process import on_this_machine
from ssl_kit.core.random import permutation
from ssl_kit.data.decode import BadImageError, decode, image_size

Images = np.ndarray | list[np.ndarray]

_SAMPLE = 256  # files whose headers are read for the estimate
_CHUNK_BYTES = 4 * 2**20  # of decoded pixels per task: below about 1 ms of work the hand-over of tasks shows
_CHUNK_FILES = 256
_SHARE = 0.25  # of the available memory that decoded images may take without being asked


def available_memory() -> int:
    """Bytes that can still be allocated: what the system has, or what the container allows if that is less."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = (group / "memory.stat").read_text().split("inactive_file ")[1].split()[0]  # given back when needed
        free.append(limit - used + int(cache))
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or no limit ("max")
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)  # macOS tells only the total
    return min(free) if free else 4 * 2**30


def estimate_bytes(count: int, read: Callable[[int], bytes], channels: int) -> float:
    """Decoded bytes of all `count` images, from the headers of a sample; 0 when none of the sample is an image."""
    sizes = []
    for row in np.sort(permutation(0, 0, count)[:_SAMPLE]):
        try:
            height, width = image_size(read(int(row)))
        except BadImageError:
            continue
        sizes.append(height * width * channels)
    return count * float(np.mean(sizes)) if sizes else 0.0


def fits_in_memory(needed: float) -> tuple[bool, str]:
    """Whether `needed` decoded bytes may live in RAM, for each process of this machine; and the words that say why."""
    available = available_memory()
    fits = needed * on_this_machine() < _SHARE * available
    return fits, f"{size_text(needed)} decoded, {size_text(available)} of memory available"


def size_text(count: float) -> str:
    """Bytes as people write them, with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def load_images(
    count: int,
    read: Callable[[int], bytes],
    channels: int,
    *,
    threads: int,
    mean_bytes: float,
    label: str,
) -> tuple[Images, np.ndarray, list[tuple[int, str]]]:
    """Decodes images 0..count-1 with `threads` threads.

    Args:
        count: number of images.
        read: row -> the file's bytes; raises `BadImageError`.
        channels: 3 or 1.
        threads: at least 1.
        mean_bytes: expected decoded bytes per image; sets how many make one task.
        label: of the progress bar.

    Returns:
        images: (M, H, W, C) uint8 when all have one size, otherwise a list of M arrays (H_i, W_i, C).
        rows: (M,) int64, which of the `count` they are, ascending.
        bad: (row, reason) of the others.
    """
    chunk = int(np.clip(_CHUNK_BYTES / max(mean_bytes, 1), 1, _CHUNK_FILES))

    def task(start: int) -> list[np.ndarray | str]:
        return [_decoded(read, row, channels) for row in range(start, min(start + chunk, count))]

    store, rows, bad = _Store(count), [], []
    with progress(count, label) as bar:
        row = 0
        for results in _in_order(task, range(0, count, chunk), threads):
            for image in results:
                if isinstance(image, str):
                    bad.append((row, image))
                else:
                    store.add(image)
                    rows.append(row)
                row += 1
            bar.advance(bar.task_ids[0], len(results))
    return store.images(), np.array(rows, dtype=np.int64), bad


def _decoded(read: Callable[[int], bytes], row: int, channels: int) -> np.ndarray | str:
    try:
        return decode(read(row), channels).image
    except BadImageError as error:
        return str(error)


def _in_order(
    task: Callable[[int], list[np.ndarray | str]], starts: range, threads: int
) -> Iterator[list[np.ndarray | str]]:
    """Results in order, with only a few chunks waiting, so that memory holds the images once."""
    todo = iter(starts)
    with ThreadPoolExecutor(threads, "decode") as pool:
        pending: deque[Future[list[np.ndarray | str]]] = deque(
            pool.submit(task, start) for start in islice(todo, 2 * threads + 1)
        )
        while pending:
            results = pending.popleft().result()
            pending.extend(pool.submit(task, start) for start in islice(todo, 1))
            yield results


class _Store:
    """One array as long as every image has the size of the first, a list from the first other size on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        self.array: np.ndarray | None = None
        self.list: list[np.ndarray] | None = None

    def add(self, image: np.ndarray) -> None:
        if self.list is not None:
            self.list.append(image)
            return
        if self.array is None:
            self.array = np.empty((self.count, *image.shape), np.uint8)  # pages are taken when written
        if image.shape == self.array.shape[1:]:
            self.array[self.used] = image
            self.used += 1
        else:
            self.list = [*self.array[: self.used].copy(), image]
            self.array = None

    def images(self) -> Images:
        if self.list is not None:
            return self.list
        return self.array[: self.used] if self.array is not None else []
