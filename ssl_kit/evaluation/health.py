"""Label-free health of features, as functions of arrays: alignment, uniformity, spread, ranks, hubness.

Alignment and uniformity: Wang & Isola 2020, https://arxiv.org/abs/2005.10242, eq. 4-5. LiDAR: Thilak et al. 2023,
https://arxiv.org/abs/2312.04000. Hubness: Radovanovic et al. 2010, JMLR 11. Effective rank and alpha, the slope of the
spectrum, are in `ssl_kit.core.spectrum`. Letters: N rows, D dimensions, M images, V views of each. None of these sees a
label; ranks compare runs of one method only, and uniformity does not notice collapsed dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ssl_kit.core.random import permutation
from ssl_kit.core.spectrum import alpha_exponent, effective_rank
from ssl_kit.embeddings.exact import normalised, search, without
from ssl_kit.evaluation.result import Result, made_by

if TYPE_CHECKING:
    from ssl_kit.data.sources import Source
    from ssl_kit.embeddings.embeddings import Embeddings
    from ssl_kit.evaluation.features import Network

Views = Sequence[np.ndarray]
EXACT_ROWS = 5_000  # all 12.5 million pairs of so many rows; beyond, of a seeded sample of so many
RANK_ROWS = 25_600  # rows that RankMe's paper found to suffice
HUB_ROWS = 10_000
_LIDAR_RIDGE = 1e-4
_STREAM_SAMPLE = 100_002  # of core/random.py
_BLOCK = 1_024


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Mean squared distance between the normalised features of two views of the same images, in [0, 4]; 0 is best.

    Args:
        first: (N, D) features of one view.
        second: (N, D) features of the other, row i of the same image.
    """
    return float(np.square(_normalised(first) - _normalised(second)).sum(axis=1).mean())


