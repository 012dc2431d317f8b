"""Scores of features, as functions of arrays: kNN, probes, few-shot, retrieval, health, robustness, leaks, intervals.

From a notebook, on arrays (names are loaded when they are first used):

    from ssl_kit import evaluation
    from ssl_kit.embeddings.embeddings import Embeddings

    train, test = Embeddings.of(x, y), Embeddings.of(x_test, y_test)     # (N, D) numbers, (N,) integers
    evaluation.knn(train, test, k=20).metrics["top1"]
    evaluation.linear_probe(train, test).settings["l2"]

`Embeddings.load(folder)` reads what `ssl-kit embed` wrote, `embed(encoder, source)` makes them from images.
"""

import sys
from types import ModuleType
from typing import Any

from ssl_kit.evaluation.catalog import resolve

_NAMES = {
    "neighbours": ("knn", "knn_rows", "knn_accuracy", "search"),  # which has `search` from the embeddings
    "linear": ("linear_probe",),
    "attentive": ("sgd_probe", "attentive_probe"),
    "fewshot": ("few_shot", "dimension_curve"),
    "retrieval": ("retrieval", "instance_retrieval"),
    "robustness": ("robustness", "corrupt"),
    "duplicates": ("find_leaks",),
    "health": ("alignment", "uniformity", "lidar", "hubness"),
    "metrics": ("probability_metrics", "class_scores", "confidently_wrong", "suspected_errors"),
    "result": ("classification_metrics", "confusion_matrix", "paired_difference", "holdout", "Result"),
    "features": ("Network", "FeatureSet"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return resolve(f"{__name__}.{_HOME[name]}:{name}")


class _Package(ModuleType):
    """Importing the module `retrieval` would hide the function of this name: modules are no attributes of theirs."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
