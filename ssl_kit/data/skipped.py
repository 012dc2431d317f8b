"""Images that could not be decoded: counted, listed, and a stop when they are too many."""

from __future__ import annotations

import threading
from pathlib import Path

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_csv


class Skipped:
    """The bad files of a source, shared by its subsets; threads may add at the same time.

    `rows`: (id, reason), each id once, in the order they were met.
    """

    def __init__(self, total: int, max_bad: float) -> None:
        self.total = total  # images listed, good and bad
        self.max_bad = max_bad  # fraction in [0, 1]; 0 is strict
        self.rows: list[tuple[str, str]] = []
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Notes one bad file (again: no matter)."""
        with self._lock:
            if name not in self._known:
                self._known.add(name)
                self.rows.append((name, reason))

    def check(self) -> None:
        """Raises `UserError` when more than the fraction `max_bad` of all images is bad; at 0 the first is too many."""
        if len(self.rows) <= self.max_bad * self.total:
            return
        first = "; ".join(f"{name!r}: {reason}" for name, reason in self.rows[:3])
        allowed = (
            f"more than the {100 * self.max_bad:g}% allowed" if self.max_bad > 0 else "and --max-bad 0 allows none"
        )
        raise UserError(
            f"{len(self.rows):,} of {self.total:,} images could not be decoded, {allowed} ({first}). Remove or repair "
            "them, or allow more with --max-bad"
        )


def write_skipped(path: Path | str, rows: list[tuple[str, str]]) -> None:
    """Writes `skipped.csv` (path, reason; UTF-8) in one step, also when there is nothing to list."""
    write_csv(path, ("path", "reason"), sorted(rows))
