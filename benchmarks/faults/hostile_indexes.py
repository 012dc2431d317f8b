"""Index files that are not what we signed: X1 of `hostile.py`.

Even trials damage what was signed with our key: bits, ends and stretches of the file, its entry in the manifest, or
both are those of another index that was signed too. Odd ones were never signed, or with another key, files among them
that make FAISS open another file for writing. Whatever they are, the vectors must answer as if there were no index,
FAISS's reader must not be entered, and nothing may be written. Entries are counted where FAISS begins to read; every
25th trial sees first that the index as it was signed is entered, once.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from isolated import told
from mutate import damaged, damaged_text

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.files import MANIFEST, json_text
from ssl_kit.core.sealed import SEAL, read_json, read_sealed, sealed
from ssl_kit.embeddings.exact import normalised
from ssl_kit.embeddings.folder import part_names
from ssl_kit.embeddings.index import Gallery, build_index, search_index
from ssl_kit.embeddings.search import Index
from ssl_kit.embeddings.signing import FILE, index_signature, vectors_fingerprint, write_index

ROWS, DIM = 600, 16
KEYS = (
    *("Flat", "HNSW16", "HNSW8_SQ8", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF8_HNSW8,SQ8", "PQ8x4", "SQ8"),
    *("IVF8,PQ8x4fs,Refine(SQfp16)", "PQ8x4fs,Refine(Flat)", "OPQ4,IVF8,PQ4x4", "PCA8,IVF8,SQ4", "L2norm,Flat"),
    *("IVF8,PQ4x4fs", "RR8,SQ6", "SQbf16", "IVF8_HNSW8,Flat", "HNSW8_PQ4x4"),
)
MAPPED = ("Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4")
OURS, OTHER = b"\x01" * 32, b"\x02" * 32  # keys
ENTERED = "FAISS's reader was entered"
_DECIDES = (  # of a manifest: what an index is of, and is signed
    *("index", "rows", "dims", "dtype", "layers", "metric", "normalised", "precision", "encoder_sha256"),
    "preprocessing",
)
_FOREIGN = "foreign"  # the file that hostile lists name
Manifest = dict[str, Any]


def prepare(place: Path, vectors: np.ndarray) -> None:
    """Writes an index of each key, and one whose lists lie in another file."""
    for key in KEYS:
        write_index(build_index(vectors, key).index, index_file(place, key))
    lists = faiss.index_factory(DIM, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors)
    foreign = place / _FOREIGN
    apart = faiss.OnDiskInvertedLists(8, 4 * DIM, str(foreign))
    lists.replace_invlists(apart)
    lists.add(vectors)
    write_index(lists, place / "elsewhere.faiss")
    foreign.write_bytes(b"of a user's own")  # FAISS would resize and map it


def index_file(place: Path, key: str) -> Path:
    """Where the honest index of a key lies."""
    return place / key.replace(",", "_")


class IndexTrials:
    """Trials on one embeddings folder.

    Args:
        place: of the honest indexes, as `prepare` wrote them.
        folder: an embeddings folder without an index, which the trials may write to.
        vectors: its (ROWS, DIM).
    """

    def __init__(self, place: Path, folder: Path, vectors: np.ndarray):
        self.folder, self.vectors = folder, vectors
        self.foreign = place / _FOREIGN
        self.files = {key: index_file(place, key).read_bytes() for key in KEYS}
        self.elsewhere = (place / "elsewhere.faiss").read_bytes()
        self.honest = read_sealed(folder / MANIFEST)
        self.exact = Gallery(ROWS, DIM, lambda: [normalised(vectors)])
        self.entered = 0
        self._count_entries()

    def _count_entries(self) -> None:
        read = faiss.read_index

        def counted(*arguments: Any) -> faiss.Index:
            self.entered += 1
            return read(*arguments)

        faiss.read_index = counted

    def trial(self, number: int) -> str:
        """One hostile index: "answered", "refused" where the manifest makes no sense, "unchanged"; else a fault."""
        draw = random.Random(f"index/{number}")
        key = KEYS[number % len(KEYS)]
        mapped = key in MAPPED and (number // len(KEYS)) % 2 == 1
        if number % 25 == 0 and (wrong := self._control(key, mapped, number)):
            return f"control, {key}: {wrong}"
        make = draw.choice(_SIGNED if number % 2 == 0 else _UNSIGNED)
        data, manifest = make(self, key, mapped, draw)
        kind, text = self._searched(data, manifest, number)
        what = f"{make.__name__.strip('_')} of {key}"
        if self.foreign.read_bytes() != b"of a user's own":
            return f"a foreign file was touched: {what}"
        if self.entered:
            return "unchanged" if self._is_signed(data, manifest, key, mapped) else f"{ENTERED}: {what}"
        if kind == "returned":
            return "answered" if text == self._wanted(number) else f"another answer: {what}"
        if kind == "refused" and (make in _OF_MANIFESTS or isinstance(manifest, bytes)):
            return "refused"
        return f"{kind}: {what}: {text}"

    def _control(self, key: str, mapped: bool, number: int) -> str | None:
        kind, text = self._searched(self.files[key], self.signed(key, mapped), number)
        return None if (kind, self.entered) == ("returned", 1) else f"{kind}, entered {self.entered} times: {text}"

    def _searched(self, data: bytes, manifest: Manifest | bytes, number: int) -> tuple[str, str]:
        """What a search ends with; entries are counted from 0."""
        (self.folder / FILE).write_bytes(data)
        text = manifest if isinstance(manifest, bytes) else json_text(sealed(manifest)).encode()
        (self.folder / MANIFEST).write_bytes(text)
        before = self._there()
        self.entered = 0
        kind, said = told(lambda: self._rows(Index.load(self.folder).search_vectors(self._queries(number), 10)))
        return (kind, said) if self._there() == before else ("crashed", "something was written")

    def _there(self) -> list[tuple[str, int, int]]:
        found = [(path.name, path.stat()) for path in sorted(self.folder.iterdir())]
        return [(name, about.st_mtime_ns, about.st_size) for name, about in found]

    def _queries(self, number: int) -> np.ndarray:
        return self.vectors[[number % ROWS, (7 * number) % ROWS]]

    def _rows(self, found: list[list[Any]]) -> str:
        return ",".join(str(one.row) for near in found for one in near)

    def _wanted(self, number: int) -> str:
        return ",".join(map(str, search_index(self.exact, self._queries(number), 10)[1].ravel().tolist()))

    def _is_signed(self, data: bytes, manifest: Manifest | bytes, key: str, mapped: bool) -> bool:
        """Whether all that decides is as it was signed; words of a manifest that decide nothing may be damaged."""
        if isinstance(manifest, bytes):
            manifest = read_json(self.folder / MANIFEST)
        wanted, files = self.signed(key, mapped), [*part_names(self.honest), FILE]  # skipped.csv decides nothing
        same = all(manifest.get(name) == wanted.get(name) for name in _DECIDES)
        return (
            same and data == self.files[key] and all(manifest["files"][name] == wanted["files"][name] for name in files)
        )

    # --- manifests

    def signed(self, key: str, mapped: bool, by: bytes | None = OURS, data: bytes | None = None) -> Manifest:
        """The manifest of an index, signed; of a key's honest one, or of `data`."""
        data = self.files[key] if data is None else data
        entry = {"key": key, "metric": "cosine", "rows": ROWS, "bytes": len(data), "mapped": mapped}
        manifest = {**self.honest, "index": entry | {"vectors_sha256": vectors_fingerprint(self.honest)}}
        manifest["files"] = {**self.honest["files"], FILE: _sha256(data)}
        if by is not None:
            manifest["index"]["signature"] = index_signature(by, manifest)
        return manifest

    def other(self, key: str, draw: random.Random) -> str:
        """Another key."""
        return draw.choice([one for one in KEYS if one != key])

    def listed(self, manifest: Manifest, data: bytes) -> Manifest:
        """The manifest with another file listed, its hash and its size right, the signature as it was."""
        files, entry = manifest["files"] | {FILE: _sha256(data)}, manifest["index"] | {"bytes": len(data)}
        return {**manifest, "files": files, "index": entry}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


