"""The pictures of `ssl-kit evaluate --only looks`: what the encoder looks at, for a few test images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.data.batches import ViewLoader
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.features import FeatureSet
from ssl_kit.evaluation.looking import (
    attends,
    class_attention,
    cosine_to,
    feature_colours,
    feature_map,
    integrated_gradients,
    prototypes,
    similarity_map,
)
from ssl_kit.evaluation.neighbours import normalised, search
from ssl_kit.report.heat import colours_of, enlarged, framed, overlay, signed_overlay
from ssl_kit.report.pictures import Look, Prototype, draw_looks
from ssl_kit.verbs.evaluation_pictures import image_of, rows_in, spread
from ssl_kit.views.recipe import plain

_IMAGES = 8
_CLASSES = 12  # with a prototype, the most frequent ones
_STRONG = 0.99  # of the pixels are below the strongest colour of integrated gradients


def draw(folder: Path, encoder: Encoder, features: FeatureSet, train: Source, test: Source, seed: int) -> None:
    """Writes `looks.json`.

    Args:
        folder: RUN/pictures.
        encoder: in eval mode, what made the features.
        features: of train and test.
        train: where the nearest neighbours are.
        test: a few images of it are looked at, from every class in turn.
        seed: of the choice.
    """
    rows = rows_in(features.test, test, spread(test.labels, _IMAGES, seed))
    asked = normalised(features.test.vectors[[row for row, _ in rows]])
    nearest = search(normalised(features.train.vectors), asked, 1)[1][:, 0]
    known = {name: place for place, name in enumerate(train.ids)}
    places = np.array([place for _, place in rows])
    neighbours = np.array([known[features.train.ids[row]] for row in nearest])
    device = next(encoder.parameters()).device
    images, others = (
        _images(source, which, encoder.image_size).to(device) for source, which in ((test, places), (train, neighbours))
    )
    looks = [*_shown(encoder, images, others, _names(test, places), _names(train, neighbours))]
    looks += _maps(encoder, images, others)
    if find_spec("captum") is not None:
        looks.append(_gradients(encoder, images, others))
    else:
        say("looks: integrated gradients are left out; they need captum: pip install 'ssl-kit[explain]'")
    draw_looks(folder, looks, _prototypes(features, test))


def _images(source: Source, rows: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) in [0, 1], as the encoder sees them when it is evaluated."""
    distinct, back = np.unique(rows, return_inverse=True)
    batch = next(iter(ViewLoader(source, [distinct], (plain(size),))))
    if len(batch["label"]) < len(distinct):
        raise UserError(f"{source.name}: an image of which there are features can no longer be decoded; evaluate again")
    return batch["views"][0][torch.from_numpy(back)]


def _names(source: Source, rows: np.ndarray) -> list[str]:
    labels = source.labels[rows]
    return [source.classes[label] if label >= 0 else "unlabelled" for label in labels]


def _pixels(image: Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] to (H, W, C) uint8."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _shown(
    encoder: Encoder, images: Tensor, others: Tensor, names: list[str], other_names: list[str]
) -> tuple[Look, Look]:
    """The images and their neighbours."""
    with torch.no_grad():
        cosines = F.cosine_similarity(encoder(images), encoder(others)).tolist()
    notes = [f"{name} ({cosine:.3f})" for name, cosine in zip(other_names, cosines, strict=True)]
    return (
        Look("image", [enlarged(_pixels(image)) for image in images], names),
        Look("neighbour", [enlarged(_pixels(image)) for image in others], notes),
    )


def _maps(encoder: Encoder, images: Tensor, others: Tensor) -> list[Look]:
    """Maps over the positions of the last layer: attention and patches of a transformer, Grad-CAM of a CNN."""
    try:
        maps = feature_map(encoder, images)
    except UserError as error:
        say(f"looks: maps are left out; {error}")
        return []
    grid = (maps.shape[2], maps.shape[3])
    found = []
    if attends(encoder):
        if encoder.model.has_class_token:
            shares = class_attention(encoder, images)
            found.append(_heat("attention", images, shares, even=1 / shares[0].numel()))
        place = (grid[0] // 2, grid[1] // 2)
        cosines = cosine_to(maps, place)
        look = _heat("patch", images, cosines, low=float(cosines.min()))
        found.append(Look(look.kind, [framed(one, place, grid) for one in look.images], look.notes, look.numbers))
    else:
        contributions = similarity_map(encoder, images, others).clamp_min(0)
        found.append(_heat("similarity", images, contributions, smooth=True))
    if min(grid) > 1:
        shape = enlarged(_pixels(images[0])).shape
        drawn = [colours_of(one, (shape[0], shape[1])) for one in feature_colours(maps).cpu().numpy()]
        found.append(Look("colours", drawn, [""] * len(images), {"rows": grid[0], "columns": grid[1]}))
    return found


def _heat(
    kind: str, images: Tensor, maps: Tensor, *, low: float = 0.0, smooth: bool = False, even: float | None = None
) -> Look:
    """One scale for all images, so that their maps can be compared: from `low` to the largest value."""
    high = float(maps.max())
    values = maps.cpu().numpy()
    drawn = [overlay(_pixels(image), one, low, high, smooth=smooth) for image, one in zip(images, values, strict=True)]
    numbers = {"low": low, "high": high, "rows": maps.shape[1], "columns": maps.shape[2]}
    return Look(kind, drawn, [""] * len(images), numbers | ({} if even is None else {"even": even}))


def _gradients(encoder: Encoder, images: Tensor, others: Tensor) -> Look:
    attributions, gain = integrated_gradients(encoder, images, others)
    values = attributions.cpu().numpy()
    limit = float(np.quantile(np.abs(values), _STRONG))
    drawn = [signed_overlay(_pixels(image), one, limit) for image, one in zip(images, values, strict=True)]
    miss = float((attributions.sum(dim=(1, 2)) - gain).abs().max())
    return Look("gradients", drawn, [""] * len(images), {"low": -limit, "high": limit, "miss": miss})


def _prototypes(features: FeatureSet, test: Source) -> list[Prototype]:
    """Of the most frequent classes among the test images."""
    found, place = features.test, {name: position for position, name in enumerate(test.ids)}
    rows, counters, cosines = prototypes(found.vectors, found.labels, len(found.classes))
    frequent = np.argsort(-np.bincount(found.labels[found.labels >= 0], minlength=len(found.classes)), kind="stable")
    show = lambda row: image_of(test, place[found.ids[row]])
    return [
        Prototype(
            found.classes[label],
            show(rows[label]),
            found.classes[found.labels[counters[label]]],
            show(counters[label]),
            (cosines[label, 0], cosines[label, 1]),
        )
        for label in sorted(frequent[:_CLASSES].tolist())
        if counters[label] >= 0
    ]
