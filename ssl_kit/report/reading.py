"""Reads a run folder for the report: what is missing is left out, what is damaged is noted, nothing is trusted.

A run folder may come from a stranger: sizes are capped before parsing, indices are checked, and thumbnails are
accepted only as plain base64, so that nothing of a file can become markup, script or an address.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.evaluation.catalog import EVALUATIONS, JUDGED_BY
from ssl_kit.report.pictures import DUPLICATES, LOOKS, MAP, NEIGHBOURS, WRONG
from ssl_kit.report.reading_details import ClassRow, Confusion, Roc, read_classes, read_confusion, read_roc
from ssl_kit.report.reading_pictures import (
    Picture,
    read_duplicates,
    read_looks,
    read_map,
    read_neighbours,
    read_pictures,
    read_wrong,
)
from ssl_kit.report.untrusted import attempt, cell, csv_rows, json_object, text

KNOWN_FILES = ("run.json", "recipe.yaml", "metrics.csv", "results.jsonl", "skipped.csv", "pictures", "details")
_MAX_RECIPE = 256 * 2**10
_MAX_SKIPPED = 200  # rows listed; the count is of all


@dataclass
class Run:
    """What a run folder holds; every field may be empty.

    Attributes:
        metrics: column of metrics.csv -> (rows,) float64, NaN where the cell is empty.
        results: the records of results.jsonl, in their order.
        skipped: (path, reason), the first 200 of `num_skipped`.
        classes: by `--only details`, as `confusion`, `roc` and `wrong`.
        problems: one sentence per file that could not be read whole.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    num_skipped: int = 0
    pictures: list[Picture] = field(default_factory=list)
    neighbours: dict[str, Any] | None = None
    map: dict[str, Any] | None = None
    wrong: dict[str, Any] | None = None
    looks: dict[str, Any] | None = None
    duplicates: dict[str, Any] | None = None
    confusion: Confusion | None = None
    classes: list[ClassRow] = field(default_factory=list)
    roc: Roc | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name: what run.json says, otherwise the folder's name."""
        return str(self.info.get("name") or self.folder.resolve().name)

    @property
    def method(self) -> str:
        """The name of the method's class, such as SimCLR; empty where run.json does not say."""
        return str(self.info.get("method") or "").rpartition(".")[2]

    @property
    def judged_by(self) -> tuple[str, ...]:
        """The evaluations that judge the method, the first one first; of an older run, those of most methods."""
        told = self.info.get("judged_by")
        names = map(str, told) if isinstance(told, list) else ()
        return tuple(name for name in names if name in EVALUATIONS) or JUDGED_BY


def read_run(folder: Path | str) -> Run:
    """Reads what is there.

    Raises:
        UserError: there is no such folder, or nothing in it that a run writes.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected the run folder of `ssl-kit pretrain` (runs/NAME)")
    if not any((run.folder / name).exists() for name in KNOWN_FILES):
        raise UserError(f"{folder} holds no run: expected one of {', '.join(KNOWN_FILES)}; is it runs/NAME?")
    read: Callable[[str, Callable[[Path], Any], Any], Any]
    read = lambda name, reader, default: attempt(run.folder, name, reader, default, run.problems)
    run.info = read("run.json", json_object, {})
    run.recipe = read("recipe.yaml", lambda path: text(path, _MAX_RECIPE), "")
    run.metrics = read("metrics.csv", _metrics, {})
    run.results = read("results.jsonl", lambda path: _results(path, run.problems), [])
    run.skipped, run.num_skipped = read("skipped.csv", _skipped, ([], 0))
    run.confusion = read("details/confusion.csv", read_confusion, None)
    run.classes = read("details/classes.csv", read_classes, [])
    run.roc = read("details/roc.json", read_roc, None)
    run.wrong = read(f"pictures/{WRONG}", read_wrong, None)
    run.looks = read(f"pictures/{LOOKS}", read_looks, None)
    run.neighbours = read(f"pictures/{NEIGHBOURS}", read_neighbours, None)
    run.duplicates = read(f"pictures/{DUPLICATES}", read_duplicates, None)
    run.map = read(f"pictures/{MAP}", read_map, None)
    run.pictures = read_pictures(run.folder, run.problems)
    return run


def _metrics(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.StringIO(text(path), newline="")))
    names = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    return {name: np.array([cell(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _results(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    results = []
    for position, line in enumerate(text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            problems.append(f"results.jsonl, line {position}, is not JSON; left out")
            continue
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict) and record.get("evaluation"):
            record["settings"] = record["settings"] if isinstance(record.get("settings"), dict) else {}
            record["made_by"] = record["made_by"] if isinstance(record.get("made_by"), dict) else {}
            record |= {"evaluation": str(record["evaluation"]), "features": str(record.get("features"))}
            results.append(record)
        else:
            problems.append(f"results.jsonl, line {position}, is no result; left out")
    return results


def _skipped(path: Path) -> tuple[list[tuple[str, str]], int]:
    rows = csv_rows(path)
    if rows and rows[0][0] in ("path", "id"):
        rows = rows[1:]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows[:_MAX_SKIPPED]], len(rows)
