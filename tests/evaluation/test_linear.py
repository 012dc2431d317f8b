"""The probe against scikit-learn at the same l2, and honesty of the choice of l2."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from ssl_kit.evaluation.attentive import attentive_probe, sgd_probe
from ssl_kit.evaluation.features import Scaling
from ssl_kit.evaluation.fewshot import few_shot
from ssl_kit.evaluation.linear import _cholesky, class_weights, curvature, fit_logistic, linear_probe
from ssl_kit.evaluation.result import holdout


def clusters(count, dim=24, num_classes=4, seed=0):
    """Overlapping classes with correlated, badly scaled, offset features, one of them constant."""
    rng = np.random.default_rng(seed)
    fixed = np.random.default_rng(99)
    centres, mixing = fixed.standard_normal((num_classes, dim)), fixed.standard_normal((dim, dim))
    labels = rng.integers(0, num_classes, count)
    features = (0.45 * centres[labels] + rng.standard_normal((count, dim))) @ mixing * np.logspace(-2, 2, dim) + 5
    features[:, 3] = 7.0
    return features.astype(np.float32), labels


def as_embeddings(vectors, labels, num_classes=4):
    return SimpleNamespace(
        vectors=vectors, labels=labels, classes=tuple("abcdefghij"[:num_classes]), info={}, groups=None
    )


def standardised(train, test):
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    return (train - mean) / std, (test - mean) / std


@pytest.mark.parametrize("l2", [1e-5, 1e-3, 1e-1])
def test_equals_scikit_learn_at_the_same_l2(l2):
    (train, labels), (test, test_labels) = clusters(1_500), clusters(2_000, seed=1)
    x, x_test = standardised(train, test)
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5_000).fit(x, labels)
    loss = -reference.predict_log_proba(x)[np.arange(len(x)), labels].mean()
    result = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels), l2=l2)
    assert result.settings["objective"] == pytest.approx(loss + l2 / 2 * (reference.coef_**2).sum(), abs=1e-4)
    assert result.metrics["top1"] == pytest.approx((reference.predict(x_test) == test_labels).mean(), abs=0.002)
    assert (result.predictions == reference.predict(x_test)).mean() > 0.995
    assert result.settings["converged"]


def test_candidates_solved_together_equal_each_alone():
    train, labels = clusters(800)
    x, y = Scaling.of(train).apply(train), torch.from_numpy(labels)
    path = (1.0, 1e-2, 1e-5)
    together = fit_logistic(x, y, 4, path, curvature(x))
    alone = [fit_logistic(x, y, 4, [l2], curvature(x)).objective[0] for l2 in path]
    assert together.objective == pytest.approx(alone, abs=2e-6)


def test_fewer_images_than_dimensions_are_solved_among_themselves(monkeypatch):
    (train, labels), (test, test_labels) = clusters(40, dim=100), clusters(300, dim=100, seed=1)
    solved = []
    monkeypatch.setattr(
        "ssl_kit.evaluation.linear.curvature", lambda points: solved.append(points.shape) or curvature(points)
    )
    result = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels), l2=1e-2)
    assert solved == [(40, 40)]  # D^3 of the dimensions would be 15 times as many operations
    x, x_test = standardised(train, test)
    reference = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-8, max_iter=5_000).fit(x, labels)
    loss = -reference.predict_log_proba(x)[np.arange(len(x)), labels].mean()
    assert result.settings["objective"] == pytest.approx(loss + 5e-3 * (reference.coef_**2).sum(), abs=1e-4)
    assert (result.predictions == reference.predict(x_test)).mean() > 0.98


def test_scaling_standardises_and_silences_constants():
    train, _ = clusters(9_000)
    scaled = Scaling.of(train).apply(train).numpy()
    varying = np.arange(24) != 3
    assert np.allclose(scaled[:, varying].mean(axis=0), 0, atol=1e-4)
    assert np.allclose(scaled[:, varying].std(axis=0), 1, atol=1e-4)
    assert np.all(scaled[:, 3] == 0)


def test_preconditioner_moves_the_speed_and_not_the_solution():
    train, labels = clusters(800)
    x, y = Scaling.of(train).apply(train), torch.from_numpy(labels)
    good = fit_logistic(x, y, 4, [1e-3], curvature(x))
    poor = fit_logistic(x, y, 4, [1e-3], torch.eye(x.shape[1], dtype=torch.float64))
    assert good.objective == pytest.approx(poor.objective, abs=1e-5)
    assert good.passes < poor.passes / 2


def test_chosen_l2_is_the_best_on_the_held_out_part_and_beats_the_worst():
    (train, labels), (test, test_labels) = clusters(150, dim=60), clusters(2_000, dim=60, seed=1)
    result = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels))
    held_out, candidates = result.settings["held_out_top1"], result.settings["l2_candidates"]
    assert result.settings["l2"] == candidates[int(np.argmax(held_out))]
    assert list(candidates) == sorted(candidates, reverse=True)  # so that equal scores give the largest


def test_shuffled_test_labels_change_no_choice_and_score_chance():
    (train, labels), (test, test_labels) = clusters(800), clusters(2_000, seed=1)
    honest = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels))
    noise = np.random.default_rng(2).integers(0, 4, len(test_labels))
    shuffled = linear_probe(as_embeddings(train, labels), as_embeddings(test, noise))
    assert shuffled.settings == honest.settings
    assert np.array_equal(shuffled.predictions, honest.predictions)
    assert abs(shuffled.metrics["top1"] - 0.25) < 3 * np.sqrt(0.1875 / 2_000)
    assert honest.metrics["top1"] > 0.6


def test_random_training_labels_score_chance():
    (train, labels), (test, test_labels) = clusters(800), clusters(2_000, seed=1)
    noise = np.random.default_rng(2).integers(0, 4, len(labels))
    result = linear_probe(as_embeddings(train, noise), as_embeddings(test, test_labels))
    assert abs(result.metrics["top1"] - 0.25) < 0.08  # a random boundary: wider than the binomial error


def test_probe_leaves_the_features_alone():
    (train, labels), (test, test_labels) = clusters(200), clusters(200, seed=1)
    before = train.copy(), test.copy()
    linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels))
    assert np.array_equal(before[0], train)
    assert np.array_equal(before[1], test)


def test_balanced_probe_equals_scikit_learn():
    (train, labels), (test, test_labels) = clusters(1_500), clusters(2_000, seed=1)
    rows = np.flatnonzero((labels < 2) | (np.arange(len(labels)) % 8 == 0))  # two classes are rare
    train, labels = train[rows], labels[rows]
    x, x_test = standardised(train, test)
    reference = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8, max_iter=5_000, class_weight="balanced")
    reference.fit(x, labels)
    sets = as_embeddings(train, labels), as_embeddings(test, test_labels)
    result = linear_probe(*sets, l2=1e-3, balanced=True)
    assert (result.predictions == reference.predict(x_test)).mean() > 0.995
    confidences = reference.predict_proba(x_test).max(axis=1)
    assert np.abs(result.confidences - confidences).mean() < 1e-3
    plain = linear_probe(*sets, l2=1e-3)
    assert result.metrics["balanced_accuracy"] > plain.metrics["balanced_accuracy"] + 0.02


def test_balanced_choice_is_by_balanced_accuracy():
    train, labels = clusters(600)
    labels = np.where((labels == 3) & (np.arange(600) % 5 > 0), 0, labels)
    sets = as_embeddings(train, labels), as_embeddings(*clusters(200, seed=1))
    settings = linear_probe(*sets, balanced=True).settings
    fitted, held = holdout(labels)
    scaling = Scaling.of(train)
    x, y = scaling.apply(train), torch.from_numpy(labels)
    path = settings["l2_candidates"]
    weights = class_weights(labels[fitted], 4)
    fit = fit_logistic(x[fitted], y[fitted], 4, path, curvature(x), row_weights=weights)
    wanted = [balanced_accuracy_score(labels[held], found) for found in fit.predict(x[held])]
    assert settings["held_out_balanced_accuracy"] == pytest.approx(wanted)
    assert settings["l2"] == path[int(np.argmax(wanted))]


def test_probabilities_equal_scikit_learn_and_scores_come_from_them():
    (train, labels), (test, test_labels) = clusters(1_500), clusters(1_000, seed=1)
    x, x_test = standardised(train, test)
    reference = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-8, max_iter=5_000).fit(x, labels)
    result = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels), l2=1e-3)
    wanted = roc_auc_score(test_labels, reference.predict_proba(x_test), multi_class="ovr")
    assert result.metrics["auroc"] == pytest.approx(wanted, abs=1e-3)
    assert np.abs(result.confidences - reference.predict_proba(x_test).max(axis=1)).max() < 0.01
    assert result.metrics["ece"] < 0.05


def test_equal_columns_have_a_solution():
    # grey images as RGB: a third of the directions, and rounding puts the others' eigenvalues below zero
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    grey = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 400)) + 3 * labels[:, None]
    features = np.repeat(grey, 3, axis=1).astype(np.float32)
    result = linear_probe(as_embeddings(features, labels, 2), as_embeddings(features, labels, 2))
    assert result.metrics["top1"] > 0.95


def test_a_moment_with_negative_eigenvalues_gets_the_ridge_it_needs():
    moment = torch.diag(torch.tensor([1.0, 1e-3, -1e-5], dtype=torch.float64))
    factor = _cholesky(moment, 1e-6, 1e-6)
    assert torch.allclose(factor @ factor.T, moment, atol=2e-4)
    healthy = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(_cholesky(healthy, 1e-6, 1e-6).square(), healthy * (1 + 2e-6), rtol=1e-12)


def test_a_column_that_is_constant_up_to_rounding_has_no_say():
    """Its rounding alone would be blown up to unit variance; a millionth of its size is where values begin."""
    (train, labels), (test, test_labels) = clusters(400), clusters(200, seed=1)
    flips = np.random.default_rng(2).integers(0, 2, 400, dtype=np.int32)
    for value in (0.1, -3000.0, 1e-12):
        train[:, 3] = (np.full(400, value, np.float32).view(np.int32) + flips).view(np.float32)  # the last bit
        assert len(np.unique(train[:, 3])) == 2
        scaling = Scaling.of(train)
        assert scaling.scale[3] == 0 and np.count_nonzero(scaling.scale) == train.shape[1] - 1
        assert (scaling.apply(train)[:, 3] == 0).all()
    test[:, 3] = 1e-12 * 1.01
    with_it = linear_probe(as_embeddings(train, labels), as_embeddings(test, test_labels), l2=1e-3)
    without = (np.delete(vectors, 3, axis=1) for vectors in (train, test))
    kept = linear_probe(*map(as_embeddings, without, (labels, test_labels)), l2=1e-3)
    assert np.array_equal(with_it.predictions, kept.predictions)
    train[:, 3] = 3000.0 * (1 + 1e-5 * flips)
    assert Scaling.of(train).scale[3] > 0


PROBES = {
    "linear": partial(linear_probe, l2=(1e-3, 1e-1), balanced=True),
    "sgd": partial(sgd_probe, epochs=2),
    "attentive": partial(attentive_probe, width=8, queries=2, epochs=1),
    "few-shot": lambda train, test, **device: few_shot(train, test, shots=(5,), fractions=(), draws=1, **device)[0],
}


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_makes_all_its_tensors_on_its_device(name):
    """Elsewhere they would meet tensors of the default device, here one that computes nothing."""
    train, test = (as_embeddings(*clusters(count, seed=count)) for count in (200, 60))
    wanted = PROBES[name](train, test, device="cpu")
    with torch.device("meta"):
        got = PROBES[name](train, test, device="cpu")
    assert got.metrics == wanted.metrics and np.array_equal(got.predictions, wanted.predictions)
