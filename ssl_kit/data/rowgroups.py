"""Parquet files that hold the bytes of images: a column of {bytes, path}, as Hugging Face writes it, or of bytes.

Rows lie in groups, and a group is read whole: its pages are compressed. A few groups are held at a time, so that an
epoch shuffles groups, and rows within windows of as many groups as are held; see `TrainingPlan`.

Headers are judged before anything is unpacked (core/parquet.py), and a group is unpacked a batch of rows at a time, up
to a gigabyte: a dictionary may hold one value that stands for any number of rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.parquet import Contents, contents, is_text, schema
from ssl_kit.core.parquet import opened as opened_file
from ssl_kit.core.sealed import parse_json
from ssl_kit.data.labels import text_of
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import ARRAY, BEGINNING, SIGNATURES, escape
from ssl_kit.data.manifests import GROUPS, LABELS, LONGEST, check_list
from ssl_kit.data.sources import Blocks, file_stamp

_NAMES = ("image", "img", "jpg", "png", "webp", "bytes", "image_bytes", "content", "data")  # that come first
_CLASSES = (*LABELS, "fine_label")
_HELD = 256 * 2**20  # bytes of the groups of a window
_GROUP = 2**30  # bytes that the images of a group may take
_BATCH = 64 * 2**20  # bytes that are unpacked at a time, unless one page has more
_PAGE = 2**29  # bytes of a page


class Read(NamedTuple):
    """What files say of their images: names, labels and groups of all, how many each file has, and where they lie."""

    names: list[str]
    labels: list[str | None]
    groups: list[str | None] | None
    counts: list[int]
    store: Groups


def image_column(path: Path) -> str | None:
    """The column that holds images, as core/parquet.py names it (`image.bytes`); None where none does.

    Raises:
        DamagedError: it is no Parquet file.
    """
    columns = schema(path)
    order = sorted(columns.names, key=lambda name: _NAMES.index(name.lower()) if name.lower() in _NAMES else 99)
    for name in order:
        type_ = columns.field(name).type
        if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0 and _is_bytes(type_.field("bytes").type):
            return f"{name}.bytes"
    return next((name for name in order if _is_bytes(columns.field(name).type) and _begins(path, name)), None)


def _is_bytes(type_: pa.DataType) -> bool:
    return is_text(type_) and not any(
        getattr(pa.types, f"is_{kind}")(type_) for kind in ("string", "large_string", "string_view", "dictionary")
    )


def _begins(path: Path, name: str) -> bool:
    """Whether the first value of a column of bytes is an image: paths are bytes too."""
    inside = contents(path, [name])
    if inside.columns[name].largest > _PAGE:
        return False
    with opened_file(path) as file:
        first = (
            [value for values in islice(_of(file, name, 1, 0), 1) for value in values] if file.num_row_groups else []
        )
    data = (first[0].as_py() or b"") if first else b""
    return bool(SIGNATURES.match(data[:BEGINNING]) or ARRAY.match(data[:BEGINNING]))


def _of(file: pq.ParquetFile, leaf: str, rows: int, group: int) -> Iterator[pa.Array]:
    """The values of a column, or of a part of a nested one, in a group; batch by batch."""
    for batch in file.iter_batches(rows, row_groups=[group], columns=[leaf], use_threads=False):
        column = batch.column(0)
        yield column.flatten()[0] if pa.types.is_struct(column.type) else column  # null where the whole is


def opened(paths: Sequence[Path]) -> Read:
    """The images of files whose columns of images are known to be there.

    Raises:
        UserError: groups of rows that are too large, or more rows than the bytes can mean; DamagedError: it is no
            Parquet file.
    """
    each = [_said(path) for path in paths]
    names = [name or "" for said in each for name in _numbered(said.names)]
    if not all(names):
        ids = [[f"{row:0{len(str(len(said.labels)))}d}" for row in range(len(said.labels))] for said in each]
        names = [name for one in ids for name in one]
    labels = [label for said in each for label in said.labels]
    groups = [group for said in each for group in said.groups]
    numbers = np.concatenate([np.repeat(np.arange(len(said.rows)), said.rows) for said in each])
    within = np.concatenate([np.arange(rows) for said in each for rows in said.rows] or [np.empty(0, np.int64)])
    counts = [sum(said.rows) for said in each]
    store = Groups(
        list(paths),
        [said.column for said in each],
        [np.array(said.bytes, np.int64) for said in each],
        np.repeat(np.arange(len(paths)), counts),
        numbers,
        within,
        [np.array(said.rows, np.int64) for said in each],
        [said.page for said in each],
    )
    return Read(names, labels, None if all(group is None for group in groups) else groups, counts, store)


def _numbered(names: list[str | None]) -> list[str | None]:
    """Names of rows; behind their numbers where one comes again, as `image.png` of every row does."""
    if None in names or len(set(names)) == len(names):
        return names
    return [f"{row:0{len(str(len(names)))}d}/{name}" for row, name in enumerate(names)]


class _Said(NamedTuple):
    """What a file says: names, labels and groups of its rows; rows and bytes of its groups; its largest page."""

    column: str
    names: list[str | None]
    labels: list[str | None]
    groups: list[str | None]
    rows: list[int]
    bytes: list[int]
    page: int


def _said(path: Path) -> _Said:
    column = image_column(path)
    if column is None:
        raise UserError(f"{path} has no column of images; wanted one of bytes, or of {{bytes, path}}")
    columns = schema(path)
    top = column if column in columns.names else column.removesuffix(".bytes")
    plain = {name.strip().lower(): name for name in columns.names if name != top}
    label, group = (next((plain[name] for name in usual if name in plain), None) for usual in (_CLASSES, GROUPS))
    label, group = (name if name is not None and _says(path, columns, name) else None for name in (label, group))
    type_ = columns.field(top).type
    beside = type_.field("path").type if pa.types.is_struct(type_) and type_.get_field_index("path") >= 0 else None
    named = f"{top}.path" if beside is not None and is_text(beside) else None
    inside = contents(path, [name for name in (column, named, label, group) if name])
    check_list(path, inside, column)
    page = inside.columns[column].largest
    with opened_file(path) as file:
        about = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        rows, sizes = [one.num_rows for one in about], [one.total_byte_size for one in about]
    if sum(rows) != inside.columns[column].rows:
        raise DamagedError(f"{path} cannot be read as Parquet: its pages hold {inside.columns[column].rows:,} rows")
    if page > _PAGE:
        raise UserError(f"{path}: its images lie in pages of {page:,} bytes; write it anew with smaller groups of rows")
    nothing: list[str | None] = [None] * sum(rows)
    words = {name: _words(path, inside, name) if name else nothing for name in (named, label, group)}
    classes = _class_names(columns, label) if label else []
    labels = [_named(one, classes) for one in words[label]]
    names = [None if name is None else escape(name.encode("utf-8", "surrogateescape")) for name in words[named]]
    return _Said(column, names, labels, words[group], rows, sizes, page)


def _says(path: Path, columns: pa.Schema, name: str) -> bool:
    """Whether a column says something of each image: no list, and no image itself, such as a mask."""
    type_ = columns.field(name).type
    return not pa.types.is_nested(type_) and not (_is_bytes(type_) and _begins(path, name))


def _words(path: Path, inside: Contents, name: str) -> list[str | None]:
    """The texts of a column, each kept once.

    Raises:
        DamagedError: one is longer than any path, or there are more or fewer than rows.
    """
    found, known = list[str | None](), dict[str, str]()
    try:
        with opened_file(path, [name]) as file:
            # group by group: Arrow cannot join the dictionaries of nested columns
            for values in (one for group in range(file.num_row_groups) for one in _of(file, name, 2**14, group)):
                if pa.types.is_dictionary(values.type):
                    several = [text_of(value) for value in values.dictionary.to_pylist()]
                    texts = [None if place is None else several[place] for place in values.indices.to_pylist()]
                else:
                    texts = [text_of(value) for value in values.to_pylist()]
                if max((len(text) for text in texts if text), default=0) > LONGEST:
                    raise DamagedError(f"{path}: the column {name!r} holds texts of more than {LONGEST:,} characters")
                found += [None if text is None else known.setdefault(text, text) for text in texts]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read as Parquet: {error}") from error
    return found


def _class_names(columns: pa.Schema, label: str) -> list[str]:
    """The names of classes that Hugging Face keeps beside the columns (`ClassLabel`)."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        told = parse_json((columns.metadata or {})[b"huggingface"], Path("huggingface"))["info"]["features"][label]
        names = told.get("names", [])
        if isinstance(names, dict):
            names = list(names.values())
        if all(isinstance(name, str) for name in names):
            return [name.encode("utf-8", "replace").decode() for name in names]  # JSON may escape half a character
    return []


