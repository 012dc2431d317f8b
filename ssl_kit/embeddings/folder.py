"""The parts of an embeddings folder: Parquet files, written here and read from strangers.

Vectors are stored as they are, neither packed nor encoded, so a folder never holds more of them than it has bytes:
what a manifest promises is compared with that before any memory is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, unreplaced, verify_file
from ssl_kit.core.named import FORMAT
from ssl_kit.core.parquet import batches, contents, types
from ssl_kit.core.sealed import Entries

if TYPE_CHECKING:
    from ssl_kit.embeddings.embeddings import Embeddings

PART_ROWS = 65_536

Storage = Literal["float32", "float16"]

_PART = re.compile(r"part-\d{5,}\.parquet")
_MAX_DIMS = 2**20  # a stranger's manifest may not ask for more
_PACKED, _FREE = 16, 2**24  # a part unpacks to at most 16 times its bytes and 16 MiB: ids and labels are packed


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05d}.parquet"


def part_names(manifest: Entries) -> list[str]:
    """The parts that a manifest names, in the order of their rows."""
    found = [name for name in manifest["files"] if _PART.fullmatch(name)]
    return sorted(found, key=lambda name: (len(name), name))  # part-100000 comes after part-99999


def check_range(vectors: np.ndarray, dtype: Storage) -> None:
    """Raises `UserError` when features are too large for their storage."""
    largest = float(np.abs(vectors).max(initial=0)) if dtype == "float16" else 0.0
    if largest > float(np.finfo(np.float16).max):
        raise UserError(f"features reach {largest:.3g}, float16 ends at 65,504: use --dtype float32 or --normalise")


def write_part(
    path: Path, vectors: np.ndarray, labels: np.ndarray, classes: Sequence[str], ids: Sequence[str], dtype: Storage
) -> None:
    """Writes one part; equal rows give equal bytes.

    Args:
        path: of the file.
        vectors: (rows, D).
        labels: (rows,) positions in `classes`, -1 = unknown.
        classes: class names.
        ids: of the rows.
        dtype: how vectors are stored.
    """
    flat = np.ascontiguousarray(vectors, dtype=dtype).reshape(-1)
    names = np.array([*classes, None], dtype=object)[labels]  # label -1 takes the last
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "label": pa.array(names, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1]),
        }
    )
    # Vectors neither repeat nor compress: plain pages write and read three times as fast as the defaults
    compression = {"id": "zstd", "label": "zstd", "embedding.list.element": "none"}
    pq.write_table(table, path, compression=compression, use_dictionary=["label"], write_statistics=False)


def read_part(path: Path, dims: int, dtype: str) -> pa.Table:
    """A part's three columns, after its headers were compared with what the manifest promises.

    Raises:
        DamagedError: it cannot be read, or is not what `write_part` writes.
    """
    return pa.concat_tables(_blocks(path, dims, dtype, PART_ROWS))


def _blocks(path: Path, dims: int, dtype: str, rows: int) -> Iterator[pa.Table]:
    """`read_part`, so many rows at a time."""
    for table in _tables(path, ("id", "label", "embedding"), rows):
        _check_vectors(table, path, dims, dtype)
        yield table


def _check_vectors(table: pa.Table, path: Path, dims: int, dtype: str) -> None:
    if table["embedding"].type != pa.list_(pa.float32() if dtype == "float32" else pa.float16(), dims):
        raise DamagedError(f"{path} has vectors of {table['embedding'].type}; wanted {dims} {dtype}")


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    """`_tables` in one."""
    return pa.concat_tables(_tables(path, columns, PART_ROWS))


def _tables(path: Path, columns: Sequence[str], most_rows: int) -> Iterator[pa.Table]:
    """Some columns of a part, so many rows at a time, at least one table; its headers are judged before anything is
    unpacked.

    Raises:
        DamagedError: it cannot be read, is not what `write_part` writes, or unpacks to more than its bytes can mean.
    """
    inside = contents(path, ("id", *columns))
    kinds = types(path, inside)
    right = inside.names == ["id", "label", "embedding"] and kinds["id"] == pa.string()
    if not right or kinds.get("label", pa.null()) not in (pa.string(), pa.null()):
        raise DamagedError(f"{path} has {inside.names[:5]}, or ids or labels that are no strings")
    rows, most = inside.columns["id"].rows, _FREE + _PACKED * inside.size
    unpacked = sum(column.unpacked for column in inside.columns.values())
    vectors = kinds.get("embedding", pa.list_(pa.float16(), 0))
    numbers = inside.columns["embedding"].rows if "embedding" in columns else 0
    if not pa.types.is_fixed_size_list(vectors) or numbers != rows * vectors.list_size:
        raise DamagedError(f"{path} has rows without a vector, or no vectors: {str(vectors)[:60]!r}")
    if rows > PART_ROWS or unpacked > most or numbers * vectors.value_type.bit_width > 8 * inside.size:
        raise DamagedError(
            f"{path}: {inside.size:,} bytes that unpack to {rows:,} rows of {unpacked:,} bytes; not what ssl_kit writes"
        )
    strings, empty = 0, [pa.RecordBatch.from_pylist([], pa.schema(kinds))] if not rows else []
    for batch in chain(empty, batches(path, inside, most_rows)):
        strings += sum(batch[name].nbytes for name in inside.columns if name != "embedding")
        if strings > most:
            raise DamagedError(f"{path}: ids and labels of more than {most:,} bytes; not what ssl_kit writes")
        if "id" in columns and batch["id"].null_count:
            raise DamagedError(f"{path} has rows without an id")
        yield pa.Table.from_batches([batch], pa.schema(kinds)).select(list(columns))


def matrix(table: pa.Table, dims: int, path: Path) -> np.ndarray:
    """(rows, dims) of the vectors of a part.

    Raises:
        DamagedError: a row has no vector, or one that is NaN or infinite; with the ids of the first few.
    """
    column = table["embedding"]
    flat = column.combine_chunks().flatten()
    if column.null_count or flat.null_count:
        raise DamagedError(f"{path} has rows without a vector")
    kind = np.dtype(f"f{flat.type.bit_width // 8}")
    # to_numpy would import pandas where there is one, 0.4 s and 30 MB
    buffer = flat.buffers()[1] if len(flat) else b""
    vectors = np.frombuffer(buffer, kind, len(flat), flat.offset * kind.itemsize).reshape(-1, dims)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        names = table["id"].take(pa.array(bad[:3])).to_pylist()
        raise DamagedError(f"{path}: {len(bad):,} vectors are NaN or infinite, first {', '.join(map(repr, names))}")
    return vectors


def _bytes_on_disk(folder: Path, info: Entries) -> int:
    """Of the parts that a manifest names: vectors are stored as they are, so a folder holds no more than this."""
    with unreplaced(folder):
        return sum((folder / name).stat().st_size for name in part_names(info) if (folder / name).is_file())


def checked(info: Entries, folder: Path) -> tuple[int, int, str, list[str]]:
    """rows, dims, dtype and classes of a manifest, each of the right type and range."""
    rows, dims, dtype, classes = (info.get(name) for name in ("rows", "dims", "dtype", "classes"))
    right = (
        info.get("format") == FORMAT
        and type(rows) is int
        and type(dims) is int
        and 0 < dims <= _MAX_DIMS
        and 0 <= rows <= PART_ROWS * len(info["files"])
        and dtype in ("float32", "float16")
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and len(set(classes)) == len(classes)
    )
    if not right:
        got = {name: info.get(name) for name in ("format", "rows", "dims", "dtype")}
        raise DamagedError(f"{folder / MANIFEST} is not of an embeddings folder ({FORMAT}): {got}")
    assert isinstance(rows, int) and isinstance(dims, int) and isinstance(dtype, str) and isinstance(classes, list)
    there, needed = _bytes_on_disk(folder, info), rows * dims * np.dtype(dtype).itemsize
    if there < needed:
        raise DamagedError(
            f"{folder}: {', '.join(part_names(info)[:3])} have {there:,} bytes; {rows:,} vectors of {dims} {dtype} "
            f"take {needed:,}"
        )
    return rows, dims, dtype, classes


def read_vectors(folder: Path, info: Entries, most_rows: int = PART_ROWS) -> Iterator[np.ndarray]:
    """The vectors of a verified folder, (rows, D) float32 part by part: only one part is in memory, or less.

    Args:
        folder: of embeddings.
        info: its manifest, as `read_manifest` gives it.
        most_rows: of a block; a part has 65,536 and is read at once by default, at four times the memory.

    Raises:
        DamagedError: a part is not what the manifest says.
    """
    rows, dims, dtype, _ = checked(info, folder)
    done = 0
    for name in part_names(info):
        for table in _blocks(folder / name, dims, dtype, most_rows):
            vectors = matrix(table, dims, folder / name).astype(np.float32, copy=False)
            done += len(vectors)
            yield vectors
    if done != rows:
        raise DamagedError(f"{folder / MANIFEST} says {rows:,} rows; the parts hold {done:,}")


def read_rows(folder: Path, info: Entries, rows: np.ndarray, column: str) -> dict[int, Any]:
    """Row -> id (`column="id"`) or vector (D,) (`"embedding"`); only the parts that hold one are read, and verified.

    Raises:
        DamagedError: a part is not what the manifest says, or there are fewer rows.
    """
    wanted = np.unique(rows[rows >= 0])
    found: dict[int, Any] = {}
    start = 0
    for name in part_names(info):
        if not len(wanted) or start > wanted[-1]:
            break
        count = contents(folder / name, ("id",)).columns["id"].rows
        inside = wanted[(wanted >= start) & (wanted < start + count)]
        if len(inside):
            verify_file(folder, name, info["files"][name])
            places = pa.py_buffer(inside.astype(np.int64) - start)  # pa.array would import pandas, 0.4 s
            places = pa.Array.from_buffers(pa.int64(), len(inside), [None, places])
            values = _read(folder / name, (column,))[column].take(places).to_pylist()
            found |= {int(row): value for row, value in zip(inside, values, strict=True)}
        start += count
    if len(found) < len(wanted):
        raise DamagedError(f"{folder}: the parts hold {start:,} rows, row {wanted[-1]:,} was asked for")
    return found


def find_ids(folder: Path, info: Entries, ids: Sequence[str]) -> dict[str, int]:
    """Id -> row of those of `ids` that the folder holds; one part's ids are in memory at a time."""
    found: dict[str, int] = {}
    start = 0
    for name in part_names(info):
        verify_file(folder, name, info["files"][name])
        column = _read(folder / name, ("id",))["id"]
        places = np.flatnonzero(pc.is_in(column, value_set=pa.array(ids, pa.string())).to_numpy())
        found |= {column[int(place)].as_py(): start + int(place) for place in places}
        if len(found) == len(set(ids)):
            break
        start += len(column)
    return found


def check_comparable(a: Embeddings, b: Embeddings, emb: str, other: str | None) -> None:
    """Whether two folders, named for the message, hold features of images by one encoder.

    Raises:
        UserError: they were made by something else than `embed`, or differ in encoder, layers or preprocessing.
    """
    made = a.info.get("preprocessing")
    if not isinstance(made, dict) or not isinstance(made.get("channels"), int):
        raise UserError(f"{emb} does not say how its images were prepared: give embeddings that `ssl-kit embed` wrote")
    for name in ("encoder_sha256", "layers", "preprocessing"):
        if a.info.get(name) != b.info.get(name):
            raise UserError(f"{emb} and {other} differ in {name}: embed both with one encoder and the same --layers")
