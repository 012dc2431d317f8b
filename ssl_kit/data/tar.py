"""Tar files of strangers: which of their members are images, where the bytes of each lie, and what class it has.

Nothing is unpacked. A shard is read forwards once, 8 MiB at a time; what a large member takes is stepped over. Sizes
are judged before anything is read: a header may promise what it likes. Headers are read by the standard library
(`TarInfo.frombuf`), the walk is ours: its own goes round in circles on negative sizes (CVE-2025-8194), and takes the
memory that a long name promises.

A sample of a WebDataset is what shares a name up to its first dot: `a/7.jpg`, `a/7.cls`. Links, sparse files and all
that is hidden (`._7.jpg` of a Mac) are no images.

What is found lies in an index, a Parquet file with the columns id, shard, offset, size, and perhaps label, text, group.
"""

from __future__ import annotations

import os
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.parquet import batches, contents, is_text, types
from ssl_kit.core.sealed import parse_json
from ssl_kit.data.labels import text_of
from ssl_kit.data.listing import ARRAY, BEGINNING, EXTENSIONS, MAX_FILE_BYTES, SIGNATURES, escape
from ssl_kit.data.manifests import LABELS, check_list

BLOCK = 512  # bytes: members begin at multiples of it (POSIX.1-1988, ustar)
_WINDOW = 8 * 2**20
_EXTENDED, _MORE = 482, 504  # bytes that say whether the map of a sparse file goes on, in its header and after it
_SIDE = 2**16  # bytes of a file that says the class, and of one that gives a long name
_LONGEST = 4_096  # bytes of a name: no path has more
_TEXT = 100  # bytes of a `.txt` that may be a class; captions are longer
_NEEDED = ("id", "shard", "offset", "size")  # columns of an index
_COLUMNS = (*_NEEDED, "label", "text", "group")
_SIDES = ("cls", "json", "txt")  # in the order in which they are believed


class Member(NamedTuple):
    """A file in a tar: its name, its first byte, its bytes, and why it can be no image (a link), if it cannot."""

    name: bytes
    offset: int
    size: int
    why: str = ""


