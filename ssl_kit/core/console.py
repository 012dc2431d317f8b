"""One look for all verbs: tables, progress bars and notes, built on rich.

    say      what was found, what was chosen and why           not under --quiet
    result   what came out, as a line; `table` as a table      under --quiet too
    warn     what must not be missed, on stderr                under --quiet too
    progress a bar on stderr                                   not under --quiet, and on a terminal only

A verb *returns* its machine-readable record and the command line prints it under `--json`; people's text then moves to
stderr, so that stdout holds one JSON document. Without a terminal there are plain lines: no frames, no colours, and a
row of a table is one line, however long.

Output may go away, and no file name steers the terminal behind it. A pipe whose reader has gone, a terminal that was
closed, a full disk behind `> log`: what is printed then is lost, and nothing else. This is done below all who print, at
the descriptor. `protect` is the first thing the command line does:

    print, tracebacks, warnings, libraries   control characters are shown as escapes; for them there is no terminal
    what is below, and nobody else           the terminal itself, with colours and bars
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ssl_kit.core.process import is_first

_settings = {"to_stderr": False, "quiet": False, "live": False}


def configure(*, to_stderr: bool = False, quiet: bool = False) -> None:
    """Chooses where text for people goes (the command line calls this once, for `--json` and `--quiet`)."""
    _settings.update(to_stderr=to_stderr, quiet=quiet)


def say(text: str) -> None:
    """Prints one line: what was found, what was chosen and why. `[` in the text is literal."""
    if not _settings["quiet"]:
        _print(text)


def result(text: str) -> None:
    """Prints one line of what came out, also under `--quiet`; not beside `--json`, which says it better."""
    if not (_settings["quiet"] and _settings["to_stderr"]):
        _print(text)


def warn(text: str) -> None:
    """Prints one line that a user should not miss, on stderr, also under `--quiet`; one process for all."""
    if not is_first():
        return
    stderr_console().print(f"warning: {text}", style="yellow", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, a result; the first column is left-aligned, the others right-aligned."""
    if _settings["quiet"] and _settings["to_stderr"]:
        return
    console = _console()
    cells = [[printable(str(cell), console.file) for cell in row] for row in (columns, *rows)]
    if not console.is_terminal:
        console.print("\n".join([title, *_aligned(cells)]), soft_wrap=True)
        return
    grid = Table(title=printable(title, console.file), title_justify="left", header_style="bold")
    for position, column in enumerate(cells[0]):
        grid.add_column(column, justify="left" if position == 0 else "right")
    for row in cells[1:]:
        grid.add_row(*row)
    console.print(grid)


def next_command(command: str) -> None:
    """The last line of every verb: what to type next."""
    say(f"next: {command}")


@contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """A progress bar on stderr with items done and time left; silent when stderr is not a terminal.

    Use `bar.advance(bar.task_ids[0], n)` inside.
    """
    console = stderr_console()
    silent = _settings["live"] or not shows_bars()  # live: inside another bar, such as that of a training run
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        bar.add_task(label, total=total)
        yield bar


def shows_bars() -> bool:
    """Whether a progress bar has somebody to look at it: stderr is a terminal, and not `--quiet`."""
    return stderr_console().is_terminal and not _settings["quiet"]


def stderr_console() -> Console:
    """The console of bars and warnings; colours and width follow the terminal, `NO_COLOR` is obeyed by rich."""
    return _Console(sys.stderr)


def live(on: bool) -> None:
    """Says that a bar is up for long: bars of shorter work stay silent meanwhile."""
    _settings["live"] = on


@contextmanager
def if_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C in the block ends it with a `KeyboardInterrupt` that says what is kept and how to go on.

    Verbs that leave nothing behind do without: the command line says "nothing was written" for them.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning answers the Ctrl-C that it sees by SystemExit(1)
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(kept()) from stop


class _Console(Console):
    """Prints on what lies behind a stream; names in the text cannot steer it."""

    def __init__(self, stream: Any):
        super().__init__(file=terminal(stream), highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints texts with escapes, also those of others that rich puts above a progress bar."""
        texts = [one.plain if isinstance(one, Text) else one for one in objects]
        super().print(*(printable(one, self.file) if isinstance(one, str) else one for one in texts), **options)


def _console() -> Console:
    return _Console(sys.stderr if _settings["to_stderr"] else sys.stdout)


def _print(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """One line per row, columns two spaces apart, the first left-aligned and the others right-aligned."""
    rows = [[cell.replace("\n", " ") for cell in row] for row in cells]
    count = max(map(len, rows))
    rows = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(count)]
    lines = []
    for row in rows:
        padding = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        parts = [row[0] + padding[0], *(space + cell for cell, space in zip(row[1:], padding[1:], strict=True))]
        lines.append("  ".join(parts).rstrip())
    return lines


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
