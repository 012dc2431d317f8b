"""Which values of deep images become 0 and 1, found from the images themselves.

A camera of 12 bits fills a sixteenth of its 16-bit files, a height map a hundredth: over the full depth they would be
nearly black. Where a set fills less than a quarter of its depth, the range is that of its values instead.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ssl_kit.core.console import say, warn
from ssl_kit.core.machine import available_cores
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import WIDE, Range, Reading
from ssl_kit.data.decode import samples_of
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.samples import Samples, depth, measured
from ssl_kit.data.sources import Source, sampled

_IMAGES, _FIRST = 2_048, 256  # that are looked at; so many tell whether there are deep ones at all
_CHECKED = 32  # that tell whether they use other values than an encoder knows
_PIXELS = 2**14  # of each of them
_CUT = (0.1, 99.9)  # percentiles that become 0 and 1
_OUTSIDE = 1 / 4  # of the values: from here on it is told
_FILLED = 1 / 4  # of the depth: from here on the full depth is the range


class _Seen(NamedTuple):
    """Values (M, C) of one image, the ends of its depth, and what was left out of it."""

    kind: str
    values: np.ndarray
    full: tuple[float, float]
    note: str


def of_source(source: Source) -> Reading:
    """The source's reading with the range that its images fill, by at most 2,048 of them; says what it has found."""
    return _told(source.name, _looked_at(source, _IMAGES), source.reading)


def _looked_at(source: Source, most: int) -> list[_Seen]:
    """What images show that are no plain ones of 8 bits, at most so many of them."""
    rows = sampled(source, most)
    reading = source.reading

    def look(row: int) -> _Seen | None:
        own = reading.function is not None
        stored = source.content(row) if own else source.read([row])[0]
        try:
            samples = (
                samples_of(stored, reading, source.ids([row])[0] if own else "") if isinstance(stored, bytes) else None
            )
            return None if samples is None else _seen(samples, reading)
        except BadImageError:  # it is counted when it is decoded
            return None

    with ThreadPoolExecutor(available_cores(), "range") as pool:
        seen = list(pool.map(look, rows[:_FIRST].tolist()))
        if any(seen):
            seen += pool.map(look, rows[_FIRST:].tolist())
    return [one for one in seen if one is not None]


def check(source: Source) -> None:
    """Warns where images use other values than the reading says, which somebody else's images have settled."""
    _compared(source.name, _looked_at(source, _CHECKED), source.reading)


def check_images(name: str, images: Iterable[Samples], reading: Reading) -> None:
    """As `check`, of images in memory."""
    _compared(name, [_seen(samples, reading) for samples in itertools.islice(images, _CHECKED)], reading)


def _compared(name: str, seen: list[_Seen], reading: Reading) -> None:
    for kind, images in _by_kind(seen):
        limits, found = reading.limits(kind), _range(images)
        values = np.concatenate([one.values for one in images])
        if not len(values):
            continue
        if limits is None:
            if found is not None:
                warn(
                    f"{name}: {kind} values from {values.min():g} to {values.max():g} fill under a quarter of "
                    "their depth: they will be nearly of one grey, for the encoder knows no range of such images"
                )
            continue
        low, high = np.array(limits).T
        outside = float(((values < low) | (values > high)).mean())
        if outside > _OUTSIDE:
            warn(
                f"{name}: {100 * outside:.0f} % of the values lie outside the range that the encoder was trained on "
                f"({low.min():g} to {high.max():g}): they are cut to its ends"
            )


def of_images(name: str, images: Iterable[Samples], reading: Reading) -> Reading:
    """As `of_source`, of images in memory."""
    return _told(name, [_seen(samples, reading) for samples in images], reading)


def spread(count: int) -> np.ndarray:
    """(R,) positions of the images that are looked at, of so many."""
    return np.sort(permutation(0, 0, count)[:_IMAGES])


def _seen(samples: Samples, reading: Reading) -> _Seen:
    values = measured(samples, reading, _PIXELS)
    dtype = samples.values.dtype
    full = samples.full or ((0.0, 1.0) if dtype.kind == "f" else depth(dtype, samples.bits))
    return _Seen(samples.kind, values, full, f"{samples.what}: {samples.note}" if samples.note else "")


def _told(name: str, seen: list[_Seen], reading: Reading) -> Reading:
    for note, count in Counter(one.note for one in seen if one.note).items():
        say(f"{name}: {note}, in {count:,} of {len(seen):,} images looked at")
    ranges = dict[str, Range]()
    for kind, images in _by_kind(seen):
        found = _range(images)
        low, high = images[0].full
        if found is None:
            if kind in WIDE:  # else a dark image alone would look like 16-bit values in another type
                ranges[kind] = ((low, high),)
            say(f"range of {kind}: {low:g} to {high:g}, the full depth (--range LOW,HIGH changes it)")
            continue
        ranges[kind] = found
        ends = min(low for low, _ in found), max(high for _, high in found)
        each = f", each of {len(found)} channels its own" if len(found) > 1 else ""
        say(
            f"range of {kind}: {ends[0]:g} to {ends[1]:g}{each} (0.1 and 99.9 percentile of {len(images):,} images, "
            "which fill under a quarter of their depth; --range full or LOW,HIGH changes it)"
        )
    return reading.within(ranges)


def _by_kind(seen: list[_Seen]) -> list[tuple[str, list[_Seen]]]:
    """Images by their kind of number; of 8 bits nothing is lost, the encoder normalises by mean and deviation."""
    found = defaultdict(list)
    for one in seen:
        if one.kind != "uint8":
            found[one.kind].append(one)
    return sorted(found.items())


def _range(images: list[_Seen]) -> Range | None:
    """(low, high) of each channel, or None where the images fill their depth."""
    values = np.concatenate([one.values for one in images])
    if not len(values):
        return None
    low, high = np.percentile(values, _CUT, axis=0)
    ends = min(one.full[0] for one in images), max(one.full[1] for one in images)
    inside = ends[0] <= values.min() and values.max() <= ends[1]  # floats may not be
    if inside and float((high - low).max()) >= _FILLED * (ends[1] - ends[0]):
        return None
    high = np.where(high > low, high, low + 1)  # a constant channel
    return tuple(zip(low.tolist(), high.tolist(), strict=True))
