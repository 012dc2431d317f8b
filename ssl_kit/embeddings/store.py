"""An embeddings folder made part by part, in bounded memory, each part safe on disk at once. `folder.py` reads it.

While it is being made, the folder of embeddings (see embeddings.py) holds

    plan.json              what is being made: which images, encoder and settings
    part-00000.parquet     a finished part
    part-00000.json        its record: rows, dims, sha256, what was skipped, sha256 of the plan; written after the part

and no manifest.json, so that nobody takes it for finished. Whoever finds all parts there verifies them, writes the
manifest and removes plan and records. A part is a pure function of plan and images: processes may make different parts
of one folder at the same time (shards), on one machine or on several whose folders are copied together, may be killed
at any moment and started again, and the bytes are those of one undisturbed run on the same kind of machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from rich.progress import Progress

import ssl_kit
from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import (
    MANIFEST,
    NotOursError,
    atomic_file,
    is_inside,
    sha256,
    verify_file,
    write_sealed,
)
from ssl_kit.core.locking import lock
from ssl_kit.core.named import FORMAT, PLAN, is_embeddings
from ssl_kit.core.owned import Former
from ssl_kit.core.sealed import LARGE_JSON, Entries, fingerprint, read_object, read_sealed
from ssl_kit.data.listing import write_skipped
from ssl_kit.data.sources import Source, pixels
from ssl_kit.embeddings.embeddings import (
    SKIPPED,
    Embeddings,
    Precision,
    batches_of,
    chosen_precision,
    describe,
    gathered,
    part_slices,
    whole,
)
from ssl_kit.embeddings.folder import (
    Storage,
    check_range,
    part_name,
    write_part,
)
from ssl_kit.encoders.encoder import Encoder

# What killed writers have left
_LITTER = r"\.(part-\d{5,}\.\w+|\w+\.json|skipped\.csv)\.[a-z0-9_]{8}\.tmp"
_LISTED, _AT_ONCE = 65_536, 256  # ids that are hashed as one list, and that are strings at a time


Engine: TypeAlias = Callable[[Sequence[int]], Iterable[int]]  # has parts made; their numbers come as they are there


class Shard(NamedTuple):
    """The parts whose number leaves `number` when divided by `total`; 0 of 1 is all of them."""

    number: int
    total: int


@dataclass(frozen=True)
class Embedded:
    """What a call did.

    Attributes:
        complete: whether the folder has its manifest, all parts being there.
        parts: of the whole source.
        missing: parts that other shards still have to make.
        images: that this call embedded, undecodable ones included.
    """

    complete: bool
    parts: int
    missing: int
    images: int


def _record_name(number: int) -> str:
    return part_name(number).removesuffix("parquet") + "json"


def parse_shard(text: str) -> Shard:
    """`"0/4"` ... `"3/4"`, as array jobs count."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and int(number) < int(total)):
        raise UserError(f"--shard {text}: wanted i/N with i from 0 to N - 1, such as 0/4, 1/4, 2/4, 3/4")
    return Shard(int(number), int(total))


def embed_to(
    folder: Path,
    encoder: Encoder,
    source: Source,
    *,
    encoder_path: str | None = None,
    layers: int = 1,
    batch_size: int = 256,
    precision: Precision = "auto",
    dtype: Storage = "float32",
    normalise: bool = False,
    shard: Shard | None = None,
    threads: int | None = None,
    engine: Engine | None = None,
) -> Embedded:
    """Embeds the parts of a shard that are not there yet, and completes the folder when no part is missing.

    Args:
        folder: new, or left by an earlier call with the same images, encoder and settings.
        encoder: loaded from a folder, so that it knows its sha256.
        source: the images, best decoded when needed (`in_memory=False`): each is looked at once.
        encoder_path: where the encoder lies, for the manifest.
        layers: concatenate the outputs of so many last stages or blocks.
        batch_size: images per forward pass.
        precision: see `embed`.
        dtype: how vectors are stored.
        normalise: store vectors of Euclidean length 1.
        shard: which parts are made here; None = all.
        threads: for decoding and resizing; None = all cores of this process.
        engine: other processes that make the parts, each with a `Making` of its own; None = this one does.

    Raises:
        UserError: the folder was begun with other images, another encoder or other settings; too many images cannot be
            decoded.
        DamagedError: a finished part is not what its record says.
    """
    making = Making(folder, encoder, source, layers, batch_size, precision, dtype, normalise, threads)
    plan = making.plan
    parts, shard = part_slices(len(source)), shard or Shard(0, 1)
    if (folder / MANIFEST).exists():  # finished before, perhaps killed before it was tidied up
        _same_plan(read_sealed(folder / MANIFEST, LARGE_JSON).get("plan"), plan, folder)
        _tidy(folder, plan)
        return Embedded(True, len(parts), 0, 0)
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, plan)
    made = {number for number in range(len(parts)) if making.record(number) is not None}
    todo = [number for number in range(shard.number, len(parts), shard.total) if number not in made]
    images = sum(parts[number].stop - parts[number].start for number in todo)
    with progress(images, "embedding") as bar:
        for number in () if engine else todo:
            making.make(number, parts[number], bar)
        for number in engine(todo) if engine and todo else ():
            if making.record(number) is None:
                raise UserError(f"part {number} is not in {folder}: Ray's machines must all see that folder")
            bar.advance(bar.task_ids[0], parts[number].stop - parts[number].start)
    missing = sum(making.record(number) is None for number in range(len(parts)))  # others have been at work meanwhile
    if not missing:
        _complete(folder, making, {"encoder": encoder_path, "plan": plan}, len(parts))
    return Embedded(not missing, len(parts), missing, images)


