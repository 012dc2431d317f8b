"""`ssl-kit embed`: an encoder and a source in, an embeddings folder out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

from ssl_kit.core.console import next_command, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, DamagedError, read_manifest
from ssl_kit.data.listing import escape_path
from ssl_kit.data.sources import open_source
from ssl_kit.embeddings import FORMAT, Precision, Storage
from ssl_kit.embeddings import embed as embed_images
from ssl_kit.encoders.encoder import Encoder, find_encoder


def embed(
    encoder: str,
    data: str,
    *,
    out: str,
    dtype: Storage = "float32",
    normalise: bool = False,
    limit: int | None = None,
    batch_size: int = 256,
    precision: Precision = "auto",
    max_bad: float = 0.05,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Turn images into feature vectors; writes an embeddings folder.

    Args:
        encoder: run folder or encoder folder.
        data: folder (searched recursively), .csv or .parquet manifest with a `path` column, or a built-in set.
        out: folder to write: Parquet parts with id, label and embedding, skipped.csv and manifest.json.
        dtype: how vectors are stored; float16 halves the bytes.
        normalise: store vectors of Euclidean length 1.
        limit: embed only so many images, spread over the source, for a first try.
        batch_size: images per forward pass; changes the speed, not the features.
        precision: auto is bfloat16 where the machine is fast at it, float32 elsewhere; float32 is the same everywhere.
        max_bad: fraction of the images that may be undecodable, in [0, 1].
        overwrite: replace an existing embeddings folder.
    """
    folder = Path(out)
    _may_write(folder, overwrite)
    path = find_encoder(encoder)
    loaded = Encoder.load(path).to("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(data, limit=limit, channels=loaded.channels, max_bad=max_bad)

    began = time.perf_counter()
    embeddings = embed_images(loaded, source, batch_size=batch_size, precision=precision)
    seconds = time.perf_counter() - began
    embeddings.info["encoder"] = escape_path(path.resolve())
    if normalise:
        embeddings = embeddings.normalised()
    embeddings.save(folder, dtype)

    count, dims, skipped = len(embeddings), embeddings.vectors.shape[1], len(embeddings.skipped)
    rate = count / max(seconds, 1e-9)
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"{folder}: {count:,} vectors of {dims} {dtype}, {size / 1e6:,.1f} MB, {seconds:.1f} s ({rate:,.0f} images/s)")
    if skipped:
        say(f"{folder / 'skipped.csv'}: {skipped:,} images could not be decoded")
    next_command(f"ssl-kit index {shlex.quote(out)}")
    return {
        "out": escape_path(folder),
        "rows": count,
        "dims": dims,
        "dtype": dtype,
        "normalised": normalise,
        "skipped": skipped,
        "bytes": size,
        "seconds": round(seconds, 3),
        "images_per_second": round(rate, 1),
        "encoder_sha256": loaded.sha256,
    }


def _may_write(folder: Path, overwrite: bool) -> None:
    """Refuses to replace anything but an embeddings folder, and that only when told to."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} exists: choose another --out, or replace it with --overwrite")
    try:
        ours = read_manifest(folder, verify=False).get("format") == FORMAT
    except (DamagedError, NotADirectoryError):
        ours = False
    if not ours:
        raise UserError(f"{folder} is not an embeddings folder ({MANIFEST} says so otherwise); it is not overwritten")
