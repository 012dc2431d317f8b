"""DINO's loss against lightly's, in value and gradient; its center, temperature, teacher and crops of several sizes."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.encoders.vit import tokens
from ssl_kit.methods.dino import DINO, dino_loss, hidden_blocks, koleo
from ssl_kit.methods.parts import Center, by_size, sinkhorn
from ssl_kit.training.distributed import leave, share_weight
from ssl_kit.training.optim import cosine_decay
from ssl_kit.training.verdict import verdict
from ssl_kit.views.recipe import ViewRecipe

SIZE = (16, 16)


def method(**arguments):
    torch.manual_seed(0)
    usual = {"small_crops": 2, "prototypes": 12, "hidden": (16, 8)}
    return DINO(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE), **(usual | arguments))


def views(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (SIZE, SIZE, (8, 8), (8, 8))
    return [torch.rand(count, 3, *size, generator=generator) for size in sizes], Key(0, 0, torch.arange(count))


def test_loss_gradient_and_center_are_lightlys():
    generator = torch.Generator().manual_seed(0)
    scores = [[torch.randn(6, 10, generator=generator) for _ in range(count)] for count in (2, 5)]
    lightlys = DINOLoss(10, warmup_teacher_temp=0.04, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)
    center = Center(10, momentum=0.9)
    for _ in range(3):  # the center moves after each
        teacher, student = scores
        ours, theirs = ([score.clone().requires_grad_() for score in student] for _ in range(2))
        wanted = lightlys(teacher, theirs, epoch=0)
        wanted.backward()
        found = (center(torch.cat(teacher)) / 0.04).softmax(dim=1).chunk(2)
        loss = dino_loss([score / 0.1 for score in ours], list(found))
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(center.mean, lightlys.center.flatten(), rtol=1e-5, atol=1e-7)
        scores = [[score + 0.5 for score in kind] for kind in scores]


def test_a_step_is_eq_3_in_a_double_loop():
    dino = method().eval()
    crops, key = views()
    encode = lambda x: dino.head(dino.encoder(x)).detach().double().numpy()
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    losses = []
    for i in range(2):
        p = softmax(encode(crops[i]) / 0.04)
        for j in range(4):
            if i != j:
                losses.append(-(p * np.log(softmax(encode(crops[j]) / 0.1))).sum(axis=1).mean())
    told = dino.loss(crops, key)
    assert told["loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert 0 <= told["teacher_entropy"] <= math.log(12) and dino.chance_loss(5) == math.log(12)


def test_teacher_and_temperature_move_by_the_progress():
    dino = method(teacher_temperature=(0.04, 0.08), warmup=0.5, tau=0.5)
    assert dino.temperature_now == pytest.approx(0.04)
    before = [weight.clone() for weight in dino.teacher.parameters()]
    with torch.no_grad():
        for weight in [*dino.encoder.parameters(), *dino.head.parameters()]:
            weight.add_(1)
    dino.after_step(0.25)
    assert dino.temperature_now == pytest.approx(0.06)
    tau = cosine_decay(0.5, 0.25)
    for old, new in zip(before, dino.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + (1 - tau))
    dino.after_step(1.0)
    assert dino.temperature_now == pytest.approx(0.08)
    names = dino.state_dict().keys()
    assert {"temperature_now", "center.mean"} < names and any(name.startswith("teacher.") for name in names)


def test_the_center_is_that_of_a_training_step_only():
    dino = method()
    dino.eval().loss(*views())
    assert (dino.center.mean == 0).all()
    dino.train().loss(*views())
    assert (dino.center.mean != 0).any()


def test_sinkhorn_assigns_evenly():
    """Swav's algorithm 1 in NumPy, in its own orientation."""
    scores = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    q = np.exp(scores.double().numpy().T / 0.5)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * 6
        q /= q.sum(axis=0, keepdims=True) * 24
    found = sinkhorn(scores, 0.5)
    np.testing.assert_allclose(found.numpy(), (q * 24).T, rtol=1e-4)
    assert torch.allclose(found.sum(dim=1), torch.ones(24))
    assert (sinkhorn(scores, 0.5, iterations=50).sum(dim=0) - 4).abs().max() < 1e-3
    loss = method(balance="sinkhorn").loss(*views())["loss"]
    assert loss.isfinite() and loss.requires_grad


