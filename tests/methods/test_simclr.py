"""NT-Xent against a double loop, closed forms, invariances, other libraries, and two processes against one."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.encoders import Encoder
from ssl_kit.methods import simclr
from ssl_kit.methods.simclr import SimCLR, nt_xent
from ssl_kit.training import distributed
from ssl_kit.training.distributed import leave


def naive(z, temperature, decoupled=False, group=None):
    """Equation 1 of the paper, literally: a double loop over anchors and candidates; DCL likewise."""
    z = F.normalize(z, dim=1)
    count = len(z)
    total = z.new_zeros(())
    for i in range(count):
        other = (i + count // 2) % count
        left_out = {i, other} if decoupled else {i}
        if group is not None and group[i % len(group)] >= 0:
            same = {k for k in range(count) if group[k % len(group)] == group[i % len(group)]}
            left_out |= same - {other}
        candidates = torch.stack([z[i] @ z[k] / temperature for k in range(count) if k not in left_out])
        total = total - (z[i] @ z[other] / temperature - torch.logsumexp(candidates, 0))
    return total / count


def embeddings(pairs, dim, dtype=torch.float64, seed=0):
    z = torch.randn(2 * pairs, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype).requires_grad_()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("block", [1, 5, 6, 7, 256, None])  # None: the whole matrix
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 1.0])  # 0.01 takes the road for large similarities
def test_equals_the_double_loop_in_value_and_gradient(dtype, tolerance, temperature, block, decoupled, monkeypatch):
    monkeypatch.setattr(simclr, "_BLOCK", block or 256)
    monkeypatch.setattr(simclr, "_SMALL", 0 if block else 512)
    z = embeddings(6, 5, dtype)
    reference = embeddings(6, 5)
    tolerance *= max(1, 0.2 / temperature)  # similarities are rounded relative to their size
    loss, wanted = nt_xent(z, temperature, decoupled=decoupled), naive(reference, temperature, decoupled)
    assert abs(loss.item() - wanted.item()) <= tolerance
    loss.backward()
    wanted.backward()
    assert (z.grad.double() - reference.grad).abs().max() <= tolerance * max(1, reference.grad.abs().max())


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("block", [1, 5, 256, None])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_images_of_one_group_are_no_negatives_of_each_other(temperature, block, decoupled, monkeypatch):
    monkeypatch.setattr(simclr, "_BLOCK", block or 256)
    monkeypatch.setattr(simclr, "_SMALL", 0 if block else 512)
    z, reference, group = embeddings(7, 5), embeddings(7, 5), torch.tensor([3, -1, 3, 0, -1, 3, 0])
    loss = nt_xent(z, temperature, decoupled=decoupled, group=group)
    wanted = naive(reference, temperature, decoupled, group.tolist())
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-10)
    assert abs(loss.item() - nt_xent(z, temperature, decoupled=decoupled).item()) > 1e-4
    loss.backward()
    wanted.backward()
    assert (z.grad - reference.grad).abs().max() <= 1e-9 * max(1, reference.grad.abs().max())


@pytest.mark.parametrize("small", [0, 512])
def test_images_that_stand_alone_change_nothing_and_one_group_alone_leaves_no_negative(small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
    for temperature in (0.01, 0.2):
        alone, plain = embeddings(4, 5), embeddings(4, 5)
        nt_xent(alone, temperature, group=torch.full((4,), -1)).backward()
        nt_xent(plain, temperature).backward()
        assert torch.equal(alone.grad, plain.grad)
        z = embeddings(4, 5)
        loss = nt_xent(z, temperature, group=torch.zeros(4, dtype=torch.int64))
        loss.backward()
        assert loss.item() == 0 and (z.grad == 0).all()
        decoupled = nt_xent(embeddings(4, 5), temperature, decoupled=True, group=torch.zeros(4, dtype=torch.int64))
        assert decoupled.isfinite()


@pytest.mark.parametrize("small", [0, 512])
@pytest.mark.parametrize(("temperature", "value"), [(0.5, 0.2395447662), (0.1, 9.0795737e-5)])
def test_two_orthogonal_pairs_have_a_closed_form(temperature, value, small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
    z = torch.eye(2, 3, dtype=torch.float64).repeat(2, 1)
    assert nt_xent(z, temperature).item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / temperature)), abs=1e-12)
    assert nt_xent(z, temperature).item() == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("small", [0, 512])
def test_collapse_sits_at_chance(small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
    assert nt_xent(torch.ones(8, 4, dtype=torch.float64), 0.2).item() == pytest.approx(1.9459101, abs=1e-7)
    assert nt_xent(embeddings(8, 16), 1e6).item() == pytest.approx(math.log(15), abs=1e-4)
    assert nt_xent(torch.ones(8, 4), 0.2, decoupled=True).item() == pytest.approx(math.log(6), abs=1e-6)


@pytest.mark.parametrize("decoupled", [False, True])
def test_one_image_has_nothing_to_be_told_from(decoupled):
    with pytest.raises(UserError, match="one image, wanted two"):
        nt_xent(torch.randn(2, 4), 0.2, decoupled=decoupled)


def test_a_run_of_one_image_a_step_is_refused(labelled_folder, tmp_path, capsys):
    options = ["--image_size=16", "--batch_size=1", "--trainer.max_steps=2", "--run", str(tmp_path / "run")]
    small = ["--method.encoder.name=resnet18_small", "--method.encoder.args={channels: [8, 8, 8, 8]}"]
    assert cli.main(["pretrain", str(labelled_folder), *options, *small]) == 2
    assert "one image" in capsys.readouterr().err and not (tmp_path / "run" / "encoder").exists()


def test_no_step_of_a_plan_is_left_with_one_image():
    """Every small epoch: each image once, all steps of at least two images unless one is what was asked for."""
    for together in range(1, 6):
        for count in range(together, 30):
            plan = TrainingPlan(count, together, seed=0)
            rows = [planned.rows for planned in itertools.islice(plan.batches(), plan.steps_per_epoch)]
            assert sorted(np.concatenate(rows)) == list(range(count))
            sizes = [len(part) for part in rows]
            assert min(sizes) >= min(2, together) and max(sizes) - min(sizes) <= 1
            assert max(sizes) <= together or (together == 2 and count % 2)


def test_a_small_loss_keeps_its_digits_in_blocks(monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", 0)
    z = torch.eye(2, 3).repeat(2, 1)
    assert nt_xent(z, 0.05).item() == pytest.approx(math.log1p(2 * math.exp(-20)), rel=1e-5)


def test_symmetric_in_the_views_and_invariant_to_scale_and_order():
    z = embeddings(5, 7).detach()
    loss = nt_xent(z, 0.3)
    torch.testing.assert_close(nt_xent(torch.cat([z[5:], z[:5]]), 0.3), loss)
    torch.testing.assert_close(nt_xent(z * torch.arange(1.0, 11.0)[:, None], 0.3), loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent(z[torch.cat([order, order + 5])], 0.3), loss)


@pytest.mark.parametrize("small", [0, 512])
def test_equals_other_libraries_in_value_and_gradient(small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
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


@pytest.mark.parametrize("small", [0, 512])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.015, 0.5])
def test_gradcheck(decoupled, temperature, small, monkeypatch):
    monkeypatch.setattr(simclr, "_BLOCK", 4)
    monkeypatch.setattr(simclr, "_SMALL", small)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, temperature, decoupled=decoupled), embeddings(5, 4))


def test_products_in_bfloat16_are_close():
    exact, fast = embeddings(300, 64, torch.float32), embeddings(300, 64, torch.float32)
    loss, wanted = nt_xent(fast, 0.2, bfloat16=True), nt_xent(exact, 0.2)
    (3 * loss).backward()
    (3 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert 0 < (fast.grad - exact.grad).norm() <= 0.02 * exact.grad.norm()


def test_autocast_does_not_reach_the_loss():
    one, other = embeddings(20, 16, torch.float32), embeddings(20, 16, torch.float32)
    nt_xent(one, 0.1).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(other, 0.1)
    loss.backward()
    assert torch.equal(one.grad, other.grad)


class Largest(TorchDispatchMode):
    """Notes the most values that any tensor made inside holds."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.values = max(self.values, made.numel())
        return made


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_nothing_is_as_large_as_the_matrix_of_similarities(temperature, monkeypatch):
    monkeypatch.setattr(simclr, "_BLOCK", 32)
    z = embeddings(512, 8, torch.float32)
    with Largest() as largest:
        nt_xent(z, temperature).backward()
    assert largest.values == 32 * 1024 == 4 * z.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [0, 512])
