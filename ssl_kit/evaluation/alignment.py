"""How alike two pictures are when one may be a crop of the other: thumbnails, and the correlation of aligned ones.

A look at a few crops is fast and rough (`correlations`); from the best of them least squares find the part of one
picture that is the other to a fraction of a pixel (`distances`), which takes ten times as long. What is left between
two copies then is what compression and resizing changed, so that copies lie far nearer than pictures of one kind.

Letters: M pairs, S = 32 pixels of a thumbnail's side, C channels.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssl_kit.core.random import uniform_array
from ssl_kit.core.reading import eight_bits

SIDE = 32  # pixels of a thumbnail
EDITS = ("jpeg", "crop", "brightness")
_STREAM_EDITS = 100_013  # of core/random.py
_CROPS = (0.95, 0.9, 0.85)  # kept part of a side that an alignment tries, at 3 x 3 places
_LEAST_KEPT = 0.8  # part of a side that an alignment may end with
_COARSE = 0.2  # correlation at 8 x 8 pixels below which no alignment is tried; crops of lines and of noise have 0.3
_WORTH = 0.25  # of the best alignment tried, below which none is fitted
_FLAT = 1.0  # standard deviation of grey values below which a picture has no contrast
_SAME_LEVEL = 2.0  # mean difference of the grey values of two equal pictures without contrast
_BLOCK = 2_048  # pairs aligned at a time: 8 MB of thumbnails
_ITERATIONS = 4  # of Gauss and Newton; the fifth changes correlations by less than 0.001
_LONGEST_STEP = np.array([1.5, 0.06, 1.5])  # pixels, part of a side, pixels: how far the linear model is believed
_DAMPING = 1e-4  # of the normal equations, relative: a picture of stripes cannot say where along them it was cut


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 or uint16 to (S, S, C) uint8: squeezed to a square, channel by channel."""
    image = eight_bits(image)
    planes = [image] if image.shape[2] == 3 else np.split(image, image.shape[2], axis=2)  # of three, one call is faster
    made = [Image.fromarray(plane.squeeze(2) if plane.shape[2] == 1 else plane) for plane in planes]
    small = [np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for one in made]
    return np.concatenate([one.reshape(SIDE, SIDE, -1) for one in small], axis=2)


def edits(image: np.ndarray, number: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Near-copies of (H, W, C) uint8 or uint16: JPEG (quality 50), 90 % of each side, 5 % brighter or darker.

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
        "brightness": np.rint(np.clip(image * np.float32(factor), 0, np.iinfo(image.dtype).max)).astype(image.dtype),
    }
    if image.shape[2] in (1, 3):
        data = io.BytesIO()
        shown = eight_bits(image)  # a JPEG has no more
        Image.fromarray(shown if image.shape[2] == 3 else shown[:, :, 0]).save(data, "JPEG", quality=50)
        decoded = np.asarray(Image.open(data)).reshape(image.shape)
        made["jpeg"] = decoded if image.dtype == np.uint8 else decoded.astype(image.dtype) * 257
    return made


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M,) the best correlation of one thumbnail, in grey, with the other or one of 27 crops of it, in [-1, 1].

    A crop and its enlargement are linear, one (S, S) matrix for rows and one for columns, so that an alignment of many
    pairs is two products of large matrices. Pictures without contrast (a white page) are equal to their like only.

    Args:
        first: (M, S, S, C) in 0..255.
        second: (M, S, S, C).
    """
    best = np.empty(len(first), dtype=np.float32)
    for rows in _blocks(len(first)):
        best[rows] = _tried(_grey(first[rows]), _grey(second[rows])).best
    return best


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M, 2) float32: 1 - correlation in all channels, aligned to a fraction of a pixel, and as the pictures lie.

    0 is the same picture but for brightness and contrast, 1 is not related. Neither depends on the order of a pair.

    Args:
        first: (M, S, S, C) in 0..255.
        second: (M, S, S, C).
    """
    made = np.empty((len(first), 2), dtype=np.float32)
    for rows in _blocks(len(first)):
        one, two = (part[rows].astype(np.float32) for part in (first, second))
        tried = _tried(_grey(one), _grey(two))
        plain = _products(_normed(one), _normed(two))
        made[rows] = 1 - np.where(tried.flat, tried.best, plain)[:, None]
        for whole, crop, remainder in (
            (one, two, 1),
            (two, one, 0),
        ):  # odd alignments cut the first, even ones the second
            those = np.flatnonzero(
                (tried.best >= _WORTH) & ~tried.flat & ((tried.place % 2 == remainder) | (tried.place == 0))
            )
            fitted = 1 - _fitted(whole[those], crop[those], tried.place[those])
            made[rows.start + those, 0] = np.minimum(made[rows.start + those, 0], fitted)
    return made


class _Tried(NamedTuple):
    """Of M pairs: the best correlation, the alignment that has it, whether neither picture has contrast."""

    best: np.ndarray
    place: np.ndarray
    flat: np.ndarray


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]


def _grey(pictures: np.ndarray) -> np.ndarray:
    """(M, S, S, C) to (S, M, S): mean of the channels, rows of pixels first.

    (S, M, S) is (S, M * S) for a product from the left and (S * M, S) for one from the right.
    """
    return np.ascontiguousarray(pictures.mean(axis=3, dtype=np.float32).transpose(1, 0, 2))


