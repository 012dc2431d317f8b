"""Indexes built block by block, chosen by size and memory, read from disk or mapped, and `Index` on top of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401  before faiss
from PIL import Image

import ssl_kit
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError
from ssl_kit.embeddings import index as indexing
from ssl_kit.embeddings import search as searching
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.embeddings.index import Gallery, build_index, default_key, fast_key, finder, search_index
from ssl_kit.embeddings.search import Index
from ssl_kit.embeddings.signing import read_index, write_index
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index

import faiss  # isort: skip


def mixture(count, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((40, dim))
    return (centres[rng.integers(0, 40, count)] + 0.6 * rng.standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("key", ["Flat", "IVF16,SQ8"])
def test_blocks_give_the_index_of_all_vectors_at_once(key):
    vectors, queries = mixture(2_500), mixture(30, seed=1)
    calls = []

    def blocks():
        calls.append(1)
        return (vectors[start : start + 700] for start in range(0, 2_500, 700))

    whole, parts = build_index(vectors, key), build_index(Gallery(2_500, 16, blocks), key)
    assert (parts.key, parts.recall, parts.nprobe) == (whole.key, whole.recall, whole.nprobe)
    one, other = search_index(whole.index, queries, 10), search_index(parts.index, queries, 10)
    assert np.array_equal(one[1], other[1]) and np.allclose(one[0], other[0])
    assert len(calls) <= 3  # queries, training vectors, filling: a pass each


def test_the_stated_recall_is_that_of_other_queries():
    vectors, queries = mixture(6_000), mixture(400, seed=1)
    built = build_index(vectors, "IVF64,PQ4x4fs,Refine(SQfp16)", recall=0.8)
    assert abs(agreement(built.index, vectors, queries) - built.recall) < 0.05 and 0.7 < built.recall < 1


def test_codes_tell_features_apart_that_vary_along_few_directions():
    """As those of encoders do: a large mean, and each direction varies less than the one before."""
    vectors = np.random.default_rng(0).standard_normal((6_300, 32)) * 0.8 ** np.arange(32)
    vectors[:, 0] += 4
    queries, vectors = vectors[6_000:].astype(np.float32), vectors[:6_000].astype(np.float32)
    built = build_index(vectors, fast_key(6_000, 32), recall=0.95)
    assert built.recall >= 0.93  # tuned on 300 other queries
    assert built.index.k_factor < 64  # no more candidates than are needed
    # 0.63 of the neighbours are among the 40 nearest by their codes; by codes of the features as they are, 0.27
    built.index.k_factor, faiss.try_extract_index_ivf(built.index).nprobe = 4, 256
    assert agreement(built.index, vectors, queries) > 0.5


def agreement(index, vectors, queries):
    """Recall@10."""
    exact = search(normalised(vectors), normalised(queries), 10)[1]
    found = search_index(index, queries, 10)[1]
    return np.mean([len(np.intersect1d(one, truth)) / 10 for one, truth in zip(found, exact, strict=True)])


def test_codes_that_cannot_tell_enough_apart_get_what_comes_nearest():
    """One 4-bit code for 16 dimensions: more lists bring in more that look alike."""
    vectors, queries = mixture(6_000), mixture(400, seed=1)
    built = build_index(vectors, "IVF64,PQ1x4fs,Refine(SQfp16)", recall=1.0)
    chosen = agreement(built.index, vectors, queries)
    faiss.try_extract_index_ivf(built.index).nprobe = 64
    assert built.nprobe < 64 and chosen > agreement(built.index, vectors, queries)
    assert built.index.k_factor == 64


def test_the_key_follows_memory_and_use():
    assert default_key(10_000_000, 512, memory=64e9) == "RR512,IVF16384,PQ256x4fsr,Refine(SQfp16)"
    assert default_key(10_000_000, 512, memory=12e9) == "IVF16384,SQ8"
    assert default_key(10_000_000, 512, memory=8e9) == "IVF16384,PQ256"
    assert default_key(1_000_000, 128, mapped=True) == "IVF4096,SQ8"
    assert default_key(1_000, 16, mapped=True) == "IVF128,SQ8"


@pytest.mark.parametrize("key", ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4"])
def test_a_mapped_index_finds_the_same(tmp_path, key):
    vectors, queries = mixture(2_000), mixture(30, seed=1)
    built = build_index(vectors, key)
    write_index(built.index, tmp_path / "index.faiss")
    mapped = read_index(tmp_path / "index.faiss", 2_000, 16, mapped=True)
    read = read_index(tmp_path / "index.faiss", 2_000, 16)
    for other in (mapped, read):
        assert np.array_equal(search_index(other, queries, 10)[1], search_index(built.index, queries, 10)[1])
    with pytest.raises(DamagedError, match="its manifest says 2,001"):
        read_index(tmp_path / "index.faiss", 2_001, 16, mapped=True)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()  # it is mapped, not read


# --- Index


@pytest.fixture(scope="module")
def indexed(images, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emb") / "emb"
    embed(str(encoder), str(images / "train"), out=str(folder), precision="float32")
    index(str(folder))
    return folder


def brute(indexed, row, k):
    vectors = normalised(Embeddings.load(indexed).vectors)
    return np.argsort(-(vectors @ vectors[row]), kind="stable")[:k]


def test_python_searches_with_files_pixels_and_batches(indexed, images, monkeypatch):
    found = ssl_kit.Index.load(indexed)
    assert len(found) == 72
    files = [images / "train" / "red" / "07.png", images / "train" / "blue" / "00.png", images / "test/green/03.png"]
    by_file = found.search(files, k=5)
    assert [near[0].id for near in by_file[:2]] == ["red/07.png", "blue/00.png"]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    assert [[one.id for one in near] for near in found.search(pixels, k=5)] == [
        [o.id for o in near] for near in by_file
    ]
    assert found.search(pixels[0], k=2)[0] == found.search(files[0], k=2)[0]
    monkeypatch.setattr(searching, "BATCH", 2)
    assert [near[0].row for near in found.search(files, k=5)] == [near[0].row for near in by_file]


def test_an_id_finds_the_others(indexed):
    found = Index.load(indexed)
    near = found.search_ids(["red/07.png", "blue/01.png", "red/07.png"], k=4)
    ids = Embeddings.load(indexed).ids
    assert near[0] == near[2]
    for row, got in ((ids.index("red/07.png"), near[0]), (ids.index("blue/01.png"), near[1])):
        assert [one.row for one in got] == [other for other in brute(indexed, row, 5) if other != row][:4]
        assert all(ids[one.row] == one.id for one in got)
    with pytest.raises(UserError, match=r"'red/99\.png' is neither a file nor an id"):
        found.search_ids(["red/07.png", "red/99.png"])


def test_pixels_that_are_none_are_refused(indexed):
    with pytest.raises(UserError, match="the image: array of floats from 0 to 7"):
        Index.load(indexed).search(np.full((8, 8, 3), 7, np.float32))
    with pytest.raises(UserError, match="wanted at least 1"):
        Index.load(indexed).search(np.zeros((8, 8, 3), np.uint8), k=0)
    grey = Index.load(indexed).search(np.zeros((8, 8), np.uint8), k=3)[0]
    assert grey == Index.load(indexed).search(np.zeros((8, 8, 3), np.uint8), k=3)[0]


def test_mapped_is_remembered(indexed, images, tmp_path):
    folder = shutil.copytree(indexed, tmp_path / "emb")
    said = index(str(folder), key="IVF4,SQ8", mapped=True)
    assert said["mapped"] is True
    with pytest.raises(UserError, match="fast-scan codes cannot be mapped"):
        index(str(folder), key="IVF4,PQ4x4fs", mapped=True)
    loaded = Index.load(folder)
    assert str(folder) in Path("/proc/self/maps").read_text()
    assert loaded.search(images / "train" / "red" / "07.png", k=1)[0][0].id == "red/07.png"


def test_many_queries_of_many_vectors_are_answered_from_lists(monkeypatch):
    gallery = normalised(mixture(6_000))
    gallery[5_000:5_050] = gallery[:50]
    exact, all_found = finder(gallery, len(gallery))
    assert all_found == 1 and np.array_equal(exact(gallery, 5)[1], search(gallery, gallery, 5)[1])
    monkeypatch.setattr(indexing, "_PAIRS", 10**7)
    find, recall = finder(gallery, len(gallery))
    rows, wanted = find(gallery, 11)[1], search(gallery, gallery, 11)[1]
    found = np.mean([len(np.intersect1d(*pair)) for pair in zip(rows, wanted, strict=True)]) / 11
    assert 0.94 < recall < 1 and abs(found - recall) < 0.02
    assert {(row, row + 5_000) for row in range(50)} <= {(row, int(one)) for row in range(50) for one in rows[row, :2]}
    lost = find(gallery[:1], 6_000)  # lists that are not visited
    assert lost[1].min() == -1 and lost[0].min() == -1 and lost[0][0, 0] == pytest.approx(1)
