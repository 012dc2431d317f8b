"""Several processes on this machine: `ssl-kit pretrain DATA --trainer.devices N` starts its own command line N times.

Each process finds its number in the environment, as under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...), and from then
on both ways are the same, but that these meet through a file: torch's own meeting place is a port open to every
network, and asks a name server about addresses. Unlike torchrun this launcher waits for the state to be saved when it
is told to stop, and its exit code is that of what happened: 128 + signal, or that of the process that failed. It stays
light: no torch here.
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
from typing import Any

from ssl_kit.core.console import warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.process import LAUNCHER, LOST, TIMEOUT_SECONDS, heeded

_PROGRAM = (sys.executable, "-m", "ssl_kit")
_GRACE = 8.0  # seconds for the others to end by themselves once one has failed
_LOOK = 0.05  # seconds between looks


def processes_asked(devices: Any) -> int:
    """How many processes `--trainer.devices` asks this one to start: 1 in a process that was started as one of several.

    Args:
        devices: a number, or a list of the GPUs to use, also as text.

    Raises:
        UserError: anything else.
    """
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return 1
    numbers = [int(part) for part in str(devices).strip("[] ").split(",") if part.strip().isdigit()]
    if isinstance(devices, list) or str(devices).startswith("["):
        if numbers:
            return len(numbers)
    elif len(numbers) == 1 and numbers[0] > 0:
        return numbers[0]
    raise UserError(f"--trainer.devices {devices}: wanted how many processes to start, such as 2, or GPUs as [0,1]")


def most_processes() -> int:
    """How many processes this machine has room for: one for each GPU that may be used, or else for each core."""
    present = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        present = present[: len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])]
    return len(present) or _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(arguments: Sequence[str], count: int, program: Sequence[str] = _PROGRAM) -> int:
    """Runs `ssl-kit ARGUMENTS` in `count` processes and returns the exit code of the whole.

    Signals are passed on to all. When one process fails, the others, which notice it, have a few seconds to end.
    """
    _allow_files(64 + 8 * count)  # 24 and 4 for each process are used
    handlers = {}
    children: list[subprocess.Popen[bytes]] = []
    descriptor, meeting = tempfile.mkstemp(prefix="ssl_kit-", suffix=".meeting")
    os.close(descriptor)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    for number in heeded():
        handlers[number] = signal.signal(number, pass_on)
    try:
        environment = _environment(count, meeting)
        for rank in range(count):
            # a group of their own: a Ctrl-C reaches them once, from here; stdin: they end when this process is killed
            child = subprocess.Popen(
                [*program, *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                process_group=0,
            )
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


def _allow_files(needed: int) -> None:
    """Lets this process and those it starts have so many files open: gloo hangs or aborts when it may not."""
    import resource  # not on Windows

    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if allowed == unlimited or allowed >= needed:
        return
    if most != unlimited and most < needed:
        raise UserError(
            f"{most} files may be open at once, several processes need {needed}: allow them, as by ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def _environment(count: int, meeting: str) -> dict[str, str]:
    """What all the processes find in their environment; `meeting` is the file through which they find each other."""
    cores = _cores()
    own = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        LAUNCHER: meeting,
    }
    # torch prints the stack of every connection that a dead process leaves; who has gone is said here
    usual = {"OMP_NUM_THREADS": str(max(1, cores // count)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
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
            for rank in killed:
                children[rank].wait()
            break
        time.sleep(_LOOK)
    return _outcome([child.returncode for child in children], killed)


def _outcome(codes: list[int], killed: list[int]) -> int:
    """The exit code of the whole, and the reason in words where no process could say it.

    Args:
        codes: of the processes; minus the signal that ended one.
        killed: those that were ended here because they did not end by themselves.
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
        return LOST
    return 0
