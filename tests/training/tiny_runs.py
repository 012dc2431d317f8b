"""A real Lightning run on random images that takes milliseconds a step, for the tests of its parts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssl_kit.core.random import Key
from ssl_kit.training.checkpoint import Checkpoints
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import Optim

BATCH, SIDE = 8, 6


class Tiny(pl.LightningModule):
    """A convolution with batch norm, and a head; `spoil` may change views, loss or gradients of a step.

    Attributes:
        spoil: {step: (where, value)}, where is views, loss, gradient or nothing (the step is left out).
    """

    def __init__(self, optim: Optim, spoil: dict[int, tuple[str, float]] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(4, 1)
        self.optim, self.spoil = optim, spoil or {}
        self.step = -1  # batches so far

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor] | None:
        self.step += 1
        where, value = self.spoil.get(self.step, ("", 0.0))
        if where == "nothing":
            return None
        views = batch["views"][0]
        if where == "views":  # reaches the running statistics
            views = views.clone()
            views[0, 0, 0, 0] = value
        loss = (self.head(self.encoder(views).flatten(1)) - batch["target"]).square().mean()
        if where == "loss":
            loss = loss.detach() * value + 0 * loss
        return {"loss": loss}

    def on_after_backward(self) -> None:
        where, value = self.spoil.get(self.step, ("", 0.0))
        if where == "gradient":
            self.head.weight.grad[0, 1] = value

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        optimiser, schedule = self.optim.build(
            self, images_per_step=BATCH, steps_per_epoch=10, total_steps=trainer.max_steps
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Random(pl.LightningDataModule):
    """Batches drawn from their number; what Curves asks of a data module."""

    def __init__(self, batches: int, value: Callable[[Tensor], Tensor] = lambda views: views):
        super().__init__()
        self.batches, self.value = batches, value
        self.images_per_step, self.steps_per_epoch, self.total_steps = BATCH, 10, batches
        self.loader = type("Loader", (), {"waited": 0.0})()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self._batch(number) for number in range(self.batches)], batch_size=None)

    def _batch(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(number)
        views = self.value(torch.rand(BATCH, 3, SIDE, SIDE, generator=generator))
        target = views.mean(dim=(1, 2, 3))[:, None] + torch.rand(BATCH, 1, generator=generator)
        return {"views": [views], "target": target, "key": Key(0, 0, torch.arange(BATCH))}


def train(
    module: pl.LightningModule, loop: Loop | None = None, batches: int = 8, *, accumulate: int = 1, **options: Any
) -> pl.Trainer:
    """Runs `batches` batches, of `data` or random ones, on the CPU, with the loop's parts after other `callbacks`."""
    data, callbacks = options.pop("data", None), options.pop("callbacks", [])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=batches // accumulate,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, *([loop] if loop is not None else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=data or Random(batches))
    return trainer


def everything(module: pl.LightningModule) -> dict[str, Tensor]:
    """All state of a run by name: weights, buffers, and the optimiser's."""
    optimiser = module.trainer.optimizers[0]
    state = dict(module.state_dict())
    for number, parameter in enumerate(module.parameters()):
        for name, value in optimiser.state[parameter].items():
            state[f"optimiser/{number}/{name}"] = value
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Inside, a run is told to stop after `step` steps, as by SIGTERM."""
    end = Checkpoints.after_step

    def stop(self: Checkpoints, trainer: pl.Trainer, healthy: Callable[[], bool]) -> None:
        self.signals.received = signal.SIGTERM if trainer.global_step == step else None
        end(self, trainer, healthy)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Checkpoints, "after_step", stop)
        yield
