"""Effective rank and alpha of spectra that are known exactly."""

import numpy as np
import pytest

from ssl_kit.core.spectrum import alpha_exponent, effective_rank, eigenvalues


def with_spectrum(singular_values, count, seed=0):
    """(count, d) features whose singular values are exactly the given ones, with centred, random left vectors."""
    rng = np.random.default_rng(seed)
    dim = len(singular_values)
    left = rng.standard_normal((count, dim))
    left, _ = np.linalg.qr(left - left.mean(axis=0))
    right, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return (left * singular_values) @ right.T


def test_isotropic_features_have_full_rank():
    features = np.random.default_rng(0).standard_normal((25_600, 128)).astype(np.float32)
    assert effective_rank(features) == pytest.approx(128, rel=0.002)
    assert effective_rank(features) <= 128


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_equal_singular_values_count_themselves(rank):
    features = with_spectrum(np.where(np.arange(40) < rank, 2.0, 0.0), 200)
    assert effective_rank(features) == pytest.approx(rank, rel=1e-5)
    assert effective_rank(features[:, :rank] if rank > 1 else features) <= rank * (1 + 1e-5)


def test_known_entropy():
    sigma = np.array([4.0, 2.0, 1.0, 1.0])  # p = 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits
    assert effective_rank(with_spectrum(sigma, 100)) == pytest.approx(2**1.75)


def test_constant_features_have_rank_one_and_zeros_too():
    assert effective_rank(np.tile(np.arange(1.0, 9.0), (50, 1))) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.zeros((10, 4))) == 1.0


def test_scale_and_rotation_change_nothing():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((500, 16)) * np.arange(1, 17)
    rotation, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    assert effective_rank(1e-4 * features @ rotation) == pytest.approx(effective_rank(features), rel=1e-8)


def test_fewer_rows_than_columns_gives_the_same_spectrum():
    features = np.random.default_rng(2).standard_normal((30, 100))
    wanted = np.linalg.svd(features, compute_uv=False) ** 2 / 30
    assert np.allclose(eigenvalues(features, centred=False), wanted)
    assert effective_rank(features) <= 30


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_alpha_of_a_power_law(alpha):
    features = with_spectrum(np.arange(1, 65) ** (-alpha / 2), 1_000)  # eigenvalues are squares of singular values
    assert alpha_exponent(features) == pytest.approx(alpha, abs=0.02)
    assert alpha_exponent(1_000 + features) == pytest.approx(alpha, abs=0.02)  # a common offset is no direction


def test_alpha_weighs_every_octave_alike():
    values = np.where(np.arange(64) < 32, np.arange(1, 65) ** -1.0, 1 / 64)  # the last of six octaves is bent
    log_i, log_v = np.log(np.arange(1, 65)), np.log(values)
    weights = 1 / np.arange(1, 65)
    centre_i, centre_v = np.average(log_i, weights=weights), np.average(log_v, weights=weights)
    slope = (weights * (log_i - centre_i) * (log_v - centre_v)).sum() / (weights * (log_i - centre_i) ** 2).sum()
    assert alpha_exponent(with_spectrum(np.sqrt(values), 1_000)) == pytest.approx(-slope, abs=1e-6)


def test_alpha_of_nothing_is_not_a_number():
    assert np.isnan(alpha_exponent(np.ones((10, 3))))