def test_each_size_goes_through_once_and_comes_back_in_order():
    seen = []
    encode = lambda x: seen.append(tuple(x.shape)) or x.mean(dim=(1, 2, 3))[:, None]
    crops = [views()[0][place] for place in (2, 0, 3, 1)]
    made = by_size(encode, crops)
    assert sorted(seen) == [(10, 3, 8, 8), (10, 3, 16, 16)]
    for one, view in zip(made, crops, strict=True):
        torch.testing.assert_close(one[:, 0], view.mean(dim=(1, 2, 3)))


def test_crops_are_those_of_its_preset_and_encoders_of_one_size_are_refused():
    dino = method(small_crops=3)
    built = ViewRecipe(preset=dino.preset, local_size=8).build(SIZE, 3, dino.num_views)
    assert [view.size for view in built] == [SIZE, SIZE, (8, 8), (8, 8), (8, 8)]
    vit = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    with pytest.raises(UserError, match=r"takes one size only.*dynamic_img_size"):
        DINO(Encoder("vit_tiny_patch16_224", vit, SIZE))
    DINO(Encoder("vit_tiny_patch16_224", {**vit, "dynamic_img_size": True}, SIZE))
    for wrong in ({"small_crops": 9}, {"temperature": 0.0}, {"warmup": 2.0}):
        with pytest.raises(UserError, match="wanted"):
            method(**wrong)


def balanced(rows):
    """What the teacher's side makes of scores: centred twice, the center, and Sinkhorn's assignment."""
    center = Center(6, momentum=0.5)
    return [center(rows), center(rows), sinkhorn(rows, 0.5)], center.mean


def one_rank(rank, world, port, queue):
    torch.set_num_threads(1)
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    part = (slice(0, 5), slice(5, 9))[rank]
    alone, mean = balanced(rows)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    made, own = balanced(rows[part])
    errors = [(one - all_rows[part]).abs().max().item() for one, all_rows in zip(made, alone, strict=True)]
    queue.put(max([*errors, (own - mean).abs().max().item()]))
    torch.distributed.barrier()
    leave()


def test_two_processes_balance_as_one_does(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_rank, args=(2, free_port, queue), nprocs=2)
    assert max(queue.get(), queue.get()) <= 1e-6


def transformer(**arguments):
    torch.manual_seed(0)
    args = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
    usual = {"small_crops": 2, "prototypes": 12, "hidden": (16, 8), "ibot": 1.0, "koleo": 0.1}
    return DINO(Encoder("vit_tiny_patch16_224", args, SIZE), **(usual | arguments))


def test_koleo_and_its_gradient_are_lightlys():
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    loss, wanted = koleo(ours), KoLeoLoss()(theirs)
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert koleo(3 * square).item() == pytest.approx(-math.log(2**0.5), rel=1e-5)  # each is sqrt 2 from its next


def test_the_loss_of_hidden_patches_is_lightlys():
    dino, (crops, key) = transformer().eval(), views(5)
    large = torch.cat(crops[:2])
    hidden = hidden_blocks(dino.encoder, large, key, 0.3)
    got = dino.loss(crops, key)
    take = lambda sequence: torch.stack([rows[1:][chosen] for rows, chosen in zip(sequence, hidden, strict=True)])
    student = take(tokens(dino.encoder, large, instead=(hidden, dino.patch_token)))
    teacher = take(tokens(dino.teacher.modules_in_row[0], large))
    lightlys = IBOTPatchLoss(12, teacher_temp=0.04, student_temp=0.1)
    mask = torch.zeros(10, 4, 4, dtype=torch.bool)
    mask.view(10, -1).scatter_(1, hidden, True)
    wanted = lightlys(dino.patch_teacher(teacher.flatten(0, 1)), dino.patch_head(student.flatten(0, 1)), mask)
    assert got["patches"].item() == pytest.approx(wanted.item(), rel=1e-5)
    features = dino.encoder.head(tokens(dino.encoder, large, instead=(hidden, dino.patch_token))).chunk(2)
    assert got["koleo"].item() == pytest.approx(sum(KoLeoLoss()(part).item() for part in features), rel=1e-5)
    alone = transformer(ibot=0.0, koleo=0.0).eval()
    assert set(alone.loss(crops, key)) == {"loss", "teacher_entropy"}