def uniformity(features: np.ndarray, *, seed: int = 0) -> float:
    """log of the mean of exp(-2 ||x - y||^2) over all pairs of distinct rows, normalised; in [-4, 0], lower is better.

    A uniform sphere has ln 0F1(; D/2; 4) - 4: -3.9375 for D = 128. Exact up to 5,000 rows; of more, all pairs of a
    seeded sample of 5,000.

    Args:
        features: (N, D), N at least 2.
        seed: of the sample.
    """
    vectors = _normalised(sample_rows(features, EXACT_ROWS, seed))
    count = len(vectors)
    total = 0.0
    for start in range(0, count, _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ vectors[start:].T
        potential = np.exp(4 * np.minimum(cosines, 1) - 4)  # ||x - y||^2 = 2 - 2 cos
        total += np.triu(potential, 1).sum()
    return float(np.log(total / (count * (count - 1) / 2)))


def per_dimension_std(features: np.ndarray) -> np.ndarray:
    """(D,) standard deviations of the normalised features: 1 / sqrt(D) if isotropic, 0 if collapsed."""
    return _normalised(features).std(axis=0)


def lidar(views: Sequence[np.ndarray]) -> float:
    """LiDAR: how many directions tell images apart beyond what augmentation scatters, in [1, min(M - 1, D)].

    The effective rank (exp of the entropy, as `effective_rank`) of the eigenvalues of

        S_w^-1/2 S_b S_w^-1/2        S_b = cov of the images' means, S_w = mean cov of the views within an image

    (the paper's section 4). Its ridge on S_w is 1e-4 whatever the scale; here it is 1e-4 of the mean variance, so that
    the value does not depend on the features' scale. M C-fold equal clusters, well apart, give C - 1.

    Args:
        views: V arrays (M, D), row i of each of the same image, at least 2 of each.
    """
    features = np.stack([np.asarray(view, dtype=np.float64) for view in views], axis=1)  # (M, V, D)
    means = features.mean(axis=1)
    between, within = means - means.mean(axis=0), (features - means[:, None]).reshape(-1, features.shape[2])
    scatter = within.T @ within / len(within)
    variance = (np.square(between).mean(axis=0) + scatter.diagonal()).mean()
    if variance == 0:
        return 1.0
    factor = np.linalg.cholesky(scatter + _LIDAR_RIDGE * variance * np.eye(len(scatter)))
    # S_w = F F^T: F^-1 S_b F^-T has the same eigenvalues as the symmetric form, the squared singular values of:
    values = np.linalg.svd(np.linalg.solve(factor, between.T), compute_uv=False) ** 2
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def hubness(features: np.ndarray, *, k: int = 10, seed: int = 0, device: torch.device | str = "cpu") -> float:
    """Skewness of how often a row is among the k nearest of others, by cosine; 0 when all are alike.

    Above about 1 a few rows, the hubs, are neighbours of everything, and kNN and search suffer. Of a seeded sample of
    10,000 rows where there are more.

    Args:
        features: (N, D), N at least 2.
        k: neighbours.
        seed: of the sample.
        device: that searches.
    """
    units = normalised(sample_rows(features, HUB_ROWS, seed))
    k = min(k, len(units) - 1)
    ids = search(units, units, k + 1, device=device)[1]
    counts = np.bincount(without(ids, np.arange(len(units))).ravel(), minlength=len(units)).astype(np.float64)
    deviation = counts.std()
    return float(((counts - counts.mean()) ** 3).mean() / deviation**3) if deviation > 0 else 0.0


def augmented(network: Network, source: Source, count: int = 1_000, *, num_views: int = 10, seed: int = 0) -> Views:
    """Features of SimCLR views of the same M images, at most `count`: V arrays (M, D), for `alignment` and `lidar`.

    Args:
        network: in eval mode, on any device.
        source: images; those that cannot be decoded are left out.
        count: images used, drawn by the seed. LiDAR is below it.
        num_views: V, 2 to 10.
        seed: of the sample and of the views.
    """
    from ssl_kit.evaluation.features import view_features
    from ssl_kit.views.recipe import ViewRecipe

    rows = sample_rows(np.arange(len(source)), count, seed)
    views = ViewRecipe("simclr", strength=0.5, blur=0.0).build(network.image_size, network.channels, num_views)
    return view_features(network, source, views, rows, seed)


def sample_rows(features: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` rows of features (N, D), drawn by the seed, in their order."""
    if len(features) <= count:
        return features
    return features[np.sort(permutation(seed, 0, len(features), _STREAM_SAMPLE)[:count])]


def health(
    train: Embeddings,
    *,
    views: Views | None = None,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> Result:
    """Effective rank (also as a fraction of D), alpha, uniformity, spread, hubness; given views, alignment and LiDAR.

    Args:
        train: at least 2 rows; labels are not used. Ranks are of at most 25,600 seeded rows.
        views: V arrays (M, D) of features of augmented views of the same M images; alignment is of the first two.
        seed: of the samples.
        features: what the vectors are, for the record.
        device: that searches for hubs.
    """
    started = time.perf_counter()
    rows = sample_rows(train.vectors, RANK_ROWS, seed)
    rank = effective_rank(rows)
    metrics = {
        "effective_rank": rank,
        "rank_fraction": rank / rows.shape[1],
        "uniformity": uniformity(rows, seed=seed),
        "std": float(per_dimension_std(rows).mean() * np.sqrt(rows.shape[1])),
        "hubness": hubness(rows, seed=seed, device=device),
    }
    alpha = alpha_exponent(rows)
    if np.isfinite(alpha):  # undefined for collapsed features, and JSON has no NaN
        metrics["alpha"] = alpha
    if views is not None:
        metrics |= {"alignment": alignment(views[0], views[1]), "lidar": lidar(views)}
    settings = {"num_rows": len(rows), "dim": rows.shape[1], "seed": seed}
    if views is not None:
        settings |= {"num_pairs": len(views[0]), "num_views": len(views)}
    seconds = time.perf_counter() - started
    return Result("health", features, metrics, settings, made_by(train, train), seconds)


def _normalised(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
