"""Reads RUN/pictures: PNGs, and the JSON files whose thumbnails become strips and maps, as carefully as reading.py."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_kit.report.looks import KINDS
from ssl_kit.report.untrusted import attempt, cell, count, json_object, number, share, thumbnails

VIEWS = "views"  # pictures/views.png: drawn before the first step
_MAX_PIXELS = 40_000_000
_PLAIN_PNG = 300_000  # bytes; larger pictures are embedded as WebP
_PICTURE_BYTES = 1_200_000  # of all pictures together, base64


@dataclass(frozen=True)
class Picture:
    """An image of RUN/pictures: `uri` is its data URI, width and height are in pixels, `told` says what is seen."""

    name: str
    uri: str
    width: int
    height: int
    told: str


def read_neighbours(path: Path) -> dict[str, Any]:
    """pictures/neighbours.json: places of images by query and features."""
    value, common = json_object(path), _common(path)
    queries = [int(place) for place in value["queries"]]
    found = {str(name): [[int(place) for place in row] for row in rows] for name, rows in value["found"].items()}
    places = [*queries, *(place for rows in found.values() for row in rows for place in row)]
    _check_places(places, common["images"])
    if any(len(rows) != len(queries) for rows in found.values()):
        raise ValueError("each feature needs one row of neighbours per query")
    return {**common, "queries": queries, "found": found}


def read_map(path: Path) -> dict[str, Any]:
    """pictures/map.json: a position per image."""
    value, common = json_object(path), _common(path)
    x, y = ([cell(one) for one in value[axis]] for axis in "xy")
    if not len(x) == len(y) == len(common["images"]) or any(math.isnan(one) for one in [*x, *y]):
        raise ValueError("each image needs one finite position")
    return {**common, "x": x, "y": y, "projection": str(value.get("projection") or "")}


def read_wrong(path: Path) -> dict[str, Any]:
    """pictures/wrong.json: what each image was taken for, and how confidently."""
    value, common = json_object(path), _common(path)
    predicted = [int(label) for label in value["predicted"]]
    confidences = [share(one) for one in value["confidences"]]
    if not len(predicted) == len(confidences) == len(common["images"]):
        raise ValueError("each image needs one prediction and its confidence")
    if not all(0 <= label < len(common["classes"]) for label in predicted):
        raise ValueError("a prediction is no known class")
    return {**common, "predicted": predicted, "confidences": confidences}


def read_looks(path: Path) -> dict[str, Any]:
    """pictures/looks.json: rows of one picture per image, and prototypes; rows of an unknown kind are left out."""
    value = json_object(path)
    rows = [_look(row) for row in value["rows"] if row["kind"] in KINDS]
    if not rows or len({len(row["images"]) for row in rows}) != 1:
        raise ValueError("each row needs one picture per image")
    return {"rows": rows, "prototypes": [_prototype(one) for one in value.get("prototypes", [])]}


def _look(row: dict[str, Any]) -> dict[str, Any]:
    images, notes = thumbnails(row["images"]), [str(note) for note in row["notes"]]
    if len(notes) != len(images):
        raise ValueError("each picture needs one note")
    numbers: dict[str, float | None] = {
        name: number(row[name]) for name in ("low", "high", "even", "miss") if name in row
    }
    numbers |= {name: count(row[name]) for name in ("rows", "columns") if name in row}
    if None in numbers.values():
        raise ValueError("a scale must be of finite numbers")
    return {"kind": str(row["kind"]), "images": images, "notes": notes, "numbers": numbers}


def _prototype(one: dict[str, Any]) -> dict[str, Any]:
    thumbnails([one["image"], one["counter"]])
    texts = {name: str(one[name]) for name in ("name", "image", "counter", "counter_name")}
    cosines = [number(cosine) for cosine in one["cosines"]]
    if len(cosines) != 2 or None in cosines:
        raise ValueError("a prototype and its counter-example need one cosine each")
    return {**texts, "cosines": cosines}


def read_duplicates(path: Path) -> dict[str, Any]:
    """pictures/duplicates.json: groups of images that show the same picture, and outliers, by place."""
    value = json_object(path)
    images, ids = thumbnails(value["images"]), [str(name) for name in value["ids"]]
    groups = [[int(place) for place in group] for group in value["groups"]]
    outliers = [(int(place), cell(distance)) for place, distance in value["outliers"]]
    _check_places([*(place for group in groups for place in group), *(place for place, _ in outliers)], images)
    if len(ids) != len(images):
        raise ValueError("each image needs one id")
    numbers = {name: count(value[name]) for name in ("num_images", "num_groups", "superfluous")}
    return {"images": images, "ids": ids, "groups": groups, "outliers": outliers, **numbers}


def read_pictures(folder: Path, problems: list[str]) -> list[Picture]:
    """Every PNG of RUN/pictures, views first; those beyond the page's budget are named in `problems`."""
    used, pictures = 0, list[Picture]()
    paths = sorted((folder / "pictures").glob("*.png"), key=lambda path: (path.stem != VIEWS, path.name))
    for path in paths:
        picture = attempt(folder, f"pictures/{path.name}", _picture, None, problems)
        if picture is None:
            continue
        if used + len(picture.uri) > _PICTURE_BYTES and pictures:
            problems.append(f"pictures/{path.name} is not shown here, to keep this page small: open the file")
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
    told = str(image.info.get("Description") or "")
    return Picture(path.stem, f"data:image/{mime};base64,{base64.b64encode(data).decode('ascii')}", width, height, told)


def _common(path: Path) -> dict[str, Any]:
    value = json_object(path)
    images, classes = thumbnails(value["images"]), [str(name) for name in value["classes"]]
    labels = [int(label) for label in value["labels"]]
    if len(labels) != len(images) or not all(-1 <= label < len(classes) for label in labels):
        raise ValueError("`labels` must hold one known class, or -1, for each image")
    indices = [int(index) for index in value.get("indices", range(len(images)))]
    if len(indices) != len(images):
        raise ValueError("`indices` must hold one number for each image")
    return {"images": images, "classes": classes, "labels": labels, "indices": indices}


def _check_places(places: list[int], images: list[str]) -> None:
    if not all(0 <= place < len(images) for place in places):
        raise ValueError("a strip refers to an image that is not stored")
