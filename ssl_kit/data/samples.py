"""Samples of deep, scientific and many-banded images, and how they become pixels.

What Pillow reads to 8 bits in silence, or not at all, comes as `Samples` from tiff.py, deep.py, arrays.py and dicom.py;
what they mean is the same for all of them and is said here.

Letters: H x W the image, S samples of a pixel as stored, C channels as read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ssl_kit.core.reading import Range, Reading
from ssl_kit.data.limits import BadImageError

Opacity = Literal["", "straight", "multiplied"]  # the last sample: none, or what the others are multiplied by, or were

_BAND = 2**18  # pixels that are converted at a time
_LUMA = (19595, 38470, 7471)  # ITU-R 601 in 16 bits, as Pillow computes it


@dataclass(frozen=True)
class Samples:
    """An image as its file has it.

    Attributes:
        values: (H, W, S), of any integer or float type.
        bits: of a value that are used, from the lowest; of floats, those of the type.
        colours: the leading samples that are the picture: 1 grey, 3 RGB; S where they are bands of equal rank.
        opacity: what the last sample is.
        inverted: the largest value is black.
        missing: the value that stands for no data; NaN too, where there is one.
        full: the values that are 0 and 1 of the full depth, where the file says so.
        names: of the bands.
        orientation: EXIF's, 1 to 8, still to be applied.
        note: what was left out of the file, in few words.
        what: the format, for messages.
    """

    values: np.ndarray
    bits: int
    colours: int
    opacity: Opacity = ""
    inverted: bool = False
    missing: float | None = None
    full: tuple[float, float] | None = None
    names: tuple[str, ...] = ()
    orientation: int = 1
    note: str = ""
    what: str = "array"

    @property
    def kind(self) -> str:
        """The kind of number, as `Reading.ranges` names it."""
        return "float" if self.values.dtype.kind == "f" else self.values.dtype.name


def pixels_of(samples: Samples, reading: Reading) -> np.ndarray:
    """(H, W, C) as an image is stored: uint8 of at most 8 bits, uint16 of everything deeper.

    Raises:
        BadImageError: it has not the channels that are asked for, or values that no range is known for.
    """
    height, width = samples.values.shape[:2]
    chosen = _chosen(samples, reading)
    if _is_stored(samples, reading):
        values = samples.values[:, :, chosen]
        values = _luma(values) if reading.channels == 1 and values.shape[2] == 3 else values
        return np.ascontiguousarray(np.repeat(values, 3, axis=2) if values.shape[2] < reading.channels else values)
    limits = reading.limits(samples.kind) or _full(samples, reading)
    deep = samples.kind != "uint8" or reading.limits("uint8") is not None
    pixels = np.empty((height, width, reading.channels), np.uint16 if deep else np.uint8)
    table = _table(samples.values.dtype, limits, deep)
    for rows in _bands(height, width):
        values, opacity, missing = _picture(samples, chosen, rows, reading.channels)
        made = _mapped(values, limits, deep) if table is None else _looked_up(values, table)
        if opacity is not None:
            _on_white(made, opacity, samples)
        if missing is not None:
            made[missing] = 0
        pixels[rows] = made  # grey becomes RGB
    return pixels


def _is_stored(samples: Samples, reading: Reading) -> bool:
    """Whether values are pixels as they are."""
    plain = samples.full is None and samples.missing is None and not samples.opacity and not samples.inverted
    whole = samples.kind in ("uint8", "uint16") and samples.bits == 8 * samples.values.dtype.itemsize
    return plain and whole and reading.limits(samples.kind) is None


def measured(samples: Samples, reading: Reading, most: int) -> np.ndarray:
    """(M, C) values of at most `most` pixels spread over the image, of grey (M, 1); those of no data are left out."""
    height, width = samples.values.shape[:2]
    step = max(1, math.ceil(math.sqrt(height * width / most)))
    spread = replace(samples, values=samples.values[::step, ::step])
    values, _, missing = _picture(spread, _chosen(samples, reading), slice(None), reading.channels)
    found = values.reshape(-1, values.shape[2])
    return found if missing is None else found[~missing.reshape(-1)]


def _bands(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _BAND // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _chosen(samples: Samples, reading: Reading) -> list[int] | slice:
    """The samples that are asked for."""
    count = samples.values.shape[2]
    inks = count - bool(samples.opacity)  # samples that are no opacity
    if reading.bands:
        return [_band(samples, name) for name in reading.bands]
    if reading.channels in (1, 3) and samples.colours in (1, 3):
        return slice(samples.colours)
    if reading.channels in (inks, count):
        return slice(reading.channels)
    raise BadImageError(f"{samples.what} of {inks} bands: --channels {inks}, not {reading.channels}")


def _band(samples: Samples, name: str) -> int:
    if name in samples.names:
        return samples.names.index(name)
    if name.isdigit() and 0 < int(name) <= samples.values.shape[2]:
        return int(name) - 1  # counted from 1, as GDAL does
    known = ", ".join(samples.names) or f"1 to {samples.values.shape[2]}"
    raise BadImageError(f"{samples.what} has no band {name!r}; it has {known}")


def _picture(
    samples: Samples, chosen: list[int] | slice, rows: slice, channels: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Of some rows: values (h, W, C or 1), opacity (h, W) if it is to be applied, and (h, W) bool: no data."""
    stored = samples.values[rows]
    values = stored[:, :, chosen]
    missing = None
    if samples.missing is not None:
        missing = (values == np.array(samples.missing).astype(values.dtype)).any(2)
        if values.dtype.kind == "f":
            missing |= np.isnan(values).any(2)
    if values.dtype.kind == "f" and not np.isfinite(values if missing is None else values[~missing]).all():
        raise BadImageError(f"{samples.what}: NaN or infinite pixels")
    if samples.inverted:
        values = inverted(values, samples.bits)
    if channels == 1 and values.shape[2] == 3:
        values = _luma(values)
    shown = samples.opacity and values.shape[2] < stored.shape[2]
    return values, stored[:, :, -1] if shown else None, missing


