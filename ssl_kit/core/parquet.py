"""Parquet files of strangers: how much they unpack to is judged from their headers before anything is unpacked.

A few bytes of a Parquet file can stand for gigabytes: pages are compressed, a dictionary holds a value once however
often it occurs, runs of it take no bytes at all, and a footer promises what it likes. Arrow believes all of it: a
footer of 34 bytes takes 680 MiB. So the footer, and the header of every page of the wanted columns, are walked here
first. They are in Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), with the fields of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift. Arrow unpacks a page to as many
bytes as its header says, or gives up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_kit.core.errors import DamagedError

# What any file may have, and how many of its bytes must stand behind each further one. Arrow keeps 2 kB for a column
# and 1 kB for a piece of one (a column in a group of rows); walking takes 10 microseconds for either, and for a page
_COLUMNS = 2**14
_FOOTER, _PIECES, _ITEMS, _PAGES = (2**21, 16), (2**14, 256), (2**17, 64), (2**12, 64)
_DEEPEST = 20  # structures inside each other; Parquet's own have 7
_HEADER = (2**9, 2**16)  # bytes that are read for the header of a page: at first, and if they do not suffice
_TRUE, _FALSE, _BYTE, _INT16, _INT32, _INT64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = range(1, 14)
_WHOLE = {0, 2, 3, 4, 8}  # encodings that store values as they are, or once in a dictionary


@dataclass
class Column:
    """What the headers of a column say.

    Attributes:
        rows: values, null ones included; of a column of lists, those in the lists.
        unpacked: bytes of all pages.
        largest: bytes of the largest page; no value is longer.
        repeats: whether there is a dictionary: values stored once for many rows.
        whole: whether all values are stored so or as they are; else what they share with the one before is left out.
    """

    rows: int = 0
    unpacked: int = 0
    largest: int = 0
    repeats: bool = False
    whole: bool = True


@dataclass
class Contents:
    """What the headers of a file say: its bytes, its columns by name, and those that were asked for and are there."""

    size: int
    names: list[str]
    columns: dict[str, Column]


def contents(path: Path, wanted: Sequence[str]) -> Contents:
    """Walks the headers of a file; of columns that are not wanted only the names are looked at.

    A part of a nested column may be wanted alone: `image.bytes`.

    Raises:
        DamagedError: it is no Parquet file, or one whose headers contradict each other or its length.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            names, pieces = _footer(_read_footer(file, size), set(wanted))
            if sum(length for found in pieces.values() for _, length in found) > size:
                raise ValueError("its columns have more bytes than the file")
            pages = _at_most("pages", _PAGES, size)
            columns = {name: _column(file, found, pages) for name, found in pieces.items()}
    except (OSError, ValueError, IndexError) as error:
        why = "a header ends too early" if isinstance(error, IndexError) else str(error)
        raise DamagedError(f"{path} cannot be read as Parquet: {why}") from error
    return Contents(size, names, columns)


