"""Standard output and error: they may go away, and no file name steers the terminal behind them.

A pipe whose reader has gone, a terminal that was closed, a full disk behind `> log`: what is printed then is lost, and
nothing else. This is done below all who print, at the descriptor. `protect` is the first thing the command line does:

    print, tracebacks, warnings, libraries   control characters are shown as escapes; for them there is no terminal
    core/console.py, and nobody else         the terminal itself, with colours and bars
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a file
# what would move the cursor, ring, recolour the terminal or turn the direction of text, in names of files above all
_STEERING = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _STEERING if code not in (9, 10)}


def printable(text: str, stream: IO[str] | None) -> str:
    """The text as `stream` can take it: control characters, and what its encoding lacks, as backslash escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.translate(_ESCAPES).encode(encoding, "backslashreplace").decode(encoding)


def protect() -> None:
    """Makes sure of both streams, for the rest of the process."""
    for descriptor in range(3):  # closed ones would be given to the next file, and libraries would print into that
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, _Plain(lasting(stream)))


def terminal(stream: Any) -> IO[str]:
    """What lies behind a stream that `protect` or a progress bar has covered; it may be a terminal."""
    while (behind := getattr(stream, "rich_proxied_file", None) or getattr(stream, "behind", None)) is not None:
        stream = behind
    return lasting(stream)


def lasting(stream: Any) -> Any:
    """A stream to the same place that outlives it; the stream itself where it is no file (in a notebook, a test)."""
    buffer = getattr(stream, "buffer", None)
    if type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        return stream
    with suppress(OSError):
        stream.flush()
    raw: Any = _Lasting(stream.fileno())
    return io.TextIOWrapper(
        raw if isinstance(buffer, io.FileIO) else io.BufferedWriter(raw),  # python -u: no buffer
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost(stream: Any) -> OSError | None:
    """Why the last of what was printed did not get through; None when all did."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.error if isinstance(raw, _Lasting) else None


class _Lasting(io.FileIO):
    """Writes to a descriptor, which stays open; drops what does not get through.

    Attributes:
        error: why something was dropped.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of it, whatever comes; bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written: int | None = super().write(left)
                if written is None:  # somebody has made it non-blocking, and it is full
                    waiting = select.poll()
                    waiting.register(self.fileno(), select.POLLOUT)
                    waiting.poll()
                left = left[written or 0 :]
        except OSError as error:
            self.error = error
            if error.errno not in FULL:  # gone for good, also for libraries that print by themselves
                with suppress(OSError):
                    self._leave()
        return size

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Plain:
    """A stream for all who print, as its name says: no terminal, no control characters."""

    def __init__(self, behind: IO[str]):
        self.behind = behind

    def write(self, text: str) -> int:
        """Writes it with escapes."""
        self.behind.write(printable(text, self.behind))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them with escapes."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """So that nobody sends colours, which would be shown as escapes."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)
