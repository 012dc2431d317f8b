"""Honesty of every evaluation: test labels choose nothing (E1), and labels without meaning score chance (E2).

On digits, pixels as features: what is chosen must come from train alone, whatever the evaluation.
"""

import numpy as np
import pytest

from ssl_kit.core.reading import GREY
from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.evaluation import attentive_probe, dimension_curve, few_shot, knn, knn_rows, linear_probe, sgd_probe
from ssl_kit.evaluation.features import FeatureSet, Pixels
from ssl_kit.views.recipe import plain

EVALUATIONS = {
    "knn": knn_rows,
    "linear": lambda train, test: [linear_probe(train, test)],
    "balanced": lambda train, test: [linear_probe(train, test, balanced=True)],
    "sgd": lambda train, test: [sgd_probe(train, test, epochs=3)],
    "attentive": lambda train, test: [attentive_probe(train, test, width=8, epochs=2)],
    "few_shot": lambda train, test: few_shot(train, test, shots=(2, 10), fractions=(0.1,), draws=2),
    "curve": lambda train, test: list(dimension_curve(FeatureSet("pixels", train, test), dims=(8,))),
}


@pytest.fixture(scope="module")
def digits():
    """1,437 training and 360 test digits of 8 x 8 grey pixels, 64 dimensions."""
    return [embed(Pixels((8, 8), 1), part, view=plain((8, 8))) for part in open_labelled("digits", reading=GREY)]


def relabelled(part, seed):
    labels = np.random.default_rng(seed).integers(0, 10, len(part))
    return Embeddings(part.vectors, labels, part.classes, part.ids, part.info)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_random_test_labels_change_no_choice_and_no_prediction(digits, name):
    train, test = digits
    honest = EVALUATIONS[name](train, test)
    shuffled = EVALUATIONS[name](train, relabelled(test, 0))
    for one, other in zip(honest, shuffled, strict=True):
        assert one.settings == other.settings
        assert np.array_equal(one.predictions, other.predictions)
        assert abs(other.metrics["top1"] - 0.1) < 4 * np.sqrt(0.09 / len(test))
    assert max(one.metrics["top1"] for one in honest) > (0.3 if name == "attentive" else 0.85)


def test_random_labels_everywhere_score_chance(digits):
    train, test = digits
    scores = {"knn": [], "linear": []}
    for seed in range(4):
        noise, other = relabelled(train, seed), relabelled(test, 100 + seed)
        scores["knn"].append(knn(noise, other).metrics["top1"])
        scores["linear"].append(linear_probe(noise, other).metrics["top1"])
    for values in scores.values():  # 1,440 answers
        assert abs(np.mean(values) - 0.1) < 3 * np.sqrt(0.09 / (4 * len(test)))
