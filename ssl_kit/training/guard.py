"""A step with a non-finite loss, gradient or running statistic changes no weight and no statistic, on any process.

Everything is decided on the device, so nothing waits for it: the flag goes to the optimiser as `found_inf` (what fused
optimisers take from a gradient scaler), running statistics go back to what they were, and the counts are read when the
next row of the curves is. After three such steps in a row all steps are held back until that look, which ends the run.

    state of a step   where                     what happens to it
    weights, momenta  optimiser                 not touched: found_inf
    buffers           batch norm, centers, ...  put back from a copy made before the forward pass
    teachers, ...     training/loop.py          not moved, or put back: see `Method.after_step`
    averaged weights  training/optim.py         not moved, nor where they are not finite: then `spoilt`

The total norm of the gradients, which the check needs, also clips them.

Diagnose, off by default: gradients per layer and dead units, for vanishing and exploding gradients.
`diagnose.csv` gets, every `interval` steps, a row per layer that has weights of its own and per ReLU:

    step, layer     which; names as in `named_modules()` of the method
    gradient_norm   Euclidean norm over the layer's own weights, before clipping
    weight_norm     likewise of the weights; the ratio of the two is what a healthy net keeps alike over its depth
    dead            of a ReLU: fraction of its channels that are zero for every image and place of the batch

Only the steps of a row cost anything: hooks are there for those alone, and everything is read from the device once.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssl_kit.core.console import warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file, if_room
from ssl_kit.training.checkpoint import State, newest
from ssl_kit.training.distributed import world_size

_PATIENCE = 3  # bad steps in a row that end a run
_SCALER_PATIENCE = 20  # with a gradient scaler, which finds its scale (2^16 at first) by halving it when it overflows
_TOTAL, _STREAK, _LONGEST, _FIRST, _NORMS, _COUNT = range(6)  # of the state, one float32 vector: one copy per look


class Guard:
    """Holds back bad steps and clips gradients.

    Optimisers of `Optim` skip a held step altogether. Others get gradients of zero for it: they change no weight by
    the bad numbers, but their momentum and weight decay act.

    Args:
        clip: largest total norm of the gradients; None leaves them as they are.
        checkpoints: folder of the checkpoints, to name the last good one.

    Attributes:
        held: () bool on the device: whether the newest step was held back.
        spoilt: () bool on the device: whether something beside the step is not finite; set after a step, it holds back
            the next one.
    """

    def __init__(self, clip: float | None = None, checkpoints: Path | None = None):
        self.clip, self.checkpoints = clip, checkpoints
        self.held = self.spoilt = torch.zeros((), dtype=torch.bool)
        self.patience = _PATIENCE
        self._state = _fresh_state()
        self._bad = torch.zeros((), dtype=torch.bool)
        self._buffers: list[list[Tensor]] = []
        self._before: list[Tensor] = []
        self._seen = 0  # bad steps that were told of

    def start(self, module: pl.LightningModule, *, scaled: bool) -> None:
        """Moves its counts to the device; groups the buffers, which are copied as one tensor per type.

        Args:
            module: what is trained.
            scaled: whether a gradient scaler is at work.
        """
        self._state, self.held = self._state.to(module.device), self.held.to(module.device)
        self.spoilt = self.spoilt.to(module.device)
        self._bad = torch.zeros_like(self.held)
        if scaled:
            self.patience = _SCALER_PATIENCE
        self._buffers = by_type(module.buffers())

    def before_step(self) -> None:
        """Copies the buffers before the first forward pass of an optimiser step."""
        self._before = [joined(group) for group in self._buffers]
        self._bad = self.spoilt

    def see(self, loss: Tensor) -> None:
        """Looks at the loss of a batch."""
        self._bad = self._bad | ~loss.detach().isfinite()

    @torch.no_grad()
    def decide(self, step: int, optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
        """Decides whether the step after `step` others counts, puts the buffers back, clips, tells the optimiser."""
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients).to(self.held.device)
        scale = scaler._get_scale_async() if scaler is not None and _skips(optimizer) else None
        if scale is not None:  # the optimiser divides by it itself
            norm = norm / scale
        after = [joined(group) for group in self._buffers]
        bad = self._bad | ~norm.isfinite()
        for values in after:
            if values.is_floating_point():
                bad = bad | ~values.isfinite().all().to(bad.device)
        if world_size() > 1:  # the loss and the statistics are each process's own
            flag = bad.float()
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            bad = flag > 0
        self.held = bad | (self._state[_LONGEST] >= self.patience)
        self._state = _counted(self._state, bad, norm, step)
        for group, old, new in zip(self._buffers, self._before, after, strict=True):
            restore(group, torch.where(self.held.to(old.device), old, new))
        self._hold(optimizer, gradients, norm, scaled=scaler is not None)

    def _hold(self, optimizer: Optimizer, gradients: list[Tensor], norm: Tensor, *, scaled: bool) -> None:
        """Makes the coming `optimizer.step` skip a held step, and clips the gradients of the others."""
        if self.clip is not None:
            torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        if _skips(optimizer) and scaled:  # the scaler will look at the gradients itself, and lower its scale
            torch._foreach_add_(gradients, torch.where(self.held, torch.nan, 0.0))
        elif _skips(optimizer):
            vars(optimizer).update(found_inf=self.held.float())
        else:  # a scaler has looked already: NaN that came now would be applied
            zero_where(self.held, gradients)

    def look(self, step: int) -> dict[str, float]:
        """Reads the counts: the one place where the device is waited for.

        Args:
            step: optimiser steps so far.

        Returns:
            gradient_norm: mean over the good steps since the last look, before clipping (absent without any);
            skipped_steps: bad steps of the run so far.

        Raises:
            UserError: so many bad steps in a row that the run cannot recover.
        """
        total, _, longest, first, norms, count = self._state.tolist()
        if longest >= self.patience:
            raise UserError(
                f"the loss or the gradient was not finite in {self.patience} steps in a row (first at step "
                f"{first:.0f}); they changed no weight. Start anew with a lower --method.optim.lr or with "
                f"--method.optim.clip 1, or go on with --resume --precision float32 from {self._last_good()}"
            )
        if total > self._seen:
            warn(
                f"{total - self._seen:.0f} of the steps before step {step:,} had a non-finite loss or gradient and "
                f"were left out (first: step {first:,.0f}; {total:,.0f} in the whole run)"
            )
        self._seen = int(total)
        self._state[_FIRST] = -1.0
        self._state[_NORMS:] = 0.0
        told: dict[str, float] = {"skipped_steps": int(total)}
        return told | ({"gradient_norm": norms / count} if count else {})

    def healthy(self) -> bool:
        """Whether the newest step was good, and the run is not to end for too many bad ones.

        Waits for the device: for use where a checkpoint is written anyway.
        """
        return not bool((self._state[_STREAK] > 0) | (self._state[_LONGEST] >= self.patience) | self.spoilt)

    def _last_good(self) -> str:
        path = newest(self.checkpoints) if self.checkpoints is not None and self.checkpoints.is_dir() else None
        return f"the last good checkpoint, {path}" if path is not None else "the start: no checkpoint was written yet"

    def state_dict(self) -> State:
        """The counts."""
        return {"counts": self._state, "seen": self._seen}

    def load_state_dict(self, state_dict: State) -> None:
        """Continues counting."""
        self._state, self._seen = state_dict["counts"], state_dict["seen"]


def _fresh_state() -> Tensor:
    state = torch.zeros(6)
    state[_FIRST] = -1.0
    return state


def _counted(state: Tensor, bad: Tensor, norm: Tensor, step: int) -> Tensor:
    """The counts after one more step: (6,) float32, on the device."""
    total, streak, longest, first, norms, count = state.unbind()
    streak = (streak + 1) * bad
    first = torch.where(bad & (first < 0), float(step), first)
    norms, count = norms + torch.where(bad, 0.0, norm), count + ~bad
    return torch.stack([total + bad, streak, torch.maximum(longest, streak), first, norms, count])


def _skips(optimizer: Optimizer) -> bool:
    """Whether its step does nothing where `found_inf` is 1: torch's mark for fused optimisers."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups of one type on one device, for `joined`."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def joined(buffers: Iterable[Tensor]) -> Tensor:
    """The values of a group as one vector: what is done to it is one call to an accelerator, not one for each."""
    return torch.cat([_laid_out(buffer).reshape(-1) for buffer in buffers])


