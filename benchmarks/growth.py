"""How the cost of each command grows with the number of images, from 10,000 to 1,000,000.

    python benchmarks/growth.py FOLDER [--only listing,pack] [--quick] [--json FILE]     # goes on where it was stopped

FOLDER gets what is missing of FOLDER/10000, /30000, /100000, /1000000: so many JPEGs of 32 px, 64 different ones, each
written out (hard links of one file are one image), 1,000 in a folder, two folders deep; 4 kB of disk each. Vectors are
mixtures of 1,000 Gaussians (scale.py) in 32 dimensions, 64 for the index.

Every figure is of a process of its own, after its imports. Processor seconds are what is fitted: those of the clock, on
a machine that others use too, are of the others as well. `exponent` is the slope of log seconds over log images,
`last` that between the two largest sets. What is measured is kept in docs/numbers/growth.jsonl; a line that is removed
is measured again. The picture is docs/pictures/growth.png.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import ROOT, commit_now, tell

KEPT, PICTURE = ROOT / "docs" / "numbers" / "growth.jsonl", ROOT / "docs" / "pictures" / "growth.png"
MILLION, LESS = (10_000, 100_000, 1_000_000), (10_000, 30_000, 100_000)
BAR = 1.1
_IN_FOLDER, _PICTURES = 1_000, 64
Work = Callable[[], Any]


def images(folder: Path, count: int) -> Path:
    """The images, made where they are not there."""
    root = folder / str(count)
    if root.is_dir():
        return root
    data = []
    for number in range(_PICTURES):
        file = io.BytesIO()
        coarse = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(file, "JPEG", quality=80)
        data.append(file.getvalue())
    making = root.with_name(f"{count}.part")
    for first in range(0, count, _IN_FOLDER):
        place = making / f"{first // _IN_FOLDER // 50:02d}" / f"{first // _IN_FOLDER % 50:02d}"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + _IN_FOLDER):
            (place / f"img_{number:07d}.jpg").write_bytes(data[number % _PICTURES])
    making.rename(root)
    return root


def embedded(place: Path, count: int, seed: int = 0) -> str:
    """A folder of embeddings without images."""
    from scale import mixture

    from ssl_kit.embeddings.embeddings import Embeddings

    vectors = np.ascontiguousarray(mixture(count + seed)[seed:, :32])
    ids = [f"{number:07d}" for number in range(count)]
    about = {"preprocessing": {"channels": 3}}
    Embeddings(vectors, np.full(count, -1), (), ids, about).save(place / str(seed))
    return str(place / str(seed))


def listing(folder: Path, count: int, place: Path) -> Work:
    """The names of all images under a folder."""
    from ssl_kit.data.listing import list_images

    root = images(folder, count)
    return lambda: list_images(root)


def opening(folder: Path, count: int, place: Path) -> Work:
    """The same as a source: labels, sizes of a few."""
    from ssl_kit.data.opening import open_source

    root = images(folder, count)
    return lambda: open_source(root, in_memory=False)


def table(folder: Path, count: int, place: Path) -> Work:
    """A .csv of paths and labels as a source."""
    from ssl_kit.data.opening import open_source

    root = images(folder, count)
    number = lambda row: f"{row // _IN_FOLDER // 50:02d}/{row // _IN_FOLDER % 50:02d}/img_{row:07d}.jpg"
    rows = (f"{root}/{number(row)},class {row % 10}\n" for row in range(count))
    (place / "list.csv").write_text("path,label\n" + "".join(rows))
    return lambda: open_source(place / "list.csv", in_memory=False)


def decoding(folder: Path, count: int, place: Path) -> Work:
    """All images into memory, which comes before the first step where they fit."""
    from ssl_kit.data.opening import open_source

    root = images(folder, count)
    return lambda: open_source(root, in_memory=True)


def first_step(folder: Path, count: int, place: Path) -> Work:
    """From the listed images, which are decoded when needed, to the end of the first step of a small SimCLR."""
    import ssl_kit.verbs.pretrain as training
    from ssl_kit.training.loop import Loop

    root = images(folder, count)
    opened = training.open_source(root, in_memory=False)
    training.open_source = lambda *_, **__: opened  # listed already
    ended = Loop.on_train_batch_end

    class Done(Exception):
        """The step is made."""

    def end(self: Loop, *given: Any, **named: Any) -> None:
        ended(self, *given, **named)
        raise Done

    Loop.on_train_batch_end = end  # type: ignore[method-assign]
    method: Any = {"class_path": "ssl_kit.methods.simclr.SimCLR"}
    method["init_args"] = {"encoder": {"name": "resnet18_small", "args": {"channels": [4, 4, 8, 8]}}}

    def work() -> None:
        try:
            training.pretrain(str(root), run=str(place / "run"), epochs=1, batch_size=256, method=method)
        except Done:
            return

    return work


def packing(folder: Path, count: int, place: Path) -> Work:
    """`pack --keep`."""
    from ssl_kit.verbs.pack import pack

    root = images(folder, count)
    return lambda: pack(str(root), str(place / "out"), keep=True)


def embedding(folder: Path, count: int, place: Path) -> Work:
    """`embed` by a ResNet-18 of 4 to 8 channels."""
    from ssl_kit.encoders.encoder import Encoder
    from ssl_kit.verbs.embed import embed

    root = images(folder, count)
    Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}).save(place / "encoder")
    return lambda: embed(str(place / "encoder"), str(root), out=str(place / "out"))


def index(folder: Path, count: int, place: Path) -> Work:
    """Inverted lists of 8-bit codes: trained, filled, tuned and measured."""
    from scale import mixture

    from ssl_kit.embeddings.index import build_index, lists_key

    vectors = np.ascontiguousarray(mixture(count)[:, :64])
    return lambda: build_index(vectors, lists_key(count, "SQ8"))


def duplicates(folder: Path, count: int, place: Path) -> Work:
    """`duplicates`, by features alone."""
    from ssl_kit.verbs.duplicates import duplicates

    emb = embedded(place, count)
    return lambda: duplicates(emb)


def drift(folder: Path, count: int, place: Path) -> Work:
    """`drift` between two halves of so many vectors."""
    from ssl_kit.verbs.drift import drift

    old, new = embedded(place, count // 2), embedded(place, count // 2, seed=1)
    return lambda: drift(old, new)


STEPS = {
    "listing": (listing, MILLION),
    "opening": (opening, MILLION),
    "table": (table, MILLION),
    "first step": (first_step, MILLION),
    "decoding": (decoding, LESS),
    "pack": (packing, LESS),
    "embed": (embedding, LESS),
    "index": (index, MILLION),
    "duplicates": (duplicates, MILLION),
    "drift": (drift, MILLION),
}


def one(step: str, count: int, folder: Path) -> dict[str, Any]:
    """A figure, of this process."""
    from ssl_kit.core.console import spoken

    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    now = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with tempfile.TemporaryDirectory() as place, spoken(False):
        work = STEPS[step][0](folder, count, Path(place))
        before, began, processor = now(), time.perf_counter(), used()
        work()
        seconds, cpu = time.perf_counter() - began, used() - processor
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    about = {"step": step, "images": count, "seconds": round(seconds, 3), "cpu": round(cpu, 3)}
    return {**about, "grown_mib": round(max(0, grown) / 2**20), "load": round(os.getloadavg()[0], 1)}


def rows_of(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each step: its seconds at every size, and how they grow."""
    rows = []
    for step, (work, _) in STEPS.items():
        found = sorted((one for one in kept if one["step"] == step), key=lambda one: one["images"])
        if len(found) < 2:
            continue
        sizes, cpu = (np.log([one[key] for one in found]) for key in ("images", "cpu"))
        last = float(np.diff(cpu)[-1] / np.diff(sizes)[-1])
        row: dict[str, Any] = {"id": f"growth/{step.replace(' ', '_')}", "what": (work.__doc__ or "").strip()}
        row |= {"images": " ".join(f"{one['images']:,}" for one in found)}
        row |= {"cpu_s": " ".join(f"{one['cpu']:.3g}" for one in found)}
        row |= {"clock_s": " ".join(f"{one['seconds']:.3g}" for one in found), "grown_mib": found[-1]["grown_mib"]}
        row |= {"most_s": found[-1]["cpu"], "load": " ".join(f"{one['load']:.0f}" for one in found)}
        rows.append(
            {**row, "exponent": round(float(np.polyfit(sizes, cpu, 1)[0]), 2), "last": round(last, 2), "bar": BAR}
        )
    return rows


