"""`ssl-kit index`: a FAISS index of an embeddings folder, with its recall measured."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from ssl_kit.core.console import next_command, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, atomic_file, lock, read_manifest, sha256, write_json
from ssl_kit.embeddings import Embeddings
from ssl_kit.evaluation.neighbours import build_index, write_index

FILE = "index.faiss"


def index(emb: str, *, key: str = "auto", recall: float = 0.95) -> dict[str, Any]:
    """Build a search index of an embeddings folder and measure its recall.

    Args:
        emb: embeddings folder, written by `ssl-kit embed`.
        key: of FAISS's index factory, such as Flat or IVF1024,SQ8; auto is exact while one query takes under 50 ms.
        recall: wanted recall@10 in (0, 1]; lists are added to each search until held-out queries reach it.
    """
    folder = Path(emb)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give an embeddings folder, as `ssl-kit embed ... --out EMB` writes it")
    if not 0 < recall <= 1:
        raise UserError(f"--recall {recall}: wanted a fraction above 0 and at most 1")
    with lock(folder):
        embeddings = _without_index(folder)
        if len(embeddings) < 2:
            raise UserError(f"{folder} holds {len(embeddings)} vectors; at least 2 are wanted")
        started = time.perf_counter()
        built = build_index(embeddings.vectors, key, recall)
        seconds = time.perf_counter() - started
        with atomic_file(folder / FILE) as temporary:
            write_index(built.index, temporary)
        per_vector = (folder / FILE).stat().st_size / len(embeddings)
        entry = {
            "key": built.key,
            "metric": "cosine",
            "rows": len(embeddings),
            "recall_at_10": round(built.recall, 4),
            "nprobe": built.nprobe,
            "bytes_per_vector": round(per_vector, 1),
            "ms_per_query": round(built.ms_per_query, 3),
        }
        _update(folder, entry)
    table(
        f"{folder / FILE}: {len(embeddings):,} vectors of {embeddings.vectors.shape[1]}, built in {seconds:.1f} s",
        ["key", "recall@10, measured", "bytes per vector", "ms per query"],
        [[built.key, f"{built.recall:.4f}", f"{per_vector:,.1f}", f"{built.ms_per_query:.2f}"]],
    )
    if built.recall < recall:
        say(f"recall {built.recall:.3f} is below the {recall} asked for and the most of {built.key}: try --key Flat")
    next_command(f"ssl-kit search {shlex.quote(emb)} IMAGE.jpg -k 12")
    return {"emb": emb, "index": str(folder / FILE), "seconds": round(seconds, 3), **entry}


def _without_index(folder: Path) -> Embeddings:
    """The verified embeddings, after an index there may be was struck from the manifest.

    The manifest never names an index file other than the one that lies there, wherever the writing is cut off.
    """
    manifest = read_manifest(folder, verify=False)
    if manifest["files"].pop(FILE, None) is not None:
        manifest.pop("index", None)
        write_json(folder / MANIFEST, manifest)
    return Embeddings.load(folder)


def _update(folder: Path, entry: dict[str, Any]) -> None:
    manifest = read_manifest(folder, verify=False)
    manifest["index"] = entry
    manifest["files"] = {**manifest["files"], FILE: sha256(folder / FILE)}
    write_json(folder / MANIFEST, manifest)
