"""Reads a run folder for the report: what is missing is left out, what is damaged is noted, nothing is trusted.

A run folder may come from a stranger: sizes are capped before parsing, indices are checked, and thumbnails are
accepted only as plain base64, so that nothing of a file can become markup, script or an address.
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
from typing import Any

import numpy as np
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, read_json
from ssl_kit.report.pictures import MAP, NEIGHBOURS

VIEWS = "views"  # pictures/views.png: drawn before the first step
KNOWN_FILES = ("run.json", "recipe.yaml", "metrics.csv", "results.jsonl", "skipped.csv", "pictures")
_MAX_TEXT = 64 * 2**20  # bytes read of metrics.csv and results.jsonl
_MAX_RECIPE = 256 * 2**10
_MAX_SKIPPED = 200  # rows listed; the count is of all
_MAX_PIXELS = 40_000_000
_PLAIN_PNG = 300_000  # bytes; larger pictures are embedded as WebP
_PICTURE_BYTES = 1_200_000  # of all pictures together, base64
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True)
class Picture:
    """An image of RUN/pictures: `uri` is its data URI, width and height are in pixels."""

    name: str
    uri: str
    width: int
    height: int


@dataclass
class Run:
    """What a run folder holds; every field may be empty.

    Attributes:
        metrics: column of metrics.csv -> (rows,) float64, NaN where the cell is empty.
        results: the records of results.jsonl, in their order.
        skipped: (path, reason), the first 200 of `num_skipped`.
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
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name: what run.json says, otherwise the folder's name."""
        return str(self.info.get("name") or self.folder.resolve().name)


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
    run.info = _read(run, "run.json", _info, {})
    run.recipe = _read(run, "recipe.yaml", lambda path: _text(path, _MAX_RECIPE), "")
    run.metrics = _read(run, "metrics.csv", _metrics, {})
    run.results = _read(run, "results.jsonl", lambda path: _results(path, run.problems), [])
    run.skipped, run.num_skipped = _read(run, "skipped.csv", _skipped, ([], 0))
    run.neighbours = _read(run, f"pictures/{NEIGHBOURS}", _neighbours, None)
    run.map = _read(run, f"pictures/{MAP}", _map, None)
    run.pictures = _pictures(run)
    return run


def number(value: Any) -> float | None:
    """`value` as a finite float, otherwise None; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read(run: Run, name: str, reader: Callable[[Path], Any], default: Any) -> Any:
    # a file that is cut short or altered costs its section, not the report
    path = run.folder / name
    if not path.is_file():
        return default
    try:
        return reader(path)
    except (DamagedError, ValueError, TypeError, KeyError, IndexError, OSError, csv.Error) as error:
        run.problems.append(f"{name} could not be read: {error}")
        return default


def _text(path: Path, limit: int = _MAX_TEXT) -> str:
    with open(path, "rb") as file:
        return file.read(limit).decode("utf-8", errors="replace")


def _info(path: Path) -> dict[str, Any]:
    info = read_json(path)
    if not isinstance(info, dict):
        raise ValueError(f"expected a JSON object, got {type(info).__name__}")
    return info


def _metrics(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    names = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    return {name: np.array([_cell(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _cell(text: Any) -> float:
    # the last line may be half written while training runs
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _results(path: Path, problems: list[str]) -> list[dict[str, Any]]:
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
            record["settings"] = record["settings"] if isinstance(record.get("settings"), dict) else {}
            record["made_by"] = record["made_by"] if isinstance(record.get("made_by"), dict) else {}
            results.append(record)
        else:
            problems.append(f"results.jsonl, line {position}, is no result; left out")
    return results


def _skipped(path: Path) -> tuple[list[tuple[str, str]], int]:
    rows = [row for row in csv.reader(io.StringIO(_text(path), newline="")) if row]
    if rows and rows[0][0] in ("path", "id"):
        rows = rows[1:]
    return [(row[0], row[1] if len(row) > 1 else "") for row in rows[:_MAX_SKIPPED]], len(rows)


def _images(value: dict[str, Any]) -> list[str]:
    images = value["images"]
    if not isinstance(images, list) or not all(isinstance(one, str) and _BASE64.fullmatch(one) for one in images):
        raise ValueError("`images` must be a list of base64 strings")
    return images


def _common(path: Path) -> dict[str, Any]:
    value = _info(path)
    images, classes = _images(value), [str(name) for name in value["classes"]]
    labels = [int(label) for label in value["labels"]]
    if len(labels) != len(images) or not all(-1 <= label < len(classes) for label in labels):
        raise ValueError("`labels` must hold one known class, or -1, for each image")
    indices = [int(index) for index in value.get("indices", range(len(images)))]
    if len(indices) != len(images):
        raise ValueError("`indices` must hold one number for each image")
    return {"images": images, "classes": classes, "labels": labels, "indices": indices}


def _neighbours(path: Path) -> dict[str, Any]:
    value, common = _info(path), _common(path)
    queries = [int(place) for place in value["queries"]]
    found = {str(name): [[int(place) for place in row] for row in rows] for name, rows in value["found"].items()}
    places = [*queries, *(place for rows in found.values() for row in rows for place in row)]
    if not all(0 <= place < len(common["images"]) for place in places):
        raise ValueError("a strip refers to an image that is not stored")
    if any(len(rows) != len(queries) for rows in found.values()):
        raise ValueError("each feature needs one row of neighbours per query")
    return {**common, "queries": queries, "found": found}


def _map(path: Path) -> dict[str, Any]:
    value, common = _info(path), _common(path)
    x, y = ([_cell(one) for one in value[axis]] for axis in "xy")
    if not len(x) == len(y) == len(common["images"]) or any(math.isnan(one) for one in [*x, *y]):
        raise ValueError("each image needs one finite position")
    return {**common, "x": x, "y": y, "projection": str(value.get("projection") or "")}


def _pictures(run: Run) -> list[Picture]:
    """Every PNG of RUN/pictures, views first; those beyond the page's budget are named in `problems`."""
    folder, used = run.folder / "pictures", 0
    pictures: list[Picture] = []
    paths = sorted(folder.glob("*.png"), key=lambda path: (path.stem != VIEWS, path.name))
    for path in paths:
        picture = _read(run, f"pictures/{path.name}", _picture, None)
        if picture is None:
            continue
        if used + len(picture.uri) > _PICTURE_BYTES and pictures:
            run.problems.append(f"pictures/{path.name} is not shown here, to keep this page small: open the file")
            continue
        used += len(picture.uri)
        pictures.append(picture)
    return pictures


def _picture(path: Path) -> Picture:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        width, height = image.size
        if width * height > _MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels; pictures here stay below {_MAX_PIXELS:,} pixels")
        image.load()  # a file cut short is found here, not by the reader's browser
        mime = "png"
        if len(data) > _PLAIN_PNG:
            small = image.convert("RGBA")
            small.thumbnail((2400, 2400), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=80, method=4)
            data, mime = buffer.getvalue(), "webp"
    return Picture(path.stem, f"data:image/{mime};base64,{base64.b64encode(data).decode('ascii')}", width, height)
