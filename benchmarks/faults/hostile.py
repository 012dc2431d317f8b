"""Files that somebody wrote to do harm, and thousands of damaged ones: S1, S3, S4 and X1 to X5 of docs/reliability.md.

    python benchmarks/faults/hostile.py --json runs/faults-hostile.json       # about an hour; goes on where it stopped
    python benchmarks/faults/hostile.py --quick
    python benchmarks/faults/hostile.py --only S4 --minutes 30 --json ...     # fuzzing for so long, more of it later

Everything runs in children of this process, which has imported all it needs and does nothing itself. S1: each of the
checkpoints and encoder folders is refused within 1 s and 64 MiB of memory, and the file that its code would make is not
there. S3: refused with exit code 2 before anything foreign is imported. S4: no exception but the declared ones
(UserError, DamagedError), no hang of 2 s, no death of the process. X1: index files that are not what we signed never
get to FAISS's reader, and the vectors answer. "folders": as S4 for encoder and embeddings folders, and never a silent
load under the old manifest.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no pool of threads may be left in this process

import argparse
import collections
import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hostile_files
import hostile_recipes
import indexes
import numpy as np
from fuzz import Trials, prepare
from harness import Rows
from hostile_indexes import ENTERED, OURS
from isolated import Outcome, isolated, survey
from PIL import Image

from ssl_kit.embeddings.signing import VARIABLE
from ssl_kit.encoders.encoder import Encoder

SECONDS, GROWTH = 1.0, 64 * 2**20  # that a refusal may take
LIMIT = 2.0  # seconds: more is a hang
RIGHT = ("refused", "answered", "unchanged")
BATCH = 500  # trials between two writes of the rows
COUNTS = {"X1": 20_000, "folders": 2_000}
QUICK = {"X1": 200, "folders": 40}


def s1(place: Path, rows: Rows, quick: bool) -> None:
    """Hostile checkpoints and encoder folders."""
    must(isolated(lambda: hostile_files.honest(place), 120))

    def before() -> None:
        hostile_files.resume(place / "honest")
        Encoder.load(place / "honest" / "encoder")

    must(isolated(before, 120))
    slowest, largest = 0.0, 0
    for kind in ("checkpoints", "encoders"):
        tried, failed = 0, []
        for number, case in enumerate(getattr(hostile_files, kind)(place)):
            if quick and number % 5:
                continue
            got = isolated(case.load, 10 * SECONDS, before)
            slowest, largest = max(slowest, got.seconds), max(largest, got.grown)
            right = got.kind == "refused" and got.seconds <= SECONDS and got.grown <= GROWTH
            touched = (place / "canary").exists()
            tried += 1
            if not right or touched:
                failed.append(
                    f"{case.name}: {got.kind}, {got.seconds:.2f} s, {got.grown / 2**20:.0f} MiB {got.text[:80]}"
                )
        figures = {"seconds_at_most": round(slowest, 3), "mib_at_most": round(largest / 2**20, 1)}
        tell(rows, f"S1/{kind}", f"hostile {kind} refused", tried, failed, figures)


def s3(place: Path, rows: Rows, quick: bool) -> None:
    """Recipes and options that name foreign code."""
    canary, data = hostile_recipes.own_module(place), place / "photos"
    data.mkdir()
    (place / "recipes").mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data / f"{number}.png")
    attempts = list(hostile_recipes.attempts(place / "recipes"))
    chosen = attempts[:: 40 if quick else 1]
    told = survey(lambda number: hostile_recipes.tried(chosen[number], data, place / "run"), range(len(chosen)), 60.0)
    failed = [what for _, what in told if what != "refused"]
    if canary.exists():
        failed.append("the canary was touched")
    tell(rows, "S3", "recipes and options that name foreign code, refused before any import", len(chosen), failed)


def fuzz(place: Path, rows: Rows, name: str, what: str, count: int) -> None:
    """Trials number 0 to `count` of a reader, those that the rows lack."""
    row = begun(rows, name, what)
    trial = {"X1": "index", "folders": "folder"}[name.partition("/")[0]]
    while row["tried"] < count:
        numbers = range(row["tried"], min(row["tried"] + BATCH, count))
        note(rows, row, surveyed(place, trial, numbers))


def s4(place: Path, rows: Rows, minutes: float, batch: int = BATCH) -> None:
    """Every reader in turn, until so many minutes of one core were spent, those of former calls included."""
    row = begun(rows, "S4", "damaged checkpoints, encoders, manifests, Parquet parts, index files, recipes and tables")
    while row.get("minutes", 0.0) < minutes:
        began = _children_seconds()
        note(rows, row, surveyed(place, "any", range(row["tried"], row["tried"] + batch)))
        row["minutes"] = round(row.get("minutes", 0.0) + (_children_seconds() - began) / 60, 3)
        rows.add(row)


def _children_seconds() -> float:
    """Of processor time, of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def surveyed(place: Path, trial: str, numbers: Iterable[int]) -> list[tuple[int, str]]:
    """Some trials in children of their own."""
    made: list[Trials] = []
    make = lambda number: getattr(made[0], trial)(number)  # noqa: PLW0108 (made when the child is ready)
    return list(survey(make, list(numbers), LIMIT, lambda: made.append(Trials(place))))


