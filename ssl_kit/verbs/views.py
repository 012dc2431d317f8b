"""`ssl-kit views`: a picture of what the method will see, before a day is spent on it."""

from __future__ import annotations

import shlex
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_kit.core.console import next_command, result
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file
from ssl_kit.core.owned import check_output
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import reading_of
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import typed, verb
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import name_of, open_source, places
from ssl_kit.data.sources import Source, pixels
from ssl_kit.report.pictures import draw_views, made_here, to_image
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View, ViewRecipe, plain
from ssl_kit.views.sample import sample

_GAP = 4  # pixels between the pictures
_LARGEST_DEFAULT = 224  # pixels
_FIRST = 8  # images in the first picture of a run


@dataclass(frozen=True)
class Settings:
    """Whose views to draw, and where.

    Args:
        data: folder (searched recursively), .csv or .parquet manifest with a `path` column, or a built-in set.
        out: the picture to write.
        views: what may happen to an image, as in a recipe.
        image_size: side of a view in pixels, the shorter of two; default: the shorter side of the first image, at most
            224.
        channels: of the images: 3, 1, as many as a TIFF or array has bands, or names of bands: red,nir.
        range: of images of more than 8 bits: auto, full or LOW,HIGH; see `ssl-kit pretrain --help`.
        count: originals, one row each.
        views_per_image: views beside each original, 1 to 10.
        seed: of the run that would see these views.
        epoch: of that run.

    Examples:
        ssl-kit views photos --out views.png
        ssl-kit views photos -c mae --views.strength 0.5
    """

    data: str
    _: KW_ONLY
    # What to read
    channels: int | str = 3
    range: str = "auto"
    image_size: int | tuple[int, int] | None = None
    # What to draw
    views: ViewRecipe = ViewRecipe()  # noqa: RUF009 (frozen)
    count: int = 8
    views_per_image: int = 8
    seed: int = 0
    epoch: int = 0
    # Where it goes
    out: str = "views.png"


@verb(Settings)
def views(settings: Settings) -> Entries:
    """Draw originals and their views, as the method will see them."""
    views = settings.views
    for place in [*places(settings.data), None]:
        check_output(settings.out, place)
    reading, measure = reading_of(settings.channels, settings.range)
    source = open_source(settings.data, reading=reading, measure=measure, in_memory=False)
    chosen = _decodable(source, settings.count)
    images, rows = list(chosen.values()), np.array(list(chosen), np.int64)
    asked = settings.image_size  # a run's recipe has both sides
    side = min(asked) if isinstance(asked, list | tuple) else asked or min(_LARGEST_DEFAULT, *images[0].shape[:2])
    views = views.fitted("simclr", (side, side), source.channels)
    drawn = views.build((side, side), source.channels, settings.views_per_image)
    grid = _grid(images, rows, drawn, side, settings.seed, settings.epoch)
    with atomic_file(settings.out) as temporary:
        image = to_image(grid) if grid.shape[2] != 1 else Image.fromarray(grid[:, :, 0])
        image.save(temporary, format="PNG", pnginfo=made_here())
    result(
        f"{settings.out}: {len(images)} originals (left), {settings.views_per_image} views of each, {side} x {side} "
        f"pixels, epoch {settings.epoch}"
    )
    named = f"ssl-kit pretrain {shlex.quote(name_of(settings.data))}"
    next_command(typed(named, settings, "views", "image_size", "channels", "range", "seed"), own=False)
    return {
        "out": str(Path(settings.out)),
        "originals": source.ids(list(chosen)),
        "views_per_image": settings.views_per_image,
        "image_size": side,
        "preset": views.preset,
        "seed": settings.seed,
        "epoch": settings.epoch,
    }


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
    images: list[np.ndarray], index: np.ndarray, drawn: tuple[View, ...], side: int, seed: int, epoch: int
) -> np.ndarray:
    """(height, width, C) uint8: a row per image, the original first; smaller views in the middle of their cell."""
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    cell = side + _GAP
    grid = np.full((cell * len(images) + _GAP, cell * (len(drawn) + 1) + _GAP, images[0].shape[2]), 255, np.uint8)
    original = View((side, side))
    for column, view in enumerate((original, *drawn)):
        params = sample(view, seed, epoch, index, max(0, column - 1), heights, widths)
        made = np.empty((len(images), images[0].shape[2], *view.size), np.uint8)
        apply_host(images, params, view.size, out=made)
        margin_y, margin_x = (side - view.size[0]) // 2, (side - view.size[1]) // 2
        for row in range(len(images)):
            top, left = _GAP + row * cell + margin_y, _GAP + column * cell + margin_x
            grid[top : top + view.size[0], left : left + view.size[1]] = made[row].transpose(1, 2, 0)
    return grid


def draw_first(path: Path, source: Source, views: tuple[View, ...], seed: int) -> None:
    """The first picture of a run, before its first step: a few images and their views."""
    rows = np.linspace(0, len(source) - 1, min(_FIRST, len(source))).astype(np.int64)
    loader = ViewLoader(source, [rows], views, seed=seed)
    batch = next(iter(loader))
    kept = batch["key"].index.numpy()
    originals = next(iter(ViewLoader(source, [kept], (plain(views[0].size),))))["views"][0].numpy()
    stored = [(image.transpose(1, 2, 0) * 255).round().astype(np.uint8) for image in originals]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_views(path, stored, [view.numpy() for view in batch["views"]])
