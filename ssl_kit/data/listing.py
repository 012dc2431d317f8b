"""Which images lie under a folder: each once, in a stable order, under an id that can be turned back into its path.

An id is the path relative to the folder, with `/` between parts, in UTF-8. Bytes that are not UTF-8 (names are bytes on
Linux) become `%FF`, and a `%` that would read like such an escape becomes `%25`; every other name stays as it is.

Images that could not be decoded are counted and listed; too many of them end the command.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssl_kit.core.console import say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_csv

# Files with these endings are taken for images (decoding tells); others only if their first bytes say so.
EXTENSIONS = frozenset(
    f".{name}"
    for names in (
        "jpg jpeg jpe jfif mpo png apng gif webp avif",
        "jp2 j2k j2c tif tiff bmp dib ppm pgm pbm pnm",
        "npz dcm dicom",
    )
    for name in names.split()
)
# An array may be anything, such as features that lie beside the images: it is one if it has 2 or 3 dimensions.
ARRAY = re.compile(rb"\x93NUMPY.{4,6}\{.*'shape': \(\d+, \d+(, \d+)?\)", re.DOTALL)
_SHAPE = re.compile(rb"\x93NUMPY.{4,6}\{.*'shape': (\([\d, ]*\))", re.DOTALL)
# No signature for TIFF (raw camera files share it), BMP and PPM (two letters that any text may begin with).
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|\0\0\0\x0cjP  |....ftypavi[fs]", re.DOTALL
)
BEGINNING = 128  # bytes
_PART, _FEW = 2**16, 16  # ids that are Python's at a time; that are made so one by one
_ESCAPE = re.compile(r"%(?=[0-9A-Fa-f]{2})")
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
MAX_FILE_BYTES = 2 * 2**30  # more than the largest image that is decoded takes uncompressed


class Ids(Sequence[str]):  # noqa: PLW1641 (it equals lists, which have no hash)
    """Ids of images as an Arrow array: 8 bytes and the letters of each, where a `str` of Python takes 50 more.

    Attributes:
        array: (N,) of `pa.large_string`, whose letters may take more than 2 GiB.
    """

    def __init__(self, ids: Iterable[str] | pa.Array = ()):
        self.array = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.large_string())

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        return str(self.array[row].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PART):
            yield from self.array.slice(start, _PART).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def at(self, rows: np.ndarray) -> Ids:
        """Those of the images at `rows` (R,) int64."""
        return Ids(self.array.take(pa.array(rows)))

    def texts(self, rows: np.ndarray) -> list[str]:
        """Those of the images at `rows` (R,) int64 as Python's; for a few, Arrow's own call costs more than they do."""
        return [self[row] for row in rows.tolist()] if len(rows) < _FEW else self.at(rows).array.to_pylist()


@dataclass
class Listing:
    """What was found under a folder: sorted ids of images, and what else was seen, for messages."""

    ids: Ids = field(default_factory=Ids)
    others: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are no images
    links: int = 0  # further names of files or folders that are listed already
    unreadable: list[str] = field(default_factory=list)  # folders that could not be listed


def list_images(root: Path | str) -> Listing:
    """Lists the images under `root`, any nesting; the work is one `scandir` per folder and no `stat` per file.

    Hidden names (a leading dot) are left out; pipes, sockets and devices are never opened. A file or folder with
    several names (symbolic or hard links) is listed once, under its first real name. A link to a folder that contains
    it is a loop and not followed. `root` itself may be a link.
    """
    walk = _Walk(os.fsencode(root))
    walk.run()
    return walk.result()


class _Walk:
    """Real folders first, linked ones after, so that a real name wins over a link whatever the order on disk."""

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.listing = Listing()
        self.ids: list[pa.Array] = []  # of the images of each folder, (n,)
        self.known: list[np.ndarray] = []  # which file each of them is: (n, 2) uint64 number and device
        self.by_link: list[np.ndarray] = []  # (n,) bool
        self.images: set[bytes] = set()  # endings of images that were met, as they are spelled
        self.folders: set[tuple[int, int]] = set()
        self.linked: list[bytes] = []  # links to folders, relative to root

    def run(self) -> None:
        self.tree(b"", by_link=False)
        while self.linked:
            self.linked.sort(reverse=True)
            self.tree(self.linked.pop(), by_link=True)

    def result(self) -> Listing:
        listing = self.listing
        if not self.ids:
            return listing
        ids, by_link, known = pa.concat_arrays(self.ids), np.concatenate(self.by_link), np.concatenate(self.known)
        order = np.asarray(pc.sort_indices(ids))  # by the bytes of UTF-8, which is how Python sorts text
        first = order[np.argsort(by_link[order], kind="stable")]  # real names before links
        same = first[np.lexsort(known[first].T)]  # the names of one file together, in that order
        again = same[1:][(known[same[1:]] == known[same[:-1]]).all(axis=1)]
        listing.links += len(again)
        listing.ids = Ids(ids.take(pa.array(order[~np.isin(order, again)] if len(again) else order)))
        return listing

    def tree(self, top: bytes, *, by_link: bool) -> None:
        pending = [top]
        while pending:
            relative = pending.pop()
            path = os.path.join(self.root, relative) if relative else self.root
            try:
                status = os.stat(path)
                entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError:
                self.listing.unreadable.append(escape(relative))
                continue
            if (status.st_dev, status.st_ino) in self.folders:
                self.listing.links += 1
                continue
            self.folders.add((status.st_dev, status.st_ino))
            pending += self.folder(relative, entries, status.st_dev, by_link)

    def folder(self, relative: bytes, entries: list[os.DirEntry[bytes]], device: int, by_link: bool) -> list[bytes]:
        """Takes in one folder's files; returns its real sub-folders, last first."""
        inside, names, numbers = list[bytes](), list[bytes](), list[int]()
        prefix = relative + b"/" if relative else b""
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if entry.is_symlink():
                self.link(prefix + name, entry)
            elif entry.is_dir(follow_symlinks=False):
                inside.append(prefix + name)
            elif entry.is_file(follow_symlinks=False) and self.is_image(entry):
                names.append(prefix + name)
                numbers.append(entry.inode())
        self.take(names, device, numbers, by_link)
        return inside[::-1]

    def link(self, relative: bytes, entry: os.DirEntry[bytes]) -> None:
        try:
            status = entry.stat()
        except OSError:  # dangling, or a link to itself
            self.listing.others["(broken link)"] += 1
            return
        if stat.S_ISREG(status.st_mode):
            if self.is_image(entry):
                self.take([relative], status.st_dev, [status.st_ino], True)
        elif stat.S_ISDIR(status.st_mode):
            target = os.path.realpath(entry.path)
            if os.path.commonpath([target, os.path.realpath(os.path.dirname(entry.path))]) == target:
                self.listing.links += 1
            else:
                self.linked.append(relative)

    def take(self, names: list[bytes], device: int, numbers: list[int], by_link: bool) -> None:
        """Takes in images of one device, and the numbers that it has for their files."""
        if not names:
            return
        try:
            inodes = np.array(numbers, np.uint64)
        except OverflowError:  # Windows' ReFS has 128 bits
            inodes = np.array([hash(str(number)) for number in numbers], np.int64).astype(np.uint64)
        self.ids.append(_escaped(names))
        self.known.append(np.stack([inodes, np.full(len(names), device, np.uint64)], axis=1))
        self.by_link.append(np.full(len(names), by_link))

    def is_image(self, entry: os.DirEntry[bytes]) -> bool:
        """Whether a file is one, by its ending or else its first bytes; what is none is counted."""
        dot = entry.name.rfind(b".")
        ending = entry.name[dot:] if dot >= 0 else b""
        if ending in self.images:
            return True
        extension = ending.decode("utf-8", "replace").lower()
        if extension in EXTENSIONS:
            self.images.add(ending)
            return True
        if _begins(entry.path, SIGNATURES if extension != ".npy" else ARRAY):
            return True
        shape = _SHAPE.match(_beginning(entry.path)) if extension == ".npy" else None
        told = f" of shape {shape[1].decode()}" if shape else ""
        self.listing.others[f"{extension}{told}" or "(no extension)"] += 1
        return False


