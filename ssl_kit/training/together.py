"""The processes of one run: joining them, waiting for the first, deciding together. One process alone needs none of it.

`verbs/launching.py` or torchrun starts them and names each in the environment. All of them walk through the same
program; the first one alone measures, draws, writes and speaks.

    joined        inside, they belong together; the one that fails first says why, the others end with it
    wait          for what the first one does alone; so do Lightning's barriers
    from_first    a value that the first one makes, for all
    from_all      what each has found, for all
    Processes     Lightning's data-parallel strategy for them
    Member        what each of them needs around the training

A step's collectives fail after `TIMEOUT`, so that a process that hangs ends the run within a minute. What the first one
does alone may take longer: the others are patient. A process that dies closes its connections, which ends both kinds of
waiting at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.rendezvous import rendezvous

from ssl_kit.core.console import configure
from ssl_kit.core.errors import UserError
from ssl_kit.core.processes import LAUNCHER, LOST, TIMEOUT_SECONDS, on_this_machine, started
from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.distributed import PATIENCE, leave, parts, patient_group, rank, world_size

TIMEOUT = timedelta(seconds=TIMEOUT_SECONDS)
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
        store, number, count = dist.FileStore(meeting, started()), int(os.environ["RANK"]), started()
    else:
        store, number, count = next(rendezvous("env://", timeout=PATIENCE))
    words = store.clone()
    # on a machine with GPUs each kind of tensor has its own carrier
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore("run", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    groups = (dist.group.WORLD, patient_group(dist.group.WORLD))  # all processes make the second one, here
    if number > 0:
        configure(to_stderr=True, quiet=True)
    try:
        wait()  # torch does not: one that is done at once would hang up on others that are still connecting
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


def wait() -> None:
    """Waits for every process, also long: after what the first one does alone."""
    if world_size() > 1:
        dist.barrier(group=patient_group(dist.group.WORLD))


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process, for all of them; JSON-able. The others wait for it."""
    if world_size() == 1:
        return make()
    return from_all(make() if rank() == 0 else None)[0]


def from_all(value: Any) -> list[Any]:
    """The JSON-able value of each process, in rank order."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in parts(data)]


def same_buffers(module: nn.Module) -> None:
    """Gives a module the buffers of the first process (running statistics), so that all see what is exported."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


class Processes(DDPStrategy):
    """Data-parallel training: every step applies the mean of the processes' gradients, weighted by `share_weight`.

    Batch norm normalises each process's own samples. Its running statistics, like all buffers, are those of the first
    process: they are sent to the others before every forward pass, and updated once a step.

    Args:
        unused: look in each step for parameters that the loss does not depend on.
    """

    def __init__(self, unused: bool = False):
        super().__init__(timeout=TIMEOUT, find_unused_parameters=unused)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all, also for a first process that measures or saves."""
        wait()

    @staticmethod
    def arguments(options: dict[str, Any]) -> dict[str, Any]:
        """The Trainer's arguments for the processes that were started.

        Args:
            options: the user's; taken from them are `strategy` and `devices`, of which only the GPUs' numbers matter.
        """
        strategy, devices = options.pop("strategy", "ddp"), options.pop("devices", None)
        return {
            "strategy": Processes(unused=strategy == FIND_UNUSED),
            "devices": devices if isinstance(devices, list) and torch.cuda.is_available() else on_this_machine(),
            "num_nodes": started() // on_this_machine(),
            "plugins": [TorchElasticEnvironment()],  # not whatever scheduler the machine belongs to
        }


FIND_UNUSED = "ddp_find_unused_parameters_true"  # Lightning's name


class Member(pl.Callback):
    """What each of several processes needs around the training; comes after `Checkpoints`.

    Dropout draws from torch's generator: each process has its own state of it, kept in the checkpoint. With another
    number of processes, those that were not there before begin a new one.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._stored: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps SIGTERM back while Lightning has it: its handler waits for the other processes, which may not come."""
        if world_size() > 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets SIGTERM through to `Checkpoints`; sets the generators."""
        if world_size() == 1:
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # Lightning asks the first process in every step whether it got SIGTERM, which makes each wait for its device;
        # `Checkpoints` asks all of them, between the hosts
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if 0 < rank() <= len(self._stored):
            set_generators(_unpacked(self._stored[rank() - 1]))
        elif rank() > 0:
            own = np.random.SeedSequence((self.seed, trainer.global_step, rank()))
            torch.manual_seed(int(own.generate_state(1)[0]))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves signals as they were."""
        if world_size() > 1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def state_dict(self) -> dict[str, Any]:
        """The generators of all processes but the first, whose are in the checkpoint anyway."""
        return {"generators": [] if world_size() == 1 else from_all(_packed(generators()))[1:]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps them until training starts."""
        self._stored = state_dict["generators"]


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """Generators as JSON; of GPUs, this process's own."""
    bits = state["numpy"]["state"]
    packed = {
        "torch": state["torch"].tolist(),
        "numpy": {**state["numpy"], "state": {"key": bits["key"].tolist(), "pos": int(bits["pos"])}},
        "python": state["python"],
    }
    if "cuda" in state:
        packed["cuda"] = state["cuda"][torch.cuda.current_device()].tolist()
    return packed


def _unpacked(packed: dict[str, Any]) -> dict[str, Any]:
    """What `_packed` was given."""
    version, numbers, gauss = packed["python"]
    bits = packed["numpy"]["state"]
    state: dict[str, Any] = {
        "torch": torch.tensor(packed["torch"], dtype=torch.uint8),
        "numpy": {**packed["numpy"], "state": {"key": np.array(bits["key"], np.uint32), "pos": bits["pos"]}},
        "python": (version, tuple(numbers), gauss),
    }
    if "cuda" in packed and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
        state["cuda"][torch.cuda.current_device()] = torch.tensor(packed["cuda"], dtype=torch.uint8)
    return state
