"""Duplicates and outliers: which images show the same picture, which have no neighbours. Functions of arrays.

Features of self-supervised training bring copies together, and images that merely show the same kind of thing too. So
the features name candidates, and the pictures decide: two show the same when one, or a crop of it, correlates with the
other. Both limits come from planted copies (`edits`) of the very images at hand.

Leakage: test images of which a near-duplicate is among the training images. A score on them is memory, not skill.

Images are compared as small thumbnails, each without its own mean and of length 1, so that the inner product is the
correlation of their pixels: blind to brightness and contrast, hardly moved by compression, and independent of the
encoder that is being judged. A correlation alone does not do: all ones of MNIST look alike. A near-duplicate is

    1 - c_1 <= (1 - c_4) / 3  and  c_1 >= 0.9        or  c_1 >= 0.9999

with c_i the correlation with the i-th nearest training image: three times as near as the fourth, so that up to three
copies are seen as such. On CIFAR-10 this finds 2.5 % of the test images, every pair of one class (Barz & Denzler 2020,
https://arxiv.org/abs/1902.00423, found 3.3 % by hand); on MNIST's digits, which have none, 1 %.

Letters: N images, K neighbours, M pairs, S = 32 pixels of a thumbnail's side, D thumbnail values, L leaked test images.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ssl_kit.core.random import uniform_array
from ssl_kit.core.reading import eight_bits
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.embeddings.exact import search
from ssl_kit.evaluation.features import Pixels
from ssl_kit.views.recipe import plain

SIDE = 32  # pixels of a thumbnail
EDITS = ("jpeg", "crop", "brightness")
_CROPS = (0.95, 0.9, 0.85)  # kept part of a side that an alignment tries, at 3 x 3 places
_COARSE = 0.6  # correlation at 8 x 8 pixels below which no alignment is tried; 1 % of 10 % crops have less
_FLAT = 1.0  # standard deviation of grey values below which a picture has no contrast
_SAME_LEVEL = 2.0  # mean difference of the grey values of two equal pictures without contrast
_FOUND = 0.98  # fraction of the planted copies that each limit lets through
_BLOCK = 2_048  # pairs aligned at a time: 8 MB of thumbnails
_STREAM_EDITS = 100_011  # of core/random.py


class Limits(NamedTuple):
    """From where on two images are copies: cosine of their features, correlation of their thumbnails.

    Without a correlation (the images cannot be read) the cosine alone decides.
    """

    cosine: float
    correlation: float | None


def pairs_above(cosines: np.ndarray, rows: np.ndarray, limit: float, within: bool = True) -> np.ndarray:
    """(M, 2) int64 pairs (query, found) whose cosine reaches `limit`.

    Args:
        cosines: (N, K) of each query's neighbours.
        rows: (N, K) of the gallery, -1 = none.
        limit: in [-1, 1].
        within: queries are the gallery: each pair is given once, smaller row first, and none with itself.
    """
    query, place = np.nonzero((cosines >= limit) & (rows >= 0))
    pairs = np.stack([query, rows[query, place]], axis=1)
    if within:
        pairs = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)
    return pairs


def groups(pairs: np.ndarray, count: int) -> list[np.ndarray]:
    """The sets of images of 0..count-1 that pairs (M, 2) connect, each ascending, ordered by their first."""
    graph = coo_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    members = np.unique(pairs)
    order = members[np.argsort(labels[members], kind="stable")]
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return sorted(np.split(order, cuts), key=lambda group: int(group[0])) if len(members) else []


def isolation(cosines: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N,) how far each image is from its neighbours: 1 - mean cosine, itself left out; large = an outlier.

    Args:
        cosines: (N, K) of each image's neighbours among all N.
        rows: (N, K), -1 = none.
    """
    others = (rows != np.arange(len(rows))[:, None]) & (rows >= 0)
    return 1 - np.where(others, cosines, 0).sum(axis=1) / np.maximum(others.sum(axis=1), 1)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 or uint16 to (S, S) float32: grey, squeezed to a square."""
    image = eight_bits(image)
    grey = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) the best correlation of one thumbnail with the other or a crop of it, in [-1, 1].

    A crop and its enlargement are linear, one (S, S) matrix for rows and one for columns, so that an alignment of many
    pairs is two products of large matrices. Pictures without contrast (a white page) are equal to their like only.

    Args:
        first: (M, S, S) float32.
        second: (M, S, S) float32.
    """
    best = np.empty(len(first), dtype=np.float32)
    for start in range(0, len(first), _BLOCK):
        rows = slice(start, start + _BLOCK)
        # rows of pixels first: (S, M, S) is (S, M * S) for a product from the left, (S * M, S) for one from the right
        best[rows] = _aligned(*(np.ascontiguousarray(part[rows].transpose(1, 0, 2)) for part in (first, second)))
    return best


