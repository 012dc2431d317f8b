"""Several processes of one run: rank, exchange of rows, waiting, deciding together. For one, the identity.

Slices of a batch may be unequal. Counts of rows are exchanged between the hosts, so that no accelerator waits for them.

`verbs/launching.py` or torchrun starts them and names each in the environment; `joining.py` brings them together. All
of them walk through the same program; the first one alone measures, draws, writes and speaks.

    exchange           all that the hosts tell each other after a step, at once
    wait               for what the first one does alone; so do Lightning's barriers
    broadcast          a value that the first one makes, for all
    all_gather_object  what each has found, for all

A step's collectives fail after `TIMEOUT`, so that a process that hangs ends the run within a minute; until the first
step is over, after `PATIENCE`: compiling and cold disks take their time. What the first process does alone may take
longer, too: the others are patient, as long as all are heard of. A process that dies closes its connections, which ends
both kinds of waiting at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ssl_kit.core.process import TIMEOUT_SECONDS

Group: TypeAlias = "dist.ProcessGroup"  # a torch without it imports this file, too
T = TypeVar("T")
TIMEOUT = timedelta(seconds=TIMEOUT_SECONDS)  # of a step's collectives, once the first step is over
PATIENCE = timedelta(minutes=30)  # for what one process does alone
BEAT = timedelta(seconds=5)  # between two signs of life of a process

FIND_UNUSED = "ddp_find_unused_parameters_true"  # Lightning's name

_by_itself = False
beats: dict[int, int] = {}  # of each other process that gives signs of life, how many; see `joining.py`
_images: list[int] = []  # of each process in the batch that they are at, where all know it


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


def expect_promptness() -> None:
    """From now on a step's collectives fail after `TIMEOUT`: the first step is over."""
    if world_size() > 1:
        # the public name came after torch 2.11, and the former one warns since
        limit: Callable[[timedelta, Group], None] = (
            getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        )
        for group in (dist.group.WORLD, _host_group(dist.group.WORLD)):
            if group is not None:
                limit(TIMEOUT, group)


def leave() -> None:
    """Ends the exchange between the processes, and the threads that carried it.

    Nothing may hold a group beyond this. gloo's threads let go of the last tensors when they get to it; when that is
    while the interpreter ends, the process is aborted after all went well (SIGABRT, pytorch/pytorch#179291).
    """
    _images.clear()
    patient_group.cache_clear()
    _host_group.cache_clear()
    dist.destroy_process_group()


class Word(NamedTuple):
    """What a process says after a step: a signal to stop, whether a save is due, seconds of training."""

    signal: int = 0
    due: bool = False
    seconds: float = 0.0


def exchange(word: Word) -> list[Word]:
    """The word of each process, in rank order: between the hosts, so that no accelerator waits."""
    if world_size() == 1:
        return [word]
    parts = [torch.zeros(len(word), dtype=torch.float64) for _ in range(world_size())]
    dist.all_gather(parts, torch.tensor(word, dtype=torch.float64), group=_host_group(dist.group.WORLD))
    return [Word(int(signal), bool(due), seconds) for signal, due, seconds in (part.tolist() for part in parts)]


def settle(images: list[int]) -> None:
    """What `counts` is asked for rows of each image it answers by `images` of each process, until the next batch.

    All processes must say the same; none ends it.
    """
    _images[:] = images


def counts(count: int, group: Group | None = None, *, per_image: int | None = None) -> list[int]:
    """How many rows each process has, in rank order; `count` is this one's. Every process must call it.

    Args:
        count: rows of this process.
        group: that carries it; by default that of the hosts.
        per_image: rows of each image of the batch, where every process has so many: then see `settle`.
    """
    if world_size() == 1:
        return [count]
    if per_image is not None and _images:
        assert count == per_image * _images[rank()], (count, per_image, _images)
        return [per_image * images for images in _images]
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    group_, own = group or _host_group(dist.group.WORLD), torch.tensor([count])
    _while_all_live(dist.all_gather(parts, own, group=group_, async_op=True))
    return [int(part) for part in parts]


def share_weight(count: int) -> float:
    """What this process's mean over its `count` images is multiplied by before the gradients are averaged.

    Data-parallel training averages gradients over W processes as if their slices were equal. A mean over n of N images
    times W * n / N makes that average the gradient of the mean over all N images; 1.0 for equal slices.
    """
    everywhere = counts(count, per_image=1)
    return count * len(everywhere) / sum(everywhere)


