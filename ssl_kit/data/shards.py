"""Shards: tar files that hold many images, read at any place of them through an index of offsets.

    shards/                    a folder of .tar, as `ssl-kit pack` or anybody else wrote them, or of .parquet
    shards/train-{000..012}.tar
    s3://bucket/shards         or gs:// or https://, copied when needed: see remote.py
    000000.tar 000001.tar ...  samples of a WebDataset, or any tar of images; folders in it are classes
    train.parquet              a column of bytes, or of {bytes, path} as Hugging Face writes it: see rowgroups.py

`pack` writes the index beside its shards. Others are walked once (tar.py); what that finds of large ones is kept in the
cache folder, under the length and time of the file.

Images come in the order of their shards. Local ones are read by `pread`, any of them as quickly as its neighbour, so
that an epoch shuffles all images among each other, as it does those of a folder. Of those that lie elsewhere it
shuffles the shards, then the images within windows of a few shards.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ssl_kit.core.console import detail, say, spoken, warn
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, atomic_file
from ssl_kit.core.named import TAR, check_data, expanded
from ssl_kit.core.process import cache_folder
from ssl_kit.core.reading import Reading
from ssl_kit.core.sealed import LARGE_JSON, read_sealed
from ssl_kit.data import remote, rowgroups
from ssl_kit.data.labels import encode, folder_labels, numbered
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import MAX_FILE_BYTES, Ids, Skipped, escape_path, list_images
from ssl_kit.data.sources import Blocks, Listed, Store, file_stamp
from ssl_kit.data.tar import Members, is_size, read_at, read_index, walk, write_index

INDEX = "index.parquet"
FORMAT = "ssl_kit shards 1"  # in the manifest beside the index
_ONE = "shard"  # what the shard is called in what is kept of it
_OPEN = 256  # shards that are open at a time
_KEPT_FROM = 64 * 2**20  # bytes of a shard whose walk is kept: of smaller ones it is over at once
_CACHE = "shards-2"  # folder of what is kept; the number is that of its format


class Opened(NamedTuple):
    """What lies in shards: ids, the names inside (ids may begin with the shard), what is said of each, and where."""

    ids: list[str]
    inside: list[str]
    labels: list[str | None]
    groups: list[str | None] | None
    store: Store
    skipped: list[tuple[str, str]]


@dataclass
class Tars:
    """Images in tar files; see `Store`.

    Attributes:
        files: the shards.
        shard, offset, size: (M,) int64 of each image: which file, its first byte, its bytes.
    """

    files: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    _open: OrderedDict[int, BinaryIO] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, place: int) -> bytes:
        """See `Store`."""
        size, offset = int(self.size[place]), int(self.offset[place])
        if not 0 <= size <= MAX_FILE_BYTES or offset < 0:
            raise BadImageError(f"{size:,} bytes at {offset:,}; the limit is {MAX_FILE_BYTES:,}")
        file = self._opened(int(self.shard[place]))
        if offset + size > os.fstat(file.fileno()).st_size:  # before any memory is taken
            raise BadImageError(f"{self.files[self.shard[place]].name} ends before the end of this image")
        return read_at(file.fileno(), offset, size)

    def _opened(self, shard: int) -> BinaryIO:
        """One of the files; whoever reads from one keeps it open, even when it is no longer among those kept."""
        with self._lock:
            if (file := self._open.get(shard)) is not None:
                self._open.move_to_end(shard)
                return file
        file = _opened_at(self.files[shard])  # others read on while one is copied
        with self._lock:
            self._open[shard] = file
            if len(self._open) > (2 * remote.HELD + 2 if self._far else _OPEN):
                self._open.popitem(last=False)
        return file

    @property
    def _far(self) -> bool:
        return any(map(remote.is_far, self.files[:1]))

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """See `Store`."""
        return self.size[places]

    def stamp(self, place: int) -> str:
        """See `Store`."""
        path = self.files[self.shard[place]]
        return f"{remote.far(path)[2:] if self._far else file_stamp(path)} {self.offset[place]}"

    def at(self, places: np.ndarray) -> Tars:
        """See `Store`."""
        return Tars(self.files, self.shard[places], self.offset[places], self.size[places])

    @property
    def blocks(self) -> Blocks | None:
        """None where they lie here: see the top of this file."""
        return Blocks(self.shard, remote.HELD) if self._far else None


def _opened_at(path: Path) -> BinaryIO:
    while True:
        try:
            return open(remote.fetched(path), "rb", buffering=0)
        except FileNotFoundError:  # a copy that another process has just made room with
            if not remote.is_far(path):
                raise


def source(names: Sequence[str], files: Sequence[Path], reading: Reading, max_bad: float, labelled: bool) -> Listed:
    """The images of shards, by the names that they were found by; see `open_source` for the rest."""
    name, read = " ".join(names), opened(files)
    if any(label is not None for label in read.labels):
        labels, classes = encode(read.labels, name)
    else:
        labels, classes = folder_labels(read.inside, name, asked=labelled)
    count = len(read.ids)
    bad = Skipped(count + len(read.skipped), max_bad)
    for member, why in read.skipped:
        bad.add(member, why)
    named = len(names) == 1 and not remote.is_far(files[0])
    root = Path(names[0] if named else os.path.commonpath([file.absolute().parent for file in files]))
    rows, grouped = np.arange(count), numbered(read.groups, name)
    return Listed(name, Ids(read.ids), labels, classes, reading, root, bad, rows, grouped=grouped, store=read.store)


def image(name: str, id_: str) -> bytes | None:
    """The bytes of an image in the shards of this name; None where it, or they, are not there any more."""
    rows, store = _kept_open(name)
    try:
        return store.read(rows[id_]) if store is not None and id_ in rows else None
    except (BadImageError, OSError):
        return None


@lru_cache(maxsize=2)
def _kept_open(name: str) -> tuple[dict[str, int], Store | None]:
    try:
        with spoken(False):
            files = found([name])
            read = opened(files) if files else None
    except (UserError, OSError):
        read = None
    return ({}, None) if read is None else ({id_: row for row, id_ in enumerate(read.ids)}, read.store)


def found(names: Sequence[str]) -> list[Path]:
    """The shards that are meant by names of files, folders and `shard-{000..012}.tar`; none where it is anything else.

    Raises:
        UserError: some are shards and others are not.
    """
    each = [_files(name) for name in names]
    if any(each) and not all(each):
        other = names[next(place for place, files in enumerate(each) if not files)]
        raise UserError(f"{other} holds no shards, and others that were named do: name one kind, or pack all of them")
    return [path for files in each for path in files]


def _files(name: str) -> list[Path]:
    path = Path(name)
    if "://" in name:
        check_data(name)
        return remote.found(name, (INDEX, MANIFEST))
    if not path.exists():
        several = expanded(name)
        if several == [name]:
            return []
        check_data(name)
        return [Path(one) for one in several]
    if path.is_file():
        return [path] if _is_shard(path) else []
    return in_folder(path)


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == TAR or (path.suffix.lower() == ".parquet" and bool(rowgroups.image_column(path)))


def in_folder(folder: Path) -> list[Path]:
    """The shards directly in a folder, by name; none where it holds images of its own."""
    if remote.is_far(folder / INDEX):
        return remote.files_in(folder)
    with os.scandir(os.fsencode(folder)) as entries:
        names = sorted(os.fsdecode(one.name) for one in entries if not one.name.startswith(b".") and one.is_file())
    tars = [folder / name for name in names if name.lower().endswith(TAR)]
    if INDEX in names and tars:
        return tars
    tables = [] if tars else [folder / name for name in names if name.lower().endswith(".parquet")]
    try:
        found = tars or [path for path in tables if _is_shard(tables[0]) and _is_shard(path)]
    except DamagedError:
        if not list_images(folder).ids:
            raise
        found = []  # something else beside images
    if found and list_images(folder).ids:
        say(f"{folder}: {len(found):,} {found[0].suffix} files beside the images are not read; name them to read them")
        return []
    return found


def opened(paths: Sequence[Path]) -> Opened:
    """The images of shards.

    Raises:
        UserError: shards of two kinds, or none of them can be read.
    """
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise UserError(f"got shards of the kinds {', '.join(sorted(kinds))}; wanted one kind")
    if kinds == {".parquet"}:
        read = rowgroups.opened(paths)
        ids = _unique(read.names, read.counts, paths)
        return Opened(ids, read.names, read.labels, read.groups, read.store, [])
    indexed = _indexes(paths)
    each = [indexed[path] if path in indexed else _walked(path) for path in paths]
    _say_missing(paths, indexed)
    names = [name for members in each for name in members.names]
    counts = [len(members.names) for members in each]
    skipped = [
        (f"{path.name}: {name}", why)
        for path, members in zip(paths, each, strict=True)
        for name, why in members.skipped
    ]
    for path, members in zip(paths, each, strict=True):
        if members.broken:
            warn(f"{path}: {members.broken}; {len(members.names):,} images come before that, what follows is not read")
            skipped.append((path.name, members.broken))
    shard = np.repeat(np.arange(len(paths)), counts)
    offset, size = (
        np.array([one for members in each for one in getattr(members, name)], np.int64) for name in ("offsets", "sizes")
    )
    labels = [label for members in each for label in members.labels]
    if all(label is None for label in labels):
        labels = _if_classes([text for members in each for text in members.texts])
    groups = [group for members in each for group in members.groups]
    store = Tars(list(paths), shard, offset, size)
    known = None if all(group is None for group in groups) else groups
    return Opened(_unique(names, counts, paths), names, labels, known, store, skipped)


def _if_classes(texts: list[str | None]) -> list[str | None]:
    """What `.txt` say, where it is classes: two images of each on average. Captions all differ."""
    known = [text for text in texts if text is not None]
    return texts if known and 2 * len(set(known)) <= len(known) else [None] * len(texts)


def _unique(names: list[str], counts: Sequence[int], paths: Sequence[Path]) -> list[str]:
    """Ids: names as they are inside, where no two shards have the same, else behind those of their shards."""
    if len(set(names)) == len(names):
        return names
    twice = Counter(names).most_common(1)[0][0]
    say(f"{twice!r} lies in several shards: ids begin with the names of the shards")
    common = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    before = [escape_path(path.resolve().relative_to(common).with_suffix("").as_posix()) for path in paths]
    of = np.repeat(np.arange(len(paths)), counts).tolist()
    return [f"{before[shard]}/{name}" for shard, name in zip(of, names, strict=True)]


def _walked(path: Path) -> Members:
    """What a tar without an index holds; kept for the next time where it is large and in order."""
    try:
        size, time = remote.far(path)[2:] if remote.is_far(path) else _size_and_time(path)
        kept = _kept_at(path, size, time) if size >= _KEPT_FROM or remote.is_far(path) else None
        if kept is not None and kept.is_file():
            with suppress(DamagedError, UserError):
                return read_index(kept).get(_ONE, Members())
        detail(f"{path}: no index, it is walked once")
        members = walk(remote.fetched(path))
    except OSError as error:
        return Members(broken=error.strerror or str(error))
    if kept is not None and not members.broken and not members.skipped:
        with suppress(OSError, UserError):
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            with atomic_file(kept) as temporary:
                write_index(temporary, [(_ONE, members)])
    return members


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _kept_at(path: Path, size: int, time: int) -> Path | None:
    folder = cache_folder()
    said = f"{path.resolve()}\0{size}\0{time}"
    return folder / _CACHE / f"{hashlib.sha256(os.fsencode(said)).hexdigest()}.parquet" if folder else None


def _indexes(paths: Sequence[Path]) -> dict[Path, Members]:
    """Of each shard beside which an index lies that lists it, what that says; a shard that has grown is not its own."""
    found: dict[Path, Members] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        if not (folder / INDEX).is_file():
            continue
        try:
            listed, lengths = read_index(folder / INDEX), lengths_of(folder)
        except DamagedError as error:
            warn(f"{error}; its shards are walked instead")
            continue
        for path in paths:
            far = remote.is_far(path)
            if path.parent == folder and path.name in listed and (far or path.is_file()):
                if (remote.far(path).size if far else path.stat().st_size) <= lengths.get(path.name, 2**62):
                    found[path] = listed[path.name]
                else:
                    warn(f"{path} is another file than {INDEX} was made of; it is walked instead")
    return found


def lengths_of(folder: Path) -> dict[str, int]:
    """The bytes of each shard of a folder that `pack` has written, by name; empty where it is none or damaged."""
    with suppress(DamagedError):
        said = read_sealed(folder / MANIFEST, LARGE_JSON)
        shards = said.get("shards") if said.get("format") == FORMAT else None
        if isinstance(shards, dict):
            return {name: length for name, length in shards.items() if is_size(length)}
    return {}


def _say_missing(paths: Sequence[Path], indexed: dict[Path, Members]) -> None:
    """Warns of shards that the folder of an index should have, and has not."""
    for folder in dict.fromkeys(path.parent for path in indexed):
        there = {path.name for path in remote.files_in(folder)} if remote.is_far(folder / INDEX) else set()
        missing = [name for name in lengths_of(folder) if name not in there and not (folder / name).is_file()]
        if missing:
            warn(f"{folder}: {len(missing):,} shards are missing, first {missing[0]}: their images are left out")
