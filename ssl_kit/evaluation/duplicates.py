"""Duplicates and outliers: which images show the same picture, which have no neighbours. Functions of arrays.

Features of self-supervised training bring copies together, and images that merely show the same kind of thing too. So
the features name candidates, and the pictures decide, by the distance of aligned thumbnails (alignment.py). How near is
near enough no limit for a whole set can say: two photographs hardly ever correlate by 0.9, two strokes of a pen often
do, and a crop of fine noise correlates with the rest of it by 0.5 at most. What tells copies is the gap that they leave
(`reach`): an image's copies are near, and then comes nothing until the pictures that only look alike, which lie as
densely as pictures of its kind do. Both images of a pair must see the gap.

Leakage: test images of which a near-duplicate is among the training images. A score on them is memory, not skill.
There images are compared at 16 pixels, unaligned, each without its own mean and of length 1, so that the inner product
is the correlation of their pixels. A near-duplicate is

    1 - c_1 <= (1 - c_4) / 3  and  c_1 >= 0.9        or  c_1 >= 0.9999

with c_i the correlation with the i-th nearest training image: three times as near as the fourth, so that up to three
copies are seen as such. Where most of an image is one background, that would call those copies that show anything at
one place: few do, and the fourth is far. There what stands on the background must pass the same rule by itself, moved
to the middle, where all of its kind are its rivals. On CIFAR-10 this finds 2.5 % of the test images, every pair of one
class (Barz & Denzler 2020, https://arxiv.org/abs/1902.00423, found 3.3 % by hand); on MNIST's digits, which have none,
0.3 %, and none of those at random places of a larger canvas.

Letters: N images, K neighbours, M pairs, D thumbnail values, L leaked test images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.embeddings.exact import search
from ssl_kit.evaluation.alignment import SIDE
from ssl_kit.evaluation.features import Pixels
from ssl_kit.views.recipe import plain

LEAST = 0.9  # correlation of a near-duplicate, whatever else speaks for it
_FOUND = 0.99  # fraction of the planted copies that each limit lets through
_SURE = 0.05  # fraction of the planted JPEG copies that lie nearer to their originals than a pair that is surely one
_APART = 4.0  # times as far as the last copy the next picture lies at least
_CHANCE = 0.05  # that by accident one of the pictures that only look alike lies before such a gap, for one of a pair
_NEXT = 16  # pictures behind a gap that say how densely such pictures lie
_ROUNDING = 1e-5  # of a distance


class Limits(NamedTuple):
    """Which images are compared, and which of them are surely copies.

    Attributes:
        cosine: of their features, at least.
        correlation: of their thumbnails, at least. None: the images cannot be read, and the cosine alone decides.
        sure: distance of thumbnails as they lie up to which no gap is asked for; -1 = always.
    """

    cosine: float
    correlation: float | None
    sure: float = -1.0


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


def limits(cosines: np.ndarray, correlated: np.ndarray, recompressed: np.ndarray) -> Limits:
    """The limits that let 99 % of planted copies through, each; surely one is what is nearer than most JPEG copies.

    Args:
        cosines: of planted copies with their originals, any shape.
        correlated: `correlations` of the same.
        recompressed: `distances` of the JPEG copies among them as they lie; may be empty.
    """
    sure = float(np.quantile(recompressed, _SURE)) if len(recompressed) else -1.0
    return Limits(float(np.quantile(cosines, 1 - _FOUND)), float(np.quantile(correlated, 1 - _FOUND)), sure)


class Around(NamedTuple):
    """Of Q images of one set their K neighbours in the other set, or the same one.

    Attributes:
        asked: (Q,) rows of the images, ascending.
        neighbours: (Q, K) rows.
    """

    asked: np.ndarray
    neighbours: np.ndarray


def apart(
    pairs: np.ndarray,
    around: Around,
    back: Around,
    measure: Callable[[np.ndarray], np.ndarray],
    sure: float,
    *,
    within: bool,
) -> tuple[np.ndarray, float]:
    """Which pairs of images are copies: those with a gap behind them on both sides, or nearer than `sure`.

    Args:
        pairs: (M, 2) rows, of the first set and of the second.
        around: neighbours in the second set of all that is in the first column.
        back: neighbours in the first set of all that is in the second column.
        measure: (W, 2) pairs to their `distances` (W, 2); NaN where they cannot be told.
        sure: distance as the pictures lie.
        within: both sets are one, `around` is `back`, and the smaller row of a pair is the first.

    Returns:
        (M,) bool, and about how many images of the first set seem to have a copy by chance.
    """
    listed = [np.stack(np.broadcast_arrays(side.asked[:, None], side.neighbours), axis=2) for side in (around, back)]
    listed = [np.sort(listed[0], axis=2)] * 2 if within else [listed[0], listed[1][..., ::-1]]
    base = 1 + max(int(part[..., 1].max()) for part in (*listed, pairs))
    keys = [part[..., 0] * base + part[..., 1] for part in (*listed, pairs)]
    each = np.unique(np.concatenate([part.ravel() for part in keys]))  # a pair is measured once
    wanted = np.stack(np.divmod(each, base), axis=1)
    far = measure(wanted)
    if within:
        far[wanted[:, 0] == wanted[:, 1]] = np.nan
    first, second, own = (far[np.searchsorted(each, part)] for part in keys)  # (Q, K, 2), (Q, K, 2), (M, 2)
    copies, chance = own[:, 1] <= sure, 0.0
    for way in range(2):  # aligned, as they lie
        reached = [
            reach(part[..., way])[np.searchsorted(side.asked, pairs[:, column])]
            for column, (part, side) in enumerate(((first, around), (second, back)))
        ]
        copies |= own[:, way] <= np.minimum(*reached) + _ROUNDING
        chance += by_chance(first[..., way])
    return copies, chance


def reach(distances: np.ndarray) -> np.ndarray:
    """(N,) the distance of each image's last copy: the last neighbour of at most 0.1 before a gap; -1 without one.

    Pictures that only look alike lie at random around an image: within the distance d there are about d^m of them, with
    m estimated from the 16 behind the gap (Levina & Bickel 2004, "Maximum likelihood estimation of intrinsic
    dimension", equation 8; a distance here is a squared one, so m is half their dimension). That the nearest of them
    is g times as near as the next has the probability g^-m. It must be below 0.05, and g at least 4.

    Args:
        distances: (N, K) 1 - correlation with each of K neighbours, in any order; NaN for none, and for the image
            itself.
    """
    near = np.maximum(np.sort(distances, axis=1), _ROUNDING)  # NaN last
    found = np.full(len(near), -1.0)
    for place in range(near.shape[1] - 1):
        copies = (near[:, place] <= 1 - LEAST) & (near[:, place + 1] >= _gap(near, place) * near[:, place])
        found[copies] = near[copies, place]
    return found


def by_chance(distances: np.ndarray) -> float:
    """About how many of N images `reach` gives an accidental copy, judged by those of which it says that they are none.

    Of pictures at random (d_2 / d_3)^2 is distributed as d_1 / d_2, of the distances in order (the counts within them
    are those of a Poisson process). So the second and third of the pictures that are no copies show how often the
    first would have been taken for one, were it not known; what they show is counted.

    Args:
        distances: as for `reach`.
    """
    unlike = np.sort(np.where(distances <= reach(distances)[:, None] + _ROUNDING, np.nan, distances), axis=1)
    if unlike.shape[1] < 3:
        return 0.0
    near = np.maximum(unlike, _ROUNDING)
    return float(((near[:, 1] <= 1 - LEAST) & ((near[:, 2] / near[:, 1]) ** 2 >= _gap(near, 1))).sum())


def _gap(near: np.ndarray, place: int) -> np.ndarray:
    """(N,) how many times as far as the neighbour at `place` the next must lie; (N, K) ascending, NaN last."""
    behind = near[:, place + 1 : place + 1 + _NEXT]
    count = (~np.isnan(behind)).sum(axis=1)
    farthest = np.fmax.reduce(behind, axis=1)
    logarithms = np.nansum(np.log(farthest[:, None] / behind), axis=1)  # the farthest adds 0
    m = np.where(count > 2, (count - 1) / np.maximum(logarithms, 1e-6), 1)  # of fewer: 1, which asks for 20 times
    return np.maximum(_APART, _CHANCE ** (-1 / m))


LEAK_SIDE = 16  # pixels of a thumbnail
_INK = 0.1  # of the largest distance from the background, the median: what is nearer is background
_EMPTY = 0.5  # of the pixels: an image with so much background
SURE = 0.9999  # of copies, however many there are
_COPIES = 3  # of one image in train that are still seen
_NEARER = 1 / 3
_FLAT_THUMBNAIL = 0.02  # standard deviation of a thumbnail without anything to see, in [0, 1]


class Thumbnails(Pixels):
    """Images as they are compared: (B, C, 32, 32) in [0, 1] to (B, D + 256 + 1).

    D values of the thumbnail of 16 pixels; 256 of 16 of the 32 pixels, in grey, around the middle of what stands on the
    background; both of zero mean and length 1, zero where there is nothing to see. Last 1 where most is background.
    """

    def __init__(self, channels: int):
        super().__init__((SIDE, SIDE), channels)
        self.image_size = (SIDE, SIDE)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, 32, 32) to (B, C 256 + 257) float32."""
        images = images.float()
        whole = F.interpolate(images, (LEAK_SIDE, LEAK_SIDE), mode="bilinear", antialias=True)
        away = images - whole.flatten(2).median(dim=2).values[:, :, None, None]  # from the background
        far = away.abs().amax(dim=1)  # (B, 32, 32)
        ink = (far - _INK * far.amax(dim=(1, 2), keepdim=True)).clamp(min=0) + 1e-6
        steps = (torch.arange(SIDE, device=images.device) + 0.5) * 2 / SIDE - 1  # places, from -1 to 1
        middle = [(ink.sum(other) * steps).sum(1) / ink.sum((1, 2)) for other in (1, 2)]  # x, y
        shift = torch.eye(2, 3, device=images.device).mul(LEAK_SIDE / SIDE).repeat(len(images), 1, 1)
        shift[:, :, 2] = torch.stack(middle, dim=1)
        where = F.affine_grid(shift, [len(images), 1, LEAK_SIDE, LEAK_SIDE], align_corners=False)
        inside = F.grid_sample(away.mean(dim=1, keepdim=True), where, align_corners=False)
        empty = (far <= _INK * far.amax(dim=(1, 2), keepdim=True)).float().mean(dim=(1, 2)) >= _EMPTY
        return torch.cat([_unit(whole.flatten(1)), _unit(inside.flatten(1)), empty[:, None]], dim=1)


def _unit(values: Tensor) -> Tensor:
    """(B, D) of zero mean and length 1; flat ones are zero."""
    centred = values - values.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1, keepdim=True)
    flat = lengths < _FLAT_THUMBNAIL * centred.shape[1] ** 0.5
    return centred / lengths.masked_fill(flat, 1.0) * ~flat


