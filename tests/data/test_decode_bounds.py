"""What images take when they are decoded: as much as their header tells, and no more than their bytes mean."""

import io
import struct
import zlib

import pytest
import tifffile
from grown import MIB, grown, needs_proc, refused
from PIL import Image

from ssl_kit.data import tiff as of_tiff
from ssl_kit.data.decode import decode, image_size
from ssl_kit.data.limits import BadImageError, bytes_per_pixel

pytestmark = needs_proc


def flat(mode, side, kind, **options):
    """An image of one colour in a file."""
    data = io.BytesIO()
    Image.new(mode, (side, side)).save(data, kind, **options)
    return data.getvalue()


def resized(data, mark, offset, form, *sides):
    """A file whose size was overwritten at `offset` behind a mark."""
    place, size = data.index(mark) + offset, struct.pack(form, *sides)
    return data[:place] + size + data[place + len(size) :]


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(side, depth, colour, *chunks):
    """A PNG of pixels that are 0."""
    bits = depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    rows = zlib.compressobj(6)
    data = b"".join(rows.compress(bytes(1 + side * bits // 8)) for _ in range(side)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags, data):
    """A TIFF of one strip or tile, whose place is tag 273 or 324: {number: value}."""
    start = 8 + 2 + 12 * len(tags) + 4
    place = {number: start if number in (273, 324) else value for number, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(place.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def tiff_of_one_tile():
    data = zlib.compress(bytes(200_000_000), 1)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 10_000, 324: 0, 325: len(data)}
    return tiff(tags, data)


def tiles_of_one_pixel():
    small = flat("RGB", 64, "JPEG2000", no_jp2=True)
    sides = struct.unpack(">8I", small[8:40])
    return resized(small, b"\xff\x4f\xff\x51", 8, ">8I", 250, 250, *sides[2:4], 1, 1, *sides[6:])


PALETTE = chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256))
IMAGES = {
    "a palette with transparency": lambda: png(10_500, 8, 3, *PALETTE),
    "black and white": lambda: png(10_500, 1, 0),
    "16 bits": lambda: png(9_500, 16, 0),
    "colours": lambda: png(8_000, 8, 6),
    "TIFF, floats": lambda: flat("F", 7_800, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, fax": lambda: flat("1", 13_000, "TIFF", compression="group4"),
    "TIFF, turned": lambda: flat("L", 9_500, "TIFF", compression="tiff_lzw", tiffinfo={274: 6}),
    "TIFF of one tile": tiff_of_one_tile,
    "GIF": lambda: flat("P", 10_500, "GIF", transparency=0),
    "WebP": lambda: resized(flat("RGB", 64, "WEBP", lossless=True), b"VP8L", 9, "<I", 9_999 | 9_999 << 14),
    "AVIF": lambda: resized(flat("RGB", 64, "AVIF"), b"ispe", 8, ">II", 9_000, 9_000),
    "JPEG 2000": lambda: resized(flat("RGB", 64, "JPEG2000"), b"ihdr", 4, ">II", 9_000, 9_000),
    "JPEG 2000 of tiles": tiles_of_one_pixel,
    "JPEG": lambda: resized(flat("RGB", 64, "JPEG"), b"\xff\xc0", 5, ">HH", 8_000, 8_000),
    "progressive JPEG": lambda: (
        resized(flat("RGB", 64, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 9_000, 9_000) + bytes(10**6)
    ),
    "PPM": lambda: b"P6 9000 9000 255\n" + bytes(1_000),
    "BMP": lambda: resized(flat("RGB", 64, "BMP"), b"BM", 18, "<ii", 9_000, 9_000),
}


def seen(path):
    """What both functions of the decoder refuse."""
    data, sized = path.read_bytes(), False
    try:
        image_size(data)
        sized = True
        decode(data)
    except BadImageError:
        assert not sized, "image_size takes it"
        return decode(data)
    raise AssertionError("both take it")


def seen_small(path):
    for kind in ("PNG", "TIFF", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "PPM", "BMP"):
        decode(flat("RGB", 16, kind))
    return None if path is None else seen(path)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path, name):
    (tmp_path / "image").write_bytes(IMAGES[name]())
    told = refused(seen_small, None, tmp_path / "image")
    assert "the limit for such a file is" in told or "cannot hold" in told


def texts_of_64_megabytes():
    text = ("x" * 240_000 + "\U0001f600").encode()  # 4 bytes for each character then
    packed = zlib.compress(text)
    return png(16, 8, 0, *[chunk(b"iTXt", b"%d\0\1\0\0\0" % key + packed) for key in range(250)])


def test_texts_of_a_png_are_not_unpacked(tmp_path):
    (tmp_path / "image").write_bytes(texts_of_64_megabytes())
    kind, text, size = grown(decoded, None, tmp_path / "image")
    assert kind == "returned" and size <= 8 * MIB, (text, size / MIB)


def decoded(path):
    return decode(flat("RGB", 16, "PNG") if path is None else path.read_bytes()).image.shape


HONEST = {
    "PNG, RGBA": lambda side: flat("RGBA", side, "PNG"),
    "PNG, 16 bits": lambda side: flat("I;16", side, "PNG"),
    "TIFF, floats in one strip": lambda side: flat("F", side, "TIFF", compression="tiff_lzw", tiffinfo={278: side}),
    "TIFF, turned": lambda side: flat("RGB", side, "TIFF", compression="tiff_lzw", tiffinfo={274: 6}),
    "GIF": lambda side: flat("P", side, "GIF", transparency=0),
    "WebP": lambda side: flat("RGBA", side, "WEBP", lossless=True, method=0),
    "AVIF": lambda side: flat("RGB", side, "AVIF", speed=10, subsampling="4:4:4"),
    "JPEG 2000": lambda side: flat("RGB", side, "JPEG2000"),
    "JPEG, inks": lambda side: flat("CMYK", side, "JPEG", progressive=True),
}


def both(path):
    return seen_small(None) if path is None else decode(path.read_bytes()).image.shape


@pytest.mark.parametrize("name", HONEST)
def test_no_image_takes_more_than_its_header_tells(tmp_path, name):
    side = 2_400
    (tmp_path / "image").write_bytes(data := HONEST[name](side))
    if name.startswith("TIFF"):
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            told = of_tiff.bytes_per_pixel(file.pages[0]) * side**2
    else:
        with Image.open(io.BytesIO(data)) as image:
            told = bytes_per_pixel(image) * side**2
    kind, text, size = grown(both, None, tmp_path / "image")
    assert kind == "returned" and size <= told + 20 * MIB, (text, size / side**2)


def test_honest_images_of_few_bytes_are_taken():
    page = io.BytesIO()
    Image.new("1", (4_960, 7_016)).save(page, "TIFF", compression="group4")  # A4 at 600 dpi
    assert image_size(page.getvalue()) == (7_016, 4_960) and len(page.getvalue()) < 40_000
    assert image_size(png(4_900, 8, 2)) == (4_900, 4_900)  # a screenshot of 24 MP
    photo = resized(flat("RGB", 64, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 8_700, 11_600)
    assert image_size(photo + bytes(10**7)) == (8_700, 11_600)  # 100 MP in 10 MB
