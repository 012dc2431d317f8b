"""Parts that several methods are made of.

The state of a method is a buffer or a frozen parameter, written in place: then a step that is held back leaves it as it
was, and averages, processes and checkpoints treat it rightly. What follows the weights (`Momentum`) moves in
`Method.after_step`; what follows the images of a batch (`Center`) moves in the forward pass while training. A queue of
negatives would be a part of the second kind: a buffer of rows, of which the loss takes a clone before it pushes the
rows of all processes (`all_gather`), around the end: steps differ by one image.

Letters: B images of this process, V views of each, K prototypes, D dimensions, W processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.training.distributed import sum_of_all

Norm = Literal["batch", "layer"]
_NORMS: dict[Norm, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def mlp(
    dim: int,
    widths: Sequence[int],
    *,
    norm: Norm | None = "batch",
    last_norm: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers, each with a norm, activations between them: (B, dim) to (B, widths[-1]).

    Args:
        dim: of what goes in.
        widths: of the layers.
        norm: after each of them; a layer without one has a bias.
        last_norm: whether the last layer has a norm too.
        activation: makes one.
    """
    layers: list[nn.Module] = []
    for place, width in enumerate(widths):
        normed = norm is not None and (last_norm or place < len(widths) - 1)
        if place:
            layers.append(activation())
        layers.append(nn.Linear(dim, width, bias=not normed))
        if norm is not None and normed:
            layers.append(_NORMS[norm](width))
        dim = width
    return nn.Sequential(*layers)


class Momentum(nn.Module):
    """A frozen copy of modules in a row, which follows them slowly (a target network, a teacher). It has no gradient.

    In training its batch norm normalises by its own batch, as the originals' does.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.modules_in_row = nn.Sequential(*(copy.deepcopy(module) for module in modules)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """What the modules give, one after the other."""
        return self.modules_in_row(rows)

    @torch.no_grad()
    def follow(self, *modules: nn.Module, tau: float) -> None:
        """theta' <- tau * theta' + (1 - tau) * theta, tau in [0, 1]; 0 copies."""
        theirs: list[Tensor] = [weight for module in modules for weight in module.parameters()]
        torch._foreach_lerp_(cast(list[Tensor], list(self.parameters())), theirs, 1 - tau)


class Prototypes(nn.Module):
    """K directions: (B, D) to the cosines with them, (B, K). The last layer of DINO's head, weight norm fixed to 1."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """In float32, also under autocast."""
        with float32(rows):
            return F.linear(F.normalize(rows.float(), dim=1), F.normalize(self.weight, dim=1))


class Center(nn.Module):
    """Takes from each column its running mean over the images of all processes (DINO, eq. 4): (B, K) to (B, K).

    Args:
        dim: K.
        momentum: of the mean, in [0, 1).
    """

    mean: Tensor

    def __init__(self, dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dim))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Centred by the mean so far, into which these rows then enter while training."""
        centred = rows - self.mean
        if self.training:
            total = sum_of_all(torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))]))
            self.mean.lerp_(total[:-1] / total[-1], 1 - self.momentum)
        return centred


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float | Tensor, iterations: int = 3) -> Tensor:
    """Scores (B, K) to assignments (B, K): rows sum to 1, columns are alike over the images of all processes.

    Caron et al. 2020 (SwAV, arXiv:2006.09882), appendix A; in float32.
    """
    share = (scores.float() / temperature).exp()  # cosines over the temperature: 1 / 0.04 is far from overflow
    total = sum_of_all(share.new_full((), len(scores)))
    for _ in range(iterations):
        share = share / sum_of_all(share.sum(dim=0)) / share.shape[1]  # prototypes: 1 / K each
        share = share / share.sum(dim=1, keepdim=True) / total  # images: 1 / N each
    return share * total


def by_size(encode: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """V views (B, C, h, w), of several sizes, to what `encode` makes of each, (B, D): one pass for each size."""
    places: dict[torch.Size, list[int]] = {}
    for place, view in enumerate(views):
        places.setdefault(view.shape[2:], []).append(place)
    made: dict[int, Tensor] = {}
    for same in places.values():
        outputs = encode(torch.cat([views[place] for place in same])).chunk(len(same))
        made |= dict(zip(same, outputs, strict=True))
    return [made[place] for place in range(len(views))]


def flatten_views(views: list[Tensor]) -> Tensor:
    """V views (B, C, h, w) to (V*B, C, h, w), view by view: one pass through the encoder serves all."""
    return torch.cat(views, dim=0)


def float32(rows: Tensor) -> AbstractContextManager[None]:
    """Inside, nothing is computed in low precision: for losses, where 8 bits of a product would be too few."""
    return torch.autocast(rows.device.type, enabled=False)
