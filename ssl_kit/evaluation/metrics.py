"""Scores of probabilities and of single classes and images: what a user of real data asks after top-1.

`probability_metrics`: AUROC and average precision, one class against the rest, averaged over classes; expected
calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 5). `class_scores` and its like name classes
and images; ROC curves lie on one grid of false-positive rates, so that they can be averaged and drawn.

Letters: N images, C classes, P of them that can be told apart, R resamples, G groups of equal scores or grid points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.evaluation.result import ClassScore, blocks, with_intervals

RESAMPLES = 200  # of the bootstrap: each costs N x C, where that of top-1 costs next to nothing
_LEAST_RESAMPLES = 50
_WORK = 400_000_000  # N x C x R at most, a few seconds: fewer resamples for many classes
_BINS = 15  # of the calibration error, equal widths, as in the paper
_Z = 1.959964  # of a 95 % interval


def probability_metrics(
    labels: np.ndarray, probabilities: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, float]:
    """auroc, average_precision and ece with 95 % percentile bootstrap intervals.

    With two classes the second one is the positive one; with more, each class against the rest, macro-averaged over
    the classes that occur among the labels (so does every resample). With one class only ece is defined.

    Args:
        labels: (N,) int64 in [0, C).
        probabilities: (N, C), rows sum to 1.
        seed: of the resampling.
        resamples: of the bootstrap, fewer where N x C is large.
    """
    count, num_classes = probabilities.shape
    resamples = int(np.clip(_WORK // (count * num_classes), min(_LEAST_RESAMPLES, resamples), resamples))
    rng = np.random.default_rng(seed)
    draw = lambda size: rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.int32)
    drawn = [_scores(labels, probabilities, draw(size)) for size in blocks(resamples, 2 * count)]
    return with_intervals(_scores(labels, probabilities, np.ones((1, count), dtype=np.int32)), drawn)


def _scores(labels: np.ndarray, probabilities: np.ndarray, counts_RN: np.ndarray) -> dict[str, np.ndarray]:
    """(R,) of every score, image n counted counts_RN[:, n] times."""
    scores = {"ece": _calibration_error(labels, probabilities, counts_RN)}
    classes = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    present = [one for one in classes if 0 < (labels == one).sum() < len(labels)]
    if present:
        ranked = np.array([_ranked(probabilities[:, one], labels == one, counts_RN) for one in present])
        known = ~np.isnan(ranked)  # not of a resample without the class, or without the rest; perhaps of no class
        with np.errstate(invalid="ignore"):
            auroc_R, precision_R = ranked.sum(axis=0, where=known) / known.sum(axis=0)
        scores = {"auroc": auroc_R, "average_precision": precision_R, **scores}
    return scores


def _ranked(scores_N: np.ndarray, positive_N: np.ndarray, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, (R,) each; images of equal score are passed at once, as scikit-learn does."""
    order = np.argsort(-scores_N, kind="stable")
    ordered, positive = scores_N[order], positive_N[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equal scores
    counts = counts_RN[:, order]
    hits_RG = np.cumsum(counts * positive, axis=1, dtype=np.int64)[:, last].astype(np.float64)
    seen_RG = np.cumsum(counts, axis=1, dtype=np.int64)[:, last].astype(np.float64)
    hits, rest = hits_RG[:, -1], seen_RG[:, -1] - hits_RG[:, -1]
    new_hits = np.diff(hits_RG, axis=1, prepend=0)
    new_rest = np.diff(seen_RG - hits_RG, axis=1, prepend=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample lacks one of the two: not a number
        auroc = ((hits_RG - new_hits / 2) * new_rest).sum(axis=1) / (hits * rest)  # trapezoids
        precision = (new_hits * hits_RG / np.maximum(seen_RG, 1)).sum(axis=1) / hits
    return auroc, precision


def _calibration_error(labels: np.ndarray, probabilities: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """(R,) sum over bins of confidence of |sum of (correct - confidence)| / N, of the predicted class."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bins = np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)  # (lower, upper], as in the paper
    gaps_NB = np.zeros((len(labels), _BINS))
    gaps_NB[np.arange(len(labels)), bins] = gap
    return np.abs(counts_RN @ gaps_NB).sum(axis=1) / counts_RN.sum(axis=1)


def class_scores(confusion: np.ndarray, classes: tuple[str, ...]) -> list[ClassScore]:
    """Recall and precision of every class from a confusion matrix (C, C), row = label, column = prediction."""
    scores = []
    for row, name in enumerate(classes):
        images, predicted, right = int(confusion[row].sum()), int(confusion[:, row].sum()), int(confusion[row, row])
        low, high = wilson(right, images)
        others = np.where(np.arange(len(classes)) == row, 0, confusion[row])
        mistaken = classes[int(others.argmax())] if others.any() else ""
        recall, precision = (right / whole if whole else float("nan") for whole in (images, predicted))
        scores.append(ClassScore(name, images, recall, low, high, precision, mistaken))
    return scores


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927, JASA 22): honest for few images and near 0 and 1, too."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, _Z**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def confidently_wrong(
    labels: np.ndarray, predictions: np.ndarray, confidences: np.ndarray, count: int = 50
) -> np.ndarray:
    """Positions of the wrong predictions, at most `count`, the most confident first; equal ones by position."""
    wrong = np.flatnonzero(predictions != labels)
    return wrong[np.argsort(-confidences[wrong], kind="stable")[:count]]


def suspected_errors(
    vectors: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    margin: float = 0.5,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images whose neighbours disagree with their label: label errors are among them, and ambiguous images.

    Every image is left out and its k nearest others vote (exp(cos / T), as in kNN). The margin is the share of the
    votes for the best class minus that for the label.

    Args:
        vectors: (N, D).
        labels: (N,) int64 in [0, C).
        num_classes: C.
        k: neighbours, at most N - 1.
        temperature: T.
        margin: wanted at least; neighbours of a middling encoder outvote half of all labels by a little.
        device: that searches.

    Returns:
        Positions (M,) of the images, the largest margin first; the class (M,) that their neighbours vote for; the
        margins (M,) in (0, 1].
    """
    units = normalised(vectors)
    rows = np.arange(len(units))
    cosines, ids = search(units, units, min(k, len(units) - 1) + 1, device=device)
    others = ids != rows[:, None]
    others[others.all(axis=1), -1] = False  # so many equal images that its own row is not among the nearest
    cosines, ids = (found[others].reshape(len(units), -1) for found in (cosines, ids))
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    cells = rows[:, None] * num_classes + labels[ids]
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(units) * num_classes)
    shares = votes.reshape(len(units), num_classes) / weights.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    margins = shares[rows, best] - shares[rows, labels]
    suspects = np.flatnonzero((margins >= margin) & (margins > 0))
    suspects = suspects[np.argsort(-margins[suspects], kind="stable")]
    return suspects, best[suspects], margins[suspects]


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

    def record(self, names: Sequence[str]) -> dict[str, object]:
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
