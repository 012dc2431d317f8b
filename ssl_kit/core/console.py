"""One look for all verbs: tables, progress bars and notes, built on rich.

Everything for people goes through `console()`; a verb *returns* its machine-readable record and the command line
prints it under `--json`. With `--json` people's text moves to stderr, so that stdout holds one JSON document.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_WIDTH = 120  # columns of a table when the output is a file or a pipe

_settings = {"to_stderr": False, "quiet": False, "live": False}


def configure(*, to_stderr: bool = False, quiet: bool = False) -> None:
    """Chooses where text for people goes (the command line calls this once, for `--json` and `--quiet`)."""
    _settings.update(to_stderr=to_stderr, quiet=quiet)


def console() -> Console:
    """The console for people's text; colours and width follow the terminal, `NO_COLOR` is obeyed by rich."""
    stream = sys.stderr if _settings["to_stderr"] else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, quiet=_settings["quiet"], width=width, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Prints one line: what was found, what was chosen and why. `[` in the text is literal."""
    console().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints one line that a user should not miss, on stderr, also under `--quiet`."""
    Console(stderr=True, highlight=False, emoji=False).print(
        f"warning: {text}", markup=False, style="yellow", soft_wrap=True
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    grid = Table(title=title, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console().print(grid)


def next_command(command: str) -> None:
    """The last line of every verb: what to type next."""
    say(f"next: {command}")


@contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """A progress bar on stderr with items done, rate and time left; silent when stderr is not a terminal.

    Use `bar.advance(bar.task_ids[0], n)` inside.
    """
    if _settings["live"]:  # inside another bar, such as that of a training run
        with Progress(disable=True) as bar:
            bar.add_task(label, total=total)
            yield bar
        return
    stderr = Console(stderr=True, quiet=_settings["quiet"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        bar.add_task(label, total=total)
        yield bar


def live(on: bool) -> None:
    """Says that a bar is up for long: bars of shorter work stay silent meanwhile."""
    _settings["live"] = on