def _escaped(names: list[bytes]) -> pa.Array:
    """The ids of paths; nearly always they are what the bytes say in UTF-8."""
    with suppress(pa.ArrowInvalid):
        ids = pa.array(names, pa.large_binary()).cast(pa.large_string())
        if not pc.any(pc.match_substring(ids, "%")).as_py():
            return ids
    return pa.array(map(escape, names), pa.large_string())


def _begins(path: bytes, pattern: re.Pattern[bytes]) -> bool:
    return pattern.match(_beginning(path)) is not None


def _beginning(path: bytes) -> bytes:
    try:
        return read_regular(path, BEGINNING)
    except OSError:
        return b""


def read_regular(path: bytes, limit: int | None = None) -> bytes:
    """The bytes of a regular file (the first `limit`, or all); never waits on a pipe or device that took its place.

    Raises:
        OSError: as `open`, and for anything but a regular file of at most `MAX_FILE_BYTES`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_FILE_BYTES and limit is None:
            raise OSError(f"file of {status.st_size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
        wanted = status.st_size if limit is None else limit
        data = os.read(handle, wanted)
        while 0 < len(data) < wanted and (more := os.read(handle, wanted - len(data))):
            data += more
        return data
    finally:
        os.close(handle)


def escape(name: bytes) -> str:
    """The id of a path; `unescape` gives the same bytes back."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape")
        text = _ESCAPE.sub("%25", text)
        return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in text)
    return _ESCAPE.sub("%25", text) if "%" in text else text


