"""The record, the split and the intervals: against closed forms, scikit-learn and brute-force resampling."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from ssl_kit.core.errors import UserError
from ssl_kit.evaluation.result import (
    Result,
    classification_metrics,
    confusion_matrix,
    crossed_interval,
    draw_metrics,
    holdout,
    labelled,
    mean_interval,
    paired_difference,
)


def wrong_predictions(count, num_classes, accuracy, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    predictions = np.where(rng.random(count) < accuracy, labels, rng.integers(0, num_classes, count))
    return labels, predictions


def test_top1_interval_is_the_binomial_standard_error():
    labels, predictions = wrong_predictions(5_000, 10, 0.7)
    metrics = classification_metrics(labels, predictions, 10, resamples=20_000)
    p = (labels == predictions).mean()
    error = 1.96 * math.sqrt(p * (1 - p) / len(labels))
    assert metrics["top1"] == p
    assert metrics["top1_low"] == pytest.approx(p - error, abs=0.06 * error)
    assert metrics["top1_high"] == pytest.approx(p + error, abs=0.06 * error)


def test_point_values_equal_scikit_learn_also_with_absent_classes():
    labels, predictions = wrong_predictions(300, 6, 0.5, seed=1)
    labels[labels == 4] = 2  # class 4 is only ever predicted, class 7 occurs nowhere
    metrics = classification_metrics(labels, predictions, 8)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        wanted = balanced_accuracy_score(labels, predictions)
    assert metrics["balanced_accuracy"] == pytest.approx(wanted)
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))


def test_intervals_equal_resampling_the_images_one_by_one():
    labels, predictions = wrong_predictions(200, 3, 0.6, seed=2)
    metrics = classification_metrics(labels, predictions, 3, resamples=4_000)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1_500):
        rows = rng.integers(0, len(labels), len(labels))
        drawn.append(f1_score(labels[rows], predictions[rows], average="macro"))
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert metrics["macro_f1_low"] == pytest.approx(low, abs=0.01)
    assert metrics["macro_f1_high"] == pytest.approx(high, abs=0.01)


def test_paired_interval_is_the_closed_form_of_matched_pairs():
    labels, ours = wrong_predictions(4_000, 10, 0.7, seed=3)
    theirs = np.where(np.arange(4_000) % 5 == 0, 0, ours)  # wrong more often, and on the same images otherwise
    gain, low, high = paired_difference(labels, ours, theirs, resamples=20_000)
    better = ((ours == labels) & (theirs != labels)).mean()
    worse = ((ours != labels) & (theirs == labels)).mean()
    error = 1.96 * math.sqrt((better + worse - (better - worse) ** 2) / len(labels))
    assert gain == pytest.approx(better - worse)
    assert low == pytest.approx(gain - error, abs=0.06 * error)
    assert high == pytest.approx(gain + error, abs=0.06 * error)


def test_features_paired_with_themselves_differ_by_exactly_nothing():
    labels, predictions = wrong_predictions(100, 3, 0.6)
    assert paired_difference(labels, predictions, predictions) == (0.0, 0.0, 0.0)


def test_mean_interval_covers_the_truth_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    samples = rng.random((400, 500)) < 0.3
    intervals = np.array([mean_interval(sample, seed=i, resamples=300)[1:] for i, sample in enumerate(samples)])
    covered = ((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)).mean()
    assert 0.91 <= covered <= 0.98


def test_holdout_takes_a_fifth_of_every_class_and_follows_the_seed():
    labels = np.repeat([0, 1, 2], [1_000, 50, 1])
    fitted, held = holdout(labels, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate((fitted, held))), np.arange(len(labels)))
    assert np.bincount(labels[held], minlength=3).tolist() == [200, 10, 0]
    assert np.array_equal(held, holdout(labels, 0.2, seed=0)[1])
    assert not np.array_equal(held, holdout(labels, 0.2, seed=1)[1])


def test_holdout_of_single_images_is_refused():
    with pytest.raises(UserError, match="at most one per class"):
        holdout(np.arange(5))


def test_unlabelled_rows_are_left_out_and_bad_features_refused():
    embeddings = SimpleNamespace(vectors=np.ones((3, 2), np.float32), labels=np.array([0, -1, 1]))
    vectors, labels = labelled(embeddings, "train")
    assert vectors.shape == (2, 2)
    assert labels.tolist() == [0, 1]
    embeddings.vectors[2, 1] = np.nan
    with pytest.raises(UserError, match="NaN"):
        labelled(embeddings, "train")
    embeddings.labels[:] = -1
    with pytest.raises(UserError, match="no labels"):
        labelled(embeddings, "train")


def test_record_survives_json_and_leaves_the_predictions_behind():
    result = Result("knn", "encoder", {"top1": np.float32(0.5)}, {"k": 20}, {}, 1.5, np.arange(3))
    again = Result.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert again.predictions is None
    with pytest.raises(UserError, match="colour"):
        Result.from_json({**result.to_json(), "colour": 1})


def test_confusion_rows_are_labels():
    assert confusion_matrix(np.array([0, 0, 1]), np.array([1, 1, 1]), 2).tolist() == [[0, 2], [0, 1]]


def draws_of(accuracies, count=400, seed=0):
    rng = np.random.default_rng(seed)
    labels, hard = rng.integers(0, 3, count), rng.random(count)
    predictions = [np.where(hard + 0.3 * rng.random(count) < one, labels, (labels + 1) % 3) for one in accuracies]
    return labels, np.array(predictions)


def test_interval_over_draws_equals_resampling_draws_and_images():
    labels, predictions = draws_of((0.5, 0.6, 0.75, 0.9))
    right = predictions == labels
    value, low, high = crossed_interval(right, resamples=10_000)
    rng = np.random.default_rng(7)
    drawn = [right[rng.integers(0, 4, 4)][:, rng.integers(0, 400, 400)].mean() for _ in range(10_000)]
    wanted_low, wanted_high = np.percentile(drawn, (2.5, 97.5))
    assert value == pytest.approx(right.mean())
    assert (low, high) == pytest.approx((wanted_low, wanted_high), abs=0.015)
    independent = mean_interval(right.ravel())
    assert high - low > 1.5 * (independent[2] - independent[1])


def test_scores_of_draws_are_means_and_one_draw_is_a_plain_score():
    labels, predictions = draws_of((0.5, 0.8))
    metrics = draw_metrics(labels, predictions, 3)
    each = [balanced_accuracy_score(labels, one) for one in predictions]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(each))
    assert metrics["top1_std"] == pytest.approx(np.std((predictions == labels).mean(axis=1), ddof=1))
    assert metrics["balanced_accuracy_low"] < metrics["balanced_accuracy"] < metrics["balanced_accuracy_high"]
    one, plain = draw_metrics(labels, predictions[:1], 3), classification_metrics(labels, predictions[0], 3)
    assert one["top1_std"] == 0.0
    for name in ("top1_low", "top1_high", "balanced_accuracy_low", "balanced_accuracy_high"):
        assert one[name] == pytest.approx(plain[name], abs=0.006)


def test_draws_are_compared_draw_by_draw():
    labels, predictions = draws_of((0.5, 0.6, 0.75, 0.9))
    worse = np.where(np.arange(400) % 10 == 0, (labels + 2) % 3, predictions)
    gain, low, high = paired_difference(labels, predictions, worse)
    assert gain == pytest.approx((predictions == labels).mean() - (worse == labels).mean())
    assert low > 0 and high - low < 0.1  # the draws' own spread, 0.4, has gone
    _, low_alone, high_alone = mean_interval(((predictions == labels).astype(int) - (worse == labels)).ravel())
    assert high - low > 1.3 * (high_alone - low_alone)  # an image counts once, however many draws saw it
