"""Barlow Twins against its equation, term by term; in low precision; and on two processes against one."""

import subprocess
import sys
from datetime import timedelta
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from barlow import BarlowTwins, barlow_loss
from torch import Tensor, nn

from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.training.distributed import leave

IMAGES, SLICES = 7, (slice(0, 4), slice(4, 7))  # of the two processes


def equation_1(first: Tensor, second: Tensor, off_diagonal: float) -> Tensor:
    """In a double loop."""
    loss = first.new_zeros(())
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            a, b = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            c = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
            loss = loss + ((1 - c) ** 2 if i == j else off_diagonal * c**2)
    return loss


def projections(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two views, (16, 5) each."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64).to(dtype)
    return first.requires_grad_(), second.requires_grad_()


def test_value_and_gradient_are_those_of_equation_1():
    """In double precision; and in float32, where the network around the loss multiplies in bfloat16."""
    wanted = projections(torch.float64)
    reference = equation_1(*wanted, 0.01)
    reference.backward()
    for dtype, precise in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        z = projections(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = barlow_loss(*z, 0.01)
        loss.backward()
        pairs = [(loss, reference), *((own.grad, their.grad) for own, their in zip(z, wanted, strict=True))]
        for own, their in pairs:
            torch.testing.assert_close(own.double(), their, rtol=precise, atol=precise)


def test_equal_decorrelated_projections_cost_nothing():
    """Their correlation is the identity."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_loss(z, z, 0.01) == 0


def step(part: slice) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a training step on a part of the images; without batch norm, each process has its own."""
    torch.manual_seed(0)
    small = {"patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    method = BarlowTwins(Encoder("vit_tiny_patch16_224", small, (8, 8)), width=6)
    method.head = nn.Linear(12, 6)
    views = [torch.rand(IMAGES, 3, 8, 8)[part] for _ in range(2)]
    loss = method.training_step({"views": views, "key": Key(0, 0, torch.arange(IMAGES)[part])}, 0)["loss"]
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in method.parameters() if weight.requires_grad])


def one_of_two(meeting: str, rank: int) -> None:
    """What each of two processes does: the mean of their gradients is that of one process with all images."""
    wanted = step(slice(None))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        for own, one in zip(step(SLICES[rank]), wanted, strict=True):
            dist.all_reduce(own)
            assert (own / 2 - one).abs().max() <= 1e-5 * one.abs().max()
        dist.barrier()
    finally:
        leave()


def test_two_processes_with_unequal_slices_equal_one():
    """This one, and this file as a program."""
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        other = subprocess.Popen([sys.executable, __file__, meeting])
        one_of_two(meeting, 0)
        assert other.wait() == 0


if __name__ == "__main__":
    one_of_two(sys.argv[1], 1)
