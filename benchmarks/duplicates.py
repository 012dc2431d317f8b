"""Planted copies among real images: how many `ssl-kit duplicates` finds, and what else it calls a copy.

    python benchmarks/duplicates.py ENCODER data/cifar10/train [--quick] [--json FILE]
    python benchmarks/duplicates.py --kinds data/cifar10/train [--quick] [--json FILE]

500 exact copies of files, and 500 near-copies of other images (JPEG at quality 50, 90 % of each side, 5 % brighter or
darker, in turn) are put beside `--count` images. What is found among the images that were not touched is counted as
false, though CIFAR-10 has duplicates of its own: --sheet FILE draws 200 of them, each beside the image of its group
that is most like it, for people to judge. --test FOLDER counts leaks: images of FOLDER that are in DATA too.

With --kinds four sets of different kinds are made, a tenth of each of another texture, and an encoder is trained for a
few minutes on each: strokes of a pen, digits, noise of many grains, and the photographs of the folder. No two images of
the first three are alike. On such sets one limit for all images fails, whatever it is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ssl_kit.core.random import permutation
from ssl_kit.data.decode import decode
from ssl_kit.data.listing import folder_of_images, unescape
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import pixels
from ssl_kit.evaluation.alignment import EDITS, correlations, edits, thumbnail
from ssl_kit.verbs.duplicates import duplicates
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.pretrain import pretrain


def plant(data: Path, folder: Path, count: int, planted: int) -> dict[str, tuple[str, str]]:
    """Copies `count` images and plants copies; id of the copy -> (id of the original, kind)."""
    ids = folder_of_images(data).ids
    chosen = [ids[row] for row in permutation(7, 0, len(ids))[:count]]
    for name in chosen:
        target = folder / "own" / os.fsdecode(unescape(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / os.fsdecode(unescape(name)), target)
    (folder / "planted").mkdir()
    made = {}
    for number, name in enumerate(chosen[: 2 * planted]):
        original = folder / "own" / os.fsdecode(unescape(name))
        kind = "exact" if number < planted else EDITS[number % len(EDITS)]
        suffix = {"exact": original.suffix, "jpeg": ".jpg"}.get(kind, ".png")
        copy = folder / "planted" / f"{number:05d}{suffix}"
        if kind == "exact":
            shutil.copyfile(original, copy)
        elif kind == "jpeg":
            Image.open(original).convert("RGB").save(copy, quality=50)
        else:
            Image.fromarray(edits(decode(original.read_bytes()).image, number, seed=8)[kind]).save(copy)
        made[f"planted/{copy.name}"] = (f"own/{name}", kind)
    return made


def drawing(number: int, side: int = 96) -> np.ndarray:
    """(side, side, 3) uint8: one to three strokes, boxes or ellipses of a pen on white paper."""
    rng, page = np.random.default_rng([1, number]), Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(page)
    for _ in range(int(rng.integers(1, 4))):
        x, y = (int(value) for value in rng.integers(4, side - 30, 2))
        width, height = (int(value) for value in rng.integers(12, side // 2, 2))
        box, colour = (
            (x, y, min(side - 4, x + width), min(side - 4, y + height)),
            tuple(map(int, rng.integers(0, 160, 3))),
        )
        kind = int(rng.integers(3))
        if kind == 2:
            pen.line(box, fill=colour, width=4)
        else:
            (pen.rectangle, pen.ellipse)[kind](box, outline=colour, width=3)
    return np.asarray(page)


def texture(number: int, side: int = 96) -> np.ndarray:
    """(side, side, 3) uint8: noise of a random grain, direction, colour and contrast."""
    rng, waves = np.random.default_rng([2, number]), np.fft.fftfreq(side)
    angle, grain, stretched = rng.uniform(0, np.pi), rng.uniform(0.03, 0.4), rng.uniform(1, 4)
    along = waves * np.cos(angle) + waves[:, None] * np.sin(angle)
    across = waves[:, None] * np.cos(angle) - waves * np.sin(angle)
    shape = np.exp(-((along / grain) ** 2) - (across * stretched / grain) ** 2)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) * shape).real
    grey = noise / noise.std() * rng.uniform(15, 45)
    return (rng.uniform(60, 200, 3) + grey[..., None]).clip(0, 255).astype(np.uint8)


def make_kinds(place: Path, photographs: Path, count: int) -> list[Path]:
    """Four folders of `count` images, the last tenth of each of another texture."""
    digits, photos = open_source("mnist5k:train"), open_source(str(photographs), in_memory=False)
    order = [permutation(3, 0, len(source)) for source in (digits, photos)]
    of = {
        "drawings": (drawing, texture),
        "digits": (
            lambda number: pixels(digits, order[0][number])[:, :, 0],
            lambda number: texture(number, 28)[:, :, 0],
        ),
        "textures": (texture, drawing),
        "photographs": (lambda number: pixels(photos, order[1][number]), lambda number: texture(number, 32)),
    }
    for name, (most, others) in of.items():
        (place / name).mkdir(parents=True)
        for number in range(count):
            made = most(number) if number < 0.9 * count else others(number)
            Image.fromarray(made).save(place / name / f"{number:05d}.png")
    return [place / name for name in of]


def kinds_rows(photographs: Path, count: int, planted: int, steps: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for folder in make_kinds(Path(place) / "sets", photographs, count):
            run = str(Path(place) / "runs" / folder.name)
            pretrain(str(folder), run=run, batch_size=64, image_size=32, trainer={"max_steps": steps})
            rows += planted_rows(run, folder, count, planted, None, f"duplicates/{folder.name}")
    return rows


def draw_sheet(path: Path, folder: Path, sets: list[list[str]], count: int = 200, side: int = 64) -> None:
    """`count` images of the groups `sets`, drawn at random, each beside the most alike of its group; 10 in a row."""
    flagged = [(name, members) for members in sets for name in members]
    drawn = random.Random(1).sample(flagged, min(count, len(flagged)))
    small = lambda name: decode((folder / os.fsdecode(unescape(name))).read_bytes()).image
    page = Image.new("RGB", (10 * (2 * side + 10), -(-len(drawn) // 10) * (side + 4)), "white")
    for place, (name, members) in enumerate(drawn):
        others = [other for other in members if other != name]
        seen = np.stack([thumbnail(small(other)) for other in others])
        nearest = others[int(correlations(np.repeat(thumbnail(small(name))[None], len(others), 0), seen).argmax())]
        y, x = divmod(place, 10)
        for number, shown in enumerate((name, nearest)):
            picture = Image.fromarray(small(shown)).resize((side, side))
            page.paste(picture, (x * (2 * side + 10) + number * (side + 2), y * (side + 4)))
    page.save(path)


def planted_rows(
    encoder: str, data: Path, count: int, planted: int, sheet: Path | None, name: str = "duplicates"
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder, emb = Path(place) / "images", Path(place) / "emb"
        made = plant(data, folder, count, planted)
        embed(encoder, str(folder), out=str(emb))
        began = time.perf_counter()
        said = duplicates(str(emb), csv=None)
        seconds = time.perf_counter() - began
        if sheet is not None:
            own = [[one["id"] for one in members if one["id"] not in made] for members in said["groups"]]
            draw_sheet(sheet, folder, [members for members in own if len(members) > 1])
    group = {one["id"]: number for number, members in enumerate(said["groups"]) for one in members}
    found = {copy: group.get(copy, -1) == group.get(original, -2) for copy, (original, _) in made.items()}
    originals = {original for original, _ in made.values()}
    false = [image for image in group if image not in made and image not in originals]
    untouched = count - len(originals)
    rows = []
    for kind in ("exact", *EDITS):
        hits = [found[copy] for copy, (_, own) in made.items() if own == kind]
        rows.append(row(f"{name}/{kind}", f"planted copies found: {kind}", float(np.mean(hits)), len(hits)))
    near = [found[copy] for copy, (_, own) in made.items() if own != "exact"]
    rows.append(row(f"{name}/near", "planted copies found: all near ones", float(np.mean(near)), len(near)))
    rows.append(row(f"{name}/false", "untouched images called copies", len(false) / max(1, untouched), untouched))
    rows.append(
        row(f"{name}/by chance", "images that the verb expects to be called so", said["limits"]["by_chance"], count)
    )
    limits = f"cosine {said['limits']['cosine']:.3f}, correlation {said['limits']['correlation']:.3f}"
    rows.append(row(f"{name}/seconds", f"seconds for the verb ({limits})", seconds, count + 2 * planted))
    return rows


def leak_rows(encoder: str, data: Path, test: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        parts = [str(Path(place) / name) for name in ("test", "train")]
        for part, images in zip(parts, (test, data), strict=True):
            embed(encoder, str(images), out=part)
        said = duplicates(parts[0], parts[1])
    return [
        row("duplicates/leaks", "test images that are in train too", said["leaked"] / said["images"], said["images"])
    ]


def row(name: str, what: str, value: float, images: int) -> dict[str, Any]:
    return {"id": name, "what": what, "value": round(value, 4), "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", nargs="?", help="run folder or encoder folder")
    parser.add_argument("--kinds", action="store_true", help="on four sets that are made, without ENCODER")
    parser.add_argument("data", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--planted", type=int, default=500)
    parser.add_argument("--sheet", type=Path, help="picture of images that were called copies")
    parser.add_argument("--quick", action="store_true", help="3,000 images, 150 copies of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count, planted = (3_000, 150) if arguments.quick else (arguments.count, arguments.planted)
    if arguments.kinds:
        made = (600, 60, 100) if arguments.quick else (2_000, 250, 600)
        rows = kinds_rows(arguments.data, *made)
    else:
        rows = planted_rows(arguments.encoder, arguments.data, count, planted, arguments.sheet)
    if arguments.test is not None:
        rows += leak_rows(arguments.encoder, arguments.data, arguments.test)
    for line in rows:
        print(f"{line['id']:<34}{line['value']:>10}  {line['what']}, {line['images']:,} images")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
