"""FAISS indexes whose recall is measured: chosen by size and memory, trained, filled, tuned, searched.

Vectors are searched by their cosine: L2-normalised copies, inner product. They come in blocks, so that an index of more
vectors than fit into memory can be built. Letters: Q queries, N vectors, D dimensions, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import faiss
import numpy as np

from ssl_kit.core.console import say
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.random import permutation
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.embeddings.signing import can_be_stacked

if TYPE_CHECKING:
    from ssl_kit.embeddings.filling import Filling

_EXACT_BYTES = 250e6  # read by one exact query; 5 GB/s from memory make that 50 ms
_SHARE = 0.5  # of the available memory that an index may take
_QUERIES = 1_000  # half of them tune nprobe, half measure the recall
_PER_LIST = 64  # training vectors for each list; FAISS asks for at least 39
_TRAINING = 65_536  # training vectors, at least
_MARGIN = 0.2  # of what is missing to 1, aimed at above the wanted recall: 500 tuning queries may flatter by 0.01
_PAIRS = 10**10  # of a query and a vector that a CPU compares: a minute or two; every image with 100,000
_LISTED = 0.95  # of the 10 nearest that are found in lists beyond, as in `ssl-kit index`; 0.99 takes four times as long
_K_FACTORS = (64, 32, 16, 8, 4)  # candidates per result that the codes may pass on to the exact refinement
_STREAM_QUERIES = 100_006  # of core/random.py
Found: TypeAlias = tuple[np.ndarray, np.ndarray]  # scores float32 and rows int64, (Q, K) each, best first

SEARCHED_ROWS = 16_384  # of a gallery at once, and always the same ones: BLAS rounds by the shape of a product


@dataclass(frozen=True)
class Gallery:
    """N vectors of D dimensions that need not be in memory together.

    `blocks()` goes through them in order, (rows, D) float32 each, as often as it is called. In the place of an index a
    gallery holds unit vectors.
    """

    count: int
    dim: int
    blocks: Callable[[], Iterable[np.ndarray]]


@dataclass
class Built:
    """An index of normalised vectors by inner product, and what was measured on it.

    Attributes:
        index: a FAISS index; row i of it is row i of the vectors.
        key: of FAISS's index factory.
        recall: fraction in [0, 1] of the exact 10 nearest rows that the index finds, on queries that neither trained
            nor tuned it; a query is not its own neighbour.
        nprobe: lists visited per query; None for an exact index.
        ms_per_query: wall time of single queries, milliseconds.
        zero: rows (Z,) without a direction, all zeros: their cosine to anything is 0.
    """

    index: faiss.Index
    key: str
    recall: float
    nprobe: int | None
    ms_per_query: float
    zero: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def default_key(count: int, dim: int, memory: float = float("inf"), mapped: bool = False) -> str:
    """The FAISS key for `count` vectors of `dim`: exact while one query takes under 50 ms, lists beyond.

    Lists hold 4-bit product codes of two dimensions each, scanned by fast-scan and refined by float16 vectors, where
    `dim` is even and half of the memory holds them; otherwise 8-bit scalar codes, which can be mapped into memory; byte
    product codes of two dimensions each where those do not fit either. What 4-bit codes hold is the rotated difference
    to the centre of the list: features vary along few directions around a large mean, and codes of the features
    themselves find one neighbour of eight (docs/decisions.md).

    Args:
        count: N.
        dim: D.
        memory: bytes that can be had.
        mapped: the index will be used from disk: fast-scan lists and refinement would be read into memory.
    """
    if 4 * count * dim <= _EXACT_BYTES and not mapped:
        return "Flat"
    fits = lambda bytes_per_vector: count * (bytes_per_vector + 8) <= _SHARE * memory  # 8: of the id
    if dim % 2 == 0 and not mapped and fits(2.25 * dim):
        return fast_key(count, dim)
    return lists_key(count, f"PQ{dim // 2}" if dim % 2 == 0 and not fits(dim) else "SQ8")


def fast_key(count: int, dim: int) -> str:
    """Fast-scan lists with a refinement; see `default_key`."""
    return f"RR{dim},{lists_key(count, f'PQ{dim // 2}x4fsr,Refine(SQfp16)')}"


def lists_key(count: int, codes: str) -> str:
    """The key of inverted lists for `count` vectors: about four times the square root, a power of two."""
    return f"IVF{2 ** round(np.log2(4 * np.sqrt(count)))},{codes}"


def build_index(
    vectors: np.ndarray | Gallery,
    key: str = "auto",
    recall: float = 0.95,
    seed: int = 0,
    *,
    memory: float = float("inf"),
    mapped: bool = False,
    filling: Filling | None = None,
) -> Built:
    """Trains and fills an index and measures its recall against exact search.

    Args:
        vectors: (N, D) or a gallery; the cosine is what is searched by.
        key: of FAISS's index factory, or "auto" for `default_key`.
        recall: wanted recall@10 in [0, 1]; more lists are visited until held-out queries reach it.
        seed: which rows are queries.
        memory: bytes that the index may count on; for "auto".
        mapped: the index will be used from disk; for "auto".
        filling: other processes that add the vectors; None = this one does.

    Raises:
        UserError: FAISS does not know the key, or it does not fit the vectors, or several processes; a vector is NaN or
            infinite.
    """
    given = vectors if isinstance(vectors, Gallery) else Gallery(len(vectors), vectors.shape[1], lambda: [vectors])
    gallery = Gallery(given.count, given.dim, lambda: _finite(given.blocks()))
    key = default_key(gallery.count, gallery.dim, memory, mapped) if key == "auto" else key
    try:
        index = faiss.index_factory(gallery.dim, key, faiss.METRIC_INNER_PRODUCT)
        if filling is not None and not can_be_stacked(index):
            raise UserError(f"--key {key}: several processes make lists of plain codes, such as IVF4096,SQ8")
        queries, query_vectors = _train(index, gallery, seed, np.empty if filling is None else filling.room)
        (_, exact), zero = filling.fill(index, query_vectors) if filling else fill(index, gallery, query_vectors)
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        what = f"{gallery.count:,} vectors of {gallery.dim}"
        raise UserError(f"--key {key} does not work for {what}: {line}; try --key auto") from error
    tuning, measuring = np.array_split(np.arange(len(queries)), 2)
    measured = lambda part: _recall(index, query_vectors[part], queries[part], exact[part])
    lists = faiss.try_extract_index_ivf(index)
    _tune(index, lists, lambda: measured(tuning), recall + _MARGIN * (1 - recall))
    milliseconds = _milliseconds(index, query_vectors[measuring])
    return Built(index, key, measured(measuring), lists.nprobe if lists is not None else None, milliseconds, zero)


def _tune(index: faiss.Index, lists: faiss.IndexIVF | None, measured: Callable[[], float], aim: float) -> None:
    """Sets the fewest lists to visit, then the fewest candidates to refine, that reach a recall.

    Where nothing reaches it: what comes nearest. More lists may do harm then, when the codes cannot tell more
    candidates apart.
    """
    refined = index if isinstance(index, faiss.IndexRefine) else None
    if refined is not None:
        refined.k_factor = _K_FACTORS[0]
    if lists is not None:
        found: dict[int, float] = {}
        for count in _growing(lists.nlist):
            lists.nprobe = count
            found[count] = measured()
            if found[count] >= aim:
                break
            lists.nprobe = max(found, key=lambda count: found[count])
    if refined is not None and measured() >= aim:
        for factor in _K_FACTORS[1:]:
            refined.k_factor, kept = factor, refined.k_factor
            if measured() < aim:
                refined.k_factor = kept
                break


def _growing(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    return sorted({1, *(min(most, step << power) for power in range(most.bit_length()) for step in (2, 3))})


def _finite(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks; raises `UserError` at the first with a vector that is NaN or infinite."""
    start = 0
    for block in blocks:
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            rows = ", ".join(f"{start + row:,}" for row in bad[:5])
            raise UserError(f"{len(bad):,} vectors are NaN or infinite, rows {rows}; embed those images again")
        yield block
        start += len(block)


