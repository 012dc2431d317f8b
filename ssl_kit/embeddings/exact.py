"""Exact search, by FAISS on the CPU and by torch elsewhere, blocked: a queries x gallery matrix is never held.

Only this file, index.py and signing.py import faiss. Vectors are L2-normalised copies, zero vectors stay zero.
Letters: Q queries, N gallery rows, D dimensions, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import numpy as np
import torch  # before faiss, always: two OpenMP runtimes, and this order is the one that works

import faiss  # isort: skip

Metric: TypeAlias = Literal["ip", "l2"]

_BLOCK_BYTES = 64 * 2**20
_DEVICE_BLOCK_BYTES = 2**30
_NORMALISED_ROWS = 4_096  # at once: they stay in the cache; 1,000,000 x 256 take 0.2 s where all at once take 2 s


def normalised(vectors: np.ndarray) -> np.ndarray:
    """(N, D) float32 rows of length 1; rows of zeros stay zero."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    made = np.empty_like(vectors)
    for start in range(0, len(vectors), _NORMALISED_ROWS):
        rows = vectors[start : start + _NORMALISED_ROWS]
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        np.divide(rows, np.where(lengths > 0, lengths, 1), out=made[start : start + _NORMALISED_ROWS])
    return made


def search(
    gallery: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    metric: Metric = "ip",
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery rows of every query, exactly, best first; equal scores are ordered by the lower id.

    Args:
        gallery: (N, D), float32 for no copy.
        queries: (Q, D).
        k: neighbours wanted, at least 1; at most N are returned.
        metric: "ip" inner product (larger is nearer) or "l2" squared distance (smaller is nearer).
        threads: default: all that OpenMP offers.
        device: that searches; scores of another than the CPU differ by rounding.

    Returns:
        Scores (Q, K) float32 and ids (Q, K) int64, K = min(k, N).
    """
    gallery = np.ascontiguousarray(gallery, dtype=np.float32)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    assert k >= 1 and len(gallery) and gallery.shape[1] == queries.shape[1], (k, gallery.shape, queries.shape)
    k = min(k, len(gallery))
    # one more than wanted: which of several equal scores FAISS keeps at the end of the list is its own affair
    more = min(k + 1, len(gallery))
    searched = torch.device(device)
    if searched.type == "cpu":
        kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
        with _threads(threads):
            scores, ids = faiss.knn(queries, gallery, more, metric=kind)
        nearness = scores if metric == "ip" else -scores
    else:
        nearness, ids = by_torch(gallery, queries, more, metric, searched)
    order = np.lexsort((ids, -nearness), axis=1)
    nearness, ids = np.take_along_axis(nearness, order, 1), np.take_along_axis(ids, order, 1)
    if more > k:
        cut = np.flatnonzero(nearness[:, k - 1] == nearness[:, k])
        for start, block in blocks(len(cut), 4 * len(gallery)):
            rows = cut[start : start + block]
            nearness[rows, :k], ids[rows, :k] = _lowest_ids(gallery, queries[rows], k, metric)
    nearness, ids = nearness[:, :k], ids[:, :k]
    return (nearness if metric == "ip" else -nearness), ids


def by_torch(
    gallery: np.ndarray, queries: np.ndarray, k: int, metric: Metric, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Nearness (Q, k), larger is nearer, and ids (Q, k), in blocks on a device; which of equal ones is its own affair.

    Nearness is the inner product, or minus the squared distance.
    """
    known = torch.from_numpy(gallery).to(device)
    squares = known.square().sum(dim=1)
    found = []
    for start, block in blocks(len(queries), 4 * len(gallery), _DEVICE_BLOCK_BYTES):
        asked = torch.from_numpy(queries[start : start + block]).to(device)
        near = asked @ known.T
        if metric == "l2":
            near = -(squares + asked.square().sum(dim=1, keepdim=True) - 2 * near).clamp_min(0)
        found.append(near.topk(k, dim=1))
    parts = [torch.cat(one).cpu().numpy() for one in zip(*found, strict=True)] if found else []
    return (parts[0], parts[1]) if found else (np.empty((0, k), np.float32), np.empty((0, k), np.int64))


def _lowest_ids(gallery: np.ndarray, queries: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The same search by brute force for the few queries whose k-th and next score are equal: (B, k), (B, k)."""
    scores_BN = queries @ gallery.T
    if metric == "l2":
        squares = np.einsum("nd,nd->n", gallery, gallery) + np.einsum("nd,nd->n", queries, queries)[:, None]
        scores_BN = -np.maximum(squares - 2 * scores_BN, 0)
    nearness = np.empty((len(queries), k), dtype=np.float32)
    ids = np.empty((len(queries), k), dtype=np.int64)
    for row, scores in enumerate(scores_BN):
        last = np.partition(scores, -k)[-k]
        above = np.flatnonzero(scores > last)
        chosen = np.concatenate((above, np.flatnonzero(scores == last)[: k - len(above)]))
        chosen = chosen[np.lexsort((chosen, -scores[chosen]))]
        nearness[row], ids[row] = scores[chosen], chosen
    return nearness, ids


def without(ids: np.ndarray, own: np.ndarray) -> np.ndarray:
    """ids (Q, K) without each query's own row (Q,), (Q, K - 1), in their order."""
    others = ids != own[:, None]
    others[others.all(axis=1), -1] = False  # so many equal rows that its own is not among the nearest
    return ids[others].reshape(len(ids), -1)


def blocks(count: int, bytes_per_row: int, most: int = _BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """(start, rows) of blocks that keep `bytes_per_row` times the rows below `most` bytes."""
    block = max(1, most // bytes_per_row)
    for start in range(0, count, block):
        yield start, block


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