def batches(path: Path, inside: Contents, rows: int = 2**14, text: int = 2**23) -> Iterator[pa.RecordBatch]:
    """The wanted columns, batch by batch, in their order; what is no UTF-8 is refused, not passed on.

    Args:
        path: of the file.
        inside: what `contents` said of it; whoever calls this has judged it.
        rows: of a batch, at most.
        text: bytes that the strings of one column in a batch may take, unless one string takes more.

    Raises:
        DamagedError: Arrow cannot read it.
    """
    try:
        with opened(path) as file:
            words = [name for name in inside.columns if is_text(file.schema_arrow.field(name).type)]
            longest = max([1, *(_longest(path, name, inside.columns[name], text // rows) for name in words)])
            count = max(1, min(rows, text // longest))
            for batch in file.iter_batches(count, columns=list(inside.columns), use_threads=False):
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read as Parquet: {error}") from error


def _longest(path: Path, name: str, column: Column, enough: int) -> int:
    """Bytes of the longest string that rows of a column share; at most `enough` if it is below that.

    One in a dictionary stands for as many rows as it likes. The first row of a group brings all of its dictionary.
    """
    if column.largest <= enough or not column.whole:
        return column.largest
    longest = 1
    if not column.repeats:
        return longest
    with opened(path, [name]) as file:
        for group in range(file.num_row_groups):
            for batch in islice(file.iter_batches(1, row_groups=[group], columns=[name], use_threads=False), 1):
                longest = max(longest, pc.max(pc.binary_length(batch.column(0).dictionary)).as_py() or 1)
    return longest


def types(path: Path, inside: Contents) -> dict[str, pa.DataType]:
    """Of the wanted columns.

    Raises:
        DamagedError: Arrow cannot read the footer.
    """
    try:
        with opened(path) as file:
            return {name: file.schema_arrow.field(name).type for name in inside.columns}
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read as Parquet: {error}") from error


def schema(path: Path) -> pa.Schema:
    """Names and types of all columns.

    Raises:
        DamagedError: it is no Parquet file.
    """
    contents(path, ())  # Arrow believes any footer
    try:
        with opened(path) as file:
            return file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read as Parquet: {error}") from error


def is_text(type_: pa.DataType) -> bool:
    """Whether values of a type are strings or bytes, or stand in a dictionary of such."""
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{kind}")(inner) for kind in kinds)


def opened(path: Path, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    """A file whose headers were judged; of the columns `dictionaries` each value is kept once, as it is stored."""
    # unbuffered, Arrow would hold all of a column's bytes
    return pq.ParquetFile(path, read_dictionary=list(dictionaries), pre_buffer=False, buffer_size=2**16)


def _at_most(what: str, limit: tuple[int, int], size: int) -> Callable[[], None]:
    """A function that counts its calls, and refuses more than a file of `size` bytes may have."""
    free, bytes_per_one = limit
    left = free + size // bytes_per_one

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it has more {what} than {size:,} bytes can mean")

    return count


def _read_footer(file: IO[bytes], size: int) -> _Thrift:
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length > size - 12:
        raise ValueError("it has no footer")
    if length > _FOOTER[0] + size // _FOOTER[1]:
        raise ValueError(f"its footer takes {length:,} of {size:,} bytes")
    file.seek(size - 8 - length)
    return _Thrift(file.read(length), size)


def _footer(footer: _Thrift, wanted: set[str]) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """Names of the columns; and of the wanted ones, where the pieces are: first byte and length."""
    names, leaves = list[str](), list[tuple[str, str]]()  # leaves: what each piece of a group of rows is of
    pieces: dict[str, list[tuple[int, int]]] = {}
    count = _at_most("pieces of columns", _PIECES, footer.file_size)
    for field, kind in footer.fields():
        if (field, kind) == (2, _LIST):
            names, leaves = _schema(footer)
            pieces = {name: [] for name in (*names, *(leaf for _, leaf in leaves)) if name in wanted}
        elif (field, kind) == (4, _LIST):
            for _ in footer.items():
                found = 0
                for piece in _pieces(footer):
                    count()
                    for name in {*leaves[found]} & pieces.keys():
                        pieces[name].append(piece)
                    found += 1
                if found != len(leaves):
                    raise ValueError(f"a group of rows has {found} columns of {len(leaves)}")
        else:
            footer.skip(kind)
    return names, pieces


def _schema(footer: _Thrift) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the columns; and of each leaf its column and its own name, `image.bytes` of a nested one."""
    names, leaves, inside = list[str](), list[tuple[str, str]](), list[str]()
    to_come = [1]  # elements that are still to come, level by level
    for number, _ in enumerate(footer.items()):
        said = footer.picked({1: _INT32, 4: _BINARY, 5: _INT32})
        children = said.get(5, 0)
        if not to_come or number > _COLUMNS or len(to_come) > _DEEPEST or children < 0 or (children > 0) == (1 in said):
            raise ValueError("its schema makes no sense, or is too large")
        inside[max(0, len(to_come) - 2) :] = [said.get(4, b"").decode("utf-8", "replace")] * (len(to_come) > 1)
        if len(to_come) == 2:
            names.append(inside[0])
        if not children:
            leaves.append((names[-1], ".".join(inside)))
        to_come[-1] -= 1
        to_come.append(children)
        while to_come and not to_come[-1]:
            to_come.pop()
    if to_come or len(set(names)) < len(names):
        raise ValueError("its schema ends too early, or has a name twice")
    return names, leaves


def _pieces(footer: _Thrift) -> Iterator[tuple[int, int]]:
    """First byte and length of the pieces of a group of rows (RowGroup, ColumnChunk, ColumnMetaData)."""
    for field, kind in footer.fields():
        if (field, kind) != (1, _LIST):
            footer.skip(kind)
            continue
        for _ in footer.items():
            said = footer.picked({3: {5: _INT64, 7: _INT64, 9: _INT64, 11: _INT64}}).get(3, {})
            length, data, dictionary = said.get(7, -1), said.get(9, -1), said.get(11, 0)
            start = dictionary if 0 < dictionary < data else data
            if said.get(5) == 0:
                length = 0  # nothing is read; writers put anything there
            if min(start, length) < 0:
                raise ValueError("its footer does not say where a column is")
            yield start, length


def _column(file: IO[bytes], pieces: list[tuple[int, int]], count: Callable[[], None]) -> Column:
    """Walks the headers of the pages (PageHeader, DataPageHeader, DataPageHeaderV2)."""
    column = Column()
    for start, length in pieces:
        at, end = start, start + length
        while at < end:
            count()
            said, bytes_of_header = _page(file, at)
            unpacked, packed = said.get(2, -1), said.get(3, -1)
            at += bytes_of_header + packed
            if min(unpacked, packed) < 0 or at > end:
                raise ValueError("a page has more bytes than its column")
            column.unpacked += unpacked
            column.largest = max(column.largest, unpacked)
            column.repeats |= 7 in said
            for page, place in ((5, 2), (8, 4)):
                if page in said:
                    column.rows += max(0, said[page].get(1, 0))
                    column.whole &= said[page].get(place) in _WHOLE
    return column


def _page(file: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The header of a page, and its length in bytes."""
    for size in _HEADER:
        file.seek(at)
        header = _Thrift(file.read(size), size)
        try:
            values = {1: _INT32, 2: _INT32, 4: _INT32}
            return header.picked({2: _INT32, 3: _INT32, 5: values, 7: {}, 8: values}), header.at
        except IndexError:
            continue
    raise IndexError


Wanted: TypeAlias = "Mapping[int, int | Wanted]"  # of a structure: number of a field -> type, or what is wanted of it


class _Thrift:
    """Reads Thrift's compact protocol, from first to last byte, and keeps nothing that is not asked for.

    `fields` and `items` give control for each field or item; whoever has it reads the value, or skips it. What is no
    Thrift is an `IndexError` (it ends too early) or a `ValueError`.
    """

    def __init__(self, data: bytes, file_size: int) -> None:
        self.data, self.file_size, self.at, self.depth = data, file_size, 0, 0
        self._count = _at_most("parts in its headers", _ITEMS, file_size)

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a structure."""
        number = 0
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("its headers nest too deep")
        while byte := self._byte():
            last, number = number, number + (byte >> 4) if byte >> 4 else self.integer()
            if number <= last:  # every writer goes up; of a field that came twice Arrow might take the other one
                raise ValueError("its headers have their fields in no order")
            yield number, byte & 15
        self.depth -= 1

    def items(self) -> Iterator[int]:
        """The type of each item of a list."""
        byte = self._byte()
        for _ in range(byte >> 4 if byte < 0xF0 else self._varint()):
            self._count()
            yield byte & 15

    def picked(self, wanted: Wanted) -> dict[int, Any]:
        """Those fields of a structure that have a wanted number and type: whole numbers, bytes, structures.

        Args:
            wanted: number -> type, or for a structure what is wanted of it.
        """
        found = dict[int, Any]()
        for number, kind in self.fields():
            type_ = wanted.get(number)
            if isinstance(type_, Mapping) and kind == _STRUCT:
                found[number] = self.picked(type_)
            elif kind != type_:  # Arrow leaves out what has another type, too
                self.skip(kind)
            else:
                found[number] = self._binary() if kind == _BINARY else self.integer()
        return found

    def skip(self, kind: int) -> None:
        """Reads on behind a value of a type."""
        if kind in (_TRUE, _FALSE):
            return
        if kind in (_INT16, _INT32, _INT64):
            self._varint()
        elif kind in (_BYTE, _DOUBLE, _UUID):
            self.at += {_BYTE: 1, _DOUBLE: 8, _UUID: 16}[kind]
        elif kind == _BINARY:
            self._binary()
        elif kind == _STRUCT:
            for _, inner in self.fields():
                self.skip(inner)
        elif kind in (_LIST, _SET):
            for inner in self.items():
                self.skip(_BYTE if inner in (_TRUE, _FALSE) else inner)
        else:  # a map: Parquet has none
            raise ValueError(f"its headers have a field of type {kind}")

    def integer(self) -> int:
        """A whole number of 16 to 64 bits (zigzag)."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _binary(self) -> bytes:
        length = self._varint()
        self.at += length
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - length : self.at]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its headers have a number of more than 64 bits")
        return value | byte << shift
