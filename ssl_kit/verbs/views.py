"""`ssl-kit views`: a picture of what the method will see, before a day is spent on it."""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_kit.core.console import next_command, result, retyped, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file
from ssl_kit.core.owned import check_output
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import reading_of
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.opening import open_source, places
from ssl_kit.data.sources import Source, pixels
from ssl_kit.report.pictures import made_here, to_image
from ssl_kit.verbs.budget import fit_to_time
from ssl_kit.verbs.defaults import ViewSchedule, build_method, schedule_views, view_size
from ssl_kit.verbs.monitor import hold_out
from ssl_kit.verbs.pretrain import Settings as Training
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View, ViewRecipe, plain
from ssl_kit.views.sample import sample

_GAP = 4  # pixels between the pictures


@dataclass(frozen=True)
class Settings:
    """Whose views to draw, and where.

    Args:
        data: folder (searched recursively), .csv or .parquet manifest with a `path` column, shards, or a built-in set.
        out: the picture to write.
        method: that would see them, as in a recipe; SimCLR by default.
        views: what may happen to an image, as in a recipe.
        init: encoder that the run would start from; with --minutes the image size is not chosen then.
        image_size: side of a view in pixels, or height and width; chosen as `pretrain` chooses it by default.
        grow: sides of the views from an epoch on, as {0: 16, 10: 24}; each of them is drawn.
        batch_size: images of a step; what --minutes chooses depends on it.
        minutes: of the run; image size and growing views that are left open are tried and chosen as by `pretrain`.
        limit: use only so many images, as the run would.
        channels: of the images: 3, 1, as many as a TIFF or array has bands, or names of bands: red,nir.
        range: of images of more than 8 bits: auto, full or LOW,HIGH; see `ssl-kit pretrain --help`.
        count: originals, one row each.
        views_per_image: views beside each original, 1 to 10.
        seed: of the run that would see these views.
        epoch: of that run; by default the first, and where views grow the first with each size.

    Examples:
        ssl-kit views photos --out views.png
        ssl-kit views photos -c mae --views.strength 0.5
        ssl-kit views photos --minutes 10
    """

    data: str
    _: KW_ONLY
    # What to read
    limit: int | None = None
    channels: int | str = 3
    range: str = "auto"
    # How it would be trained
    method: Entries | None = None
    views: ViewRecipe = ViewRecipe()  # noqa: RUF009 (frozen)
    init: str | None = None
    image_size: int | tuple[int, int] | None = None
    grow: dict[int, int] | None = None
    batch_size: int | None = None
    minutes: float | None = None
    seed: int = 0
    # What to draw
    count: int = 8
    views_per_image: int = 8
    epoch: int | None = None
    # Where it goes
    out: str = "views.png"


@verb(Settings)
def views(settings: Settings) -> Entries:
    """Draw originals and their views, as the method will see them.

    Returns:
        `{"out", "originals": ids, "image_size": [height, width], "views": [{"epoch", "size", "count"}], "preset",
        "seed"}`: of each size that the views have, the epoch it is drawn of and how many views an image has there.
    """
    began = time.perf_counter()
    for place in [*places(settings.data), None]:
        check_output(settings.out, place)
    reading, measure = reading_of(settings.channels, settings.range)
    source = open_source(settings.data, limit=settings.limit, reading=reading, measure=measure, in_memory=False)
    chosen = _decodable(source, settings.count)
    images, rows = list(chosen.values()), np.array(list(chosen), np.int64)
    training, schedule = _as_trained(settings, source, began)
    drawn = _drawn(training, schedule, source.channels, settings)
    grid = _grid(images, rows, drawn, training.size, settings.seed)
    with atomic_file(settings.out) as temporary:
        image = to_image(grid) if grid.shape[2] != 1 else Image.fromarray(grid[:, :, 0])
        image.save(temporary, format="PNG", pnginfo=made_here())
    sizes = "; ".join(f"{len(made)} views of {_sides(made[0].size)} px, epoch {epoch}" for epoch, made in drawn.items())
    result(f"{settings.out}: {len(images)} originals of {_sides(training.size)} px (left), of each {sizes}")
    next_command(retyped("ssl-kit pretrain", "out", "count", "views_per_image", "epoch"), own=False)
    return {
        "out": str(Path(settings.out)),
        "originals": source.ids(list(chosen)),
        "image_size": list(training.size),
        "views": [{"epoch": epoch, "size": list(made[0].size), "count": len(made)} for epoch, made in drawn.items()],
        "preset": training.views.preset,
        "seed": settings.seed,
    }


