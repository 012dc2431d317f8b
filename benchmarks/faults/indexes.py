"""Indexes that do not fit, vectors without a direction, and odd questions: X2 to X5 of `hostile.py`.

Each function makes its own folders below `place` and returns its cases: name -> None when it ended as it must, else
what happened instead.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from fuzz import DIM, ROWS
from isolated import told
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.index import build_index, search_index
from ssl_kit.embeddings.search import Index
from ssl_kit.embeddings.signing import FILE, read_index, write_index
from ssl_kit.encoders.encoder import RECORD, Encoder
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index

Cases = dict[str, str | None]
KEYS = ("Flat", "HNSW16", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4", "PQ8x4", "SQ8", "IVF8,PQ8x4fs,Refine(SQfp16)")
_TWO_HASHES = re.compile(r"[0-9a-f]{64}.*[0-9a-f]{64}")


def vectors(count: int = ROWS, seed: int = 0) -> np.ndarray:
    """(count, DIM) of a mixture."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((12, DIM))
    return (centres[draw.integers(0, 12, count)] + 0.4 * draw.standard_normal((count, DIM))).astype(np.float32)


def folder_of(place: Path, name: str, data: np.ndarray, ids: list[str] | None = None, key: str = "Flat") -> Path:
    """An indexed embeddings folder of given vectors."""
    ids = ids or [f"{row}.png" for row in range(len(data))]
    info = {"layers": 1, "encoder_sha256": "0" * 64, "encoder": "/nowhere", "precision": "float32"}
    made = Embeddings(data, np.full(len(data), -1), (), ids, info | {"preprocessing": {"image_size": [16, 16]}})
    made.save(place / name)
    index(str(place / name), key=key)
    return place / name


def refused(call: Callable[[], object], words: str = "") -> str | None:
    """None when a call ends with a declared error that says `words`."""
    kind, text = told(call)
    return None if kind == "refused" and re.search(words, text, re.DOTALL) else f"{kind}: {text}"


def mismatches(place: Path) -> Cases:
    """X2: an index and a model, or an index and vectors, that do not belong together."""
    draw = np.random.default_rng(0)
    (place / "photos").mkdir()
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(place / "photos" / f"{number}.png")
    torch.manual_seed(0)
    for name, wide in (("a", 8), ("b", 8), ("wide", 16)):
        Encoder("resnet18_small", {"channels": [4, 4, 8, wide]}, (16, 16)).save(place / name)
    for name in ("a", "wide"):
        embed(str(place / name), str(place / "photos"), out=str(place / f"emb-{name}"), precision="float32")
        index(str(place / f"emb-{name}"))
    photo = str(place / "photos" / "3.png")
    other = shutil.copytree(place / "a", place / "other preprocessing")
    record = read_sealed(other / RECORD)
    record["preprocessing"]["mean"] = [0.1]
    write_sealed(other / RECORD, record)

    def altered(name: str, change: Callable[[dict], object], file: str | None = None) -> Path:
        folder = shutil.copytree(place / "emb-a", place / name)
        manifest = read_sealed(folder / MANIFEST)
        change(manifest)
        if file is not None:
            shutil.copy(file, folder / FILE)
            manifest["files"][FILE] = sha256(folder / FILE)
        write_sealed(folder / MANIFEST, manifest)
        return folder

    wide = read_sealed(place / "emb-wide" / MANIFEST)
    dims = altered("other d", lambda manifest: manifest.update(index=wide["index"]), place / "emb-wide" / FILE)
    metric = altered("other metric", lambda manifest: manifest.update(metric="l2"))
    normalised = altered("other normalisation", lambda manifest: manifest.update(normalised=True))
    others = {"other d": dims, "other metric": metric, "other normalisation": normalised}
    search = lambda encoder: Index.load(place / "emb-a", encoder=str(encoder)).search(photo)
    ask = lambda folder: Index.load(folder).search_ids(["3.png"], 5)
    trusted = lambda folder: refused(lambda: Index.load(folder, trust_index=True), _TWO_HASHES.pattern)
    same = lambda folder: None if ask(folder) == ask(place / "emb-a") else "another answer"
    return {
        "another model": refused(lambda: search(place / "b"), _TWO_HASHES.pattern),
        "other preprocessing": refused(lambda: search(other), _TWO_HASHES.pattern),
        **{name: trusted(folder) for name, folder in others.items()},
        **{f"{name}, the vectors answer": same(folder) for name, folder in others.items()},
    }


