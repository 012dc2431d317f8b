"""What a training is fed with: its batches, code compiled for them, and gradient caching of large ones.

Gradient caching is the gradient of a large contrastive batch in the memory of a small one (Gao, Zhang, Han & Callan
2021, arXiv:2101.06983). The loss needs the projections of the whole batch, but only those: they are small. So each
chunk is projected and its activations are thrown away; the backward pass of the loss over all projections then walks
through the chunks, makes the views of each again from their keys, projects them again and backpropagates. That is
activation checkpointing, one checkpoint per chunk; it costs one more forward pass.

For networks without batch statistics this is the gradient of the large batch, to rounding. With batch norm each chunk
normalises its own samples, as a process of its own would; the running statistics are updated in the first pass only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_kit.core.console import detail
from ssl_kit.core.random import Key
from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.distributed import by_itself


class Chunks(Protocol):
    """A batch in parts, asked for in order, then in reverse.

    Part i is its V views (b_i, C, h, w) and their key, the same whenever it is asked for.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[list[Tensor], Key]: ...


class Batch(TypedDict):
    """What a step is given: `views`, one (B, C, h, w) float in [0, 1] per view; `label` (B,) int64, -1 = unknown.

    A batch in parts has `chunks` in the place of views.
    """

    views: list[Tensor]
    key: Key
    label: Tensor
    chunks: NotRequired[Chunks]


class Loader(Protocol):
    """Makes the batches; `waited` are the seconds that were spent waiting for them."""

    waited: float


class Data(Protocol):
    """What a training knows of where its batches come from; see `ImageData`."""

    images_per_step: int
    steps_per_epoch: int
    total_steps: int
    loader: Loader


class PlannedData(Data, Protocol):
    """Batches of a plan that all processes share."""

    def images_of_each(self) -> list[int]:
        """Of the batch at hand, of every process, where all know that; else empty."""
        ...

    def trial(self, device: torch.device) -> Iterator[Batch]:
        """Batches as training will be given them, one of each shape."""
        ...


def data_of(trainer: pl.Trainer) -> PlannedData:
    """Where the batches of a training come from."""
    return trainer.datamodule  # type: ignore[attr-defined]


@runtime_checkable
class Chunkable(Protocol):
    """A method whose loss is a function of one small tensor per view: what a contrastive batch in chunks needs."""

    def project(self, views: list[Tensor], key: Key) -> Tensor:
        """V views (B, C, h, w) to (V*B, d), view by view."""
        ...

    def contrast(self, z: Tensor, group: Tensor | None = None) -> dict[str, Tensor]:
        """(V*B, d) of the whole batch to what `loss` returns; `group` (B,) as in `Key`, given where there are any."""
        ...


def no_chunks(method: str) -> str:
    """What a user is told whose method has no contrastive batch."""
    return (
        f"--contrastive-batch: the loss of {method} is not one of projections that chunks could be made of; leave "
        "it out, or give --method.optim.accumulate"
    )


def chunked(
    module: nn.Module, project: Callable[[list[Tensor], Key], Tensor], chunks: Chunks, num_views: int
) -> Tensor:
    """The projections of a whole batch, of which no more than one chunk's activations are ever held.

    Args:
        module: whose buffers (running statistics of batch norm) the second pass leaves as the first has set them.
        project: of `module`: views of a chunk and its key to (V*b, d), view by view.
        chunks: the batch.
        num_views: V.

    Returns:
        (V*B, d), view by view: rows 0..B-1 are the first view of all images in the order of the chunks.
    """
    # checkpoint replays the generators (dropout) of the devices that it finds among its arguments
    device = next(module.parameters()).new_empty(0)

    def part(number: int, _: Tensor) -> Tensor:
        return project(*chunks[number]).unflatten(0, (num_views, -1))  # (V, b, d)

    contexts = lambda: (nullcontext(), buffers_kept(module))
    parts = [
        checkpoint(part, number, device, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
        for number in range(len(chunks))
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the module's buffers are afterwards as they were: statistics are counted once.

    In training mode batch norm normalises by the batch alone, so that their values do not matter inside.
    """
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def compile_ahead(trainer: pl.Trainer, method: Any) -> None:
    """Forward and backward passes of all shapes that training will have, so that step 1 is a step like the others.

    Nothing is kept of them but the code.
    """
    if any(isinstance(part, nn.SyncBatchNorm) for part in method.modules()):
        return  # it would talk to processes that have fewer shapes
    began, state, sizes = time.perf_counter(), generators(), set[int]()
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    with by_itself(), buffers_kept(method):
        for batch in data_of(trainer).trial(method.device):
            labels = [batch["label"]] if method.uses_labels else []
            with trainer.precision_plugin.forward_context():  # views are made outside it
                loss = method.loss(batch["views"], batch["key"], *labels)["loss"]
            torch.autograd.grad(loss, weights, allow_unused=True)  # not .grad: data-parallel training waits for those
            sizes.add(len(batch["label"]))
    set_generators(state)
    told = " and ".join(map(str, sorted(sizes)))
    detail(f"compiled for {told} images at once in {time.perf_counter() - began:.0f} s")