@dataclass
class Members:
    """The images of a shard in their order, and what else was seen.

    Attributes:
        names: ids, as listing.py escapes them.
        offsets, sizes: of their bytes.
        labels: what `.cls` or `.json` say; None where they say nothing.
        texts: what short `.txt` say: classes, or captions.
        skipped: (member, reason).
        broken: where and why the walk ended early; empty when it did not.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    broken: str = ""


class _Broken(ValueError):
    """What a tar cannot have."""


class _Window:
    """A file read forwards."""

    def __init__(self, handle: int):
        self.handle, self.size = handle, os.fstat(handle).st_size
        self._start, self._data = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        """These bytes, fewer at the end of the file; `length` is at most a window."""
        if not self._start <= offset <= offset + length <= self._start + len(self._data):
            self._start, self._data = offset, read_at(self.handle, offset, min(_WINDOW, self.size - offset))
        return self._data[offset - self._start : offset - self._start + length]


def read_at(handle: int, offset: int, length: int) -> bytes:
    """So many bytes of an open file, fewer only where it ends; threads may share the handle."""
    data = _pread(handle, length, offset)
    while 0 < len(data) < length and (more := _pread(handle, length - len(data), offset + len(data))):
        data += more
    return data


def _seek_and_read(handle: int, length: int, offset: int) -> bytes:
    with _SEEKING:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.read(handle, length)


_SEEKING = threading.Lock()
_pread = getattr(os, "pread", _seek_and_read)  # Windows has none


def walk(path: Path) -> Members:
    """The images of a tar.

    Raises:
        OSError: it cannot be opened.
    """
    found, sides = Members(), dict[bytes, dict[str, str]]()
    with open(path, "rb", buffering=0) as file:
        window = _Window(file.fileno())
        seen = set[bytes]()
        try:
            for member in _members(window):
                _take(member, window, found, sides, seen)
        except _Broken as error:
            found.broken = str(error)
    _leave_out_masks(found)
    for name in found.names:
        said = sides.get(_stem(name), sides.get(_sample(name), {}))
        found.labels.append(said.get("cls") or said.get("json"))
        found.texts.append(said.get("txt"))
    found.groups = [None] * len(found.names)
    return found


def _take(
    member: Member, window: _Window, found: Members, sides: dict[bytes, dict[str, str]], seen: set[bytes]
) -> None:
    """Takes in a member: an image, what is said of one, or something else."""
    name = member.name.removeprefix(b"./")
    base = name.rpartition(b"/")[2]
    suffix = os.path.splitext(base)[1].decode("utf-8", "replace").lower()
    if base.startswith(b".") or not base or len(name) > _LONGEST:
        return
    if suffix[1:] in _SIDES and not member.why:
        if member.size <= (_SIDE if suffix != ".txt" else _TEXT):
            said = _said(suffix[1:], window.at(member.offset, member.size))
            if said is not None:
                sides.setdefault(_stem(escape(name)), {}).setdefault(suffix[1:], said)
        return
    if suffix not in EXTENSIONS:
        begins = window.at(member.offset, min(BEGINNING, member.size)) if not member.why else b""
        if not (ARRAY if suffix == ".npy" else SIGNATURES).match(begins):
            return
    shown = escape(name)
    if member.why or member.size > MAX_FILE_BYTES:
        found.skipped.append((shown, member.why or f"{member.size:,} bytes; the limit is {MAX_FILE_BYTES:,}"))
    elif name in seen:
        found.skipped.append((shown, "a second member of this name: the first is taken"))
    else:
        seen.add(name)
        found.names.append(shown)
        found.offsets.append(member.offset)
        found.sizes.append(member.size)


def _members(window: _Window) -> Iterator[Member]:
    """Every member but folders.

    Raises:
        _Broken: a header that none has, or the end of the file before that of the archive.
    """
    position, said = 0, dict[str, bytes]()  # what headers before a member say of it: path, size
    while True:
        block = window.at(position, BLOCK)
        if not block.strip(b"\0"):
            if len(block) < BLOCK:
                raise _Broken("it ends without an end" if position else "it is empty")
            return
        try:
            head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = int(said.get("size", head.size))
        except (tarfile.HeaderError, ValueError) as error:
            what = "no tar file" if position == 0 else "damaged" if len(block) == BLOCK else "cut off"
            raise _Broken(f"{what} at byte {position:,}") from error
        first = position + BLOCK
        if head.type == tarfile.GNUTYPE_SPARSE:
            first += BLOCK * _further(window, block[_EXTENDED], first)
        if size < 0:
            raise _Broken(f"a member of {size:,} bytes at byte {position:,}")
        takes = size if head.isreg() or head.type not in tarfile.SUPPORTED_TYPES or head.type in b"LKxgX" else 0
        if head.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if takes > _SIDE or first + takes > window.size:
                raise _Broken(f"a name of {takes:,} bytes at byte {position:,}")
            data = window.at(first, takes)
            said |= {"path": data.split(b"\0")[0]} if head.type == tarfile.GNUTYPE_LONGNAME else _records(data)
        elif head.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            name = said.get("path", head.name.encode("utf-8", "surrogateescape"))
            sparse = head.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in said)
            if head.isreg() or head.issym() or head.islnk():
                yield Member(name, first, size, "sparse" if sparse else "" if head.isreg() else "a link")
            said = {}
        position = first + -(-takes // BLOCK) * BLOCK
        if position > window.size:
            raise _Broken(f"it ends inside the member at byte {first - BLOCK:,}")


def _further(window: _Window, more: int, position: int) -> int:
    """Blocks of the map of a sparse file of GNU tar, that follow its header."""
    count = 0
    while more:
        block = window.at(position + count * BLOCK, BLOCK)
        count, more = count + 1, block[_MORE] if len(block) == BLOCK else 0
    return count


def _records(data: bytes) -> dict[str, bytes]:
    """Of a PAX header: "LENGTH KEY=VALUE\\n", the length counting itself (POSIX.1-2001)."""
    found = dict[str, bytes]()
    while data.strip(b"\0"):
        digits = data.split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or not 0 < length <= len(data):  # one of length 0 would come again for ever
            raise _Broken("a header of names that makes no sense")
        found[key.decode("utf-8", "replace")] = value
        data = data[length:]
    return found


def _stem(name: str) -> bytes:
    """A name without its last ending."""
    return os.path.splitext(name)[0].encode()


def _sample(name: str) -> bytes:
    """A name up to its first dot, as WebDataset has it."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}".encode()


