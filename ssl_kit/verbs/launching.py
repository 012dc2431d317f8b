"""Several processes on this machine: `ssl-kit pretrain DATA --trainer.devices N` starts its own command line N times.

Each process finds its number in the environment, as under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...), and from then
on both ways are the same, but that these meet through a file: torch's own meeting place is a port open to every
network, and asks a name server about addresses. Unlike torchrun (docs/decisions.md) this launcher waits for the state
to be saved when it is told to stop, and its exit code says what happened: 128 + signal, or that of the process that
failed. It stays light: no torch here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ssl_kit.core.console import warn
from ssl_kit.core.process import LAUNCHER, LOST, TIMEOUT_SECONDS, allow_files, cores, heeded

_PROGRAM = (sys.executable, "-m", "ssl_kit")
_GRACE, _LOOK = 8.0, 0.05  # seconds for the others to end once one has failed, and between looks


def launch(arguments: Sequence[str], count: int, program: Sequence[str] = _PROGRAM) -> int:
    """Runs `ssl-kit ARGUMENTS` in `count` processes and returns the exit code of the whole.

    Signals are passed on to all. When one process fails, the others, which notice it, have a few seconds to end.
    """
    allow_files(64 + 8 * count)  # 24 and 4 for each process are used
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []
    descriptor, meeting = tempfile.mkstemp(prefix="ssl_kit-", suffix=".meeting")
    os.close(descriptor)

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in heeded()}
    try:
        environment = _environment(count, meeting)
        for rank in range(count):
            # a group of their own: a Ctrl-C reaches them once, from here; stdin: they end when this process is killed
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            child = subprocess.Popen([*program, *arguments], env=own, stdin=subprocess.PIPE, process_group=0)
            children.append(child)
            for early in received:  # while it was being started
                child.send_signal(early)
        return _watch(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        Path(meeting).unlink(missing_ok=True)


def _environment(count: int, meeting: str) -> dict[str, str]:
    """What all the processes find in their environment; `meeting` is the file through which they find each other."""
    own = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        LAUNCHER: meeting,
    }
    # torch prints the stack of every connection that a dead process leaves; who has gone is said here
    usual = {"OMP_NUM_THREADS": str(max(1, cores() // count)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform.startswith("linux"):  # by themselves they listen at whatever address this machine's name has
        usual |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {**usual, **os.environ, **own}


def _watch(children: list[subprocess.Popen[bytes]]) -> int:
    """Waits for the end of all; kills those that do not end after another has failed."""
    deadline: float | None = None
    killed: list[int] = []
    while None in (codes := [child.poll() for child in children]):
        if deadline is None and any(codes):
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            killed = [rank for rank, child in enumerate(children) if child.poll() is None]
            for rank in killed:
                children[rank].kill()
                children[rank].wait()
            break
        time.sleep(_LOOK)
    return _outcome([child.returncode for child in children], killed)


def _outcome(codes: list[int], killed: list[int]) -> int:
    """The exit code of the whole from those of the processes, minus the signal for one that a signal ended; and the
    reason in words where no process could say it. `killed` are those that did not end by themselves.
    """
    own = {rank: code for rank, code in enumerate(codes) if rank not in killed}
    by_signal = {rank: -code for rank, code in own.items() if code < 0}
    failed = {rank: code for rank, code in own.items() if code > 0 and code != LOST}
    if by_signal:
        rank, number = next(iter(by_signal.items()))
        if number not in heeded():
            warn(f"process {rank} was ended by {signal.Signals(number).name}; the others have ended with it")
        return 128 + number
    if failed:
        rank, code = min(failed.items(), key=lambda item: (item[1] != 2, item[0]))
        if code == 1:
            warn(f"process {rank} has failed; the others have ended with it")
        return code
    if LOST in own.values():
        lost = f"process {', '.join(map(str, killed))} did not answer" if killed else "the processes lost each other"
        warn(f"{lost} for {TIMEOUT_SECONDS} s; all have ended")
    return LOST if LOST in own.values() else 0
