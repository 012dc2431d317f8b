"""Sources: images as stored, with stable ids and, where known, labels. A source knows nothing of augmentation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import Reading
from ssl_kit.data.decode import decode, image_size
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import Ids, Skipped, read_regular, unescape

Rows: TypeAlias = np.ndarray | Sequence[int] | slice  # positions in a source, or a mask of them
Stored: TypeAlias = (
    bytes | np.ndarray | BadImageError
)  # a file, pixels (H, W, C) uint8 or uint16, or why neither can be had

_ALL = slice(None)
_LOOKED_AT = 8  # images that tell how deep all are
_SAMPLED = 8  # blocks that a sample comes from, where blocks are read whole


class Blocks(NamedTuple):
    """Which images are best read together, because they are read as one: a group of rows of a Parquet file, a shard.

    `of`: (N,) int64 the block of each image. `held`: how many blocks there is room for at a time.
    """

    of: np.ndarray
    held: int


class Store(Protocol):
    """Where the images of a source lie that are no files of their own; image i is at place i."""

    def read(self, place: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImageError: they are not there, or too many; OSError: see `open`.
        """

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """(P,) int64 bytes of each; where only those of its block are known, its share of them."""

    def stamp(self, place: int) -> str:
        """What changes when another file takes the place of the one that an image lies in."""

    def at(self, places: np.ndarray) -> Store:
        """The images at these places alone."""

    @property
    def blocks(self) -> Blocks | None: ...  # noqa: D102


class Source(Protocol):
    """Images as stored, their ids and labels; image i is at position i.

    Attributes:
        name: what it was opened from.
        classes: names, sorted; empty when nothing is labelled.
        reading: which channels and values of the images are taken.
        channels: of the images as they are taken.
        root: the folder that ids are relative to, or what names the shards; None when the images never were files.
        bad: files that could not be decoded so far; shared by the subsets of a source.
        in_memory: whether `read` gives pixels.
        stack: where all pixels lie in one array (M, H, W, C), that and the place (N,) of each image in it.
        blocks: which of its images are best read together; None where any order is as good.
    """

    name: str
    classes: tuple[str, ...]
    reading: Reading
    root: Path | None
    bad: Skipped

    @property
    def channels(self) -> int: ...  # noqa: D102

    @property
    def in_memory(self) -> bool: ...  # noqa: D102

    @property
    def stack(self) -> tuple[np.ndarray, np.ndarray] | None: ...  # noqa: D102

    @property
    def blocks(self) -> Blocks | None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def ids(self, rows: Rows = _ALL) -> list[str]:
        """Paths relative to `root` (see listing.py), unique and stable."""

    def labels(self, rows: Rows = _ALL) -> np.ndarray:
        """(R,) int64 positions in `classes`, -1 = unknown."""

    def groups(self, rows: Rows = _ALL) -> np.ndarray | None:
        """(R,) int64: images that have the same number belong together, -1 stands alone; None where none is known."""

    def sizes(self, rows: Rows) -> np.ndarray:
        """(R, 2) int64 height and width, upright; of files from their headers, 0 and 0 where there is none to read."""

    def read(self, rows: Rows) -> list[Stored]:
        """Each image as it is stored; nothing is decoded or copied."""

    def lengths(self, rows: Rows) -> np.ndarray:
        """(R,) int64 bytes of each image as it is stored: of its file, or else of its pixels; 0 where there is none."""

    def content(self, row: int) -> bytes:
        """These bytes of one image."""

    def stamps(self) -> Iterator[str]:
        """Of each image what changes when another file takes the place of its own: length and time."""

    def subset(self, rows: Rows, name: str | None = None) -> Source:
        """The images at `rows`, in that order, none of them copied; bad files are counted together."""

    def skip(self, row: int, reason: str) -> None:
        """Notes that an image could not be decoded; raises `UserError` when there are too many of them."""


