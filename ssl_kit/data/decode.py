"""Bytes of an image file -> uint8 pixels, upright, in RGB or grey; or one `BadImageError` that says why not.

What becomes of each kind of file:
- JPEG: simplejpeg (libjpeg-turbo, releases the GIL), bit for bit what Pillow gives; on request at a reduced size, which
  the inverse DCT yields for a fraction of the cost (N/8 of the full size for N = 1..8; Pillow's `draft` knows only 1/2,
  1/4, 1/8). CMYK, YCCK and rare codings go through Pillow.
- EXIF orientation is applied: sizes and boxes here are those of the upright image.
- transparency (RGBA, LA, a transparent palette entry) is composited on white.
- 16 bits (`I;16`, `I`) are divided by 257 and rounded, so that 65,535 -> 255. An `I` image (32-bit integers) with
  values outside 0..65,535 is scaled from its own minimum..maximum to 0..255.
- floats (`F`) that lie in [0, 1] are multiplied by 255; others are scaled from their minimum..maximum to 0..255.
- 1, L, P, CMYK, YCbCr, LAB, HSV: Pillow's conversion. Grey of a colour image is ITU-R 601 luma. Colour profiles are
  not applied: the stored numbers are what a network sees, here as in torchvision.
- animations and multi-page files: the first frame.
A truncated file is bad, never half an image; what decoding takes is judged before any of it (see below).
"""

from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

# Plugins that may see a stranger's bytes. Left out on purpose: EPS (runs Ghostscript), PDF, FITS, PSD and other
# formats that nobody stores photographs in but that have had decompression bombs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF")
_BAND = 2**19  # pixels that are converted at a time: what conversions take beside the image stays below 16 MiB
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_EXIF_ORIENTATION = 0x0112
# Complaints of libjpeg that leave every pixel right; anything else it says means pixels are missing or made up.
_HARMLESS = ("extraneous bytes before marker 0xd9", "Invalid SOS parameters")
# What Pillow's plugins raise on damaged files (found by fuzzing them; there is no common base class).
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# What the header of an image says of the memory that decoding it takes, judged against the bytes of its file. A few
# bytes can stand for gigabytes of pixels: palettes, runs, predicted blocks. Honest ones do it too: a page of text at
# 600 dpi has 35 million pixels in 40 kB. So the bytes that a decoder holds at its peak are told from the header, format
# by format, before any pixel is, and must stay within what any file may take and what its bytes bear out.
MAX_PIXELS = 178_956_970  # Pillow refuses more than this (2 x MAX_IMAGE_PIXELS); the same limit for every format
# Bytes that decoding may take at its peak: those of any image, and so many more for each byte of its file. Black and
# white pages of 90 MP, screenshots of 50 and drawings of 24 in any format stay below the first; photographs, which have
# a tenth of a byte per pixel at least, below the second, whatever their size.
_FREE, _PER_BYTE = 384 * 2**20, 64
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")  # chunks of a PNG that say nothing of its pixels
_TURNS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that Pillow asks how it is turned
_BITS_PER_SAMPLE, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 258, 278, 322, 323  # tags of a TIFF
_SAMPLES = {"Gray": 1.0, "420": 1.5, "411": 1.5, "422": 2.0, "440": 2.0, "444": 3.0}  # of a JPEG, per pixel
# Markers of a JPEG: 0xC0 to 0xCF begin a frame, but for tables and restarts (ITU T.81, table B.1)
_NO_FRAMES, _PROGRESSIVE, _ARITHMETIC = (0xC4, 0xC8, 0xCC), (0xC2, 0xC6, 0xCA, 0xCE), range(0xC9, 0xD0)
_BYTES_OF_TILE = 14  # of a JPEG 2000: the two markers that each has
_PIXELS_PER_BYTE = 512  # of a JPEG at most: a block of 64 has a Huffman code of 1 bit at least


class BadImageError(ValueError):
    """An image file that cannot be decoded whole; the message is the reason, in a few words."""


