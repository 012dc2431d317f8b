"""Files that are either there, whole and verified, or not there at all.

One writer for checkpoints, encoder folders, embeddings and indexes. The order is what makes it safe: a temporary
folder beside the target (never in TMPDIR, which may be another disk), fsync of every file, the manifest with the sha256
of each file last, rename, fsync of the parent. A folder that is there already and the new one swap their names in one
step; where the file system cannot do that (NFS), a reader puts the old one back if the writer was killed between two
renames. A reader verifies the manifest and says which file is damaged.

What is being written is locked, so that the next writer of the same target can tell it from what a killed one has left,
and removes the latter. What a folder holds beside files of ours goes on into the new one, and what is not ours is not
replaced: see owned.py.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ssl_kit.core.console import warn
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.locking import locked
from ssl_kit.core.process import FULL
from ssl_kit.core.sealed import LARGE_JSON, MAX_JSON, Entries, read_json, read_sealed, sealed  # noqa: F401 (who writes files reads some)

MANIFEST = "manifest.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and linux/fs.h


claims: list[Callable[[Path], None]] = []  # each is told of a file before it is written: see owned.Record


class FullError(UserError):
    """No room for a file: the disk or a quota is full. What was there before is untouched."""


class NotOursError(UserError):
    """Something that ssl_kit did not write stands where a file is to be written. It is untouched."""


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, it replaces `path` in one step.

    Raises:
        FullError: the disk is full.
        NotOursError: `path` is a link, or lies in a folder of ours whose record does not list it.
    """
    target = Path(path)
    may_write(target)
    with _said_when_full(target), beside(target, ".tmp") as temporary:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        sync(target.parent)


def may_write(target: Path) -> None:
    """Raises `NotOursError` where a file of somebody else, or a link, would be lost; open records list it."""
    if target.is_symlink():
        raise NotOursError(f"{target} is a link: nothing is written through it; remove it, or choose another place")
    for claim in claims:
        claim(target)