def unescape(name: str) -> bytes:
    """The path that has this id, as bytes."""
    data = name.encode("utf-8")
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), data) if b"%" in data else data


def escape_path(path: Path | str) -> str:
    """A path as text that JSON, CSV and Parquet hold and `unescape` turns back into bytes."""
    return escape(os.fsencode(path))


def folder_of_images(path: Path) -> Listing:
    """`list_images`, or the error a user needs: no images are there (with what was there instead)."""
    listing = list_images(path)
    if listing.links:
        say(f"{path}: {listing.links:,} links to files or folders that are listed already were left out")
    if listing.unreadable:
        warn(f"{path}: {len(listing.unreadable):,} folders cannot be read, first {listing.unreadable[0]!r}")
    if not listing.ids:
        seen = ", ".join(f"{count:,} {extension}" for extension, count in listing.others.most_common(8))
        wanted = "wanted .jpg, .png, .webp, .tif, .bmp, .gif ..."
        if ".npy of shape" in seen:
            wanted += ", or .npy of one image each, (H, W) or (H, W, C); one of many is given from Python"
        raise UserError(f"no images in {path}: {'saw ' + seen if seen else 'it has no files'}; {wanted}")
    return listing


def folders_without(path: Path, names: Collection[str]) -> list[str]:
    """Folders directly below `path` that are not among `names`: there is no image in them."""
    with os.scandir(os.fsencode(path)) as entries:
        inside = {escape(entry.name) for entry in entries if entry.is_dir() and not entry.name.startswith(b".")}
    return sorted(inside - set(names))


class Skipped:
    """The bad files of a source, shared by its subsets; threads may add at the same time.

    `rows`: (id, reason), each id once, in the order they were met.
    """

    def __init__(self, total: int, max_bad: float) -> None:
        self.total = total  # images listed, good and bad
        self.max_bad = max_bad  # fraction in [0, 1]; 0 is strict
        self.rows: list[tuple[str, str]] = []
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Notes one bad file (again: no matter)."""
        with self._lock:
            if name not in self._known:
                self._known.add(name)
                self.rows.append((name, reason))

    def check(self) -> None:
        """Raises `UserError` when more than the fraction `max_bad` of all images is bad; at 0 the first is too many."""
        if len(self.rows) <= self.max_bad * self.total:
            return
        first = "; ".join(f"{name!r}: {reason}" for name, reason in self.rows[:3])
        allowed = (
            f"more than the {100 * self.max_bad:g}% allowed" if self.max_bad > 0 else "and --max-bad 0 allows none"
        )
        raise UserError(
            f"{len(self.rows):,} of {self.total:,} images could not be decoded, {allowed} ({first}). Remove or repair "
            "them, or allow more with --max-bad"
        )


def write_skipped(path: Path | str, rows: list[tuple[str, str]]) -> None:
    """Writes `skipped.csv` (path, reason; UTF-8) in one step, also when there is nothing to list."""
    write_csv(path, ("path", "reason"), sorted(rows))
