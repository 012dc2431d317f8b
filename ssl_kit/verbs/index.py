"""`ssl-kit index`: a FAISS index of an embeddings folder, with its recall measured."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ssl_kit.core.console import if_interrupted, next_command, table, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, atomic_file, lock, read_manifest, sha256, write_sealed
from ssl_kit.core.sealed import LARGE_JSON
from ssl_kit.data.loading import available_memory
from ssl_kit.evaluation.index import Gallery, build_index
from ssl_kit.evaluation.index_file import read_index, write_index
from ssl_kit.evaluation.searching import FILE, vectors_fingerprint
from ssl_kit.parts import checked, read_rows, read_vectors


def index(emb: str, *, key: str = "auto", recall: float = 0.95, mapped: bool = False) -> dict[str, Any]:
    """Build a search index of an embeddings folder and measure its recall.

    Args:
        emb: embeddings folder, written by `ssl-kit embed`.
        key: of FAISS's index factory, such as Flat or IVF1024,SQ8; auto is exact while one query takes under 50 ms.
        recall: wanted recall@10 in (0, 1]; lists are added to each search until held-out queries reach it.
        mapped: search it from disk, mapped into memory; auto is then lists of 8-bit codes, which can be mapped.
    """
    made = make_index(emb, key, recall, mapped)
    next_command(f"ssl-kit search {shlex.quote(emb)} IMAGE.jpg -k 12")
    return made


def make_index(emb: str, key: str = "auto", recall: float = 0.95, mapped: bool = False) -> dict[str, Any]:
    """What `index` does, but for naming the next command."""
    folder = Path(emb)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give an embeddings folder, as `ssl-kit embed ... --out EMB` writes it")
    if not 0 < recall <= 1:
        raise UserError(f"--recall {recall}: wanted a fraction above 0 and at most 1")
    if mapped and "fs" in key:
        raise UserError(f"--key {key}: fast-scan codes cannot be mapped; use IVFn,SQ8 or auto, or leave --mapped out")
    kept = f"the vectors in {folder} are kept, without an index; the same command makes it"
    with lock(folder), if_interrupted(lambda: kept):
        info = _without_index(folder)
        if info["rows"] < 2:
            raise UserError(f"{folder} holds {info['rows']} vectors; at least 2 are wanted")
        gallery = Gallery(info["rows"], info["dims"], lambda: read_vectors(folder, info))
        started = time.perf_counter()
        built = build_index(gallery, key, recall, memory=available_memory(), mapped=mapped)
        seconds = time.perf_counter() - started
        with atomic_file(folder / FILE) as temporary:
            write_index(built.index, temporary)
            read_index(temporary, info["rows"], info["dims"], mapped)  # not every key of FAISS can be read again
        per_vector = (folder / FILE).stat().st_size / info["rows"]
        entry = {
            "key": built.key,
            "metric": "cosine",
            "rows": info["rows"],
            "recall_at_10": round(built.recall, 4),
            "nprobe": built.nprobe,
            "bytes_per_vector": round(per_vector, 1),
            "ms_per_query": round(built.ms_per_query, 3),
            "mapped": mapped,
            "vectors_sha256": vectors_fingerprint(info),
        }
        _update(folder, entry)
    if len(built.zero):
        names = read_rows(folder, info, built.zero[:3], "id").values()
        warn(f"{len(built.zero):,} vectors are zero, their cosine to anything is 0: {', '.join(map(repr, names))} ...")
    table(
        f"{folder / FILE}: {info['rows']:,} vectors of {info['dims']}, built in {seconds:.1f} s",
        ["key", "recall@10, measured", "bytes per vector", "ms per query"],
        [[built.key, f"{built.recall:.4f}", f"{per_vector:,.1f}", f"{built.ms_per_query:.2f}"]],
    )
    if built.recall < recall:
        warn(f"recall {built.recall:.3f} is below the {recall} asked for and the most of {built.key}: try --key Flat")
    return {"emb": emb, "index": str(folder / FILE), "seconds": round(seconds, 3), **entry}


def _without_index(folder: Path) -> dict[str, Any]:
    """The manifest of the verified embeddings, after an index there may be was struck from it.

    The manifest never names an index file other than the one that lies there, wherever the writing is cut off.
    """
    manifest = read_manifest(folder, verify=False, limit=LARGE_JSON)
    if manifest["files"].pop(FILE, None) is not None:
        manifest.pop("index", None)
        write_sealed(folder / MANIFEST, manifest)
    manifest = read_manifest(folder, limit=LARGE_JSON)
    checked(manifest, folder)
    return manifest


def _update(folder: Path, entry: dict[str, Any]) -> None:
    manifest = read_manifest(folder, verify=False, limit=LARGE_JSON)
    manifest["index"] = entry
    manifest["files"] = {**manifest["files"], FILE: sha256(folder / FILE)}
    write_sealed(folder / MANIFEST, manifest)
