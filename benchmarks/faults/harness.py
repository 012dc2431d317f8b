"""What the fault benchmarks share: warm children, kills at random moments, and rows that outlive a stop.

    process = fork_warmed(work, log)              # imports are done: work begins after milliseconds, not seconds
    killed = kill_at_random(work, seconds, random, log)
    rows = Rows(arguments.json)
    rows.run("embed/kill", "embed killed once, then ended", 20, trial)     # only the trials that the file lacks

A child is forked from this process, so this process must import everything first and run no torch operation, FAISS
search or parallel numba code: their thread pools do not outlive a fork, and a child that needs them hangs. Let a child
do that too, and read what it wrote.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from ssl_kit.core.files import write_json

Trial = Callable[[int, random.Random], str | None]  # number and its own generator -> None, or what went wrong


def fork_warmed(work: Callable[[], Any], log: Path, threads: int = 1) -> ForkProcess:
    """Starts `work` in a child with one torch thread; what it prints is appended to `log`.

    Returns:
        The process: `join()` it; `exitcode` is 0 after `work` returned, the code of its SystemExit, 1 after any other
        exception, and minus the signal that ended it.
    """

    def child() -> None:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(threads)
        work()

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    return process


def run_warmed(work: Callable[[], Any], log: Path, threads: int = 1) -> float:
    """Runs `work` in a child to its end; the seconds it took.

    Raises:
        RuntimeError: it did not end well; with the end of its log.
    """
    began = time.perf_counter()
    process = fork_warmed(work, log, threads)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a child ended with {process.exitcode}:\n{tail(log)}")
    return time.perf_counter() - began


def kill_at(process: ForkProcess, moment: float, number: signal.Signals = signal.SIGKILL) -> bool:
    """Sends a signal `moment` seconds from now and waits for the end; False when the work had ended before it."""
    assert process.pid is not None, "it was started"
    process.join(moment)
    if process.exitcode is not None:
        return False
    os.kill(process.pid, number)
    process.join()
    return process.exitcode != 0  # 0: it ended between the two lines above


def kill_at_random(work: Callable[[], Any], seconds: float, generator: random.Random, log: Path) -> float | None:
    """Starts `work` and kills it with SIGKILL at a moment drawn evenly from [0, `seconds`).

    Returns:
        The moment in seconds, or None when `work` had ended by then: draw again, on untouched files.

    Raises:
        RuntimeError: `work` failed by itself; with the end of its log.
    """
    moment = generator.random() * seconds
    process = fork_warmed(work, log)
    if kill_at(process, moment):
        return moment
    if process.exitcode:
        raise RuntimeError(f"a child ended with {process.exitcode}:\n{tail(log)}")
    return None


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def timed(function: Callable[..., Any], note: Callable[[float], None]) -> Callable[..., Any]:
    """`function`, whose every call tells `note` the seconds that it took."""

    def call(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **options)
        note(time.perf_counter() - began)
        return result

    return call


@contextmanager
def s3_server(program: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Callable[[str, bytes | None], None]]]:
    """An S3 server of this machine, moto's: process, options of an address, what puts a bucket or object.

    Args:
        program: `moto_server`, wherever it is installed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def put(name: str, data: bytes | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("PUT", f"/{name}", data, {"Content-Type": "application/octet-stream"})
        if (answer := connection.getresponse()).status != 200:
            raise OSError(f"the server answers {answer.status}")
        connection.close()

    server = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for left in reversed(range(300)):  # until it answers
            try:
                put("answers", None)
                break
            except OSError:
                if not left:
                    raise
                time.sleep(0.2)
        yield server, f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1", put
    finally:
        server.kill()
        server.wait()


class Rows:
    """Rows `{"id", "what", "tried", "survived"}`, written after every trial; `failed` tells of the trials that failed.

    Args:
        path: JSON file; one that is there is gone on with, and must be removed to start anew. None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else []

    def run(self, name: str, what: str, count: int, trial: Trial) -> dict[str, Any]:
        """Makes the trials of a row that are not there yet, `count` in all; the row. A trial's draws follow its number.

        Args:
            name: id of the row.
            what: was tried.
            count: trials.
            trial: gets its number and generator; returns None when all was well, else what was not, in a few words.
        """
        row = next((row for row in self.rows if row["id"] == name), None)
        if row is None:
            row = {"id": name, "what": what, "tried": 0, "survived": 0}
            self.rows.append(row)
        for number in range(row["tried"], count):
            wrong = trial(number, random.Random(f"{name}/{number}"))
            row["tried"] += 1
            row["survived"] += wrong is None
            if wrong is not None:
                row["failed"] = "; ".join(filter(None, (row.get("failed"), f"{number}: {wrong}")))
            print(f"{name} {number}: {wrong or 'survived'}", flush=True)
            self.save()
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Adds a finished row of another kind, in the place of one with the same id."""
        self.rows = [other for other in self.rows if other["id"] != row["id"]] + [row]
        self.save()

    def save(self) -> None:
        """Writes the file."""
        if self.path is not None:
            write_json(self.path, self.rows)
