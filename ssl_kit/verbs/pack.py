"""`ssl-kit pack`: images in, shards out: a few large files that are read and decoded several times as fast.

The folder then holds 000000.tar, 000001.tar, ... (WebDataset: `cat/7.jpg`, and `cat/7.cls`, the number of its class),
index.parquet (data/shards.py), skipped.csv and manifest.json. While it is being made there are plan.json, which fixes
the images of every shard, and a record of each finished one beside it, but no manifest. A shard is a pure function of
plan and images: a command that was killed is given again, and what it leaves are the bytes of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import simplejpeg
from numpy.lib import format as npy
from PIL import Image

import ssl_kit
from ssl_kit.core.console import if_interrupted, next_command, progress, result
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, atomic_file, check_space, sha256, write_sealed
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import available_cores, in_order
from ssl_kit.core.named import PLAN, is_free
from ssl_kit.core.owned import check_place
from ssl_kit.core.reading import reading_of
from ssl_kit.core.sealed import LARGE_JSON, Entries, fingerprint, read_sealed
from ssl_kit.core.settings import verb
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import EXTENSIONS, escape_path, write_skipped
from ssl_kit.data.opening import open_source, places
from ssl_kit.data.shards import FORMAT, INDEX, lengths_of, write_index
from ssl_kit.data.sources import Source, pixels, sampled, size_of
from ssl_kit.data.tar import BLOCK, Members

SKIPPED = "skipped.csv"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TRIED = 64  # images that are packed to tell how large all are
_JPEG_SIDE = 65_500  # pixels, as libjpeg has it
_LISTED = 2**16  # ids that are hashed at a time


@dataclass(frozen=True)
class Settings:
    """What to pack, and where to.

    Args:
        data: folders (searched recursively), a .csv or .parquet manifest with a `path` column, shards, a built-in set.
        out: folder to write: tar files, index.parquet, skipped.csv and manifest.json.
        size: pixels of the shorter side; smaller images stay as they are.
        quality: of the JPEGs, 1 to 100.
        raw: store pixels as .npy instead of JPEG: several times the bytes, nothing to decode, nothing lost.
        keep: store the files byte for byte, at their own size.
        shard_size: bytes of a shard, about: 512MB.
        channels: of the images: 3, 1, as many as a TIFF or array has bands, or names of bands: red,nir.
        range: of images of more than 8 bits: auto, full or LOW,HIGH; see `ssl-kit pretrain --help`.
        max_bad: fraction of the images that may be undecodable, in [0, 1]; 0 is strict: the first one is an error.

    Examples:
        ssl-kit pack photos packed
        ssl-kit pack photos packed --raw --size 160
    """

    data: list[str] | str
    out: str
    _: KW_ONLY
    # What to read
    channels: int | str = 3
    range: str = "auto"
    max_bad: float = 0.05
    # What to store
    size: int = 256
    quality: int = 90
    raw: bool = False
    keep: bool = False
    shard_size: str = "512MB"

    @property
    def bytes_per_shard(self) -> int:
        """What `shard_size` says.

        Raises:
            UserError: no number of bytes.
        """
        found = re.fullmatch(r"([\d_]+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(self.shard_size).strip().lower())
        count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
        if count < 1:
            raise UserError(f"--shard-size {self.shard_size}: wanted bytes, such as 512MB")
        return count


@verb(Settings)
def pack(settings: Settings) -> Entries:
    """Write images as shards that train several times faster. The same command again goes on after a stop."""
    folder = Path(settings.out)
    if settings.raw and settings.keep:
        raise UserError("got --raw and --keep; give one of them")
    if settings.size < 1 or not 1 <= settings.quality <= 100:
        raise UserError(f"--size {settings.size}, --quality {settings.quality}: wanted pixels, and 1 to 100")
    most = settings.bytes_per_shard
    check_place(folder, places(settings.data))
    if not is_free(folder) and not (folder / PLAN).is_file() and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds other things than shards: choose another OUT")
    reading, measure = reading_of(settings.channels, settings.range)
    source = open_source(
        settings.data, reading=reading, measure=measure, in_memory=False, max_bad=settings.max_bad, least=1
    )
    began = time.perf_counter()
    with lock(folder), if_interrupted(lambda: "finished shards are kept; the same command goes on"):
        packing = _Packing(settings, source, folder, _planned(settings, source, folder, most))
        made = packing.run() if not packing.is_complete() else 0
        packing.tidy()
    return _told(settings, folder, made, time.perf_counter() - began)


def _told(settings: Settings, folder: Path, made: int, seconds: float) -> Entries:
    """Says what the folder holds."""
    said = read_sealed(folder / MANIFEST, LARGE_JSON)
    size = sum(said["shards"].values())
    what = f"{said['images']:,} images in {len(said['shards']):,} shards, {size / 1e6:,.1f} MB"
    rate = f"{seconds:.1f} s ({made / max(seconds, 1e-9):,.0f} images/s)" if made else "nothing was left to pack"
    result(f"{folder}: {what}; {rate}")
    if said["skipped"]:
        result(f"{folder / SKIPPED}: {said['skipped']:,} images could not be packed")
    next_command(f"ssl-kit pretrain {shlex.quote(settings.out)}")
    return {
        "out": escape_path(folder),
        "images": said["images"],
        "shards": len(said["shards"]),
        "bytes": size,
        "skipped": said["skipped"],
        "packed": made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / max(seconds, 1e-9), 1),
    }


def _planned(settings: Settings, source: Source, folder: Path, most: int) -> Entries:
    """What is packed, and how; compared with what was begun, or written.

    Raises:
        UserError: it was begun otherwise.
    """
    how = {
        "format": FORMAT,
        "images": len(source),
        "images_sha256": _listing(source),
        "stored": "bytes" if settings.keep else "raw" if settings.raw else f"JPEG {settings.quality}",
        "size": None if settings.keep else settings.size,
        "reading": {"channels": source.channels, **source.reading.to_json()},
        "shard_bytes": most,
        "made_by": {
            "ssl_kit": ssl_kit.__version__,
            "Pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            "numpy": np.__version__,
        },
    }
    there = next((folder / name for name in (MANIFEST, PLAN) if (folder / name).is_file()), None)
    if there is not None:
        said = read_sealed(there, LARGE_JSON)
        begun = said if there.name == PLAN else said.get("plan")
        differs = [name for name in how if not isinstance(begun, dict) or begun.get(name) != how[name]]
        if differs:
            raise UserError(f"{folder} was begun otherwise ({', '.join(differs)}): give the same again, or another OUT")
        assert isinstance(begun, dict)
        return {name: value for name, value in begun.items() if name != "seal"}
    plan = how | {"ends": _ends(settings, source, most)}
    check_space(folder, most)
    write_sealed(folder / PLAN, plan)
    return plan


def _listing(source: Source) -> str:
    """Hex sha256 of ids and labels, in their order."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    digest.update(source.labels().data)
    for start in range(0, len(source), _LISTED):
        digest.update(json.dumps(source.ids(slice(start, start + _LISTED))).encode())
    return digest.hexdigest()


