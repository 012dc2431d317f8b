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
A truncated file is bad, never half an image; what decoding takes is judged before any of it (see headers.py).
"""

from __future__ import annotations

import functools
import io
import math
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from ssl_kit.data.headers import BadImageError, check_image, check_jpeg, check_pixels, jpeg_header, without_texts

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
    if data[:3] == _JPEG:
        try:
            height, width, space, sampling = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass  # a coding that simplejpeg does not know, or damage: Pillow has the last word
        else:
            check_jpeg(data, height, width, space, sampling)
            return (width, height) if _jpeg_orientation(data) >= 5 else (height, width)
    with _open(data) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def decode(
    data: bytes,
    channels: int = 3,
    box: tuple[float, float, float, float] | None = None,
    smallest: tuple[int, int] | None = None,
) -> Decoded:
    """Decodes one image file, upright.

    Args:
        data: the file's bytes.
        channels: 3 for RGB, 1 for grey.
        box: (top, left, height, width) in pixels of the full upright image: the part that will be used; default all.
        smallest: (height, width) in pixels that the box must still have at least. A JPEG is then decoded at the
            smallest size that allows it; without it, and for all other formats, at full size.

    Raises:
        BadImageError: the file is no image, truncated, damaged, too large, or of a format that is not read.
    """
    assert channels in (1, 3), channels
    if data[:3] == _JPEG:
        decoded = _decode_jpeg(data, channels, box, smallest)
        if decoded is not None:
            return decoded
    pixels, orientation = _decode_pillow(data, channels)
    return Decoded(_upright(pixels, orientation), 1.0, 1.0)


def _decode_pillow(data: bytes, channels: int) -> tuple[np.ndarray, int]:
    """(H, W, channels) as stored, and the EXIF orientation; Pillow's own pixels are freed with the return."""
    with _open(data) as image:
        try:
            image.load()
            return _pixels(image, channels), _orientation(image)
        except _PILLOW_ERRORS as error:
            raise BadImageError(f"{image.format}: {_short(error)}") from error


def _decode_jpeg(
    data: bytes,
    channels: int,
    box: tuple[float, float, float, float] | None,
    smallest: tuple[int, int] | None,
) -> Decoded | None:
    """The fast path; None when Pillow has to do it."""
    try:
        height, width, space, sampling = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_jpeg(data, height, width, space, sampling)
    if space in ("CMYK", "YCCK"):
        return None
    orientation = _jpeg_orientation(data)
    least_y, least_x = height, width
    if smallest is not None:
        turned = orientation >= 5
        full = (width, height) if turned else (height, width)
        box_height, box_width = (box[2], box[3]) if box is not None else full
        least = (math.ceil(full[0] * smallest[0] / box_height), math.ceil(full[1] * smallest[1] / box_width))
        least_y, least_x = least[::-1] if turned else least
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
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    if orientation in (6, 7):
        pixels = pixels[::-1]
    if orientation in (7, 8):
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
    pieces = lambda: (
        (image.crop((0, top, width, min(top + rows, height))) for top in tops) if len(tops) > 1 else [image]
    )
    bands = lambda: zip(tops, pieces(), strict=True)
    pixels = np.empty((height, width, channels), np.uint8)
    if image.mode == "F" or image.mode.startswith("I"):
        ranges = [(values.min(), values.max()) for _, band in bands() for values in (np.asarray(band),)]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        for top, band in bands():
            pixels[top : top + rows] = _rescaled(np.asarray(band), low, high)[:, :, None]
    else:
        for top, band in bands():
            pixels[top : top + rows] = np.asarray(_converted(band, channels)).reshape(-1, width, channels)
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
