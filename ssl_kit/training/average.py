"""Average: an exponential moving average of the encoder's weights, kept beside the training.

theta <- tau * theta + (1 - tau) * w after every optimiser step: an average over about the last 1 / (1 - tau) steps.
With `cosine`, tau grows from its first value to 1 over the run as in BYOL (Grill et al. 2020, arXiv:2006.07733,
section 3.3). Running statistics of batch norm are copied, not averaged: they are averages already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.training.watchdog import Watchdog


def cosine_decay(first: float, done: float) -> float:
    """tau when a fraction `done` in [0, 1] of the run is over: `first` at the start, 1 at the end."""
    return 1 - (1 - first) * (math.cos(math.pi * min(1.0, done)) + 1) / 2


class Average(pl.Callback):
    """Averages the weights of `module.encoder`; steps that the watchdog holds back do not move it, nor does what is not
    finite, of which the watchdog is told.

    Args:
        decay: tau, in (0, 1). Choose 1 / (1 - tau) far below the number of steps: the average begins with the random
            weights.
        watchdog: a callback before this one.
        total_steps: of the run, for `cosine`.
        cosine: let tau grow to 1 over the run.
    """

    def __init__(
        self, decay: float, watchdog: Watchdog, total_steps: Callable[[], int], *, cosine: bool = False
    ) -> None:
        if not 0 < decay < 1:
            raise UserError(f"--ema {decay:g}: wanted a decay between 0 and 1, such as 0.99")
        self.decay, self.watchdog, self.total_steps, self.cosine = decay, watchdog, total_steps, cosine
        self._encoder: nn.Module | None = None
        self._stored: dict[str, Tensor] | None = None

    def encoder(self, module: pl.LightningModule) -> Any:
        """The averaged encoder, in eval mode, on the device of the trained one; before the first step its copy."""
        if self._encoder is None:
            self._encoder = copy.deepcopy(cast(nn.Module, module.encoder)).eval().requires_grad_(False)
            if self._stored is not None:
                self._encoder.load_state_dict(self._stored)
                self._stored = None
        return self._encoder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the copy, where the weights now are."""
        self.encoder(pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the average after an optimiser step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step - 1
        decay = cosine_decay(self.decay, step / max(1, self.total_steps() - 1)) if self.cosine else self.decay
        trained, averaged = cast(nn.Module, pl_module.encoder), self.encoder(pl_module)
        weights = list(averaged.parameters())
        difference = torch._foreach_sub(list(trained.parameters()), weights)
        self.watchdog.spoilt = ~torch.nn.utils.get_total_norm(difference).isfinite()
        stay = self.watchdog.held | self.watchdog.spoilt  # no step, no move
        torch._foreach_mul_(difference, 1 - decay)
        torch._foreach_add_(weights, [torch.where(stay, 0.0, change) for change in difference])  # NaN * 0 would be NaN
        torch._foreach_copy_(list(averaged.buffers()), list(trained.buffers()))

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights."""
        stored = self._stored if self._encoder is None else self._encoder.state_dict()
        return {"encoder": dict(stored or {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with them."""
        self._encoder, self._stored = None, state_dict["encoder"]
