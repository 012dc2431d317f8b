"""Broken images, bombs, odd names and special files through every reader of images: F1 to F12 of docs/reliability.md.

    python benchmarks/faults/inputs.py --json runs/faults-inputs.json                    # F1 to F11, a few minutes
    python benchmarks/faults/inputs.py --quick
    python benchmarks/faults/inputs.py --f12 data/cifar10 --json runs/faults-inputs.json # 6 trainings

The corpus is generated: more than 300 image files beside those that only fill folders. Each row says how many cases it
has and how many ended as they must. F12 trains on CIFAR-10 images, 1 % of them broken, and on the sound ones alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no pool of threads may be left in this process

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import inputs_files as files
import inputs_names as names
import inputs_pixels as pixels
from harness import Rows
from isolated import isolated

Cases = dict[str, str | None]
WHAT: dict[str, tuple[str, Callable[[Path, bool], Cases]]] = {
    "F1": ("broken files: named, skipped or a stop, never half an image", files.broken),
    "F2": ("skip budget of 0.1 %, exact count", files.budget),
    "F3": ("bombs refused from the header, 64 MiB and 50 ms each", pixels.bombs),
    "F4": ("modes within 1/255 of the reference; 16 bits rescaled", pixels.modes),
    "F5": ("EXIF orientations 1 to 8", pixels.orientations),
    "F6": ("animations and several pages: the first, once", pixels.first_frames),
    "F7": ("special files and links: never opened, each inode once", names.special),
    "F8": ("names through listing, Parquet, index, CSV: the same bytes", names.names),
    "F9": ("one name in two folders, one content twice", names.same),
    "F10": ("nothing, one image, fewer than a batch: an error before the first step", names.too_few),
    "F11": ("files that change or go between listing and reading", files.changing),
}


def row(rows: Rows, name: str, place: Path, quick: bool) -> None:
    """One row, in a child; `place` is a new folder."""
    what, make = WHAT[name]
    told = place.with_suffix(".json")
    got = isolated(lambda: told.write_text(json.dumps(make(place, quick))), 1_200)
    if got.kind != "returned":
        raise RuntimeError(f"{name}: {got}")
    cases: Cases = json.loads(told.read_text())
    figures = {key.removeprefix("#"): value for key, value in cases.items() if key.startswith("#")}
    cases = {key: value for key, value in cases.items() if not key.startswith("#")}
    failed = [f"{case}: {wrong}" for case, wrong in cases.items() if wrong is not None]
    made = {"id": name, "what": what, "tried": len(cases), "survived": len(cases) - len(failed), **figures}
    rows.add(made | ({"failed": "; ".join(failed)[:4_000]} if failed else {}))
    print(f"{name}: {made['survived']} of {made['tried']} {figures or ''} {'; '.join(failed)[:600]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer files of each kind")
    parser.add_argument("--only", default=",".join(WHAT))
    parser.add_argument("--f12", metavar="CIFAR10", help="folder with train/ and test/: makes row F12")
    parser.add_argument("--seeds", type=int, default=3, help="of F12")
    arguments = parser.parse_args()
    rows, place = Rows(arguments.json), Path(tempfile.mkdtemp(prefix="inputs-"))
    try:
        if arguments.f12 is not None:
            from inputs_training import one_percent

            one_percent(rows, Path(arguments.f12), place, arguments.seeds, arguments.quick)
            return
        done = {row["id"] for row in rows.rows}
        for name in arguments.only.split(","):
            if name not in done:
                (place / name).mkdir()
                row(rows, name, place / name, arguments.quick)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
