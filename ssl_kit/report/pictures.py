"""Pictures and picture data that the verbs leave in RUN/pictures, and the page of `ssl-kit search --html`.

Functions of arrays: nothing here knows torch, sources or encoders. An image is uint8 (H, W, C) with C = 1 or 3; a
view is float (C, h, w) in [0, 1]. Every file appears whole or not at all (`core.files.atomic_file`).

Letters: N images, Q queries, k neighbours, C channels, (H, W) stored size, (h, w) size of a view, all in pixels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssl_kit.core.files import atomic_file
from ssl_kit.report.page import render, write_page

NEIGHBOURS = "neighbours.json"
MAP = "map.json"
MAP_SIZES = ((44, 62), (36, 45), (32, 25))  # (longer side in pixels, WebP quality), tried until the map fits
MAP_BYTES = 2_200_000  # of base64 thumbnails: bokeh and the rest of the page need under 3.5 MB of the 6
_NEIGHBOUR_SIZE = 64
_SEARCH_SIZE = 160
_CELL = 132  # a view is enlarged by the largest integer that keeps it below this many pixels
_GAP = 6
_CAPTION = (122, 122, 122, 255)  # readable on white and on near-black: the background stays transparent

Thumbnail = Callable[[int], np.ndarray]


def draw_views(path: Path | str, originals: Sequence[np.ndarray], views: Sequence[np.ndarray]) -> None:
    """Draws what a method sees: a column per image, the original on top, then one row per view.

    Args:
        path: the PNG to write.
        originals: images, (H_i, W_i, C) uint8, shrunk to a cell where larger.
        views: one array per view, (N, C, h, w) float in [0, 1] with N = len(originals). Values outside are clipped.
            Views smaller than a cell are enlarged by an integer factor, nearest neighbour: pixels stay pixels.
    """
    assert all(len(view) == len(originals) for view in views), "a column needs the image and each of its views"
    height, width = views[0].shape[-2:] if views else (_CELL, _CELL)
    factor = max(1, _CELL // max(height, width))
    cell_h, cell_w = factor * height, factor * width
    font = ImageFont.load_default(size=max(13, cell_h // 8))
    captions = ["original", *(f"view {number}" for number in range(1, len(views) + 1))]
    margin = _GAP + 4 + max(int(font.getlength(caption)) for caption in captions)
    size = (margin + len(originals) * (cell_w + _GAP), len(captions) * (cell_h + _GAP) - _GAP)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        top = row * (cell_h + _GAP)
        pen.text((2, top + cell_h / 2), caption, fill=_CAPTION, font=font, anchor="lm")
        for column, original in enumerate(originals):
            image = to_image(original) if row == 0 else to_image(_to_uint8(views[row - 1][column]))
            tile = _fit(image, cell_h, cell_w)
            left = margin + column * (cell_w + _GAP) + (cell_w - tile.width) // 2
            sheet.paste(tile, (left, top + (cell_h - tile.height) // 2))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def draw_neighbours(
    folder: Path | str,
    queries: np.ndarray,
    found: dict[str, np.ndarray],
    thumbnail: Thumbnail,
    labels: np.ndarray,
    classes: tuple[str, ...],
) -> None:
    """Writes `neighbours.json`: query strips, each image stored once and referred to by its place in `images`.

    Args:
        folder: RUN/pictures.
        queries: (Q,) int, indices of the query images.
        found: features ("encoder", "pixels", ...) -> (Q, k) int, indices of the neighbours, nearest first.
        thumbnail: index -> (H, W, C) uint8; shrunk to at most 64 pixels here.
        labels: int64 by index, -1 unknown.
        classes: the name of label i is classes[i].
    """
    used = np.unique(np.concatenate([np.ravel(queries), *(np.ravel(rows) for rows in found.values())]))
    place = {int(index): position for position, index in enumerate(used)}
    _write(
        Path(folder) / NEIGHBOURS,
        {
            "classes": list(classes),
            "images": [encode(thumbnail(index), _NEIGHBOUR_SIZE, 75) for index in place],
            "indices": list(place),
            "labels": [int(labels[index]) for index in place],
            "queries": [place[int(index)] for index in np.ravel(queries)],
            "found": {name: [[place[int(index)] for index in row] for row in rows] for name, rows in found.items()},
        },
    )


def draw_map(
    folder: Path | str,
    positions: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    thumbnail: Thumbnail,
    indices: np.ndarray,
    projection: str = "",
) -> None:
    """Writes `map.json`: a thumbnail, a label and a place in the plane for each of N images.

    Args:
        folder: RUN/pictures.
        positions: (N, 2) float, e.g. from PCA or t-SNE; no unit.
        labels: (N,) int64, -1 unknown.
        classes: the name of label i is classes[i].
        thumbnail: index -> (H, W, C) uint8; stored 32 to 44 pixels large, whatever keeps the page small.
        indices: (N,) int, what `thumbnail` is called with.
        projection: how the positions were made, in words ("t-SNE of 2,000 test images"); shown under the map.
    """
    assert len(positions) == len(labels) == len(indices), "one label and one index per position"
    images: list[str] = []
    for size, quality in MAP_SIZES:
        images = [encode(thumbnail(int(index)), size, quality) for index in indices]
        if sum(map(len, images)) <= MAP_BYTES:
            break
    _write(
        Path(folder) / MAP,
        {
            "classes": list(classes),
            "images": images,
            "indices": [int(index) for index in indices],
            "labels": [int(label) for label in labels],
            "x": [round(float(x), 4) for x in positions[:, 0]],
            "y": [round(float(y), 4) for y in positions[:, 1]],
            "projection": projection,
        },
    )


def strip_html(
    path: Path | str,
    title: str,
    queries: Sequence[tuple[str, np.ndarray]],
    results: Sequence[Sequence[tuple[str, float, np.ndarray | None]]],
) -> None:
    """Writes the page of `ssl-kit search --html`: each query, then its neighbours with their scores.

    Args:
        path: the HTML file; self-contained, no request leaves it.
        title: the heading.
        queries: (name, (H, W, C) uint8) per query.
        results: per query its neighbours, nearest first: (id, similarity, image or None if it cannot be read).
    """
    assert len(queries) == len(results), "one list of neighbours per query"
    rows = [
        {
            "name": name,
            "image": encode(image, _SEARCH_SIZE, 80),
            "found": [
                {"id": found, "score": score, "image": None if picture is None else encode(picture, _SEARCH_SIZE, 80)}
                for found, score, picture in neighbours
            ],
        }
        for (name, image), neighbours in zip(queries, results, strict=True)
    ]
    write_page(path, render("search.html", title=title, rows=rows))


def encode(image: np.ndarray, longest: int, quality: int) -> str:
    """(H, W, C) uint8 -> base64 of a WebP whose longer side is at most `longest` pixels."""
    picture = to_image(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=4)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def to_image(image: np.ndarray) -> Image.Image:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> RGB picture; of other channel counts the first is shown as grey."""
    if image.ndim == 3 and image.shape[2] != 3:
        image = image[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def _to_uint8(view: np.ndarray) -> np.ndarray:
    # (C, h, w) in [0, 1] -> (h, w, C)
    return np.rint(np.clip(view, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(height / image.height, width / image.width)
    if scale >= 1:  # enlarge by an integer, so that every pixel is a square of the same size
        return image.resize((int(scale) * image.width, int(scale) * image.height), Image.Resampling.NEAREST)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _write(path: Path, value: dict[str, Any]) -> None:
    # not core.files.write_json: its indentation puts each of thousands of numbers on a line of its own
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
