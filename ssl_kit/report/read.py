"""Reads a run folder for the report: what is missing is left out, what is damaged is noted, nothing is trusted.

A run folder may come from a stranger: sizes are capped before parsing, indices are checked, thumbnails are accepted as
plain base64 only, so that nothing of a file can become markup, script or an address. `attempt` turns every exception
that damaged content can cause into one sentence: a file that is cut short costs its own section and not the report.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.locking import given_up
from ssl_kit.core.named import check_shown
from ssl_kit.core.owned import BROKEN_OFF, GOING_ON
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.evaluation.catalog import EVALUATIONS, JUDGED_BY
from ssl_kit.evaluation.result import ClassScore
from ssl_kit.report.pictures import DUPLICATES, KINDS, LOOKS, MAP, NEIGHBOURS, WRONG

VIEWS = "views"  # pictures/views.png: drawn before the first step
MAX_TEXT = 64 * 2**20  # bytes read of a CSV file or of results.jsonl
_MAX_RECIPE = 256 * 2**10
_MAX_COUNT = 2**53  # of images; larger numbers are no counts, and overflow int64
_MAX_POINTS = 1_000  # of a curve
_MAX_SKIPPED = 200  # rows listed; the count is of all
_MAX_PIXELS = 40_000_000
_PLAIN_PNG = 300_000  # bytes; larger pictures are embedded as WebP
_PICTURE_BYTES = 1_200_000  # of all pictures together, base64
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
T = TypeVar("T")


class Picture(NamedTuple):
    """An image of RUN/pictures: `uri` is its data URI, width and height are in pixels, `told` says what is seen."""

    name: str
    uri: str
    width: int
    height: int
    told: str


class Confusion(NamedTuple):
    """`counts` (C, C) int64 of test images: row = label, column = prediction, both in the order of `classes`."""

    classes: list[str]
    counts: np.ndarray


class RocLine(NamedTuple):
    """Recalls at the false-positive rates of its `Roc`; `auroc` is of the exact curve."""

    name: str
    auroc: float
    recalls: list[float]


class Roc(NamedTuple):
    """ROC curves, one class against the rest; `macro` is the mean over classes."""

    rates: list[float]
    macro: RocLine
    classes: list[RocLine]


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
    info: Entries = field(default_factory=dict)
    recipe: str = ""
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    results: list[Entries] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    num_skipped: int = 0
    pictures: list[Picture] = field(default_factory=list)
    neighbours: Entries | None = None
    map: Entries | None = None
    wrong: Entries | None = None
    looks: Entries | None = None
    duplicates: Entries | None = None
    confusion: Confusion | None = None
    classes: list[ClassScore] = field(default_factory=list)
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

    @property
    def labelled(self) -> bool:
        """Whether its images have labels, as far as run.json says."""
        return number(self.data.get("classes")) != 0

    @property
    def data(self) -> Entries:
        """What run.json says of the images; may be empty."""
        data = self.info.get("data")
        return data if isinstance(data, dict) else {}


def read_run(folder: Path | str) -> Run:
    """Reads what is there.

    Raises:
        UserError: there is no such folder, or nothing in it that a run writes.
    """
    run = Run(Path(folder))
    check_shown(folder)
    run.info = _attempt(run, "run.json", read_object, {})
    if run.info.get("status") in GOING_ON and given_up(folder):
        run.info["status"] = BROKEN_OFF
    run.recipe = _attempt(run, "recipe.yaml", lambda path: _text(path, _MAX_RECIPE), "")
    run.metrics = _attempt(run, "metrics.csv", _metrics, {})
    run.results = _attempt(run, "results.jsonl", lambda path: _results(path, run.problems), [])
    skipped: list[tuple[str, str]] = _attempt(run, "skipped.csv", _skipped, [])
    run.skipped, run.num_skipped = skipped[:_MAX_SKIPPED], len(skipped)
    run.confusion = _attempt(run, "details/confusion.csv", _confusion, None)
    run.classes = _attempt(run, "details/classes.csv", _classes, [])
    run.roc = _attempt(run, "details/roc.json", _roc, None)
    run.wrong = _attempt(run, f"pictures/{WRONG}", _wrong, None)
    run.looks = _attempt(run, f"pictures/{LOOKS}", _looks, None)
    run.neighbours = _attempt(run, f"pictures/{NEIGHBOURS}", _neighbours, None)
    run.duplicates = _attempt(run, f"pictures/{DUPLICATES}", _duplicates, None)
    run.map = _attempt(run, f"pictures/{MAP}", _map, None)
    run.pictures = _pictures(run)
    return run


def _attempt(run: Run, name: str, reader: Callable[[Path], T], default: T) -> T:
    """What `reader` makes of a file, `default` where it is missing or damaged; damage is noted in the problems."""
    path = run.folder / name
    if not path.is_file():
        return default
    try:
        return reader(path)
    except (DamagedError, ValueError, TypeError, KeyError, IndexError, OSError, csv.Error, OverflowError) as error:
        run.problems.append(f"{name} could not be read: {error}")
        return default


def number(value: object) -> float | None:
    """`value` as a finite float, otherwise None; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _expect(true: bool, told: str) -> None:
    if not true:
        raise ValueError(told)


