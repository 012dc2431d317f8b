"""TIFF and BigTIFF by tifffile: any depth, layout and number of bands; what cannot be read rightly is refused."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import replace

import numpy as np
import tifffile
from PIL import Image

from ssl_kit.core.reading import Reading
from ssl_kit.data.limits import UNREADABLE, BadImageError, check_cost, short
from ssl_kit.data.samples import Opacity, Samples, depth

_WHITE_IS_ZERO, _RGB, _YCBCR = 0, 2, 6  # photometric interpretations
# and those that Pillow turns to RGB: inks, YCbCr, CIE Lab
_MODES = {5: ("C", "M", "Y", "K"), _YCBCR: ("Y", "Cb", "Cr"), 8: ("L", "A", "B")}
_MULTIPLIED, _STRAIGHT = 1, 2  # extra samples that are an opacity
_GDAL_NAMES, _GDAL_NODATA, _ORIENTATION = 42112, 42113, 274
_GDAL_NAME = re.compile(r'<Item name="DESCRIPTION" sample="(\d{1,4})"[^>]{0,80}>([^<]{1,100})</Item>')
_OME_NAME = re.compile(r'<Channel\b[^>]{0,400}?\bName="([^"]{1,100})"')
# none, CCITT (three), LZW, JPEG, deflate (two), PackBits, JPEG 2000 (three), LERC, LZMA, PNG, zstd (two), WebP, JPEG XL
_COMPRESSIONS = {
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    32946,
    32773,
    33003,
    33005,
    34712,
    34887,
    34925,
    34933,
    34926,
    50000,
    50001,
    50002,
}
_JPEG = 7
_MOST_SEGMENTS = 2**20  # strips or tiles
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of damaged files is in the error too


def is_mine(data: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF of either byte order."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def size(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright first page.

    Raises:
        BadImageError: damaged, too large, or of a kind that is not read.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = _first(file, data)
            height, width = page.imagelength, page.imagewidth
            return (width, height) if _oriented(page) >= 5 else (height, width)
    except BadImageError:
        raise
    except UNREADABLE as error:
        raise BadImageError(f"TIFF: {short(error)}") from error


def read(data: bytes, reading: Reading) -> Samples:
    """The first page; where each has one band and they are as many as the channels (not 1 or 3), the pages are those.

    Raises:
        BadImageError: damaged, too large, or of a kind that is not read.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = _first(file, data)
            several = len(_pages(file, 2)) > 1
            if several and page.samplesperpixel == 1 and reading.channels not in (1, 3):
                return _stacked(file, page, data, reading.channels)
            note = "the first of several pages is read" if several else ""
            plain = reading.channels in (1, 3) and not reading.bands
            return _samples(page, page.asarray(maxworkers=1), note, plain)
    except BadImageError:
        raise
    except UNREADABLE as error:
        raise BadImageError(f"TIFF: {short(error)}") from error


def _first(file: tifffile.TiffFile, data: bytes) -> tifffile.TiffPage:
    page = file.pages[0]
    assert isinstance(page, tifffile.TiffPage), "the first of a file"
    _check_page(page, data)
    return page


def _pages(file: tifffile.TiffFile, most: int) -> list[tifffile.TiffPage]:
    """The first pages, at most so many, without smaller copies of them."""
    pages = [file.pages[number] for number in range(min(len(file.pages), most))]
    return [page for page in pages if isinstance(page, tifffile.TiffPage) and not page.is_reduced]


def _stacked(file: tifffile.TiffFile, first: tifffile.TiffPage, data: bytes, channels: int) -> Samples:
    assert first.dtype is not None, "checked"
    pages = _pages(file, channels + 1)
    if len(pages) != channels or any(page.shape != first.shape or page.dtype != first.dtype for page in pages):
        raise BadImageError(
            f"TIFF of {len(file.pages)} pages of one band: --channels {len(file.pages)}, not {channels}"
        )
    check_cost("TIFF", first.imagewidth, first.imagelength, first.dtype.itemsize * 2 * channels, data)
    for page in pages:
        _check_page(page, data)
    samples = _samples(first, np.stack([page.asarray(maxworkers=1) for page in pages], axis=2))
    return replace(samples, colours=channels, names=_names(first))


