"""Decoding against Pillow, closed forms and hand-made damage."""

import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from ssl_kit.core.reading import ANY, GREY, Reading
from ssl_kit.data.decode import decode, image_size
from ssl_kit.data.limits import MAX_PIXELS, BadImageError, jpeg_header

ORIENTATION = 0x0112


def picture(height=48, width=64, seed=0):
    """(H, W, 3) uint8: smooth, with a different colour in every corner, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([255 * y / height, 255 * x / width, 127 + 120 * np.sin(x / 7 + y / 11 + seed)], axis=-1)
    return waves.astype(np.uint8)


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def difference(one, two):
    return np.abs(one.astype(int) - two.astype(int)).max()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 30}, {"restart_marker_rows": 1}]
)
def test_jpeg_equals_pillow(options):
    data = encoded(picture(), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data).image, expected)
    assert decode(data).image.flags.c_contiguous
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert decode(data, reading=GREY).image.shape == (48, 64, 1)
    assert difference(decode(data, reading=GREY).image[:, :, 0], grey) <= 4  # stored luma against luma of clipped RGB


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_modes_equal_pillow(mode, kind):
    stored = Image.fromarray(picture()).convert(mode)
    try:
        data = encoded(stored, kind)
    except OSError:
        pytest.skip(f"{kind} holds no {mode}")
    opened = Image.open(io.BytesIO(data))
    for channels, target in ((3, "RGB"), (1, "L")):
        expected = np.asarray(opened.convert("RGB").convert(target))
        got = decode(data, Reading(channels)).image
        assert got.shape == (48, 64, channels) and got.dtype == np.uint8
        assert difference(got.squeeze(), expected) <= (4 if kind == "JPEG" else 0)


def test_lab_white_and_black():
    lab = np.array([[[255, 0, 0], [0, 0, 0]]], dtype=np.uint8)  # L = 100 and 0 at a = b = 0 (stored signed)
    got = decode(encoded(Image.fromarray(lab, "LAB"), "TIFF")).image
    assert got[0, 0].min() >= 254 and got[0, 1].max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(kind, mode):
    colour = Image.fromarray(picture()).convert("L" if mode == "LA" else "RGB")
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    with_alpha = colour.copy()
    with_alpha.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = decode(encoded(with_alpha, kind, **options)).image.astype(float)
    share = alpha[..., None] / 255
    expected = share * np.asarray(colour.convert("RGB")) + (1 - share) * 255
    assert np.abs(got - expected).max() <= 1
    grey = decode(encoded(with_alpha, kind, **options), reading=GREY).image
    assert grey[0, 0, 0] == 255  # alpha 0


def test_palette_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    got = decode(encoded(palette, "PNG", transparency=0)).image
    assert got.tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_stay(kind):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for channels in (1, 3):
        got = decode(encoded(Image.fromarray(ramp), kind), Reading(channels)).image
        assert got.dtype == np.uint16 and np.array_equal(got, np.repeat(ramp[..., None], channels, axis=2))


def test_32_bits_and_floats():
    values = np.array([[0.0, 0.25, 1.0]], dtype=np.float32)
    tiff = lambda array, reading=GREY: decode(encoded(Image.fromarray(array), "TIFF"), reading).image[0, :, 0].tolist()
    within = lambda *ends: GREY.within({ANY: (ends,)})
    assert tiff(values) == [0, 16384, 65535]
    assert tiff(values * 1000 - 500, within(-500, 500)) == [0, 16384, 65535]
    assert tiff(np.array([[0, 257, 65535]], dtype=np.int32), within(0, 65535)) == [0, 257, 65535]  # 16 bits in 32
    assert tiff(np.array([[-(2**31), 0, 2**31 - 1]], dtype=np.int32)) == [0, 32768, 65535]
    with pytest.raises(BadImageError, match=r"floats from -500 to 500, which have no full depth: --range -500,500"):
        tiff(values * 1000 - 500)
    with pytest.raises(BadImageError, match="NaN"):
        tiff(np.array([[0, np.nan]], dtype=np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    upright = Image.fromarray(picture(40, 72))
    # the inverse of what the tag asks for; 6 and 8 undo each other, the others are their own inverse
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    tagged = Image.fromarray(picture(40, 72))
    tagged.getexif()[ORIENTATION] = undo
    stored = ImageOps.exif_transpose(tagged)
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.asarray(stored)), kind, exif=exif(orientation), **options)
    got = decode(data)
    assert got.image.shape == (40, 72, 3) and image_size(data) == (40, 72)
    assert difference(got.image, np.asarray(upright)) <= (12 if kind == "JPEG" else 0)
    small = decode(data, smallest=(20, 36))
    assert small.image.shape[:2] == (round(40 * small.scale_y), round(72 * small.scale_x))


def test_scaled_decoding_is_the_smallest_that_suffices():
    data = encoded(picture(375, 500), "JPEG", quality=95)
    full = decode(data).image.astype(float)
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        wanted = int(random.integers(8, 420)), int(random.integers(8, 560))
        got = decode(data, smallest=wanted)
        assert got.image.shape[:2] == (round(375 * got.scale_y), round(500 * got.scale_x))
        least = [min(n, w) for n, w in zip((375, 500), wanted, strict=True)]
        fits = lambda n: math.ceil(375 * n / 8) >= least[0] and math.ceil(500 * n / 8) >= least[1]
        eighths = next(n for n in range(1, 9) if math.ceil(375 * n / 8) == got.image.shape[0])
        assert fits(eighths) and (eighths == 1 or not fits(eighths - 1))
        seen.add(eighths)
        rows = (np.arange(got.image.shape[0]) + 0.5) / got.scale_y - 0.5
        columns = (np.arange(got.image.shape[1]) + 0.5) / got.scale_x - 0.5
        there = full[np.clip(rows.round(), 0, 374).astype(int)][:, np.clip(columns.round(), 0, 499).astype(int)]
        assert np.abs(got.image - there)[..., :2].mean() < 3  # the smooth channels: same picture, no shift
    assert len(seen) >= 6


def test_scaled_decoding_of_a_turned_image():
    stored = encoded(picture(200, 400), "JPEG", exif=exif(6))
    got = decode(stored, smallest=(100, 200))  # upright: 400 high, 200 wide
    assert got.image.shape == (400, 200, 3) and got.scale_x == 1
    got = decode(stored, smallest=(100, 25))
    assert got.image.shape == (100, 50, 3) and got.scale_y == 0.25
    odd = decode(encoded(picture(201, 403), "JPEG", exif=exif(6)), smallest=(100, 50))  # rounds differently per axis
    assert odd.image.shape == (101, 51, 3) and (odd.scale_y, odd.scale_x) == (101 / 403, 51 / 201)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"])
def test_truncated_files_are_bad(kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    assert decode(data).image.shape == (40, 40, 3)
    passed = []
    for cut in np.linspace(0, len(data) - 24, 100).astype(int):  # the last bytes of a PNG are no pixels
        try:
            decode(data[:cut])
        except BadImageError as error:
            assert str(error)
        else:
            passed.append(cut)
    assert not passed


def test_damage_raises_nothing_else():
    random = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000"):
        data = encoded(picture(24, 24), kind)
        for _ in range(100):
            damaged = bytearray(data)
            for place in random.integers(0, len(data), 3):
                damaged[place] ^= 1 << random.integers(8)
            try:
                assert image_size(bytes(damaged)) and decode(bytes(damaged)).image.dtype == np.uint8
            except BadImageError as error:
                assert "\n" not in str(error) and len(str(error)) < 200


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xd8\xff", b"<html>404</html>", b"%PDF-1.4 ...", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 999],
)
def test_what_is_no_image(data):
    for function in (decode, image_size):
        with pytest.raises(BadImageError):
            function(data)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_bombs_are_refused_from_the_header():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    jpeg = bytearray(encoded(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data in (png, bytes(jpeg)):
        for function in (decode, image_size):
            began = time.perf_counter()
            with pytest.raises(BadImageError, match=r"pixels"):
                function(data)
            assert time.perf_counter() - began < 0.5
    assert MAX_PIXELS < 50_000 * 50_000


def test_a_png_is_judged_before_its_texts_are_unpacked():
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    texts = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000))) * 80  # 72 MB: Pillow itself gives up at 64
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + texts + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for function in (decode, image_size):
        with pytest.raises(BadImageError, match=r"50,000 x 50,000 pixels"):
            function(png)


def moved(png, name, content):
    """A PNG with one more chunk, behind its pixels."""
    return png[:-12] + chunk(name, content) + png[-12:]


def test_the_size_of_a_png_is_read_without_its_pixels():
    png = encoded(picture(), "PNG")
    start = png.index(b"IDAT")
    broken = png[: start + 20] + bytes(200) + png[start + 220 :]
    assert image_size(broken) == (48, 64)
    with pytest.raises(BadImageError):
        decode(broken)


def test_a_png_is_turned_wherever_it_says_so():
    png, tags = encoded(picture(40, 72), "PNG"), exif(6).tobytes()
    profile = b"\nexif\n  %d\n%s\n" % (len(tags), tags.hex().encode())  # as ImageMagick writes it
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    for name, content in (
        (b"eXIf", tags.removeprefix(b"Exif\0\0")),
        (b"iTXt", xmp),
        (b"tEXt", b"Raw profile type exif\0" + profile),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    ):
        for file in (moved(png, name, content), moved(moved(png, b"tEXt", b"a\0b"), name, content)):
            assert image_size(file) == (72, 40) and decode(file).image.shape == (72, 40, 3), name
    assert image_size(moved(png, b"tEXt", b"a\0b")) == (40, 72)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_bands_of_rows_are_the_whole(mode, monkeypatch):
    ramp = np.linspace(0, 1, 48 * 64).reshape(48, 64)
    values = {
        "I;16": (65_535 * ramp).astype(np.uint16),
        "I": (2e9 * ramp).astype(np.int32),
        "F": ramp.astype(np.float32),
    }
    image = Image.fromarray(values[mode]) if mode in values else Image.fromarray(picture()).convert(mode)
    file = encoded(
        image, "PNG" if mode in ("1", "P", "LA", "RGBA") else "TIFF", **({"transparency": 3} if mode == "P" else {})
    )
    whole = [decode(file, Reading(channels)).image for channels in (1, 3)]
    for band in (1, 64 * 5, 64 * 48 - 1):
        monkeypatch.setattr("ssl_kit.data.decode._BAND", band)
        monkeypatch.setattr("ssl_kit.data.samples._BAND", band)
        assert all(np.array_equal(decode(file, Reading(image.shape[2])).image, image) for image in whole)


def test_a_jpeg_says_how_it_is_coded_whatever_pads_it():
    for options, frame in (({}, 0xC0), ({"progressive": True}, 0xC2)):
        data = encoded(picture(), "JPEG", **options)
        assert jpeg_header(data)[1] == frame
        place = data.index(b"\xff" + bytes([frame]))
        padded = data[:place] + b"\xff\xff" + data[place:]
        assert jpeg_header(padded)[1] == frame and np.array_equal(decode(padded).image, decode(data).image)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(decode(data).image, np.asarray(frames[0]))


def test_padding_before_the_end_of_a_jpeg_is_harmless():
    data = encoded(picture(), "JPEG")
    padded = data[:-2] + 50 * b"\x11" + data[-2:]
    assert np.array_equal(decode(padded).image, decode(data).image)


def test_half_images_never_pass(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(AssertionError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encoded(picture(), "PNG"))


def test_a_name_says_nothing():
    png = encoded(picture(), "PNG")  # ImageNet has a PNG called .JPEG
    assert np.array_equal(decode(png).image, picture())


def test_tags_are_searched_before_the_first_scan_only():
    data = encoded(picture(64, 48), "JPEG", exif=exif(6))
    assert jpeg_header(data)[0] < len(data) and data[jpeg_header(data)[0] :][:2] == b"\xff\xda"
    plain = encoded(picture(64, 48), "JPEG")
    assert image_size(plain + b"Exif\x00\x00") == (64, 48)
    assert jpeg_header(b"\xff\xd8 no segments here") == (19, 0)
