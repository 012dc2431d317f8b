"""Exact search, by FAISS on the CPU and by torch elsewhere, blocked: a queries x gallery matrix is never held.

Only this file, index.py and signing.py import faiss. Vectors are L2-normalised copies, zero vectors stay zero.
Letters: Q queries, N gallery rows, D dimensions, K neighbours; of torch's tiles, B queries and T gallery rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import faiss
import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Metric: TypeAlias = Literal["ip", "l2"]

_BLOCK_BYTES = 64 * 2**20
_DEVICE_BYTES = 2**30  # of a tile of scores and all that is made of it
_SCORE_BYTES = 24  # of one score on the device: itself, its key, and what is needed between the two and by `topk`
_TILE = 2_048  # gallery rows that are on the device at once, at least
_EVEN = 256  # a tile's rows are a multiple of it
_ID_BITS = 31  # of a key; the other half is the nearness
_NORMALISED_ROWS = 4_096  # at once: they stay in the cache; 1,000,000 x 256 take 0.2 s where all at once take 2 s


def solver() -> str:
    """Where evaluation searches and solves: a GPU if there is one, but Apple's, which have no float64."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """The same numbers on a device; to a GPU through pinned memory, so that the host goes on while they travel."""
    import torch

    found = torch.from_numpy(array)
    return found.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else found.to(device)


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
    if str(device).partition(":")[0] != "cpu":
        nearness, ids = by_torch(gallery, queries, k, metric, device)
        return (nearness if metric == "ip" else -nearness), ids
    # one more than wanted: which of several equal scores FAISS keeps at the end of the list is its own affair
    more = min(k + 1, len(gallery))
    kind = faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2
    with _threads(threads):
        scores, ids = faiss.knn(queries, gallery, more, metric=kind)
    nearness = scores if metric == "ip" else -scores
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
    gallery: np.ndarray, queries: np.ndarray, k: int, metric: Metric, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """Nearness (Q, k), larger is nearer, and ids (Q, k) int64, best first; equal ones by the lower id.

    Nearness is the inner product, or minus the squared distance, in full float32 whatever precision products were
    allowed before; that is restored. The gallery goes to the device tile by tile, so it may be larger than its memory.
    FAISS finds the same ids but for neighbours whose scores differ by rounding alone. A query meets tiles of one even
    shape only, so that one kernel makes all its scores without an edge: equal rows of the gallery then score equally to
    the bit, and come by their ids. (FAISS's own scores of equal rows differ in the last bit by where they lie.)

    Args:
        gallery: (N, D) float32, N below 2^31.
        queries: (Q, D) float32.
        k: at most N.
        metric: as for `search`.
        device: any that torch knows, the CPU too.
    """
    import torch
    import torch.nn.functional as F

    from ssl_kit.core.machine import full_float32

    count = len(gallery)
    assert k <= count < 2**_ID_BITS, (k, count)
    size = -(-min(count, max(_TILE, 4 * k)) // _EVEN) * _EVEN  # what is kept of a tile is a small part of it
    found = [torch.empty(0, k, dtype=torch.int64)]
    with full_float32():
        for start, block in blocks(len(queries), _SCORE_BYTES * size, _DEVICE_BYTES):
            asked = to_device(queries[start : start + block], device)
            best = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
            for first in range(0, count, size):
                known = to_device(gallery[first : first + size], device)
                whole = F.pad(known, (0, 0, 0, size - len(known)))  # the last one too
                near = _nearness(asked, whole, metric)[:, : len(known)]
                made = _keys(near, first).topk(min(k, len(known)), dim=1).values
                best = torch.cat((best, made), dim=1)
                best = best.topk(min(k, best.shape[1]), dim=1).values
            found.append(best.cpu())
    return _read(torch.cat(found))


def _nearness(asked_BD: Tensor, known_TD: Tensor, metric: Metric) -> Tensor:
    """(B, T)."""
    near_BT = asked_BD @ known_TD.T
    if metric == "ip":
        return near_BT
    lengths = asked_BD.square().sum(dim=1, keepdim=True) + known_TD.square().sum(dim=1)
    return near_BT.mul_(2).sub_(lengths).clamp_max_(0)


def _keys(near: Tensor, first: int) -> Tensor:
    """(B, T) int64 in the order of nearness, of equal ones the lower id above: no two are equal, so `topk` is exact.

    Bits of a float read as an integer have the order of the floats, but for the sign; -0 becomes 0 before. `near` is
    overwritten.
    """
    import torch

    bits = near.add_(0.0).view(torch.int32)
    bits ^= (bits >> 31) & (2**31 - 1)
    ids = torch.arange(first, first + near.shape[1], device=near.device)
    return bits.long().bitwise_left_shift_(_ID_BITS + 1).add_(2**_ID_BITS - 1 - ids)


def _read(keys: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Nearness float32 and ids int64 of keys, in their shape."""
    import torch

    bits = (keys >> (_ID_BITS + 1)).int()
    bits ^= (bits >> 31) & (2**31 - 1)
    return bits.view(torch.float32).numpy(), (2**_ID_BITS - 1 - (keys & (2 ** (_ID_BITS + 1) - 1))).numpy()


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