@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.1, 1, 10])
def test_stays_finite_and_close_in_low_precision(dtype, temperature, small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
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


@pytest.mark.parametrize("small", [0, 512])
def test_zero_vectors_are_finite(small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
    z = torch.zeros(4, 3, requires_grad=True)
    loss = nt_xent(z, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3)) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("small", [0, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_vector_among_others_has_no_direction_and_gets_no_gradient(dtype, small, monkeypatch):
    monkeypatch.setattr(simclr, "_SMALL", small)
    z = embeddings(4, 8, dtype).detach()
    z[1] = 0
    z.requires_grad_()
    exact = z.detach().double().requires_grad_()
    nt_xent(z, 0.1).backward()
    nt_xent(exact, 0.1).backward()
    assert not z.grad[1].any() and not exact.grad[1].any()
    torch.testing.assert_close(z.grad.double(), exact.grad, atol=1e-2, rtol=1e-2)


def method(dims=None, **settings):
    torch.manual_seed(0)
    # new class tokens are almost parallel (mean cosine 0.99), which makes the gradient a difference of large terms
    pooling = {"class_token": False, "global_pool": "avg"}
    small = {"patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 2, **pooling}
    made = SimCLR(Encoder("vit_tiny_patch16_224", small, (8, 8)), projection=(12, 8), dims=dims, **settings)
    made.heads = torch.nn.ModuleList(torch.nn.Linear(dim, 8) for dim in made.dims)  # no batch statistics
    return made


def views(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(count, 3, 8, 8, generator=generator) for _ in range(2)]


def test_a_nested_code_is_the_mean_of_its_prefixes():
    nested = method(dims=(3, 8))
    assert nested.encoder(views(4)[0]).shape == (4, 8) and nested.encoder.args["num_classes"] == 8
    code = nested.encoder(torch.cat(views(6)))
    wanted = [nt_xent(head(code[:, :dim]), 0.2) for head, dim in zip(nested.heads, (3, 8), strict=True)]
    loss = nested.loss(views(6), Key(0, 0, torch.arange(6)))["loss"]
    assert loss.item() == pytest.approx((sum(wanted) / 2).item(), rel=1e-6)
    short = method(dims=(3,)).encoder(views(4)[0])
    assert short.shape == (4, 3)
    for wrong in ((), (0, 4), (4, 4)):
        with pytest.raises(UserError, match="dims"):
            method(dims=wrong)


def test_chance_of_the_decoupled_loss():
    assert method(decoupled=True).chance_loss(8) == pytest.approx(math.log(14))
    assert method().chance_loss(8) == pytest.approx(math.log(15))


# Several processes: rank r takes COUNTS[r] images. Models in float32; plain products in float64.

COUNTS = (5, 2, 4, 1)
SETTINGS = ({}, {"decoupled": True}, {"dims": (4, 8)}, {"temperature": 0.01}, {"group": True})
GROUP = torch.tensor([5, -1, 5, 2, 5, 2, -1, 2, 9, 5, 2, 5])  # of the images, across processes


def model_step(settings, part):
    group = GROUP[part] if "group" in settings else None
    made = method(**{name: value for name, value in settings.items() if name != "group"})
    own = [view[part] for view in views(12)]
    loss = made.training_step({"views": own, "key": Key(0, 0, torch.arange(12)[part], group)}, 0)["loss"]
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in made.parameters() if parameter.grad is not None]
    return loss.detach()[None], torch.cat(gradients)


def exact_step(settings, part):
    group = GROUP[part] if "group" in settings else None
    made = method(**{name: value for name, value in settings.items() if name != "group"})
    width = 8 * len(made.heads)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, width, generator=generator, dtype=torch.float64).requires_grad_()
    images = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64)[:, part]
    loss = made.contrast(images.flatten(0, 1) @ weight, group)["loss"] * distributed.share_weight(images.shape[1])
    loss.backward()
    return loss.detach()[None], weight.grad.flatten()


def one_rank(rank, world, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    edges = [0, *torch.tensor(COUNTS[:world]).cumsum(0).tolist()[: world - 1], 12]
    part = slice(edges[rank], edges[rank + 1])
    results = []
    for settings in SETTINGS:
        for value in (*model_step(settings, part), *exact_step(settings, part)):
            torch.distributed.all_reduce(value)  # what data-parallel training does
            results.append((value / world).numpy())
    if rank == 0:
        queue.put(results)
    torch.distributed.barrier()
    leave()


def against_one_process(world, port):
    """Largest relative error of the loss and the parameters' gradient: pairs (float32 model, float64) per setting."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_rank, args=(world, port, queue), nprocs=world)
    found = iter(queue.get())
    errors = []
    for settings in SETTINGS:
        wanted = *model_step(settings, slice(None)), *exact_step(settings, slice(None))
        each = [((torch.from_numpy(next(found)) - one).abs().max() / one.abs().max()).item() for one in wanted]
        errors.append((max(each[:2]), max(each[2:])))
    return errors


def test_two_processes_with_unequal_slices_equal_one_on_the_joined_batch(free_port):
    for single, double in against_one_process(2, free_port):
        assert single <= 1e-5 and double <= 1e-10
