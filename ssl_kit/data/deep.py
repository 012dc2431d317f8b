"""PNG, JPEG 2000, AVIF and PNM of more than 8 bits, which Pillow would cut to 8 in silence."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import imagecodecs
import numpy as np

from ssl_kit.core.reading import Reading
from ssl_kit.data.limits import UNREADABLE, BadImageError, check_tiles, short
from ssl_kit.data.samples import Opacity, Samples


def is_deep(data: bytes) -> bool:
    """Whether a file that Pillow reads too has more than 8 bits, or more bands than it knows."""
    return _deep_reader(data) is not None


def read(data: bytes, reading: Reading) -> Samples:
    """The samples of such a file. Its size was judged from the header that Pillow has read.

    Raises:
        BadImageError: damaged.
    """
    reader = _deep_reader(data)
    assert reader is not None, "is_deep says so"
    try:
        return reader(data)
    except BadImageError:
        raise
    except UNREADABLE as error:
        raise BadImageError(short(error)) from error


def _deep_reader(data: bytes) -> Callable[[bytes], Samples] | None:
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png if data[24:25] == b"\x10" else None
    if data[:2] in (b"P5", b"P6"):
        return _pnm if _pnm_header(data)[2] > 255 else None
    if data[4:8] == b"ftyp" and b"avif" in data[8:32]:
        place = data.find(b"av1C")
        return _avif if 0 < place < len(data) - 6 and data[place + 6] & 0x40 else None
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        bits, count = _j2k_header(data)
        return _j2k if bits > 8 or count > 4 else None
    return None


def _png(data: bytes) -> Samples:
    return _of_colours(imagecodecs.png_decode(data), 16, "PNG")


def _of_colours(values: np.ndarray, bits: int, what: str) -> Samples:
    """1 grey, 2 grey and opacity, 3 RGB, 4 RGB and opacity; more are bands."""
    values = values[:, :, None] if values.ndim == 2 else values
    count: int = values.shape[2]
    opacity: Opacity = "straight" if count in (2, 4) else ""
    return Samples(values, bits, {2: 1, 4: 3}.get(count, count), opacity, what=what)


def _j2k_header(data: bytes) -> tuple[int, int]:
    """Bits and components (SIZ: ISO 15444-1, A.5.1)."""
    place = data.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(data) < place + 45:
        return 0, 0
    count, size = struct.unpack(">HB", data[place + 40 : place + 43])
    return (size & 0x7F) + 1, count


def _j2k(data: bytes) -> Samples:
    check_tiles(data)
    return _of_colours(imagecodecs.jpeg2k_decode(data), _j2k_header(data)[0], "JPEG2000")


def _avif(data: bytes) -> Samples:
    bits = 12 if data[data.find(b"av1C") + 6] & 0x20 else 10
    return _of_colours(imagecodecs.avif_decode(data, numthreads=1), bits, "AVIF")


_PNM_HEADER = re.compile(
    rb"P[56]\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s+(?:#[^\n]*\n\s*)*(\d{1,5})\s"
)


def _pnm_header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, greatest value and where the pixels begin; zeros if it is none."""
    found = _PNM_HEADER.match(data[:4096])
    return (int(found[1]), int(found[2]), int(found[3]), found.end()) if found else (0, 0, 0, 0)


def _pnm(data: bytes) -> Samples:
    width, height, most, start = _pnm_header(data)
    count = 3 if data[:2] == b"P6" else 1
    values = np.frombuffer(data, ">u2", width * height * count, start).astype(np.uint16).reshape(height, width, count)
    return Samples(values, 16, count, full=(0, most), what="PPM")
