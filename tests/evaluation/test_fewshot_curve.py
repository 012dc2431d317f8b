"""The dimension curve: each way does what it says, storage stands beside each point."""

import numpy as np
import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.evaluation.features import FeatureSet, Pca, random_projection
from ssl_kit.evaluation.fewshot import dimension_curve, powers_of_two
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import knn

DIM = 12


def features(train=300, test=150):
    parts = []
    centres = np.random.default_rng(99).standard_normal((4, DIM))
    for count, seed in ((train, 0), (test, 1)):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 4, count)
        vectors = ((centres[labels] + rng.standard_normal((count, DIM))) * np.linspace(3, 0.3, DIM)).astype(np.float32)
        parts.append(Embeddings(vectors, labels, tuple("abcd"), [str(row) for row in range(count)]))
    return FeatureSet("encoder", *parts)


def by(points, **wanted):
    (point,) = [
        one for one in points if all({**one.settings, "e": one.evaluation}.get(k) == v for k, v in wanted.items())
    ]
    return point


def sliced(part, vectors):
    return Embeddings(vectors, part.labels, part.classes, part.ids)


def test_dimensions_are_powers_of_two_and_all_of_them_last():
    assert powers_of_two(128) == [2, 4, 8, 16, 32, 64]
    assert powers_of_two(100) == [2, 4, 8, 16, 32, 64]
    points = list(dimension_curve(features(), ways=("pca",), evaluations=("knn",)))
    assert [point.settings["dim"] for point in points] == [2, 4, 8, DIM]
    assert [point.settings["bytes_per_million_images"] for point in points] == [8e6, 16e6, 32e6, 48e6]
    assert [point.settings.get("reduced_by") for point in points] == ["pca", "pca", "pca", None]


def test_each_way_scores_what_it_says():
    whole = features()
    points = list(dimension_curve(whole, dims=(3, 5, 40), ways=("random", "pca", "cut"), seed=2))
    assert len(points) == 2 * (3 * 2 + 1)
    pca = Pca.of(whole.train.vectors, 5, 2)
    reduced = [sliced(part, pca.apply(part.vectors, 3)) for part in (whole.train, whole.test)]
    assert by(points, e="knn", dim=3, reduced_by="pca").metrics == knn(*reduced, seed=2).metrics
    cut = [sliced(part, part.vectors[:, :5]) for part in (whole.train, whole.test)]
    assert by(points, e="linear", dim=5, reduced_by="cut").metrics == linear_probe(*cut, seed=2).metrics
    directions = random_projection(DIM, 5, 2)
    projected = [sliced(part, part.vectors @ directions[:, :5]) for part in (whole.train, whole.test)]
    assert by(points, e="knn", dim=5, reduced_by="random").metrics["top1"] == pytest.approx(
        knn(*projected, seed=2).metrics["top1"]
    )
    assert by(points, e="knn", dim=DIM).metrics == knn(whole.train, whole.test, seed=2).metrics


def test_random_directions_are_orthonormal_and_follow_the_seed():
    directions = random_projection(20, 6, 1)
    assert np.allclose(directions.T @ directions, np.eye(6), atol=1e-6)
    assert np.array_equal(directions, random_projection(20, 6, 1))
    assert not np.allclose(directions, random_projection(20, 6, 2))


def test_unknown_ways_are_one_line():
    with pytest.raises(UserError, match="umap"):
        list(dimension_curve(features(), ways=("umap",)))
