"""NT-Xent against a double loop, closed forms, invariances, other libraries, and two processes against one."""

import math

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from ssl_kit.methods.simclr import nt_xent


def naive(z, temperature):
    """Equation 1 of the paper, literally: a double loop over anchors and candidates."""
    z = F.normalize(z, dim=1)
    count = len(z)
    total = z.new_zeros(())
    for i in range(count):
        other = (i + count // 2) % count
        candidates = torch.stack([z[i] @ z[k] / temperature for k in range(count) if k != i])
        total = total - (z[i] @ z[other] / temperature - torch.logsumexp(candidates, 0))
    return total / count


def embeddings(pairs, dim, dtype=torch.float64, seed=0):
    z = torch.randn(2 * pairs, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_equals_the_double_loop_in_value_and_gradient(dtype, tolerance, temperature):
    z = embeddings(6, 5, dtype)
    reference = embeddings(6, 5)
    loss, wanted = nt_xent(z, temperature), naive(reference, temperature)
    assert abs(loss.item() - wanted.item()) <= tolerance * max(1, abs(wanted.item()))
    loss.backward()
    wanted.backward()
    scale = reference.grad.abs().max()
    assert (z.grad.double() - reference.grad).abs().max() <= 10 * tolerance * scale


@pytest.mark.parametrize(("temperature", "value"), [(0.5, 0.2395447662), (0.1, 9.0795737e-5)])
def test_two_orthogonal_pairs_have_a_closed_form(temperature, value):
    z = torch.eye(2, 3, dtype=torch.float64).repeat(2, 1)
    assert nt_xent(z, temperature).item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / temperature)), abs=1e-12)
    assert nt_xent(z, temperature).item() == pytest.approx(value, rel=1e-7)


def test_collapse_sits_at_chance_and_one_pair_at_zero():
    assert nt_xent(torch.ones(8, 4, dtype=torch.float64), 0.2).item() == pytest.approx(1.9459101, abs=1e-7)
    assert nt_xent(torch.randn(2, 4, dtype=torch.float64), 0.2).item() == 0
    assert nt_xent(embeddings(8, 16), 1e6).item() == pytest.approx(math.log(15), abs=1e-4)


def test_symmetric_in_the_views_and_invariant_to_scale_and_order():
    z = embeddings(5, 7).detach()
    loss = nt_xent(z, 0.3)
    torch.testing.assert_close(nt_xent(torch.cat([z[5:], z[:5]]), 0.3), loss)
    torch.testing.assert_close(nt_xent(z * torch.arange(1.0, 11.0)[:, None], 0.3), loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent(z[torch.cat([order, order + 5])], 0.3), loss)


def test_equals_other_libraries_in_value_and_gradient():
    lightly = pytest.importorskip("lightly.loss")
    metric = pytest.importorskip("pytorch_metric_learning.losses")
    z = embeddings(16, 12, torch.float32)
    nt_xent(z, 0.3).backward()
    first = embeddings(16, 12, torch.float32)
    loss = lightly.NTXentLoss(temperature=0.3)(first[:16], first[16:])
    loss.backward()
    second = embeddings(16, 12, torch.float32)
    other = metric.NTXentLoss(temperature=0.3)(second, torch.arange(16).repeat(2))
    other.backward()
    for value, gradient in [(loss, first.grad), (other, second.grad)]:
        torch.testing.assert_close(nt_xent(z, 0.3), value, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(z.grad, gradient, atol=1e-6, rtol=1e-5)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.5), embeddings(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.1, 1, 10])
def test_stays_finite_and_close_in_low_precision(dtype, temperature):
    low = embeddings(8, 16, dtype)
    exact = low.detach().double().requires_grad_()
    loss = nt_xent(low, temperature)
    wanted = nt_xent(exact, temperature)
    assert loss.dtype == torch.float32
    assert (
        torch.isfinite(loss)
        and abs(loss.item() - wanted.item()) <= 1e-5 * max(1, abs(wanted.item())) + 2e-7 / temperature
    )
    loss.backward()
    assert torch.isfinite(low.grad).all()


def test_zero_vectors_are_finite():
    z = torch.zeros(4, 3, requires_grad=True)
    nt_xent(z, 0.1).backward()
    assert torch.isfinite(z.grad).all()


def _one_rank(rank, world, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    weight, images = _problem()
    pairs = len(images) // 2 // world
    part = slice(rank * pairs, (rank + 1) * pairs)
    own = torch.cat([images[: len(images) // 2][part], images[len(images) // 2 :][part]])
    loss = nt_xent(own @ weight, 0.3)
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # what data-parallel training does
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    if rank == 0:
        queue.put(((total / world).item(), (weight.grad / world).numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _problem():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return weight, torch.randn(16, 6, generator=generator, dtype=torch.float64)


def test_two_processes_equal_one_on_the_joined_batch(free_port):
    weight, images = _problem()
    wanted = nt_xent(images @ weight, 0.3)
    wanted.backward()
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_one_rank, args=(2, free_port, queue), nprocs=2)
    loss, gradient = queue.get()
    assert loss == pytest.approx(wanted.item(), rel=1e-12)
    assert (torch.from_numpy(gradient) - weight.grad).abs().max() <= 1e-6 * weight.grad.abs().max()