class Decoded(NamedTuple):
    """Pixels and how they relate to the full size.

    `image`: (H, W, C) uint8, C-contiguous. `scale_y`, `scale_x`: decoded size / full size, in (0, 1]: multiply a box in
    pixels of the full upright image by them to find it in `image`.
    """

    image: np.ndarray
    scale_y: float
    scale_x: float


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the header alone.

    Raises:
        BadImageError: no image, more than `MAX_PIXELS`, or one that takes far more memory than its file has bytes.
    """
    if (found := _jpeg_size(data)) is not None:
        height, width, _ = found
        return (width, height) if _jpeg_orientation(data) >= 5 else (height, width)
    with _open(data) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def decode(data: bytes, channels: int = 3, smallest: tuple[int, int] | None = None) -> Decoded:
    """Decodes one image file, upright.

    Args:
        data: the file's bytes.
        channels: 3 for RGB, 1 for grey.
        smallest: (height, width) in pixels that the upright image must still have at least. A JPEG is then decoded at
            the smallest size that allows it; without it, and for all other formats, at full size.

    Raises:
        BadImageError: the file is no image, truncated, damaged, too large, or of a format that is not read.
    """
    assert channels in (1, 3), channels
    if (decoded := _decode_jpeg(data, channels, smallest)) is not None:
        return decoded
    pixels, orientation = _decode_pillow(data, channels)
    return Decoded(_upright(pixels, orientation), 1.0, 1.0)


def _jpeg_size(data: bytes) -> tuple[int, int, str] | None:
    """Height and width as stored, and the colour space of a JPEG; None where Pillow has the last word.

    Raises:
        BadImageError: it takes too much memory.
    """
    if data[:3] != _JPEG:
        return None
    try:
        height, width, space, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a coding that simplejpeg does not know, or damage
        return None
    check_jpeg(data, height, width, space, sampling)
    return height, width, space


def _decode_pillow(data: bytes, channels: int) -> tuple[np.ndarray, int]:
    """(H, W, channels) as stored, and the EXIF orientation; Pillow's own pixels are freed with the return."""
    with _open(data) as image:
        try:
            image.load()
            return _pixels(image, channels), _orientation(image)
        except _PILLOW_ERRORS as error:
            raise BadImageError(f"{image.format}: {_short(error)}") from error


