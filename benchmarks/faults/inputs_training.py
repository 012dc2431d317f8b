"""F12 of `inputs.py`: a training on images of which 1 % are broken ends with the score of the sound ones alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
from harness import Rows, run_warmed

from ssl_kit.core import machine
from ssl_kit.core.random import permutation
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.verbs.pretrain import pretrain

IMAGES, SCORED, EPOCHS = 5_000, 2_000, 6
METHOD = {
    "class_path": "ssl_kit.methods.simclr.SimCLR",
    "init_args": {
        "encoder": {
            "class_path": "ssl_kit.encoders.encoder.Encoder",
            "init_args": {"name": "resnet18_small", "args": {"channels": [16, 32, 64, 128]}},
        },
        "temperature": 0.2,
        "projection": [512, 128],
        "optim": {"name": "sgd", "lr": 0.5, "lr_per": 256, "weight_decay": 5e-4, "warmup_epochs": 1},
    },
}


def one_percent(rows: Rows, data: Path, place: Path, seeds: int, quick: bool) -> None:
    """Adds the row F12; where images are decoded when needed, every seed; where they are in memory, one."""
    images, scored = (400, 200) if quick else (IMAGES, SCORED)
    broken = prepare(data, place, images, scored)
    log, epochs = place / "log.txt", 1 if quick else EPOCHS
    scores: dict[str, list[float]] = {"sound": [], "with 1 % broken": []}
    named = []
    run = lambda name, folder, seed, memory: run_warmed(
        lambda: train(place / name, folder, place / "scored", epochs, seed, memory), log
    )
    for seed in range(seeds):
        for name, values in scores.items():
            folder = place / f"run-{name}-{seed}"
            run(name, folder, seed, False)
            values.append(json.loads((folder / "score.json").read_text()))
            if name != "sound":
                named.append(skipped(folder) == broken)
            print(f"F12: seed {seed}, {name}: {values[-1]:.4f}", flush=True)
    for name in scores:
        run(name, place / f"run-memory-{name}", 0, True)
    weights = [(place / f"run-memory-{name}" / "encoder" / "model.safetensors").read_bytes() for name in scores]
    sound, with_broken = (np.array(values) for values in scores.values())
    difference = float(with_broken.mean() - sound.mean())
    spread = float(np.sqrt((sound.var(ddof=1) + with_broken.var(ddof=1)) / seeds)) if seeds > 1 else float("inf")
    right = [abs(difference) <= 2 * spread, all(named), weights[0] == weights[1]]
    rows.add(
        {
            "id": "F12",
            "what": "1 % broken: kNN score of the sound files within seed noise, all named, equal weights in memory",
            "tried": len(right),
            "survived": sum(right),
            "sound": [round(value, 4) for value in sound.tolist()],
            "with_broken": [round(value, 4) for value in with_broken.tolist()],
            "difference": round(difference, 4),
            "twice_its_standard_error": round(2 * spread, 4) if np.isfinite(spread) else None,
            "broken": len(broken),
        }
    )
    print(f"F12: {rows.rows[-1]}", flush=True)


def prepare(data: Path, place: Path, images: int, scored: int) -> set[str]:
    """Copies images: two folders to train on, one with 1 % broken and one without those, and one to score."""
    train, test = (sorted((data / part).glob("*/*.jpg")) for part in ("train", "test"))
    order = permutation(0, 0, len(train))
    broken = set()
    for number, row in enumerate(order[:images]):
        file = train[row]
        name = f"{file.parent.name}/{file.name}"
        for folder in ("sound", "with 1 % broken"):
            (place / folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        if number % 100 == 0:
            broken.add(name)
            content = file.read_bytes()
            damage = (b"", b"<html>", content[: len(content) // 2], content[:-2] + b"\0" * 200)[number // 100 % 3]
            (place / "with 1 % broken" / name).write_bytes(damage)
            continue
        for folder in ("sound", "with 1 % broken"):
            shutil.copy(file, place / folder / name)
    for part, files, rows in (
        ("train", train, order[images : images + scored]),
        ("test", test, permutation(0, 0, len(test))[:scored]),
    ):
        for row in rows:
            target = place / "scored" / part / files[row].parent.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[row], target)
    return broken


def train(images: Path, folder: Path, scored: Path, epochs: int, seed: int, memory: bool) -> None:
    """One run and its kNN score; `memory`: whether images may be decoded once, into RAM."""
    machine._SHARE = 1.0 if memory else 0.0
    pretrain(
        str(images),
        method=METHOD,
        run=str(folder),
        image_size=32,
        grow={0: 16, max(1, epochs // 2): 24},
        epochs=epochs,
        batch_size=128,
        seed=seed,
        precision="float32",
        evaluate_every=epochs,
        max_bad=0.02,
        threads=1,
    )
    made = evaluate(str(folder), str(scored), only="knn", baselines=(), leaks=False)
    (folder / "score.json").write_text(json.dumps(made["results"][0]["metrics"]["top1"]))


def skipped(folder: Path) -> set[str]:
    """The files that a run has named as undecodable."""
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as file:
        return {row[0] for row in list(csv.reader(file))[1:]}
