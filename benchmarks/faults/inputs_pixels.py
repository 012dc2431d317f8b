"""What the decoder makes of bombs, modes, orientations and animations: F3 to F6 of `inputs.py`."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from isolated import isolated
from PIL import Image, ImageOps

from ssl_kit.core.reading import GREY
from ssl_kit.data.decode import decode, image_size
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.opening import open_source

Cases = dict[str, str | None]
SECONDS, GROWTH = 0.050, 64 * 2**20
SIDE = 50_000


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: smooth, with a different colour in every corner, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([255 * y / height, 255 * x / width, 127 + 120 * np.sin(x / 7 + y / 11 + seed)], axis=-1)
    return waves.astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    """An image file in memory."""
    data = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes, *more: bytes) -> bytes:
    """A grey PNG that says it has that size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def tiff(width: int, height: int, pages: int = 1) -> bytes:
    """A grey TIFF, little-endian, of one strip per page."""
    data = b"II*\0" + struct.pack("<I", 8)
    for page in range(pages):
        tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
        tags += [(278, 4, height), (279, 4, 100)]
        entry = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        following = len(data) + 2 + len(entry) + 4 if page < pages - 1 else 0
        data += struct.pack("<H", len(tags)) + entry + struct.pack("<I", following)
    return data


def _sized(data: bytes, mark: bytes, offset: int, form: str, *sides: int) -> bytes:
    """A file whose size was overwritten at `offset` behind a mark."""
    place = data.index(mark) + offset
    size = struct.pack(form, *sides)
    return data[:place] + size + data[place + len(size) :]


def bomb_files() -> dict[str, bytes]:
    """Small files that would be large images, or would start a program."""
    small = picture(64, 64)
    stream = _sized(encoded(small, "JPEG2000"), b"\xff\x4f\xff\x51", 8, ">II", SIDE, SIDE)
    rows = zlib.compress(bytes(20_000_000), 9)
    fits = b"".join(
        line.ljust(80) for line in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 50000", b"END")
    )
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50000 50000\n%%EndComments\n" + b"x" * 1_000
    made = {
        "PNG": png(SIDE, SIDE, zlib.compress(bytes(10**6))),
        "PNG of 20 MB in 20 kB": png(SIDE, SIDE, rows),
        "PNG of 2^31": png(2**31 - 1, 2**31 - 1, b""),
        "PNG with a profile of 200 MB": png(
            SIDE, SIDE, b"", chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200_000_000), 9))
        ),
        "PNG with 200 texts of 1 MB": png(
            SIDE, SIDE, b"", *[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(999_000), 9))] * 200
        ),
        "TIFF": tiff(SIDE, SIDE),
        "TIFF of 2^31": tiff(2**31, 2**31),
        "TIFF of 2,000 pages": tiff(SIDE, SIDE, 2_000),
        "JPEG": _sized(encoded(small, "JPEG"), b"\xff\xc0", 5, ">HH", 65_500, 65_500),
        "progressive JPEG": _sized(encoded(small, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 65_500, 65_500),
        "GIF": _sized(encoded(small, "GIF"), b"GIF8", 6, "<HH", 65_535, 65_535),
        "BMP": _sized(encoded(small, "BMP"), b"BM", 18, "<ii", SIDE, SIDE),
        "PPM": b"P6 100000 100000 255\n" + bytes(1_000),
        "PPM of 16 bits": b"P6 100000 100000 65535\n" + bytes(1_000),
        "PBM": b"P4 1000000 1000000\n" + bytes(1_000),
        "WebP": _sized(encoded(small, "WEBP", lossless=True), b"VP8L", 9, "<I", 0x0FFFFFFF),
        "WebP animation": _webp_animation(small),
        "JPEG 2000": _sized(stream, b"ihdr", 4, ">II", SIDE, SIDE),
        "JPEG 2000 with a large code stream": stream,
        "FITS, gzip": gzip.compress(fits.ljust(2880) + bytes(20_000_000)),
        "FITS": fits.ljust(2880) + bytes(1_000),
        "PDF": b"%PDF-1.7\n1 0 obj << /Type /XObject /Subtype /Image /Width 50000 /Height 50000 >> stream\n",
        "EPS": eps,
        "EPS in DOS binary": struct.pack("<IIIIIII", 0xC6D3D0C5, 32, len(eps), 0, 0, 0, 0) + bytes(4) + eps,
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3),
        "ICO of PNG": b"\0\0\1\0\1\0\0\0\0\0\1\0 \0" + struct.pack("<II", 1_000, 22) + png(SIDE, SIDE, b""),
    }
    made |= _below_the_limit(small)
    if "AVIF" in Image.registered_extensions().values():
        made["AVIF"] = _sized(encoded(small, "AVIF"), b"ispe", 8, ">II", SIDE, SIDE)
    return made


