"""Forked children for inputs that may kill, hang or bloat a process: one call with its cost, or a long survey.

    outcome = isolated(lambda: Encoder.load(folder))          # what came of it, seconds, growth of memory
    for number, told in survey(trial, range(10_000)): ...     # 10,000 trials in a few children

Costs are seconds of processor time, and waiting is counted in slices: neither a busy machine nor a benchmark that was
stopped for a while (SIGSTOP) looks like a hang.

Like `harness.fork_warmed`, this forks: the calling process must have imported everything and must not have run a torch
operation, a FAISS search or a parallel numba kernel.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssl_kit.core.errors import UserError

DECLARED = (UserError,)  # DamagedError is one
_SLICE = 0.05  # seconds


class Outcome(NamedTuple):
    """What came of a call.

    `kind`: "returned", "refused" (a declared error), "crashed" (any other exception), "died" (a signal), "hung".
    `text`: the result, the message, or the signal. `seconds`: of processor time, of the call alone. `grown`: bytes by
    which its peak of resident memory exceeded what was there before.
    """

    kind: str
    text: str
    seconds: float
    grown: int


def isolated(call: Callable[[], Any], limit: float = 10.0, before: Callable[[], Any] | None = None) -> Outcome:
    """Makes one call in a child.

    Args:
        call: what may end badly.
        limit: seconds after which the child is killed.
        before: made first in the same child and not measured: an honest call that touches the libraries' pages.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _silence()
        os.write(writer, json.dumps(_measured(call, before)).encode())
        os._exit(0)
    os.close(writer)
    data = _until_end(reader, limit)
    os.close(reader)
    if data is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if data is None:
        return Outcome("hung", f"{limit:.0f} s", limit, 0)
    if os.WIFSIGNALED(status) or not data:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no answer"
        return Outcome("died", name, 0.0, 0)
    return Outcome(*json.loads(data))


def _silence() -> None:
    """What a child prints is nobody's business: thousands of them say that a file was refused."""
    gc.freeze()  # walking through all that was imported, page by page copied, would take a second now and then
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _measured(call: Callable[[], Any], before: Callable[[], Any] | None) -> Outcome:
    if before is not None:
        before()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start = memory("VmRSS")
    began = time.process_time()
    kind, text = told(call)
    return Outcome(kind, text, time.process_time() - began, memory("VmHWM") - start)


def told(call: Callable[[], Any]) -> tuple[str, str]:
    """What a call ends with in this process: ("returned" | "refused" | "crashed", in words)."""
    try:
        return "returned", str(call())[:200]
    except DECLARED as error:
        return "refused", str(error)[:300]
    except BaseException as error:  # whatever it is, it is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "crashed", f"{type(error).__name__}: {str(error)[:160]} ({Path(place.filename).name}:{place.lineno})"


def memory(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _within(reader: int, limit: float) -> bool:
    """Whether something comes through a pipe within `limit` seconds, not counting those in which we were stopped."""
    slices = range(max(1, round(limit / _SLICE)))
    return any(select.select([reader], [], [], _SLICE)[0] for _ in slices)


def _until_end(reader: int, limit: float) -> bytes | None:
    """All that comes through a pipe; None when nothing comes for `limit` seconds."""
    data = b""
    while True:
        if not _within(reader, limit):
            return None
        more = os.read(reader, 65_536)
        if not more:
            return data
        data += more


def survey(
    trial: Callable[[int], str], numbers: Sequence[int], limit: float = 2.0, prepare: Callable[[], Any] | None = None
) -> Iterator[tuple[int, str]]:
    """Makes many trials, one after the other, in a child; where one kills or stops it, the next child goes on after it.

    Args:
        trial: number -> what happened, in one line.
        numbers: of the trials.
        limit: seconds that a trial may take.
        prepare: done first in every child, outside the limit.

    Yields:
        number, what happened (or "died: SIGSEGV", "hung").
    """
    at = 0
    while at < len(numbers):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _silence()
            _all(trial, numbers[at:], writer, prepare)
        os.close(writer)
        for what in _followed(reader, child, limit):
            yield numbers[at], what
            at += 1
        os.close(reader)


def _all(trial: Callable[[int], str], numbers: Sequence[int], writer: int, prepare: Callable[[], Any] | None) -> None:
    """The child of a survey: a line when it is ready, then one for each trial. Does not return."""
    try:
        if prepare is not None:
            prepare()
        os.write(writer, b"ready\n")
        for number in numbers:
            os.write(writer, trial(number).replace("\n", " ").encode() + b"\n")
        os._exit(0)
    except BaseException:  # trials tell of their own errors: this is a mistake of the benchmark
        os.write(writer, f"benchmark: {traceback.format_exc()}".replace("\n", " | ").encode() + b"\n")
        os._exit(1)


def _followed(reader: int, child: int, limit: float) -> Iterator[str]:
    """What a child of a survey tells, trial by trial, and how it ended if it ended in one."""
    text, ready, wait = b"", False, 120.0
    while True:
        if not _within(reader, wait):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            yield "hung"
            return
        more = os.read(reader, 65_536)
        if not more:
            break
        *lines, text = (text + more).split(b"\n")
        for line in lines:
            if line.startswith(b"benchmark: "):
                raise RuntimeError(line.decode())
            if ready:
                yield line.decode()
            ready, wait = True, limit
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        yield f"died: {signal.Signals(os.WTERMSIG(status)).name}"