def _share(value: object) -> float:
    """A number in [0, 1], up to rounding."""
    found = number(value)
    if found is None or not -1e-6 <= found <= 1 + 1e-6:
        raise ValueError(f"{str(value)[:40]!r} is no fraction in [0, 1]")
    return min(max(found, 0.0), 1.0)


def _cell(text: str | float) -> float:
    """A cell of a CSV file, NaN where it holds no finite number: the last line may be half written."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _count(value: str | float) -> int:
    """A number of images: a whole number from 0 on."""
    found = int(value)
    _expect(0 <= found < _MAX_COUNT, f"{str(value)[:40]} is no number of images")
    return found


def _text(path: Path, limit: int = MAX_TEXT) -> str:
    """At most `limit` bytes of a file as UTF-8; what is none becomes a replacement character."""
    with open(path, "rb") as file:
        return file.read(limit).decode("utf-8", errors="replace")


def _csv_rows(path: Path) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(_text(path), newline="")) if row]


def _metrics(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    names = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    return {name: np.array([_cell(row[name]) for row in rows], dtype=np.float64) for name in names}


def _results(path: Path, problems: list[str]) -> list[Entries]:
    results = []
    for position, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            problems.append(f"results.jsonl, line {position}, is not JSON; left out")
            continue
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict) and record.get("evaluation"):
            for name in ("settings", "made_by"):
                record[name] = record[name] if isinstance(record.get(name), dict) else {}
            results.append(record | {name: str(record.get(name)) for name in ("evaluation", "features")})
        else:
            problems.append(f"results.jsonl, line {position}, is no result; left out")
    return results


def _skipped(path: Path) -> list[tuple[str, str]]:
    rows = _csv_rows(path)
    if rows and rows[0][0] in ("path", "id"):
        rows = rows[1:]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows]


def _confusion(path: Path) -> Confusion:
    header, *rows = _csv_rows(path)
    fits = [row[0] for row in rows] == header[1:] and all(len(row) == len(header) > 1 for row in rows)
    _expect(fits and bool(rows), "expected one row per class of the header, in its order")
    return Confusion(header[1:], np.array([[_count(value) for value in row[1:]] for row in rows], dtype=np.int64))


def _classes(path: Path) -> list[ClassScore]:
    header, *rows = _csv_rows(path)
    found = []
    for row in rows:
        entry = dict(zip(header, row, strict=True))
        cells = [_cell(entry[name]) for name in ("recall", "low", "high", "precision")]
        recall, low, high, precision = (cell if math.isnan(cell) else _share(cell) for cell in cells)
        images, other = _count(entry["num_images"]), entry["mistaken_for"]
        found.append(ClassScore(entry["name"], images, recall, low, high, precision, other))
    return found


def _roc(path: Path) -> Roc:
    value = read_object(path)
    rates = [_share(one) for one in value["rates"]]
    fits = 2 <= len(rates) <= _MAX_POINTS and rates == sorted(rates)
    _expect(fits, f"`rates` must be 2 to {_MAX_POINTS:,} ascending false-positive rates")

    def line(one: Entries, name: str) -> RocLine:
        recalls = [_share(recall) for recall in one["recalls"]]
        _expect(len(recalls) == len(rates), "each curve needs one recall per rate")
        return RocLine(name, _share(one["auroc"]), recalls)

    return Roc(rates, line(value["macro"], "macro average"), [line(one, str(one["name"])) for one in value["classes"]])


def _thumbnails(images: object) -> list[str]:
    if not isinstance(images, list) or not all(isinstance(one, str) and _BASE64.fullmatch(one) for one in images):
        raise ValueError("`images` must be a list of base64 strings")
    return list(images)


def _places(places: list[int], images: list[str]) -> None:
    _expect(all(0 <= place < len(images) for place in places), "a strip refers to an image that is not stored")


def _shown(path: Path) -> tuple[Entries, Entries]:
    """The object of a file, and what all pictures have in it: images with their labels and indices, and the classes."""
    value = read_object(path)
    images, classes = _thumbnails(value["images"]), [str(name) for name in value["classes"]]
    labels = [int(label) for label in value["labels"]]
    fits = len(labels) == len(images) and all(-1 <= label < len(classes) for label in labels)
    _expect(fits, "`labels` must hold one known class, or -1, for each image")
    indices = [int(index) for index in value.get("indices", range(len(images)))]
    _expect(len(indices) == len(images), "`indices` must hold one number for each image")
    return value, {"images": images, "classes": classes, "labels": labels, "indices": indices}


def _neighbours(path: Path) -> Entries:
    value, common = _shown(path)
    queries = [int(place) for place in value["queries"]]
    found = {str(name): [[int(place) for place in row] for row in rows] for name, rows in value["found"].items()}
    _places([*queries, *(place for rows in found.values() for row in rows for place in row)], common["images"])
    fits = all(len(rows) == len(queries) for rows in found.values())
    _expect(fits, "each feature needs one row of neighbours per query")
    return {**common, "queries": queries, "found": found, "told": str(value.get("told") or "")}


def _map(path: Path) -> Entries:
    value, common = _shown(path)
    x, y = ([_cell(one) for one in value[axis]] for axis in "xy")
    fits = len(x) == len(y) == len(common["images"]) and not any(map(math.isnan, [*x, *y]))
    _expect(fits, "each image needs one finite position")
    return {**common, "x": x, "y": y, "projection": str(value.get("projection") or "")}


def _wrong(path: Path) -> Entries:
    value, common = _shown(path)
    predicted, confidences = [int(one) for one in value["predicted"]], [_share(one) for one in value["confidences"]]
    fits = len(predicted) == len(confidences) == len(common["images"])
    _expect(fits, "each image needs one prediction and its confidence")
    _expect(all(0 <= label < len(common["classes"]) for label in predicted), "a prediction is no known class")
    return {**common, "predicted": predicted, "confidences": confidences}


def _looks(path: Path) -> Entries:
    value = read_object(path)
    rows = [_look(row) for row in value["rows"] if row["kind"] in KINDS]  # others are of a later version
    _expect(len({len(row["images"]) for row in rows}) == 1, "each row needs one picture per image")
    return {"rows": rows, "prototypes": [_prototype(one) for one in value.get("prototypes", [])]}


def _look(row: Entries) -> Entries:
    images, notes = _thumbnails(row["images"]), [str(note) for note in row["notes"]]
    _expect(len(notes) == len(images), "each picture needs one note")
    numbers = {name: number(row[name]) for name in ("low", "high", "even", "miss") if name in row}
    _expect(None not in numbers.values(), "a scale must be of finite numbers")
    counts = {name: _count(row[name]) for name in ("rows", "columns") if name in row}
    return {"kind": str(row["kind"]), "images": images, "notes": notes, "numbers": {**numbers, **counts}}


def _prototype(one: Entries) -> Entries:
    _thumbnails([one["image"], one["counter"]])
    cosines = [number(cosine) for cosine in one["cosines"]]
    _expect(len(cosines) == 2 and None not in cosines, "a prototype and its counter-example need one cosine each")
    return {name: str(one[name]) for name in ("name", "image", "counter", "counter_name")} | {"cosines": cosines}


def _duplicates(path: Path) -> Entries:
    value = read_object(path)
    images, ids = _thumbnails(value["images"]), [str(name) for name in value["ids"]]
    groups = [[int(place) for place in group] for group in value["groups"]]
    outliers = [(int(place), _cell(distance)) for place, distance in value["outliers"]]
    _places([*(place for group in groups for place in group), *(place for place, _ in outliers)], images)
    _expect(len(ids) == len(images), "each image needs one id")
    numbers = {name: _count(value[name]) for name in ("num_images", "num_groups", "superfluous")}
    return {"images": images, "ids": ids, "groups": groups, "outliers": outliers, **numbers}


def _pictures(run: Run) -> list[Picture]:
    """Every PNG of RUN/pictures, views first; those beyond the page's budget are named in the problems."""
    used, pictures = 0, list[Picture]()
    paths = sorted((run.folder / "pictures").glob("*.png"), key=lambda path: (path.stem != VIEWS, path.name))
    for path in paths:
        picture = _attempt(run, f"pictures/{path.name}", _picture, None)
        if picture is not None and used + len(picture.uri) > _PICTURE_BYTES and pictures:
            run.problems.append(f"pictures/{path.name} is not shown here, to keep this page small: open the file")
        elif picture is not None:
            used += len(picture.uri)
            pictures.append(picture)
    return pictures


def _picture(path: Path) -> Picture | None:
    data, mime = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        width, height = image.size
        told = f"{width} x {height} pixels; pictures here stay below {_MAX_PIXELS:,} pixels"
        _expect(width * height <= _MAX_PIXELS, told)
        image.load()  # a file cut short is found here, not by the reader's browser
        if len(data) > _PLAIN_PNG:
            small = image.convert("RGBA")
            small.thumbnail((2400, 2400), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=80, method=4)
            data, mime = buffer.getvalue(), "webp"
    told = str(image.info.get("Description") or "")
    return Picture(path.stem, f"data:image/{mime};base64,{base64.b64encode(data).decode('ascii')}", width, height, told)
