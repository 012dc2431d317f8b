"""Requests to stop: SIGTERM (schedulers, containers), SIGINT (Ctrl-C), SIGUSR1 (a scheduler's warning before the end),
SIGHUP (the terminal was closed, the connection is lost; not under nohup).

Nothing is ever saved inside a handler. Until `patient` is set there is nothing to save: the first signal ends the block
right where it is, as Ctrl-C does. From then on it is only noted in `received`, and whoever works inside stops where the
work can go on later. A second Ctrl-C always means now.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_HEEDED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def heeded() -> list[signal.Signals]:
    """Those that this system has, without a SIGHUP that nohup has put off."""
    numbers = [getattr(signal, name) for name in _HEEDED if hasattr(signal, name)]
    return [one for one in numbers if one.name != "SIGHUP" or signal.getsignal(one) != signal.SIG_IGN]


class Signals:
    """Heeds them inside a `with` block; outside the main thread, where they cannot be had, it does nothing.

    Attributes:
        received: number of the first signal, or None.
        patient: only note it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in heeded():
            try:
                self._former[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there heeds signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives them back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def take(self) -> None:
        """Takes them again inside the block, from somebody who has taken them meanwhile."""
        for number in self._former:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not again:
            self.received = number
        if number == signal.SIGINT and (again or not self.patient):
            raise KeyboardInterrupt
        if not self.patient and not again:
            raise SystemExit(128 + number)
