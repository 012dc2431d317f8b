"""SIGReg and the prediction loss against NumPy, lightly's and closed forms, in value and gradient; the directions."""

import math

import numpy as np
import pytest
import torch
from lightly.loss import LeJEPALoss

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.lejepa import LeJEPA, directions_of, frequencies, prediction_loss, sigreg
from ssl_kit.views.recipe import ViewRecipe

SIZE = (16, 16)


def method(**arguments):
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, SIZE)
    return LeJEPA(encoder, **{"small_crops": 2, "projection": (16, 6), "directions": 10, **arguments})


def views(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = (SIZE, SIZE, (8, 8), (8, 8))
    return [torch.rand(count, 3, *size, generator=generator) for size in sizes], Key(3, 1, torch.arange(count))


def projections(images=9, width=4):
    """(4, images, width), shifted and stretched, so that no term of the statistic is small."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, images, width, generator=generator, dtype=torch.float64) * 1.5 + 0.4


def algorithm_1(z, directions):
    """The statistic and its gradient with complex numbers and all 17 knots, one crop and one direction after the other.

    d/dx_j of N int |phi_N - phi|^2 w dt is the integral of 2 Re(conj(phi_N - phi) i t exp(i t x_j)) w dt.
    """
    t = np.linspace(-5, 5, 17)
    phi = weight = np.exp(-0.5 * t**2)
    value, gradient = 0.0, np.zeros_like(z)
    for crop, rows in enumerate(z):
        for a in directions.T:
            waves = np.exp(1j * np.outer(rows @ a, t))  # (N, T)
            difference = waves.mean(axis=0) - phi
            value += len(rows) * np.trapezoid(np.abs(difference) ** 2 * weight, t)
            slope = np.trapezoid(2 * (difference.conj() * 1j * t * waves).real * weight, t, axis=1)
            gradient[crop] += np.outer(slope, a)
    terms = len(z) * directions.shape[1]
    return value / terms, gradient / terms


def test_sigreg_and_its_gradient_are_algorithm_1():
    z, directions = projections(), directions_of(Key(0, 0, torch.arange(9)), 4, 7)
    value, gradient = algorithm_1(z.numpy(), directions.double().numpy())
    ours = z.float().requires_grad_()
    loss = sigreg(ours, directions)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(ours.grad.numpy(), gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("trade_off", [0.05, 0.7])
def test_loss_and_gradient_are_lightlys(trade_off):
    """Its knots cover half of the axis: 9 of them to 5 are the 17 from -5 to 5."""
    lightlys = LeJEPALoss(trade_off, sigreg_knots=9, sigreg_t_max=5.0)
    directions = directions_of(Key(0, 0, torch.arange(9)), 4, 7)
    lightlys.sigreg._generate_unit_vectors = lambda device, dtype, num_features: directions
    ours, theirs = (projections().float().requires_grad_() for _ in range(2))
    wanted = lightlys(global_proj=theirs[:2], local_proj=theirs[2:])
    wanted.backward()
    loss = (1 - trade_off) * prediction_loss(ours) + trade_off * sigreg(ours, directions)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_a_step_is_algorithm_2():
    """Through the networks: crops of two sizes, the directions of the step's key."""
    jepa = method(trade_off=0.3).eval()
    crops, key = views()
    z = np.stack([jepa.projector(jepa.encoder(crop)).detach().double().numpy() for crop in crops])
    prediction = np.square(z[:2].mean(axis=0) - z).mean()
    gaussian, _ = algorithm_1(z, directions_of(key, 6, 10).double().numpy())
    told = jepa.loss(crops, key)
    assert told["prediction"].item() == pytest.approx(prediction, rel=1e-5)
    assert told["sigreg"].item() == pytest.approx(gaussian, rel=1e-5)
    assert told["loss"].item() == pytest.approx(0.7 * prediction + 0.3 * gaussian, rel=1e-5)
    assert [name for name, term in told.items() if term.requires_grad] == ["loss"]


def closed_form(x):
    """Epps & Pulley's integral of numbers x (N,) over the whole axis: sums of Gaussians, no quadrature."""
    pairs = np.exp(-((x[:, None] - x) ** 2) / 2).mean() * math.sqrt(2 * math.pi)
    return len(x) * (pairs - 2 * math.sqrt(math.pi) * np.exp(-(x**2) / 4).mean() + math.sqrt(2 * math.pi / 3))


def test_closed_forms():
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(1, 1)
    for scale in (0.5, 1.0):  # wider numbers turn faster than 17 knots can follow
        x = torch.randn(1, 200, 1, generator=generator) * scale
        assert sigreg(x, one).item() == pytest.approx(closed_form(x.double().numpy().ravel()), rel=1e-4)
    collapsed = math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3)
    assert sigreg(torch.zeros(2, 8, 3), torch.eye(3)).item() == pytest.approx(8 * collapsed, rel=1e-4)
    assert method(trade_off=0.3).chance_loss(8) == pytest.approx(0.3 * 8 * collapsed, rel=1e-4)
    same = torch.randn(9, 4, generator=generator).expand(3, 9, 4)
    assert prediction_loss(same) == 0
    assert prediction_loss(torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1)).item() == pytest.approx((1 + 1 + 9) / 3)