def _aligned(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) of (S, M, S) each."""
    best = _correlation(_coarse(first), _unit(_coarse(second)))
    flat = (first.std(axis=(0, 2)) < _FLAT) & (second.std(axis=(0, 2)) < _FLAT)
    best[flat] = np.abs(first - second).mean(axis=(0, 2))[flat] < _SAME_LEVEL
    worth = np.flatnonzero((best >= _COARSE) & ~flat)
    if not len(worth):
        return best
    first, second = first[:, worth], second[:, worth]
    units = _unit(first), _unit(second)
    tried = [_correlation(first, units[1])]
    for rows_of_scale in _MATRICES:
        for columns in rows_of_scale:
            narrow = [(part.reshape(-1, SIDE) @ columns.T).reshape(SIDE, -1) for part in (first, second)]
            for rows in rows_of_scale:
                one, two = ((rows @ part).reshape(first.shape) for part in narrow)
                tried += [_correlation(one, units[1]), _correlation(two, units[0])]
    best[worth] = np.max(tried, axis=0)
    return best


def _coarse(pictures: np.ndarray) -> np.ndarray:
    """(S, M, S) to (8, M, 8): means of blocks, which a shift of a pixel or two hardly changes."""
    return pictures.reshape(8, SIDE // 8, -1, 8, SIDE // 8).mean(axis=(1, 4))


def _unit(pictures: np.ndarray) -> np.ndarray:
    """(R, M, R) with mean 0 and length 1 each; pictures without contrast become 0."""
    centred = pictures - pictures.mean(axis=(0, 2), keepdims=True)
    lengths = np.sqrt(np.einsum("imj,imj->m", centred, centred))
    return centred / np.maximum(lengths, 1e-6)[:, None]


def _correlation(pictures: np.ndarray, units: np.ndarray) -> np.ndarray:
    """(M,) Pearson correlation of (R, M, R) with pictures of mean 0 and length 1; 0 for those without contrast."""
    count = pictures.shape[0] * pictures.shape[2]
    squares = np.einsum("imj,imj->m", pictures, pictures) - count * pictures.mean(axis=(0, 2)) ** 2
    products = np.einsum("imj,imj->m", pictures, units)
    contrast = (squares > count * _FLAT**2) & (np.einsum("imj,imj->m", units, units) > 0.5)
    return np.where(contrast, products / np.sqrt(np.maximum(squares, 1e-6)), 0).astype(np.float32)


def _enlarging(start: float, kept: float) -> np.ndarray:
    """(S, S): row i holds the two weights of the source pixels around position start + kept * i."""
    where = np.clip(start + kept * (np.arange(SIDE) + 0.5) - 0.5, 0, SIDE - 1)
    left = np.minimum(where.astype(np.int64), SIDE - 2)
    matrix = np.zeros((SIDE, SIDE), dtype=np.float32)
    matrix[np.arange(SIDE), left] = 1 - (where - left)
    matrix[np.arange(SIDE), left + 1] = where - left
    return matrix


# per scale the matrices of its three places, for rows and for columns
_MATRICES = [[_enlarging(place * (1 - kept) * SIDE / 2, kept) for place in range(3)] for kept in _CROPS]


def edits(image: np.ndarray, number: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Near-copies of (H, W, C) uint8: JPEG at quality 50, 90 % of each side somewhere, 5 % brighter or darker.

    Args:
        image: to copy; JPEG is left out where C is neither 1 nor 3.
        number: of the image; with `seed` it says where the crop lies and whether the copy is brighter.
        seed: of the run.
    """
    top, left, sign = uniform_array(seed, 0, np.array([number]), _STREAM_EDITS, 3)[0]
    height, width = image.shape[:2]
    kept_h, kept_w = max(1, round(0.9 * height)), max(1, round(0.9 * width))
    y, x = int(top * (height - kept_h + 1)), int(left * (width - kept_w + 1))
    factor = 1.05 if sign < 0.5 else 0.95
    made = {
        "crop": np.ascontiguousarray(image[y : y + kept_h, x : x + kept_w]),
        "brightness": np.rint(np.clip(image * np.float32(factor), 0, 255)).astype(np.uint8),
    }
    if image.shape[2] in (1, 3):
        data = io.BytesIO()
        Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]).save(data, "JPEG", quality=50)
        decoded = np.asarray(Image.open(data))
        made["jpeg"] = decoded if decoded.ndim == 3 else decoded[:, :, None]
    return made


