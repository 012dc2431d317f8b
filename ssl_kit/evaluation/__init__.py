"""Scores of features, as functions of arrays: kNN, probes, few-shot, retrieval, health, robustness, leaks, intervals.

From a notebook, on arrays (names are loaded when they are first used):

    from ssl_kit import evaluation
    from ssl_kit.embeddings.embeddings import Embeddings

    train, test = Embeddings.of(x, y), Embeddings.of(x_test, y_test)     # (N, D) numbers, (N,) integers
    evaluation.knn(train, test, k=20).metrics["top1"]
    evaluation.linear_probe(train, test).settings["l2"]

`Embeddings.load(folder)` reads what `ssl-kit embed` wrote, `embed(encoder, source)` makes them from images.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "knn": "neighbours",
    "knn_rows": "neighbours",
    "knn_accuracy": "neighbours",
    "search": "neighbours",  # which has it from the embeddings
    "linear_probe": "linear",
    "sgd_probe": "attentive",
    "attentive_probe": "attentive",
    "few_shot": "fewshot",
    "retrieval": "retrieval",
    "instance_retrieval": "retrieval",
    "dimension_curve": "fewshot",
    "robustness": "robustness",
    "corrupt": "robustness",
    "find_leaks": "duplicates",
    "alignment": "health",
    "uniformity": "health",
    "lidar": "health",
    "hubness": "health",
    "probability_metrics": "metrics",
    "class_scores": "metrics",
    "confidently_wrong": "metrics",
    "suspected_errors": "metrics",
    "classification_metrics": "result",
    "confusion_matrix": "result",
    "paired_difference": "result",
    "holdout": "result",
    "Result": "result",
    "Network": "features",
    "FeatureSet": "features",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
