"""Exact search against brute force: FAISS on the CPU, and what other devices do."""

import numpy as np
import pytest
import torch

from ssl_kit.embeddings import exact
from ssl_kit.embeddings.exact import by_torch, normalised, search

CPU = torch.device("cpu")


def tiled(gallery, queries, k, metric="ip"):
    """`search` by the way of other devices, on this one."""
    nearness, ids = by_torch(gallery, queries, min(k, len(gallery)), metric, CPU)
    return (nearness if metric == "ip" else -nearness), ids


@pytest.fixture(params=[16, 10_000], ids=["tiles", "one tile"])
def tile(request, monkeypatch):
    """Small tiles of both sides: the last one is filled up, and lists are longer than a tile."""
    monkeypatch.setattr(exact, "_TILE", request.param)
    monkeypatch.setattr(exact, "_EVEN", 16)
    monkeypatch.setattr(exact, "_DEVICE_BYTES", exact._SCORE_BYTES * request.param * 7)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 3, 120, 500])  # FAISS keeps its lists differently from k = 100 on; 300 rows are there
@pytest.mark.parametrize("engine", [search, tiled])
def test_search_is_exact_and_equal_scores_come_by_the_lowest_id(metric, k, engine, tile):
    rng = np.random.default_rng(0)
    gallery = rng.integers(-1, 2, (300, 4)).astype(np.float32)  # 81 distinct rows: nearly every list ends in a tie
    queries = rng.integers(-1, 2, (40, 4)).astype(np.float32)  # of zeros too: to them all rows score 0, some of them -0
    scored = queries @ gallery.T if metric == "ip" else ((queries[:, None] - gallery[None]) ** 2).sum(-1)
    wanted = np.argsort(-scored if metric == "ip" else scored, axis=1, kind="stable")[:, :k]
    scores, ids = engine(gallery, queries, k, metric=metric)
    assert scores.dtype == np.float32 and ids.dtype == np.int64
    assert np.array_equal(ids, wanted)
    assert np.array_equal(scores, np.take_along_axis(scored, wanted, 1))


def test_inner_product_of_normalised_vectors_orders_as_distance():
    rng = np.random.default_rng(1)
    vectors, queries = (normalised(rng.standard_normal((count, 16))) for count in (500, 50))
    assert np.array_equal(search(vectors, queries, 10)[1], search(vectors, queries, 10, metric="l2")[1])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_other_devices_find_what_faiss_finds(metric, tile):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((count, 24)).astype(np.float32) for count in (3_000, 70))
    wanted = search(vectors, queries, 12, metric=metric)
    scores, ids = tiled(vectors, queries, 12, metric)
    assert np.array_equal(ids, wanted[1]) and np.allclose(scores, wanted[0], rtol=1e-4, atol=1e-5)
    assert (
        tiled(vectors, queries[:0], 12, metric)[0].shape == tiled(vectors, queries[:0], 12, metric)[1].shape == (0, 12)
    )


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_near_ties_differ_from_faiss_by_rounding_only(metric, tile):
    """Rows of a cluster that is narrower than float32 resolves: ids may differ, never by more than the rounding."""
    rng = np.random.default_rng(2)
    vectors = normalised(rng.standard_normal((40, 64)))[rng.integers(0, 40, 900)]
    vectors = vectors + np.float32(2e-7) * rng.standard_normal(vectors.shape, dtype=np.float32)
    queries = normalised(rng.standard_normal((50, 64)))
    true = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    true = true if metric == "ip" else -((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(-1)
    ids, wanted = tiled(vectors, queries, 30, metric)[1], search(vectors, queries, 30, metric=metric)[1]
    assert all(len(set(row)) == 30 for row in ids.tolist())
    assert np.abs(np.take_along_axis(true, ids, 1) - np.take_along_axis(true, wanted, 1)).max() < 1e-6


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_copies_score_equally_to_the_bit_wherever_they_lie(metric, tile):
    rng = np.random.default_rng(3)
    copied = rng.standard_normal((9, 100), dtype=np.float32)
    copied[4] = 0
    of = rng.integers(0, 9, 777)
    queries = rng.standard_normal((33, 100), dtype=np.float32)
    scores, ids = tiled(copied[of], queries, 400, metric)  # more copies than a tile has rows
    for row, found in zip(scores, ids, strict=True):
        starts = np.flatnonzero(np.diff(of[found], prepend=-1))
        assert len(starts) == len(np.unique(of[found]))  # the copies of one row follow each other
        for run, equal in zip(np.split(found, starts[1:]), np.split(row, starts[1:]), strict=True):
            assert len(np.unique(equal)) == 1 and np.array_equal(run, np.flatnonzero(of == of[run[0]])[: len(run)])


def test_a_gallery_goes_through_the_device_in_tiles(monkeypatch):
    """What lies on the device at once is bounded, whatever the gallery has."""
    monkeypatch.setattr(exact, "_TILE", 64)
    monkeypatch.setattr(exact, "_EVEN", 64)
    monkeypatch.setattr(exact, "_DEVICE_BYTES", 24 * 64 * 10)
    made, keys = [], exact._keys
    monkeypatch.setattr(exact, "_keys", lambda near, first: made.append(near.shape) or keys(near, first))
    rng = np.random.default_rng(4)
    tiled(rng.standard_normal((1_000, 8), dtype=np.float32), rng.standard_normal((25, 8), dtype=np.float32), 5)
    assert len(made) == 3 * 16 and max(rows * columns for rows, columns in made) <= 640
    assert sum(rows * columns for rows, columns in made) == 25 * 1_000


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_have_all_bits_and_the_setting_comes_back(before, monkeypatch):
    seen, nearness = [], exact._nearness

    def watched(*given):
        seen.append(torch.get_float32_matmul_precision())
        return nearness(*given)

    monkeypatch.setattr(exact, "_nearness", watched)
    vectors = np.random.default_rng(5).standard_normal((200, 300), dtype=np.float32)
    torch.set_float32_matmul_precision(before)
    try:
        tiled(vectors, vectors, 3)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_keys_have_the_order_of_nearness_and_then_of_ids():
    near = torch.tensor([[-0.0, 0.0, -1.5, torch.inf, 1e-45, -1e-45, 2.0, 2.0, -torch.inf]])
    nearness, ids = exact._read(exact._keys(near.clone(), 70).sort(dim=1, descending=True).values)
    assert ids.tolist() == [[73, 76, 77, 74, 70, 71, 75, 72, 78]]  # -0 is 0
    assert np.array_equal(nearness, near.numpy()[np.zeros_like(ids), ids - 70])


def test_no_squared_distance_is_negative(tile):
    vectors = np.random.default_rng(6).standard_normal((300, 64), dtype=np.float32) * 100
    scores, ids = tiled(vectors, vectors, 1, "l2")
    assert (scores >= 0).all() and np.array_equal(ids[:, 0], np.arange(300))