def _decode_jpeg(data: bytes, channels: int, smallest: tuple[int, int] | None) -> Decoded | None:
    """The fast path; None when Pillow has to do it."""
    height, width, space = _jpeg_size(data) or (0, 0, "CMYK")
    if space in ("CMYK", "YCCK"):
        return None
    orientation = _jpeg_orientation(data)
    least_y, least_x = smallest or (height, width)
    if smallest and orientation >= 5:
        least_y, least_x = least_x, least_y
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB" if channels == 3 else "GRAY",
            min_height=min(least_y, height),  # a minimum above the size would make libjpeg enlarge
            min_width=min(least_x, width),
            min_factor=1,
        )
    except ValueError as error:
        if any(words in str(error) for words in _HARMLESS):
            return None
        raise BadImageError(f"JPEG: {_short(error)}") from error
    scale_y, scale_x = pixels.shape[0] / height, pixels.shape[1] / width
    if orientation == 1:
        return Decoded(pixels, scale_y, scale_x)
    if orientation >= 5:
        scale_y, scale_x = scale_x, scale_y
    return Decoded(_upright(pixels, orientation), scale_y, scale_x)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> upright, by the EXIF orientation 1..8 (Exif 2.32, section 4.6.4, tag 0x0112)."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _jpeg_orientation(data: bytes) -> int:
    # walking the segments costs a few microseconds, a search of the whole file 70, Pillow's parser 100, and this runs
    # twice per image: it parses only files that have any tags
    header = data[: jpeg_header(data)[0]]
    if b"Exif\x00\x00" not in header and b"tiff:Orientation" not in header:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return _orientation(image)
    except _PILLOW_ERRORS:
        return 1  # unreadable tags are no reason to lose the pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8 that is still to be applied; Pillow itself turns a TIFF and states its upright size."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "Raw profile type exif" not in image.info:
        image.info.setdefault("exif", b"")  # else Pillow decodes it to look behind its pixels, where nothing is left
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImageError("empty file")
    if data.startswith(_PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])  # before Pillow unpacks up to 64 MB of texts and profiles
        check_pixels(height, width)
        data = without_texts(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        check_image(image, data)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image of a format that is read") from error
    except _PILLOW_ERRORS as error:
        raise BadImageError(_short(error)) from error
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise AssertionError("another package set PIL.ImageFile.LOAD_TRUNCATED_IMAGES: half images would pass as whole")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF and JPEG 2000 are optional parts of Pillow


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 of a Pillow image of any mode, converted a band of rows at a time."""
    width, height = image.size
    rows = max(1, _BAND // width)
    tops = range(0, height, rows)
    band = lambda top: image.crop((0, top, width, min(top + rows, height))) if len(tops) > 1 else image
    pixels = np.empty((height, width, channels), np.uint8)
    if image.mode == "F" or image.mode.startswith("I"):
        ranges = [(values.min(), values.max()) for values in (np.asarray(band(top)) for top in tops)]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        for top in tops:
            pixels[top : top + rows] = _rescaled(np.asarray(band(top)), low, high)[:, :, None]
    else:
        for top in tops:
            pixels[top : top + rows] = np.asarray(_converted(band(top), channels)).reshape(-1, width, channels)
    return pixels


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """In RGB or grey, on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _rescaled(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """(H, W) of 16-bit, 32-bit integer or float values -> uint8, by the rules at the top of this file.

    `low` and `high` are the least and the greatest of the whole image.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImageError("NaN or infinite pixels")
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * np.float32(255)).astype(np.uint8)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values.astype(np.float64) - float(low)) * (255 / (float(high) - float(low)))).astype(np.uint8)


def _short(error: BaseException) -> str:
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


def without_texts(data: bytes) -> bytes:
    """A PNG without texts and colour profile, of which Pillow would unpack 64 MB; what may say how it is turned leads.

    A chunk is a big-endian length, a type, so many bytes and a checksum (PNG specification, 5.3).
    """
    turned, kept = dict[bytes, bytes](), []
    position = 33  # behind IHDR
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        chunk = data[position : position + 12 + length]
        if kind not in _TEXTS:
            kept.append(chunk)
        elif (name := kind if kind == b"eXIf" else chunk[8:].partition(b"\0")[0]) in _TURNS:
            turned.setdefault(name, chunk)
        position += len(chunk)
    return b"".join((data[:33], *turned.values(), *kept, data[position:]))


def check_image(image: Image.Image, data: bytes) -> None:
    """Raises `BadImageError` for an image that Pillow has opened and that takes more memory than it may."""
    check_pixels(image.height, image.width)
    check_cost(str(image.format), image.width, image.height, bytes_per_pixel(image), data)
    if image.format == "JPEG2000":
        _check_tiles(data)


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
        case "TIFF":
            return _bytes_per_pixel_of_tiff(image, stored)
    return stored + 3


def _bytes_per_pixel_of_tiff(image: Any, stored: int) -> float:
    """Pillow turns a TIFF itself, in a copy; libtiff unpacks a strip, or a tile, at a time, however large it is."""
    tag = lambda number, default: value if isinstance(value := image.tag_v2.get(number), int) else default
    width, height = image.size
    tile = tag(_TILE_WIDTH, 0) * tag(_TILE_LENGTH, 0) or width * min(tag(_ROWS_PER_STRIP, height), height)
    bits = image.tag_v2.get(_BITS_PER_SAMPLE)
    unpacked = max(4, sum(bits) / 8 if isinstance(bits, tuple) else 0) * tile / (width * height)
    return stored * (1 if tag(_EXIF_ORIENTATION, 1) == 1 else 2) + max(3, unpacked)


def _check_tiles(data: bytes) -> None:
    """Raises `BadImageError` for a JPEG 2000 of more tiles than it has bytes for: OpenJPEG takes 12 kB for each."""
    for found in re.finditer(rb"(?=\xff\x4f\xff\x51.{4}(.{32}))", data, re.DOTALL):  # SIZ (ISO 15444-1, A.5.1)
        right, bottom, _, _, width, height, left, top = struct.unpack(">8I", found[1])
        tiles = -(-(right - left) // max(width, 1)) * -(-(bottom - top) // max(height, 1))
        if tiles * _BYTES_OF_TILE > len(data):
            raise BadImageError(f"JPEG2000: {len(data):,} bytes cannot hold {tiles:,} tiles: truncated")
