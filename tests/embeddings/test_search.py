"""An index file is a cache: FAISS's reader gets what we signed and nothing else; otherwise the vectors answer."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_kit import cli
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.embeddings import search as searching
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.index import build_index, faiss, search_index
from ssl_kit.embeddings.search import Index, read_file
from ssl_kit.embeddings.signing import FILE, index_signature, key_file, read_index, write_index
from ssl_kit.verbs.index import index
from ssl_kit.verbs.search import search

ROWS, DIM = 200, 8


@pytest.fixture
def entered(monkeypatch):
    """What FAISS's reader is given; it reads as ever."""
    given, read = [], faiss.read_index

    def counted(*arguments):
        given.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(faiss, "read_index", counted)
    return given


def vectors(count=ROWS, seed=0):
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def embeddings(folder, data=None, **info):
    data = vectors() if data is None else data
    about = {"layers": 1, "encoder_sha256": "a" * 64, "precision": "float32", "preprocessing": {"mean": [0.5]}} | info
    ids = [f"{row}.png" for row in range(len(data))]
    return Embeddings(data, np.full(len(data), -1), (), ids, about).save(folder)


# --- the file


@pytest.fixture
def written(tmp_path):
    """Writes an index; its path and sha256."""

    def write(key):
        return tmp_path / "x.faiss", write_index(build_index(vectors(), key).index, tmp_path / "x.faiss")

    return write


@pytest.mark.parametrize(
    "key",
    [
        *("Flat", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x4", "PQ4x4", "SQ8", "PQ4x4fs,Refine(Flat)"),
        *("PCA4,IVF4,SQ8", "IVF4,RQ2x4"),
    ],
)
def test_what_was_written_is_read(written, key):
    path, digest = written(key)
    assert digest == sha256(path)
    assert read_index(path, ROWS, DIM, digest=digest).ntotal == ROWS
    for count, dim in ((ROWS + 1, DIM), (ROWS, DIM + 1)):
        with pytest.raises(DamagedError, match=rf"holds 200 vectors of 8; its manifest says {count} of {dim}"):
            read_index(path, count, dim, digest=digest)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_of_another_sha256_never_gets_to_faiss(written, entered, mapped):
    path, digest = written("Flat")
    assert read_index(path, ROWS, DIM, mapped, digest=digest).ntotal == ROWS and len(entered) == 1
    whole = path.read_bytes()
    odd = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (0, 4, 44, len(whole) - 1)]
    for data in (*odd, b"", whole[:-1], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=r"x\.faiss is damaged: sha256"):
            read_index(path, ROWS, DIM, mapped, digest=digest)
    assert len(entered) == 1


def test_the_bytes_that_are_hashed_are_those_that_are_parsed(written):
    """Between two readings somebody could change the file."""
    path, digest = written("IVF4,SQ8")
    opened = []
    watching = [True]

    def watch(event, arguments):
        if event == "open" and watching[0] and str(arguments[0]) == str(path):
            opened.append(arguments)

    sys.addaudithook(watch)  # for as long as the process lives
    read_index(path, ROWS, DIM, digest=digest)
    watching[0] = False
    assert len(opened) == 1


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(DamagedError, match="is missing"):
            read_index(tmp_path / name, ROWS, DIM, digest="0" * 64)


def test_a_full_disk_is_told_as_such():
    with pytest.raises(OSError, match="No space left"):
        write_index(build_index(vectors()).index, Path("/dev/full"))


# --- whose it is


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """Signed indexes of the same vectors, lists and exact, and of others."""
    place = tmp_path_factory.mktemp("signed")
    for name, key, data in (("emb", "Flat", vectors()), ("lists", "IVF4,SQ8", vectors()), ("other", "Flat", None)):
        index(str(embeddings(place / name, vectors(seed=7) if data is None else data)), key=key)
    return place


def manifest_of(folder, change):
    """Alters a manifest as a stranger can: the seal is right."""
    manifest = read_sealed(folder / MANIFEST)
    change(manifest)
    write_sealed(folder / MANIFEST, manifest)


def all_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def rows_of(found):
    return [[(one.row, one.id, one.score) for one in near] for near in found]


def answers(folder, **options):
    opened = Index.load(folder, **options)
    return rows_of(opened.search_vectors(vectors(30, seed=1), 7)), rows_of(opened.search_ids(["3.png", "9.png"], 4))


def listed_in(folder, data):
    """Puts another file in the place of the index, with its sha256 in the manifest."""
    (folder / FILE).write_bytes(data)
    manifest_of(folder, lambda manifest: manifest["files"].update({FILE: sha256(folder / FILE)}))


def altered(**entries):
    return lambda folder, signed: manifest_of(folder, lambda manifest: manifest["index"].update(entries))


def swapped(name, what):
    """The index file, the entry, or both, of another folder."""

    def change(folder, signed):
        other = read_sealed(signed / name / MANIFEST)
        if "file" in what:
            listed_in(folder, (signed / name / FILE).read_bytes())
        if "entry" in what:
            manifest_of(folder, lambda manifest: manifest.update(index=other["index"]))

    return change