def _plan(source: Source, about: Entries, batch_size: int, dtype: Storage) -> Entries:
    """Everything that decides the bytes of the parts."""
    return {
        "images": len(source),
        "images_sha256": _fingerprint(source),
        "part_rows": part_slices(len(source))[0].stop,
        "batch_size": batch_size,
        "dtype": dtype,
        "torch": torch.__version__,
        "ssl_kit": ssl_kit.__version__,
        **{name: about[name] for name in ("layers", "precision", "normalised", "encoder_sha256", "preprocessing")},
    }


def _fingerprint(source: Source) -> str:
    """Hex sha256 of ids and labels, and of the pixels of a source that has no files.

    Files are not looked at: 10^7 of them on a network drive would take an hour for each shard.
    """
    digest = hashlib.sha256(
        json.dumps([len(source), source.classes, source.channels, source.reading.to_json()]).encode()
    )
    digest.update(source.labels().data)
    for start in range(0, len(source), _LISTED):
        end = min(start + _LISTED, len(source))
        for first in range(start, end, _AT_ONCE):  # the text of one list, piece by piece
            piece = json.dumps(source.ids(slice(first, min(first + _AT_ONCE, end))))[1:-1]
            digest.update(f"{', ' if first > start else '['}{piece}".encode())
        digest.update(b"]")
    if source.root is None:
        for row in range(len(source)):
            digest.update(np.ascontiguousarray(pixels(source, row)).data)
    return digest.hexdigest()


def _begin(folder: Path, plan: Entries) -> None:
    """Writes the plan, or compares it with the one that is there."""
    if (folder / PLAN).exists():
        _same_plan(read_sealed(folder / PLAN), plan, folder)
    else:
        for name in (PLAN, SKIPPED, *_parts_of(plan, folder)):
            if os.path.lexists(folder / name):
                raise NotOursError(f"{folder / name} is not ssl_kit's: move it away, or choose another --out")
        write_sealed(folder / PLAN, plan)


def _same_plan(begun: object, plan: Entries, folder: Path) -> None:
    if begun == plan:
        return
    if not isinstance(begun, dict):
        raise UserError(f"{folder} holds embeddings that were not made here: choose another --out, or give --overwrite")
    differs = [name for name in plan if begun.get(name) != plan[name]]
    told = ", ".join(f"{name} {_short(begun.get(name))}, now {_short(plan[name])}" for name in differs)
    raise UserError(f"{folder} was begun otherwise ({told}): give the same again, or start anew with --overwrite")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


