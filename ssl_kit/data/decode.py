"""Bytes of an image file -> pixels, upright, as a `Reading` says; or one `BadImageError` that says why not.

Pixels are uint8 of files of at most 8 bits, and uint16 of all deeper ones, over the range of the reading or else the
full depth: nothing that a camera has measured is lost before the views are made.

What becomes of each kind of file:
- JPEG: simplejpeg (libjpeg-turbo, releases the GIL), bit for bit what Pillow gives; on request at a reduced size, which
  the inverse DCT yields for a fraction of the cost (N/8 of the full size for N = 1..8; Pillow's `draft` knows only 1/2,
  1/4, 1/8). CMYK, YCCK and rare codings go through Pillow.
- EXIF orientation is applied: sizes and boxes here are those of the upright image.
- transparency (RGBA, LA, a transparent palette entry) is composited on white.
- TIFF, `.npy`, `.npz`, DICOM, and PNG, JPEG 2000, AVIF and PNM of more than 8 bits: see samples.py, tiff.py, deep.py.
- 1, L, P, CMYK, YCbCr, LAB, HSV: Pillow's conversion. Grey of a colour image is ITU-R 601 luma. Colour profiles are
  not applied: the stored numbers are what a network sees, here as in torchvision.
- animations and multi-page files: the first frame.
A truncated file is bad, never half an image; what decoding takes is judged before any of it (see below).
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from types import ModuleType
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from ssl_kit.core.reading import RGB, Function, Reading
from ssl_kit.data import arrays, deep, dicom, tiff
from ssl_kit.data.limits import BadImageError, check_image, check_jpeg, check_pixels, jpeg_header, short
from ssl_kit.data.samples import Opacity, Samples, of_array, pixels_of

# Plugins that may see a stranger's bytes. Left out on purpose: EPS (runs Ghostscript), PDF, FITS, PSD and other
# formats that nobody stores photographs in but that have had decompression bombs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "PPM", "JPEG2000", "AVIF")
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
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")  # chunks of a PNG that say nothing of its pixels
_TURNS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that Pillow asks how it is turned


class Decoded(NamedTuple):
    """Pixels and how they relate to the full size.

    `image`: (H, W, C) uint8 or uint16, C-contiguous. `scale_y`, `scale_x`: decoded size / full size, in (0, 1]:
    multiply a box in pixels of the full upright image by them to find it in `image`.
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
    if (special := _special(data)) is not None:
        return special.size(data)
    with _open(data) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def decode(data: bytes, reading: Reading = RGB, smallest: tuple[int, int] | None = None, name: str = "") -> Decoded:
    """Decodes one image file, upright.

    Args:
        data: the file's bytes.
        reading: which channels and values of it are wanted.
        smallest: (height, width) in pixels that the upright image must still have at least. A JPEG is then decoded at
            the smallest size that allows it; without it, and for all other formats, at full size.
        name: id of the image, for a reader of the user's own.

    Raises:
        BadImageError: the file is no image, truncated, damaged, too large, of a format that is not read, or has other
            channels or values than are wanted.
    """
    if (samples := samples_of(data, reading, name)) is not None:
        return Decoded(_upright(pixels_of(samples, reading), samples.orientation), 1.0, 1.0)
    if reading.bands or reading.channels not in (1, 3):
        raise BadImageError(f"an image of 1 or 3 channels, not {reading.channels}: wanted a TIFF, .npy or .npz")
    if (decoded := _decode_jpeg(data, reading.channels, smallest)) is None:
        pixels, orientation = _decode_pillow(data, reading)
        return Decoded(_upright(pixels, orientation), 1.0, 1.0)
    if reading.limits("uint8") is None:
        return decoded
    return decoded._replace(image=pixels_of(of_array(decoded.image), reading))


def samples_of(data: bytes, reading: Reading, name: str = "") -> Samples | None:
    """What a file holds before its values become pixels; None for those of 8 bits that Pillow reads.

    Raises:
        BadImageError: damaged, too large, or of a kind that is not read.
    """
    if reading.function is not None:
        return _read_by(reading.function, reading.reader, data, name)
    special = _special(data)
    if special is not None:
        return special.read(data, reading)
    if deep.is_deep(data):
        with _open(data):  # judges its size
            return deep.read(data, reading)
    return None


def _read_by(function: Function, reader: str, data: bytes, name: str) -> Samples:
    """What a reader of the user's own gives."""
    try:
        values = np.asarray(function(data, name))
    except Exception as error:  # whatever somebody's code raises, this file has not become an image
        raise BadImageError(f"{reader}: {type(error).__name__}: {short(error)}") from error
    return of_array(values, f"array of {reader}")


def of_pillow(image: Image.Image, reading: Reading) -> np.ndarray:
    """(H, W, C) of an opened picture, as `decode` makes it of a file.

    Raises:
        BadImageError: other channels or values than are wanted, or it cannot be loaded.
    """
    try:
        image.load()
        if image.mode in ("F", "I") or image.mode.startswith("I;16"):
            return pixels_of(of_array(np.asarray(image)), reading)
        if reading.bands or reading.channels not in (1, 3):
            raise BadImageError(f"a picture of 1 or 3 channels, not {reading.channels}")
        return _upright(_pixels(image, reading), _orientation(image))
    except BadImageError:
        raise
    except _PILLOW_ERRORS as error:
        raise BadImageError(short(error)) from error


def _special(data: bytes) -> ModuleType | None:
    """The module that reads a file alone, header and all: its functions are `size` and `read`."""
    return next((module for module in (tiff, arrays, dicom) if module.is_mine(data)), None)


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


def _decode_pillow(data: bytes, reading: Reading) -> tuple[np.ndarray, int]:
    """(H, W, C) as stored, and the EXIF orientation; Pillow's own pixels are freed with the return."""
    with _open(data) as image:
        try:
            image.load()
            return _pixels(image, reading), _orientation(image)
        except _PILLOW_ERRORS as error:
            raise BadImageError(f"{image.format}: {short(error)}") from error


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
        raise BadImageError(f"JPEG: {short(error)}") from error
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
    """The EXIF orientation 1..8."""
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
        raise BadImageError(short(error)) from error
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise AssertionError("another package set PIL.ImageFile.LOAD_TRUNCATED_IMAGES: half images would pass as whole")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF and JPEG 2000 are optional parts of Pillow


def _pixels(image: Image.Image, reading: Reading) -> np.ndarray:
    """(H, W, C) of a Pillow image of any mode of 8 bits, converted a band of rows at a time."""
    channels = reading.channels
    if reading.limits("uint8") is not None:  # opacity counts after the range, as it does for all other files
        opacity: Opacity = "straight" if image.has_transparency_data else ""
        values = np.asarray(image.convert("RGBA" if opacity else "RGB"))
        return pixels_of(Samples(values, 8, 3, opacity, what=str(image.format)), reading)
    width, height = image.size
    rows = max(1, _BAND // width)
    tops = range(0, height, rows)
    band = lambda top: image.crop((0, top, width, min(top + rows, height))) if len(tops) > 1 else image
    pixels = np.empty((height, width, channels), np.uint8)
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
