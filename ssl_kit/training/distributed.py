"""Rank, world size, and exchange of rows between processes. Without a process group everything is the identity.

Slices of a batch may be unequal. Counts of rows are exchanged between the hosts, so that no accelerator waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)  # for what one process does alone


_by_itself = False


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _by_itself else 1


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, this process exchanges nothing, as if there were no other: for a trial that the others do not make."""
    global _by_itself  # noqa: PLW0603
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def leave() -> None:
    """Ends the exchange between the processes, and the threads that carried it.

    Nothing may hold a group beyond this. gloo's threads let go of the last tensors when they get to it; when that is
    while the interpreter ends, the process is aborted after all went well (SIGABRT, pytorch/pytorch#179291).
    """
    patient_group.cache_clear()
    _host_group.cache_clear()
    dist.destroy_process_group()


def counts(count: int, group: Any = None) -> list[int]:
    """How many rows each process has, in rank order; `count` is this one's. Every process must call it."""
    if world_size() == 1:
        return [count]
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(parts, torch.tensor([count]), group=group or _host_group(dist.group.WORLD))
    return [int(part) for part in parts]


def share_weight(count: int) -> float:
    """What this process's mean over its `count` images is multiplied by before the gradients are averaged.

    Data-parallel training averages gradients over W processes as if their slices were equal. A mean over n of N images
    times W * n / N makes that average the gradient of the mean over all N images; 1.0 for equal slices.
    """
    everywhere = counts(count)
    return count * len(everywhere) / sum(everywhere)


def gather(rows: Tensor) -> Tensor:
    """Joins the rows of all processes, in rank order, keeping the gradient: (n, ...) to (N, ...), n may differ.

    Backward sums what every process's loss asks of these rows. Together with the averaging of parameter gradients over
    processes this is the gradient of the mean loss, as one process would have it on the joined batch.
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


def others(rows: Tensor) -> Tensor:
    """The rows of all other processes, in rank order, without gradient: (n, ...) to (N - n, ...)."""
    if world_size() == 1:
        return rows[:0]
    parts = _all_rows(rows, counts(len(rows)))
    return torch.cat([part for process, part in enumerate(parts) if process != rank()])


def parts(rows: Tensor) -> list[Tensor]:
    """The rows of each process, in rank order, without gradient: (n, ...) on the host to W tensors; n may differ.

    It waits for processes that are busy with something else: see `patient_group`.
    """
    if world_size() == 1:
        return [rows]
    group = patient_group(dist.group.WORLD)
    return _all_rows(rows, counts(len(rows), group), group)


def largest(value: float) -> float:
    """The largest of the processes' values, between the hosts: no accelerator waits for it."""
    if world_size() == 1:
        return value
    most = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return most.item()


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over the processes of a tensor that has one shape on all of them."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.counts = counts(len(rows))
        return torch.cat(_all_rows(rows, context.counts))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)  # sum: every process's loss depends on these rows
        return total.split(context.counts)[rank()]


def _all_rows(rows: Tensor, everywhere: list[int], group: Any = None) -> list[Tensor]:
    """One tensor per process; shorter ones are padded on the way, because the collective takes equal shapes."""
    most = max(everywhere)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows
    parts = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in everywhere]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return [part[:count] for part, count in zip(parts, everywhere, strict=True)]


@lru_cache(maxsize=1)
def _host_group(everyone: Any) -> Any:
    """A group that carries CPU tensors: the default one, `everyone`, unless that is NCCL's."""
    return dist.new_group(backend="gloo") if dist.get_backend(everyone) == "nccl" else None


@lru_cache(maxsize=1)
def patient_group(everyone: Any) -> Any:
    """A group of all processes of the default one, `everyone`, that waits for the slowest up to `PATIENCE`.

    The default group gives up early, because in a step nobody is slow. Who has died is noticed at once by both.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)
