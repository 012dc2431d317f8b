"""Anybody's module where an encoder is asked for: to be measured, not to be kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import Reading

_SETTLING = 64  # images a batch


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode it had: frozen parts of a model stay frozen."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def settled(network: nn.Module, images: Callable[[], Tensor]) -> Iterator[None]:
    """Batch norms that never saw an image take mean and variance of these inside; afterwards they are as they were.

    Without that an untrained network is measured with layers that do not normalise, as no training has it: on CIFAR-10
    its kNN is 0.27 to 0.29 instead of 0.30, and the difference would look like something learnt from the first step on.
    All other networks are left alone.

    Args:
        network: gives features of a batch; its mode does not matter.
        images: gives (N, C, H, W) in [0, 1]; asked only if needed. A single one settles nothing.
    """
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm) and _unseen(part)]
    found = images() if norms else torch.empty(0)
    if len(found) < 2:
        yield
        return
    saved = lambda part: {name: value.clone() for name, value in part.named_buffers()}
    kept = [(part, part.training, part.momentum, saved(part)) for part in norms]
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), in_eval_mode(network):
            for part in norms:
                part.reset_running_stats()
                part.training, part.momentum = True, None  # None: the plain mean over batches
            for batch in found.chunk(-(-len(found) // _SETTLING)):
                network(batch.to(device))
            for part in norms:
                part.training = False
        yield
    finally:
        for part, mode, momentum, buffers in kept:
            part.training, part.momentum = mode, momentum
            for name, value in buffers.items():
                getattr(part, name).copy_(value)


def _unseen(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())


class Wrapped(nn.Module):
    """Anybody's module in the place of an encoder: (B, C, H, W) in [0, 1] to (B, dim) float32, flattened.

    Args:
        module: (B, C, H, W) float to (B, dim), or (B, dim, 1, 1) and the like; it keeps its mode and its device.
        image_size: (height, width) of its input.
        channels: of its input.
        mean: per-channel mean that the module wants subtracted; one number serves all channels.
        std: per-channel standard deviation likewise.
        name: for results; by default that of the class.

    Attributes:
        dim: length of a feature vector, found by showing it one image.

    Raises:
        UserError: it gives something else.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        image_size: tuple[int, int],
        channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        name: str | None = None,
    ):
        super().__init__()
        self.module, self.image_size, self.channels = module, image_size, channels
        self.name = name or type(module).__name__
        self.reading = Reading(channels)
        self.sha256: str | None = None
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor(values, device=device).reshape(1, -1, 1, 1), persistent=False)
        with torch.inference_mode(), in_eval_mode(module):
            made = module(torch.zeros(2, channels, *image_size, device=device))
        if not isinstance(made, Tensor) or made.ndim < 2 or len(made) != 2:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UserError(f"{self.name} makes {got} of 2 images; wanted (2, dim)")
        self.dim = made[0].numel()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, dim)."""
        made: Tensor = self.module((images - self.mean) / self.std)
        return made.flatten(1).float()

    def fresh(self, seed: int = 0) -> Wrapped | None:
        """The same with random weights, in eval mode; None, said, where a part of it cannot draw new ones."""
        made = copy.deepcopy(self).eval()
        kept = [name for name, part in made.named_modules() if not _drawn_anew(part)]
        if kept:
            say(f"{self.name}: no untrained network beside it, {kept[0] or 'it'} has weights and no reset_parameters")
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in made.modules():
                reset = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()
        return made


def _drawn_anew(part: nn.Module) -> bool:
    """Whether a module without its children has no weights, or knows how to draw them."""
    return hasattr(part, "reset_parameters") or not [*part.parameters(recurse=False)]
