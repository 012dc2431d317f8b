"""Shards that lie elsewhere: `s3://bucket/packed`, `gs://bucket/x-{000..012}.tar`, `https://host/x.tar`.

Each folder of them has one in the cache folder, with `address.json`: which shards there are, their lengths and times. A
shard is copied there whole when the first of its images is asked for, and read by `pread` from then on; when all copies
together take more than `SSL_KIT_SHARD_CACHE` bytes (50 GB by default), those that were not used for longest go.

`pyarrow.fs` talks to object stores, with its own retries and the usual places of credentials; fsspec to web servers.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ssl_kit.core.console import detail
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file, check_space, write_json
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import size_text
from ssl_kit.core.named import TAR, expanded
from ssl_kit.core.process import cache_folder
from ssl_kit.core.sealed import LARGE_JSON, read_object

HELD = 4  # shards of a window: a pure function of the images, so that every machine shuffles alike
_COPIES = "remote-1"  # folder of all copies; the number is that of its format
_ADDRESS = "address.json"
_LIMIT = 50 * 10**9  # bytes
_CHUNK = 8 * 2**20
_SMALL = 2**30  # bytes of an index


class Far(NamedTuple):
    """A file elsewhere: its folder's address, its name, its bytes, and its time in ns (0 where none is told)."""

    folder: str
    name: str
    size: int
    time: int


def is_far(path: Path) -> bool:
    """Whether a path is the place for the copy of something that lies elsewhere."""
    if path.parent.parent.name != _COPIES or not (path.parent / _ADDRESS).is_file():
        return False
    return path.parent.parent == (cache_folder() or Path()) / _COPIES  # nobody else says what is fetched


def found(name: str, beside: Sequence[str]) -> list[Path]:
    """The places for copies of the shards that an address names: a file, a folder, or `x-{000..012}.tar`.

    Args:
        name: the address.
        beside: names of small files that are copied at once, where they are beside the shards.

    Raises:
        UserError: there are none, or they cannot be reached.
    """
    plain, question, options = name.partition("?")
    addresses = expanded(plain)
    folder = plain.rstrip("/") if not plain.endswith(TAR) else plain.rpartition("/")[0]
    system, inner = _system(f"{folder}{question}{options}")
    try:
        if plain.endswith(TAR):
            wanted = [f"{inner}/{one.rpartition('/')[2]}" for one in addresses]
            infos = system.get_file_info([*wanted, *(f"{inner}/{one}" for one in beside)])
        else:
            from pyarrow.fs import FileSelector

            infos = system.get_file_info(FileSelector(inner, allow_not_found=True))
    except Exception as error:  # whatever stores and their clients raise
        raise _unreachable(name, error) from error
    there = {Path(info.path).name: info for info in infos if info.is_file}
    shards = sorted(one for one in there if one.endswith(TAR) and not one.startswith("."))
    missing = [one for one in map(os.path.basename, addresses) if one.endswith(TAR) and one not in there]
    if missing or not shards:
        told = f"{len(missing):,} of its files are not there, first {missing[0]}" if missing else "no .tar is there"
        raise UserError(f"{name}: {told}; pack images into shards first, or check the address")
    place = _place(f"{folder}{question}{options}")
    small = [one for one in beside if one in there and there[one].size <= _SMALL]
    files = {one: [there[one].size, there[one].mtime_ns or 0] for one in (*shards, *small)}
    with lock(place, wait=True):
        known = read_object(place / _ADDRESS, LARGE_JSON).get("files", {}) if (place / _ADDRESS).is_file() else {}
        for one in known:
            if known[one] != files.get(one, known[one]):  # another file of this name: its copy is of the old one
                (place / one).unlink(missing_ok=True)
        write_json(place / _ADDRESS, {"address": f"{folder}{question}{options}", "files": known | files})
    for one in small:
        fetched(place / one)
    detail(f"{name}: {len(shards):,} shards of {size_text(sum(there[one].size for one in shards))}, copied when needed")
    return [place / one for one in shards]


def files_in(place: Path) -> list[Path]:
    """The places of all shards of a folder elsewhere."""
    return sorted(place / name for name in read_object(place / _ADDRESS, LARGE_JSON)["files"] if name.endswith(TAR))


def far(path: Path) -> Far:
    """What the copy at a place is of."""
    said = read_object(path.parent / _ADDRESS, LARGE_JSON)
    size, time = said["files"][path.name]
    return Far(said["address"], path.name, size, time)


def fetched(path: Path) -> Path:
    """The same path, once a file is there: a local one, or the copy of one elsewhere.

    Raises:
        UserError: it cannot be reached, or is another one than it was.
    """
    if not is_far(path):
        return path
    with suppress(FileNotFoundError):
        os.utime(path)  # used now
        return path
    with lock(path.parent, wait=True):
        if not path.exists():
            _copy(far(path), path)
            _make_room(path)
    return path


def _copy(source: Far, path: Path) -> None:
    check_space(path.parent, source.size)
    system, inner = _system(source.folder)
    size, what = 0, f"{source.folder.partition('?')[0]}/{source.name}"
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        try:
            with system.open_input_stream(f"{inner}/{source.name}") as stream:
                while (chunk := stream.read(_CHUNK)) and size <= source.size:
                    size += file.write(chunk)
        except Exception as error:
            raise _unreachable(what, error) from error
        if size != source.size:
            raise UserError(f"{what} has {size:,} bytes and not {source.size:,} as when it was listed; go on")


def _make_room(kept: Path) -> None:
    """Removes copies that were not used for longest; whoever reads from one has it open, and reads on."""
    given = os.environ.get("SSL_KIT_SHARD_CACHE", "")
    limit = int(given) if given.isdigit() else _LIMIT
    copies = sorted(
        (path for path in kept.parent.parent.glob(f"*/*{TAR}") if path != kept), key=lambda path: path.stat().st_mtime
    )
    total = kept.stat().st_size + sum(path.stat().st_size for path in copies)
    for path in copies:
        if total <= limit:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


def _place(address: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise UserError("shards that lie elsewhere need a cache folder: set XDG_CACHE_HOME to one that can be written")
    made = folder / _COPIES / hashlib.sha256(address.encode()).hexdigest()[:24]
    made.mkdir(parents=True, exist_ok=True)
    return made


@functools.lru_cache(8)  # a client takes 0.2 s
def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        if not re.match(r"https?://", address):
            return fs.FileSystem.from_uri(address)
        from fsspec.core import url_to_fs

        system, inner = url_to_fs(address)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), inner
    except ImportError as error:
        raise UserError(f"{address}: {error.name} is missing: pip install 'ssl-kit[cloud]'") from error
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> UserError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return UserError(
        f"{address} cannot be read: {said}. Check address, connection and credentials; what is done is kept"
    )
