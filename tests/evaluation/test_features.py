"""Baselines against scikit-learn's PCA and by their definitions."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from stripes import pattern
from torch.optim.swa_utils import update_bn

from ssl_kit.data.opening import open_source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.features import MAX_VALUES, Pca, Pixels, centre, feature_sets


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


def test_the_untrained_network_has_batch_norms_that_have_seen_the_training_images(tmp_path):
    images = np.stack([pattern(row % 4, row) for row in range(160)])
    train, test = open_source(images[:128]), open_source(images[128:])
    encoder = Encoder.load(Encoder("resnet18_small", {"channels": [8, 8, 8, 16]}, (16, 16)).save(tmp_path / "encoder"))
    as_tensor = lambda some: torch.from_numpy(some).permute(0, 3, 1, 2) / 255
    wanted = encoder.fresh(3)
    update_bn(as_tensor(images[:128]).chunk(2), wanted)
    wanted = wanted.eval()(as_tensor(images)).detach().numpy()
    for _ in range(2):  # made, and read again
        *_, untrained = feature_sets(encoder, train, test, tmp_path / "kept", baselines=["random_init"], seed=3)
        assert untrained.name == "random_init"
        assert np.allclose(np.concatenate([untrained.train.vectors, untrained.test.vectors]), wanted, atol=1e-4)
    for one in feature_sets(encoder, train, test, tmp_path / "kept", baselines=["random_init"], seed=3):
        made = one.network(as_tensor(images[128:]))  # other views are of the same network
    assert np.allclose(made, wanted[128:], atol=1e-4)