def _check_page(page: tifffile.TiffPage, data: bytes) -> None:
    """Raises `BadImageError` unless a page can be read rightly, and for no more memory than its file bears out."""
    compression = int(page.compression)
    if compression not in _COMPRESSIONS:
        raise BadImageError(f"TIFF compressed by method {compression}, which is not read")
    if page.dtype is None or page.dtype.kind not in "iufb" or not isinstance(page.bitspersample, int):
        raise BadImageError(f"TIFF of samples of {page.bitspersample} bits, format {page.sampleformat}: not read")
    if page.imagedepth != 1 or page.tiledepth > 1:
        raise BadImageError("TIFF of a volume; wanted an image")
    check_cost("TIFF", page.imagewidth, page.imagelength, bytes_per_pixel(page), data)
    segments = len(page.dataoffsets)
    if not 0 < segments <= _MOST_SEGMENTS or len(page.databytecounts) != segments:
        raise BadImageError(f"TIFF of {segments:,} strips or tiles and {len(page.databytecounts):,} lengths")
    ends = (start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True))
    if max(ends) > len(data):
        raise BadImageError("TIFF: truncated, its pixels lie beyond the end of the file")
    if compression == 1 and not page.is_tiled:
        needed = page.imagelength * -(-page.imagewidth * page.samplesperpixel * page.bitspersample // 8)
        if page.planarconfig == 2:
            needed = page.samplesperpixel * page.imagelength * -(-page.imagewidth * page.bitspersample // 8)
        if sum(page.databytecounts) < needed:
            raise BadImageError(f"TIFF: {sum(page.databytecounts):,} bytes of pixels; wanted {needed:,}")


def bytes_per_pixel(page: tifffile.TiffPage) -> float:
    """What decoding holds at its peak: the page, a strip or tile of it, and the pixels, in a copy where they turn."""
    assert page.dtype is not None, "checked"
    stored = page.samplesperpixel * page.dtype.itemsize
    rows = min(page.rowsperstrip, page.imagelength)
    tile = page.tilewidth * page.tilelength if page.is_tiled else page.imagewidth * rows
    unpacked = stored * tile / max(page.imagewidth * page.imagelength, 1)
    made = 3 * min(page.dtype.itemsize, 2) * (1 if _oriented(page) == 1 else 2)
    # a JPEG's coefficients; and a tile larger than the image is padding, which nobody writes much of
    return (
        stored
        + made
        + unpacked * (4 if tile > page.imagewidth * page.imagelength else 3 if int(page.compression) == _JPEG else 1)
    )


def _oriented(page: tifffile.TiffPage) -> int:
    value = page.tags.valueof(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _samples(page: tifffile.TiffPage, values: np.ndarray, note: str = "", plain: bool = False) -> Samples:
    """What a page's values mean."""
    count, bits = page.samplesperpixel, page.bitspersample
    if values.ndim == 2:
        values = values[:, :, None]
    elif page.planarconfig == 2 and values.shape[0] == count:
        values = values.transpose(1, 2, 0)
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    extras = tuple(map(int, page.extrasamples))
    opacity: Opacity = ""
    if extras and extras[-1] in (_MULTIPLIED, _STRAIGHT):
        opacity = "multiplied" if extras[-1] == _MULTIPLIED else "straight"
    photometric = int(page.photometric)
    if int(page.compression) == _JPEG and photometric == _YCBCR:
        photometric = _RGB  # the decoder has converted it
    colours = count - len(extras)
    match photometric:
        case 0 | 1:
            # extra samples that are no opacity are bands of the same rank: nobody says RGB
            colours = 1 if count - bool(opacity) == 1 else count - bool(opacity)
        case 2:
            colours = 3
        case 3:
            values, bits, colours, opacity = _coloured(page.colormap, values), 8, 3, ""
        case 5 | 6 | 8 if colours == len(_MODES[photometric]) and bits == 8:
            values = _converted(values[:, :, :colours], photometric)
            colours, opacity = 3, ""
        case _:
            raise BadImageError(f"TIFF of photometric interpretation {photometric} with {bits} bits, which is not read")
    if len(extras) > bool(opacity) and photometric == _RGB and plain and not note:
        note = "samples beside RGB are left out"
    return Samples(
        values,
        bits,
        colours,
        opacity,
        inverted=photometric == _WHITE_IS_ZERO,
        missing=_nodata(page),
        names=_names(page),
        orientation=_oriented(page),
        note=note,
        what="TIFF",
    )


def _coloured(colours: object, values: np.ndarray) -> np.ndarray:
    """A palette of 16 bits is one of 8: writers shift by 8 bits or repeat them, and both end in these."""
    if colours is None:
        raise BadImageError("TIFF of a palette without colours")
    table = np.asarray(colours).T  # (2^bits, 3)
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8)[values[:, :, 0]]


def _converted(values: np.ndarray, photometric: int) -> np.ndarray:
    """To RGB by Pillow; its raw modes know that a and b of Lab have a sign."""
    mode = "".join(_MODES[photometric])
    size = values.shape[1], values.shape[0]
    return np.asarray(Image.frombytes(mode, size, np.ascontiguousarray(values).tobytes(), "raw", mode).convert("RGB"))


def _nodata(page: tifffile.TiffPage) -> float | None:
    """GDAL's value for no data, if the type has it."""
    try:
        value = float(str(page.tags.valueof(_GDAL_NODATA)).strip(" \0"))
    except ValueError:
        return None
    assert page.dtype is not None, "checked"
    if page.dtype.kind == "f":
        return value
    low, high = depth(page.dtype, page.bitspersample)
    return value if value.is_integer() and low <= value <= high else None


def _names(page: tifffile.TiffPage) -> tuple[str, ...]:
    """Names of bands by GDAL's or OME's text."""
    gdal = dict(_GDAL_NAME.findall(str(page.tags.valueof(_GDAL_NAMES, ""))[: 2**16]))
    if gdal:
        return tuple(gdal.get(str(number), "") for number in range(page.samplesperpixel))
    return tuple(_OME_NAME.findall(str(page.description)[: 2**16]))
