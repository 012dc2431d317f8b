"""Several processes of one run for the tests, forked from a server that has imported everything: 0.1 s instead of 5."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ssl_kit import cli

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ssl_kit.verbs.pretrain", "ssl_kit.methods.mae", "faiss", "bokeh.embed"])


def start(count: int, logs: Path, work: Callable[..., Any], *arguments: Any) -> list[ForkServerProcess]:
    """Starts `work(*arguments)` in `count` processes of one run; what process r prints is in `logs`/r.log."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, count, port, logs, work, *arguments), daemon=True)
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    return ranks


def ended(ranks: Sequence[ForkServerProcess], seconds: float = 60) -> list[int | None]:
    """The exit codes; None of those that have not ended within so many seconds, which are killed."""
    for process in ranks:
        process.join(seconds)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def pretrain(count: int, logs: Path, *arguments: object) -> list[int | None]:
    """Exit codes of `ssl-kit pretrain` in `count` processes."""
    return ended(start(count, logs, command, "pretrain", *map(str, arguments)))


def command(*arguments: str) -> None:
    """Runs one command line and ends the process with its code."""
    sys.exit(cli.main(arguments))


def _rank(rank: int, count: int, port: int, logs: Path, work: Callable[..., Any], *arguments: Any) -> None:
    log = os.open(logs / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    work(*arguments)
