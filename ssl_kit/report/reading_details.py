"""Reads RUN/details, what `ssl-kit evaluate --only details` says of single classes, as carefully as reading.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_kit.report.untrusted import cell, count, csv_rows, json_object, share

_MAX_POINTS = 1_000  # of a curve


@dataclass(frozen=True)
class Confusion:
    """`counts` (C, C) int64 of test images: row = label, column = prediction, both in the order of `classes`."""

    classes: list[str]
    counts: np.ndarray


@dataclass(frozen=True)
class ClassRow:
    """A class among the test images; fractions in [0, 1], nan where there is nothing to divide by."""

    name: str
    num_images: int
    recall: float
    low: float
    high: float
    precision: float
    mistaken_for: str


@dataclass(frozen=True)
class RocLine:
    """Recalls at the false-positive rates of its `Roc`; `auroc` is of the exact curve."""

    name: str
    auroc: float
    recalls: list[float]


@dataclass(frozen=True)
class Roc:
    """ROC curves, one class against the rest; `macro` is the mean over classes."""

    rates: list[float]
    macro: RocLine
    classes: list[RocLine]


def read_confusion(path: Path) -> Confusion:
    """details/confusion.csv: `label` and the classes in the header, then a row per class."""
    header, *rows = csv_rows(path)
    classes = header[1:]
    if not classes or [row[0] for row in rows] != classes or any(len(row) != len(header) for row in rows):
        raise ValueError("expected one row per class of the header, in its order")
    counts = np.array([[count(value) for value in row[1:]] for row in rows], dtype=np.int64)
    return Confusion(classes, counts)


def read_classes(path: Path) -> list[ClassRow]:
    """details/classes.csv: a row per class."""
    header, *rows = csv_rows(path)
    found = []
    for row in rows:
        entry = dict(zip(header, row, strict=True))
        recall, low, high, precision = (_share_or_nan(entry[name]) for name in ("recall", "low", "high", "precision"))
        images, other = count(entry["num_images"]), entry["mistaken_for"]
        found.append(ClassRow(entry["name"], images, recall, low, high, precision, other))
    return found


def read_roc(path: Path) -> Roc:
    """details/roc.json."""
    value = json_object(path)
    rates = [share(one) for one in value["rates"]]
    if not 2 <= len(rates) <= _MAX_POINTS or rates != sorted(rates):
        raise ValueError(f"`rates` must be 2 to {_MAX_POINTS:,} ascending false-positive rates")
    classes = [_line(one, str(one["name"]), len(rates)) for one in value["classes"]]
    return Roc(rates, _line(value["macro"], "macro average", len(rates)), classes)


def _line(value: Any, name: str, points: int) -> RocLine:
    recalls = [share(one) for one in value["recalls"]]
    if len(recalls) != points:
        raise ValueError("each curve needs one recall per rate")
    return RocLine(name, share(value["auroc"]), recalls)


def _share_or_nan(value: str) -> float:
    found = cell(value)
    return found if math.isnan(found) else share(found)