def inverted(values: np.ndarray, bits: int) -> np.ndarray:
    """The largest value becomes the least; `bits` of an unsigned one are used."""
    if values.dtype.kind == "f":
        return 1 - values
    return ~values if values.dtype.kind == "i" else values.dtype.type(2**bits - 1) - values


def _luma(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return (values.astype(np.float64) @ (np.array(_LUMA) / 2**16))[:, :, None]
    return ((values.astype(np.int64) @ np.array(_LUMA) + 2**15) >> 16).astype(values.dtype)[:, :, None]


def _full(samples: Samples, reading: Reading) -> Range:
    """The ends of the depth.

    Raises:
        BadImageError: floats outside [0, 1].
    """
    if samples.full is not None:
        return (samples.full,)
    if samples.values.dtype.itemsize == 4 and samples.values.dtype.kind != "f" and not _fills(samples.values):
        raise BadImageError(
            f"{samples.what} of {samples.kind} from {samples.values.min()} to {samples.values.max()}, next to nothing "
            "of its depth: convert it to 8 or 16 bits, or say --range LOW,HIGH"
        )
    if samples.values.dtype.kind != "f":
        return (depth(samples.values.dtype, samples.bits),)
    ends = [0.0, 0.0]
    for rows in _bands(*samples.values.shape[:2]):
        values, _, missing = _picture(samples, _chosen(samples, reading), rows, reading.channels)
        found = values if missing is None else values[~missing]
        ends += [float(found.min()), float(found.max())] if found.size else []
    low, high = min(ends), max(ends)
    if low < 0 or high > 1:
        raise BadImageError(
            f"{samples.what} of floats from {low:.6g} to {high:.6g}, which have no full depth: --range "
            f"{low:.6g},{high:.6g}"
        )
    return ((0.0, 1.0),)


def _fills(values: np.ndarray) -> bool:
    """Whether 32-bit integers have more than 16 bits in them: otherwise they would all be one grey."""
    return int(values.max()) - int(values.min()) > 2**16


def depth(dtype: np.dtype[np.generic], bits: int) -> tuple[int, int]:
    """The least and the greatest integer of so many bits."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)


@functools.lru_cache(16)  # a millisecond for 16 bits
def _table(dtype: np.dtype[np.generic], limits: Range, deep: bool) -> np.ndarray | None:
    """(2^16 or 2^8, C) what becomes of each value, where there are so few."""
    if dtype.kind not in "iu" or dtype.itemsize > 2:
        return None
    first, last = depth(dtype, 8 * dtype.itemsize)
    # negative values look up from the end, as numpy counts
    values = np.r_[0 : last + 1, first:0] if first < 0 else np.arange(last + 1)
    return _mapped(values[:, None], limits, deep)


def _looked_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    if table.shape[1] == 1:
        return table[:, 0][values]
    return np.stack([table[values[:, :, channel], channel] for channel in range(values.shape[2])], axis=2)


def _mapped(values: np.ndarray, limits: Range, deep: bool) -> np.ndarray:
    """(..., C) values to 0..255 or, deep, 0..65,535, cut at both ends."""
    low, high = np.array(limits, np.float64).T
    dtype = np.uint16 if deep else np.uint8
    return np.rint(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * np.iinfo(dtype).max).astype(dtype)


def _on_white(pixels: np.ndarray, opacity: np.ndarray, samples: Samples) -> None:
    """Composites (h, W, C) pixels, mapped already, on white, in place."""
    top = float(np.iinfo(pixels.dtype).max)
    most = 1.0 if opacity.dtype.kind == "f" else float(2**samples.bits - 1)
    share = np.clip(opacity.astype(np.float64) / most, 0, 1)[:, :, None]
    seen = pixels if samples.opacity == "multiplied" else pixels * share
    pixels[:] = np.rint(np.clip(seen + top * (1 - share), 0, top)).astype(pixels.dtype)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) is (channels, height, width): the fewer of the first and last are the channels."""
    return shape[0] < shape[2]


def of_array(values: np.ndarray, what: str = "array") -> Samples:
    """(H, W), (H, W, S) or (S, H, W): the fewer of the outer two are the channels.

    Raises:
        BadImageError: another shape or type.
    """
    if values.dtype == np.bool_:
        values = values.view(np.uint8) * np.uint8(255)
    if values.ndim == 3 and is_channels_first(values.shape):
        values = values.transpose(1, 2, 0)
    kind, wide = values.dtype.kind, values.dtype.itemsize
    if values.ndim not in (2, 3) or kind not in "iuf" or wide > (8 if kind == "f" else 4) or not values.size:
        raise BadImageError(
            f"{what} of {values.dtype} {values.shape}; wanted integers of up to 32 bits or floats, (height, width) or "
            "(height, width, channels)"
        )
    values = values[:, :, None] if values.ndim == 2 else values
    count = values.shape[2]
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Samples(values, 8 * wide, count, what=what)