def without_direction(place: Path) -> Cases:
    """X3: NaN, infinite and zero vectors, added and asked for; the neighbours of the valid ones stay the same."""
    good, cases = vectors(), Cases()
    base = folder_of(place, "good", good)
    queries = vectors(20, seed=1)
    wanted = Index.load(base).search_vectors(queries, 5)
    for name, value in (("NaN", np.nan), ("infinite", np.inf), ("minus infinite", -np.inf)):
        bad = good.copy()
        bad[[7, 300], 3] = value
        cases[f"add {name}, folder"] = refused(
            lambda bad=bad, name=name: folder_of(place, name, bad), r"'7\.png', '300"
        )
        cases[f"add {name}, array"] = refused(lambda bad=bad: build_index(bad), "rows 7, 300")
        ask = queries.copy()
        ask[4, 1] = value
        cases[f"ask {name}"] = refused(lambda ask=ask: Index.load(base).search_vectors(ask, 5), "number 4")
    zero = np.concatenate([good, np.zeros((2, DIM), np.float32)])
    cases["add zero: reported"] = None if build_index(zero).zero.tolist() == [ROWS, ROWS + 1] else "not reported"
    found = Index.load(folder_of(place, "zero", zero)).search_vectors(queries, 5)
    same = [[one[:2] for one in near] for near in found] == [[one[:2] for one in near] for near in wanted]
    cases["add zero: neighbours of the others"] = None if same else "changed"
    ask = queries.copy()
    ask[4] = 0
    cases["ask zero"] = refused(lambda: Index.load(base).search_vectors(ask, 5), "number 4")
    return cases


def round_trips(place: Path) -> Cases:
    """X4: written, read again and asked: the same ids."""
    data, queries, cases = vectors(), vectors(50, seed=1), Cases()
    for key in KEYS:
        built = build_index(data, key).index
        write_index(built, place / "index.faiss")
        before = search_index(built, queries, 10)
        for mapped in (False, True) if key in ("Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ8x4") else (False,):
            after = search_index(read_index(place / "index.faiss", ROWS, DIM, mapped), queries, 10)
            same = np.array_equal(before[1], after[1])
            cases[f"{key}{', mapped' if mapped else ''}"] = None if same else "other ids"
    return cases


def questions(place: Path) -> Cases:
    """X5: large and repeated ids, more neighbours than there are vectors, an index of nothing."""
    cases = Cases()
    ids = [str(2**63 - 1 - row) for row in range(40)]
    data = vectors(40)
    large = Index.load(folder_of(place, "large ids", data, ids))
    near = large.search_ids([str(2**63 - 1)], 3)[0]
    own = large.search_vectors(data[:1], 1)[0][0].id
    cases["ids up to 2^63 - 1"] = None if own == ids[0] and all(one.id in ids for one in near) else f"found {own}"
    twice = Index.load(folder_of(place, "twice", np.repeat(data[:20], 2, axis=0))).search_vectors(data[:1], 2)[0]
    cases["the same vector twice"] = None if {one.row for one in twice} == {0, 1} else f"found {twice}"
    every = large.search_vectors(data[:2], 10**9)
    cases["k of 10^9"] = None if all(len({one.row for one in near}) == 40 for near in every) else "not all"
    cases["k of 0"] = refused(lambda: large.search_vectors(data[:1], 0), "at least 1")
    lists = build_index(vectors(), "IVF8,Flat").index
    lists.nprobe = 1
    scores, rows = search_index(lists, vectors(5, seed=1), ROWS)
    padded = (
        rows.shape == (5, ROWS) and (rows == -1).any() and rows.max() < ROWS and np.isfinite(scores[rows >= 0]).all()
    )
    cases["lists that hold fewer than k"] = None if padded else f"{rows.shape}"
    nothing = search_index(faiss.IndexFlatIP(DIM), vectors(3), 10)
    cases["an index of nothing"] = None if nothing[1].shape == (3, 0) else f"{nothing[1].shape}"
    empty = Embeddings(np.empty((0, DIM), np.float32), np.empty(0, np.int64), (), [])
    empty.save(place / "empty")
    cases["indexing nothing"] = refused(lambda: index(str(place / "empty")), "0 vectors")
    cases["queries of another d"] = refused(lambda: large.search_vectors(np.ones((1, DIM + 1), np.float32)), "wanted")
    cases["no query"] = None if large.search_vectors(np.empty((0, DIM), np.float32)) == [] else "something"
    cases["an id that is not there"] = refused(lambda: large.rows_of(["nothing"]), "neither a file nor an id")
    assert issubclass(UserError, ValueError)
    return cases
