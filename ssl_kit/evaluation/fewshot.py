"""Scores by the number of labels, and by the number of dimensions.

Few-shot: how good are frozen features with 1, 2, 5, ... labels per class, or with 1 % of them.

Each row is drawn several times; what is reported is the mean over the draws, with an interval over draws and images.
Two classifiers: the linear probe, and the nearest class mean by cosine (Snell et al. 2017,
https://arxiv.org/abs/1703.05175), which has nothing to choose. The l2 of the probe is chosen on the drawn labels only.

With fewer drawn images than dimensions the probe is solved in the space they span (`linear.spanned`): 3,072
dimensions cost no more than 500. Letters: N images, D dimensions, C classes, A draws, M images drawn.

`dimension_curve`: how a user picks the size of the vectors to store.
Three ways to fewer dimensions: cutting a nested code (Kusupati et al. 2022, https://arxiv.org/abs/2205.13147), PCA of
the features fitted on train, and a random projection (what any method must beat). Each point is an ordinary kNN or
linear Result with `reduced_by` and `bytes_per_million_images` in its settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import random_bits
from ssl_kit.data.labels import grouped
from ssl_kit.embeddings.exact import normalised
from ssl_kit.evaluation.features import FeatureSet, Pca, Scaling, random_projection
from ssl_kit.evaluation.linear import LogisticFit, curvature, fit_logistic, linear_probe, spanned
from ssl_kit.evaluation.neighbours import knn
from ssl_kit.evaluation.result import Result, draw_metrics, holdout, labelled_groups, labelled_parts, made_by

if TYPE_CHECKING:
    from ssl_kit.embeddings.embeddings import Embeddings


SHOTS = (1, 2, 5, 10, 50)
FRACTIONS = (0.01, 0.1)
DRAWS = 5
L2 = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # below, few images are separated by one and the same margin, only slower
PROTOCOLS = ("linear probe", "nearest class mean")
_ONE_SHOT_L2 = 0.1  # where no class has a second image to choose on, or nothing was ever right
_FOLDS = 5
_ENOUGH = 10  # images of the smallest class from which one held-out fifth serves as well as folds
_PASSES = 60  # of the solver, at most
_TOLERANCE = 1e-5  # of its objective: a class decided by less is anybody's guess
_STREAM = 100_020  # of core/random.py


class _Size(TypedDict, total=False):
    """Of a training set: images of each class, or the share of them."""

    shots: int
    fraction: float


_Predict = Callable[
    [np.ndarray, int], tuple[np.ndarray, dict[str, float]]
]  # rows, draw -> classes (N,), what was chosen


def few_shot(
    train: Embeddings,
    test: Embeddings,
    *,
    shots: Sequence[int] = SHOTS,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = DRAWS,
    l2: Sequence[float] = L2,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> list[Result]:
    """Top-1 and balanced accuracy with few labels: a Result per number of labels and classifier.

    Features are standardised by all of train, as its images need no labels for that. A row that would take every
    training image is left out: that is the linear probe.

    Args:
        train: what labels are drawn from; rows without a label are left out.
        test: the same for all draws; rows without a label are left out.
        shots: labelled images per class; a class with fewer gives all it has.
        fractions: of the images of each class, in (0, 1], at least one image of each.
        draws: A. Draw a of a larger row holds draw a of a smaller one, so that rows differ by their size alone.
        l2: candidates of the probe.
        seed: of the draws, the held-out splits and the bootstrap.
        features: what the vectors are, for the record.
        device: of the linear probe; it must have float64.
    """
    if draws < 1 or min(shots, default=1) < 1 or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"few-shot: {draws} draws of shots {shots} and fractions {fractions}; wanted 1 or more, (0, 1]")
    vectors, labels, test_vectors, test_labels, num_classes = labelled_parts(train, test)
    candidates = sorted(map(float, l2), reverse=True)
    predictors = {
        PROTOCOLS[0]: _probe(
            vectors, labels, labelled_groups(train), test_vectors, num_classes, candidates, seed, device
        ),
        PROTOCOLS[1]: _class_mean(vectors, labels, test_vectors, num_classes),
    }
    sizes: list[_Size] = [{"shots": size} for size in sorted(shots)]
    sizes += [{"fraction": share} for share in sorted(fractions)]
    results = []
    with progress(draws * len(sizes) * len(predictors), "few-shot") as bar:
        for size in sizes:
            drawn = [draw_rows(labels, **size, seed=seed, draw=number) for number in range(draws)]
            for protocol, predict in predictors.items() if len(drawn[0]) < len(labels) else ():
                started = time.perf_counter()
                found = []
                for number, rows in enumerate(drawn):
                    found.append(predict(rows, number))
                    bar.advance(bar.task_ids[0])
                predictions = np.array([classes for classes, _ in found])
                metrics = draw_metrics(test_labels, predictions, num_classes, seed=seed)
                settings = {"protocol": protocol, **size, "draws": draws, "num_train": len(drawn[0]), "seed": seed}
                settings |= {"num_test": len(test_labels), "dim": vectors.shape[1]}
                for name in found[0][1]:
                    settings[name] = [chosen[name] for _, chosen in found]
                seconds = time.perf_counter() - started
                made = made_by(train, test)
                results.append(Result("few_shot", features, metrics, settings, made, seconds, predictions))
    return results


def draw_rows(
    labels: np.ndarray, *, shots: int | None = None, fraction: float | None = None, seed: int = 0, draw: int = 0
) -> np.ndarray:
    """(M,) ascending positions: `shots` images of each class, or `fraction` of its images, at least one.

    A pure function of its arguments; fewer shots of the same seed and draw are among more of them.
    """
    order = random_bits(seed, draw, np.arange(len(labels)), _STREAM, 1)[:, 0]
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = shots if shots is not None else max(1, round((fraction or 1.0) * len(members)))
        chosen.append(members[np.argsort(order[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def _class_mean(vectors: np.ndarray, labels: np.ndarray, test_vectors: np.ndarray, num_classes: int) -> _Predict:
    units, test_units = normalised(vectors), normalised(test_vectors)

    def predict(rows: np.ndarray, draw: int) -> tuple[np.ndarray, dict[str, float]]:
        sums = np.zeros((num_classes, units.shape[1]), dtype=np.float32)
        np.add.at(sums, labels[rows], units[rows])
        cosines = test_units @ normalised(sums).T  # (N, C)
        cosines[:, np.bincount(labels[rows], minlength=num_classes) == 0] = -np.inf
        return cosines.argmax(axis=1), {}

    return predict


def _probe(
    vectors: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    test_vectors: np.ndarray,
    num_classes: int,
    candidates: Sequence[float],
    seed: int,
    device: torch.device | str,
) -> _Predict:
    scaling = Scaling.of(vectors)
    scaled, test_scaled = (scaling.apply(part, device) for part in (vectors, test_vectors))

    def predict(rows: np.ndarray, draw: int) -> tuple[np.ndarray, dict[str, float]]:
        points, test_points = spanned(scaled[rows], test_scaled)
        kin = None if groups is None else groups[rows]
        fit, l2 = _fit(points, labels[rows], kin, num_classes, candidates, seed + draw)
        return fit.predict(test_points)[0], {"l2": l2}

    return predict


def _fit(
    points: Tensor,
    labels: np.ndarray,
    groups: np.ndarray | None,
    num_classes: int,
    candidates: Sequence[float],
    seed: int,
) -> tuple[LogisticFit, float]:
    """The probe on all drawn rows, its l2 the one that was right most often on rows it was not fitted on."""
    targets, moment = torch.from_numpy(labels).to(points.device), curvature(points)
    fit = partial(fit_logistic, max_passes=_PASSES, tolerance=_TOLERANCE)
    right = np.zeros(len(candidates))
    for fitted, held in _folds(labels, groups, seed) if len(candidates) > 1 else ():
        path = fit(points[fitted], targets[fitted], num_classes, candidates, moment)
        right += (path.predict(points[held]) == labels[held]).sum(axis=1)
    l2 = candidates[int(right.argmax())] if right.any() or len(candidates) == 1 else _ONE_SHOT_L2
    return fit(points, targets, num_classes, [l2], moment), l2


def _folds(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to choose on: folds of few images, one fifth of many, nothing of one per class.

    With groups it is these that are counted and come together, each for the class of its first image.
    """
    if groups is not None:
        first, member = grouped(groups)
        for _, held in _folds(labels[first], None, seed):
            inside = np.isin(member, held)
            yield np.flatnonzero(~inside), np.flatnonzero(inside)
        return
    counts = np.bincount(labels)
    if counts[counts > 0].min() >= _ENOUGH:
        yield holdout(labels, seed=seed)
        return
    order = random_bits(seed, 0, np.arange(len(labels)), _STREAM + 1, 1)[:, 0]
    fold = np.full(len(labels), -1)  # -1: the only image of its class is always fitted on
    for label in np.flatnonzero(counts > 1):
        members = np.flatnonzero(labels == label)
        fold[members[np.argsort(order[members], kind="stable")]] = np.arange(len(members)) % _FOLDS
    for number in range(min(_FOLDS, int(counts.max()))):
        if (fold == number).any():
            yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


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
    device: torch.device | str = "cpu",
) -> Iterator[Result]:
    """kNN (k chosen on train) and linear probe at 2, 4, 8, ... dimensions and at all of them.

    Args:
        features: train and test.
        dims: instead of the powers of two; those that are not below D are left out.
        ways: "cut" keeps the first dimensions, which means something for a nested code only.
        evaluations: what to score.
        balanced: of the linear probe.
        seed: of the projection, the held-out splits and the bootstrap.
        device: of PCA, the search and the probe; it must have float64.
    """
    if odd := set(ways) - set(WAYS):
        raise UserError(f"dimension curve: ways {sorted(odd)}; wanted some of {', '.join(WAYS)}")
    full = features.train.vectors.shape[1]
    below = sorted({dim for dim in dims if dim < full}) if dims else powers_of_two(full)
    with progress((1 + len(ways) * len(below)) * len(evaluations), f"dimensions of {features.name}") as bar:
        for way in ways if below else ():
            for smaller in _smaller(features, below, way, seed, device):
                for result in _scored(smaller, evaluations, balanced, seed, device):
                    result.settings |= {"reduced_by": way}
                    bar.advance(bar.task_ids[0])
                    yield result
        yield from _scored(features, evaluations, balanced, seed, device)


