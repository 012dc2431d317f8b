"""What a run shows of its images without a single label: neighbours, a map, outliers and near-duplicates.

`pretrain` draws it when it has ended, from a sample that is embedded once, and says what to type next. `evaluate` draws
neighbours and map anew, of test images; `duplicates` looks for copies among all images, and with features too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_kit.core.console import next_command, say
from ssl_kit.core.files import if_room
from ssl_kit.core.machine import eager
from ssl_kit.core.sealed import Entries
from ssl_kit.data.listing import unescape
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.embeddings.exact import normalised, search, solver
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.evaluation.alignment import SIDE
from ssl_kit.evaluation.duplicates import groups, isolation, near_duplicates
from ssl_kit.evaluation.features import centre
from ssl_kit.report.head import next_step, verdict
from ssl_kit.report.pictures import draw_duplicates, draw_map, draw_neighbours
from ssl_kit.report.read import read_run
from ssl_kit.training.verdict import too_short
from ssl_kit.verbs.pictures import flattened, image_of, spread
from ssl_kit.views.recipe import plain

_IMAGES = 5_000  # of a run, embedded for this
_SECONDS = 20  # of training, in which so many images are trained on are enough: a look at each costs far less
_FEWEST = 500  # images, however slow the machine
_QUERIES, _NEIGHBOURS = 12, 8
_AROUND = 10  # neighbours that say how far away an image is
_MAP = 1_000  # images on the map; t-SNE of so many takes seconds
_DECODED = 500  # images on a map that are decoded again, to be drawn larger
_IN_REPORT, _OF_GROUP = 12, 6  # outliers and groups, images of a group


class _Beside(nn.Module):
    """(B, C, h, w) to (B, D + C S S): the features, and the image at S = 32 pixels."""

    def __init__(self, network: Encoder | Wrapped):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) in [0, 1]."""
        small = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return torch.cat([self.network(images).float(), small.flatten(1)], dim=1)


def see(folder: Path, encoder: Encoder, training: Source, held: Source | None, seed: int, record: Entries) -> Entries:
    """Draws it into RUN/pictures; what `run.json` keeps of it.

    Args:
        folder: of the run.
        encoder: trained.
        training: images that were trained on.
        held: images that were not, if any: they ask.
        seed: of the choice of images, and of the map.
        record: of the run: how fast it was, and how long.
    """
    started = time.perf_counter()
    most = int(min(_IMAGES, max(_FEWEST, _SECONDS * record["images_per_second"])))
    rows = spread(np.full(len(training), -1), most, seed)
    shown = training.subset(np.sort(rows))
    queries = shown if held is None else held
    queries = queries.subset(spread(queries.labels(), _QUERIES, seed))
    module = _Beside(encoder.to(solver()))
    view, label = plain(encoder.image_size), "what was learnt"
    with eager():
        made, asked = (embed(module, part, view=view, label=label) for part in (shown, queries))
    found, quick = 0, bool(too_short(record.get("steps", 0), record.get("epochs", 0)))
    with if_room(folder):
        _draw_neighbours(folder / "pictures", made, asked, shown, queries, encoder.dim, held is not None)
        _draw_map(folder / "pictures", made, shown, encoder.dim, seed, quick)
        found = _draw_duplicates(folder / "pictures", made, shown, encoder.dim)
    seconds = time.perf_counter() - started
    told = f"{len(made):,} of {len(training):,} images" if len(made) < len(training) else f"all {len(made):,} images"
    copies = f"{found or 'no'} group{'' if found == 1 else 's'} of near-duplicates"
    say(f"seen: neighbours, a map, outliers and {copies} among {told} ({seconds:.1f} s)")
    return {"images": len(made), "of": len(training), "near_duplicates": found, "seconds": round(seconds, 2)}


def _places(embeddings: Embeddings, source: Source) -> np.ndarray:
    """(N,) positions of the rows in the source: files may turn out broken."""
    place = {name: position for position, name in enumerate(source.ids())}
    return np.array([place[name] for name in embeddings.ids], np.int64)