def other_key(folder, signed):
    sign = lambda manifest: manifest["index"].update(signature=index_signature(b"k" * 32, manifest))
    manifest_of(folder, sign)


def flipped(folder, signed):
    data = bytearray((folder / FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / FILE).write_bytes(data)


NOT_OURS = {
    "unsigned": (
        lambda folder, _: manifest_of(folder, lambda manifest: manifest["index"].pop("signature")),
        "not signed",
    ),
    "another key": (other_key, "not signed with your key"),
    "no text": (altered(signature=["a"]), "not signed with your key"),
    "not ASCII": (altered(signature="é" * 64), "not signed with your key"),
    "flipped": (flipped, "is damaged: sha256"),
    "cut": (
        lambda folder, _: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9]),
        "is damaged: 6,4.. bytes",
    ),
    "gone": (lambda folder, _: (folder / FILE).unlink(), "is missing"),
    "listed anew": (lambda folder, _: listed_in(folder, b"x" * 6_445), "not signed with your key"),
    "mapped": (altered(mapped=True), "not signed with your key"),
    "another size": (altered(bytes=7), "not signed with your key"),
    "file of lists": (swapped("lists", ["file"]), "not signed with your key"),
    "entry of lists": (swapped("lists", ["entry"]), "not signed with your key"),
    "file of others": (swapped("other", ["file"]), "not signed with your key"),
    "index of others": (swapped("other", ["file", "entry"]), "[0-9a-f]{64}.*[0-9a-f]{64}"),
    "no entry": (lambda folder, _: manifest_of(folder, lambda manifest: manifest.pop("index")), "does not say what"),
    "no index": (
        lambda folder, _: manifest_of(folder, lambda manifest: manifest["files"].pop(FILE)),
        "has no index yet",
    ),
    "other metric": (
        lambda folder, _: manifest_of(folder, lambda manifest: manifest.update(metric="l2")),
        "other vectors",
    ),
}


def test_an_index_of_ours_is_opened(signed, entered, capsys):
    for number, name in enumerate(("emb", "lists"), 1):
        assert answers(signed / name)[0][0] and len(entered) == number
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_is_never_opened_and_the_vectors_answer(signed, tmp_path, entered, capsys, name):
    change, why = NOT_OURS[name]
    wanted = answers(signed / "emb")
    folder = shutil.copytree(signed / "emb", tmp_path / "emb")
    change(folder, signed)
    before = all_of(folder)
    entered.clear()
    capsys.readouterr()
    assert answers(folder) == wanted  # to the bit, as the exact index answers
    said = capsys.readouterr().err
    assert not entered and all_of(folder) == before
    lines = said.splitlines()
    assert len(lines) == 1 and f"`ssl-kit index {folder}`" in said
    assert re.search(why, said), said


def test_without_a_key_nothing_is_ours_and_none_is_made(signed, entered, monkeypatch, tmp_path, capsys):
    wanted = answers(signed / "emb")
    entered.clear()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert answers(signed / "emb") == wanted and not entered and not (tmp_path / "data").exists()
    assert "there is no key that would tell who made" in capsys.readouterr().err
    monkeypatch.setenv("SSL_KIT_KEY", "no key")
    assert cli.main(["search", str(signed / "emb"), "3.png"]) == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err
    monkeypatch.delenv("SSL_KIT_KEY")
    (tmp_path / "data" / "ssl_kit").mkdir(parents=True)
    key_file().write_bytes(b"k" * 32)
    key_file().chmod(0o644)
    assert cli.main(["search", str(signed / "emb"), "3.png"]) == 2
    assert "others may read or write the key" in capsys.readouterr().err and not entered


def test_a_group_shares_its_indexes(tmp_path, monkeypatch, entered):
    folder = embeddings(tmp_path / "emb")
    monkeypatch.setenv("SSL_KIT_KEY", "ab" * 32)
    index(str(folder))
    entered.clear()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "of somebody else"))
    Index.load(folder)
    assert len(entered) == 1 and not (tmp_path / "of somebody else").exists()


@pytest.mark.parametrize("name", ["unsigned", "another key"])
def test_whoever_trusts_an_index_gets_it(signed, tmp_path, entered, capsys, name):
    folder = shutil.copytree(signed / "lists", tmp_path / "emb")
    NOT_OURS[name][0](folder, signed)
    wanted = answers(signed / "lists")
    entered.clear()
    assert answers(folder, trust_index=True) == wanted and len(entered) == 1
    found = search(str(folder), ["3.png"], k=4, trust_index=True)["queries"][0]["results"]
    assert [one["id"] for one in found] == [name for _, name, _ in wanted[1][0]] and len(entered) == 2
    assert cli.main(["search", str(folder), "3.png", "--trust-index", "--json"]) == 0 and len(entered) == 3
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(("flipped", "is damaged: sha256"), ("gone", "is missing"), ("no entry", "does not say what")),
        *(("index of others", "[0-9a-f]{64}.*[0-9a-f]{64}"), ("no index", "has no index yet")),
    ],
)
def test_trust_is_no_reason_to_open_what_is_damaged_or_of_other_vectors(signed, tmp_path, entered, name, why):
    folder = shutil.copytree(signed / "emb", tmp_path / "emb")
    NOT_OURS[name][0](folder, signed)
    entered.clear()
    with pytest.raises(UserError, match=why):
        Index.load(folder, trust_index=True)
    assert not entered


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
def test_an_index_of_other_vectors_is_not_used_and_both_hashes_are_shown(signed, tmp_path, entered, entries):
    folder = shutil.copytree(signed / "emb", tmp_path / "emb")
    manifest_of(folder, lambda manifest: manifest.update(entries))
    with pytest.raises(UserError, match=r"made of other vectors: .*[0-9a-f]{64}.*[0-9a-f]{64}"):
        Index.load(folder, trust_index=True)
    Index.load(folder)
    assert not entered


