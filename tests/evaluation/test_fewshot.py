"""Few-shot: what is drawn, the exact shortcut, the interval over draws, and honesty of the choice of l2."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.evaluation.fewshot import draw_rows, few_shot
from ssl_kit.evaluation.linear import curvature, fit_logistic, spanned


def clusters(count, dim=24, num_classes=4, seed=0, spread=1.0):
    centres = np.random.default_rng(99).standard_normal((num_classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    return (centres[labels] + spread * rng.standard_normal((count, dim))).astype(np.float32), labels


def as_embeddings(vectors, labels, num_classes=4):
    return SimpleNamespace(
        vectors=vectors, labels=labels, classes=tuple("abcdefghij"[:num_classes]), info={}, groups=None
    )


def test_shots_are_per_class_and_fractions_of_each_class():
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    assert np.bincount(labels[draw_rows(labels, shots=5)]).tolist() == [5, 5, 3]
    assert np.bincount(labels[draw_rows(labels, fraction=0.1)]).tolist() == [5, 2, 1]


def test_draws_differ_repeat_and_hold_the_smaller_ones():
    labels = np.repeat([0, 1], 100)
    two, ten = draw_rows(labels, shots=2, draw=3), draw_rows(labels, shots=10, draw=3)
    assert set(two) < set(ten)
    assert np.array_equal(ten, draw_rows(labels, shots=10, draw=3))
    assert not np.array_equal(ten, draw_rows(labels, shots=10, draw=4))
    assert not np.array_equal(ten, draw_rows(labels, shots=10, draw=3, seed=1))


def test_the_span_of_few_images_holds_the_whole_solution():
    (vectors, labels), (others, _) = clusters(30, dim=80), clusters(200, dim=80, seed=1)
    x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
    small, small_others = spanned(x, torch.from_numpy(others))
    assert small.shape == (30, 30)
    full = fit_logistic(x, y, 4, [1e-2], curvature(x))
    fast = fit_logistic(small, y, 4, [1e-2], curvature(small))
    assert fast.objective == pytest.approx(full.objective, abs=1e-5)
    assert np.allclose(fast.probabilities(small_others), full.probabilities(torch.from_numpy(others)), atol=2e-3)


def test_class_mean_is_the_nearest_mean_by_cosine():
    (train, labels), (test, test_labels) = clusters(400), clusters(100, seed=1)
    result = few_shot(as_embeddings(train, labels), as_embeddings(test, test_labels), shots=(3,), fractions=(), draws=2)
    units = train / np.linalg.norm(train, axis=1, keepdims=True)
    for draw, found in enumerate(result[1].predictions):
        rows = draw_rows(labels, shots=3, draw=draw)
        means = np.array([units[rows][labels[rows] == one].mean(axis=0) for one in range(4)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        assert np.array_equal(found, (test @ means.T).argmax(axis=1))


def test_more_labels_score_higher_and_every_record_says_what_was_drawn():
    train, test = as_embeddings(*clusters(800)), as_embeddings(*clusters(500, seed=1))
    results = few_shot(train, test, shots=(1, 5, 50), fractions=(0.1,), draws=3)
    probes = [one for one in results if one.settings["protocol"] == "linear probe"]
    assert [one.settings.get("shots", one.settings.get("fraction")) for one in probes] == [1, 5, 50, 0.1]
    assert [one.settings["num_train"] for one in probes[:3]] == [4, 20, 200]
    assert probes[0].metrics["top1"] + 0.1 < probes[1].metrics["top1"] < probes[2].metrics["top1"]
    for one in results:
        assert one.metrics["top1_low"] < one.metrics["top1"] < one.metrics["top1_high"]
        assert one.metrics["top1"] == pytest.approx((one.predictions == test.labels).mean())
        assert one.metrics["top1_std"] == pytest.approx((one.predictions == test.labels).mean(axis=1).std(ddof=1))
    assert len(probes[0].settings["l2"]) == 3


def test_a_row_that_would_take_every_image_is_left_out():
    train, test = as_embeddings(*clusters(40)), as_embeddings(*clusters(40, seed=1))
    assert few_shot(train, test, shots=(40,), fractions=(1.0,), draws=2) == []


def test_test_labels_change_no_choice_and_no_prediction():
    train, test = as_embeddings(*clusters(400)), as_embeddings(*clusters(300, seed=1))
    honest = few_shot(train, test, shots=(2, 20), fractions=(0.1,), draws=2)
    test.labels = np.random.default_rng(3).integers(0, 4, 300)
    shuffled = few_shot(train, test, shots=(2, 20), fractions=(0.1,), draws=2)
    for one, other in zip(honest, shuffled, strict=True):
        assert one.settings == other.settings
        assert np.array_equal(one.predictions, other.predictions)
        assert abs(other.metrics["top1"] - 0.25) < 0.08


def test_mistakes_are_one_line():
    train = as_embeddings(*clusters(40))
    with pytest.raises(UserError, match="0 draws"):
        few_shot(train, train, draws=0)
    with pytest.raises(UserError, match="fractions"):
        few_shot(train, train, fractions=(1.5,))
