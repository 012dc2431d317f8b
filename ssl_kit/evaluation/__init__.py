"""Scores of features, as functions of arrays: kNN and linear probes, label-free health, baselines, intervals.

`ssl_kit.evaluation.knn(train, test, k=20)` works from a notebook; names are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "knn": "neighbours",
    "knn_accuracy": "neighbours",
    "search": "neighbours",
    "linear_probe": "linear",
    "alignment": "health",
    "uniformity": "health",
    "Result": "result",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