def powers_of_two(full: int) -> list[int]:
    """2, 4, 8, ... below `full`."""
    return [2**power for power in range(1, full.bit_length()) if 2**power < full]


def _smaller(
    features: FeatureSet, dims: Sequence[int], way: Way, seed: int, device: torch.device | str
) -> Iterator[FeatureSet]:
    parts = features.train, features.test
    if way == "pca":
        pca = Pca.of(features.train.vectors, max(dims), seed, device)
        reduced = [pca.apply(part.vectors) for part in parts]
    elif way == "random":
        directions = random_projection(features.train.vectors.shape[1], max(dims), seed)
        reduced = [part.vectors @ directions for part in parts]
    else:
        reduced = [part.vectors for part in parts]
    for dim in dims:
        train, test = (replace(part, vectors=vectors[:, :dim]) for part, vectors in zip(parts, reduced, strict=True))
        yield FeatureSet(features.name, train, test)


def _scored(
    features: FeatureSet, evaluations: Sequence[str], balanced: bool, seed: int, device: torch.device | str
) -> Iterator[Result]:
    name, train, test = features.name, features.train, features.test
    for evaluation in evaluations:
        if evaluation == "knn":
            result = knn(train, test, seed=seed, features=name, device=device)
        else:
            result = linear_probe(train, test, balanced=balanced, seed=seed, features=name, device=device)
        result.settings["bytes_per_million_images"] = 1_000_000 * _BYTES * train.vectors.shape[1]
        yield result
