"""What decoding an image may take, judged from its header before any pixel is decoded; or `BadImageError`."""

from __future__ import annotations

import re
import struct

from PIL import Image

# What the header of an image says of the memory that decoding it takes, judged against the bytes of its file. A few
# bytes can stand for gigabytes of pixels: palettes, runs, predicted blocks. Honest ones do it too: a page of text at
# 600 dpi has 35 million pixels in 40 kB. So the bytes that a decoder holds at its peak are told from the header, format
# by format, before any pixel is, and must stay within what any file may take and what its bytes bear out.
MAX_PIXELS = 178_956_970  # Pillow refuses more than this (2 x MAX_IMAGE_PIXELS); the same limit for every format
# Bytes that decoding may take at its peak: those of any image, and so many more for each byte of its file. Black and
# white pages of 90 MP, screenshots of 50 and drawings of 24 in any format stay below the first; photographs, which have
# a tenth of a byte per pixel at least, below the second, whatever their size.
_FREE, _PER_BYTE = 384 * 2**20, 64
_SAMPLES = {"Gray": 1.0, "420": 1.5, "411": 1.5, "422": 2.0, "440": 2.0, "444": 3.0}  # of a JPEG, per pixel
# Markers of a JPEG: 0xC0 to 0xCF begin a frame, but for tables and restarts (ITU T.81, table B.1)
_NO_FRAMES, _PROGRESSIVE, _ARITHMETIC = (0xC4, 0xC8, 0xCC), (0xC2, 0xC6, 0xCA, 0xCE), range(0xC9, 0xD0)
_BYTES_OF_TILE = 14  # of a JPEG 2000: the two markers that each has
_PIXELS_PER_BYTE = 512  # of a JPEG at most: a block of 64 has a Huffman code of 1 bit at least


# What readers of files raise on damaged files (found by fuzzing them; there is no common base class)
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    AttributeError,
    OSError,
    EOFError,
    MemoryError,
    AssertionError,
    NotImplementedError,
    struct.error,
)


class BadImageError(ValueError):
    """An image file that cannot be decoded whole; the message is the reason, in a few words."""


def short(error: BaseException) -> str:
    """The first line of an error, at most 120 characters, for `skipped.csv` and messages."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def check_pixels(height: int, width: int) -> None:
    """Raises `BadImageError` for no pixels, or more than `MAX_PIXELS`."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadImageError(f"{width:,} x {height:,} pixels; the limit is {MAX_PIXELS:,}")


def check_cost(kind: str, width: int, height: int, each: float, data: bytes) -> None:
    """Raises `BadImageError` for an image that takes `each` bytes per pixel when it is decoded, if that is too much."""
    check_pixels(height, width)
    cost, most = height * width * each, _FREE + _PER_BYTE * len(data)
    if cost > most:
        raise BadImageError(
            f"{kind}: {len(data):,} bytes for {width:,} x {height:,} pixels, which take {cost / 2**20:,.0f} MiB; the "
            f"limit for such a file is {most / 2**20:,.0f}"
        )


def check_jpeg(data: bytes, height: int, width: int, space: str, sampling: str) -> None:
    """Raises `BadImageError` for a JPEG that takes more memory than it may, or has too few bytes for its pixels."""
    _, frame = jpeg_header(data)
    inks = space in ("CMYK", "YCCK")
    samples = 4 if inks else _SAMPLES.get(sampling, 3)
    # a progressive one is held as coefficients of 2 bytes until its last scan has come; inks go through Pillow
    coefficients = 2 * samples if frame in _PROGRESSIVE or not frame else 0
    check_cost("JPEG", width, height, 4 + max(3, coefficients) if inks else 3 + coefficients, data)
    if frame not in _ARITHMETIC and height * width > _PIXELS_PER_BYTE * len(data):
        raise BadImageError(f"JPEG: {len(data):,} bytes cannot hold {width:,} x {height:,} pixels: truncated")


def jpeg_header(data: bytes) -> tuple[int, int]:
    """Bytes of a JPEG before its first scan, where all tags are, and the marker of its frame, which says its coding.

    All its bytes where its segments make no sense, and 0 where there is no frame. A segment is 0xFF, a marker, and a
    big-endian length that counts itself (ITU T.81, B.1.1.4); 0xDA begins a scan.
    """
    position, frame = 2, 0
    while data[position : position + 1] == b"\xff" and (marker := data[position + 1 : position + 2]) != b"\xda":
        if marker == b"\xff":  # padding
            position += 1
            continue
        if marker and marker[0] & 0xF0 == 0xC0 and marker[0] not in _NO_FRAMES:
            frame = marker[0]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return (position if data[position : position + 2] == b"\xff\xda" else len(data)), frame


def check_image(image: Image.Image, data: bytes) -> None:
    """Raises `BadImageError` for an image that Pillow has opened and that takes more memory than it may."""
    check_pixels(image.height, image.width)
    check_cost(str(image.format), image.width, image.height, bytes_per_pixel(image), data)
    if image.format == "JPEG2000":
        check_tiles(data)


def bytes_per_pixel(image: Image.Image) -> float:
    """What decoding holds at its peak, the returned pixels (3) included (test_decode_bounds.py measures)."""
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    bands = len(image.getbands())
    match image.format:
        case "WEBP":
            return 17  # two canvases, the frame as bytes, the image
        case "AVIF":
            return 14
        case "JPEG2000":
            return 4 * bands + stored + 4  # 4 bytes a sample
        case "JPEG" | "MPO":
            return stored + (2 * bands if "progressive" in image.info else 3)
    return stored + 3


def check_tiles(data: bytes) -> None:
    """Raises `BadImageError` for a JPEG 2000 of more tiles than it has bytes for: OpenJPEG takes 12 kB for each."""
    for found in re.finditer(rb"(?=\xff\x4f\xff\x51.{4}(.{32}))", data, re.DOTALL):  # SIZ (ISO 15444-1, A.5.1)
        right, bottom, _, _, width, height, left, top = struct.unpack(">8I", found[1])
        tiles = -(-(right - left) // max(width, 1)) * -(-(bottom - top) // max(height, 1))
        if tiles * _BYTES_OF_TILE > len(data):
            raise BadImageError(f"JPEG2000: {len(data):,} bytes cannot hold {tiles:,} tiles: truncated")