def _draw_neighbours(
    folder: Path, made: Embeddings, asked: Embeddings, shown: Source, queries: Source, dim: int, apart: bool
) -> None:
    """By features and by pixels; images are numbered through, those that are asked with last."""
    place = {name: row for row, name in enumerate(made.ids)}
    own = np.array([-1 if apart else place[name] for name in asked.ids])
    found = {}
    for name, columns in (("encoder", slice(dim)), ("pixels", slice(dim, None))):
        gallery, wanted = made.vectors[:, columns].copy(), asked.vectors[:, columns].copy()
        if name == "pixels":
            centre(gallery, wanted)
        rows = search(normalised(gallery), normalised(wanted), min(_NEIGHBOURS + 1, len(made)))[1]
        order = np.argsort(rows == own[:, None], axis=1, kind="stable")  # an image does not find itself
        rows = np.take_along_axis(rows, order, axis=1)[:, : min(_NEIGHBOURS, len(made) - (not apart))]
        found[name] = _places(made, shown)[rows]
    labels = np.concatenate((shown.labels(), queries.labels()))
    numbers = len(shown) + _places(asked, queries)
    thumbnail = lambda index: image_of(*((shown, index) if index < len(shown) else (queries, index - len(shown))))
    whose = "that was held out of training" if apart else "that was trained on"
    told = f"Each query is an image {whose}; neighbours are among {len(made):,} of the images trained on."
    draw_neighbours(folder, numbers, found, thumbnail, labels, shown.classes, told)


def _draw_map(folder: Path, made: Embeddings, shown: Source, dim: int, seed: int, quick: bool) -> None:
    rows = np.sort(spread(np.full(len(made), -1), _MAP, seed))
    places, pictures = _places(made, shown), _pictures(made, dim)
    positions, projection = flattened(made.vectors[rows, :dim], seed, "of the images trained on", quick)
    small = len(rows) > _DECODED
    thumbnail = lambda row: pictures[row] if small else image_of(shown, int(places[row]))
    draw_map(folder, positions, made.labels[rows], made.classes, thumbnail, rows, projection)


def _draw_duplicates(folder: Path, made: Embeddings, shown: Source, dim: int) -> int:
    """The number of groups of near-duplicates."""
    units = normalised(made.vectors[:, :dim])
    far = isolation(*search(units, units, _AROUND + 1, device=solver()))
    pairs = near_duplicates(_pictures(made, dim))
    sets, places = groups(pairs, len(made)), dict(zip(made.ids, _places(made, shown).tolist(), strict=True))
    largest = sorted(sets, key=len, reverse=True)[:_IN_REPORT]
    draw_duplicates(
        folder,
        [[made.ids[row] for row in members[:_OF_GROUP]] for members in largest],
        [(made.ids[row], float(far[row])) for row in np.lexsort((np.arange(len(far)), -far))[:_IN_REPORT]],
        lambda name: image_of(shown, places[name]),
        num_images=len(made),
        num_groups=len(sets),
        superfluous=sum(len(members) - 1 for members in sets),
    )
    return len(sets)


def _pictures(made: Embeddings, dim: int) -> np.ndarray:
    """(N, S, S, C) uint8."""
    flat = made.vectors[:, dim:].reshape(len(made), -1, SIDE, SIDE)
    return (flat * 255).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def say_next(record: Entries) -> None:
    """Where to look, and what to type: scores where there are labels, a search where there are none."""
    run = read_run(record["run"])
    say(f"look: {(run.folder / 'report.html').resolve().as_uri()}")
    next_command(next_step(run, verdict(run)).command)


def first_image(source: Source) -> str:
    """An image of a source as `search` takes it: a file, or the id of an image that is none."""
    name = source.ids(slice(1))[0]
    path = None if source.root is None else source.root / os.fsdecode(unescape(name))
    return str(path) if path is not None and path.is_file() else name