def test_an_index_that_names_another_file_opens_none(tmp_path, entered):
    """FAISS opens the file of such lists for reading and writing, before it has read the rest."""
    lists = faiss.index_factory(DIM, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors())
    mine = tmp_path / "mine"
    apart = faiss.OnDiskInvertedLists(4, 4 * DIM, str(mine))
    lists.replace_invlists(apart)
    lists.add(vectors())
    write_index(lists, tmp_path / "hostile")
    folder = embeddings(tmp_path / "emb")
    index(str(folder))
    listed_in(folder, (tmp_path / "hostile").read_bytes())
    manifest_of(folder, lambda manifest: manifest["index"].update(bytes=(folder / FILE).stat().st_size))
    mine.unlink()
    mine.mkdir()  # FAISS would complain of it
    entered.clear()
    for options in ({}, {"mapped": True}):
        assert rows_of(Index.load(folder, **options).search_vectors(vectors(), 1))[5][0][0] == 5
    assert not entered and not list(mine.iterdir())


# --- exact answers


def doubled(count, seed=0):
    """Many equal vectors, and some without a direction."""
    made = vectors(count, seed)[np.random.default_rng(seed).integers(0, count // 3, count)]
    made[:: count // 5] = 0
    return made


def test_exact_answers_are_those_of_an_exact_index(tmp_path, monkeypatch):
    """In two parts, with many equal vectors at the end of a list; FAISS multiplies few queries otherwise than many."""
    data = doubled(70_000)
    folder = embeddings(tmp_path / "emb", data)
    index(str(folder), key="Flat")
    for queries, k in ((1, 1), (1, 7), (25, 7), (2, 300)):
        ask = data[1 : 30 * queries : 30]
        indexed = rows_of(Index.load(folder).search_vectors(ask, k))
        with monkeypatch.context() as patch:
            patch.setenv("SSL_KIT_KEY", "ab" * 32)
            exact = rows_of(Index.load(folder).search_vectors(ask, k))
        assert exact == indexed and len(exact[0]) == k
        for near in exact:
            assert near == sorted(near, key=lambda one: (-one[2], one[0]))


def test_parts_of_any_size_give_the_same(tmp_path):
    data, ask = doubled(36_000), vectors(25, seed=3)
    unit = searching.normalised(data)
    cuts = np.array_split(unit, [100, 101, 17_000, 17_000, 30_210])
    whole = search_index(build_index(data, "Flat").index, ask, 9)
    gallery = searching.Gallery(len(data), DIM, lambda: iter(cuts))
    for one, other in zip(whole, search_index(gallery, ask, 9), strict=True):
        assert np.array_equal(one, other)


def test_a_part_that_was_damaged_does_not_answer(signed, tmp_path):
    folder = shutil.copytree(signed / "emb", tmp_path / "emb")
    (folder / FILE).unlink()
    other = embeddings(tmp_path / "other", vectors(seed=5))
    shutil.copy(other / "part-00000.parquet", folder / "part-00000.parquet")
    opened = Index.load(folder)
    with pytest.raises(DamagedError, match=r"part-00000\.parquet is damaged"):
        opened.search_vectors(vectors(2), 3)


@pytest.mark.parametrize("what", ["time", "memory"])
def test_what_would_take_too_long_or_too_much_is_refused(signed, tmp_path, monkeypatch, capsys, what):
    folder = shutil.copytree(signed / "emb", tmp_path / "emb")
    NOT_OURS["unsigned"][0](folder, signed)
    before = all_of(folder)
    if what == "time":
        monkeypatch.setattr(searching, "_PATIENCE", 0.0)
    else:
        monkeypatch.setattr(searching, "available_memory", lambda: 6 * 4 * DIM * ROWS)  # and nothing for the answers
    assert cli.main(["search", str(folder), "3.png"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    wanted = "would take about" if what == "time" else "would need 0 MiB of memory"
    assert wanted in said and f"`ssl-kit index {folder}`" in said and "--trust-index" in said
    assert all_of(folder) == before
    assert cli.main(["search", str(folder), "3.png", "--trust-index"]) == 0


# --- vectors and questions


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
    with pytest.raises(DamagedError, match=r"'3\.png'"):
        Index.load(tmp_path / "emb").search_vectors(vectors(2), 3)
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
