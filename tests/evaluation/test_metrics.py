import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ssl_kit.evaluation.metrics import POINTS, probability_metrics, roc_curves


def predicted(count, num_classes, noise=1.0):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    logits = noise * rng.normal(size=(count, num_classes)) + 2 * np.eye(num_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_areas_are_scikit_learns_and_their_mean_is_the_reported_auroc():
    labels, probabilities = predicted(400, 5)
    curves = roc_curves(labels, probabilities)
    assert curves.recalls.shape == (5, POINTS) and (curves.rates[0], curves.rates[-1]) == (0, 1)
    assert curves.rates[1] < 0.001 and np.diff(curves.rates).max() < 0.03
    wanted = [roc_auc_score(labels == one, probabilities[:, one]) for one in range(5)]
    assert curves.auroc == pytest.approx(wanted)
    assert curves.auroc.mean() == pytest.approx(probability_metrics(labels, probabilities)["auroc"])
    assert np.trapezoid(curves.recalls, curves.rates) == pytest.approx(wanted, abs=0.005)  # 100 points are enough


def test_points_lie_on_the_curve_and_a_vertical_rise_is_taken():
    labels = np.array([0, 0, 0, 0, 1, 1])
    positive = np.array([0.1, 0.2, 0.3, 0.8, 0.9, 0.7])  # one right, one wrong, one right, three wrong
    curves = roc_curves(labels, np.stack([1 - positive, positive], axis=1))
    assert curves.classes.tolist() == [1]
    assert curves.recalls[0, 0] == 0.5
    assert curves.recalls[0, curves.rates < 0.25].max() == 0.5
    assert (curves.recalls[0, curves.rates > 0.25] == 1).all()
    assert (np.diff(curves.recalls[0]) >= 0).all()


def test_classes_that_do_not_occur_or_are_all_there_is_have_no_curve():
    labels, probabilities = predicted(90, 3)
    assert roc_curves(np.where(labels == 2, 1, labels), probabilities).classes.tolist() == [0, 1]
    none = roc_curves(np.zeros(90, dtype=np.int64), probabilities)
    assert none.recalls.shape == (0, POINTS) and len(none.auroc) == 0


def test_the_record_leads_with_the_mean_over_classes():
    labels, probabilities = predicted(120, 3)
    curves = roc_curves(labels, probabilities)
    record = curves.record(("a", "b", "c"))
    assert [one["name"] for one in record["classes"]] == ["a", "b", "c"]
    assert record["macro"]["auroc"] == pytest.approx(curves.auroc.mean(), abs=1e-5)
    assert record["macro"]["recalls"] == pytest.approx(curves.recalls.mean(axis=0), abs=1e-4)
    assert record["classes"][1]["recalls"] == pytest.approx(curves.recalls[1], abs=1e-4)
    assert record["rates"] == pytest.approx(curves.rates, abs=1e-6)


@pytest.mark.parametrize(("labels", "num_classes"), [([0, 1], 2), ([0, 0, 1], 2), ([0, 1, 2], 3), ([0, 0, 0], 3)])
@pytest.mark.filterwarnings("error")
def test_few_images_warn_of_nothing_and_a_score_without_a_value_is_left_out(labels, num_classes):
    labels = np.array(labels)
    metrics = probability_metrics(labels, np.random.default_rng(0).dirichlet(np.ones(num_classes), len(labels)))
    assert ("auroc" in metrics) == (len(set(labels)) > 1) and np.isfinite(list(metrics.values())).all()
