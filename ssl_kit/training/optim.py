"""Optim: the optimiser and its schedule as one record, every unit spelt out, converted to absolute numbers once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError


@dataclass(frozen=True)
class Optim:
    """How weights are updated.

    Args:
        name: of the optimiser.
        lr: peak learning rate for `lr_per` images a step.
        lr_per: images a step that `lr` is meant for; the rate used is lr * images_per_step / lr_per (Goyal et al.
            2017, arXiv:1706.02677). None uses `lr` as it stands.
        weight_decay: not applied to norms and biases (any parameter of fewer than two dimensions).
        momentum: of sgd and lars.
        betas: of adamw.
        warmup_epochs: of linear warm-up from 0, before the cosine; at most half of the run is warm-up.
        final_lr: where the cosine ends, as a fraction of the peak.
    """

    name: Literal["adamw", "sgd", "lars"] = "sgd"
    lr: float = 0.5
    lr_per: int | None = 256
    weight_decay: float = 5e-4
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 2.0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.weight_decay < 0 or self.warmup_epochs < 0:
            raise UserError(
                f"optim: got lr {self.lr}, weight_decay {self.weight_decay}, warmup_epochs {self.warmup_epochs}; "
                "wanted lr above 0 and the others at least 0"
            )

    def peak_lr(self, images_per_step: int) -> float:
        """The learning rate at the end of the warm-up, for this many images a step over all processes."""
        return self.lr if self.lr_per is None else self.lr * images_per_step / self.lr_per

    def build(
        self, module: nn.Module, *, images_per_step: int, steps_per_epoch: float, total_steps: int
    ) -> tuple[Optimizer, Schedule]:
        """The optimiser over the module's trainable parameters, and its schedule per step. Says the numbers once."""
        peak = self.peak_lr(images_per_step)
        groups = parameter_groups(module.named_parameters(), self.weight_decay)
        optimiser = self._optimiser(groups, peak)
        schedule = Schedule(optimiser, round(self.warmup_epochs * steps_per_epoch), total_steps, self.final_lr)
        say(
            f"optimiser: {self.name}, peak lr {peak:.4g} (lr {self.lr:g} per {self.lr_per or images_per_step} images, "
            f"{images_per_step} images a step), weight decay {self.weight_decay:g}, "
            f"warm-up {min(schedule.warmup_steps, total_steps // 2):,} of {total_steps:,} steps"
        )
        return optimiser, schedule

    def _optimiser(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        if self.name == "adamw":
            return AdamW(groups, lr=lr, betas=self.betas, fused=True)
        if self.name == "sgd":
            return SGD(groups, lr=lr, momentum=self.momentum, fused=True)
        return LARS(groups, lr=lr, momentum=self.momentum)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and filters with weight decay; norms, biases and other vectors without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Schedule(LambdaLR):
    """Linear warm-up from 0, then half a cosine down to `final_lr` times the peak, per step.

    Attributes:
        total_steps: the horizon; a run limited by `minutes` sets it from the measured speed.
    """

    def __init__(self, optimiser: Optimizer, warmup_steps: int, total_steps: int, final_lr: float = 0.0):
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_lr = final_lr
        super().__init__(optimiser, self.factor)

    def factor(self, step: int) -> float:
        """The fraction of the peak rate at `step` (0 is the first step)."""
        warmup = min(self.warmup_steps, self.total_steps // 2)  # the horizon of a run by minutes moves
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def state_dict(self) -> dict[str, Any]:
        """Numbers only: the base class would store the function."""
        return {"last_epoch": self.last_epoch, "total_steps": self.total_steps, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the stored step and horizon."""
        self.last_epoch = state_dict["last_epoch"]
        self.total_steps = state_dict["total_steps"]
        self.warmup_steps = state_dict["warmup_steps"]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888), as SimCLR's authors use it.

    The step of each weight with decay is scaled by trust * |w| / (|g + wd * w|); groups without weight decay (norms and
    biases) take a plain SGD step, and a zero norm is not scaled. The ratio stays on the device: no host sync.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad
        if group["weight_decay"]:
            decayed = gradient.add(parameter, alpha=group["weight_decay"])
            weight_norm, gradient_norm = parameter.norm(), decayed.norm()
            ratio = group["trust"] * weight_norm / gradient_norm
            gradient = decayed * torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
        velocity = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        velocity.mul_(group["momentum"]).add_(gradient)
        parameter.add_(velocity, alpha=-group["lr"])