def limits(cosines: np.ndarray, correlated: np.ndarray) -> Limits:
    """The limits that let 98 % of planted copies through, each.

    Args:
        cosines: of planted copies with their originals, any shape.
        correlated: `correlations` of the same.
    """
    return Limits(float(np.quantile(cosines, 1 - _FOUND)), float(np.quantile(correlated, 1 - _FOUND)))


LEAK_SIDE = 16  # pixels of a thumbnail
LEAST = 0.9  # correlation of a near-duplicate
SURE = 0.9999  # of copies, however many there are
_COPIES = 3  # of one image in train that are still seen
_NEARER = 1 / 3
_FLAT_THUMBNAIL = 0.02  # standard deviation of a thumbnail without anything to see, in [0, 1]


class Thumbnails(Pixels):
    """Images as their thumbnails: (B, C, 16, 16) in [0, 1] to (B, D), zero mean and length 1; flat images are zero."""

    def __init__(self, channels: int):
        super().__init__((LEAK_SIDE, LEAK_SIDE), channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C h w) float32."""
        centred = images.flatten(1).float()
        centred = centred - centred.mean(dim=1, keepdim=True)
        lengths = centred.norm(dim=1, keepdim=True)
        flat = lengths < _FLAT_THUMBNAIL * centred.shape[1] ** 0.5
        return centred / lengths.masked_fill(flat, 1.0) * ~flat


@dataclass
class Leaks:
    """Near-duplicates between test and train.

    Attributes:
        test_ids: (L,) ids of the test images that have one.
        train_ids: (L,) the nearest training image of each.
        correlations: (L,) float32, at least `LEAST`.
        num_test: M.
    """

    test_ids: list[str]
    train_ids: list[str]
    correlations: np.ndarray
    num_test: int

    def without(self, test: Embeddings) -> Embeddings:
        """The test embeddings whose images have no near-duplicate in train."""
        leaked = set(self.test_ids)
        kept = np.array([name not in leaked for name in test.ids])
        ids = [name for name in test.ids if name not in leaked]
        return replace(test, vectors=test.vectors[kept], labels=test.labels[kept], ids=ids)


def find_leaks(train: Source, test: Source, *, batch_size: int = 256) -> Leaks:
    """Compares every test image with every training image; both are read once more, at 16 pixels.

    Args:
        train: labels are not used.
        test: labels are not used.
        batch_size: images read at once.
    """
    module = Thumbnails(test.channels)
    view = plain(module.image_size)
    known, asked = (embed(module, part, view=view, batch_size=batch_size, label="thumbnails") for part in (train, test))
    return leaks_between(known, asked)


def leaks_between(train: Embeddings, test: Embeddings) -> Leaks:
    """The same for embeddings of `Thumbnails`."""
    correlations, ids = search(train.vectors, test.vectors, _COPIES + 1)
    nearest, other = correlations[:, 0], correlations[:, -1]
    alone = correlations.shape[1] <= _COPIES  # so few training images that there is no other to compare with
    apart = (nearest >= LEAST) & (alone | (1 - nearest <= _NEARER * (1 - other)))
    leaked = np.flatnonzero(apart | (nearest >= SURE))
    return Leaks(
        [test.ids[row] for row in leaked],
        [train.ids[row] for row in ids[leaked, 0]],
        nearest[leaked],
        len(test),
    )
