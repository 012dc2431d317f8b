"""Are two sets of features of one distribution? Two tests with p-values of permutations; unfamiliar images.

Letters: N and M rows, D dimensions. Neither test needs a label; both are of the features, so they see what the encoder
sees. With P permutations no p-value is below 1 / (P + 1).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from ssl_kit.core.random import permutation
from ssl_kit.embeddings.exact import normalised
from ssl_kit.embeddings.index import finder
from ssl_kit.evaluation.health import sample_rows
from ssl_kit.evaluation.linear import curvature, fit_logistic, spanned

ROWS = 2_000  # of each set that the tests look at: all pairs of twice as many
PERMUTATIONS = 999
AROUND = 10  # neighbours that say how familiar an image is
_L2 = 1e-2  # of the classifier, on standardised features
_STREAM_ROWS, _STREAM_MIX, _STREAM_HALVES = 100_031, 100_032, 100_033  # of core/random.py


class Shift(NamedTuple):
    """How two sets differ.

    Attributes:
        mmd: unbiased squared maximum mean discrepancy of a Gaussian kernel; about 0 (or below) where they do not.
        mmd_p: its p-value.
        auroc: of a linear classifier that tells the sets apart, on held-out halves; 0.5 where it cannot.
        auroc_p: its p-value.
        p: of both together: the smaller one, doubled (Bonferroni); 1 at most.
    """

    mmd: float
    mmd_p: float
    auroc: float
    auroc_p: float
    p: float


def shift(old: np.ndarray, new: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Shift:
    """Tests whether the rows of two sets are drawn from one distribution.

    Args:
        old: (N, D) features, N at least 20.
        new: (M, D) of the same encoder, M at least 20.
        permutations: P.
        seed: of the samples, at most 2,000 rows of each, and of the permutations.
    """
    parts = [normalised(sample_rows(part, ROWS, seed)) for part in (old, new)]
    mmd, mmd_p = mmd_test(*parts, permutations=permutations, seed=seed)
    auroc, auroc_p = classifier_test(*parts, permutations=permutations, seed=seed)
    return Shift(mmd, mmd_p, auroc, auroc_p, min(1.0, 2 * min(mmd_p, auroc_p)))


def mmd_test(
    old: np.ndarray, new: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """(unbiased squared MMD, p-value): Gretton et al. 2012, JMLR 13, lemma 6, with the median heuristic.

    The kernel is exp(-d^2 / (2 s^2)), s the median distance of different rows of both sets.

    Args:
        old: (N, D).
        new: (M, D).
        permutations: of the rows of both sets.
        seed: of the permutations.
    """
    both = torch.from_numpy(np.concatenate([old, new]).astype(np.float64))
    count, own = len(both), len(old)
    squares = torch.cdist(both, both).square()
    scale = squares[torch.triu(torch.ones_like(squares, dtype=torch.bool), 1)].median().clamp(min=1e-12)
    kernel = torch.exp(-squares / (2 * scale)).fill_diagonal_(0)  # a row beside itself says nothing
    chosen = torch.zeros(count, permutations + 1, dtype=torch.float64)
    chosen[:own, 0] = 1
    for column in range(permutations):
        chosen[permutation(seed, column, count, _STREAM_MIX)[:own], column + 1] = 1
    within = (chosen * (kernel @ chosen)).sum(0)  # sums over pairs, of all permutations at once
    across = (kernel.sum(1) @ chosen) - within
    rest = kernel.sum() - within - 2 * across
    other = count - own
    found = within / (own * (own - 1)) + rest / (other * (other - 1)) - 2 * across / (own * other)
    return float(found[0]), _p(found.numpy())


def classifier_test(
    old: np.ndarray, new: np.ndarray, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[float, float]:
    """(AUROC, p-value) of a linear classifier of old and new: Lopez-Paz & Oquab 2017, arXiv:1610.06545.

    It is fitted on half of each set and judged on the other halves, whose labels are permuted: AUROC in the place of
    their accuracy sees shifts that move few images across the boundary, and needs no sets of equal size.

    Args:
        old: (N, D).
        new: (M, D).
        permutations: of the labels of the held-out rows.
        seed: of the halves and the permutations.
    """
    halves = [np.array_split(part[permutation(seed, 0, len(part), _STREAM_HALVES)], 2) for part in (old, new)]
    fitted, held = (np.concatenate([half[place] for half in halves]).astype(np.float32) for place in (0, 1))
    labels, truth = (np.repeat([0, 1], [len(half[place]) for half in halves]) for place in (0, 1))
    mean, scale = fitted.mean(axis=0), fitted.std(axis=0) + 1e-6
    points, others = spanned(*(torch.from_numpy((part - mean) / scale) for part in (fitted, held)))
    fit = fit_logistic(points, torch.from_numpy(labels), 2, [_L2], curvature(points))
    ranks = rankdata(fit.probabilities(others)[:, 1])
    orders = [np.arange(len(truth)), *(permutation(seed, one, len(truth), _STREAM_MIX) for one in range(permutations))]
    positive = truth.sum()
    least, pairs = positive * (positive + 1) / 2, positive * (len(truth) - positive)
    found = (np.array([ranks[truth[order] == 1].sum() for order in orders]) - least) / pairs
    return float(found[0]), _p(found)


def unfamiliarity(old: np.ndarray, new: np.ndarray, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """(M,) how far new images are from the old ones, and (M,) the share of old images that are as far from the others.

    Far is 1 - mean cosine to the 10 nearest old images, in [0, 2]; a share of 0 means that no old image is as far.

    Args:
        old: (N, D).
        new: (M, D).
        device: that searches.
    """
    gallery, asked = normalised(old), normalised(new)
    around = min(AROUND, len(old) - 1)
    find, _ = finder(gallery, len(gallery) + len(asked), device)
    usual = np.sort(1 - find(gallery, around + 1)[0][:, 1:].mean(axis=1))  # itself is first
    far = 1 - find(asked, around)[0].mean(axis=1)
    return far, 1 - np.searchsorted(usual, far, side="left") / len(usual)


def _p(found: np.ndarray) -> float:
    """Of the first value among those of permutations; it counts as one of them, so that it is never 0."""
    return float((found >= found[0] - 1e-12).sum() / len(found))