def _named(label: str | None, classes: list[str]) -> str | None:
    if label is None or not classes:
        return label
    return classes[int(label)] if label.isdigit() and int(label) < len(classes) else None


@dataclass
class Groups:
    """Images in groups of rows of Parquet files; see `Store`.

    Attributes:
        files, columns: and the column of each that holds its images.
        taken: bytes of each file's groups, (G,).
        file, group, row: (M,) int64 of each image: file, group in it, row in that.
        rows: of each file, (G,) of its groups.
        pages: bytes of the largest page of each file.
    """

    files: list[Path]
    columns: list[str]
    taken: list[np.ndarray]
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray
    rows: list[np.ndarray]
    pages: list[int]
    _kept: OrderedDict[tuple[int, int], Future[pa.ChunkedArray]] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, place: int) -> bytes:
        """See `Store`."""
        values = self._whole(int(self.file[place]), int(self.group[place]))
        row = int(self.row[place])
        data = values[row].as_py() if row < len(values) else None
        if not data:
            raise BadImageError("no bytes")
        return bytes(data)

    def _whole(self, file: int, group: int) -> pa.ChunkedArray:
        """The images of a group; whoever asks first reads them, others wait for that."""
        with self._lock:
            ready = self._kept.get((file, group))
            mine = ready is None
            if ready is None:
                ready = self._kept[file, group] = Future()
                if len(self._kept) > 2 * self._held() + 2:  # two windows meet, where one ends
                    self._kept.popitem(last=False)
            self._kept.move_to_end((file, group))
        if mine:
            try:
                ready.set_result(self._unpacked(file, group))
            except BaseException as error:
                ready.set_exception(error)
        return ready.result()

    def _unpacked(self, file: int, group: int) -> pa.ChunkedArray:
        path, column = self.files[file], self.columns[file]
        rows = max(1, min(256, _BATCH // max(1, self.pages[file])))
        found, size = list[pa.Array](), 0
        try:
            with opened_file(path) as inside:
                for values in _of(inside, column, rows, group):
                    size += values.nbytes
                    if size > _GROUP:
                        raise BadImageError(f"a group of rows of more than {_GROUP:,} bytes: write smaller ones")
                    found.append(values)
        except (pa.ArrowException, OSError) as error:
            raise BadImageError(f"{path.name}, group {group} of rows: {error}") from error
        return pa.chunked_array(found)

    def _held(self) -> int:
        """Groups of a window."""
        sizes = np.concatenate(self.taken)
        return max(1, int(_HELD // max(1.0, float(sizes.mean())))) if len(sizes) else 1

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """See `Store`: the share of its group."""
        share = [sizes // np.maximum(rows, 1) for sizes, rows in zip(self.taken, self.rows, strict=True)]
        first = np.cumsum([0, *map(len, share)])
        return np.concatenate(share)[first[self.file[places]] + self.group[places]]

    def stamp(self, place: int) -> str:
        """See `Store`."""
        return f"{file_stamp(self.files[self.file[place]])} {self.group[place]} {self.row[place]}"

    def at(self, places: np.ndarray) -> Groups:
        """See `Store`."""
        chosen = self.file[places], self.group[places], self.row[places]
        return Groups(self.files, self.columns, self.taken, *chosen, self.rows, self.pages)

    @property
    def blocks(self) -> Blocks | None:
        """See `Store`."""
        first = np.cumsum([0, *map(len, self.taken)])
        return Blocks(first[self.file] + self.group, self._held())
