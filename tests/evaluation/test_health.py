"""Uniformity, alignment and spread of features for which they are known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import hyp0f1
from scipy.stats import skew

from ssl_kit.core.spectrum import effective_rank
from ssl_kit.evaluation.health import alignment, health, hubness, lidar, per_dimension_std, sample_rows, uniformity


def isotropic(count, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize(("dim", "wanted"), [(2, -1.575027), (64, -3.875236), (128, -3.937530)])
def test_uniformity_of_the_uniform_sphere(dim, wanted):
    assert np.log(hyp0f1(dim / 2, 4)) - 4 == pytest.approx(wanted, abs=1e-6)
    assert uniformity(3.0 * isotropic(4_000, dim)) == pytest.approx(wanted, abs=0.01)


def test_uniformity_equals_the_mean_over_all_pairs():
    features = isotropic(1_500, 8)  # more than one block
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    squared = ((unit[:, None] - unit[None]) ** 2).sum(-1)[np.triu_indices(1_500, 1)]
    assert uniformity(features) == pytest.approx(np.log(np.exp(-2 * squared).mean()), rel=1e-6)


def test_uniformity_of_a_sample_is_close_and_follows_the_seed():
    features = isotropic(12_000, 16) + 0.2
    assert uniformity(features, seed=1) == uniformity(features, seed=1)
    assert uniformity(features, seed=1) != uniformity(features, seed=2)
    assert uniformity(features, seed=1) == pytest.approx(uniformity(features[:5_000]), abs=0.02)


def test_collapsed_features():
    features = np.ones((50, 4), np.float32)
    assert uniformity(features) == 0.0
    assert np.all(per_dimension_std(features) < 1e-12)
    assert "alpha" not in health(SimpleNamespace(vectors=features, labels=None, info={})).metrics


def test_alignment_of_identical_opposite_and_independent_views():
    features = isotropic(5_000, 64)
    assert alignment(features, 2 * features) == pytest.approx(0, abs=1e-12)
    assert alignment(features, -features) == pytest.approx(4)
    assert alignment(features, isotropic(5_000, 64, seed=1)) == pytest.approx(2, abs=0.02)


def test_spread_of_isotropic_features():
    assert per_dimension_std(isotropic(20_000, 128)).mean() == pytest.approx(0.0883835, rel=0.001)


def test_sample_keeps_order_and_small_sets_whole():
    rows = np.arange(100)[:, None]
    chosen = sample_rows(rows, 30, seed=1)[:, 0]
    assert len(chosen) == 30
    assert np.all(np.diff(chosen) > 0)
    assert sample_rows(rows, 100) is rows


def test_record_holds_the_measures():
    features = isotropic(3_000, 16)
    record = health(SimpleNamespace(vectors=features, labels=None, info={}), views=(features, features))
    assert record.metrics["rank_fraction"] == pytest.approx(1, abs=0.01)
    assert record.metrics["std"] == pytest.approx(1, abs=0.01)
    assert record.metrics["alignment"] == 0.0


@pytest.mark.parametrize("clusters", [2, 5, 12])
def test_lidar_counts_well_separated_clusters(clusters):
    # images of one class at equal distances from all others: C - 1 directions, whatever the dimension
    rng = np.random.default_rng(0)
    centres = 100 * np.eye(clusters, 20)[np.arange(clusters)]
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    views = [(centres + 0.1 * rng.standard_normal((clusters, 20))) @ rotation for _ in range(400)]
    assert lidar(views) == pytest.approx(clusters - 1, rel=0.02)
    assert lidar([1e-3 * view for view in views]) == pytest.approx(lidar(views), rel=1e-6)


def test_lidar_is_blind_to_directions_in_which_only_the_views_differ():
    rng = np.random.default_rng(1)
    images = rng.standard_normal((500, 8)) * np.r_[np.ones(4), np.zeros(4)]
    scatter = np.r_[0.1 * np.ones(4), 3 * np.ones(4)]
    views = [images + scatter * rng.standard_normal((500, 8)) for _ in range(10)]
    assert lidar(views) == pytest.approx(4, abs=0.1)
    assert effective_rank(np.concatenate(views)) > 6  # which RankMe takes for information
    assert lidar(views) <= 8


def test_lidar_of_collapsed_features_is_one():
    assert lidar([np.ones((10, 4))] * 3) == 1.0


def test_hubness_is_the_skewness_of_the_k_occurrence():
    features = isotropic(400, 50) + 0.5
    cosines = features @ features.T / np.outer(*[np.linalg.norm(features, axis=1)] * 2)
    np.fill_diagonal(cosines, -2)
    counts = np.bincount(np.argsort(-cosines, axis=1)[:, :10].ravel(), minlength=400)
    assert hubness(features) == pytest.approx(skew(counts), rel=1e-3)


def test_a_ring_has_no_hubs_and_high_dimensions_have():
    angles = 2 * np.pi * np.arange(200) / 200
    assert abs(hubness(np.stack((np.cos(angles), np.sin(angles)), axis=1), k=2)) < 0.5
    # distances to the mean differ, and what lies near it is near to all: Radovanovic et al., section 4
    scattered = np.abs(isotropic(2_000, 100))
    assert hubness(scattered) > 2 > hubness(np.abs(isotropic(2_000, 3)))
