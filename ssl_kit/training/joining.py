"""Processes of one run come together, stay in touch, and end together with a reason.

`verbs/launching.py` or torchrun starts them and names each in the environment; `distributed.py` is what they say to
each other inside. Each shows in the store that it lives: whoever waits for the others for long (`distributed.wait`)
asks no more of a host that has been cut off.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ssl_kit.core.console import configure
from ssl_kit.core.errors import UserError
from ssl_kit.core.process import LAUNCHER, LOST, started
from ssl_kit.training.distributed import BEAT, FIND_UNUSED, PATIENCE, beats, leave, patient_group, rank, wait

_WORD_SECONDS = 3.0  # for a word with the process that holds the store


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that the environment names belong together; where there is one only, nothing happens.

    Raises:
        SystemExit: another process has failed, or does not answer; the reason is said there.
    """
    if started() == 1 or dist.is_initialized():  # by a program of the user's own
        yield
        return
    meeting = os.environ.get(LAUNCHER)
    if meeting:
        _end_with_launcher()
        number, count = int(os.environ["RANK"]), started()
        store: dist.Store = dist.FileStore(meeting, count)
    else:
        store, number, count = next(rendezvous("env://", timeout=PATIENCE))
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            store = dist.PrefixStore(_room(store, number, count), store)
    words = store.clone()
    # on a machine with GPUs each kind of tensor has its own carrier
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore("run", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    groups = (dist.group.WORLD, patient_group(dist.group.WORLD))  # all processes make the second one, here
    if number > 0:
        configure(to_stderr=True, quiet=True)
    try:
        wait()  # torch does not: one that is done at once would hang up on others that are still connecting
        with nullcontext() if meeting else _signs_of_life(words.clone(), number, count):  # a launcher sees who has gone
            yield
    except BaseException as error:
        told = _told(error, words) if isinstance(error, Exception) else error
        for group in groups:
            if group is not None:
                group.abort()  # or it would wait for what is still on its way, and others for this process
        if told is error:
            raise
        raise told from error
    del groups  # or they would live on in this frame
    leave()


def _room(store: dist.Store, number: int, count: int) -> str:
    """A name that the processes of this try alone share, for torchrun's store still holds what former tries wrote.

    How often torchrun has started them anew is no such name: each machine counts by itself. The first process shows
    everybody's token to a room of its own until each of them has entered; tokens of the dead lead nowhere.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"token/{number}", own)
        store.wait([own], PATIENCE)
        room = store.get(own).decode()
        store.set(f"{room}/{number}", own)
        return room
    missing, limit = set(range(1, count)), time.monotonic() + PATIENCE.total_seconds()
    while missing:
        for other in [one for one in missing if store.check([f"token/{one}"])]:
            store.set(store.get(f"token/{other}").decode(), own)
        missing = {other for other in missing if not store.check([f"{own}/{other}"])}
        if time.monotonic() > limit:
            raise UserError(f"{len(missing)} of {count} processes have not come within {PATIENCE}")
        time.sleep(0.02)
    return own


@contextmanager
def _signs_of_life(store: dist.Store, number: int, count: int) -> Iterator[None]:
    """Inside, a thread shows every few seconds that this process lives, and counts in `beats` what the others show.

    Args:
        store: a connection of its own: one whose host is cut off may answer never.
        number: of this process, of `count`.
    """
    over, others = threading.Event(), [other for other in range(count) if other != number]

    def show() -> None:
        own = 0
        with suppress(RuntimeError):  # the store has gone, and nobody is heard of any more
            while not over.wait(BEAT.total_seconds() if own else 0.0):
                own += 1
                store.set(f"beat/{number}", str(own))
                beats.update(zip(others, map(int, store.multi_get([f"beat/{one}" for one in others])), strict=True))

    showing = threading.Thread(target=show, name="alive", daemon=True)
    showing.start()
    try:
        yield
    finally:
        over.set()
        showing.join(_WORD_SECONDS)
        beats.clear()


def _end_with_launcher() -> None:
    """Stops this process as SIGTERM does once the launcher has gone, which holds the other end of stdin."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _told(error: Exception, words: dist.Store) -> BaseException:
    """Of several processes that fail, lets the first one say why, and the others end without a word.

    Returns:
        What this process should raise.
    """
    first, lost = _failed_first(words), _lost(error)
    if first not in (rank(), None) or (first is None and not lost):
        return SystemExit(LOST)
    if lost:
        if not os.environ.get(LAUNCHER):  # the launcher sees who has gone, and says it
            print(f"ssl-kit: process {rank()}: another one has ended or hangs ({error})", file=sys.stderr, flush=True)
        return SystemExit(LOST)
    if "find_unused_parameters" in str(error):
        error = UserError(f"the loss does not depend on all weights; add --trainer.strategy {FIND_UNUSED}")
    if isinstance(error, UserError) and rank() > 0:  # for the first process the command line says it
        print(f"ssl-kit: process {rank()}: {error}", file=sys.stderr, flush=True)
        return SystemExit(2)
    return error


def _failed_first(words: dist.Store) -> int | None:
    """The process that was the first to ask this; None when the one that holds the store has gone, or hangs."""
    answers: list[bytes] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(words.compare_set("failed", "", str(rank())))

    asking = threading.Thread(target=ask, daemon=True)  # a store's own timeout does not heed a process that hangs
    asking.start()
    asking.join(_WORD_SECONDS)
    return int(answers[0]) if answers else None


def _lost(error: Exception) -> bool:
    """Whether a collective has failed because of another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
