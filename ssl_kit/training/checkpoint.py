"""Resumable training state: safetensors for tensors, JSON for the rest, no pickle, written atomically.

A checkpoint is a folder `step-00001234` with `state.safetensors`, `state.json` and `manifest.json` (sha256 of both).
The newest and the one before it are kept; loading takes the newest that verifies and says so when it is not the newest.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors.torch import save_file
from torch import Tensor

from ssl_kit.core.console import say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import (
    MANIFEST,
    DamagedError,
    FullError,
    atomic_folder,
    check_space,
    json_text,
    read_json,
    read_manifest,
    write_json,
)
from ssl_kit.core.owned import remove
from ssl_kit.core.process import Signals
from ssl_kit.core.sealed import sealed
from ssl_kit.core.tensors import check_weights, read_tensors
from ssl_kit.training.distributed import Word, exchange, world_size

_FORMAT = 2  # 1 had the state of each callback apart
_TENSORS, _REST = "state.safetensors", "state.json"
_KEPT = 2
_BEST = "best"
State: TypeAlias = dict[str, Any]  # tensors, arrays, numbers, text, and containers of them: all that is stored
_BESIDE_TENSORS = 2**20  # bytes, about, of the two JSON files and the header


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as a folder of safetensors and JSON.

    Args:
        weights: gives the weights of the model that is to be resumed; a checkpoint with others is refused. None = all.
    """

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]] | None = None):
        self.weights = weights

    def save_checkpoint(self, checkpoint: State, path: str | Path, storage_options: object = None) -> None:
        """Writes the state atomically; `path` is the folder.

        Raises:
            FullError: there is no room; what was there is untouched.
        """
        tensors: dict[str, Tensor] = {}
        rest = _encode(checkpoint, "", tensors)
        check_space(Path(path).parent, sum(tensor.nbytes for tensor in tensors.values()) + _BESIDE_TENSORS)
        with atomic_folder(path, manifest={"format": _FORMAT, "step": checkpoint["global_step"]}) as folder:
            save_file(tensors, folder / _TENSORS)
            write_json(folder / _REST, rest)

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> State:
        """Reads and verifies the state; tensors arrive on the CPU.

        Raises:
            DamagedError: a file is missing, altered, or not what `save_checkpoint` writes; weights that are NaN, or of
                other names, shapes or types than the model's.
        """
        folder = Path(path)
        verify(folder)
        try:
            state = _decode(read_json(folder / _REST), read_tensors(folder / _TENSORS))
        except (RecursionError, TypeError) as error:
            raise DamagedError(f"{folder} holds no training state: {error}") from error
        if not isinstance(state, dict):
            raise DamagedError(f"{folder / _REST} holds no training state; it is damaged or from elsewhere")
        if self.weights is not None:  # torch would turn whole numbers into weights without a word
            check_weights(state.get("state_dict"), self.weights(), folder)
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes the folder."""
        remove(Path(path))


def verify(folder: Path) -> None:
    """Raises `DamagedError` unless `folder` is a whole checkpoint, its manifest to the letter as it is written here.

    Raises:
        UserError: it was written by an earlier version.
    """
    manifest = read_manifest(folder)
    step, version = manifest.get("step"), manifest.get("format")
    if isinstance(version, int) and 0 < version < _FORMAT:
        raise UserError(
            f"{folder} is a checkpoint of format {version}, this version resumes format {_FORMAT}: end the run with "
            "the version that began it, or start anew from its encoder with --init"
        )
    right = (
        (folder / MANIFEST).read_bytes() == json_text(sealed(manifest)).encode()
        and manifest.keys() == {"format", "step", "files"}
        and version == _FORMAT
        and manifest["files"].keys() == {_TENSORS, _REST}
        and isinstance(step, int)
        and (not folder.name.startswith("step-") or folder.name == f"step-{step:08d}")
    )
    if not right:
        raise DamagedError(f"{folder / MANIFEST} is not of a checkpoint of format {_FORMAT}; it is damaged")


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None when there is none at all.

    Raises:
        DamagedError: there are checkpoints and all are damaged.
    """
    damage: DamagedError | None = None
    for path in reversed(_steps(folder)):
        try:
            verify(path)
        except DamagedError as error:
            warn(f"{error}; trying the checkpoint before it")
            damage = error
            continue
        return path
    if damage is not None:
        raise damage
    return None


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


def resumable(folder: Path) -> bool:
    """Whether a run with its checkpoints in `folder` could go on."""
    try:
        return newest(folder) is not None
    except UserError:
        return False


