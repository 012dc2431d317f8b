"""Resumable training state: safetensors for tensors, JSON for the rest, no pickle, written atomically.

A checkpoint is a folder `step-00001234` with `state.safetensors`, `state.json` and `manifest.json` (sha256 of both).
The newest and the one before it are kept; loading takes the newest that verifies and says so when it is not the newest.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_kit.core.console import say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, atomic_folder, read_json, read_manifest, write_json

_TENSORS, _REST = "state.safetensors", "state.json"
_KEPT = 2
_BEST = "best"


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as a folder of safetensors and JSON."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes the state atomically; `path` is the folder."""
        tensors: dict[str, Tensor] = {}
        rest = _encode(checkpoint, "", tensors)
        with atomic_folder(path, manifest={"format": 1, "step": checkpoint["global_step"]}) as folder:
            save_file(tensors, folder / _TENSORS)
            write_json(folder / _REST, rest)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads and verifies the state; tensors arrive on the CPU."""
        read_manifest(path)
        return _decode(read_json(Path(path) / _REST), load_file(Path(path) / _TENSORS))

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes the folder."""
        shutil.rmtree(path)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None when there is none at all.

    Raises:
        DamagedError: there are checkpoints and all are damaged.
    """
    damage: DamagedError | None = None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except DamagedError as error:
            warn(f"{error}; trying the checkpoint before it")
            damage = error
            continue
        return path
    if damage is not None:
        raise damage
    return None


class Checkpoints(pl.Callback):
    """Saves every `minutes` and at the end; also when told to stop by SIGTERM, SIGINT or SIGUSR1.

    Signals only set a flag: the state is saved at the next step boundary, never inside the handler.

    Args:
        folder: of the checkpoints.
        minutes: between two saves.
    """

    def __init__(self, folder: Path, minutes: float = 10.0):
        self.folder, self.minutes = folder, minutes
        self.signal: int | None = None
        self._saved_at = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, at a step boundary (never between accumulated batches)."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.signal is not None:
            trainer.should_stop = True
        elif time.monotonic() - self._saved_at > 60 * self.minutes:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last state, so that a finished or stopped run can go on."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> Path:
        """Writes a checkpoint of the current step and forgets all but the newest two."""
        path = self.folder / f"step-{trainer.global_step:08d}"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*"))[:-_KEPT]:
                shutil.rmtree(old)
        self._saved_at = time.monotonic()
        return path

    def save_best(self, trainer: pl.Trainer) -> None:
        """Writes the state as `best`, replacing the former one."""
        trainer.save_checkpoint(self.folder / _BEST)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the generators that Lightning leaves out."""
        checkpoint["generators"] = generators()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the generators' state until training starts (setting up draws from them)."""
        self._generators = checkpoint["generators"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signals (after Lightning, which would end the run) and puts the generators where they were."""
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            try:
                self._handlers.setdefault(number, signal.signal(number, self._note))
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        stored = self.__dict__.pop("_generators", None)
        if stored is not None:
            set_generators(stored)
            say(f"resumed at step {trainer.global_step:,}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.signal = number


def generators() -> dict[str, Any]:
    """The state of torch's, numpy's and Python's generators."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generators(state: dict[str, Any]) -> None:
    """Restores what `generators` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state to JSON; tensors and arrays go to `tensors` under their path. Tags keep tuples and odd keys."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        tensors[path] = tensor.cpu().contiguous().clone()
        # fused optimisers walk weight, gradient and momentum in memory order: a channels_last buffer that comes back
        # contiguous gives wrong updates without a word
        dense = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return {"$": kind, "name": path} | ({"channels_last": True} if dense else {})
    if isinstance(value, dict):
        items = [[_encode(key, "", {}), _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        if all(isinstance(key, str) and key != "$" for key in value):
            return dict(items)
        return {"$": "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{position}", tensors) for position, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path} is a {type(value).__name__}: checkpoints hold tensors, arrays, numbers, text and containers"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("$")
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value["items"]}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in value["items"])
    if kind in ("tensor", "array") and value.get("name") in tensors:
        tensor = tensors[value["name"]]
        if value.get("channels_last"):
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor if kind == "tensor" else tensor.numpy()
    raise UserError(f"this checkpoint holds a {kind!r} that ssl_kit does not write; it is damaged or from elsewhere")
