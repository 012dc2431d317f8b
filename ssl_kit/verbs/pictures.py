"""The pictures and tables beside scores: what the encoder looks at, neighbours, a map, single classes and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_csv, write_json
from ssl_kit.core.random import permutation
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.sources import Source, pixels
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.explain import (
    attends,
    class_attention,
    cosine_to,
    feature_colours,
    feature_map,
    integrated_gradients,
    prototypes,
    similarity_map,
)
from ssl_kit.evaluation.features import FeatureSet, Pca
from ssl_kit.evaluation.health import sample_rows
from ssl_kit.evaluation.metrics import ClassScore, class_scores, confidently_wrong, roc_curves, suspected_errors
from ssl_kit.evaluation.result import Result, confusion_matrix
from ssl_kit.report.pictures import (
    THUMBNAIL,
    Look,
    Prototype,
    colours_of,
    draw_looks,
    draw_map,
    draw_neighbours,
    draw_views,
    draw_wrong,
    enlarged,
    framed,
    overlay,
    signed_overlay,
)
from ssl_kit.views.recipe import View, plain

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
    rows = rows_in(features.test, test, spread(test.labels(), _IMAGES, seed))
    asked = normalised(features.test.vectors[[row for row, _ in rows]])
    nearest = search(normalised(features.train.vectors), asked, 1)[1][:, 0]
    known = {name: place for place, name in enumerate(train.ids())}
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
    return [source.classes[label] if label >= 0 else "unlabelled" for label in source.labels(rows)]


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
    found, place = features.test, {name: position for position, name in enumerate(test.ids())}
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


_QUERIES = 12  # strips in the report
_NEIGHBOURS = 8  # images in a strip
_MAP = 2_000  # images on the map; t-SNE of so many takes seconds
_STREAM_QUERIES = 100_005  # of core/random.py


class Pictures:
    """Collects what the pictures need while each kind of features is in memory.

    Images are numbered through: test first, then train, so that a query's neighbours can be images of train.
    """

    def __init__(self, folder: Path, train: Source, test: Source, seed: int):
        self.folder, self.train, self.test, self.seed = folder, train, test, seed
        self.queries = spread(test.labels(), _QUERIES, seed)
        self.found: dict[str, np.ndarray] = {}
        self.positions: np.ndarray | None = None
        self.projection = ""

    def see(self, features: FeatureSet) -> None:
        """Notes neighbours of the encoder and the pixels, and the encoder's map."""
        if features.name not in ("encoder", "pixels"):
            return
        rows = rows_in(features.test, self.test, self.queries)
        self.queries = np.array([query for _, query in rows])
        asked = features.test.vectors[[row for row, _ in rows]]
        ids = search(normalised(features.train.vectors), normalised(asked), _NEIGHBOURS)[1]
        place = {name: position for position, name in enumerate(self.train.ids())}
        self.found[features.name] = len(self.test) + np.vectorize(lambda one: place[features.train.ids[one]])(ids)
        if features.name == "encoder":
            shown = sample_rows(np.arange(len(features.test)), _MAP, self.seed)
            place = {name: position for position, name in enumerate(self.test.ids())}
            self.shown = np.array([place[features.test.ids[one]] for one in shown])
            self.positions, self.projection = flattened(features.test.vectors[shown], self.seed)

    def draw(self) -> None:
        """Writes the neighbours and the map for the report."""
        labels = np.concatenate((self.test.labels(), self.train.labels()))
        if self.found and len(self.queries):
            draw_neighbours(self.folder, self.queries, self.found, self._thumbnail, labels, self.test.classes)
        if self.positions is not None:
            draw_map(
                self.folder,
                self.positions,
                labels[self.shown],
                self.test.classes,
                self._thumbnail,
                self.shown,
                self.projection,
            )

    def _thumbnail(self, index: int) -> np.ndarray:
        source, row = (self.test, index) if index < len(self.test) else (self.train, index - len(self.test))
        return image_of(source, row)


def image_of(source: Source, row: int) -> np.ndarray:
    """(H, W, C) uint8, for a thumbnail."""
    return pixels(source, row, smallest=(THUMBNAIL, THUMBNAIL))


def rows_in(embeddings: Embeddings, source: Source, places: np.ndarray) -> list[tuple[int, int]]:
    """(row of the embeddings, place in the source) of those `places` that have a row: files may turn out broken."""
    row = {name: position for position, name in enumerate(embeddings.ids)}
    return [(row[name], int(place)) for name, place in zip(source.ids(places), places, strict=True) if name in row]


def spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` positions, from every class in turn."""
    order = permutation(seed, 0, len(labels), _STREAM_QUERIES)
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before it
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return order[np.lexsort((labels[order], turn[order]))][:count]


_ALIKE = 1e-7  # of the largest value of a feature: less is rounding of float32


def flattened(vectors: np.ndarray, seed: int, of: str = "test images", quick: bool = False) -> tuple[np.ndarray, str]:
    """(N, 2) for the map, and how it was made: t-SNE of 50 principal components, PCA when there are few images.

    PCA also where features are all alike or single numbers: t-SNE divides by their spread, and ends the process by a
    segmentation fault when that is 0.

    Args:
        vectors: (N, D); their scale does not matter.
        seed: of both.
        of: what the images are, in words.
        quick: PCA in any case, for a map that may not take seconds.
    """
    largest, count = np.abs(vectors).max(initial=0.0), f"{len(vectors):,} {of}"
    vectors = vectors / largest if largest > 0 else vectors
    pca = Pca.of(vectors, 50, seed)
    reduced = pca.apply(vectors)
    if quick or len(vectors) < 100 or reduced.shape[1] < 2 or reduced[:, 0].std() < _ALIKE:
        return _padded(reduced[:, :2]), f"PCA of {count}"
    from sklearn.manifold import TSNE

    tsne: Callable[[np.ndarray], np.ndarray] = TSNE(init="pca", max_iter=500, random_state=seed).fit_transform
    return tsne(reduced), f"t-SNE of {count}"


def _padded(positions: np.ndarray) -> np.ndarray:
    return np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))


_DRAWN = 24  # mistakes with a picture


def write_classes(folder: Path, test: Embeddings, probe: Result) -> list[ClassScore]:
    """Writes confusion.csv, classes.csv and roc.json of a probe that kept its probabilities.

    Args:
        folder: RUN/details.
        test: labelled; rows without a label are left out, as the probe does.
        probe: of these rows.
    """
    labels, classes = test.labels[test.labels >= 0], test.classes
    assert probe.predictions is not None and probe.probabilities is not None
    confusion = confusion_matrix(labels, probe.predictions, len(classes))
    scores = class_scores(confusion, classes)
    write_csv(folder / "classes.csv", [field.name for field in fields(ClassScore)], map(astuple, scores))
    rows = ([name, *row] for name, row in zip(classes, confusion, strict=True))
    write_csv(folder / "confusion.csv", ["label", *classes], rows)
    curves = roc_curves(labels, probe.probabilities)
    if len(curves.classes):
        write_json(folder / "roc.json", curves.record(classes))
    return scores


def write_mistakes(folder: Path, source: Source, test: Embeddings, probe: Result) -> None:
    """Writes details/confidently_wrong.csv, and the worst of them with their images as pictures/wrong.json.

    Args:
        folder: RUN.
        source: where the images are.
        test: their features, with ids.
        probe: of the labelled ones among them.
    """
    assert probe.predictions is not None and probe.confidences is not None
    known, classes = np.flatnonzero(test.labels >= 0), test.classes
    wrong = confidently_wrong(test.labels[known], probe.predictions, probe.confidences)
    rows, predicted, confidences = known[wrong], probe.predictions[wrong], probe.confidences[wrong]
    mistakes = (
        (test.ids[row], classes[test.labels[row]], classes[other], f"{confidence:.4f}")
        for row, other, confidence in zip(rows, predicted, confidences, strict=True)
    )
    header = ["id", "label", "predicted", "confidence"]
    write_csv(folder / "details" / "confidently_wrong.csv", header, mistakes)
    place = {name: position for position, name in enumerate(source.ids())}
    places = np.array([place[test.ids[row]] for row in rows[:_DRAWN]], dtype=np.int64)
    draw_wrong(
        folder / "pictures",
        [image_of(source, row) for row in places],
        places,
        test.labels[rows[:_DRAWN]],
        predicted[:_DRAWN],
        confidences[:_DRAWN],
        classes,
    )


def write_suspects(path: Path, part: Embeddings, device: str = "cpu") -> float:
    """Writes the labelled images whose neighbours disagree with their label; the share of them."""
    known, classes = np.flatnonzero(part.labels >= 0), part.classes
    rows, suggested, margins = suspected_errors(part.vectors[known], part.labels[known], len(classes), device=device)
    suspects = (
        (part.ids[row], classes[part.labels[row]], classes[other], f"{margin:.4f}")
        for row, other, margin in zip(known[rows], suggested, margins, strict=True)
    )
    write_csv(path, ["id", "label", "neighbours_say", "margin"], suspects)
    return len(rows) / len(known)


def draw_first(path: Path, source: Source, rows: np.ndarray, views: tuple[View, ...], seed: int) -> None:
    """The first picture of a run, before its first step: a few images and their views."""
    batch = next(iter(ViewLoader(source, [rows], views, seed=seed)))
    kept = batch["key"].index.numpy()
    originals = next(iter(ViewLoader(source, [kept], (plain(views[0].size),))))["views"][0].numpy()
    stored = [(image.transpose(1, 2, 0) * 255).round().astype(np.uint8) for image in originals]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_views(path, stored, [view.numpy() for view in batch["views"]])