class _Seen(NamedTuple):
    """The parts of `Thumbnails`: whole (N, D), inside (N, 256), empty (N,) bool."""

    whole: np.ndarray
    inside: np.ndarray
    empty: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Self:
        """From (N, D + 257)."""
        inside = LEAK_SIDE**2
        return cls(vectors[:, : -inside - 1].copy(), vectors[:, -inside - 1 : -1].copy(), vectors[:, -1] > 0)


def _nearer(nearest: np.ndarray, ranked: np.ndarray, count: int) -> np.ndarray:
    """(M,) whether correlations are near duplicates', with those of the `count` nearest, (M, count) or fewer."""
    alone = ranked.shape[1] < count  # so few images that there is no other to compare with
    gap = alone | (1 - nearest <= _NEARER * (1 - ranked[:, -1]))
    return ((nearest >= LEAST) & gap) | (nearest >= SURE)


def _also_inside(
    pairs: np.ndarray, asked: _Seen, known: _Seen, within: bool, device: torch.device | str = "cpu"
) -> np.ndarray:
    """(M,) whether pairs (asked, known) are near-duplicates by what stands on their background, where anything does."""
    own, other = pairs.T
    close, count = np.einsum("md,md->m", asked.inside[own], known.inside[other]), _COPIES + 1 + within
    speaks = (asked.empty[own] | known.empty[other]) & asked.inside[own].any(axis=1)
    ranked = search(known.inside, asked.inside[own], count, device=device)[0]  # itself first, if `within`
    return _nearer(close, ranked, count) | ~speaks


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
        return replace(test, vectors=test.vectors[kept], labels=test.labels[kept], ids=ids, groups=None)


