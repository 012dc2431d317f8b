"""Pictures and picture data that the verbs leave in RUN/pictures, and maps drawn over images.

Functions of arrays: nothing here knows torch, sources or encoders. An image is uint8 (H, W, C) with C = 1 or 3; a
view is float (C, h, w) in [0, 1]. Every file appears whole or not at all (`core.files.atomic_file`). Maps are dark to
bright for amounts, blue to orange for signed ones: the scales of style.css (.heat, .signed).

`folder` is RUN/pictures, `classes[i]` the name of label i, -1 an unknown label. Images become thumbnails of 128 pixels.
Letters: N images, Q queries, k neighbours, C channels, (H, W) stored size, (h, w) size of a view or map, in pixels.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ssl_kit.core.files import atomic_file
from ssl_kit.core.reading import eight_bits

NEIGHBOURS, MAP = "neighbours.json", "map.json"
WRONG = "wrong.json"
LOOKS = "looks.json"
DUPLICATES = "duplicates.json"
KINDS = ("image", "neighbour", "attention", "patch", "colours", "similarity", "gradients")  # of looks; see looks.html
MAP_SIZES = ((44, 62), (36, 45), (32, 25))  # (longer side in pixels, WebP quality), tried until the map fits
MAP_BYTES = 2_200_000  # of base64 thumbnails: bokeh and the rest of the page need under 3.5 MB of the 6
THUMBNAIL = 128  # of images that open large; smaller ones are stored as they are
_LOOK_SIZE = 112  # also what smaller images are enlarged to, by an integer, below a map
_CELL = 132  # a view is enlarged by the largest integer that keeps it below this many pixels
_GAP = 6
# matplotlib's inferno at 0, 1/4, ... 1: it grows brighter evenly, also in grey and for the colour-blind
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
_LOWER, _RAISE = np.array([86, 180, 233.0]), np.array([230, 120, 20.0])  # of Okabe & Ito: told apart by everyone
_KEPT = 0.4  # of the grey image below a map
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
    captions = ["original", *(f"view {number}" for number in range(1, len(views) + 1))]
    images = [[to_image(original) for original in originals]]
    images += [[to_image(_to_uint8(255.0 * one.transpose(1, 2, 0))) for one in view] for view in views]
    sheet = _sheet(images, height, width, captions, on_the_left=True)
    counted = "one view" if len(views) == 1 else f"{len(views)} views"
    _save(sheet, path, f"{len(originals)} images, one per column: the original on top, then {counted} of it.")


def draw_grid(path: Path | str, grid: np.ndarray, columns: Sequence[str], caption: str) -> None:
    """Draws what a method shows of itself (reconstructions, samples, ...).

    Args:
        path: the PNG to write; the caption is kept in its `Description`, from where the report takes it.
        grid: (R, K, C, h, w) float in [0, 1], clipped; R rows of K images, drawn as K rows of R where R > K.
        columns: K captions, or none.
        caption: what is seen, in a sentence or two.
    """
    images = [[to_image(_to_uint8(255.0 * one.transpose(1, 2, 0))) for one in row] for row in grid]
    turned = len(images) > len(images[0])
    if turned:
        images = [list(column) for column in zip(*images, strict=True)]
    height, width = grid.shape[-2:]
    _save(_sheet(images, height, width, columns, on_the_left=turned), path, caption)


def _sheet(
    images: Sequence[Sequence[Image.Image]], height: int, width: int, captions: Sequence[str], *, on_the_left: bool
) -> Image.Image:
    """Rows of images in cells of (height, width) pixels, enlarged; captions are of the rows or of the columns."""
    factor = max(1, _CELL // max(height, width))
    cell_h, cell_w = factor * height, factor * width
    points = max(13, min(16, cell_h // 8))
    font = ImageFont.load_default(size=points)
    left = _GAP + 4 + max(int(font.getlength(text)) for text in captions) if captions and on_the_left else 0
    top = points + 6 if captions and not on_the_left else 0
    columns = max(map(len, images))
    size = (left + columns * (cell_w + _GAP) - _GAP, top + len(images) * (cell_h + _GAP) - _GAP)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for place, text in enumerate(captions):
        if on_the_left:
            pen.text((2, place * (cell_h + _GAP) + cell_h / 2), text, fill=_CAPTION, font=font, anchor="lm")
        else:
            pen.text((place * (cell_w + _GAP) + cell_w / 2, top / 2), text, fill=_CAPTION, font=font, anchor="mm")
    for row, line in enumerate(images):
        for column, image in enumerate(line):
            tile = _fit(image, cell_h, cell_w)
            x = left + column * (cell_w + _GAP) + (cell_w - tile.width) // 2
            sheet.paste(tile, (x, top + row * (cell_h + _GAP) + (cell_h - tile.height) // 2))
    return sheet


def made_here() -> PngImagePlugin.PngInfo:
    """What tells a picture of ours from others: `owned.check_output` looks for it."""
    told = PngImagePlugin.PngInfo()
    told.add_text("Software", "ssl_kit")
    return told


def _save(sheet: Image.Image, path: Path | str, caption: str) -> None:
    description = made_here()
    description.add_itxt("Description", caption)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True, pnginfo=description)


def draw_neighbours(
    folder: Path | str,
    queries: np.ndarray,
    found: dict[str, np.ndarray],
    thumbnail: Thumbnail,
    labels: np.ndarray,
    classes: tuple[str, ...],
    told: str = "",
) -> None:
    """Writes `neighbours.json`: query strips, each image stored once and referred to by its place in `images`.

    Args:
        queries: (Q,) int, indices of the query images.
        found: features ("encoder", "pixels", ...) -> (Q, k) int, indices of the neighbours, nearest first.
        thumbnail: index -> (H, W, C) uint8.
        labels: int64 by index.
        told: which images these are, in a sentence.
    """
    used = np.unique(np.concatenate([np.ravel(queries), *(np.ravel(rows) for rows in found.values())]))
    places = lambda indices: np.searchsorted(used, indices).tolist()
    _write(
        Path(folder) / NEIGHBOURS,
        classes=list(classes),
        images=[encode(thumbnail(index), THUMBNAIL, 75) for index in used.tolist()],
        indices=used.tolist(),
        labels=labels[used].tolist(),
        queries=places(np.ravel(queries)),
        found={name: places(rows) for name, rows in found.items()},
        told=told,
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
        positions: (N, 2) float, e.g. from PCA or t-SNE; no unit.
        labels: (N,) int64.
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
    x, y = np.round(np.asarray(positions, dtype=np.float64), 4).T.tolist()
    named = {"classes": list(classes), "images": images, "indices": indices.tolist(), "labels": labels.tolist()}
    _write(Path(folder) / MAP, **named, x=x, y=y, projection=projection)


def draw_wrong(
    folder: Path | str,
    images: Sequence[np.ndarray],
    indices: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    confidences: np.ndarray,
    classes: tuple[str, ...],
) -> None:
    """Writes `wrong.json`: images and what they were taken for.

    Args:
        images: M of (H, W, C) uint8.
        indices: (M,) int, which images of the test set they are.
        labels: (M,) int64, the right classes.
        predicted: (M,) int64.
        confidences: (M,) probabilities of the predicted classes.
    """
    assert len(images) == len(indices) == len(labels) == len(predicted) == len(confidences), "one of each per image"
    _write(
        Path(folder) / WRONG,
        classes=list(classes),
        images=[encode(image, THUMBNAIL, 75) for image in images],
        indices=indices.tolist(),
        labels=labels.tolist(),
        predicted=predicted.tolist(),
        confidences=np.round(np.asarray(confidences, dtype=np.float64), 4).tolist(),
    )


@dataclass(frozen=True)
class Look:
    """A row of "what the encoder looks at": one picture per image.

    Attributes:
        kind: of `KINDS`; looks.html has the words for it.
        images: (H, W, C) uint8 each.
        notes: what to write under each, or "".
        numbers: what the row's caption is filled with: low, high, rows, columns, ...
    """

    kind: str
    images: Sequence[np.ndarray]
    notes: Sequence[str]
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prototype:
    """A class's typical image and the most similar one of another class, with their cosines to the class's mean."""

    name: str
    image: np.ndarray
    counter_name: str
    counter: np.ndarray
    cosines: tuple[float, float]


def draw_looks(folder: Path | str, looks: Sequence[Look], prototypes: Sequence[Prototype]) -> None:
    """Writes `looks.json`: rows of pictures of the same images, and prototypes with their counter-examples."""
    rows = [
        {
            "kind": look.kind,
            "images": [encode(image, _LOOK_SIZE, 80) for image in look.images],
            "notes": list(look.notes),
            **{name: round(float(value), 5) for name, value in look.numbers.items()},
        }
        for look in looks
    ]
    examples = [
        {
            "name": one.name,
            "image": encode(one.image, THUMBNAIL, 80),
            "counter_name": one.counter_name,
            "counter": encode(one.counter, THUMBNAIL, 80),
            "cosines": [round(float(cosine), 4) for cosine in one.cosines],
        }
        for one in prototypes
    ]
    _write(Path(folder) / LOOKS, rows=rows, prototypes=examples)


def draw_duplicates(
    folder: Path | str,
    groups: Sequence[Sequence[str]],
    outliers: Sequence[tuple[str, float]],
    thumbnail: Callable[[str], np.ndarray | None],
    *,
    num_images: int,
    num_groups: int,
    superfluous: int,
) -> None:
    """Writes `duplicates.json`: some groups of images that show the same picture, and some outliers.

    Args:
        groups: ids of the images of each group that is shown, the one to keep first.
        outliers: (id, 1 - mean cosine to the neighbours), farthest first.
        thumbnail: id -> (H, W, C) uint8, None if it cannot be read; such images are left out.
        num_images: that were compared.
        num_groups: that were found.
        superfluous: images that could go.
    """
    wanted = dict.fromkeys([*(name for group in groups for name in group), *(name for name, _ in outliers)])
    images = {name: image for name in wanted if (image := thumbnail(name)) is not None}
    place = {name: position for position, name in enumerate(images)}
    shown = [[place[name] for name in group if name in place] for group in groups]
    _write(
        Path(folder) / DUPLICATES,
        images=[encode(image, THUMBNAIL, 75) for image in images.values()],
        ids=list(images),
        groups=[group for group in shown if len(group) > 1],
        outliers=[[place[name], round(float(distance), 4)] for name, distance in outliers if name in place],
        num_images=num_images,
        num_groups=num_groups,
        superfluous=superfluous,
    )


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
    return Image.fromarray(np.ascontiguousarray(eight_bits(image))).convert("RGB")


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(height / image.height, width / image.width)
    if scale >= 1:  # enlarge by an integer, so that every pixel is a square of the same size
        return image.resize((int(scale) * image.width, int(scale) * image.height), Image.Resampling.NEAREST)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _write(path: Path, **value: object) -> None:
    # not core.files.write_json: its indentation puts each of thousands of numbers on a line of its own
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def enlarged(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 as RGB, enlarged by an integer to about 112 pixels where smaller: pixels stay pixels."""
    picture = to_image(image)
    factor = max(1, _LOOK_SIZE // min(picture.size))
    return np.asarray(picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST))


