"""Index files of strangers: what FAISS would take is refused; what does not belong together shows both hashes."""

import shutil

import numpy as np
import pytest

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.embeddings import Embeddings
from ssl_kit.evaluation.index import build_index, faiss, search_index
from ssl_kit.evaluation.index_file import read_index, write_index
from ssl_kit.evaluation.searching import FILE, Index, read_file
from ssl_kit.verbs.index import index

ROWS, DIM = 200, 8


def vectors(count=ROWS, seed=0):
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def embeddings(folder, data=None, **info):
    data = vectors() if data is None else data
    about = {"layers": 1, "encoder_sha256": "a" * 64, "precision": "float32", "preprocessing": {"mean": [0.5]}} | info
    ids = [f"{row}.png" for row in range(len(data))]
    return Embeddings(data, np.full(len(data), -1), (), ids, about).save(folder)


@pytest.fixture
def written(tmp_path):
    """Writes an index after it was altered; its path."""

    def write(key, alter=lambda index: None):
        built = build_index(vectors(), key).index
        alter(built)
        write_index(built, tmp_path / "x.faiss")
        return tmp_path / "x.faiss"

    return write


def setter(path, value):
    def alter(index):
        *parts, last = path.split(".")
        for part in parts:
            index = getattr(index, part)
            index = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
        setattr(index, last, value)

    return alter


@pytest.mark.parametrize(
    "key",
    ["Flat", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x4", "PQ4x4", "SQ8", "PQ4x4fs,Refine(Flat)", "PCA4,IVF4,SQ8"],
)
def test_honest_files_are_read(written, key):
    assert read_index(written(key), ROWS, DIM).ntotal == ROWS


@pytest.mark.parametrize(
    ("key", "path", "value"),
    [
        ("PQ4x4fs,Refine(Flat)", "base_index.ntotal2", 10**6),  # FAISS 1.15.1 reads past its codes
        ("PQ4x4fs,Refine(Flat)", "base_index.ntotal2", 32),
        ("PQ4x4fs,Refine(Flat)", "base_index.d", 64),  # and past the queries
        ("PQ4x4fs,Refine(Flat)", "base_index.ntotal", 100),
        ("PQ4x4fs,Refine(Flat)", "k_factor", 1e9),
        ("PQ4x4fs,Refine(Flat)", "k_factor", float("nan")),
        ("IVF4,SQ8", "nprobe", 0),
        ("IVF4,SQ8", "nprobe", 10**9),
        ("HNSW8", "hnsw.efSearch", 10**9),
        ("PQ4x4", "search_type", 6),
        ("PCA4,IVF4,SQ8", "index.metric_type", 1),
    ],
)
def test_numbers_that_do_not_fit_are_refused(written, key, path, value):
    with pytest.raises(DamagedError, match=r"x\.faiss"):
        read_index(written(key, setter(path, value)), ROWS, DIM)


def test_kinds_that_nobody_asked_for_are_refused(written):
    with pytest.raises(DamagedError, match="IndexIVFResidualQuantizer"):
        read_index(written("IVF4,RQ2x4"), ROWS, DIM)


def test_lists_in_another_file_are_refused_before_faiss_sees_them(written, tmp_path):
    lists = faiss.index_factory(DIM, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors())
    elsewhere = tmp_path / "elsewhere"
    apart = faiss.OnDiskInvertedLists(4, 4 * DIM, str(elsewhere))
    lists.replace_invlists(apart)
    lists.add(vectors())
    write_index(lists, tmp_path / "x.faiss")
    elsewhere.unlink()
    elsewhere.mkdir()  # FAISS would complain of it
    for mapped in (False, True):
        with pytest.raises(DamagedError, match="lists in another file"):
            read_index(tmp_path / "x.faiss", ROWS, DIM, mapped)
    flat = build_index(vectors()).index
    codes = faiss.vector_to_array(flat.codes)
    codes[40:44] = np.frombuffer(b"ilod", np.uint8)  # a word among the vectors is no list
    faiss.copy_array_to_vector(codes, flat.codes)
    write_index(flat, tmp_path / "y.faiss")
    assert read_index(tmp_path / "y.faiss", ROWS, DIM).ntotal == ROWS


def test_a_damaged_exact_index_is_not_mapped(written, monkeypatch):
    """FAISS 1.15.1 dies of some of them (SIGSEGV)."""
    path = written("Flat")
    assert read_index(path, ROWS, DIM, mapped=True).ntotal == ROWS
    whole = path.read_bytes()
    monkeypatch.setattr(faiss, "read_index", None)
    cut = [whole[:end] for end in (4, 31, 44, 45, 46, len(whole) - 1)]
    odd = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(4, 45)]
    for data in (*cut, *odd, whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=f"its manifest says {ROWS} vectors of {DIM}"):
            read_index(path, ROWS, DIM, mapped=True)