def _said(kind: str, data: bytes) -> str | None:
    """The class that a file beside an image names."""
    try:
        if kind != "json":
            return data.decode("utf-8").strip() or None
        told = parse_json(data, Path("member.json"), _SIDE)
    except (DamagedError, UnicodeDecodeError):
        return None
    plain = {str(key).strip().lower(): value for key, value in told.items()} if isinstance(told, dict) else {}
    value = next((plain[name] for name in LABELS if name in plain), None)
    text = text_of(value) if isinstance(value, str | int | float) else None
    return None if text is None else text.encode("utf-8", "replace").decode()  # JSON may escape half a character


def _leave_out_masks(found: Members) -> None:
    """Of a sample that has `7.jpg`, `7.mask.png` is what belongs to the image, and none of its own."""
    plain = Counter(_sample(name) for name in found.names if _stem(name) == _sample(name))
    keep = [_stem(name) == _sample(name) or not plain[_sample(name)] for name in found.names]
    found.skipped += [
        (name, "belongs to another image of its sample")
        for name, kept in zip(found.names, keep, strict=True)
        if not kept
    ]
    found.offsets = [offset for offset, kept in zip(found.offsets, keep, strict=True) if kept]
    found.sizes = [size for size, kept in zip(found.sizes, keep, strict=True) if kept]
    found.names = [name for name, kept in zip(found.names, keep, strict=True) if kept]


def write_index(path: Path, shards: Sequence[tuple[str, Members]]) -> None:
    """Where the images of shards lie, as a Parquet file; equal shards give equal bytes."""
    gathered = {
        "id": [name for _, members in shards for name in members.names],
        "shard": [name for name, members in shards for _ in members.names],
        **{
            column: [value for _, members in shards for value in getattr(members, kept)]
            for column, kept in {"offset": "offsets", "size": "sizes", "label": "labels", "group": "groups"}.items()
        },
        "text": [text for _, members in shards for text in (members.texts or [None] * len(members.names))],
    }
    kinds = {name: pa.int64() if name in ("offset", "size") else pa.string() for name in gathered}
    arrays = {name: pa.array(values, kinds[name]) for name, values in gathered.items()}
    table = pa.table(
        {name: array for name, array in arrays.items() if name in _NEEDED or array.null_count < len(array)}
    )
    words = [name for name in ("shard", "label", "text", "group") if name in table.column_names]
    pq.write_table(table, path, compression="zstd", use_dictionary=words, write_statistics=False)


def read_index(path: Path) -> dict[str, Members]:
    """What an index says of each shard, by its name.

    Raises:
        DamagedError: it is none; UserError: it says more than its bytes can mean.
    """
    inside = contents(path, _COLUMNS)
    if not set(_NEEDED) <= set(inside.names):
        raise DamagedError(f"{path} has the columns {inside.names[:9]}; wanted {', '.join(_NEEDED)}")
    check_list(path, inside, "id")
    for name, type_ in types(path, inside).items():  # a list of a few bytes stands for as many values as it likes
        if not (pa.types.is_integer(type_) if name in ("offset", "size") else is_text(type_)):
            raise DamagedError(f"{path}: the column {name!r} holds {str(type_)[:60]!r}; wanted what `pack` writes")
    found: dict[str, Members] = {}
    for batch in batches(path, inside):
        columns = {name: batch[name].to_pylist() for name in batch.schema.names}
        whole = [value for name in ("offset", "size") for value in columns[name]]
        if not all(map(is_size, whole)) or not all(isinstance(one, str) for n in ("id", "shard") for one in columns[n]):
            raise DamagedError(f"{path} holds an id, a shard, an offset or a size that is none")
        nothing = [None] * len(batch)
        for shard, name, offset, size, label, text, group in zip(
            *(columns[name] for name in ("shard", "id", "offset", "size")),
            *(map(_text, columns.get(name, nothing)) for name in ("label", "text", "group")),
            strict=True,
        ):
            members = found.setdefault(shard, Members())
            members.names.append(name)
            members.offsets.append(offset)
            members.sizes.append(size)
            members.labels.append(label)
            members.texts.append(text)
            members.groups.append(group)
    return found


def is_size(value: object) -> bool:
    """Whether a value of a record can be a number of bytes."""
    return isinstance(value, int) and 0 <= value < 2**62


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