def draw(kept: list[dict[str, Any]]) -> None:
    """Processor seconds over images, both by powers of ten."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for step, (_, sizes) in STEPS.items():
        found = sorted((one for one in kept if one["step"] == step), key=lambda one: one["images"])
        label = f"{step} (to {sizes[-1]:,})" if sizes is LESS else step
        axes.loglog([one["images"] for one in found], [one["cpu"] for one in found], "o-", label=label, ms=3, lw=1)
    axes.loglog(MILLION, [0.02 * count / MILLION[0] for count in MILLION], "k:", lw=1, label="slope 1")
    axes.set(xlabel="images", ylabel="processor seconds")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(PICTURE, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the images: 5 GB")
    parser.add_argument("--only", help="steps, with commas")
    parser.add_argument("--quick", action="store_true", help="10,000 images and fewer; nothing is kept")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]), arguments.folder)))
        return
    kept = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() and not arguments.quick else []
    commit = "" if arguments.quick else commit_now()
    for step, (_, sizes) in STEPS.items():
        for count in (1_000, 10_000) if arguments.quick else sizes:
            known = any((one["step"], one["images"]) == (step, count) for one in kept)
            if known or (arguments.only and step not in arguments.only.split(",")):
                continue
            images(arguments.folder, count)
            command = [sys.executable, __file__, str(arguments.folder), "--one", step, str(count)]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            kept.append(json.loads(made) | {"commit": commit})
            print(made, flush=True)
            if not arguments.quick:
                with open(KEPT, "a") as file:
                    file.write(json.dumps(kept[-1]) + "\n")
    if not arguments.quick:
        draw(kept)
    tell(rows_of(kept), arguments.json)


if __name__ == "__main__":
    main()
