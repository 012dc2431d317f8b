"""The pictures that `ssl-kit evaluate` leaves for the report: nearest neighbours, and a map of the test images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssl_kit.core.random import permutation
from ssl_kit.data.decode import decode
from ssl_kit.data.sources import Source
from ssl_kit.embeddings import Embeddings
from ssl_kit.evaluation.baselines import Pca
from ssl_kit.evaluation.features import FeatureSet
from ssl_kit.evaluation.health import sample_rows
from ssl_kit.evaluation.neighbours import normalised, search
from ssl_kit.report.pictures import draw_map, draw_neighbours

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
        self.queries = spread(test.labels, _QUERIES, seed)
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
        place = {name: position for position, name in enumerate(self.train.ids)}
        self.found[features.name] = len(self.test) + np.vectorize(lambda one: place[features.train.ids[one]])(ids)
        if features.name == "encoder":
            shown = sample_rows(np.arange(len(features.test)), _MAP, self.seed)
            place = {name: position for position, name in enumerate(self.test.ids)}
            self.shown = np.array([place[features.test.ids[one]] for one in shown])
            self.positions, self.projection = _flattened(features.test.vectors[shown], self.seed)

    def draw(self) -> None:
        """Writes the neighbours and the map for the report."""
        labels = np.concatenate((self.test.labels, self.train.labels))
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
    """(H, W, C) uint8, for a thumbnail of 64 pixels or less."""
    if source.images is not None:
        return source.images[row]
    return decode(source.read(row), source.channels, smallest=(64, 64)).image


def rows_in(embeddings: Embeddings, source: Source, places: np.ndarray) -> list[tuple[int, int]]:
    """(row of the embeddings, place in the source) of those `places` that have a row: files may turn out broken."""
    row = {name: position for position, name in enumerate(embeddings.ids)}
    return [(row[source.ids[place]], int(place)) for place in places if source.ids[place] in row]


def spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` positions, from every class in turn."""
    order = permutation(seed, 0, len(labels), _STREAM_QUERIES)
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before it
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return order[np.lexsort((labels[order], turn[order]))][:count]


def _flattened(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """(N, 2) for the map, and how it was made: t-SNE of 50 principal components, PCA when there are few images."""
    pca = Pca.of(vectors, 50, seed)
    if len(vectors) < 100:
        return _padded(pca.apply(vectors, 2)), f"PCA of {len(vectors):,} test images"
    from sklearn.manifold import TSNE

    tsne: Callable[[np.ndarray], np.ndarray] = TSNE(init="pca", max_iter=500, random_state=seed).fit_transform
    return tsne(pca.apply(vectors)), f"t-SNE of {len(vectors):,} test images"


def _padded(positions: np.ndarray) -> np.ndarray:
    return np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))