def overlay(image: np.ndarray, heat: np.ndarray, low: float, high: float, *, smooth: bool = False) -> np.ndarray:
    """An amount drawn over an image: dark at `low`, bright at `high`; values beyond are clipped.

    Args:
        image: (H, W, C) uint8; the result is (H', W', 3), as large as `enlarged` makes it.
        heat: (h, w) float.
        low: drawn darkest.
        high: drawn brightest, above `low`.
        smooth: interpolate between positions instead of drawing squares.
    """
    below = _grey(image)
    level = np.clip((_resized(heat, below.shape[:2], smooth) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(level, stops, _HEAT[:, channel]) for channel in range(3)], axis=2)
    return _to_uint8(_KEPT * below + (1 - _KEPT) * colours)


def signed_overlay(image: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    """A signed amount: orange where positive, blue where negative, fully so from `limit` on; the image in grey at 0.

    Args:
        image: as `overlay` takes it.
        values: (h, w) float.
        limit: above 0.
    """
    below = _grey(image)
    level = np.clip(_resized(values, below.shape[:2], False) / max(limit, 1e-12), -1, 1)[..., None]
    strength = np.abs(level)
    return _to_uint8((1 - strength) * _KEPT * below + strength * np.where(level > 0, _RAISE, _LOWER))


def colours_of(colours: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) float in [0, 1] as squares of an image of (H, W) pixels, uint8."""
    return _to_uint8(
        255 * np.stack([_resized(channel, shape, False) for channel in np.moveaxis(colours, 2, 0)], axis=2)
    )


def framed(image: np.ndarray, place: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """A white frame around the position (row, column) of a (rows, columns) grid over an image (H, W, 3) uint8."""
    drawn = image.copy()
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    top, left = round(place[0] * height), round(place[1] * width)
    bottom, right = round((place[0] + 1) * height), round((place[1] + 1) * width)
    for side in (0, 1):  # white inside, black around it: seen on every background
        drawn[[top + side, bottom - 1 - side], left + side : right - side] = 255 * side
        drawn[top + side : bottom - side, [left + side, right - 1 - side]] = 255 * side
    return drawn


def _grey(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(enlarged(image)).convert("L").convert("RGB"), dtype=np.float64)


def _resized(heat: np.ndarray, shape: tuple[int, int], smooth: bool) -> np.ndarray:
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize(shape[::-1], how), dtype=np.float64)
