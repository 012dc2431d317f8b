"""Rank, world size and a gather that keeps the gradient. Without a process group everything is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> Tensor:
    """Joins the rows of all processes, in rank order, keeping the gradient: (B, d) to (W*B, d), B equal everywhere.

    Backward sums what every process's loss asks of these rows. Together with the averaging of parameter gradients
    over processes this is the gradient of the mean loss, as one process would have it on the joined batch.
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)  # sum: every process's loss depends on these rows
        return total[rank() * context.count : (rank() + 1) * context.count]
