"""Files that are either there, whole and verified, or not there at all.

One writer for checkpoints, encoder folders, embeddings and indexes. The order is what makes it safe: a temporary
folder beside the target, fsync of every file, the manifest with the sha256 of each file last, rename, fsync of the
parent. A reader verifies the manifest and says which file is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ssl_kit.core.errors import UserError

MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 64 * 2**20  # larger JSON of a stranger is refused before it is parsed


class DamagedError(UserError):
    """A file that is missing, cut short or altered since it was written."""


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well, it replaces `path` in one step."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


@contextmanager
def atomic_folder(path: Path | str, manifest: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; when the block ends well, it replaces `path` in one step.

    Args:
        path: the folder to write; an existing one is replaced whole.
        manifest: if given, `manifest.json` is written last: these entries and `files`, the sha256 of every file.
            The dict is read when the block ends, so it may be filled inside.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        if manifest is not None:
            write_manifest(temporary, manifest)
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        os.chmod(temporary, 0o755)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, retired / target.name)
            os.replace(temporary, target)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(target.parent)


def write_manifest(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Writes `manifest.json` of `folder`: `entries` plus `files`, the sha256 of every other file; returns it."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = {name: sha256(folder / name) for name in names if name != MANIFEST and not Path(name).name.startswith(".")}
    manifest = {**entries, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path | str, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of `folder`; with `verify`, every file it names is there and has its sha256.

    Raises:
        DamagedError: naming the folder, the file, and what was got and wanted.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise DamagedError(f"{folder} has no {MANIFEST}: it was not written by ssl_kit, or the writing was cut off")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{folder / MANIFEST} names no files; expected the manifest that ssl_kit writes")
    if verify:
        for name, wanted in manifest["files"].items():
            verify_file(folder, name, wanted)
    return manifest


def verify_file(folder: Path, name: str, wanted: str) -> None:
    """Raises `DamagedError` unless `folder/name` stays inside the folder, exists and has the sha256 `wanted`."""
    file = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise DamagedError(f"{folder / MANIFEST} names {name!r}, outside its folder; refused")
    if not file.is_file():
        raise DamagedError(f"{file} is missing, though {folder / MANIFEST} names it")
    got = sha256(file)
    if got != wanted:
        raise DamagedError(f"{file} is damaged: sha256 {got[:12]}..., {folder / MANIFEST} says {str(wanted)[:12]}...")


def sha256(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Reads JSON; a damaged or oversized file raises `DamagedError` with its path."""
    path = Path(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise DamagedError(f"{path} has {path.stat().st_size:,} bytes; JSON files here stay below {_MAX_JSON_BYTES:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error


def append_line(path: Path | str, value: Any) -> None:
    """Appends one JSON line and syncs it."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Asks the disk to keep a file's bytes or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(folder: Path | str) -> Iterator[None]:
    """Holds `folder` for this process; a second holder is refused at once. The lock ends with the process."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock", timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another ssl-kit process: wait for it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        held.release()
