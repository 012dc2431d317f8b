"""One look for all verbs: tables, progress bars and notes, built on rich.

    say      what was found, what is going to be done          not under --quiet
    detail   what was chosen and why                           under --verbose only
    result   what came out, as a line; `table` as a table      under --quiet too
    warn     what must not be missed, on stderr                under --quiet too
    progress a bar on stderr                                   not under --quiet, and on a terminal only

A verb *returns* its machine-readable record and the command line prints it under `--json`; people's text then moves to
stderr, so that stdout holds one JSON document. Without a terminal there are plain lines: no frames, no colours, and a
row of a table is one line, however long.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ssl_kit.core.process import is_first, printable, terminal

_settings = {"to_stderr": False, "quiet": False, "live": False, "hints": True, "verbose": True}
_own: list[str] = []  # options that name the user's own code
_typed: list[str] = []  # after the verb


def configure(*, to_stderr: bool = False, quiet: bool = False, verbose: bool = True, typed: Sequence[str] = ()) -> None:
    """Chooses where text for people goes (the command line calls this once, for `--json`, `--quiet`, `--verbose`).

    `typed` is what stands after the verb, without these.
    """
    _settings.update(to_stderr=to_stderr, quiet=quiet, verbose=verbose)
    _own.clear()
    _typed[:] = typed


@contextmanager
def spoken(aloud: bool) -> Iterator[None]:
    """For a Python program: no hints at commands in the block, and only warnings unless `aloud`."""
    before = dict(_settings)
    _settings.update(hints=False, quiet=not aloud or before["quiet"], to_stderr=not aloud or before["to_stderr"])
    try:
        yield
    finally:
        _settings.update(before)


def say(text: str) -> None:
    """Prints one line: what was found, what is going to be done. `[` in the text is literal."""
    if not _settings["quiet"]:
        _print(text)


def detail(text: str) -> None:
    """Prints one line that most can do without: what was chosen for them and why."""
    if _settings["verbose"]:
        say(text)


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


def name_own(options: str) -> None:
    """Options in which the command line named code of the user's own: later commands need them again."""
    _own.append(options)


def retyped(command: str, *but: str) -> str:
    """Another command with what was typed for this one, but for some of its options."""
    kept, words = [], iter(_typed)
    for word in words:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name[2:].replace("-", "_") not in but:
            kept.append(word)
        elif not equals:
            next(words, None)
    return " ".join([command, *map(shlex.quote, kept)])


def next_command(command: str, own: bool = True) -> None:
    """The last line of every verb: what to type next; `own` code is named again where it reads images."""
    if _settings["hints"]:
        say(f"next: {' '.join([command, *(_own if own else ())])}")


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

    def __init__(self, stream: IO[str]):
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
