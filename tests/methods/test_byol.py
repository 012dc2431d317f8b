"""BYOL's loss against lightly's and the paper's equation, in value and gradient; its target network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.byol import BYOL, byol_loss
from ssl_kit.training.optim import cosine_decay

SIZE = (16, 16)


def method(**arguments):
    torch.manual_seed(0)
    return BYOL(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE), (32, 16), (32, 16), **arguments)


def views(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, *SIZE, generator=generator) for _ in range(2)], Key(0, 0, torch.arange(count))


def test_loss_and_gradient_are_lightlys():
    generator = torch.Generator().manual_seed(0)
    foretold, wanted = (torch.randn(10, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, theirs = foretold.float().requires_grad_(), foretold.clone().requires_grad_()
    byol_loss(ours, wanted.float()).backward()
    similarity = NegativeCosineSimilarity()
    # lightly's is minus the mean cosine of one direction; eq. 2 is 2 - 2 cos, for both
    loss = 4 + 2 * (similarity(theirs[:5], wanted[5:]) + similarity(theirs[5:], wanted[:5]))
    loss.backward()
    assert byol_loss(foretold.float(), wanted.float()).item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)


def test_loss_is_eq_2_of_a_training_step():
    """The squared distance of the unit vectors, written out, through the networks."""
    byol = method().eval()
    (first, second), key = views()
    online = lambda x: byol.predictor(byol.projector(byol.encoder(x)))
    target = copy.deepcopy(torch.nn.Sequential(byol.encoder, byol.projector))
    distance = lambda x, y: (F.normalize(online(x)) - F.normalize(target(y).detach())).square().sum(dim=1).mean()
    wanted = distance(first, second) + distance(second, first)
    assert byol.loss([first, second], key)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert byol_loss(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-6)
    assert byol_loss(torch.ones(4, 3), -torch.ones(4, 3)).item() == pytest.approx(8)


def test_target_is_the_average_of_the_steps_and_has_no_gradient():
    byol = method(tau=0.9)
    wanted = [weight.clone() for weight in byol.target.parameters()]
    for step in (1, 2, 3):
        byol.loss(*views(seed=step))["loss"].backward()
        with torch.no_grad():
            for weight in byol.parameters():
                if weight.grad is not None:
                    weight.sub_(weight.grad, alpha=0.1)
        byol.after_step(step / 4)
        online = [*byol.encoder.parameters(), *byol.projector.parameters()]
        tau = cosine_decay(0.9, step / 4)
        wanted = [tau * old + (1 - tau) * new for old, new in zip(wanted, online, strict=True)]
    assert cosine_decay(0.9, 0.5) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 2) + 1) / 2)
    for one, other in zip(byol.target.parameters(), wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad and one.grad is None
    byol.after_init()
    assert all(map(torch.equal, byol.target.parameters(), [*byol.encoder.parameters(), *byol.projector.parameters()]))


def test_odd_arguments_are_refused():
    with pytest.raises(UserError, match="equal last widths"):
        BYOL(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE), (32, 16), (32, 8))
    with pytest.raises(UserError, match="tau 2"):
        method(tau=2)
