"""`ssl-kit embed`: an encoder and a source in, an embeddings folder out, in bounded memory; stopped runs go on."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ssl_kit.core.console import if_interrupted, next_command, result, retyped, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, read_manifest
from ssl_kit.core.named import check_free, find_encoder, is_embeddings, is_free, is_packaged
from ssl_kit.core.owned import Former, check_place
from ssl_kit.core.reading import Function
from ssl_kit.core.sealed import LARGE_JSON, Entries
from ssl_kit.core.settings import verb
from ssl_kit.data.listing import escape_path
from ssl_kit.data.opening import open_source, places
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Precision, Storage
from ssl_kit.embeddings.folder import read_rows
from ssl_kit.embeddings.store import Embedded, Engine, Making, Shard, embed_to, former, parse_shard
from ssl_kit.encoders.encoder import Encoder


@dataclass(frozen=True)
class Settings:
    """What to embed, and where to.

    Args:
        encoder: run folder, encoder folder, or photos32, which comes with the package.
        data: folders (searched recursively), a .csv or .parquet manifest with a `path` column, shards, a built-in set.
        out: folder to write: Parquet parts with id, label and embedding, skipped.csv and manifest.json.
        dtype: how vectors are stored; float16 halves the bytes.
        normalise: store vectors of Euclidean length 1.
        layers: concatenate the outputs of so many last stages (CNN) or blocks (ViT) to one vector.
        shard: i/N makes every N-th part of 65,536 images, i from 0; the last shard to end completes the folder.
        engine: ray has workers of Ray make the parts, on this machine or on the cluster at RAY_ADDRESS.
        limit: embed only so many images, spread over the source, for a first try.
        reader: module:function of your own that reads the files, behind --allow MODULE: (bytes, id) -> array.
        batch_size: images per forward pass; changes the speed, not the features.
        precision: auto is bfloat16 where the machine is fast at it, float32 elsewhere; float32 is the same everywhere.
        max_bad: fraction of the images that may be undecodable, in [0, 1]; 0 is strict: the first one is an error.
        overwrite: replace the embeddings and the index that are there, which go when the new ones are complete.

    Examples:
        ssl-kit embed runs/photos photos --out EMB
        ssl-kit embed runs/photos photos --out EMB --dtype float16 --shard 0/4
    """

    encoder: str
    data: list[str] | str
    _: KW_ONLY
    # What to read
    limit: int | None = None
    reader: Function | None = None
    max_bad: float = 0.05
    shard: str | None = None
    engine: Literal["here", "ray"] = "here"
    # What to store
    dtype: Storage = "float32"
    normalise: bool = False
    layers: int = 1
    # Where it goes
    out: str
    overwrite: bool = False
    # The machine
    batch_size: int = 256
    precision: Precision = "auto"


@verb(Settings)
def embed(settings: Settings) -> Entries:
    """Turn images into feature vectors; writes an embeddings folder. The same command again goes on after a stop."""
    folder = Path(settings.out)
    part = parse_shard(settings.shard) if settings.shard is not None else None
    engine = _by_ray(settings) if settings.engine == "ray" else None
    path = find_encoder(settings.encoder)
    loaded = _loaded(settings)
    check_place(folder, places(settings.data), removing=settings.overwrite)
    _may_write(folder, settings.overwrite, settings.shard)
    source = _source(settings, loaded)
    whole = torch.zeros(1, loaded.channels, *loaded.image_size, device=next(loaded.parameters()).device)
    with torch.inference_mode():  # nothing is removed for what cannot be made
        loaded.layers(whole, settings.layers)
    replaced = former(folder)
    if settings.overwrite or not _parts(folder):
        replaced.settle((folder / MANIFEST).is_file())
    if settings.overwrite and folder.is_dir():
        replaced.set_aside()

    began = time.perf_counter()
    with (
        _put_back_unless_begun(replaced),
        if_interrupted(lambda: f"{_parts(folder)} finished parts are kept; the same command goes on"),
    ):
        done = embed_to(
            folder,
            loaded,
            source,
            encoder_path=escape_path(settings.encoder if is_packaged(settings.encoder) else path.resolve()),
            shard=part,
            engine=engine,
            **_how(settings),
        )
    seconds = time.perf_counter() - began
    record = {
        "out": escape_path(folder),
        "complete": done.complete,
        "dtype": settings.dtype,
        "normalised": settings.normalise,
    }
    record |= {"layers": settings.layers, "encoder_sha256": loaded.sha256, "embedded": done.images}
    record |= {"seconds": round(seconds, 3), "images_per_second": round(done.images / max(seconds, 1e-9), 1)}
    return record | (
        _completed(folder, settings.out, done, record)
        if done.complete
        else _waiting(folder, done, record, source, part)
    )


def _loaded(settings: Settings) -> Encoder:
    return Encoder.load(find_encoder(settings.encoder)).to("cuda" if torch.cuda.is_available() else "cpu")


def _source(settings: Settings, encoder: Encoder) -> Source:
    """The images, decoded when needed: each is looked at once, and rows do not depend on how much memory is free."""
    return open_source(
        settings.data,
        limit=settings.limit,
        reading=encoder.reading.by(settings.reader),
        max_bad=settings.max_bad,
        in_memory=False,
    )


def _how(settings: Settings) -> dict[str, Any]:
    """What of the settings decides the vectors and how they are stored."""
    return {name: getattr(settings, name) for name in ("layers", "batch_size", "precision", "dtype", "normalise")}


def _by_ray(settings: Settings) -> Engine:
    from ssl_kit.embeddings.by_ray import by_ray

    return partial(by_ray, partial(_worker, replace(settings, overwrite=False), os.getcwd()))


def _worker(settings: Settings, place: str, threads: int) -> Callable[[int], None]:
    """What a worker of Ray does with a part; it works where the command was typed."""
    os.chdir(place)
    loaded = _loaded(settings)
    return Making(Path(settings.out), loaded, _source(settings, loaded), threads=threads, **_how(settings)).part


def _parts(folder: Path) -> int:
    """Finished parts of a folder that has no manifest yet."""
    return len([*folder.glob("part-*.json")])


@contextmanager
def _put_back_unless_begun(replaced: Former) -> Iterator[None]:
    """Puts former embeddings back where not a single part of the new ones was finished."""
    try:
        yield
    except BaseException:
        if not _parts(replaced.folder):
            replaced.settle(False)
        raise


def _completed(folder: Path, out: str, done: Embedded, record: Entries) -> Entries:
    """Says what the finished folder holds, and records it."""
    manifest = read_manifest(folder, verify=False, limit=LARGE_JSON)
    size = sum((folder / name).stat().st_size for name in (*manifest["files"], MANIFEST))
    what = f"{manifest['rows']:,} vectors of {manifest['dims']} {record['dtype']}, {size / 1e6:,.1f} MB"
    if done.images:
        result(f"{folder}: {what}, {record['seconds']:.1f} s ({record['images_per_second']:,.0f} images/s)")
    else:
        result(
            f"{folder}: {what}; nothing was left to embed (changed images are not noticed: --overwrite embeds again)"
        )
    if manifest["skipped"]:
        result(f"{folder / 'skipped.csv'}: {manifest['skipped']:,} images could not be decoded")
    if manifest["rows"]:
        first = read_rows(folder, manifest, np.zeros(1, np.int64), "id")[0]
        next_command(shlex.join(["ssl-kit", "search", out, first, "-k", "12"]))
    return {name: manifest[name] for name in ("rows", "dims", "skipped")} | {"bytes": size}


def _waiting(folder: Path, done: Embedded, record: Entries, source: Source, part: Shard | None) -> Entries:
    """Says which parts are still to come."""
    rate = f"{record['images_per_second']:,.0f} images/s"
    result(
        f"{folder}: {done.parts - done.missing:,} of {done.parts:,} parts of {len(source):,} images are there ({rate})"
    )
    say("wanting: the other shards; where their folders are apart, copy them into one and give this command again")
    if part is not None:
        other = (part.number + 1) % part.total
        next_command(f"{retyped('ssl-kit embed', 'shard')} --shard {other}/{part.total}", own=False)
    return {"parts": done.parts, "missing": done.missing}


def _may_write(folder: Path, overwrite: bool, shard: str | None) -> None:
    """Refuses to touch anything but an embeddings folder, and to remove one unless told to."""
    if is_free(folder):
        return
    if overwrite:
        if shard is not None:
            raise UserError("--overwrite with --shard would remove what other shards made: remove the folder yourself")
        if not is_embeddings(folder) and not former(folder):
            raise UserError(
                f"{folder} is not an embeddings folder ({MANIFEST} says so otherwise); it is not overwritten"
            )
    elif not is_embeddings(folder):
        check_free(folder)