def all_gather(rows: Tensor, everywhere: list[int] | None = None) -> Tensor:
    """Joins the rows of all processes, in rank order, keeping the gradient: (n, ...) to (N, ...), n may differ.

    `everywhere` is what `counts` gives of them, asked here if not given.

    Backward sums what every process's loss asks of these rows. Together with the averaging of parameter gradients over
    processes this is the gradient of the mean loss, as one process would have it on the joined batch.
    """
    return _Gather.apply(rows, everywhere or counts(len(rows))) if world_size() > 1 else rows


def others(rows: Tensor, everywhere: list[int] | None = None) -> Tensor:
    """The rows of all other processes, in rank order, without gradient: (n, ...) to (N - n, ...)."""
    if world_size() == 1:
        return rows[:0]
    parts = _all_rows(rows, everywhere or counts(len(rows)))
    return torch.cat([part for process, part in enumerate(parts) if process != rank()])


def rows_of_each(rows: Tensor) -> list[Tensor]:
    """The rows of each process, in rank order, without gradient: (n, ...) on the host to W tensors; n may differ.

    It waits for processes that are busy with something else: see `patient_group`.
    """
    if world_size() == 1:
        return [rows]
    group = patient_group(dist.group.WORLD)
    return _all_rows(rows, counts(len(rows), group), group)


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over the processes of a tensor that has one shape on all of them."""
    return sum_of_all(values) / world_size() if world_size() > 1 else values


def sum_of_all(values: Tensor) -> Tensor:
    """The sum over the processes of a tensor that has one shape on all of them, without gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


class _Counted(FunctionCtx):
    counts: list[int]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: _Counted, rows: Tensor, everywhere: list[int]) -> Tensor:
        context.counts = everywhere
        return torch.cat(_all_rows(rows, everywhere))

    @staticmethod
    def backward(context: _Counted, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)  # sum: every process's loss depends on these rows
        return total.split(context.counts)[rank()], None


def _all_rows(rows: Tensor, everywhere: list[int], group: Group | None = None) -> list[Tensor]:
    """One tensor per process; shorter ones are padded on the way, because the collective takes equal shapes."""
    most = max(everywhere)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]) if len(rows) < most else rows
    parts = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in everywhere]
    work = dist.all_gather(parts, padded.contiguous(), group=group, async_op=group is not None)
    if group is not None:
        _while_all_live(work)
    return [part[:count] for part, count in zip(parts, everywhere, strict=True)]


@lru_cache(maxsize=1)
def _host_group(everyone: Group | None) -> Group | None:
    """A group that carries CPU tensors: the default one, `everyone`, unless that is NCCL's."""
    if dist.get_backend(everyone) != "nccl":
        return None
    group = dist.new_group(backend="gloo")
    assert not isinstance(group, int), "this process is in it"
    return group


@lru_cache(maxsize=1)
def patient_group(everyone: Group | None) -> Group:
    """A group of all processes of the default one, `everyone`, that waits for the slowest up to `PATIENCE`.

    The default group gives up early, because in a step nobody is slow. Who has died is noticed at once by both.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert not isinstance(group, int), "this process is in it"
    return group


def wait() -> None:
    """Waits for every process, also long: after what the first one does alone."""
    if world_size() > 1:
        _while_all_live(dist.barrier(group=patient_group(dist.group.WORLD), async_op=True))


def _while_all_live(work: dist.Work | None) -> None:
    """Waits for all processes' part in a patient group's work, but for none that gives no more signs of life.

    A host that is cut off closes no connection; without this, that would be noticed after `PATIENCE`. What is counted
    are looks, not seconds: a job that is stopped as a whole, and goes on, has missed none.
    """
    assert work is not None, "this process is in the group"
    seen, silent = dict(beats), dict.fromkeys(beats, 0)
    while not work.is_completed():
        with suppress(RuntimeError):  # not yet; or it has failed, as the last line says
            work.wait(BEAT)
        now = dict(beats)
        silent = {other: 0 if now[other] != seen.get(other) else silent.get(other, 0) + 1 for other in now}
        seen = now
        lost = [str(other) for other, looks in silent.items() if looks * BEAT >= TIMEOUT]
        if lost and not work.is_completed():
            raise dist.DistNetworkError(f"no sign of life of process {', '.join(lost)} for {TIMEOUT.seconds} s")
    work.wait()


def broadcast(make: Callable[[], T]) -> T:
    """What `make` gives on the first process, for all of them; JSON-able. The others wait for it."""
    if world_size() == 1:
        return make()
    return cast(T, all_gather_object(make() if rank() == 0 else None)[0])


def all_gather_object(value: T) -> list[T]:
    """The JSON-able value of each process, in rank order."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in rows_of_each(data)]


def same_buffers(module: nn.Module) -> None:
    """Gives a module the buffers of the first process (running statistics), so that all see what is exported."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