def write_csv(path: Path | str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes a table in one step, UTF-8; its folder is made."""
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def atomic_folder(
    path: Path | str, manifest: Mapping[str, object] | None = None, *, record: str = MANIFEST
) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; when the block ends well, it replaces `path` in one step.

    Args:
        path: the folder to write; the files of ours in an existing one are gone afterwards, others stay.
        manifest: if given, `manifest.json` is written last: these entries and `files`, the sha256 of every file.
            The dict is read when the block ends, so it may be filled inside.
        record: the file by which an existing folder is known to be ours.

    Raises:
        FullError: the disk is full.
        NotOursError: `path` is a link, or holds files of these names that are not ours.
    """
    target = Path(path)
    _check_place(target)
    with _said_when_full(target), beside(target, ".tmp", folder=True) as temporary:
        yield temporary
        if manifest is not None:
            write_manifest(temporary, manifest)
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        os.chmod(temporary, 0o755)
        _check_place(target)
        _carry(target, temporary, record)
        _put_in_place(temporary, target)


def _check_place(target: Path) -> None:
    if target.is_symlink():
        raise NotOursError(f"{target} is a link: nothing is replaced through it; remove it, or choose another folder")


def _carry(target: Path, made: Path, record: str) -> None:
    """Links into `made` what `target`, whose place it takes, holds beside files of ours; both have it for a moment."""
    if not target.is_dir():
        return
    own, known = set(entries(made)), listed(target)
    if not known and (target / record).is_file():
        known = own  # it lists none, or cannot be read: ours by their names
    for name in entries(target):
        if name in own and name not in known:
            raise NotOursError(f"{target / name} is not ssl_kit's: move it away, or choose another folder")
        if name in known:
            continue
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        if (target / name).is_dir() and not (target / name).is_symlink():
            (made / name).mkdir(exist_ok=True)
            continue
        try:
            os.link(target / name, made / name, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(target / name, made / name, follow_symlinks=False)


def entries(folder: Path) -> list[str]:
    """Names below `folder` of its files, links and empty folders, sorted; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [str(below / name) for name in (*files, *links)]
        if not folders and not files and place != str(folder):
            found.append(str(below))
    return sorted(found)


def listed(folder: Path) -> set[str]:
    """Names of the files that the manifest of `folder` lists, its own among them; none where it cannot be read."""
    with suppress(DamagedError):
        files = read_sealed(folder / MANIFEST, LARGE_JSON).get("files")
        if isinstance(files, dict) and all(map(is_inside, files)):
            return {MANIFEST, *files}
    return set()


def is_inside(name: object) -> bool:
    """Whether a name out of a record or manifest stays inside its folder."""
    return isinstance(name, str) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


def _put_in_place(made: Path, target: Path) -> None:
    """Gives the folder `made` its name; what had it before is gone afterwards, or has the temporary name."""
    if not os.path.lexists(target):
        os.replace(made, target)
    elif not _exchanged(made, target):
        with beside(target, ".old", folder=True) as retired:
            try:
                os.replace(target, retired / target.name)
                os.replace(made, target)  # a writer killed before this line leaves no target: see `settle`
            finally:
                if not os.path.lexists(target):
                    os.replace(retired / target.name, target)
    sync(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def settle(path: Path | str) -> None:
    """Puts a missing folder back that a killed writer had moved away to replace it. Readers call it first.

    Waits for a writer that is just doing that.
    """
    target = Path(path)
    if os.path.lexists(target):
        return
    for retired in _left(target, r"\.old"):
        with locked(retired, wait=True):
            if (retired / target.name).exists() and not os.path.lexists(target):
                os.replace(retired / target.name, target)


@contextmanager
def beside(target: Path, suffix: str, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target`, locked; removed at the end if it still has its temporary name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))
        else:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent)
            os.close(handle)
            temporary = Path(name)
        with locked(temporary, wait=True):
            if not temporary.exists():  # another writer came in between and took it for litter
                continue
            try:
                yield temporary
            finally:
                _remove(temporary)
            return


def _sweep(target: Path) -> None:
    """Removes what killed writers of `target` have left."""
    settle(target)
    for litter in _left(target, r"\.(tmp|old)"):
        with locked(litter, wait=False) as dead:
            if dead:
                _remove(litter)


def _left(target: Path, suffix: str) -> list[Path]:
    """What lies beside `target` under one of its temporary names, of living writers and dead ones."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{suffix}")
    found = os.listdir(target.parent) if target.parent.is_dir() else []
    return [target.parent / one for one in found if name.fullmatch(one)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _said_when_full(target: Path) -> Iterator[None]:
    """Whoever writes, and however it says that there is no room, one error in words that names the target."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, FullError) as error:
        for number in FULL:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                raise FullError(
                    f"{target} could not be written: {os.strerror(number)}. Make room there; what it was is kept"
                ) from error
        raise


@contextmanager
def if_room(target: Path) -> Iterator[None]:
    """A full disk in the block, or somebody else's file, is said, and no more: for what a long work can do without."""
    try:
        with _said_when_full(target):
            yield
    except (FullError, NotOursError) as error:
        warn(f"{error}. The work goes on")


def check_space(folder: Path, needed: int) -> None:
    """Raises `FullError` when the disk of `folder`, which may not exist yet, has less than `needed` bytes to give."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    if disk.total > 0 and disk.free < needed:
        raise FullError(
            f"{folder} has {disk.free / 2**20:,.1f} MiB of free space and {needed / 2**20:,.1f} are needed; make room "
            "there"
        )


def write_manifest(folder: Path, entries: Mapping[str, object]) -> Entries:
    """Writes `manifest.json` of `folder`: `entries` plus `files`, the sha256 of every other file; returns it."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: sha256(folder / name) for name in names if name != MANIFEST and not Path(name).name.startswith(".")}
    manifest = {**entries, "files": files}
    write_sealed(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path | str, *, verify: bool = True, limit: int = MAX_JSON) -> Entries:
    """The manifest of `folder`; with `verify`, every file it names is there and has its sha256.

    Raises:
        DamagedError: naming the folder, the file, and what was got and wanted.
    """
    folder = Path(folder)
    settle(folder)
    if not (folder / MANIFEST).is_file():
        raise DamagedError(f"{folder} has no {MANIFEST}: it was not written by ssl_kit, or the writing was cut off")
    manifest = read_sealed(folder / MANIFEST, limit)
    if not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{folder / MANIFEST} names no files; expected the manifest that ssl_kit writes")
    if verify:
        for name, wanted in manifest["files"].items():
            verify_file(folder, name, wanted)
    return manifest


@contextmanager
def unreplaced(folder: Path) -> Iterator[None]:
    """Raises `DamagedError` when the block misses a file of `folder`: somebody else is replacing it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{folder} was replaced while it was read: read it again") from error


def verify_file(folder: Path, name: str, wanted: str) -> None:
    """Raises `DamagedError` unless `folder/name` stays inside the folder, exists and has the sha256 `wanted`."""
    file = folder / name
    if not is_inside(name):
        raise DamagedError(f"{folder / MANIFEST} names {name!r}, outside its folder; refused")
    if not file.is_file():
        raise DamagedError(f"{file} is missing, though {folder / MANIFEST} names it")
    with unreplaced(folder):
        got = sha256(file)
    if got != wanted:
        raise DamagedError(f"{file} is damaged: sha256 {got[:12]}..., {folder / MANIFEST} says {str(wanted)[:12]}...")


def sha256(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json_text(value)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: object) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_sealed(path: Path | str, entries: Mapping[str, object]) -> None:
    """Writes entries as JSON that notices any later change of itself; `core.sealed.read_sealed` reads it."""
    write_json(path, sealed(entries))


def append_line(path: Path | str, value: object) -> None:
    """Appends one JSON line and syncs it. A line that was cut off there before stays a line of its own."""
    line = json.dumps(value, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    may_write(Path(path))
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Asks the disk to keep a file's bytes or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
