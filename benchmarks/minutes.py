"""`ssl-kit pretrain DATA --minutes 10` with nothing else said, beside what needs no training, on sets of several kinds.

    python benchmarks/minutes.py data/cifar10 [--sets cifar10,mnist64,textures,solar] [--minutes 10] [--seeds 3]
                                 [--keep runs/minutes] [--scores FOLDER] [--json FILE]

    cifar10     32 px, colour, 50,000 photographs
    mnist64     64 px, grey: 4,000 digits at random places, the built-in set; pixels do not know them
    textures    64 px, colour: 4,000 drawn ones of ten kinds in random colours, angles, scales; colour says nothing
    solar       300 px, grey: 1,970 solar cells, defective or not (`solar.py`)

How the choice is made (`ssl_kit/verbs/budget.py`) was found on the first three, in shorter runs scored on images held
out of train for cifar10; the test images of all are read here only. A row is a set and seed: k of kNN and l2 of the
linear probe are chosen on a part of train. `wins` says whether both are above pixels, PCA and the untrained network,
intervals apart. Restartable: rows are kept under --scores, with the machine and commit they were made by.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import solar
from methods import kept
from numpy.random import Generator
from PIL import Image, ImageFilter
from record import RECORDS, tell

SIDE = 64  # pixels of what is drawn
KINDS, TRAIN, TEST = 10, 400, 100  # textures: kinds, and images of each
STRAW = ("pixels", "pca", "random_init")
Row = dict[str, Any]


def textures(folder: Path) -> None:
    """Ten kinds in random colours, angles and scales."""
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("test", TEST)):
        for kind in range(KINDS):
            for number in range(count):
                _save(Image.fromarray(texture(kind, generator)), folder / part / f"kind{kind}" / f"{number:03d}.png")


def texture(kind: int, generator: Generator) -> np.ndarray:
    """One image (64, 64, 3), uint8: a pattern between two colours, under noise."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    angle, rate, phase = generator.uniform(0, np.pi), generator.uniform(0.08, 0.16), generator.uniform(0, 2 * np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = lambda place, at=0.0: np.sin(2 * np.pi * rate * place + at)
    points = generator.uniform(0, SIDE, (int(generator.integers(25, 45)), 2))
    away = np.sort(np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1]), axis=-1)
    made = {
        0: lambda: wave(u, phase),  # stripes
        1: lambda: wave(u, phase) * wave(v),  # bumps
        2: lambda: np.sign(wave(u, phase) * wave(v)),  # a chessboard
        3: lambda: _blurred(generator, 1.0),  # fine grain
        4: lambda: _blurred(generator, 3.0),  # coarse grain
        5: lambda: wave(np.hypot(x - points[0, 0], y - points[0, 1])),  # rings
        6: lambda: away[..., 1] - away[..., 0],  # cells
        7: lambda: (away[..., 0] < 3).astype(float),  # dots
        8: lambda: wave(u, 8 * _scaled(_blurred(generator, 4.0))),  # marble
        9: lambda: np.maximum(abs(u * rate % 1 - 0.5) < 0.12, abs(v * rate % 1 - 0.5) < 0.12).astype(float),  # a grid
    }[kind]()
    first, second = generator.random(3), generator.random(3)
    while abs(first - second).sum() < 0.6:
        second = generator.random(3)
    mixed = _scaled(made)[..., None]
    shown = (first * mixed + second * (1 - mixed)) * generator.uniform(0.7, 1.0)
    return np.asarray(255 * (shown + generator.normal(0, 0.06, shown.shape)).clip(0, 1), np.uint8)


def _blurred(generator: Generator, radius: float) -> np.ndarray:
    noise = Image.fromarray(generator.integers(0, 256, (SIDE, SIDE), np.uint8))
    return np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), float)


def _scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (np.ptp(values) + 1e-9)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def prepared(name: str, data: Path, keep: Path) -> tuple[str, str]:
    """(what is pretrained on, what is evaluated on); made if need be."""
    folder = keep / "sets" / name
    if name == "cifar10":
        return str(data / "train"), str(data)
    if name == "mnist64":
        return "mnist64:train", "mnist64"
    if not folder.is_dir():
        {"textures": textures, "solar": lambda place: solar.prepare(place, validate=False)}[name](folder)
    return str(folder / ("unlabelled.csv" if name == "solar" else "train")), str(folder)


def scored(run: Path, images: str, labelled: str, minutes: float, seed: int) -> list[Row]:
    """The row of one set and seed."""
    call = lambda *words: subprocess.run([sys.executable, "-m", "ssl_kit", *words], check=True)
    if not (run / "encoder" / "encoder.json").is_file():
        anew = [images, "--minutes", f"{minutes:g}", "--seed", str(seed), "--overwrite"]
        call("pretrain", "--run", str(run), *(["--resume"] if (run / "checkpoints").is_dir() else anew))
    call("evaluate", str(run), labelled, "--only", "knn,linear", "--baselines", "random_init,pixels,pca,patches")
    record = json.loads((run / "run.json").read_text())
    row: Row = {
        "verdict": record["verdict"]["state"],
        "epochs": record["epochs"],
        "fitted": len(record.get("steps_fitted", [])),
    }
    row["peak_gb"] = round(record["peak_memory"]["host"] / 1e9, 2)
    wins = []
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    for name in ("knn", "linear"):
        of = {
            one["features"]: one["metrics"]
            for one in results
            if one["evaluation"] == name and one["settings"].get("chosen", True)
        }
        row |= {name: of["encoder"]["top1"], f"{name}_interval": _interval(of["encoder"])}
        best = max(STRAW, key=lambda one: of[one]["top1"])
        row |= {f"{name}_best": best, f"{name}_straw": of[best]["top1"], f"{name}_patches": of["patches"]["top1"]}
        wins.append(of["encoder"]["top1_low"] > of[best]["top1_high"])
    return [row | {"wins": all(wins)}]


def _interval(metrics: dict[str, float]) -> str:
    return f"{metrics['top1_low']:.3f}..{metrics['top1_high']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10: train/ and test/ in class folders")
    parser.add_argument("--sets", default="cifar10,mnist64,textures,solar")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/minutes"))
    parser.add_argument("--scores", type=Path, default=RECORDS / "minutes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for name in arguments.sets.split(","):
            images, labelled = prepared(name, arguments.data, arguments.keep)
            run = arguments.keep / f"{name}-{seed}"
            make = lambda: scored(run, images, labelled, arguments.minutes, seed)  # noqa: B023
            row = kept(arguments.scores / f"{name}-{seed}.json", make)[0]
            rows.append({"id": f"minutes/{name}/{seed}", **row})
    tell(rows, arguments.json)


if __name__ == "__main__":
    main()
