"""Label-free health of features, as functions of arrays: alignment, uniformity, spread, ranks.

Alignment and uniformity: Wang & Isola 2020, https://arxiv.org/abs/2005.10242, eq. 4-5. Effective rank and alpha are
in `ssl_kit.core.spectrum`. Letters: N rows, D dimensions. None of these sees a label; ranks compare runs of one
method only, and uniformity does not notice collapsed dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ssl_kit.core.random import permutation
from ssl_kit.core.spectrum import alpha_exponent, effective_rank
from ssl_kit.evaluation.result import Result, made_by

if TYPE_CHECKING:
    from ssl_kit.data.sources import Source
    from ssl_kit.embeddings import Embeddings
    from ssl_kit.encoders.encoder import Encoder

EXACT_ROWS = 5_000  # all 12.5 million pairs of so many rows; beyond, of a seeded sample of so many
RANK_ROWS = 25_600  # rows that RankMe's paper found to suffice
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


def two_views(encoder: Encoder, source: Source, count: int = 2_000, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, D) of two SimCLR views of the same M images, at most `count`, for `alignment`.

    Args:
        encoder: in eval mode, on any device.
        source: images; those that cannot be decoded are left out.
        count: images used, drawn by the seed.
        seed: of the sample and of the views.
    """
    import torch

    from ssl_kit.data.batches import ViewLoader
    from ssl_kit.views.recipe import ViewRecipe

    rows = sample_rows(np.arange(len(source)), count, seed)
    preset: Literal["simclr", "gray"] = "simclr" if encoder.channels == 3 else "gray"
    views = ViewRecipe(preset, strength=0.5, blur=0.0).build(encoder.image_size, encoder.channels, 2)
    device = next(encoder.parameters()).device
    features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    with torch.inference_mode():
        for batch in ViewLoader(source, np.array_split(rows, -(-len(rows) // 256)), views, seed=seed):
            for images, found in zip(batch["views"], features, strict=True):
                seen = images.to(device).contiguous(memory_format=torch.channels_last)
                found.append(encoder(seen).cpu().numpy())
    return np.concatenate(features[0]), np.concatenate(features[1])


def sample_rows(features: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` rows of features (N, D), drawn by the seed, in their order."""
    if len(features) <= count:
        return features
    return features[np.sort(permutation(seed, 0, len(features), _STREAM_SAMPLE)[:count])]


def health(
    train: Embeddings,
    *,
    views: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    features: str = "encoder",
) -> Result:
    """Effective rank (also as a fraction of D), alpha, uniformity, spread and, given two views, alignment.

    Args:
        train: at least 2 rows; labels are not used. Ranks are of at most 25,600 seeded rows.
        views: two arrays (M, D) of features of two augmented views of the same M images.
        seed: of the samples.
        features: what the vectors are, for the record.
    """
    started = time.perf_counter()
    rows = sample_rows(train.vectors, RANK_ROWS, seed)
    rank = effective_rank(rows)
    metrics = {
        "effective_rank": rank,
        "rank_fraction": rank / rows.shape[1],
        "uniformity": uniformity(rows, seed=seed),
        "std": float(per_dimension_std(rows).mean() * np.sqrt(rows.shape[1])),
    }
    alpha = alpha_exponent(rows)
    if np.isfinite(alpha):  # undefined for collapsed features, and JSON has no NaN
        metrics["alpha"] = alpha
    if views is not None:
        metrics["alignment"] = alignment(views[0], views[1])
    settings = {"num_rows": len(rows), "dim": rows.shape[1], "seed": seed}
    if views is not None:
        settings["num_pairs"] = len(views[0])
    seconds = time.perf_counter() - started
    return Result("health", features, metrics, settings, made_by(train, train), seconds)


def _normalised(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
