"""Baselines against scikit-learn's PCA and by their definitions."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ssl_kit.evaluation.features import MAX_VALUES, Pca, Pixels, centre


def correlated(count, dim, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) * np.arange(1, dim + 1) ** -0.7 + 3).astype(np.float32) @ np.linalg.qr(
        np.random.default_rng(9).standard_normal((dim, dim))
    )[0].astype(np.float32)


@pytest.mark.parametrize(("count", "columns", "dim"), [(3_000, 300, 8), (500, 20, 8), (40, 200, 16)])
def test_pca_equals_scikit_learn(count, columns, dim):
    train, test = correlated(count, columns), correlated(50, columns, seed=1)
    ours = Pca.of(train, dim)
    reference = PCA(dim, svd_solver="full").fit(train)
    kept = np.square(ours.apply(train)).sum() / (np.square(train - train.mean(0)).sum())
    assert kept == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-4)
    gram = ours.apply(test) @ ours.apply(test).T  # independent of signs and of rotations among equals
    wanted = reference.transform(test) @ reference.transform(test).T
    assert np.abs(gram - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.allclose(ours.directions.T @ ours.directions, np.eye(dim), atol=1e-4)


def test_fewer_dimensions_are_the_leading_ones():
    train = correlated(400, 30)
    pca = Pca.of(train, 12)
    assert np.allclose(pca.apply(train, 3), pca.apply(train)[:, :3], atol=1e-5)
    assert Pca.of(train, 99).directions.shape == (30, 30)


def test_pixels_are_the_pixels_and_stay_small():
    images = torch.rand(4, 3, 8, 8)
    pixels = Pixels((8, 8), 3)
    assert pixels.dim == 192
    assert torch.equal(pixels(images), images.reshape(4, 192))
    large = Pixels((224, 224), 3)
    assert large.dim <= MAX_VALUES
    assert large.dim > 0.9 * MAX_VALUES
    assert large.image_size[0] == large.image_size[1]


def test_centre_uses_the_training_mean_for_both():
    train, test = correlated(100, 5), correlated(20, 5, seed=1)
    mean, before = train.mean(axis=0), test.copy()
    centre(train, test)
    assert np.allclose(train.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(test, before - mean, atol=1e-5)


def test_pca_of_what_does_not_vary_is_finite():
    constant = np.full((40, 100), 0.5, np.float32)
    pca = Pca.of(constant, 8)
    assert np.isfinite(pca.directions).all() and np.abs(pca.apply(constant)).max() == 0
    assert np.allclose(pca.directions.T @ pca.directions, np.eye(8), atol=1e-6)
