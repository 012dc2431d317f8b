"""`ssl-kit search`: image files in, the nearest images of an indexed embeddings folder out.

Imports are kept few: a cold start is most of the time that a search takes.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ssl_kit.core.console import next_command, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, DamagedError, read_manifest, verify_file
from ssl_kit.data.decode import BadImageError, decode
from ssl_kit.data.listing import read_regular, unescape
from ssl_kit.encoders.encoder import Encoder, find_encoder
from ssl_kit.evaluation.neighbours import read_index, search_index
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import plain
from ssl_kit.views.sample import sample

FILE = "index.faiss"
_THUMBNAIL = (160, 160)  # pixels


def search(
    emb: str, images: list[str], *, k: int = 12, html: str | None = None, encoder: str | None = None
) -> dict[str, Any]:
    """Find the images most like the given ones in an indexed embeddings folder.

    Args:
        emb: embeddings folder with an index, see `ssl-kit index`.
        images: one or more image files.
        k: images to find for each; at most as many as there are.
        html: file to write the answer to as pictures.
        encoder: run folder or encoder folder, when it is no longer where the embeddings were made.

    Returns:
        `{"emb", "queries": [{"image", "results": [{"rank", "score", "id"}]}], "html"}`; a score is a cosine.
    """
    folder = Path(emb)
    names = [images] if isinstance(images, str) else list(images)
    if k < 1:
        raise UserError(f"-k {k}: wanted at least 1")
    if not names:
        raise UserError("no image was given: name one or more image files after the embeddings folder")
    manifest = _manifest(folder)
    found = read_index(folder / FILE, manifest["rows"], manifest["dims"])
    loaded = _encoder(folder, manifest, encoder)
    pixels = [_read(Path(name), loaded.channels) for name in names]
    cosines, rows = search_index(found, _encode(loaded, pixels, manifest), k)
    ids = _ids(folder, manifest, rows)
    queries = []
    for name, scores, places in zip(names, cosines, rows, strict=True):
        pairs = [(float(score), ids[int(row)]) for score, row in zip(scores, places, strict=True) if row >= 0]
        results = [{"rank": rank, "score": round(score, 6), "id": one} for rank, (score, one) in enumerate(pairs, 1)]
        queries.append({"image": name, "results": results})
        table(name, ["id", "rank", "cosine"], [[one["id"], one["rank"], f"{one['score']:.4f}"] for one in results])
    if html is not None:
        _strip(Path(html), folder, names, pixels, queries, manifest)
    next_command(f"open {html}" if html else f"ssl-kit search {shlex.quote(emb)} IMAGE.jpg --html neighbours.html")
    return {"emb": emb, "queries": queries, "html": html}


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with the index file's sha256 verified."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give an embeddings folder, as `ssl-kit embed ... --out EMB` writes it")
    manifest = read_manifest(folder, verify=False)
    if FILE not in manifest["files"]:
        raise UserError(f"{folder} has no index yet: run `ssl-kit index {shlex.quote(str(folder))}`")
    verify_file(folder, FILE, manifest["files"][FILE])
    if not all(isinstance(manifest.get(name), int) for name in ("rows", "dims", "layers")):
        raise DamagedError(f"{folder / MANIFEST} does not say rows, dims and layers; expected what ssl_kit writes")
    return manifest


def _encoder(folder: Path, manifest: dict[str, Any], given: str | None) -> Encoder:
    """The encoder that made the embeddings, and no other."""
    named = manifest.get("encoder")
    if given is None and (not isinstance(named, str) or not Path(os.fsdecode(unescape(named))).exists()):
        raise UserError(f"the encoder of {folder} is not at {named}: say where it is with --encoder RUN")
    path = find_encoder(given if given is not None else os.fsdecode(unescape(str(named))))
    loaded = Encoder.load(path)
    if loaded.sha256 != manifest.get("encoder_sha256"):
        raise UserError(
            f"index made by another encoder: {folder} by sha256 {manifest.get('encoder_sha256')}, {path} has "
            f"{loaded.sha256}; give the right one with --encoder, or run embed and index again"
        )
    if loaded.preprocessing() != manifest.get("preprocessing"):
        raise UserError(f"{path} prepares images otherwise than {folder / MANIFEST} says; run embed and index again")
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _read(path: Path, channels: int) -> np.ndarray:
    """(H, W, C) uint8."""
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: give image files")
    try:
        return decode(read_regular(os.fsencode(path)), channels).image
    except (BadImageError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {error}; give an image file") from error


def _encode(encoder: Encoder, images: Sequence[np.ndarray], manifest: dict[str, Any]) -> np.ndarray:
    """(Q, D) float32, the way the embeddings were made."""
    view = plain(encoder.image_size)
    heights, widths = np.array([image.shape[:2] for image in images]).T
    params = sample(view, 0, 0, np.arange(len(images)), 0, heights, widths)
    device = next(encoder.parameters()).device
    seen = torch.from_numpy(apply_host(list(images), params, view.size)).to(device)
    reduced = manifest.get("precision") == "bfloat16"
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
        features = encoder.layers(seen.contiguous(memory_format=torch.channels_last), last=manifest["layers"])
    return features.float().cpu().numpy()


def _ids(folder: Path, manifest: dict[str, Any], rows: np.ndarray) -> dict[int, str]:
    """Row -> id for the rows found; only the parts that hold one are read, and verified."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = np.unique(rows[rows >= 0])
    ids: dict[int, str] = {}
    start = 0
    for name in sorted(name for name in manifest["files"] if name.startswith("part-")):
        if start > wanted[-1]:
            break
        try:
            with pq.ParquetFile(folder / name) as file:
                inside = wanted[(wanted >= start) & (wanted < start + file.metadata.num_rows)]
                if len(inside):
                    verify_file(folder, name, manifest["files"][name])
                    column = file.read(columns=["id"])["id"]
                    ids |= {int(row): column[int(row) - start].as_py() for row in inside}
                start += file.metadata.num_rows
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DamagedError(f"{folder / name} cannot be read as Parquet: {error}") from error
    if len(ids) < len(wanted):
        raise DamagedError(f"{folder}: the parts hold {start:,} rows, the index found row {wanted[-1]:,}")
    return ids


def _strip(
    path: Path,
    folder: Path,
    names: Sequence[str],
    pixels: Sequence[np.ndarray],
    queries: Sequence[dict[str, Any]],
    manifest: dict[str, Any],
) -> None:
    from ssl_kit.report.pictures import strip_html

    root, channels = manifest.get("source_root"), pixels[0].shape[2]
    shown = [
        [(one["id"], one["score"], _picture(root, one["id"], channels)) for one in query["results"]]
        for query in queries
    ]
    strip_html(path, f"Nearest images in {folder.name}", list(zip(names, pixels, strict=True)), shown)
    say(f"pictures: {path}")


def _picture(root: str | None, name: str, channels: int) -> np.ndarray | None:
    """The image behind an id, None when it is not there any more, or never was a file below its root."""
    if root is None or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        return None
    try:
        return decode(read_regular(os.path.join(unescape(root), unescape(name))), channels, smallest=_THUMBNAIL).image
    except (BadImageError, OSError):
        return None
