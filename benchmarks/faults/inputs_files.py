"""Folders of broken and of changing files: F1, F2 and F11 of `inputs.py`."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from inputs_pixels import encoded, picture
from isolated import told

from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.embed import embed
from ssl_kit.views.recipe import plain

Cases = dict[str, str | None]
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp", "JPEG2000": "jp2"}


def small_encoder(place: Path) -> str:
    """A folder with a tiny encoder of 16 pixels."""
    torch.manual_seed(0)
    return str(Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)).save(place / "encoder"))


def noise(number: int) -> bytes:
    """A PNG like no other."""
    return encoded(np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8), "PNG")


def good(folder: Path, count: int) -> None:
    """Sound PNGs, all different."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:05d}.png").write_bytes(noise(number))


def bad_files(quick: bool) -> Iterator[tuple[str, bytes, bool]]:
    """Name, content, and whether it is bad for certain (a flipped bit may leave a sound image)."""
    draw = random.Random("F1")
    jpeg = encoded(picture(40, 40), "JPEG")
    for name, data in {
        "empty.jpg": b"",
        "one byte.png": b"\x89",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text.png": b"no image",
        "zeros.jpg": bytes(10_000),
        "pdf.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "half of two.jpg": jpeg[: len(jpeg) // 2]
        + encoded(picture(40, 40, 9), "JPEG")[len(jpeg) // 2 :][: -len(jpeg) // 4],
    }.items():
        yield name, data, True
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for kind, ending in KINDS.items():
        whole = encoded(noise, kind)
        count = 4 if quick else 15
        for cut in np.linspace(0, len(whole) - 24, count).astype(int):  # the last bytes of a PNG are no pixels
            yield f"cut/{kind} {cut}.{ending}", whole[:cut], True
        for flip in range(count):
            flipped = bytearray(encoded(picture(40, 40), kind))
            for _ in range(draw.choice((1, 3, 8))):
                flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            yield f"flipped/{kind} {flip}.{ending}", bytes(flipped), False


def broken(place: Path, quick: bool) -> Cases:
    """F1: every bad file is named, in memory and from disk; strict stops with a path; substitutes are the same."""
    photos, certain, possible = place / "photos", set(), set()
    good(photos / "good", 40 if quick else 300)
    for name, data, bad in bad_files(quick):
        file = photos / "bad" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        (certain if bad else possible).add(f"bad/{name}")
    kept = open_source(photos, max_bad=1.0, in_memory=True)
    named = {name for name, _ in kept.bad.rows}
    assert kept.in_memory
    sizes = {name: image.shape for name, image in zip(kept.ids(), kept.read(slice(None)), strict=True)}
    embed(small_encoder(place), str(photos), out=str(place / "emb"), max_bad=1.0, precision="float32")
    with open(place / "emb" / "skipped.csv", newline="", encoding="utf-8") as file:
        told_later = {row[0] for row in list(csv.reader(file))[1:]}
    later = set(Embeddings.load(place / "emb").ids)
    cases = Cases()
    for name in sorted(certain | possible):
        right = name in named and name in told_later and name not in later
        whole = name in possible and sizes.get(name, (0,))[-1] == 3 and name in later and name not in told_later
        cases[name] = None if right or whole else f"named {name in named}, {name in told_later}"
    strict, words = told(lambda: open_source(photos, max_bad=0))
    cases["strict, in memory"] = None if strict == "refused" and "bad/" in words else words
    out = str(place / "strict")
    strict, words = told(lambda: embed(str(place / "encoder"), str(photos), out=out, max_bad=0, precision="float32"))
    cases["strict, embed"] = None if strict == "refused" and "bad/" in words else words
    one, two = (_substituted(photos) for _ in range(2))
    cases["substitutes, twice"] = None if all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)) else "differ"
    return cases


def _substituted(photos: Path) -> list[np.ndarray]:
    """The rows that a training batch of all images holds, and its pixels."""
    source = open_source(photos, max_bad=1.0, in_memory=False)
    loader = ViewLoader(
        source, [np.arange(0, len(source), 3), np.arange(1, len(source), 3)], (plain((8, 8)),), bad="replace"
    )
    batch = next(iter(loader))
    return [batch["key"].index.numpy().copy(), batch["views"][0].numpy().copy()]


def budget(place: Path, quick: bool) -> Cases:
    """F2: 2,000 files of which 2 or 3 are bad, where one in a thousand may be."""
    photos, encoder, cases = place / "photos", small_encoder(place), Cases()
    good(photos, 1_997)
    for number in range(3):
        (photos / f"bad {number}.png").write_bytes(b"no image")
        if number == 0:
            (photos / "one more.png").write_bytes(encoded(picture(20, 20), "PNG"))
        if number < 1:
            continue
        if number == 2:
            (photos / "one more.png").unlink()
        for name, call in {
            "in memory": lambda: open_source(photos, max_bad=0.001, in_memory=True),
            "embed": lambda number=number: embed(
                encoder, str(photos), out=str(place / f"emb{number}"), max_bad=0.001, precision="float32"
            ),
        }.items():
            kind, words = told(call)
            if number == 1:
                cases[f"2 of 2,000, {name}"] = None if kind == "returned" else words
            else:
                exact = kind == "refused" and "3 of 2,000" in words and "0.1%" in words and "bad 0.png" in words
                cases[f"3 of 2,000, {name}"] = None if exact else f"{kind}: {words}"
    return cases


def changing(place: Path, quick: bool) -> Cases:
    """F11: between listing and reading files go, shrink, or become what blocks; embedding and training go on."""
    encoder, cases = small_encoder(place), Cases()
    alter: dict[str, Callable[[Path], object]] = {
        "gone": lambda path: path.unlink(),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
        "empty": lambda path: path.write_bytes(b""),
        "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        "a page": lambda path: path.write_text("<html>"),
    }
    for number, (name, change) in enumerate(alter.items()):
        photos = place / f"photos{number}"
        good(photos, 20)
        source = open_source(photos, max_bad=1.0, in_memory=False)
        change(photos / "00007.png")
        cases[f"{name}: embed"] = _embedded(source, encoder)
        source = open_source(photos, max_bad=1.0, in_memory=False) if name in ("cut", "empty", "a page") else source
        cases[f"{name}: training"] = _trained(source)
    photos = place / "another size"
    good(photos, 20)
    source = open_source(photos, max_bad=1.0, in_memory=False)
    (photos / "00007.png").write_bytes(encoded(picture(90, 50), "PNG"))
    cases["another size: embed"] = None if len(_embedding(source, encoder)) == 20 else "lost"
    return cases


def _embedding(source: Source, encoder: str) -> Embeddings:
    from ssl_kit.embeddings.embeddings import embed as embed_at_once

    return embed_at_once(Encoder.load(encoder), source, precision="float32")


def _embedded(source: Source, encoder: str) -> str | None:
    made = _embedding(source, encoder)
    right = len(made) == 19 and [name for name, _ in made.skipped] == ["00007.png"]
    return None if right else f"{len(made)} of 19, {made.skipped}"


def _trained(source: Source) -> str | None:
    """One batch of 10 that holds the altered file: filled up, and the file is named."""
    loader = ViewLoader(source, [np.arange(10), np.arange(10, 20)], (plain((8, 8)),), bad="replace")
    batch = next(iter(loader))
    rows = batch["key"].index.tolist()
    right = len(rows) == 10 and 7 not in rows and [name for name, _ in source.bad.rows] == ["00007.png"]
    return None if right else f"rows {rows}, {source.bad.rows}"