def _train(
    index: faiss.Index, gallery: Gallery, seed: int, room: Callable[[tuple[int, int], type], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Trains an index on vectors that lie in `room`, and are no queries; the rows (Q,) and vectors (Q, D) of these."""
    order = permutation(seed, 0, gallery.count, _STREAM_QUERIES)
    queries = np.sort(order[: min(_QUERIES, max(2, gallery.count // 10))])
    lists = faiss.try_extract_index_ivf(index)
    wanted = 0 if index.is_trained else max(_TRAINING, _PER_LIST * (lists.nlist if lists is not None else 1))
    others = order[len(queries) :] if gallery.count > _QUERIES else order  # few vectors train together with the queries
    training = np.sort(others[:wanted])
    query_vectors = _gather(gallery, queries, np.empty)
    if wanted:
        index.train(_gather(gallery, training, room))
    shuffled = permutation(seed, 1, len(queries), _STREAM_QUERIES)
    return queries[shuffled], query_vectors[shuffled]


def _gather(gallery: Gallery, rows: np.ndarray, room: Callable[[tuple[int, int], type], np.ndarray]) -> np.ndarray:
    """(len(rows), D) normalised vectors at ascending `rows`."""
    picked, start = room((len(rows), gallery.dim), np.float32), 0
    for block in gallery.blocks() if len(rows) else ():
        low, high = np.searchsorted(rows, (start, start + len(block)))
        picked[low:high] = normalised(block[rows[low:high] - start])
        start += len(block)
    return picked


def fill(index: faiss.Index, gallery: Gallery, query_vectors: np.ndarray, start: int = 0) -> tuple[Found, np.ndarray]:
    """Adds all vectors; from the same pass the exact nearest rows of each query, itself among them.

    Args:
        index: trained, empty.
        gallery: what is added.
        query_vectors: (Q, D), normalised.
        start: row of the gallery's first vector.

    Returns:
        The nearest, K = 11 where there are as many, and the rows (Z,) of vectors that are zero.
    """
    zero, row = [np.empty(0, dtype=np.int64)], start
    nearest = none(len(query_vectors))
    for block in _even(gallery.blocks()):
        vectors = normalised(block)
        if start:
            index.add_with_ids(vectors, np.arange(row, row + len(block)))
        else:
            index.add(vectors)
        zero.append(row + np.flatnonzero(~vectors.any(axis=1)))
        nearest = nearest_of(nearest, search(vectors, query_vectors, 11), row, 11)
        row += len(block)
    assert index.ntotal == gallery.count == row - start, "blocks are the gallery"
    return nearest, np.concatenate(zero)


def none(queries: int) -> Found:
    """Scores and rows of no neighbours."""
    return np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)


def nearest_of(found: Found, more: Found, start: int, k: int) -> Found:
    """The k best of two results, scores and rows (Q, K) each, by score and then by row; `more` counts from `start`."""
    scores = np.concatenate((found[0], more[0]), axis=1)
    rows = np.concatenate((found[1], more[1] + start), axis=1)
    best = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)


def _others(ids: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
    """Per query its 10 nearest rows without itself."""
    return [row[row != query][:10] for row, query in zip(ids, queries, strict=True)]


def _recall(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> float:
    found = _others(_found(index, vectors, min(11, index.ntotal))[1], queries)
    truths = _others(exact, queries)
    hits = [len(np.intersect1d(one, truth)) for one, truth in zip(found, truths, strict=True)]
    return sum(hits) / max(1, sum(len(truth) for truth in truths))


def _milliseconds(index: faiss.Index, vectors: np.ndarray) -> float:
    """Wall time of one query, mean of 50."""
    few = vectors[:50]
    started = time.perf_counter()
    for query in few:
        _found(index, query[None], min(10, index.ntotal))
    return 1_000 * (time.perf_counter() - started) / len(few)


def search_index(index: faiss.Index | Gallery, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (Q, K) float32 and rows (Q, K) int64 of the nearest vectors, best first, K = min(k, vectors).

    A row of -1, with a cosine of -inf or nearly, means that the visited lists held fewer than k vectors. A gallery of
    unit vectors answers as an exact index of them does, to the bit; equal cosines come by the lower row.

    Raises:
        UserError: queries of another dimension, NaN, infinite, or zero, which have no direction.
        DamagedError: FAISS finds that the index makes no sense.
    """
    count, dim = (index.count, index.dim) if isinstance(index, Gallery) else (index.ntotal, index.d)
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise UserError(f"queries of shape {queries.shape}; wanted (queries, {dim}), features of the same encoder")
    finite = np.isfinite(queries).all(axis=1)
    directions = normalised(np.where(finite[:, None], queries, 0))
    wrong = np.flatnonzero(~directions.any(axis=1))
    if len(wrong):
        which = ", ".join(map(str, wrong[:5]))
        raise UserError(f"{len(wrong)} of {len(queries)} queries are NaN, infinite or zero: number {which}, from 0")
    k = min(k, count)
    if k == 0 or not len(queries):
        return none(len(queries))
    try:
        return _found(index, directions, k)
    except (RuntimeError, MemoryError) as error:  # what FAISS checks no sooner
        raise DamagedError(f"the index cannot be searched: {str(error).strip().splitlines()[-1]}") from error


def _found(index: faiss.Index | Gallery, directions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows (Q, k) of directions (Q, D), k at most the number of vectors."""
    if isinstance(index, faiss.IndexFlat):
        index = _gallery_of(index)
    return _exactly(index, directions, k) if isinstance(index, Gallery) else index.search(directions, k)


Finder: TypeAlias = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def finder(gallery: np.ndarray, asked: int, device: str = "cpu") -> tuple[Finder, float]:
    """What finds neighbours of many queries, and the fraction of the 10 nearest that it finds; the others are near too.

    Up to 10^10 pairs of a query and a vector on a CPU, and always on another device, it is `exact.search`. Of more the
    time would grow with their product: then those of a few lists are compared, which hold 95 % of the 10 nearest.

    Args:
        gallery: (N, D) unit vectors.
        asked: queries in all.
        device: that compares.

    Returns:
        A function of unit vectors (Q, D) and K, which gives cosines and rows (Q, K) as `exact.search` does; a row of
        -1, with the cosine -1, where the lists held fewer.
    """
    if device != "cpu" or len(gallery) * asked <= _PAIRS:
        return lambda queries, k: search(gallery, queries, k, device=device), 1.0
    built = build_index(gallery, lists_key(len(gallery), "Flat"), _LISTED)
    say(f"neighbours: {built.recall:.1%} of the nearest are found, by {built.key}: comparing all takes far longer")

    def find(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosines, rows = built.index.search(queries, min(k, len(gallery)))
        return np.where(rows < 0, np.float32(-1), cosines), rows

    return find, built.recall


def _gallery_of(index: faiss.IndexFlat) -> Gallery:
    """The vectors of an exact index, where they lie."""
    # the gallery keeps the index alive, whose memory this is
    vectors = lambda: faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return Gallery(index.ntotal, index.d, lambda: [vectors()])


def _exactly(gallery: Gallery, directions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows (Q, k) of the nearest unit vectors of a gallery, however it is cut into blocks."""
    nearest, start = none(len(directions)), 0
    for block in _even(gallery.blocks()):
        nearest = nearest_of(nearest, search(block, directions, k), start, k)
        start += len(block)
    return nearest


def _even(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows in blocks of `SEARCHED_ROWS`, the last one smaller."""
    held = np.empty((0, 0), np.float32)
    for block in blocks:
        held = np.concatenate((held, block)) if len(held) else block
        while len(held) >= SEARCHED_ROWS:
            yield held[:SEARCHED_ROWS]
            held = held[SEARCHED_ROWS:]
    if len(held):
        yield held