Made = tuple[bytes, Manifest | bytes]


def _damaged_file(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    others = [data for other, data in of.files.items() if other != key]
    return damaged(of.files[key], draw, others), of.signed(key, mapped)


def _flipped_bits(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    """Of the same size."""
    data = bytearray(of.files[key])
    for bit in {draw.randrange(8 * len(data)) for _ in range(draw.choice((1, 3)))}:
        data[bit // 8] ^= 1 << bit % 8
    return bytes(data), of.signed(key, mapped)


def _listed_anew(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    data, manifest = _damaged_file(of, key, mapped, draw)
    assert isinstance(manifest, dict)
    return data, of.listed(manifest, data)


def _file_of_another(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    """Signed as well, but not under this entry."""
    data, manifest = of.files[of.other(key, draw)], of.signed(key, mapped)
    return data, of.listed(manifest, data) if draw.random() < 0.7 else manifest


def _entry_of_another(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    manifest, other = of.signed(key, mapped), of.signed(of.other(key, draw), False)
    taken = draw.choice(({"index": other["index"]}, {"files": other["files"]}))
    if draw.random() < 0.3:  # the signature alone
        taken = {"index": {**manifest["index"], "signature": other["index"]["signature"]}}
    return of.files[key], manifest | taken


def _altered_entry(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    manifest = of.signed(key, mapped)
    changes = {"mapped": not mapped, "rows": ROWS - 1, "bytes": 1, "key": "x", "vectors_sha256": "0" * 64, "new": None}
    name = draw.choice(list(changes))
    return of.files[key], {**manifest, "index": manifest["index"] | {name: changes[name]}}


def _altered_manifest(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    changes = {
        **{"rows": ROWS - 1, "dims": DIM // 2, "dtype": "float16", "layers": 2, "metric": "l2", "normalised": True},
        **{"precision": "bfloat16", "encoder_sha256": "1" * 64, "preprocessing": {}},
    }
    name = draw.choice(list(changes))
    return of.files[key], of.signed(key, mapped) | {name: changes[name]}


def _damaged_manifest(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    """Word by word; the seal is set right where the JSON still can be read."""
    text = damaged_text(json_text(of.signed(key, mapped)).encode(), draw)
    path = of.folder / "damaged.json"
    path.write_bytes(text)
    try:
        entries = read_json(path)
    except DamagedError:
        entries = None
    path.unlink()
    if not isinstance(entries, dict):
        return of.files[key], text
    entries.pop(SEAL, None)
    return of.files[key], json_text(sealed(entries)).encode()


def _unsigned(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    return _by_others(of, key, mapped, draw, of.files[key])


def _unsigned_damaged(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    return _by_others(of, key, mapped, draw, damaged(of.files[key], draw, [of.elsewhere]))


def _lists_elsewhere(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    """FAISS would open the file that they name for reading and writing."""
    data = of.elsewhere if draw.random() < 0.5 else damaged(of.elsewhere, draw, list(of.files.values()))
    return _by_others(of, key, draw.random() < 0.5, draw, data)


def _no_index_at_all(of: IndexTrials, key: str, mapped: bool, draw: random.Random) -> Made:
    return _by_others(of, key, mapped, draw, draw.choice((b"", draw.randbytes(5_000), of.files[key][:4], bytes(100))))


def _by_others(of: IndexTrials, key: str, mapped: bool, draw: random.Random, data: bytes) -> Made:
    """Unsigned, signed with another key, or with something that is no signature of this."""
    manifest = of.signed(key, mapped, draw.choice((None, OTHER, OTHER)), data)
    if draw.random() < 0.5:
        own = of.signed(of.other(key, draw), mapped)["index"]["signature"]
        made = f"{draw.getrandbits(256):064x}"
        odd = (own, own.upper(), own[:-1], made, "", None, 0, True, [own], {"signature": own}, "é" * 64, "9" * 5_000)
        manifest["index"]["signature"] = draw.choice(odd)
    return data, manifest


_OF_MANIFESTS: tuple[Callable[..., Made], ...] = (_altered_manifest, _damaged_manifest)
_SIGNED: tuple[Callable[..., Made], ...] = (
    *(_damaged_file, _damaged_file, _flipped_bits, _listed_anew, _listed_anew, _file_of_another, _entry_of_another),
    *(_altered_entry, *_OF_MANIFESTS),
)
_UNSIGNED: tuple[Callable[..., Made], ...] = (_unsigned, _unsigned_damaged, _lists_elsewhere, _no_index_at_all)
