"""`ssl-kit index`: a FAISS index of an embeddings folder, with its recall measured."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from ssl_kit.core.console import if_interrupted, next_command, table, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, atomic_file, beside, read_manifest, verify_file, write_sealed
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import available_memory
from ssl_kit.core.named import manifest_of
from ssl_kit.core.sealed import LARGE_JSON, Entries
from ssl_kit.core.settings import verb
from ssl_kit.embeddings.filling import Filling
from ssl_kit.embeddings.folder import checked, read_rows, read_vectors
from ssl_kit.embeddings.index import SEARCHED_ROWS, Gallery, build_index
from ssl_kit.embeddings.signing import FILE, index_signature, make_key, read_index, vectors_fingerprint, write_index


@dataclass(frozen=True)
class Settings:
    """Which embeddings to index, and how.

    Args:
        emb: embeddings folder, written by `ssl-kit embed`.
        key: of FAISS's index factory, such as Flat or IVF1024,SQ8; auto is exact while one query takes under 50 ms.
        recall: wanted recall@10 in (0, 1]; lists are added to each search until held-out queries reach it.
        mapped: search it from disk, mapped into memory; auto is then lists of 8-bit codes, which can be mapped.
        processes: that add vectors at the same time, in a small part of the memory; the index is mapped then.

    Examples:
        ssl-kit index EMB
        ssl-kit index EMB --key IVF1024,SQ8 --recall 0.99
    """

    emb: str
    _: KW_ONLY
    # How to index
    key: str = "auto"
    recall: float = 0.95
    mapped: bool = False
    processes: int = 1


@verb(Settings)
def index(settings: Settings) -> Entries:
    """Build a search index of an embeddings folder, measure its recall and sign it."""
    made = make_index(settings.emb, settings.key, settings.recall, settings.mapped, settings.processes)
    folder = Path(settings.emb)
    first = read_rows(folder, manifest_of(folder), np.zeros(1, np.int64), "id")[0]
    next_command(shlex.join(["ssl-kit", "search", settings.emb, first, "-k", "12"]))
    return made


def make_index(emb: str, key: str = "auto", recall: float = 0.95, mapped: bool = False, processes: int = 1) -> Entries:
    """What `index` does, but for naming the next command."""
    folder = Path(emb)
    manifest_of(folder)  # before a lock is left in what is none
    mapped = mapped or processes > 1
    if mapped and "fs" in key:
        raise UserError(f"--key {key}: fast-scan codes cannot be mapped; use IVFn,SQ8 or auto, or leave --mapped out")
    kept = f"the vectors in {folder} are kept; the same command makes their index"
    key_of_user = _signing_key(folder)
    scratch = beside(folder / FILE, ".tmp", folder=True) if processes > 1 else nullcontext()
    with lock(folder), if_interrupted(lambda: kept), scratch as there:
        info = _embeddings(folder)
        if info["rows"] < 2:
            raise UserError(f"{folder} holds {info['rows']} vectors; at least 2 are wanted")
        gallery = Gallery(info["rows"], info["dims"], lambda: read_vectors(folder, info, SEARCHED_ROWS))
        started = time.perf_counter()
        filling = None if there is None else Filling(folder, info, processes, there)
        built = build_index(gallery, key, recall, memory=available_memory(), mapped=mapped, filling=filling)
        seconds = time.perf_counter() - started
        _announce(folder)
        with atomic_file(folder / FILE) as temporary:
            digest = write_index(built.index, temporary)
            # not every key of FAISS can be read again
            read_index(temporary, info["rows"], info["dims"], mapped, digest=digest)
            size = temporary.stat().st_size
        entry = {
            "key": built.key,
            "metric": "cosine",
            "rows": info["rows"],
            "recall_at_10": round(built.recall, 4),
            "nprobe": built.nprobe,
            "bytes": size,
            "bytes_per_vector": round(size / info["rows"], 1),
            "ms_per_query": round(built.ms_per_query, 3),
            "mapped": mapped,
            "vectors_sha256": vectors_fingerprint(info),
        }
        _list(folder, entry, digest, key_of_user)
    if len(built.zero):
        names = read_rows(folder, info, built.zero[:3], "id").values()
        warn(f"{len(built.zero):,} vectors are zero, their cosine to anything is 0: {', '.join(map(repr, names))} ...")
    table(
        f"{folder / FILE}: {info['rows']:,} vectors of {info['dims']}, built in {seconds:.1f} s",
        ["key", "recall@10, measured", "bytes per vector", "ms per query"],
        [[built.key, f"{built.recall:.4f}", f"{entry['bytes_per_vector']:,.1f}", f"{built.ms_per_query:.2f}"]],
    )
    if built.recall < recall:
        warn(f"recall {built.recall:.3f} is below the {recall} asked for and the most of {built.key}: try --key Flat")
    return {"emb": emb, "index": str(folder / FILE), "seconds": round(seconds, 3), **entry}


def _signing_key(folder: Path) -> bytes | None:
    """The key to sign with, made if there is none; None where none can be kept, which is said."""
    try:
        return make_key()
    except OSError as error:
        warn(
            f"{folder / FILE} will not be signed, for no key can be kept ({error}): searches without --trust-index "
            "will answer exactly from the vectors; a key can be given as SSL_KIT_KEY"
        )
        return None


def _embeddings(folder: Path) -> Entries:
    """The manifest of the verified embeddings, where an index may be written.

    Raises:
        UserError: an index file lies there that the manifest does not name, so it is not ours, or a link.
    """
    manifest, path = manifest_of(folder), folder / FILE
    pending = manifest.get("pending")
    ours = manifest["files"].pop(FILE, None) is not None or (isinstance(pending, list) and FILE in pending)
    if path.is_symlink() or (os.path.lexists(path) and not (ours and path.is_file())):
        what = "is a link" if path.is_symlink() else f"is not named by {folder / MANIFEST}"
        raise UserError(f"{path} {what}: it is not overwritten; move it away and index again")
    for name, wanted in manifest["files"].items():  # an index that was damaged is no obstacle
        verify_file(folder, name, wanted)
    checked(manifest, folder)
    return manifest


def _announce(folder: Path) -> None:
    """Strikes a former index from the manifest and names the file to come.

    The manifest never lists an index other than the one that lies there, and always names what lies there, wherever
    the writing is cut off.
    """
    manifest = read_manifest(folder, verify=False, limit=LARGE_JSON)
    manifest["files"].pop(FILE, None)
    manifest.pop("index", None)
    write_sealed(folder / MANIFEST, manifest | {"pending": [FILE]})


def _list(folder: Path, entry: Entries, digest: str, key: bytes | None) -> None:
    """Lists the index that was written, signed if there is a key."""
    manifest = read_manifest(folder, verify=False, limit=LARGE_JSON)
    manifest.pop("pending", None)
    manifest["index"] = entry
    manifest["files"] = {**manifest["files"], FILE: digest}
    if key is not None:
        entry["signature"] = index_signature(key, manifest)
    write_sealed(folder / MANIFEST, manifest)