def test_an_empty_file_is_refused_and_one_that_is_gone(tmp_path):
    with pytest.raises(DamagedError, match="was replaced while it was read"):
        read_index(tmp_path / "x.faiss", ROWS, DIM)
    (tmp_path / "x.faiss").touch()
    with pytest.raises(DamagedError, match="empty"):
        read_index(tmp_path / "x.faiss", ROWS, DIM)


def rewritten(folder, target, file=None, **entries):
    shutil.copytree(folder, target)
    manifest = read_sealed(target / MANIFEST) | entries
    if file is not None:
        shutil.copy(file, target / FILE)
        manifest["files"][FILE] = sha256(target / FILE)
    write_sealed(target / MANIFEST, manifest)
    return target


@pytest.mark.parametrize(
    "entries",
    [
        {"metric": "l2"},
        {"normalised": True},
        {"layers": 2},
        {"encoder_sha256": "b" * 64},
        {"preprocessing": {"mean": [0.4]}},
    ],
)
def test_an_index_of_other_vectors_is_refused_with_both_hashes(tmp_path, entries):
    folder = embeddings(tmp_path / "emb")
    index(str(folder))
    with pytest.raises(UserError, match=r"[0-9a-f]{64}.*[0-9a-f]{64}"):
        Index.load(rewritten(folder, tmp_path / "other", **entries))


def test_an_index_of_another_folder_is_refused(tmp_path):
    folder, other = embeddings(tmp_path / "emb"), embeddings(tmp_path / "emb2", vectors(seed=1))
    for one in (folder, other):
        index(str(one))
    entry = read_sealed(other / MANIFEST)["index"]
    with pytest.raises(UserError, match=r"[0-9a-f]{64}.*[0-9a-f]{64}"):
        Index.load(rewritten(folder, tmp_path / "mixed", other / FILE, index=entry))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_none_are_named(tmp_path, value):
    bad = vectors()
    bad[[3, 150], 2] = value
    with pytest.raises(UserError, match="2 vectors are NaN or infinite, rows 3, 150"):
        build_index(bad)
    with pytest.raises(DamagedError, match=r"'3\.png', '150\.png'"):
        index(str(embeddings(tmp_path / "emb", bad)))
    with pytest.raises(DamagedError, match=r"'3\.png'"):
        Embeddings.load(tmp_path / "emb")
    queries = vectors(4, seed=1)
    queries[2, 0] = value
    with pytest.raises(UserError, match="1 of 4 queries are NaN, infinite or zero: number 2"):
        search_index(build_index(vectors()).index, queries, 3)


def test_zero_vectors_are_told_of_and_change_no_neighbours(tmp_path, capsys):
    good = vectors()
    zero = np.concatenate([good, np.zeros((2, DIM), np.float32)])
    built = build_index(zero)
    assert built.zero.tolist() == [ROWS, ROWS + 1] and build_index(good).zero.tolist() == []
    queries = vectors(10, seed=1)
    assert np.array_equal(
        search_index(built.index, queries, 5)[1], search_index(build_index(good).index, queries, 5)[1]
    )
    index(str(embeddings(tmp_path / "emb", zero)))
    assert "2 vectors are zero, their cosine to anything is 0: '200.png', '201.png'" in capsys.readouterr().err
    with pytest.raises(UserError, match="number 0"):
        search_index(built.index, np.zeros((1, DIM), np.float32), 3)


def test_odd_questions_have_defined_answers():
    flat = build_index(vectors()).index
    assert search_index(flat, vectors(2, seed=1), 10**9)[1].shape == (2, ROWS)
    assert search_index(faiss.IndexFlatIP(DIM), vectors(3), 5)[1].shape == (3, 0)
    assert search_index(flat, np.empty((0, DIM), np.float32), 5)[1].shape == (0, 0)
    with pytest.raises(UserError, match=r"queries of shape \(2, 9\); wanted \(queries, 8\)"):
        search_index(flat, np.ones((2, DIM + 1), np.float32), 5)


def test_a_search_that_faiss_cannot_make_is_a_damaged_index():
    lists = build_index(vectors(), "PQ4x4").index
    lists.search_type = 3  # symmetric distances, without their table
    with pytest.raises(DamagedError, match="cannot be searched"):
        search_index(lists, vectors(1), 3)


def test_escapes_in_an_id_lead_nowhere(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    info = {"source_root": str(tmp_path / "root")}
    assert read_file(info, "a.png") == b"inside"
    for name in (
        "../secret",
        "%2E%2E/secret",
        "%2e%2e%2Fsecret",
        str(tmp_path / "secret"),
        "%2Fetc/passwd",
        "a.png%00",
    ):
        assert read_file(info, name) is None
