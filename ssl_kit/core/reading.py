"""Reading: which channels of a stored image are taken, and which of its values become 0 and 1.

It is settled once, when an encoder is trained, and travels in the encoder folder: whatever looks at images through that
encoder afterwards reads them the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from ssl_kit.core.errors import UserError

Range: TypeAlias = tuple[tuple[float, float], ...]  # (low, high) of each channel, or one for all of them
ANY = "any"  # a kind of number that stands for every one
KINDS = (ANY, "float", "uint8", "int8", "uint16", "int16", "uint32", "int32")
MAX_CHANNELS = 1_024
_LONGEST_NAME = 100  # characters of a band's name


@dataclass(frozen=True)
class Reading:
    """How samples of a file or array become pixels.

    Attributes:
        channels: that a pixel has: 1 (grey), 3 (RGB), or as many as the bands of a TIFF or array.
        bands: names of the bands to take, in this order; empty = all.
        ranges: {kind of number: what becomes 0 and 1}; a kind is numpy's name, "float" for all floats, or "any". A
            kind that is missing is read over its full depth: 0..255, 0..4,095 for 12 bits, 0..65,535, 0..1 for floats.
    """

    channels: int = 3
    bands: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def limits(self, kind: str) -> Range | None:
        """What becomes 0 and 1 of this kind of number; None = the ends of its depth."""
        return self.ranges.get(kind, self.ranges.get(ANY))

    def within(self, ranges: Mapping[str, Range]) -> Reading:
        """The same with these ranges."""
        return replace(self, ranges=dict(ranges))

    def to_json(self) -> dict[str, object]:
        """What differs from the plain reading of `channels`; `read_reading` takes it back."""
        said: dict[str, object] = {"bands": list(self.bands)} if self.bands else {}
        if self.ranges:
            said["range"] = {kind: [list(pair) for pair in range_] for kind, range_ in self.ranges.items()}
        return said


RGB, GREY = Reading(3), Reading(1)


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 pixels as uint8, for pictures."""
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def reading_in(preprocessing: object) -> Reading:
    """The reading that the `preprocessing` of an encoder or of embeddings tells; RGB where it tells nothing.

    Raises:
        ValueError: see `read_reading`.
    """
    told = preprocessing if isinstance(preprocessing, dict) else {}
    channels = told.get("channels", 3)
    if not isinstance(channels, int) or not 0 < channels <= MAX_CHANNELS:
        raise ValueError(f"channels {str(channels)[:60]}; wanted a number of channels")
    return read_reading(channels, told.get("bands"), told.get("range"))


def read_reading(channels: int, bands: object, ranges: object) -> Reading:
    """The reading that a stranger's JSON tells.

    Raises:
        ValueError: it tells none.
    """
    bands = [] if bands is None else bands
    ranges = {} if ranges is None else ranges
    names = [name for name in bands if isinstance(name, str) and name] if isinstance(bands, list) else [""]
    whole = isinstance(bands, list) and len(names) == len(bands) and len(bands) in (0, channels)
    if not whole or max(map(len, names), default=0) > _LONGEST_NAME:
        raise ValueError(f"bands are {str(bands)[:60]}; wanted a name for each of {channels} channels")
    if not isinstance(ranges, dict) or not set(ranges) <= set(KINDS):
        raise ValueError(f"range is {str(ranges)[:60]}; wanted low and high values by kind of number")
    return Reading(channels, tuple(names)).within({kind: _range(pairs, channels) for kind, pairs in ranges.items()})


def _range(pairs: object, channels: int) -> Range:
    if isinstance(pairs, list) and len(pairs) in (1, channels):
        found = [tuple(pair) for pair in pairs if isinstance(pair, list) and len(pair) == 2 and all(map(_plain, pair))]
        if len(found) == len(pairs) and all(low < high for low, high in found):
            return tuple((float(low), float(high)) for low, high in found)
    raise ValueError(f"range is {str(pairs)[:60]}; wanted [low, high], or one such pair for each of {channels}")


def _plain(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def reading_of(channels: int | str | list[str], given: str = "auto") -> tuple[Reading, bool]:
    """What `--channels` and `--range` say, and whether the range is to be found from the images.

    Args:
        channels: how many, or names of bands (a list, or words with commas).
        given: "auto", "full", "LOW,HIGH", or "LOW,HIGH LOW,HIGH ..." with a pair for each channel.

    Raises:
        UserError: neither.
    """
    if isinstance(channels, str) and channels.isdigit():
        channels = int(channels)
    names = channels.split(",") if isinstance(channels, str) else channels if isinstance(channels, list) else []
    bands = tuple(name.strip() for name in names)
    if isinstance(channels, int):
        if not 0 < channels <= MAX_CHANNELS:
            raise UserError(f"--channels {channels:,}: wanted 1 to {MAX_CHANNELS:,}, or names of bands")
        reading = Reading(channels)
    else:
        if not bands or not all(bands) or len(set(bands)) < len(bands):
            raise UserError(f"--channels {','.join(bands)!r}: wanted a number, or different names of bands")
        reading = Reading(len(bands), bands)
    if given in ("auto", "full"):
        return reading, given == "auto"
    try:
        pairs = [[float(number) for number in pair.split(",")] for pair in given.replace(";", " ").split()]
        return reading.within({ANY: _range(pairs, reading.channels)}), False
    except ValueError as error:
        raise UserError(
            f"--range {given!r}: wanted auto, full, LOW,HIGH such as 0,4095, or such a pair for each of "
            f"{reading.channels} channels with spaces between"
        ) from error
