"""ROC curves, one class against the rest, on one grid of false-positive rates so that they can be averaged and drawn.

Letters: N images, C classes, P classes that occur among the labels (and do not hold all of them), G points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 100  # G: closer together near 0, where curves of good classifiers bend


@dataclass
class RocCurves:
    """Averaged vertically (Fawcett 2006, Pattern Recognition Letters 27, section 8): the mean over classes is a curve.

    Attributes:
        rates: (G,) false-positive rates from 0 to 1.
        classes: (P,) int64, ascending.
        recalls: (P, G) true-positive rates.
        auroc: (P,) areas under the exact curves, not under their G points.
    """

    rates: np.ndarray
    classes: np.ndarray
    recalls: np.ndarray
    auroc: np.ndarray

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """For details/roc.json: rates, the macro average, then every class by its name."""
        line = lambda auroc, recalls: {"auroc": round(float(auroc), 5), "recalls": np.round(recalls, 4).tolist()}
        lines = zip(self.classes.tolist(), self.auroc, self.recalls, strict=True)
        return {
            "rates": np.round(self.rates, 6).tolist(),
            "macro": line(self.auroc.mean(), self.recalls.mean(axis=0)),
            "classes": [{"name": names[label], **line(auroc, recalls)} for label, auroc, recalls in lines],
        }


def roc_curves(labels: np.ndarray, probabilities: np.ndarray) -> RocCurves:
    """Curves of every class that occurs; with two classes only that of the second, as in `probability_metrics`.

    Args:
        labels: (N,) int64 in [0, C).
        probabilities: (N, C).
    """
    from sklearn.metrics import auc, roc_curve

    rates = np.linspace(0, 1, POINTS) ** 2
    candidates = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    classes = [one for one in candidates if 0 < (labels == one).sum() < len(labels)]
    recalls, areas = [], []
    for one in classes:
        false_positives, true_positives, _ = roc_curve(labels == one, probabilities[:, one])
        # where the curve rises vertically np.interp takes the upper end, which is what the classifier can reach
        recalls.append(np.interp(rates, false_positives, true_positives))
        areas.append(auc(false_positives, true_positives))
    shape = (len(classes), POINTS)
    return RocCurves(rates, np.array(classes, dtype=np.int64), np.reshape(recalls, shape), np.array(areas))
