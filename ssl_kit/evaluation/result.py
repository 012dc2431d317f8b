"""One record for every number, the split everything is chosen on, and the intervals beside every score.

Rules (design: chosen on a part of train, test read once): `holdout` makes the part of train on which k, temperature
and l2 are chosen; `classification_metrics` turns predictions on test into metrics with 95 % percentile bootstrap
intervals (Efron & Tibshirani 1993, chapter 13); `paired_difference` compares two sets of features on the same images.

Resampling N images with replacement changes only how often each (label, prediction) cell is drawn, so counts are
drawn multinomially instead of images: the same distribution, exactly, at a cost that does not grow with N.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import random_bits
from ssl_kit.core.sealed import Entries
from ssl_kit.data.labels import grouped

if TYPE_CHECKING:
    from ssl_kit.embeddings.embeddings import Embeddings

RESAMPLES = 1_000  # a 95 % percentile interval is then stable to about 1/30 of its width
_STREAM_HOLDOUT = 100_001  # of core/random.py; evaluation owns the streams from 100,000 on
_NOT_SAVED = {"predictions", "confidences", "probabilities"}
_BLOCK_COUNTS = 4_000_000  # counts held at once while resampling, 32 MB


@dataclass
class Result:
    """A number with everything that can move it.

    Attributes:
        evaluation: "knn", "linear", "health", ...
        features: "encoder", "random_init", "pixels", "pca" or "pretrained:NAME".
        metrics: fractions in [0, 1] with `NAME_low` and `NAME_high`, the 95 % interval, beside each NAME (label-free
            measures such as an effective rank have their own units and no interval).
        settings: every argument that can move the number, the chosen ones included.
        made_by: encoder_sha256, train, test, versions.
        seconds: wall time.
        predictions: (N,) int64 on the test images, or (A, N) of A draws, for paired comparisons; not saved.
        confidences: (N,) float32 in [0, 1], the probability of each predicted class, where there is one; not saved.
        probabilities: (N, C) float32, only where they were asked for; not saved.
    """

    evaluation: str
    features: str
    metrics: dict[str, float]
    settings: Entries = field(default_factory=dict)
    made_by: Entries = field(default_factory=dict)
    seconds: float = 0.0
    predictions: np.ndarray | None = field(default=None, repr=False, compare=False)
    confidences: np.ndarray | None = field(default=None, repr=False, compare=False)
    probabilities: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> Entries:
        """The saved record, one line of `results.jsonl`: everything but predictions, confidences, probabilities."""
        record = asdict(self)
        for name in _NOT_SAVED:
            del record[name]
        record["metrics"] = {name: float(value) for name, value in self.metrics.items()}
        return record

    @classmethod
    def from_json(cls, record: Entries) -> Result:
        """Reads a saved record; a missing or unknown entry is a `UserError` that names it."""
        known = {entry.name for entry in fields(cls)} - _NOT_SAVED
        if set(record) != known:
            odd = sorted(set(record) ^ known)
            raise UserError(f"a Result has the entries {sorted(known)}; missing or unknown here: {odd}")
        return cls(**record)


@dataclass(frozen=True)
class ClassScore:
    """One class among the test images.

    Attributes:
        name: of the class.
        num_images: with this label.
        recall: fraction of them that was recognised; nan without images.
        low: lower end of the recall's 95 % Wilson interval.
        high: upper end.
        precision: fraction of the predictions of this class that was right; nan without predictions.
        mistaken_for: the class most often predicted instead, "" if none.
    """

    name: str
    num_images: int
    recall: float
    low: float
    high: float
    precision: float
    mistaken_for: str


def made_by(train: Embeddings, test: Embeddings) -> Entries:
    """The provenance of a score: the encoder's sha256, what `train` and `test` were, and the versions at work."""
    return {
        "encoder_sha256": test.info.get("encoder_sha256"),
        "train": train.info.get("source"),
        "test": test.info.get("source"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of what can move a score."""
    found = {}
    for package in ("ssl-kit", "torch", "faiss-cpu", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree on sys.path, or another build of faiss
            found[package] = "unknown"
    return found


def labelled(embeddings: Embeddings, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows with a known label: vectors (N, D) float32 and labels (N,) int64.

    Raises:
        UserError: no row has a label, or a vector is not finite.
    """
    known = embeddings.labels >= 0
    if not known.any():
        raise UserError(f"{name} has no labels; give class folders or a `label` column")
    vectors = embeddings.vectors if known.all() else embeddings.vectors[known]
    if not np.isfinite(vectors.sum(dtype=np.float64)):  # NaN and infinities survive a sum; no mask of N x D is needed
        raise UserError(f"the features of {name} hold NaN or infinite values; the encoder has diverged")
    return vectors, embeddings.labels[known]


def labelled_parts(train: Embeddings, test: Embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Vectors and labels of train, then of test, as `labelled` gives them, and how many classes they have."""
    vectors, labels = labelled(train, "train")
    test_vectors, test_labels = labelled(test, "test")
    num_classes = int(max(len(train.classes), labels.max() + 1, test_labels.max() + 1))
    return vectors, labels, test_vectors, test_labels, num_classes


def labelled_groups(embeddings: Embeddings) -> np.ndarray | None:
    """(N,) int64 groups of the rows that `labelled` gives, None where none is known."""
    return None if embeddings.groups is None else embeddings.groups[embeddings.labels >= 0]


def holdout(
    labels: np.ndarray, fraction: float = 0.2, seed: int = 0, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a training set by class: what candidates are fitted on, and what they are chosen on.

    Args:
        labels: (N,) int64 of the training images only.
        fraction: of each class to hold out, in (0, 1); a class of one image is never held out.
        seed: the split is a pure function of its arguments.
        groups: (N,) int64, -1 alone: images of one group come together, where any class has two groups; groups are
            then counted, each for the class of its first image.

    Returns:
        Positions (N - M,) and (M,) int64, both ascending.

    Raises:
        UserError: no class has two images.
    """
    if groups is not None:
        first, member = grouped(groups)
        if len(np.unique(labels[first])) < len(first):
            inside = np.isin(member, holdout(labels[first], fraction, seed)[1])
            return np.flatnonzero(~inside), np.flatnonzero(inside)
    order = random_bits(seed, 0, np.arange(len(labels)), _STREAM_HOLDOUT, 1)[:, 0]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held[members[np.argsort(order[members], kind="stable")[:count]]] = True
    if not held.any():
        raise UserError(f"{len(labels)} labelled training images, at most one per class; two are needed to choose on")
    return np.flatnonzero(~held), np.flatnonzero(held)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64: row = label, column = prediction."""
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes * num_classes)
    return cells.reshape(num_classes, num_classes)


def classification_metrics(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, float]:
    """top1, balanced_accuracy and macro_f1 with 95 % percentile bootstrap intervals.

    As scikit-learn: balanced accuracy averages over the classes that occur among the labels, macro-F1 over those
    that occur among labels or predictions; so does every resample.

    Args:
        labels: (N,) int64 in [0, C).
        predictions: (N,) int64 in [0, C).
        num_classes: C.
        seed: of the resampling.
        resamples: of the bootstrap.
    """
    confusion = confusion_matrix(labels, predictions, num_classes)
    total = int(confusion.sum())
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    rng = np.random.default_rng(seed)
    drawn = [
        _scores(rng.multinomial(total, counts / total, size=size), rows, columns, num_classes)
        for size in blocks(resamples, len(counts))
    ]
    return with_intervals(_scores(counts[None], rows, columns, num_classes), drawn)


def blocks(resamples: int, width: int) -> Iterator[int]:
    """How many resamples to draw at once, `width` counts each, so that they take 32 MB at most."""
    block = max(1, min(resamples, _BLOCK_COUNTS // width))
    return (min(block, resamples - start) for start in range(0, resamples, block))


def with_intervals(
    values: Mapping[str, Iterable[float]], drawn: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Scores (1,) by name with `NAME_low` and `NAME_high`, the 95 % interval of their resamples, blocks of (R,)."""
    metrics: dict[str, float] = {}
    for name, (value,) in values.items():
        low, high = np.nanpercentile(np.concatenate([one[name] for one in drawn]), (2.5, 97.5))
        metrics |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return metrics


def _scores(counts_RK: np.ndarray, rows: np.ndarray, columns: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """(R,) scores of R confusion matrices, each given by its K cells that can be non-zero."""
    right_RC = _sum_by(counts_RK[:, rows == columns], rows[rows == columns], num_classes)
    label_RC = _sum_by(counts_RK, rows, num_classes)
    predicted_RC = _sum_by(counts_RK, columns, num_classes)
    recall_RC = right_RC / np.maximum(label_RC, 1)
    f1_RC = 2 * right_RC / np.maximum(label_RC + predicted_RC, 1)  # 2TP / (2TP + FP + FN)
    occurs_RC = label_RC + predicted_RC > 0
    return {
        "top1": right_RC.sum(1) / label_RC.sum(1),
        "balanced_accuracy": recall_RC.sum(1) / (label_RC > 0).sum(1),
        "macro_f1": f1_RC.sum(1) / occurs_RC.sum(1),
    }


def _sum_by(counts_RK: np.ndarray, group_K: np.ndarray, num_groups: int) -> np.ndarray:
    """(R, C): the K cells summed by their group."""
    sums = np.zeros((num_groups, len(counts_RK)), dtype=counts_RK.dtype)
    if len(group_K):
        order = np.argsort(group_K, kind="stable")
        present, first = np.unique(group_K[order], return_index=True)
        sums[present] = np.add.reduceat(counts_RK[:, order], first, axis=1).T
    return sums.T


def intervals(scores: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    """The mean of each score (Q,), `NAME`, with its 95 % bootstrap interval, `NAME_low` and `NAME_high`."""
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        value, low, high = mean_interval(values, seed=seed)
        metrics |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return metrics


def mean_interval(
    values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of per-sample values with its 95 % percentile bootstrap interval: (mean, low, high).

    Args:
        values: (N,), for instance 0/1 correctness; resampled by the counts of its distinct values.
        seed: of the resampling.
        resamples: of the bootstrap.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    means = [
        rng.multinomial(total, counts / total, size=size) @ distinct / total for size in blocks(resamples, len(counts))
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(counts @ distinct / total), float(low), float(high)


def draw_metrics(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, float]:
    """top1 and balanced_accuracy of A classifiers, each from a draw of its own, on the same N images.

    Means over the draws; 95 % intervals over both draws and images (`crossed_interval`); `top1_std` is the standard
    deviation over the draws, A - 1 in its denominator (0 for one draw).

    Args:
        labels: (N,) int64 in [0, C).
        predictions: (A, N) int64.
        num_classes: C.
        seed: of the resampling.
        resamples: of the bootstrap.
    """
    right = predictions == labels
    overall, by_class = _crossed(right, labels, num_classes, seed, resamples)
    counts = np.bincount(labels, minlength=num_classes)
    recalls = np.array([np.bincount(labels, one, num_classes) for one in right])[:, counts > 0] / counts[counts > 0]
    drawn = {"top1": overall, "balanced_accuracy": by_class}
    metrics = with_intervals({"top1": [right.mean()], "balanced_accuracy": [recalls.mean()]}, [drawn])
    return metrics | {"top1_std": float(right.mean(axis=1).std(ddof=1)) if len(right) > 1 else 0.0}


def crossed_interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean of values (A, N), A draws scored on the same N images, with its 95 % interval: (mean, low, high).

    Draws and images are resampled apart from each other (the pigeonhole bootstrap, Owen 2007, Annals of Applied
    Statistics 1(2)): resampling the A x N values as if they were independent would make the interval too narrow.
    """
    drawn, _ = _crossed(values, np.zeros(values.shape[1], dtype=np.int64), 1, seed, resamples)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def _crossed(
    values_AN: np.ndarray, group_N: np.ndarray, num_groups: int, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Resampled means (R,) over all images, and over the groups that occur, each alike.

    Images with the same group and the same values in all draws are one cell; counts of cells are drawn.
    """
    cells, counts = np.unique(np.vstack((group_N, values_AN)).T, axis=0, return_counts=True)
    groups, values_KA = cells[:, 0].astype(np.int64), cells[:, 1:].astype(np.float64)
    draws, total = len(values_AN), int(counts.sum())
    rng = np.random.default_rng(seed)
    overall, grouped = [], []
    for size in blocks(resamples, len(counts)):
        counts_RK = rng.multinomial(total, counts / total, size=size).astype(np.float64)
        shares_RA = rng.multinomial(draws, np.full(draws, 1 / draws), size=size) / draws
        sums_RG = _sum_by(counts_RK * (shares_RA @ values_KA.T), groups, num_groups)
        counts_RG = _sum_by(counts_RK, groups, num_groups)
        overall.append(sums_RG.sum(axis=1) / total)
        grouped.append((sums_RG / np.maximum(counts_RG, 1)).sum(axis=1) / (counts_RG > 0).sum(axis=1))
    return np.concatenate(overall), np.concatenate(grouped)


def paired_difference(
    labels: np.ndarray, predictions: np.ndarray, other: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Top-1 of `predictions` minus top-1 of `other` on the same images, with its paired 95 % bootstrap interval.

    Pairing removes what both find hard, so the interval is narrower than that of two separate scores.

    Args:
        labels: (N,) int64.
        predictions: (N,) int64, or (A, N) of A draws.
        other: of the same shape, of the features to compare with; draw a of both saw the same training images.
        seed: of the resampling.
        resamples: of the bootstrap.
    """
    difference = (predictions == labels).astype(np.int64) - (other == labels).astype(np.int64)
    if difference.ndim == 2:
        return crossed_interval(difference, seed=seed, resamples=resamples)
    return mean_interval(difference, seed=seed, resamples=resamples)
