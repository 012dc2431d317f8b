"""The optimiser and its schedule as one record, every unit spelt out; averaged weights (EMA).

EMA: an exponential moving average of the encoder's weights, kept beside the training:
theta <- tau * theta + (1 - tau) * w after every optimiser step: an average over about the last 1 / (1 - tau) steps.
With `cosine`, tau grows from its first value to 1 over the run as in BYOL (Grill et al. 2020, arXiv:2006.07733,
section 3.3). Running statistics of batch norm are copied, not averaged: they are averages already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, overload

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from ssl_kit.core.console import detail
from ssl_kit.core.errors import UserError
from ssl_kit.training.chunked import data_of
from ssl_kit.training.guard import zero_where

E = TypeVar("E", bound=nn.Module)
ParamGroup: TypeAlias = dict[str, Any]  # of an optimiser: its `params` and their options, as torch has them


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
        layer_decay: factor on the rate from one of the encoder's layers to the one below it (Bao et al. 2021,
            arXiv:2106.08254); the layers are timm's own grouping, heads learn at the full rate. None: all do.
        clip: largest total norm of the gradients over all weights; larger ones are scaled down to it.
        accumulate: batches whose gradients are averaged into one step. Contrastive losses compare images of one batch
            only, so it does not replace a larger batch there.
        fused: one kernel for all weights, where the device has one.
    """

    name: Literal["adamw", "sgd", "lars"] = "sgd"
    lr: float = 0.5
    lr_per: int | None = 256
    weight_decay: float = 5e-4
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_epochs: float = 2.0
    final_lr: float = 0.0
    layer_decay: float | None = None
    clip: float | None = None
    accumulate: int = 1
    fused: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.weight_decay < 0 or self.warmup_epochs < 0:
            raise UserError(
                f"optim: got lr {self.lr}, weight_decay {self.weight_decay}, warmup_epochs {self.warmup_epochs}; "
                "wanted lr above 0 and the others at least 0"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay: got {self.layer_decay}; wanted a factor in (0, 1], such as 0.75")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"optim.clip: got {self.clip}; wanted a norm above 0, such as 1, or none")
        if self.accumulate < 1:
            raise UserError(f"optim.accumulate: got {self.accumulate}; wanted at least 1 batch a step")

    def peak_lr(self, images_per_step: int) -> float:
        """The learning rate at the end of the warm-up, for this many images a step over all processes."""
        return self.lr if self.lr_per is None else self.lr * images_per_step / self.lr_per

    def build(
        self, module: nn.Module, *, images_per_step: int, steps_per_epoch: float, total_steps: int
    ) -> tuple[Optimizer, Schedule]:
        """The optimiser over the module's trainable parameters, and its schedule per step. Says the numbers once."""
        peak = self.peak_lr(images_per_step)
        groups = parameter_groups(module.named_parameters(), self.weight_decay)
        if self.layer_decay is not None:
            groups = layer_groups(groups, layer_scales(module, self.layer_decay), peak)
        lowest = min(group.get("lr", peak) for group in groups)  # the schedule will write the first step's rate there
        kernel = self.fused and all(has_fused(parameter) for group in groups for parameter in group["params"])
        optimiser = self._optimiser(groups, peak, kernel)
        schedule = Schedule(optimiser, round(self.warmup_epochs * steps_per_epoch), total_steps, self.final_lr)
        detail(
            f"optimiser: {self.name}, peak lr {peak:.4g} (lr {self.lr:g} per {self.lr_per or images_per_step} images, "
            f"{images_per_step} images a step), weight decay {self.weight_decay:g}, "
            f"warm-up {min(schedule.warmup_steps, total_steps // 2):,} of {total_steps:,} steps"
            + (f", {self.accumulate} batches a step" if self.accumulate > 1 else "")
            + (f", gradient norm at most {self.clip:g}" if self.clip is not None else "")
            + (f", lowest layer at {lowest:.4g}" if self.layer_decay is not None else "")
        )
        if self.name != "lars":
            why = "one kernel for all weights" if kernel else "as asked" if not self.fused else "this device has none"
            detail(f"fused optimiser: {'on' if kernel else 'off'} ({why})")
        return optimiser, schedule

    def configured(self, module: pl.LightningModule) -> OptimizerLRScheduler:
        """What Lightning asks a module for: `build`, as its trainer knows the batch, the processes and the steps."""
        trainer, data = module.trainer, data_of(module.trainer)
        optimiser, schedule = self.build(
            module,
            images_per_step=data.images_per_step * trainer.accumulate_grad_batches,
            steps_per_epoch=data.steps_per_epoch / trainer.accumulate_grad_batches,
            total_steps=trainer.max_steps if trainer.max_steps > 0 else data.total_steps,
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _optimiser(self, groups: list[ParamGroup], lr: float, fused: bool) -> Optimizer:
        if self.name == "adamw":
            return AdamW(groups, lr=lr, betas=self.betas, fused=fused)
        if self.name == "sgd":
            optimiser = SGD(groups, lr=lr, momentum=self.momentum, fused=fused)
            for parameter in [parameter for group in groups for parameter in group["params"] if self.momentum]:
                # the same first step as without; but the fused kernel makes missing buffers itself, and leaves them
                # with whatever was in memory when the guard holds that step back
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimiser
        return LARS(groups, lr=lr, momentum=self.momentum)


def has_fused(parameter: nn.Parameter) -> bool:
    """Whether torch has a fused optimiser for it."""
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda", "mps", "xpu")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[ParamGroup]:
    """Two groups: matrices and filters with weight decay; norms, biases and other vectors without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def layer_scales(module: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """The factor on the learning rate of each weight of the timm models in `module`: decay^(layers above it).

    timm numbers a model's layers from the stem upwards (`group_matcher`); what it counts as the model's head, and
    everything outside, has 1. A tiny ViT of 12 blocks has decay^13 at its patch embedding.

    Raises:
        UserError: there is no timm model with layers in it.
    """
    scales: dict[nn.Parameter, float] = {}
    for model in module.modules():
        matcher: Callable[..., dict[str, object]] | None = getattr(model, "group_matcher", None)
        if matcher is not None:
            layers = group_parameters(model, matcher(coarse=False), reverse=True)  # weight's name -> layer
            top = max(layers.values())
            scales |= {weight: decay ** (top - layers[name]) for name, weight in model.named_parameters()}
    if not scales:
        raise UserError("optim.layer_decay: the encoder is no timm model that names its layers; leave layer_decay out")
    return scales


def layer_groups(groups: list[ParamGroup], scales: dict[nn.Parameter, float], lr: float) -> list[ParamGroup]:
    """Splits parameter groups by the scale of their weights, lowest layers first; each gets its own `lr`."""
    split: dict[tuple[float, int], list[nn.Parameter]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            split.setdefault((scales.get(parameter, 1.0), number), []).append(parameter)
    return [{**groups[number], "params": split[scale, number], "lr": lr * scale} for scale, number in sorted(split)]


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

    def state_dict(self) -> dict[str, int]:
        """Numbers only: the base class would store the function."""
        return {"last_epoch": self.last_epoch, "total_steps": self.total_steps, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues at the stored step and horizon."""
        self.last_epoch = state_dict["last_epoch"]
        self.total_steps = state_dict["total_steps"]
        self.warmup_steps = state_dict["warmup_steps"]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888), as SimCLR's authors use it.

    The step of each matrix or filter is scaled by trust * |w| / |g + wd * w|, whatever the weight decay; norms, biases
    and other vectors take a plain SGD step, and a zero norm is not scaled. The ratio stays on the device: no host sync.
    Like torch's fused optimisers it divides gradients by `grad_scale` and does nothing where `found_inf` is 1.

    What adapts is what MAE's authors say (https://github.com/facebookresearch/mae/blob/main/util/lars.py, ndim > 1);
    SimCLR's (https://github.com/google-research/simclr/blob/master/lars_optimizer.py) leave norms and biases out by
    name, which is the same. timm's `Lars` adapts only groups with weight decay unless told `always_adapt`, and divides
    by |g| + wd * |w|, as the paper does. Momentum is torch's and MAE's, the rate outside the velocity; SimCLR's has it
    inside, which differs while the rate changes.
    """

    def __init__(
        self, params: ParamsT, lr: float, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: ParamGroup) -> None:
        assert parameter.grad is not None
        scale: Tensor | None = getattr(self, "grad_scale", None)
        held: Tensor | None = getattr(self, "found_inf", None)
        gradient = parameter.grad if scale is None else parameter.grad / scale
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        if parameter.ndim >= 2:
            weight_norm, gradient_norm = parameter.norm(), gradient.norm()
            ratio = group["trust"] * weight_norm / gradient_norm
            gradient = gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))
        velocity = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        moved = velocity * group["momentum"] + gradient
        if held is None:
            velocity.copy_(moved)
            parameter.add_(velocity, alpha=-group["lr"])
        else:
            velocity.copy_(torch.where(held > 0, velocity, moved))
            parameter.add_(torch.where(held > 0, 0.0, velocity), alpha=-group["lr"])


def cosine_decay(first: float, done: float) -> float:
    """tau when a fraction `done` in [0, 1] of the run is over: `first` at the start, 1 at the end."""
    return 1 - (1 - first) * (math.cos(math.pi * min(1.0, done)) + 1) / 2


class EMA:
    """Averages the weights of an encoder; steps that the guard holds back do not move it, nor does what is not finite.

    Args:
        decay: tau, in (0, 1). Choose 1 / (1 - tau) far below the number of steps: the average begins with the random
            weights.
        cosine: let tau grow to 1 over the run.
    """

    def __init__(self, decay: float, *, cosine: bool = False) -> None:
        if not 0 < decay < 1:
            raise UserError(f"--ema {decay:g}: wanted a decay between 0 and 1, such as 0.99")
        self.decay, self.cosine = decay, cosine
        self._encoder: nn.Module | None = None
        self._stored: dict[str, Tensor] | None = None

    def encoder(self, trained: E) -> E:
        """The averaged encoder, in eval mode, on the device of the trained one; before the first step its copy."""
        if self._encoder is None:
            self._encoder = copy.deepcopy(trained).eval().requires_grad_(False)
            if self._stored is not None:
                self._encoder.load_state_dict(self._stored)
                self._stored = None
        return cast(E, self._encoder)

    @torch.no_grad()
    def move(self, trained: nn.Module, step: int, total: int, held: Tensor) -> Tensor:
        """Moves the average after the optimiser step number `step` of `total`, unless it was `held` back, () bool.

        Returns:
            () bool on the device: whether the weights were not finite, so that the average has stayed.
        """
        decay = cosine_decay(self.decay, (step - 1) / max(1, total - 1)) if self.cosine else self.decay
        averaged = self.encoder(trained)
        weights = list[Tensor](averaged.parameters())
        difference = list(torch._foreach_sub(list[Tensor](trained.parameters()), weights))
        spoilt = ~torch.nn.utils.get_total_norm(difference).isfinite()
        torch._foreach_mul_(difference, 1 - decay)
        zero_where(held | spoilt, difference)  # no step, no move
        torch._foreach_add_(weights, difference)
        torch._foreach_copy_(list(averaged.buffers()), list(trained.buffers()))
        return spoilt

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The averaged weights."""
        stored = self._stored if self._encoder is None else self._encoder.state_dict()
        return {"encoder": dict(stored or {})}

    def load_state_dict(self, state_dict: dict[str, dict[str, Tensor]]) -> None:
        """Continues with them."""
        self._encoder, self._stored = None, state_dict["encoder"]
