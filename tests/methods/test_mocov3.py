"""MoCo v3's loss against lightly's and a double loop, in value and gradient; its momentum network, frozen patches."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.encoders.pretrained import initialise
from ssl_kit.methods.mocov3 import MoCoV3, contrastive_loss
from ssl_kit.training.optim import EMA, Optim, cosine_decay

SIZE = (16, 16)
RESNET = ("resnet18_small", {"channels": [8, 8, 16, 16]})
VIT = ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2})


def method(encoder=RESNET, seed=0, **arguments):
    torch.manual_seed(seed)
    return MoCoV3(Encoder(*encoder, SIZE), (32, 16), (32, 16), **arguments)


def views(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, *SIZE, generator=generator) for _ in range(2)], Key(0, 0, torch.arange(count))


def rows(count=10, width=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_and_gradient_are_those_of_a_double_loop(temperature):
    queries, wanted = rows()
    theirs = queries.clone().requires_grad_()
    unit = lambda x: x / x.norm()
    loss = 0
    for i in range(5):
        for q, start in ((theirs[i], 5), (theirs[5 + i], 0)):  # the keys of the other view begin there
            scores = torch.stack([unit(q) @ unit(wanted[start + j]) / temperature for j in range(5)])
            loss = loss + 2 * temperature * (scores.exp().sum().log() - scores[i]) / 5
    loss.backward()
    ours = queries.float().requires_grad_()
    found = contrastive_loss(ours, wanted.float(), temperature)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_loss_and_gradient_are_lightlys():
    """Lightly's with a memory bank of this step's keys: the one form of it in which a query sees keys alone.

    A bank of all N keys holds the positive one once more, so each image is asked apart with the others in its bank.
    """
    queries, wanted = (x.float() for x in rows())
    theirs = queries.clone().requires_grad_()
    unit = F.normalize(wanted, dim=1)
    loss = 0
    for i in range(5):
        for q, keys in ((theirs[i], unit[5:]), (theirs[5 + i], unit[:5])):
            criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4, 7))
            criterion.memory_bank.bank = torch.cat([keys[:i], keys[i + 1 :]])
            loss = loss + 0.4 * criterion(q[None], keys[i][None]) / 5
    loss.backward()
    ours = queries.clone().requires_grad_()
    found = contrastive_loss(ours, wanted, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_closed_forms():
    same = torch.ones(8, 3)
    assert contrastive_loss(same, same, 0.5).item() == pytest.approx(4 * 0.5 * math.log(4), rel=1e-6)
    assert method(temperature=0.5).chance_loss(4) == pytest.approx(4 * 0.5 * math.log(4))
    apart = torch.eye(4).repeat(2, 1)  # four orthogonal images whose two views agree
    wanted = 4 * 0.5 * math.log(1 + 3 * math.exp(-1 / 0.5))
    assert contrastive_loss(apart, 7 * apart, 0.5).item() == pytest.approx(wanted, rel=1e-6)
    queries, keys = (x.float() for x in rows())
    loss = contrastive_loss(queries, keys, 0.2)
    swapped = contrastive_loss(queries.roll(5, 0), keys.roll(5, 0), 0.2)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = contrastive_loss(queries[torch.cat([order, 5 + order])], keys[torch.cat([order, 5 + order])], 0.2)
    assert swapped.item() == pytest.approx(loss.item()) == pytest.approx(shuffled.item())
    with pytest.raises(UserError, match="a step of one image"):
        contrastive_loss(same[:2], same[:2], 0.2)


def test_images_of_a_group_are_no_negatives_of_each_other():
    queries, keys = (x.float() for x in rows())
    group = torch.tensor([7, -1, 7, -1, 2])
    unit = lambda x: F.normalize(x, dim=1).numpy().astype(np.float64)
    losses = []
    for q, k in ((unit(queries[:5]), unit(keys[5:])), (unit(queries[5:]), unit(keys[:5]))):
        scores = q @ k.T / 0.2
        scores[0, 2] = scores[2, 0] = -np.inf
        losses.append((np.log(np.exp(scores).sum(axis=1)) - scores.diagonal()).mean())
    found = contrastive_loss(queries, keys, 0.2, group)
    assert found.item() == pytest.approx(0.4 * sum(losses), rel=1e-5)
    assert found < contrastive_loss(queries, keys, 0.2)
    (first, second), key = views(5)
    moco = method().eval()
    assert moco.loss([first, second], key._replace(group=group))["loss"] < moco.loss([first, second], key)["loss"]


@pytest.mark.parametrize("encoder", [RESNET, VIT], ids=["cnn", "vit"])
def test_a_step_is_algorithm_1(encoder):
    moco = method(encoder).eval()
    (first, second), key = views()
    online = lambda x: F.normalize(moco.predictor(moco.projector(moco.encoder(x))), dim=1)
    target = copy.deepcopy(torch.nn.Sequential(moco.encoder, moco.projector))
    keys = lambda x: F.normalize(target(x).detach(), dim=1)
    ctr = lambda q, k: 2 * 0.2 * F.cross_entropy(q @ k.T / 0.2, torch.arange(6))
    wanted = ctr(online(first), keys(second)) + ctr(online(second), keys(first))
    assert moco.loss([first, second], key)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_under_autocast_the_loss_is_that_of_float32():
    queries, keys = (x.float() for x in rows())
    with torch.autocast("cpu", torch.bfloat16):
        low = contrastive_loss(queries, keys, 0.05)
    assert low.dtype == torch.float32 and low == contrastive_loss(queries, keys, 0.05)


def test_the_momentum_network_follows_and_has_no_gradient():
    moco = method(momentum=0.9)
    wanted = [weight.clone() for weight in moco.target.parameters()]
    for step in (1, 2, 3):
        moco.loss(*views(seed=step))["loss"].backward()
        with torch.no_grad():
            for weight in moco.parameters():
                if weight.grad is not None:
                    weight.sub_(weight.grad, alpha=0.1)
        moco.after_step(step / 4)
        m = cosine_decay(0.9, step / 4)
        online = [*moco.encoder.parameters(), *moco.projector.parameters()]
        wanted = [m * old + (1 - m) * new for old, new in zip(wanted, online, strict=True)]
    for one, other in zip(moco.target.parameters(), wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad and one.grad is None
    again = method(momentum=0.9, seed=5)
    again.load_state_dict(moco.state_dict())
    batch = views(seed=9)
    assert torch.equal(again.eval().loss(*batch)["loss"], moco.eval().loss(*batch)["loss"])


def test_a_transformers_patch_projection_stays_as_it_was():
    """In training, in the momentum network, in the averaged encoder and in the folder; a CNN's first layer moves."""
    moco = method(VIT)
    before = {name: weight.clone() for name, weight in moco.encoder.model.named_parameters()}
    average = EMA(0.5)
    optimiser, _ = Optim(name="adamw", lr=0.1, weight_decay=0.5).build(
        moco, images_per_step=8, steps_per_epoch=10, total_steps=10
    )
    for step in range(2):
        loss = moco.loss(*views(seed=step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        moco.after_step(0.5)
        average.encoder(moco.encoder)
        average.move(moco.encoder, step, 10, torch.tensor(False))
    keys = dict(moco.target.modules_in_row[0].model.named_parameters())
    averaged = dict(average.encoder(moco.encoder).model.named_parameters())
    for name, weight in moco.encoder.model.named_parameters():
        stays = name.startswith("patch_embed.")
        assert torch.equal(weight, before[name]) == stays != weight.requires_grad, name
        if stays:
            assert torch.equal(keys[name], before[name]) and torch.equal(averaged[name], before[name])
    assert all(weight.requires_grad for weight in method(VIT, frozen_patches=False).encoder.parameters())
    assert all(weight.requires_grad for weight in method(RESNET).encoder.parameters())


def test_a_frozen_projection_is_exported_and_taken_from_init(tmp_path):
    """Given weights stay as given: also those of the patch projection, in the momentum network too."""
    given = method(VIT, seed=3)
    given.encoder.save(tmp_path / "encoder")
    moco = method(VIT)
    name = "patch_embed.proj.weight"
    pretrained = given.encoder.model.get_parameter(name)
    assert not torch.equal(moco.encoder.model.get_parameter(name), pretrained)
    assert initialise(moco.encoder, str(tmp_path / "encoder")) == 1.0
    moco.after_init()
    weight = moco.encoder.model.get_parameter(name)
    assert torch.equal(weight, pretrained) and not weight.requires_grad
    assert torch.equal(moco.target.modules_in_row[0].model.get_parameter(name), pretrained)
    loaded = Encoder.load(tmp_path / "encoder").model.get_parameter(name)
    assert torch.equal(loaded, pretrained) and loaded.requires_grad  # who loads it may train all of it


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"prediction": (32, 8)}, "equal last widths"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"momentum": 2.0}, "momentum 2"),
    ],
)
def test_odd_arguments_are_refused(arguments, told):
    with pytest.raises(UserError, match=told):
        MoCoV3(Encoder(*RESNET, SIZE), **{"projection": (32, 16), "prediction": (32, 16), **arguments})
