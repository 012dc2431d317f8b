"""Scores by nearest neighbours. Similarity is the cosine throughout: vectors are L2-normalised copies.

Letters: Q queries, N gallery rows, D dimensions, K neighbours, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
import torch

from ssl_kit.embeddings.exact import blocks, normalised, search
from ssl_kit.evaluation.result import Result, classification_metrics, holdout, labelled_groups, labelled_parts, made_by

if TYPE_CHECKING:
    from ssl_kit.embeddings.embeddings import Embeddings

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.1, 0.2, 0.5, 1.0, None)  # None: unweighted
MOST_HELD_OUT = 10_000  # queries on which k is chosen, at most: a fifth of a million would take minutes for 0.1 point
CUSTOMARY = ((20, 0.07), (200, 0.1))  # (k, temperature) of DINO / DINOv2 and of InstDisc / lightly


def vote(
    cosines: np.ndarray, labels: np.ndarray, num_classes: int, ks: Sequence[int], temperature: float | None
) -> np.ndarray:
    """The class with the largest sum of exp(cos / T) over the k nearest neighbours; equal sums: the lowest class.

    Wu et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4; weights are taken relative to the nearest
    neighbour, which changes no vote and cannot overflow.

    Args:
        cosines: (Q, K), best first.
        labels: (Q, K) int64 in [0, C) of the neighbours.
        num_classes: C.
        ks: ascending, each at most K.
        temperature: T; None counts every neighbour alike.

    Returns:
        (len(ks), Q) int64.
    """
    predictions = np.empty((len(ks), len(cosines)), dtype=np.int64)
    for start, block in blocks(len(cosines), 8 * num_classes):
        rows = slice(start, start + block)
        near, classes = cosines[rows].astype(np.float64), labels[rows]
        weights = np.ones_like(near) if temperature is None else np.exp((near - near[:, :1]) / temperature)
        cells = np.arange(len(near))[:, None] * num_classes + classes
        votes = np.zeros(len(near) * num_classes)
        done = 0
        for position, k in enumerate(ks):
            step = slice(done, k)  # only the neighbours that the larger k adds
            votes += np.bincount(cells[:, step].ravel(), weights[:, step].ravel(), minlength=len(votes))
            predictions[position, rows] = votes.reshape(len(near), num_classes).argmax(axis=1)
            done = k
    return predictions


def knn_predict(
    train_vectors: np.ndarray,
    train_labels: np.ndarray,
    test_vectors: np.ndarray,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """(Q,) int64: the weighted vote of the k nearest training vectors by cosine; see `vote`.

    Args:
        train_vectors: (N, D).
        train_labels: (N,) int64, all known.
        test_vectors: (Q, D).
        k: neighbours; at most N vote.
        temperature: T; None counts every neighbour alike.
        num_classes: default: the largest training label + 1.
        device: that searches, here and below.
    """
    num_classes = num_classes or int(train_labels.max()) + 1
    cosines, ids = search(normalised(train_vectors), normalised(test_vectors), k, device=device)
    return vote(cosines, train_labels[ids], num_classes, [cosines.shape[1]], temperature)[0]


def knn_accuracy(
    train_vectors: np.ndarray,
    train_labels: np.ndarray,
    test_vectors: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 of `knn_predict` as a fraction, for the monitor during training: no choice, no interval."""
    predictions = knn_predict(train_vectors, train_labels, test_vectors, k=k, temperature=temperature, device=device)
    return float((predictions == test_labels).mean())