def test_isotropic_gaussians_have_the_expected_statistic_and_others_more():
    """Of a sample of N(0, I) the mean is the integral of (1 - phi^2) w, whatever N is: the factor N does that."""
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    generator = torch.Generator().manual_seed(0)
    directions = directions_of(Key(0, 0, torch.arange(1)), 8, 64)
    for images in (50, 400):
        samples = torch.randn(200, images, 8, generator=generator)
        assert sigreg(samples, directions).item() == pytest.approx(expected, rel=0.05)
    gaussian = samples[:1]
    for other in (gaussian * 1.5, gaussian * 0.5, gaussian + 0.5, gaussian[..., :1].expand(1, 400, 8)):
        assert sigreg(other, directions) > 4 * expected


def test_directions_are_unit_vectors_on_the_whole_sphere():
    drawn = directions_of(Key(0, 0, torch.arange(4)), 6, 20_001)
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(20_001))
    torch.testing.assert_close(drawn @ drawn.T / 20_001, torch.eye(6) / 6, rtol=0, atol=0.01)
    assert drawn.mean(dim=1).abs().max() < 0.015
    fourth = drawn.pow(4).mean()  # 3 / (K (K + 2)) on the sphere
    assert fourth.item() == pytest.approx(3 / 48, rel=0.01)


def test_frequencies_are_the_trapezoid_rule_from_minus_5_to_5():
    """The ends and t = 0 hardly count in the statistic; here they do."""
    t, weight = frequencies()
    knots = np.linspace(-5, 5, 17)
    for even in (np.ones_like, np.square, lambda x: np.exp(x**2 / 2)):
        wanted = np.trapezoid(even(knots) * np.exp(-(knots**2) / 2), knots)
        assert (even(t.double().numpy()) * weight.numpy()).sum() == pytest.approx(wanted, rel=1e-5)


def test_directions_are_those_of_the_step():
    """They hang on its images, not on torch's generator or their order; each step and epoch has its own."""
    key = Key(0, 0, torch.tensor([5, 9, 2]))
    torch.manual_seed(1)
    drawn = directions_of(key, 6, 10)
    torch.manual_seed(2)
    assert torch.equal(drawn, directions_of(key, 6, 10))
    assert torch.equal(drawn, directions_of(key._replace(index=key.index.flip(0)), 6, 10))
    for other in (key._replace(seed=1), key._replace(epoch=1), key._replace(index=torch.tensor([5, 9, 3]))):
        assert not torch.equal(drawn, directions_of(other, 6, 10))


def test_under_autocast_the_loss_is_that_of_float32():
    z, directions = projections().float(), directions_of(Key(0, 0, torch.arange(9)), 4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        low = prediction_loss(z), sigreg(z, directions)
        half = prediction_loss(z.bfloat16()), sigreg(z.bfloat16(), directions)
    assert low == (prediction_loss(z), sigreg(z, directions))
    assert all(term.dtype == torch.float32 for term in (*low, *half))


def test_crops_are_those_of_its_preset_and_encoders_of_one_size_are_refused():
    jepa = method(small_crops=3)
    built = ViewRecipe(preset=jepa.preset, local_size=8).build(SIZE, 3, jepa.num_views)
    assert [view.size for view in built] == [SIZE, SIZE, (8, 8), (8, 8), (8, 8)]
    vit = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    with pytest.raises(UserError, match=r"takes one size only.*dynamic_img_size"):
        LeJEPA(Encoder("vit_tiny_patch16_224", vit, SIZE))
    LeJEPA(Encoder("vit_tiny_patch16_224", {**vit, "dynamic_img_size": True}, SIZE))
    for wrong in ({"small_crops": 9}, {"projection": ()}, {"trade_off": 1.5}, {"directions": 0}):
        with pytest.raises(UserError, match="wanted"):
            method(**wrong)
