"""What each of several processes needs around the training."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.distributed import from_all, rank, world_size


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
