"""Scores of probabilities, classes and images against scikit-learn, torchmetrics and values by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from ssl_kit.evaluation.metrics import (
    class_scores,
    confidently_wrong,
    probability_metrics,
    suspected_errors,
    wilson,
)


def predicted(count, num_classes, seed=0, coarse=False):
    """Labels and probabilities that know something of them; `coarse` ones have many ties, as kNN votes do."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    logits = rng.standard_normal((count, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if coarse:
        probabilities = np.round(10 * probabilities) + 1e-3
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return labels, probabilities.astype(np.float32)


@pytest.mark.parametrize("coarse", [False, True])
def test_macro_scores_equal_scikit_learn(coarse):
    labels, probabilities = predicted(400, 5, coarse=coarse)
    metrics = probability_metrics(labels, probabilities)
    onehot = np.eye(5)[labels]
    assert metrics["auroc"] == pytest.approx(roc_auc_score(onehot, probabilities, average="macro"), abs=1e-12)
    assert metrics["average_precision"] == pytest.approx(average_precision_score(onehot, probabilities), abs=1e-12)


def test_two_classes_take_the_second_as_the_positive_one():
    labels, probabilities = predicted(300, 2)
    metrics = probability_metrics(labels, probabilities)
    assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, probabilities[:, 1]), abs=1e-12)
    assert metrics["average_precision"] == pytest.approx(average_precision_score(labels, probabilities[:, 1]))


def test_classes_without_images_are_left_out():
    labels, probabilities = predicted(300, 4)
    labels[labels == 3] = 0
    metrics = probability_metrics(labels, probabilities)
    wanted = np.mean([roc_auc_score(labels == one, probabilities[:, one]) for one in range(3)])
    assert metrics["auroc"] == pytest.approx(wanted)
    assert "auroc" not in probability_metrics(np.zeros(300, np.int64), probabilities)


@pytest.mark.parametrize("num_classes", [2, 7])
def test_calibration_error_equals_torchmetrics(num_classes):
    labels, probabilities = predicted(500, num_classes)
    wanted = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes, n_bins=15
    )
    assert probability_metrics(labels, probabilities)["ece"] == pytest.approx(float(wanted), abs=1e-6)


def test_intervals_equal_resampling_the_images_one_by_one():
    labels, probabilities = predicted(150, 3)
    metrics = probability_metrics(labels, probabilities, resamples=2_000)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1_000):
        rows = rng.integers(0, 150, 150)
        drawn.append(roc_auc_score(np.eye(3)[labels[rows]], probabilities[rows], average="macro"))
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert metrics["auroc_low"] == pytest.approx(low, abs=0.008)
    assert metrics["auroc_high"] == pytest.approx(high, abs=0.008)


def test_wilson_interval_by_hand():
    low, high = wilson(8, 10)  # (0.8 + z^2/20 -+ z sqrt(0.016 + z^2/400)) / (1 + z^2/10), z = 1.96
    assert (low, high) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_classes_are_told_by_recall_precision_and_what_they_are_mistaken_for():
    confusion = np.array([[6, 2, 0], [0, 4, 0], [0, 0, 0]])
    first, second, third = class_scores(confusion, ("ant", "bee", "cat"))
    assert (first.recall, first.precision, first.mistaken_for, first.num_images) == (0.75, 1.0, "bee", 8)
    assert (first.low, first.high) == wilson(6, 8)
    assert (second.recall, second.precision, second.mistaken_for) == (1.0, pytest.approx(4 / 6), "")
    assert np.isnan(third.recall) and np.isnan(third.precision)


def test_confident_mistakes_come_first():
    labels, predictions = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 1, 1, 0])
    confidences = np.array([0.99, 0.5, 0.9, 0.7, 0.9])
    assert confidently_wrong(labels, predictions, confidences, 3).tolist() == [2, 4, 3]


def test_planted_label_errors_are_suspected_first_and_corrected():
    rng = np.random.default_rng(0)
    truth = np.arange(300) % 3
    vectors = (3 * np.eye(8)[truth] + 0.6 * rng.standard_normal((300, 8))).astype(np.float32)
    labels = truth.copy()
    flipped = rng.choice(300, 12, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 3
    rows, suggested, margins = suspected_errors(vectors, labels, 3)
    assert set(rows[:12]) == set(flipped)
    assert np.array_equal(suggested[:12], truth[rows[:12]])
    assert np.all(np.diff(margins) <= 0) and margins[-1] >= 0.5
    assert len(rows) < 20 < len(suspected_errors(vectors + rng.standard_normal((300, 8)), labels, 3, margin=0.0)[0])


def test_copies_of_one_image_do_not_vote_for_themselves():
    vectors = np.ones((30, 4), np.float32)  # all equal: nobody's own row need be among its neighbours
    labels = np.r_[np.zeros(29, np.int64), 1]
    rows, suggested, _ = suspected_errors(vectors, labels, 2, k=5)
    assert rows.tolist() == [29] and suggested.tolist() == [0]
