"""Scores by the number of dimensions: how a user picks the size of the vectors to store.

Three ways to fewer dimensions: cutting a nested code (Kusupati et al. 2022, https://arxiv.org/abs/2205.13147), PCA of
the features fitted on train, and a random projection (what any method must beat). Each point is an ordinary kNN or
linear Result with `reduced_by` and `bytes_per_million_images` in its settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.evaluation.baselines import Pca, random_projection
from ssl_kit.evaluation.features import FeatureSet
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import knn
from ssl_kit.evaluation.result import Result

Way = Literal["cut", "pca", "random"]
WAYS: tuple[Way, ...] = ("cut", "pca", "random")
_BYTES = 4  # of a float32


def dimension_curve(
    features: FeatureSet,
    *,
    dims: Sequence[int] = (),
    ways: Sequence[Way] = ("pca", "random"),
    evaluations: Sequence[Literal["knn", "linear"]] = ("knn", "linear"),
    balanced: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """kNN (k chosen on train) and linear probe at 2, 4, 8, ... dimensions and at all of them.

    Args:
        features: train and test.
        dims: instead of the powers of two; those that are not below D are left out.
        ways: "cut" keeps the first dimensions, which means something for a nested code only.
        evaluations: what to score.
        balanced: of the linear probe.
        seed: of the projection, the held-out splits and the bootstrap.
    """
    if odd := set(ways) - set(WAYS):
        raise UserError(f"dimension curve: ways {sorted(odd)}; wanted some of {', '.join(WAYS)}")
    full = features.train.vectors.shape[1]
    below = sorted({dim for dim in dims if dim < full}) if dims else powers_of_two(full)
    with progress((1 + len(ways) * len(below)) * len(evaluations), f"dimensions of {features.name}") as bar:
        for way in ways if below else ():
            for smaller in _smaller(features, below, way, seed):
                for result in _scored(smaller, evaluations, balanced, seed):
                    result.settings |= {"reduced_by": way}
                    bar.advance(bar.task_ids[0])
                    yield result
        yield from _scored(features, evaluations, balanced, seed)


def powers_of_two(full: int) -> list[int]:
    """2, 4, 8, ... below `full`."""
    return [2**power for power in range(1, full.bit_length()) if 2**power < full]


def _smaller(features: FeatureSet, dims: Sequence[int], way: Way, seed: int) -> Iterator[FeatureSet]:
    parts = features.train, features.test
    if way == "pca":
        pca = Pca.of(features.train.vectors, max(dims), seed)
        reduced = [pca.apply(part.vectors) for part in parts]
    elif way == "random":
        directions = random_projection(features.train.vectors.shape[1], max(dims), seed)
        reduced = [part.vectors @ directions for part in parts]
    else:
        reduced = [part.vectors for part in parts]
    for dim in dims:
        train, test = (replace(part, vectors=vectors[:, :dim]) for part, vectors in zip(parts, reduced, strict=True))
        yield FeatureSet(features.name, train, test)


def _scored(features: FeatureSet, evaluations: Sequence[str], balanced: bool, seed: int) -> Iterator[Result]:
    name, train, test = features.name, features.train, features.test
    for evaluation in evaluations:
        if evaluation == "knn":
            result = knn(train, test, seed=seed, features=name)
        else:
            result = linear_probe(train, test, balanced=balanced, seed=seed, features=name)
        result.settings["bytes_per_million_images"] = 1_000_000 * _BYTES * train.vectors.shape[1]
        yield result