def restore(buffers: list[Tensor], values: Tensor) -> None:
    """Writes what `joined` gave, or the like, back into a group."""
    laid = [_laid_out(buffer) for buffer in buffers]
    parts = values.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(laid, [part.view(buffer.shape) for part, buffer in zip(parts, laid, strict=True)])


def _laid_out(tensor: Tensor) -> Tensor:
    """A view in the order of its memory: of channels_last weights, whose values would be copied one by one."""
    return tensor.permute(0, 2, 3, 1) if tensor.is_contiguous(memory_format=torch.channels_last) else tensor


def zero_where(held: Tensor, tensors: list[Tensor]) -> None:
    """Sets all to 0 where `held`, () bool; also what is NaN, which a product would leave."""
    if held.is_cpu:
        for values in tensors:
            values.masked_fill_(held, 0.0)
    else:
        for group in by_type(tensors):
            restore(group, torch.where(held, 0.0, joined(group)))


_COLUMNS = ("step", "layer", "gradient_norm", "weight_norm", "dead")


class Diagnose:
    """Writes `diagnose.csv`; asked before the guard, which clips.

    Args:
        path: of the CSV. A resumed run drops the rows after its step, then continues.
        interval: steps between rows.
    """

    def __init__(self, path: Path, interval: int = 20):
        self.path, self.interval = path, interval
        self._alive: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}  # (2,): of the gradient and of the weights
        self._hooks: list[RemovableHandle] = []

    def start(self, trainer: pl.Trainer) -> None:
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

    def watch(self, step: int, method: nn.Module) -> None:
        """Before a step that is looked at, which comes after `step` others: watches the ReLUs."""
        if (step + 1) % self.interval == 0 and not self._hooks:
            for name, module in method.named_modules():
                if isinstance(module, nn.ReLU):
                    self._hooks.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            alive = (output.detach() > 0).transpose(0, 1).flatten(1).any(dim=1)  # (channels,)
            self._alive[name] = alive | self._alive[name] if name in self._alive else alive

        return hook

    def take_norms(self, step: int, method: nn.Module, scaler: GradScaler | None = None) -> None:
        """Takes the norms of that step, on the device."""
        if (step + 1) % self.interval:
            return
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, module in method.named_modules():
            own = [weight for weight in module.parameters(recurse=False) if weight.grad is not None]
            if own:
                gradient = torch.nn.utils.get_total_norm([weight.grad for weight in own if weight.grad is not None])
                weights = torch.nn.utils.get_total_norm([weight.detach() for weight in own])
                self._norms[name] = torch.stack([gradient / scale, weights])

    def write(self, trainer: pl.Trainer) -> None:
        """Writes the rows, if there are any."""
        if not self._norms:
            return
        for handle in self._hooks:
            handle.remove()
        norms = dict(zip(self._norms, torch.stack(list(self._norms.values())).tolist(), strict=True))
        rows: list[dict[str, object]] = [
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