def _ends(settings: Settings, source: Source, most: int) -> list[int]:
    """Where each shard ends among the images: by their bytes, where these are known before, else by those of a few."""
    beside = BLOCK * (1 + 2 * bool(source.classes))  # the header, and what names the class
    if settings.keep:
        taken = source.lengths(slice(None)) + BLOCK // 2 + beside
    else:
        found = [len(packed_image(settings, source, int(row))[0]) for row in sampled(source, _TRIED)]
        mean = float(np.mean([length for length in found if length] or [1]))
        taken = np.full(len(source), mean + BLOCK // 2 + beside)
    number = (np.cumsum(taken) - taken) // most
    return [*(np.flatnonzero(np.diff(number)) + 1).tolist(), len(source)]


def packed_image(settings: Settings, source: Source, row: int) -> tuple[bytes, str]:
    """The bytes of an image as it is packed, and their ending; of a bad one none, and why."""
    try:
        return _stored(settings, source, row)
    except BadImageError as error:
        return b"", str(error)


def _stored(settings: Settings, source: Source, row: int) -> tuple[bytes, str]:
    """The bytes of an image as it is packed, and their ending.

    Raises:
        BadImageError: it cannot be decoded; UserError: it cannot be stored in this way.
    """
    name = source.ids([row])[0]
    if settings.keep:
        stored = source.read([row])[0]
        if isinstance(stored, np.ndarray):
            raise UserError(f"--keep: {name!r} is no file; leave --keep out, or store pixels with --raw")
        size_of(stored)
        assert isinstance(stored, bytes), "what is bad has no size"
        return stored, _ending(name) or ".jpg"
    image = _fitted(pixels(source, row, (settings.size, settings.size)), settings.size)
    if settings.raw:
        data = io.BytesIO()
        npy.write_array(data, image if image.shape[2] > 1 else image[:, :, 0], allow_pickle=False)
        return data.getvalue(), ".npy"
    if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
        what = f"{8 * image.itemsize} bits and {image.shape[2]} channels"
        raise UserError(f"{name!r} has {what}, which no JPEG holds: give --raw, or --keep")
    if max(image.shape[:2]) > _JPEG_SIDE:
        raise BadImageError(
            f"{max(image.shape[:2]):,} pixels wide or high; no JPEG has more than {_JPEG_SIDE:,}: give --raw"
        )
    colours = "RGB" if image.shape[2] == 3 else "GRAY"
    return simplejpeg.encode_jpeg(image, quality=settings.quality, colorspace=colours, colorsubsampling="420"), ".jpg"


def _fitted(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) with a shorter side of `size` pixels at most."""
    height, width, channels = image.shape
    scale = size / min(height, width)
    if scale >= 1:
        return np.ascontiguousarray(image)
    to = max(size, round(width * scale)), max(size, round(height * scale))
    if image.dtype == np.uint8 and channels in (1, 3):
        made = Image.fromarray(image if channels == 3 else image[:, :, 0]).resize(to, Image.Resampling.BICUBIC)
        return np.asarray(made).reshape(to[1], to[0], channels)
    most = np.iinfo(image.dtype).max
    bands = [Image.fromarray(image[:, :, band].astype(np.float32)) for band in range(channels)]
    resized = np.stack([np.asarray(band.resize(to, Image.Resampling.BICUBIC)) for band in bands], axis=2)
    return np.rint(resized.clip(0, most)).astype(image.dtype)


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1]
    return ending if ending.lower() in (*EXTENSIONS, ".npy") else ""


def _keys(ids: list[str]) -> Iterator[str]:
    """Names of samples, which no two share: ids without their ending, their folders and no dots (WebDataset's rule)."""
    taken = set[str]()
    for name in ids:
        parts = [part for part in name.removesuffix(_ending(name)).split("/") if part not in ("", ".", "..")]
        key = "/".join([*parts[:-1], parts[-1].replace(".", "_") if parts else "_"])
        base, number = key, 1
        while key in taken:
            number += 1
            key = f"{base}__{number}"
        taken.add(key)
        yield key


class _Packing:
    """A folder of shards that is being made."""

    def __init__(self, settings: Settings, source: Source, folder: Path, plan: Entries):
        self.settings, self.source, self.folder, self.plan = settings, source, folder, plan
        self.ends: list[int] = plan["ends"]
        self.sha256 = fingerprint(plan)
        self.names = [f"{number:06d}.tar" for number in range(len(self.ends))]

    def is_complete(self) -> bool:
        """Whether the manifest is there, and every shard that it lists."""
        shards, there = lengths_of(self.folder), {one.name: one.stat().st_size for one in self.folder.glob("*.tar")}
        return bool(shards) and all(there.get(name) == length for name, length in shards.items())

    def run(self) -> int:
        """Makes what is missing, then the index and the manifest; returns how many images were packed."""
        records, made = list[Entries](), 0
        keys = list(_keys(self.source.ids()))
        threads = available_cores()
        with progress(len(self.source), "pack") as bar, ThreadPoolExecutor(threads, "pack") as pool:
            for name, start, end in zip(self.names, [0, *self.ends], self.ends, strict=False):
                record = self._finished(name)
                if record is None:
                    record = self._shard(name, range(start, end), keys, pool, 4 * threads)
                    made += end - start
                for member, why in record["skipped"]:
                    self.source.bad.add(member, why)
                self.source.bad.check()
                records.append(record)
                bar.advance(bar.task_ids[0], end - start)
        self._complete(records)
        return made

    def _finished(self, name: str) -> Entries | None:
        path, tar = self._record(name), self.folder / name
        if not path.is_file() or not tar.is_file():
            return None
        record = read_sealed(path, LARGE_JSON)
        return record if record.get("plan") == self.sha256 and tar.stat().st_size == record.get("bytes") else None

    def _record(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".json")

    def _shard(self, name: str, rows: range, keys: list[str], pool: ThreadPoolExecutor, ahead: int) -> Entries:
        """Writes a shard, then its record: which of its images are where."""
        labels = self.source.labels(slice(rows.start, rows.stop))
        packed, offsets, sizes, skipped = list[int](), list[int](), list[int](), list[list[str]]()
        start = lambda row: pool.submit(packed_image, self.settings, self.source, row)
        with atomic_file(self.folder / name) as temporary, open(temporary, "wb") as file:
            for row, (data, ending) in zip(rows, in_order(start, rows, ahead), strict=True):
                if not data:
                    skipped.append([self.source.ids([row])[0], ending])
                    continue
                offsets.append(_append(file, f"{keys[row]}{ending}", data))
                sizes.append(len(data))
                packed.append(row)
                if (label := int(labels[row - rows.start])) >= 0:
                    _append(file, f"{keys[row]}.cls", str(label).encode())
            file.write(bytes(2 * BLOCK))
        record: Entries = {"plan": self.sha256, "rows": packed, "offsets": offsets, "sizes": sizes, "skipped": skipped}
        record |= {"bytes": (self.folder / name).stat().st_size, "sha256": sha256(self.folder / name)}
        write_sealed(self._record(name), record)
        return record

    def _complete(self, records: list[Entries]) -> None:
        """Writes the index and, last, the manifest."""
        if not any(record["rows"] for record in records):
            raise UserError(f"none of {len(self.source):,} images could be packed; see --max-bad")
        groups, classes = self.source.groups(), self.source.classes
        shards, skipped = list[tuple[str, Members]](), list(self.source.bad.rows)
        for name, record in zip(self.names, records, strict=True):
            rows = record["rows"]
            labels = [classes[label] if label >= 0 else None for label in self.source.labels(rows).tolist()]
            known = [None] * len(rows) if groups is None else groups[rows].tolist()
            own = [None if group is None or group < 0 else str(group) for group in known]
            ids = self.source.ids(rows)
            shards.append((name, Members(ids, record["offsets"], record["sizes"], labels, groups=own)))
        with atomic_file(self.folder / INDEX) as temporary:
            write_index(temporary, shards)
        write_skipped(self.folder / SKIPPED, skipped)
        files = {name: record["sha256"] for name, record in zip(self.names, records, strict=True)}
        files |= {name: sha256(self.folder / name) for name in (INDEX, SKIPPED)}
        manifest: Entries = {"format": FORMAT, "plan": self.plan, "classes": list(classes), "files": files}
        manifest |= {"images": sum(len(record["rows"]) for record in records), "skipped": len(skipped)}
        manifest["shards"] = {name: record["bytes"] for name, record in zip(self.names, records, strict=True)}
        write_sealed(self.folder / MANIFEST, manifest)

    def tidy(self) -> None:
        """Removes what is needed only until the manifest is there."""
        for path in (*map(self._record, self.names), self.folder / PLAN):
            path.unlink(missing_ok=True)


def _append(file: IO[bytes], name: str, data: bytes) -> int:
    """Appends a member that is the same whoever writes it and when; returns where its first byte is."""
    head = tarfile.TarInfo(name)
    head.size, head.mode = len(data), 0o644  # the time is 0, and nobody owns it
    file.write(head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    first = file.tell()
    file.write(data + bytes(-len(data) % BLOCK))
    return first
