"""One writer at a time: a folder is held by a lock on its `.lock`, which ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from ssl_kit.core.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what killed writers leave stays
    fcntl = None

LOCK = ".lock"


@contextmanager
def lock(folder: Path | str, *, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this process; a second holder is refused at once, or waits. The lock ends with the process.

    A folder that is made for it, and in which nothing is written then, is gone again afterwards.

    Raises:
        UserError: another process holds it, or its `.lock` is something else than a file that can be opened.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    handle = _held(folder / LOCK, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            if made and os.listdir(folder) == [LOCK]:
                os.unlink(folder / LOCK)
                for one in made:
                    os.rmdir(one)
        os.close(handle)


def given_up(folder: Path | str) -> bool:
    """Whether surely no process holds `folder`; no where locks cannot tell, as on some file systems and Windows.

    A process that holds it itself is told no, too.
    """
    if fcntl is None:
        return False
    try:
        handle = os.open(Path(folder) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait
    except FileNotFoundError:  # a copy: what is in it is not written on
        return True
    except OSError:
        return False
    try:
        return _lock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _held(path: Path, wait: bool) -> int:
    """An open handle that holds the lock file `path`; what is in the file, if it is somebody else's, stays as it is."""
    patient = True
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise OSError(errno.EINVAL, "no regular file")
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened ({error.strerror}): ssl-kit holds a folder by this file while it works in "
                "it; choose another folder, or see to that file"
            ) from error
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(handle)
            if patient:  # `given_up` may hold it for an instant
                time.sleep(0.05)
                patient = False
                continue
            raise UserError(
                f"{path.parent} is in use by another ssl-kit process: wait for it, or choose another folder"
            ) from error
        except OSError:  # a file system without locks
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)  # its former holder has removed it meanwhile


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a file or folder; yields whether it does: no when it is gone, another holds it, or there are no locks."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        yield fcntl is not None and _lock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    assert fcntl is not None, "asked only where there are locks"
    try:
        fcntl.flock(handle, how)
    except OSError:  # held by another, or a file system without locks
        return False
    return True