class Checkpoints:
    """Saves every `minutes` and at the end, and stops the run at the next step boundary when a signal asks for it.

    The state of the last step is saved when training ends, after whatever other callbacks do then: a run that is killed
    in between makes its last steps again.

    Args:
        folder: of the checkpoints.
        minutes: between two saves.
        signals: that ask to stop; entered by whoever runs the training. Noted from the first step on.
        when_full: what a full disk does to the run, while it can go on: "continue" says so and tries again after
            `minutes`, "stop" ends it.
        saved: called after each state that is whole on the disk.

    Attributes:
        stopped: the signal that ended training before its last step, or None.
        heard: what several processes have said before this step.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float = 10.0,
        signals: Signals | None = None,
        when_full: Literal["continue", "stop"] = "continue",
        saved: Callable[[], None] = lambda: None,
    ):
        self.folder, self.minutes, self.when_full = folder, minutes, when_full
        self.signals, self.saved = signals or Signals(), saved
        self.stopped: int | None = None
        self.heard: list[Word] = []
        self._saved_at = time.monotonic()
        self._saved_step = 0  # what is on the disk, or need not be

    def start(self, trainer: pl.Trainer) -> None:
        """Takes the signals from Lightning, which would end the run."""
        self.signals.patient = True
        self.signals.take()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        self.heard = exchange(self.word())
        self._stop_if_asked(trainer)  # by a signal whose exception somebody has swallowed

    def word(self) -> Word:
        """What this process says: clocks differ, signals come to one, and all must save and stop at the same step."""
        due = time.monotonic() - self._saved_at > 60 * self.minutes
        return Word(signal=self.signals.received or 0, due=due)

    def after_step(self, trainer: pl.Trainer, healthy: Callable[[], bool]) -> None:
        """Saves when it is time, unless the newest step was bad: then a little later."""
        if _complete(trainer):
            return
        if world_size() == 1:
            self.heard = [self.word()]
        stop = self._stop_if_asked(trainer)
        if (stop or self.heard[0].due) and healthy():  # else a resumed run makes the steps since the last again
            self.save(trainer, needed=stop)

    def at_end(self, trainer: pl.Trainer) -> None:
        """The last state, so that a finished run can go on for longer."""
        if self.stopped is None and trainer.global_step != self._saved_step:
            self.save(trainer, needed=True)

    def save(self, trainer: pl.Trainer, *, needed: bool = False) -> None:
        """Writes a checkpoint of the current step and forgets all but the newest two.

        Args:
            trainer: of the run.
            needed: the run cannot go on without it.

        Raises:
            FullError: there is no room, and it is needed or `when_full` is "stop".
        """
        self._saved_at = time.monotonic()
        path = self.folder / f"step-{trainer.global_step:08d}"
        if not self._written(trainer, path, needed):
            return
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            steps = _steps(self.folder)
            newer = [step for step in steps if step.name > path.name]  # damaged ones, that were not resumed from
            for old in (*steps[: -_KEPT - len(newer)], *newer):
                remove(old)
            self.saved()

    def save_best(self, trainer: pl.Trainer) -> None:
        """Writes the state as `best`, replacing the former one."""
        self._written(trainer, self.folder / _BEST)

    def _written(self, trainer: pl.Trainer, path: Path, needed: bool = False) -> bool:
        """Whether the state could be written to `path`."""
        try:
            trainer.save_checkpoint(path)
        except FullError as error:
            if needed or self.when_full == "stop":
                raise
            warn(f"step {trainer.global_step:,}: {error}. The run goes on; it tries again later")
            trainer.strategy.barrier()  # where the other processes are, which do not write
            return False
        return True

    def _stop_if_asked(self, trainer: pl.Trainer) -> bool:
        """Whether a signal, to any of the processes, asks to stop; then training ends at this step."""
        number = max(word.signal for word in self.heard)
        if number:
            self.stopped, trainer.should_stop = number, True
        return bool(number)


def _complete(trainer: pl.Trainer) -> bool:
    """Whether this was the last step anyway."""
    return trainer.should_stop or trainer.global_step == trainer.max_steps


class Generators(TypedDict):
    """The state of torch's, numpy's and Python's generators, and of those of all GPUs."""

    torch: Tensor
    numpy: State
    python: tuple[int, tuple[int, ...], float | None]
    cuda: NotRequired[list[Tensor]]


def generators() -> Generators:
    """Their state now."""
    state: Generators = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generators(state: Generators) -> None:
    """Restores what `generators` gave; of another number of GPUs those that there are, which is said."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    saved, visible = state.get("cuda", []), torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, one in enumerate(saved[:visible]):
        torch.cuda.set_rng_state(one, device)
    if len(saved) != visible:
        say(f"generators: saved with {len(saved)} GPUs, {visible} visible now; dropout may draw otherwise than before")


def _encode(value: object, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state to JSON; tensors and arrays go to `tensors` under their path. Tags keep tuples and odd keys."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        name = path if path not in tensors else f"{path} {len(tensors)}"  # keys may hold slashes
        tensors[name] = tensor.cpu().contiguous().clone()
        # fused optimisers walk weight, gradient and momentum in memory order: a channels_last buffer that comes back
        # contiguous gives wrong updates without a word
        dense = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return {"$": kind, "name": name} | ({"channels_last": True} if dense else {})
    if isinstance(value, dict):
        items = [[_encode(key, "", {}), _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        if all(isinstance(key, str) and key != "$" for key in value):
            return dict(items)
        return {"$": "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{position}", tensors) for position, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "items": items}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$": "float", "value": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{path} is a {type(value).__name__}: checkpoints hold tensors, arrays, numbers, text and containers"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_encode` was given.

    Raises:
        DamagedError: anything that `_encode` does not make.
    """
    match value:
        case list():
            return [_decode(item, tensors) for item in value]
        case {"_instantiator": _}:  # Lightning's command line calls what it names
            raise DamagedError("this checkpoint names code to be called, under '_instantiator'; it is from elsewhere")
        case dict() if "$" not in value:
            return {key: _decode(item, tensors) for key, item in value.items()}
        case {"$": "dict", "items": list(items)}:
            return {_key(item): _decode(item[1], tensors) for item in items}
        case {"$": "tuple", "items": list(items)}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$": "float", "value": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"$": "tensor" | "array" as kind, "name": str(name)} if name in tensors:
            tensor = tensors[name]
            if value.get("channels_last") and tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            return tensor if kind == "tensor" else tensor.numpy()
        case dict():
            raise DamagedError(
                f"this checkpoint holds a {str(value['$'])[:40]!r} that ssl_kit does not write; it is damaged or from "
                "elsewhere"
            )
    return value


def _key(item: object) -> bool | int | float | str | None:
    """The key of a stored (key, value)."""
    match item:
        case [None | bool() | int() | float() | str() as key, _]:
            return key
    raise DamagedError("this checkpoint holds a dict that ssl_kit does not write; it is damaged or from elsewhere")