def begun(rows: Rows, name: str, what: str) -> dict[str, Any]:
    """The row of that name, with nothing tried if it is new."""
    there = next((row for row in rows.rows if row["id"] == name), None)
    return there or {"id": name, "what": what, "tried": 0, "survived": 0}


def note(rows: Rows, row: dict[str, Any], told: list[tuple[int, str]]) -> None:
    """Adds trials to a row: what they ended with, and the first faults in words."""
    kinds = collections.Counter(what if what in RIGHT else "fault" for _, what in told)
    row["tried"] += len(told)
    row["survived"] += len(told) - kinds.pop("fault", 0)
    for kind, number in kinds.items():
        row[kind] = row.get(kind, 0) + number
    if row["id"] == "X1":
        entries = sum(what.startswith(ENTERED) for _, what in told)
        row["faiss_reader_entered"] = row.get("faiss_reader_entered", 0) + entries
    for number, what in told:
        if what not in RIGHT:
            row["failed"] = "; ".join(filter(None, (row.get("failed", "")[:2_000], f"{number}: {what}")))
    rows.add(row)
    print(f"{row['id']}: {row['survived']:,} of {row['tried']:,} {row.get('failed', '')}", flush=True)


def cases(place: Path, rows: Rows, name: str, what: str, make: Callable[[Path], indexes.Cases]) -> None:
    """A row of named cases, all in one child."""
    got = must(isolated(lambda: (place / "cases.json").write_text(json.dumps(make(place))), 300))
    assert got.kind == "returned", got
    ended = json.loads((place / "cases.json").read_text())
    failed = [f"{case}: {wrong}" for case, wrong in ended.items() if wrong is not None]
    tell(rows, name, what, len(ended), failed)


def tell(
    rows: Rows, name: str, what: str, tried: int, failed: list[str], figures: dict[str, Any] | None = None
) -> None:
    """Adds a finished row."""
    row = {"id": name, "what": what, "tried": tried, "survived": tried - len(failed), **(figures or {})}
    rows.add(row | ({"failed": "; ".join(failed)[:4_000]} if failed else {}))
    print(f"{name}: {tried - len(failed)} of {tried} {'; '.join(failed)[:400]}", flush=True)


def must(outcome: Outcome) -> Outcome:
    """Raises when something honest did not end well."""
    if outcome.kind != "returned":
        raise RuntimeError(f"an honest call ended with {outcome}")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="some of everything, half a minute")
    parser.add_argument("--only", default="S1,S3,X1,X2,X3,X4,X5,folders,S4")
    parser.add_argument("--minutes", type=float, default=30.0, help="of one core, for S4")
    parser.add_argument("--count", type=int, help="trials of X1 and of folders")
    arguments = parser.parse_args()
    os.environ[VARIABLE] = OURS.hex()
    rows, only, quick = Rows(arguments.json), arguments.only.split(","), arguments.quick
    counts = {name: arguments.count or number for name, number in (QUICK if quick else COUNTS).items()}
    done = {row["id"].partition("/")[0] for row in rows.rows}
    base = Path(tempfile.mkdtemp(prefix="hostile-"))
    steps: dict[str, Callable[[Path], None]] = {
        "S1": lambda place: s1(place, rows, quick),
        "S3": lambda place: s3(place, rows, quick),
        "X2": lambda place: cases(place, rows, "X2", "mismatches refused, both hashes shown", indexes.mismatches),
        "X3": lambda place: cases(place, rows, "X3", "vectors without a direction", indexes.without_direction),
        "X4": lambda place: cases(place, rows, "X4", "index files give the same ids", indexes.round_trips),
        "X5": lambda place: cases(place, rows, "X5", "odd ids and questions", indexes.questions),
    }
    try:
        for name, step in steps.items():
            if name in only and name not in done:
                (base / name).mkdir()
                step(base / name)
        if set(only) & {"X1", "folders", "S4"}:
            (base / "fuzz").mkdir()
            must(isolated(lambda: prepare(base / "fuzz"), 300))
        if "X1" in only:
            fuzz(base / "fuzz", rows, "X1", "index files that are not what we signed", counts["X1"])
        if "folders" in only:
            fuzz(base / "fuzz", rows, "folders", "damaged encoder and embeddings folders", counts["folders"])
        if "S4" in only:
            s4(base / "fuzz", rows, 0.01 if quick else arguments.minutes, 150 if quick else BATCH)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