def find_leaks(train: Source, test: Source, *, batch_size: int = 256, device: torch.device | str = "cpu") -> Leaks:
    """Compares every test image with every training image; both are read once more, at 32 pixels.

    Args:
        train: labels are not used.
        test: labels are not used.
        batch_size: images read at once.
        device: that searches.
    """
    module = Thumbnails(test.channels)
    view = plain(module.image_size)
    known, asked = (embed(module, part, view=view, batch_size=batch_size, label="thumbnails") for part in (train, test))
    return leaks_between(known, asked, device)


def near_duplicates(pictures: np.ndarray) -> np.ndarray:
    """(M, 2) pairs among N pictures that show the same one, smaller row first: a quick look, without features.

    Correlations are of 16 pixels, unaligned, as for leaks. A pair is nearer than others as a test image is that leaks,
    and both of its images see the gap behind it. Of 300 images of CIFAR-10 among 2,500 it finds all copies by JPEG and
    in another brightness, and a tenth of those that kept 90 % of each side.

    Args:
        pictures: (N, 32, 32, C) uint8.
    """
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    seen = _Seen.of(Thumbnails(pictures.shape[3])(images).numpy())
    units = seen.whole
    found, rows = search(units, units, _NEXT + 2)
    found = np.where(rows == np.arange(len(rows))[:, None], np.inf, found)  # itself comes first, and then goes
    order = np.argsort(-found, axis=1, kind="stable")[:, 1:]
    found, rows = np.take_along_axis(found, order, axis=1), np.take_along_axis(rows, order, axis=1)
    fourth = found[:, _COPIES, None] if found.shape[1] > _COPIES else -1.0
    near = (found >= SURE) | (1 - found <= _NEARER * (1 - fourth))
    pairs = pairs_above(np.where(near, found, -1), rows, LEAST)
    if len(pairs):
        pairs = pairs[_also_inside(pairs, seen, seen, True) & _also_inside(pairs[:, ::-1], seen, seen, True)]
    if not len(pairs):
        return pairs
    correlation = lambda wanted: np.einsum("md,md->m", units[wanted[:, 0]], units[wanted[:, 1]])
    around = Around(asked := np.unique(pairs), rows[asked])
    twice = lambda wanted: np.repeat(1 - correlation(wanted)[:, None], 2, axis=1)
    return pairs[apart(pairs, around, around, twice, -1, within=True)[0] | (correlation(pairs) >= SURE)]


def leaks_between(train: Embeddings, test: Embeddings, device: torch.device | str = "cpu") -> Leaks:
    """The same for embeddings of `Thumbnails`."""
    known, asked = _Seen.of(train.vectors), _Seen.of(test.vectors)
    correlations, ids = search(known.whole, asked.whole, _COPIES + 1, device=device)
    nearest = correlations[:, 0]
    leaked = np.flatnonzero(_nearer(nearest, correlations, _COPIES + 1))
    if len(leaked):
        pairs = np.stack([leaked, ids[leaked, 0]], axis=1)
        leaked = leaked[_also_inside(pairs, asked, known, False, device)]
    return Leaks(
        [test.ids[row] for row in leaked],
        [train.ids[row] for row in ids[leaked, 0]],
        nearest[leaked],
        len(test),
    )
