"""Reading: which channels of a stored image are taken, and which of its values become 0 and 1.

It is settled once, when an encoder is trained, and travels in the encoder folder: whatever looks at images through that
encoder afterwards reads them the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError

# A reader of the user's own: the bytes of a file and its id to (H, W), (H, W, C) or (C, H, W) of integers or floats
Function: TypeAlias = Callable[[bytes, str], Any]
Range: TypeAlias = tuple[tuple[float, float], ...]  # (low, high) of each channel, or one for all of them
ANY = "any"  # a kind of number that stands for every one
WIDE = ("uint32", "int32")
KINDS = (ANY, "float", "uint8", "int8", "uint16", "int16", *WIDE)
MAX_CHANNELS = 1_024
_LONGEST_NAME = 100  # characters of a band's name, or of a reader's
_READER = re.compile(r"[\w.]+:[\w.<>]+")


@dataclass(frozen=True)
class Reading:
    """How samples of a file or array become pixels.

    Attributes:
        channels: that a pixel has: 1 (grey), 3 (RGB), or as many as the bands of a TIFF or array.
        bands: names of the bands to take, in this order; empty = all.
        ranges: {kind of number: what becomes 0 and 1}; a kind is numpy's name, "float" for all floats, or "any". A
            kind that is missing is read over its full depth: 0..255, 0..4,095 for 12 bits, 0..65,535, 0..1 for floats.
        reader: "module:function" that reads the files, if it is one of the user's own: a word for messages. Nothing is
            imported because of it.
        function: that reader, which only who runs the program can give.
    """

    channels: int = 3
    bands: tuple[str, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    reader: str = ""
    function: Function | None = field(default=None, compare=False, repr=False)

    def limits(self, kind: str) -> Range | None:
        """What becomes 0 and 1 of this kind of number; None = the ends of its depth.

        Integers of 32 bits that were not met before are 16-bit values in another type.
        """
        found = self.ranges.get(kind, self.ranges.get(ANY))
        if found is None and kind in WIDE:
            found = next((self.ranges[other] for other in ("uint16", "int16") if other in self.ranges), None)
        return found

    def within(self, ranges: Mapping[str, Range]) -> Reading:
        """The same with these ranges."""
        return replace(self, ranges=dict(ranges))

    def to_json(self) -> dict[str, object]:
        """What differs from the plain reading of `channels`; `read_reading` takes it back."""
        said: dict[str, object] = {"bands": list(self.bands)} if self.bands else {}
        if self.ranges:
            said["range"] = {kind: [list(pair) for pair in range_] for kind, range_ in self.ranges.items()}
        return said | ({"reader": self.reader} if self.reader else {})

    def by(self, function: Function | None) -> Reading:
        """The same, with files read by `function`, or as formats say where it is None; says what an encoder expects.

        Raises:
            UserError: it is a name: who calls from Python holds the function.
        """
        if isinstance(function, str):
            raise UserError(f"reader {function!r}: give the function itself; names are for the command line")
        name = "" if function is None else f"{function.__module__}:{function.__qualname__}"
        if self.reader and name != self.reader:
            now = f"{name} reads them now" if name else f"give --reader {self.reader} where they are such files"
            say(f"reader: the encoder was trained on files that {self.reader} read; {now}")
        return replace(self, reader=name, function=function)


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
    return read_reading(channels, told.get("bands"), told.get("range"), told.get("reader"))


def read_reading(channels: int, bands: object, ranges: object, reader: object = None) -> Reading:
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
    reader = "" if reader is None else reader
    if not isinstance(reader, str) or len(reader) > _LONGEST_NAME or (reader and not _READER.fullmatch(reader)):
        raise ValueError(f"reader is {str(reader)[:60]}; wanted module:function")
    found = {kind: _range(pairs, channels) for kind, pairs in ranges.items()}
    return Reading(channels, tuple(names), found, reader)


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