@dataclass
class Listed:
    """A source whose ids and labels are in memory: a folder, a table, arrays, a built-in set. Subsets share all of it.

    Attributes:
        names: ids of all M images.
        targets: (M,) int64 labels of all.
        images: pixels of all, (M, H, W, C) or a list of (H_i, W_i, C), uint8 or uint16; None = files, read when needed.
        rows: (N,) int64, which of them this source has.
        folders: where those of several places lie: the first part of an id -> its folder.
        grouped: (M,) int64 group of each, -1 alone; None where none is known.
        store: where all of them lie, if they are no files of their own.
    """

    name: str
    names: Ids = field(repr=False)
    targets: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    reading: Reading
    root: Path | None
    bad: Skipped = field(repr=False)
    rows: np.ndarray = field(repr=False)
    images: np.ndarray | Sequence[np.ndarray] | None = field(default=None, repr=False)
    folders: dict[str, Path] | None = None
    grouped: np.ndarray | None = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        """Of a pixel."""
        return self.reading.channels

    @property
    def in_memory(self) -> bool:
        """Whether `read` gives pixels."""
        return self.images is not None

    @property
    def stack(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The array of all pixels, if they lie in one, and the place of each image in it."""
        return (self.images, self.rows) if isinstance(self.images, np.ndarray) else None

    @property
    def blocks(self) -> Blocks | None:
        """See `Source`."""
        found = None if self.store is None or self.in_memory else self.store.blocks
        return None if found is None else found._replace(of=found.of[self.rows])

    def ids(self, rows: Rows = _ALL) -> list[str]:
        """See `Source`, here and below."""
        return self.names.texts(self.rows[rows])

    def labels(self, rows: Rows = _ALL) -> np.ndarray:
        """(R,) int64."""
        return self.targets[self.rows[rows]]

    def groups(self, rows: Rows = _ALL) -> np.ndarray | None:
        """(R,) int64, or None."""
        return None if self.grouped is None else self.grouped[self.rows[rows]]

    def sizes(self, rows: Rows) -> np.ndarray:
        """(R, 2) int64 height and width."""
        found = np.zeros((len(self.rows[rows]), 2), np.int64)
        for place, stored in enumerate(self._stored(rows)):
            try:
                found[place] = size_of(stored)
            except BadImageError:
                continue
        return found

    def read(self, rows: Rows) -> list[Stored]:
        """Files or pixels."""
        return list(self._stored(rows))

    def lengths(self, rows: Rows) -> np.ndarray:
        """See `Source`."""
        if self.store is not None:
            return self.store.lengths(self.rows[rows])
        places = self.rows[rows].tolist()
        if self.root is None:
            assert self.images is not None, "without files there are pixels"
            return np.array([self.images[row].nbytes for row in places], np.int64)
        return np.array([file_length(self._path(self.names[row])) for row in places], np.int64)

    def content(self, row: int) -> bytes:
        """Empty where it cannot be read."""
        place = int(self.rows[row])
        found = self._file(place) if self.images is None or self.root else self.images[place].tobytes()
        return b"" if isinstance(found, BadImageError) else found

    def _stored(self, rows: Rows) -> Iterator[Stored]:
        """One image after the other."""
        for row in self.rows[rows].tolist():
            yield self._file_or_made(row) if self.images is None else self.images[row]

    def _file_or_made(self, place: int) -> Stored:
        """A file; or what a reader of the user's own makes of it, which has no header to ask for a size."""
        stored = self._file(place)
        if self.reading.function is None or isinstance(stored, BadImageError):
            return stored
        try:
            return decode(stored, self.reading, name=self.names[place]).image
        except BadImageError as error:
            return error

    def _path(self, name: str) -> bytes:
        assert self.root is not None, "a source without files has its images in memory"
        head, _, rest = name.partition("/") if self.folders else ("", "", name)
        root = self.folders[head] if self.folders else self.root
        return os.path.join(os.fsencode(root), unescape(rest))

    def _file(self, place: int) -> bytes | BadImageError:
        try:
            return read_regular(self._path(self.names[place])) if self.store is None else self.store.read(place)
        except BadImageError as error:
            return error
        except UserError:  # a shard that cannot be reached: no image is bad because of that
            raise
        except OSError as error:
            return BadImageError(error.strerror or str(error))
        except ValueError as error:  # a name with a NUL, out of a table
            return BadImageError(str(error))

    def stamps(self) -> Iterator[str]:
        """See `Source`."""
        for row in self.rows.tolist():
            yield self.store.stamp(row) if self.store is not None else file_stamp(self._path(self.names[row]))

    def subset(self, rows: Rows, name: str | None = None) -> Listed:
        """A view of these rows."""
        return replace(self, rows=self.rows[rows], name=self.name if name is None else name)

    def skip(self, row: int, reason: str) -> None:
        """Notes a bad file."""
        self.bad.add(self.ids([row])[0], reason)
        self.bad.check()


def file_length(path: bytes) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # a name with a NUL, out of a table
        return 0


def file_stamp(path: bytes | Path) -> str:
    """Length and time of change of a file, for comparison; "missing" where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def sampled(source: Source, count: int, seed: int = 0, stream: int = 0) -> np.ndarray:
    """(R,) at most so many rows drawn by the seed, in that order; where blocks are read whole, of a few of them."""
    order = permutation(seed, 0, len(source), stream)
    blocks = source.blocks
    if blocks is not None:
        first = list(dict.fromkeys(blocks.of[order[: 64 * _SAMPLED]].tolist()))[:_SAMPLED]
        order = order[np.isin(blocks.of[order], first)]
    return order[:count]


def size_of(stored: Stored) -> tuple[int, int]:
    """(height, width) of an image as it is stored, upright.

    Raises:
        BadImageError: it cannot be had, or is none.
    """
    if isinstance(stored, BadImageError):
        raise stored
    return (stored.shape[0], stored.shape[1]) if isinstance(stored, np.ndarray) else image_size(stored)


def pixels(source: Source, row: int, smallest: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, C) uint8 or uint16 of one image; a file may be decoded to fewer pixels, but at least `smallest`.

    Raises:
        BadImageError: it cannot be decoded.
    """
    stored = source.read([row])[0]
    if isinstance(stored, BadImageError):
        raise stored
    return decode(stored, source.reading, smallest=smallest).image if isinstance(stored, bytes) else stored


def is_deep(source: Source) -> bool:
    """Whether any of a few of its images has more than 8 bits."""
    for row in np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(np.int64).tolist():
        with suppress(BadImageError):
            if pixels(source, row).dtype == np.uint16:
                return True
    return False