def knn(
    train: Embeddings,
    test: Embeddings,
    *,
    k: int | None = None,
    temperature: float | None = 0.07,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> Result:
    """Top-1, balanced accuracy and macro-F1 of a cosine kNN vote, with 95 % intervals.

    Args:
        train: the gallery; rows without a label are left out.
        test: the queries, read once; rows without a label are left out.
        k: neighbours; None chooses k among `KS` and the temperature among `TEMPERATURES` on a held-out fifth of train.
        temperature: T of exp(cos / T); None counts every neighbour alike. Not used when k is None.
        seed: of the held-out split and the bootstrap.
        features: what the vectors are, for the record.
        device: that searches.
    """
    return knn_rows(train, test, [(k, temperature)], seed=seed, features=features, device=device)[0]


def knn_rows(
    train: Embeddings,
    test: Embeddings,
    rows: Sequence[tuple[int | None, float | None]] = ((None, None), *CUSTOMARY),
    *,
    seed: int = 0,
    features: str = "encoder",
    device: torch.device | str = "cpu",
) -> list[Result]:
    """Several kNN scores from one search of the test set; `rows` are (k, temperature) as in `knn`."""
    started = time.perf_counter()
    vectors, gallery_labels, queries, query_labels, num_classes = labelled_parts(train, test)
    gallery = normalised(vectors)
    settle = partial(_settled, gallery, gallery_labels, labelled_groups(train), num_classes, seed=seed, device=device)
    settings = [settle(k, temperature) for k, temperature in rows]
    cosines, ids = search(gallery, normalised(queries), max(entry["k"] for entry in settings), device=device)
    seconds = (time.perf_counter() - started) / len(rows)
    counts = {"num_train": len(gallery), "num_test": len(queries), "dim": gallery.shape[1], "seed": seed}
    results = []
    for entry in settings:
        predictions = vote(cosines, gallery_labels[ids], num_classes, [entry["k"]], entry["temperature"])[0]
        metrics = classification_metrics(query_labels, predictions, num_classes, seed=seed)
        record = Result("knn", features, metrics, {**entry, **counts}, made_by(train, test), seconds, predictions)
        results.append(record)
    return results


class _Row(TypedDict):
    """How one score is made."""

    k: int
    temperature: float | None
    chosen: bool
    held_out_top1: NotRequired[float]


def _settled(
    gallery: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    num_classes: int,
    k: int | None,
    temperature: float | None,
    *,
    seed: int,
    device: torch.device | str,
) -> _Row:
    """The k and temperature of one row, chosen here when k is None, and how they came about."""
    if k is not None:
        return {"k": min(k, len(gallery)), "temperature": temperature, "chosen": False}
    k, temperature, accuracy = choose_k(gallery, labels, num_classes, seed=seed, groups=groups, device=device)
    return {"k": k, "temperature": temperature, "chosen": True, "held_out_top1": accuracy}


def choose_k(
    gallery: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    groups: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> tuple[int, float | None, float]:
    """k among `KS` and temperature among `TEMPERATURES` with the best top-1 on a held-out fifth of the training set.

    Of more than 50,000 training images 10,000 are held out. Equal scores: the smallest k, then the first temperature.

    Args:
        gallery: (N, D) normalised training vectors.
        labels: (N,) int64.
        num_classes: C.
        seed: of the split.
        groups: that it keeps together, see `holdout`.
        device: that searches; the votes, 3 % of the time on a CPU with 10 classes and 10 % with 1,000, are the host's.

    Returns:
        k, temperature, top-1 on the held-out part.
    """
    fitted, held = holdout(labels, min(0.2, MOST_HELD_OUT / len(labels)), seed, groups)
    ks = sorted({min(k, len(fitted)) for k in KS})
    cosines, ids = search(gallery[fitted], gallery[held], ks[-1], device=device)
    neighbour_labels = labels[fitted][ids]
    accuracy_TK = np.array(
        [
            (vote(cosines, neighbour_labels, num_classes, ks, temperature) == labels[held]).mean(axis=1)
            for temperature in TEMPERATURES
        ]
    )
    best_k, best_t = np.unravel_index(accuracy_TK.T.argmax(), accuracy_TK.T.shape)
    return ks[best_k], TEMPERATURES[best_t], float(accuracy_TK[best_t, best_k])
