"""What happens around a training step, and in which order: one callback, to be read from top to bottom.

    a batch arrives    its views are made, where the device makes them; diagnose watches, the guard copies what it may
                       have to put back
    its loss           Method.training_step; the guard looks at it
    its gradients      diagnose takes their norms, the guard decides whether the step counts, and clips
    the optimiser, then the schedule, move on: Lightning does that
    after a batch      diagnose writes, curves collect
    after a step       processes talk; after the first one untrained features are measured; method.after_step, averaged
                       weights, length of the run, curves, bar, monitor (which may save the best state), checkpoint

A step may be made of several batches (`accumulate`). Whatever has state says it in `Loop.state_dict`, for the
checkpoint. Each process also has its own generator: dropout draws from it.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ssl_kit.core.console import say
from ssl_kit.training.checkpoint import Checkpoints, Generators, SafeCheckpointIO, State, generators, set_generators
from ssl_kit.training.chunked import Batch, compile_ahead, data_of
from ssl_kit.training.curves import Bar, Curves
from ssl_kit.training.distributed import (
    Word,
    all_gather_object,
    counts,
    exchange,
    expect_promptness,
    rank,
    settle,
    world_size,
)
from ssl_kit.training.duration import Duration
from ssl_kit.training.guard import Diagnose, Guard, by_type, joined, restore
from ssl_kit.training.optim import EMA


class Stateful(Protocol):
    """A part of a training whose state is in the checkpoints."""

    def state_dict(self) -> State:
        """What it goes on from."""

    def load_state_dict(self, state_dict: State) -> None:
        """Goes on from there."""


class Monitor(Stateful, Protocol):
    """What is looked at while a run goes on; see `verbs/monitor.py`."""

    def start(self) -> None:
        """Before the first step of a sitting."""

    def after_step(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        """After every step."""

    def at_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        """After the last one."""


class Loop(pl.Callback):
    """The parts of a training, called in their order; what is None is left out.

    Args:
        guard: holds bad steps back and clips.
        checkpoints: saves, and stops the run when a signal asks for it.
        ema: averaged weights of the encoder.
        duration: how long the run is; None where Lightning knows.
        curves: rows of `metrics.csv`, and the verdict on them.
        bar: shows them.
        monitor: what is looked at while the run goes on.
        diagnose: gradients per layer.
        compiled: code is compiled, and is to be before the first step of a sitting.
        embedded: what `Method.prepare` asks.
        seed: of the run, for the generators of processes that were not there when a checkpoint was written.
    """

    def __init__(
        self,
        guard: Guard | None = None,
        checkpoints: Checkpoints | None = None,
        *,
        ema: EMA | None = None,
        duration: Duration | None = None,
        curves: Curves | None = None,
        bar: Bar | None = None,
        monitor: Monitor | None = None,
        diagnose: Diagnose | None = None,
        compiled: bool = False,
        embedded: Callable[[Any, int | None], Tensor] | None = None,
        seed: int = 0,
    ):
        self.guard, self.checkpoints, self.ema, self.duration = guard or Guard(), checkpoints, ema, duration
        self.curves, self.bar, self.monitor, self.diagnose, self.seed = curves, bar, monitor, diagnose, seed
        self.compiled, self.embedded = compiled, embedded
        self._first = True  # step of this sitting
        self._progress = 0.0  # fraction of the run that is over, as the method was told
        self._generators: Generators | None = None  # of the first process, from a checkpoint
        self._others: list[State] = []  # generators of all processes but the first, from a checkpoint

    # a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Before the forward pass."""
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if world_size() > 1 and "chunks" not in batch:  # they are counted when they are made
            settle(data_of(trainer).images_of_each() or counts(len(batch["key"].index)))
        if self.diagnose is not None:
            self.diagnose.watch(trainer.global_step, pl_module)
        if first:
            self.guard.before_step()
        if self.curves is not None and trainer.global_step == 0 and batch_idx == 0:
            self.curves.begin(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """After the forward pass."""
        self.guard.see(loss)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """After the last backward pass of a step."""
        scaler: GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        if self.diagnose is not None:
            self.diagnose.take_norms(trainer.global_step, pl_module, scaler)
        self.guard.decide(trainer.global_step, optimizer, scaler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """After the optimiser, or after a batch that is a part of a step."""
        if self.diagnose is not None:
            self.diagnose.write(trainer)
        if self.curves is not None:
            assert isinstance(outputs, dict), "training_step gives the scalars of loss"
            self.curves.collect(outputs, len(batch["key"].index), trainer.accumulate_grad_batches)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._after_step(trainer, pl_module, batch)

    def _after_step(self, trainer: pl.Trainer, method: pl.LightningModule, batch: Batch) -> None:
        step, total = trainer.global_step, self._total(trainer)
        if self.curves is not None and step == 1:
            self.curves.measure_untrained(trainer, method)
        if self._first:
            self._first = False
            expect_promptness()
        self._progress = min(1.0, max(self._progress, step / total))
        _move_on(method, self._progress, self.guard.held)
        if world_size() > 1:
            self._exchange()
        if self.ema is not None:
            self.guard.spoilt = self.ema.move(method.get_submodule("encoder"), step, total, self.guard.held)
        if self.duration is not None:
            self.duration.after_step(trainer)
        if self.curves is not None:
            self.curves.after_step(trainer, method, self.guard, batch["views"])
        if self.bar is not None:
            self.bar.move(step, self._total(trainer))
        if self.monitor is not None:
            self.monitor.after_step(trainer, method)
        if self.checkpoints is not None:
            self.checkpoints.after_step(trainer, self.guard.healthy)

    def _exchange(self) -> None:
        word = Word() if self.checkpoints is None else self.checkpoints.word()
        told = exchange(word._replace(seconds=0.0 if self.duration is None else self.duration.seconds()))
        if self.checkpoints is not None:
            self.checkpoints.heard = told
        if self.duration is not None:
            self.duration.heard = max(one.seconds for one in told)

    def _total(self, trainer: pl.Trainer) -> int:
        """Steps of the whole run, as far as known."""
        return max(1, trainer.max_steps if self.duration is None else self.duration.total)

    # beginning and end

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps SIGTERM back while Lightning has it: its handler waits for the other processes, which may not come."""
        if world_size() > 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first step of this sitting, with the state of the checkpoint loaded."""
        if self.diagnose is not None:
            self.diagnose.start(trainer)
        self.guard.start(pl_module, scaled=getattr(trainer.precision_plugin, "scaler", None) is not None)
        if self.ema is not None:
            self.ema.encoder(pl_module.get_submodule("encoder"))
        if self.duration is not None:
            self.duration.start(trainer)
        if self.embedded is not None:
            cast(Any, pl_module).prepare(self.embedded)
        if self.compiled:
            compile_ahead(trainer, pl_module)
        if self.curves is not None:
            self.curves.start(trainer.global_step, pl_module.device)
        if self.bar is not None:
            self.bar.start(trainer, self._total(trainer))
        if self.monitor is not None:
            self.monitor.start()
        if self.checkpoints is not None:
            self.checkpoints.start(trainer)
        if self._generators is not None:
            set_generators(self._generators)
            self._generators = None
            say(f"resumed at step {trainer.global_step:,}")
        if world_size() > 1:
            self._start_process(trainer)

    def _start_process(self, trainer: pl.Trainer) -> None:
        """Lets SIGTERM through to `Checkpoints`; sets the generators of a process that is not the first."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # Lightning asks the first process in every step whether it got SIGTERM, which makes each wait for its device;
        # `Checkpoints` asks all of them, between the hosts
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if 0 < rank() <= len(self._others):
            set_generators(_unpacked(self._others[rank() - 1]))
        elif rank() > 0:
            own = np.random.SeedSequence((self.seed, trainer.global_step, rank()))
            torch.manual_seed(int(own.generate_state(1)[0]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step of this sitting."""
        if self.curves is not None and (self.checkpoints is None or self.checkpoints.stopped is None):
            self.curves.at_end(trainer, pl_module, self.guard)
        if self.monitor is not None:
            self.monitor.at_end(trainer, pl_module)
        if self.checkpoints is not None:
            self.checkpoints.at_end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves signals as they were."""
        if world_size() > 1:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.stop()

    # checkpoints

    def state_dict(self) -> State:
        """Everything beside the method, its optimiser and its schedule that the next step depends on."""
        others = [] if world_size() == 1 else all_gather_object(_packed(generators()))[1:]
        return {name: part.state_dict() for name, part in self._stateful().items()} | {
            "progress": self._progress,
            "generators": others,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Continues with it; what the checkpoint knows nothing of begins anew."""
        self._progress, self._others = state_dict["progress"], state_dict["generators"]
        for name, part in self._stateful().items():
            if name in state_dict:
                part.load_state_dict(state_dict[name])

    def _stateful(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {"guard": self.guard, "ema": self.ema, "duration": self.duration}
        parts |= {"curves": self.curves, "monitor": self.monitor}
        return {name: part for name, part in parts.items() if part is not None}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Adds the generators that Lightning leaves out."""
        checkpoint["generators"] = generators()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Keeps the generators' state until training starts (setting up draws from them)."""
        self._generators = checkpoint["generators"]


def trainer_of(
    loop: Loop,
    method: pl.LightningModule,
    *,
    accelerator: str,
    precision: str,
    max_steps: int,
    folder: Path,
    first: Sequence[pl.Callback] = (),
    **options: Any,
) -> pl.Trainer:
    """Lightning's trainer around a loop: one endless stream of steps (see `ImageData`), without what we do ourselves.

    Args:
        loop: what happens around a step.
        method: what is trained; only checkpoints with its weights are resumed from.
        accelerator: Lightning's name.
        precision: likewise.
        max_steps: -1 where the loop ends the run.
        folder: of the run.
        first: callbacks that come before the loop, which saves what they have done.
        options: further ones of Lightning's; `callbacks` and `plugins` come after ours.
    """
    own: dict[str, object] = {
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
    }
    callbacks, plugins = options.pop("callbacks", None) or [], options.pop("plugins", None) or []
    own |= {"callbacks": [*first, loop, *callbacks], "plugins": [SafeCheckpointIO(method.state_dict), *plugins]}
    quiet_lightning()
    own |= {"accelerator": accelerator, "precision": precision, "max_steps": max_steps}
    return pl.Trainer(**{**own, **options})


def quiet_lightning() -> None:
    """Its advice is about choices that are made, and said, here."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    advice = "treespec, LeafSpec|does not have many workers|lr_scheduler.step|weights_only|in eval mode at the start"
    warnings.filterwarnings("ignore", message=f".*({advice})")


def _move_on(method: pl.LightningModule, progress: float, held: Tensor) -> None:
    """`method.after_step`, unless the step was held back. On an accelerator nothing waits to know that."""
    after_step: Callable[[float], None] | None = getattr(method, "after_step", None)
    if after_step is None or getattr(after_step, "idle", False):  # fine-tuning, or nothing moves
        return
    if held.is_cpu:
        if not held:
            after_step(progress)
        return
    external: tuple[str, ...] = getattr(method, "external", ())
    state = by_type(
        value
        for name, value in [*method.named_buffers(), *method.named_parameters()]
        if not value.requires_grad and name.partition(".")[0] not in external
    )
    before = [joined(group) for group in state]
    after_step(progress)
    with torch.no_grad():
        for group, old in zip(state, before, strict=True):
            restore(group, torch.where(held, old, joined(group)))


def _packed(state: Generators) -> State:
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


def _unpacked(packed: State) -> Generators:
    """What `_packed` was given."""
    version, numbers, gauss = packed["python"]
    bits = packed["numpy"]["state"]
    state: Generators = {
        "torch": torch.tensor(packed["torch"], dtype=torch.uint8),
        "numpy": {**packed["numpy"], "state": {"key": np.array(bits["key"], np.uint32), "pos": bits["pos"]}},
        "python": (version, tuple(numbers), gauss),
    }
    if "cuda" in packed and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
        state["cuda"][torch.cuda.current_device()] = torch.tensor(packed["cuda"], dtype=torch.uint8)
    return state