def _tried(first: np.ndarray, second: np.ndarray) -> _Tried:
    """All alignments of the table, of (S, M, S) each."""
    best = _correlation(_coarse(first), _unit(_coarse(second)))
    place = np.zeros(len(best), dtype=np.int64)
    flat = (first.std(axis=(0, 2)) < _FLAT) & (second.std(axis=(0, 2)) < _FLAT)
    best[flat] = np.abs(first - second).mean(axis=(0, 2))[flat] < _SAME_LEVEL
    worth = (best >= _COARSE) & ~flat
    if not worth.any():
        return _Tried(best, place, flat)
    first, second = first[:, worth], second[:, worth]
    units = _unit(first), _unit(second)
    tried = [_correlation(first, units[1])]
    for rows_of_scale in _MATRICES:
        for columns in rows_of_scale:
            narrow = [(part.reshape(-1, SIDE) @ columns.T).reshape(SIDE, -1) for part in (first, second)]
            for rows in rows_of_scale:
                one, two = ((rows @ part).reshape(first.shape) for part in narrow)
                tried += [_correlation(one, units[1]), _correlation(two, units[0])]
    best[worth], place[worth] = np.max(tried, axis=0), np.argmax(tried, axis=0)
    return _Tried(best, place, flat)


def _fitted(whole: np.ndarray, crop: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(M,) the best correlation of `crop` with a part of `whole`, (M, S, S, C), by Gauss and Newton from the table's.

    The model is crop = gain * whole(top + kept * y, left + kept * x) + offset in the mean of the channels; a step
    solves for (gain, offset, gain * change of top, kept and left), linearised.
    """
    units = _normed(crop)
    target = crop.mean(axis=3).reshape(len(crop), SIDE * SIDE, 1).astype(np.float64)
    grey = whole.mean(axis=3)
    steps = np.arange(SIDE, dtype=np.float32) + 0.5
    where, best = _STARTS[place], np.full(len(crop), -1, dtype=np.float32)  # (M, 3): top, kept, left
    for iteration in range(_ITERATIONS + 1):
        (rows, by_rows), (columns, by_columns) = (_sampling(where[:, axis], where[:, 1]) for axis in (0, 2))
        seen = np.stack([_cut(rows, whole[..., channel], columns) for channel in range(whole.shape[3])], axis=3)
        best = np.maximum(best, _products(_normed(seen), units))
        if iteration == _ITERATIONS:
            break
        down, right = _cut(by_rows, grey, columns), _cut(rows, grey, by_columns)
        parts = [seen.mean(axis=3), np.ones_like(down), down, down * steps[:, None] + right * steps, right]
        jacobian = np.stack([part.reshape(len(crop), SIDE * SIDE) for part in parts], axis=2).astype(np.float64)
        lengths = np.maximum(np.sqrt(np.einsum("mpi,mpi->mi", jacobian, jacobian)), 1e-6)
        jacobian /= lengths[:, None]
        turned = jacobian.transpose(0, 2, 1)
        found = np.linalg.solve(turned @ jacobian + _DAMPING * np.eye(5), turned @ target)[..., 0] / lengths
        gain = np.where(np.abs(found[:, :1]) < 0.2, np.inf, found[:, :1])  # of no likeness no step is taken
        where = where + np.clip(found[:, 2:] / gain, -_LONGEST_STEP, _LONGEST_STEP)
        where[:, 1] = np.clip(where[:, 1], _LEAST_KEPT, 1)
        where[:, ::2] = np.clip(where[:, ::2], 0, SIDE * (1 - where[:, 1:2]))
    return best


def _sampling(start: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M, S, S) of (M,): weights of the source pixels around positions start + kept * i, and how they change."""
    where = np.clip(start[:, None] + kept[:, None] * (np.arange(SIDE) + 0.5) - 0.5, 0, SIDE - 1)
    left = np.minimum(where.astype(np.int64), SIDE - 2)
    pair, pixel = np.arange(len(start))[:, None], np.arange(SIDE)
    weights, change = np.zeros((2, len(start), SIDE, SIDE), dtype=np.float32)
    weights[pair, pixel, left], weights[pair, pixel, left + 1] = 1 - (where - left), where - left
    change[pair, pixel, left], change[pair, pixel, left + 1] = -1, 1
    return weights, change


def _cut(rows: np.ndarray, pictures: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(M, S, S): a part of each picture, enlarged."""
    return rows @ pictures @ columns.transpose(0, 2, 1)


def _normed(pictures: np.ndarray) -> np.ndarray:
    """(M, S, S, C) to (M, S * S * C) of mean 0 and length 1; pictures without contrast become 0."""
    flat = pictures.reshape(len(pictures), np.prod(pictures.shape[1:], dtype=int))
    flat = flat - flat.mean(axis=1, keepdims=True)
    lengths = np.sqrt(np.einsum("mp,mp->m", flat, flat))[:, None]
    return np.where(lengths > _FLAT * flat.shape[1] ** 0.5, flat / np.maximum(lengths, 1e-6), 0)


def _products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("mp,mp->m", first, second)


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


# per scale the three places that a crop may have, in pixels, and the matrices that enlarge it, for rows or columns
_PLACES = [[place * (1 - kept) * SIDE / 2 for place in range(3)] for kept in _CROPS]
_MATRICES = [
    [_sampling(np.array([start]), np.array([kept]))[0][0] for start in places]
    for kept, places in zip(_CROPS, _PLACES, strict=True)
]
# of the alignments in the order of `_tried`: top, kept, left; each stands twice, for either picture as the whole
_STARTS = np.array(
    [(0, 1, 0)]
    + [
        (top, kept, left)
        for kept, places in zip(_CROPS, _PLACES, strict=True)
        for left in places
        for top in places
        for _ in range(2)
    ]
)