@dataclass
class Making:
    """What every part of a folder is made with: the arguments of `embed_to`. Another process makes its own.

    Raises:
        UserError: the folder was begun otherwise: by another version of torch, or of images that this machine lacks.
    """

    folder: Path
    encoder: Encoder
    source: Source
    layers: int
    batch_size: int
    precision: Precision
    dtype: Storage
    normalise: bool
    threads: int | None

    def __post_init__(self) -> None:
        self.precision = chosen_precision(self.precision, self.encoder)
        about = describe(self.encoder, self.source, whole(self.encoder), self.layers, self.precision)
        self.about: Entries = {**about, "normalised": self.normalise}
        self.plan = _plan(self.source, self.about, self.batch_size, self.dtype)
        self.digest = fingerprint(self.plan)

    def part(self, number: int) -> None:
        """Makes a part of the folder that another process has begun, if it is not there."""
        _begin(self.folder, self.plan)
        part = part_slices(len(self.source))[number]
        if self.record(number) is None:
            with progress(part.stop - part.start, "embedding") as bar:
                self.make(number, part, bar)

    def record(self, number: int) -> Entries | None:
        """The record of a finished part, or None. What it skipped counts towards `--max-bad`."""
        path = self._record_path(number)
        if not path.exists():
            return None
        record = read_sealed(path, LARGE_JSON)
        if record.get("plan") != self.digest:
            raise UserError(f"{path} belongs to other embeddings than {self.folder / PLAN}: remove it, or --overwrite")
        if record["sha256"] is not None and not (self.folder / part_name(number)).exists():
            return None  # copied without its part
        for name, reason in record["skipped"]:
            self.source.bad.add(name, reason)
        self.source.bad.check()
        return record

    def make(self, number: int, part: slice, bar: Progress) -> Entries:
        """Embeds one part and writes it, then its record."""
        vectors, rows = gathered(
            self.encoder,
            self.source,
            batches_of(part, self.batch_size),
            bar,
            layers=self.layers,
            view=whole(self.encoder),
            precision=self.precision,
            threads=self.threads,
        )
        record: Entries = {"plan": self.digest, "rows": len(rows), "dims": 0, "sha256": None}
        if len(rows):  # a part without a single good image has no file
            made = Embeddings(vectors, self.source.labels(rows), self.source.classes, self.source.ids(rows))
            made = made.normalised() if self.normalise else made
            check_range(made.vectors, self.dtype)
            path = self.folder / part_name(number)
            with atomic_file(path) as temporary:
                write_part(temporary, made.vectors, made.labels, made.classes, made.ids, self.dtype)
            record |= {"dims": vectors.shape[1], "sha256": sha256(path)}
        inside = set(self.source.ids(part))
        record["skipped"] = sorted([name, reason] for name, reason in list(self.source.bad.rows) if name in inside)
        write_sealed(self._record_path(number), record)
        return record

    def _record_path(self, number: int) -> Path:
        return self.folder / _record_name(number)


def _complete(folder: Path, making: Making, more: Entries, parts: int) -> None:
    """Verifies all parts and writes the manifest."""
    with lock(folder, wait=True):  # shards that end together wait here for the first
        if (folder / MANIFEST).exists():
            return
        records = [making.record(number) for number in range(parts)]
        files, skipped, rows, dims = {}, [], 0, 0
        for number, record in enumerate(records):
            assert record is not None, "all parts are there"
            skipped += [(name, reason) for name, reason in record["skipped"]]
            rows += record["rows"]
            if record["sha256"] is not None:
                verify_file(folder, part_name(number), record["sha256"])
                files[part_name(number)] = record["sha256"]
                dims = record["dims"]
        if not rows:
            raise UserError(f"none of {len(making.source):,} images could be decoded; see --max-bad")
        write_skipped(folder / SKIPPED, skipped)
        manifest = {
            **making.about,
            **more,
            "format": FORMAT,
            "rows": rows,
            "dims": dims,
            "dtype": making.dtype,
            "classes": list(making.source.classes),
            "skipped": len(skipped),
            "files": {**files, SKIPPED: sha256(folder / SKIPPED)},
        }
        write_sealed(folder / MANIFEST, manifest)
        _tidy(folder, making.plan)


def _tidy(folder: Path, plan: Entries) -> None:
    """Removes what is needed only until the manifest is there, what killed writers left, and what was replaced."""
    records = [name for name in _parts_of(plan, folder) if name.endswith(".json")]
    litter = [path.name for path in folder.iterdir() if re.fullmatch(_LITTER, path.name)]
    for name in (*records, *litter, PLAN):
        (folder / name).unlink(missing_ok=True)
    former(folder).remove()


def former(folder: Path) -> Former:
    """The embeddings that `--overwrite` replaces, finished or not."""
    return Former(folder, our_files, MANIFEST if (folder / MANIFEST).is_file() else PLAN)


def our_files(folder: Path) -> list[str]:
    """Names of the files of ours in a folder of embeddings: what its manifest lists, or the plan of a begun one.

    A manifest that was altered is believed as far as names go: what it tells of may still be overwritten.
    """
    names: set[str] = set()
    if is_embeddings(folder) and (folder / MANIFEST).is_file():
        manifest = read_object(folder / MANIFEST, LARGE_JSON)
        told = [*(manifest.get("files") or ()), *(manifest.get("pending") or ())]
        names = {MANIFEST, *filter(is_inside, told)}
    elif is_embeddings(folder):
        names = {PLAN, SKIPPED, *_parts_of(read_object(folder / PLAN), folder)}
    return sorted(name for name in names if (folder / name).is_file() and not (folder / name).is_symlink())


def _parts_of(plan: Entries, folder: Path) -> list[str]:
    """The files in the folder that are parts which a plan asks for, or their records."""
    images, rows = plan.get("images"), plan.get("part_rows")
    count = -(-images // rows) if type(images) is int and type(rows) is int and rows > 0 else 0
    found = ((name, re.fullmatch(r"part-(\d{5,})\.(parquet|json)", name)) for name in sorted(os.listdir(folder)))
    return [name for name, part in found if part is not None and int(part[1]) < count]
