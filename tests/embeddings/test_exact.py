"""Exact search against brute force: FAISS on the CPU, and what other devices do."""

import numpy as np
import pytest
import torch

from ssl_kit.embeddings import exact
from ssl_kit.embeddings.exact import by_torch, normalised, search


def like_faiss(queries, gallery, k, metric):
    """What `faiss.knn` gives, by the way of other devices."""
    name = "ip" if metric == exact.faiss.METRIC_INNER_PRODUCT else "l2"
    nearness, ids = by_torch(gallery, queries, k, name, torch.device("cpu"))
    return (nearness if name == "ip" else -nearness), ids


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 3, 120])  # FAISS keeps its lists differently from k = 100 on
@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_search_is_exact_and_equal_scores_come_by_the_lowest_id(metric, k, engine, monkeypatch):
    if engine == "torch":
        monkeypatch.setattr(exact.faiss, "knn", like_faiss)
    rng = np.random.default_rng(0)
    gallery = rng.integers(-1, 2, (300, 4)).astype(np.float32)  # 81 distinct rows: nearly every list ends in a tie
    queries = rng.integers(-1, 2, (40, 4)).astype(np.float32)
    scored = queries @ gallery.T if metric == "ip" else -((queries[:, None] - gallery[None]) ** 2).sum(-1)
    wanted = np.argsort(-scored, axis=1, kind="stable")[:, :k]
    scores, ids = search(gallery, queries, k, metric=metric, device="cpu")
    assert np.array_equal(ids, wanted)
    assert np.array_equal(scores if metric == "ip" else -scores, np.take_along_axis(scored, wanted, 1))


def test_inner_product_of_normalised_vectors_orders_as_distance():
    rng = np.random.default_rng(1)
    vectors, queries = (normalised(rng.standard_normal((count, 16))) for count in (500, 50))
    assert np.array_equal(search(vectors, queries, 10)[1], search(vectors, queries, 10, metric="l2")[1])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_other_devices_find_what_faiss_finds(metric, monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((count, 24)).astype(np.float32) for count in (3_000, 70))
    monkeypatch.setattr(exact, "_DEVICE_BLOCK_BYTES", 4 * 3_000 * 16)  # 16 queries at a time
    wanted = search(vectors, queries, 12, metric=metric)
    monkeypatch.setattr(exact.faiss, "knn", like_faiss)
    scores, ids = search(vectors, queries, 12, metric=metric)
    assert np.array_equal(ids, wanted[1]) and np.allclose(scores, wanted[0], rtol=1e-4, atol=1e-5)
    assert search(vectors, queries[:0], 12)[0].shape == (0, 12)
