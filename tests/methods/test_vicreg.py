"""VICReg's terms against lightly's, NumPy's covariance and closed forms, in value and gradient."""

import numpy as np
import pytest
import torch
from lightly.loss import VICRegLoss

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.vicreg import VICReg, vicreg_terms

SIZE = (16, 16)


def method(**arguments):
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE)
    return VICReg(encoder, **{"expander": (32, 24), **arguments})


def views(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, *SIZE, generator=generator) for _ in range(2)], Key(0, 0, torch.arange(count))


def rows(count=12, width=5, scale=0.35):
    """Of two views, correlated outputs; some vary by more than 1, some by less."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) * scale
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix for _ in range(2)]


def total(first, second, weights=(25.0, 25.0, 1.0)):
    return sum(weight * term for weight, term in zip(weights, vicreg_terms(first, second), strict=True))


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (3.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 4.0)])
def test_loss_and_gradient_are_lightlys(weights):
    ours, theirs = ([z.clone().requires_grad_() for z in rows()] for _ in range(2))
    wanted = VICRegLoss(*weights)(*theirs)
    wanted.backward()
    ours = [z.detach().float().requires_grad_() for z in ours]
    loss = total(*ours, weights)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_terms_are_the_papers_in_numpy():
    first, second = (z.numpy() for z in rows())
    invariance, variance, covariance = (term.item() for term in vicreg_terms(*map(torch.from_numpy, (first, second))))
    assert invariance == pytest.approx(np.square(first - second).mean(), rel=1e-5)
    hinges = [np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean() for z in (first, second)]
    assert variance == pytest.approx(np.mean(hinges), rel=1e-5)
    wide = np.concatenate([z.std(axis=0) for z in (first, second)]) > 1
    assert wide.any() and not wide.all(), "both sides of the hinge"
    apart = 0
    for z in (first, second):
        c = np.cov(z.T)
        apart += sum(c[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    assert covariance == pytest.approx(apart, rel=1e-5)


def test_a_step_is_eq_6_of_its_terms():
    vicreg = method(weights=(3.0, 2.0, 5.0)).eval()
    (first, second), key = views()
    z = [vicreg.expander(vicreg.encoder(view)).double() for view in (first, second)]
    told = vicreg.loss([first, second], key)
    assert told["loss"].item() == pytest.approx(VICRegLoss(3.0, 2.0, 5.0)(*z).item(), rel=1e-5)
    assert told.keys() == {"loss", "invariance", "variance", "covariance"}
    sum_of_terms = 3 * told["invariance"] + 2 * told["variance"] + 5 * told["covariance"]
    assert sum_of_terms.item() == pytest.approx(told["loss"].item())
    assert [name for name, term in told.items() if term.requires_grad] == ["loss"]


def test_closed_forms():
    same = torch.full((8, 3), 2.5)
    assert [term.item() for term in vicreg_terms(same, same)] == pytest.approx([0, 1 - 1e-2, 0], rel=1e-5)
    assert method().chance_loss(8) == pytest.approx(25 * 0.99)
    # four outputs of +-1 over 16 images, every combination once: uncorrelated, and wide enough
    cube = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    assert [term.item() for term in vicreg_terms(cube, cube)] == pytest.approx([0, 0, 0], abs=1e-6)
    # one output twice: a variance of 16/15 off the diagonal, in both places and both views, over d = 2
    twice = cube[:, :1].repeat(1, 2)
    assert vicreg_terms(twice, twice)[2].item() == pytest.approx(2 * 2 * (16 / 15) ** 2 / 2)
    # half as wide: a deviation of sqrt(4/15 + 1e-4)
    hinge = 1 - (4 / 15 + 1e-4) ** 0.5
    assert vicreg_terms(cube / 2, cube / 2)[1].item() == pytest.approx(hinge, rel=1e-5)
    assert vicreg_terms(cube, cube + 3)[0].item() == pytest.approx(9)
    gaussian = torch.randn(50_000, 8, generator=torch.Generator().manual_seed(0)) * 1.1  # isotropic, wider than gamma
    invariance, variance, covariance = vicreg_terms(gaussian, gaussian)
    assert invariance == 0 and variance == 0 and covariance < 1e-2


def test_a_collapsed_network_gets_a_finite_gradient():
    """The root of the variance has no slope at 0; epsilon is there for that."""
    z = torch.zeros(6, 4, requires_grad=True)
    total(z, z).backward()
    assert torch.isfinite(z.grad).all()


def test_under_autocast_the_loss_is_that_of_float32():
    first, second = (z.float() for z in rows())
    with torch.autocast("cpu", torch.bfloat16):
        low = vicreg_terms(first, second)
        half = vicreg_terms(first.bfloat16(), second.bfloat16())
    assert all(map(torch.equal, low, vicreg_terms(first, second)))
    assert all(term.dtype == torch.float32 for term in (*low, *half))


@pytest.mark.parametrize(
    ("arguments", "told"), [({"expander": ()}, "expander"), ({"weights": (0.0, 0.0, 0.0)}, "not all 0")]
)
def test_odd_arguments_are_refused(arguments, told):
    with pytest.raises(UserError, match=told):
        method(**arguments)
    with pytest.raises(UserError, match="a step of one image"):
        vicreg_terms(torch.ones(1, 3), torch.ones(1, 3))
