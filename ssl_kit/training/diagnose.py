"""Diagnose: gradients per layer and dead units, for vanishing and exploding gradients. Off by default.

`diagnose.csv` gets, every `interval` steps, a row per layer that has weights of its own and per ReLU:

    step, layer     which; names as in `named_modules()` of the method
    gradient_norm   Euclidean norm over the layer's own weights, before clipping
    weight_norm     likewise of the weights; the ratio of the two is what a healthy net keeps alike over its depth
    dead            of a ReLU: fraction of its channels that are zero for every image and place of the batch

Only the steps of a row cost anything: hooks are there for those alone, and everything is read from the device once.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssl_kit.core.files import atomic_file, if_room

_COLUMNS = ("step", "layer", "gradient_norm", "weight_norm", "dead")


class Diagnose(pl.Callback):
    """Writes `diagnose.csv`; must come before the watchdog, which clips.

    Args:
        path: of the CSV. A resumed run drops the rows after its step, then continues.
        interval: steps between rows.
    """

    def __init__(self, path: Path, interval: int = 20):
        self.path, self.interval = path, interval
        self._alive: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}  # (2,): of the gradient and of the weights
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the file, without the rows that a resumed run will write again."""
        if not trainer.is_global_zero:
            return
        kept: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= trainer.global_step]
        with atomic_file(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before a step that is looked at: watches the ReLUs."""
        if (trainer.global_step + 1) % self.interval == 0 and not self._hooks:
            for name, module in pl_module.named_modules():
                if isinstance(module, nn.ReLU):
                    self._hooks.append(module.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            alive = (output.detach() > 0).transpose(0, 1).flatten(1).any(dim=1)  # (channels,)
            self._alive[name] = alive | self._alive[name] if name in self._alive else alive

        return hook

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes the norms of that step, on the device."""
        if (trainer.global_step + 1) % self.interval:
            return
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, module in pl_module.named_modules():
            own = [weight for weight in module.parameters(recurse=False) if weight.grad is not None]
            if own:
                gradient = torch.nn.utils.get_total_norm([weight.grad for weight in own if weight.grad is not None])
                weights = torch.nn.utils.get_total_norm([weight.detach() for weight in own])
                self._norms[name] = torch.stack([gradient / scale, weights])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rows."""
        if not self._norms:
            return
        for handle in self._hooks:
            handle.remove()
        norms = dict(zip(self._norms, torch.stack(list(self._norms.values())).tolist(), strict=True))
        rows: list[dict[str, Any]] = [
            {"layer": name, "gradient_norm": f"{gradient:.6g}", "weight_norm": f"{weights:.6g}"}
            for name, (gradient, weights) in norms.items()
        ]
        if self._alive:
            dead = torch.stack([1 - alive.float().mean() for alive in self._alive.values()]).tolist()
            rows += [{"layer": name, "dead": round(share, 4)} for name, share in zip(self._alive, dead, strict=True)]
        self._alive, self._norms, self._hooks = {}, {}, []
        if trainer.is_global_zero:
            with if_room(self.path), open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, _COLUMNS).writerows({"step": trainer.global_step, **row} for row in rows)