def _below_the_limit(small: np.ndarray) -> dict[str, bytes]:
    """Whole images of fewer pixels than the limit, whose bytes do not bear them out; and two that lack theirs."""
    flat = lambda mode, side: Image.new(mode, (side, side))
    stream = encoded(small, "JPEG2000", no_jp2=True)
    sides = struct.unpack(">8I", stream[8:40])
    tile = zlib.compress(bytes(200_000_000), 1)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 10_000, 324: 134, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags.items())
    return {
        "PNG, palette with transparency": encoded(flat("P", 10_500), "PNG", transparency=0),
        "PNG, black and white": encoded(flat("1", 10_500), "PNG"),
        "GIF with transparency": encoded(flat("P", 10_500), "GIF", transparency=0),
        "TIFF, floats": encoded(flat("F", 7_800), "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, fax": encoded(flat("1", 13_000), "TIFF", compression="group4"),
        "TIFF with a tile of 200 MP": b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tile,
        "WebP of one colour": _sized(encoded(small, "WEBP", lossless=True), b"VP8L", 9, "<I", 9_999 | 9_999 << 14),
        "JPEG 2000 of 62,500 tiles": _sized(
            stream, b"\xff\x4f\xff\x51", 8, ">8I", 250, 250, *sides[2:4], 1, 1, *sides[6:]
        ),
        "JPEG of 64 MP without them": _sized(encoded(small, "JPEG"), b"\xff\xc0", 5, ">HH", 8_000, 8_000),
        "progressive JPEG of 64 MP without them": _sized(
            encoded(small, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 8_000, 8_000
        ),
    }


def _webp_animation(small: np.ndarray) -> bytes:
    frames = [Image.fromarray(small), Image.fromarray(255 - small)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    place = data.index(b"VP8X") + 12  # canvas minus one, 3 bytes each
    return data[:place] + struct.pack("<I", 16_382)[:3] * 2 + data[place + 6 :]


def bombs(place: Path, quick: bool) -> Cases:
    """F3: each is refused by both functions of the decoder, each in a process of its own, which decoded before."""
    cases, slowest, largest = Cases(), 0.0, 0

    def before() -> None:
        for kind in ("PNG", "TIFF", "JPEG", "WEBP", "JPEG2000", "GIF", "PPM", "BMP"):
            decode(encoded(picture(), kind))

    for name, data in bomb_files().items():
        for function in (image_size, decode):
            if "code stream" in name and function is image_size:
                continue  # its header says an honest size
            got = isolated(lambda function=function, data=data: refused(lambda: function(data)), 30, before)
            slowest, largest = max(slowest, got.seconds), max(largest, got.grown)
            right = (got.kind, got.text) == ("returned", "None") and got.seconds <= SECONDS and got.grown <= GROWTH
            told = f"{got.kind} {got.text}, {1_000 * got.seconds:.0f} ms, {got.grown / 2**20:.0f} MiB"
            cases[f"{name}, {function.__name__}"] = None if right else told
    cases |= {"#ms_at_most": round(1_000 * slowest, 1), "#mib_at_most": round(largest / 2**20, 1)}  # type: ignore[dict-item]
    return cases


def refused(call: Callable[[], object]) -> str | None:
    """None when a call ends with `BadImageError`."""
    try:
        return f"decoded: {str(call())[:60]}"
    except BadImageError:
        return None


def close(got: np.ndarray, wanted: np.ndarray, within: int = 1) -> str | None:
    """None when two images differ by at most `within` of 255."""
    if got.shape != wanted.shape:
        return f"shape {got.shape}, wanted {wanted.shape}"
    most = int(np.abs(got.astype(int) - wanted.astype(int)).max())
    return None if most <= within else f"differs by {most}"


def modes(place: Path, quick: bool) -> Cases:
    """F4: references by hand where there is a formula, Pillow's conversion elsewhere."""
    cases, image = Cases(), Image.fromarray(picture())
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGB"):
        stored = image.convert("RGB").convert(mode) if mode != "LAB" else _lab(image)
        for kind in ("PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000"):
            try:
                data = encoded(stored, kind, **({"lossless": True} if kind == "WEBP" else {}))
            except (OSError, KeyError, ValueError):
                continue  # the format has no such mode
            wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            cases[f"{mode} in {kind}"] = close(decode(data).image, wanted)
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    for mode in ("RGBA", "LA"):
        colour = image.convert("L" if mode == "LA" else "RGB")
        with_alpha = colour.copy()
        with_alpha.putalpha(Image.fromarray(alpha))
        share = alpha[..., None] / 255
        wanted = np.rint(share * np.asarray(colour.convert("RGB")) + (1 - share) * 255)
        for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
            cases[f"{mode} in {kind}"] = close(decode(encoded(with_alpha, kind, **options)).image, wanted)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    wanted = np.array([[[255, 255, 255], [200, 100, 50]]])
    cases["P with transparency"] = close(decode(encoded(palette, "PNG", transparency=0)).image, wanted, 0)
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        got = decode(encoded(ramp, kind), GREY).image
        cases[f"I;16 in {kind}"] = close(got, np.rint(ramp / 257)[..., None])
        cases[f"I;16 in {kind}: levels"] = None if len(np.unique(got)) >= 255 else f"{len(np.unique(got))} levels"
    whole = np.array([[0, 257, 65_535]], np.int32)
    cases["I in TIFF"] = close(decode(encoded(whole, "TIFF"), GREY).image, np.array([[[0], [1], [255]]]), 0)
    for name, factor, shift in (("F in [0, 1]", 1, 0), ("F in its own range", 1_000, -500)):
        values = np.array([[0, 0.25, 1]], np.float32) * factor + shift
        cases[name] = close(decode(encoded(values, "TIFF"), GREY).image, np.array([[[0], [64], [255]]]), 0)
    return cases


def _lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def orientations(place: Path, quick: bool) -> Cases:
    """F5: files whose tag turns them are upright, as the picture they were made of."""
    cases = Cases()
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in range(1, 9):
            tagged = Image.fromarray(picture(40, 72))
            tagged.getexif()[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)  # undoes what the tag asks for
            stored = Image.fromarray(np.asarray(ImageOps.exif_transpose(tagged)))
            tags = Image.Exif()
            tags[0x0112] = orientation
            options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
            data = encoded(stored, kind, exif=tags, **options)
            what = close(decode(data).image, picture(40, 72), 12 if kind == "JPEG" else 0)
            cases[f"{orientation} in {kind}"] = what or (None if image_size(data) == (40, 72) else "size not upright")
    return cases


def first_frames(place: Path, quick: bool) -> Cases:
    """F6: the first of three frames, and one id for the file."""
    cases = Cases()
    frames = [Image.fromarray(picture(20, 30, seed)) for seed in (0, 30, 60)]
    for kind, name in (("GIF", "a.gif"), ("WEBP", "a.webp"), ("PNG", "a.png"), ("TIFF", "a.tif")):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        first = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        frames_in_file = getattr(Image.open(io.BytesIO(data)), "n_frames", 1)
        cases[f"{kind}: pixels"] = close(decode(data).image, first) if frames_in_file == 3 else "not three frames"
        folder = place / kind
        folder.mkdir()
        for number in range(2):
            (folder / f"{number}{name}").write_bytes(data)
        cases[f"{kind}: once"] = None if len(open_source(folder)) == 2 else "not once"
    return cases