def _as_trained(settings: Settings, source: Source, began: float) -> tuple[Training, ViewSchedule]:
    """What `pretrain` would make of the same options: its settings, and the views from an epoch on."""
    shared = {one.name for one in fields(Training)} & set(vars(settings))
    training = Training(**{name: getattr(settings, name) for name in shared})
    if training.minutes and (training.image_size is None or training.grow is None):
        tried = time.perf_counter()
        training, _ = fit_to_time(training, hold_out(source)[0], began)
        seconds = time.perf_counter() - tried
        say(f"chosen for {settings.minutes:g} minutes by a trial of {seconds:.0f} s, which pretrain makes anew")
    size, gray = view_size(training.image_size, source), (0.5,) * source.channels
    learner = build_method(training.method, image_size=size, channels=source.channels, mean=gray, std=gray)
    recipe = training.views.fitted(learner.preset, size, source.channels)
    return replace(training, image_size=size, views=recipe), schedule_views(recipe, size, training.grow, learner)


def _drawn(
    training: Training, schedule: ViewSchedule, channels: int, settings: Settings
) -> dict[int, tuple[View, ...]]:
    """Epoch -> the views to draw of it: of each size that views have as many, or those of the one epoch asked for."""
    begins = [*schedule]
    if settings.epoch is not None:
        begins = [max(epoch for epoch in schedule if epoch <= settings.epoch)]
    begins = begins[: settings.views_per_image]
    counts = map(len, np.array_split(np.arange(settings.views_per_image), len(begins)))
    return {
        begin if settings.epoch is None else settings.epoch: training.views.build(schedule[begin][0].size, channels, n)
        for begin, n in zip(begins, counts, strict=True)
    }


def _sides(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


def _decodable(source: Source, count: int) -> dict[int, np.ndarray]:
    """Up to `count` images (H, W, C) by their position in the source, which their views depend on; spread out."""
    found: dict[int, np.ndarray] = {}
    for row in permutation(0, 0, len(source)).tolist():
        try:
            found[row] = pixels(source, row)
        except BadImageError as error:
            source.skip(row, str(error))
        if len(found) == count:
            break
    if not found:
        raise UserError(
            f"{source.name}: none of the {len(source)} images could be decoded; wanted readable image files"
        )
    return dict(sorted(found.items()))


def _grid(
    images: list[np.ndarray], index: np.ndarray, drawn: dict[int, tuple[View, ...]], size: tuple[int, int], seed: int
) -> np.ndarray:
    """(height, width, C) uint8: a row per image, the original first; smaller views in the middle of their cell."""
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    columns = [(0, 0, plain(size)), *((at, *view) for at, made in drawn.items() for view in enumerate(made))]
    cell = tuple(max(view.size[axis] for *_, view in columns) for axis in (0, 1))
    high, wide = (side + _GAP for side in cell)
    grid = np.full((high * len(images) + _GAP, wide * len(columns) + _GAP, images[0].shape[2]), 255, np.uint8)
    for column, (epoch, which, view) in enumerate(columns):
        params = sample(view, seed, epoch, index, which, heights, widths)
        made = np.empty((len(images), images[0].shape[2], *view.size), np.uint8)
        apply_host(images, params, view.size, out=made)
        margin_y, margin_x = ((whole - side) // 2 for whole, side in zip(cell, view.size, strict=True))
        for row in range(len(images)):
            top, left = _GAP + row * high + margin_y, _GAP + column * wide + margin_x
            grid[top : top + view.size[0], left : left + view.size[1]] = made[row].transpose(1, 2, 0)
    return grid