def test_what_hidden_patches_show_has_no_influence_on_the_student_and_they_lie_together():
    dino, (crops, key) = transformer().eval(), views(5)
    large = torch.cat(crops[:2])
    hidden = hidden_blocks(dino.encoder, large, key, 0.3)
    assert hidden.shape == (10, 5) and all(len(set(row)) == 5 for row in hidden.tolist())
    assert len({tuple(sorted(row)) for row in hidden.tolist()}) > 5
    again = hidden_blocks(dino.encoder, large[[3, 8]], Key(0, 0, key.index[[3]]), 0.3)
    assert torch.equal(again, hidden[[3, 8]])  # of the image alone, whatever else is in the batch
    for row in hidden:
        y, x = row // 4, row % 4
        near = (y[:, None] - y).abs() + (x[:, None] - x).abs()
        assert (near.fill_diagonal_(9).amin(dim=1) == 1).all()
    spoilt = large.clone()
    for image, row in zip(spoilt, hidden, strict=True):
        for number in row.tolist():
            top, left = 4 * (number // 4), 4 * (number % 4)
            image[:, top : top + 4, left : left + 4] = 0.123
    seen = [tokens(dino.encoder, images, instead=(hidden, dino.patch_token)) for images in (large, spoilt)]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-6)
    assert (tokens(dino.encoder, large) - tokens(dino.encoder, spoilt)).abs().max() > 1e-3


def step_of(part):
    torch.manual_seed(0)
    dino = transformer(norm="layer").eval()
    crops, key = views(6)
    own = Key(0, 0, key.index[part])
    loss = dino.loss([view[part] for view in crops], own)["loss"] * share_weight(len(own.index))
    loss.backward()
    return torch.cat([loss.detach()[None], *(one.grad.flatten() for one in dino.parameters() if one.grad is not None)])


def one_of_unequal(rank, world, port, queue):
    torch.set_num_threads(1)
    wanted = step_of(slice(None))
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    made = step_of((slice(0, 4), slice(4, 6))[rank])
    torch.distributed.all_reduce(made)
    queue.put(((made / world - wanted).abs().max() / wanted.abs().max()).item())
    torch.distributed.barrier()
    leave()


def test_two_processes_hide_and_hold_apart_as_one_does(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_of_unequal, args=(2, free_port, queue), nprocs=2)
    assert max(queue.get(), queue.get()) <= 1e-5


def test_patches_are_hidden_of_transformers_only():
    with pytest.raises(UserError, match="masking patches needs one of timm's VisionTransformers"):
        method(ibot=1.0)
    with pytest.raises(UserError, match="a fraction between 0 and 1"):
        transformer(hidden_patches=1.0)
    dino = transformer(balance="sinkhorn")
    dino.loss(*views(4))["loss"].backward()
    dino.after_step(0.5)
    assert dino.patch_token.grad.abs().max() > 0 and dino.chance_loss(8) is None
    eva = Encoder(
        "eva02_tiny_patch14_224",
        {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "use_fc_norm": False},
        SIZE,
    )
    large = DINO(eva, small_crops=0, prototypes=12, hidden=(16, 8), ibot=0.5)
    crops, key = views(4)
    assert large.loss(crops[:2], key)["patches"].isfinite()


@pytest.mark.parametrize(("loss", "state"), [(5.444, "unknown"), (5.545, "stuck")])
def test_a_healthy_run_is_not_called_stuck_for_a_loss_near_that_of_uniform_guesses(loss, state):
    """Curves of dino/healthy/0 of `benchmarks/verdict.py`; and the loss that dino/uniform/0 has."""
    start = {"step": 0, "epoch": 0, "effective_rank": 63.2, "knn_top1": 0.238, "crops_top1": 0.184}
    now = {"step": 200, "epoch": 6.7, "effective_rank": 48.7, "knn_top1": 0.203, "crops_top1": 0.234}
    told = verdict(
        [start, {"step": 200, "loss": loss}, now],
        dim=128,
        chance_loss=math.log(256),
        chance_margin=DINO.chance_margin,
        contrastive=DINO.compares_images,
        held_out=202,
    )
    assert told.state == state
