"""What a notebook calls, on plain arrays: every evaluation of features that needs no images."""

import numpy as np
import pytest

from ssl_kit import evaluation
from ssl_kit.core.errors import UserError
from ssl_kit.embeddings.embeddings import Embeddings


def clusters(count, seed):
    """Four overlapping classes: (N, 12) float64 and (N,) labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    centres = np.random.default_rng(99).standard_normal((4, 12))
    return centres[labels] + 0.5 * rng.standard_normal((count, 12)), labels


TRAIN, TEST = (Embeddings.of(*clusters(count, seed)) for count, seed in ((400, 0), (200, 1)))


@pytest.mark.parametrize(
    "score",
    [
        lambda: evaluation.knn(TRAIN, TEST, k=20),
        lambda: evaluation.knn_rows(TRAIN, TEST)[0],
        lambda: evaluation.linear_probe(TRAIN, TEST),
        lambda: evaluation.sgd_probe(TRAIN, TEST, lr=0.3, epochs=5),
        lambda: evaluation.attentive_probe(TRAIN, TEST, width=12, queries=2, lr=0.1, epochs=10),
        lambda: evaluation.few_shot(TRAIN, TEST, shots=(10,), fractions=(), draws=2)[0],
        lambda: next(evaluation.dimension_curve(evaluation.FeatureSet("encoder", TRAIN, TEST), dims=(8,))),
    ],
    ids=["knn", "knn_rows", "linear_probe", "sgd_probe", "attentive_probe", "few_shot", "dimension_curve"],
)
def test_scores_of_arrays(score):
    metrics = score().metrics
    assert metrics["top1_low"] <= metrics["top1"] <= metrics["top1_high"] and metrics["top1"] > 0.8


def test_retrieval_of_arrays():
    assert evaluation.retrieval(TEST).metrics["recall_at_10"] > 0.9


def test_functions_of_bare_arrays():
    (x, y), (x_test, y_test) = clusters(400, 0), clusters(200, 1)
    assert evaluation.knn_accuracy(x, y, x_test, y_test) == pytest.approx(
        evaluation.knn(TRAIN, TEST, k=20).metrics["top1"]
    )
    assert evaluation.search(x, x_test, 3)[1].shape == (200, 3)
    assert evaluation.classification_metrics(y_test, y_test, 4)["top1"] == 1
    assert evaluation.uniformity(x) < 0 and evaluation.hubness(x) < 2


def test_the_names_are_all_there_and_no_module_hides_one():
    for name in evaluation.__all__ * 2:
        assert callable(getattr(evaluation, name))
    with pytest.raises(AttributeError, match="no attribute 'kmn'; it has FeatureSet"):
        evaluation.kmn


def test_embeddings_of_arrays_are_checked():
    made = Embeddings.of([[1, 2], [3, 4], [5, 6]], np.array([2, -1, 0]))
    assert made.vectors.dtype == np.float32 and made.classes == ("0", "1", "2") and made.ids == ["0", "1", "2"]
    assert (Embeddings.of(np.eye(3)).labels == -1).all()
    assert Embeddings.of(np.eye(2), np.array([0, 1], dtype=np.uint8), ["cat", "dog"]).classes == ("cat", "dog")
    for vectors, labels, told in (
        (np.eye(3), np.arange(2), r"vectors \(3, 3\) and labels \(2,\)"),
        (np.arange(3), np.arange(3), r"vectors \(3,\)"),
        (np.eye(2), np.array([0.0, 1.0]), "labels of type float64"),
        (np.eye(2), np.array(["a", "b"]), "wanted integers from 0 on"),
        (np.eye(2), np.array([-2, 0]), "wanted integers from 0 on"),
    ):
        with pytest.raises(UserError, match=told):
            Embeddings.of(vectors, labels)
    with pytest.raises(UserError, match="label 1 of 1 classes"):
        Embeddings.of(np.eye(2), np.arange(2), ["cat"])
