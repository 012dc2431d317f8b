"""The VAE against closed forms, Monte Carlo, a model whose likelihood is known exactly, and sums to 1."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.likelihoods import (
    bernoulli_log_likelihood,
    constant_code_loss,
    gaussian_log_likelihood,
    logistic_log_likelihood,
)
from ssl_kit.methods.vae import VAE, explained_variance, kl_to_prior, normal, with_free_bits
from ssl_kit.training.distributed import leave, share_weight

SIZE = (8, 8)


def key(count, seed=0, epoch=0, first=0):
    return Key(seed, epoch, torch.arange(first, first + count))


def vae(size=SIZE, **arguments):
    torch.manual_seed(0)
    return VAE(Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, size), **{"decoder_width": 8, **arguments})


def levels(count, size=SIZE, seed=0):
    """Images of 256 levels, (count, 3, *size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator) / 255


# KL, free bits, noise


@pytest.mark.parametrize(
    ("mu", "variance", "value"), [(1, 1, 0.5), (0, 2, 0.1534264), (0.5, 0.25, 0.4431472), (0, 1, 0)]
)
def test_kl_has_a_closed_form(mu, variance, value):
    kl = kl_to_prior(torch.tensor([[float(mu)]]).double(), torch.tensor([[variance]]).double().log())
    assert kl.item() == pytest.approx(value, abs=1e-7)


def test_kl_agrees_with_monte_carlo_and_is_zero_at_the_prior_only():
    mu, logvar = torch.tensor([[0.7, -1.2, 0.1]]).double(), torch.tensor([[0.4, -1.5, 0.0]]).double()
    z = mu + (0.5 * logvar).exp() * torch.randn(1_000_000, 3, generator=torch.Generator().manual_seed(0)).double()
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    drawn = q.log_prob(z) - torch.distributions.Normal(0.0, 1.0).log_prob(z)
    error = drawn.std(dim=0) / 1_000
    assert ((drawn.mean(dim=0) - kl_to_prior(mu, logvar)[0]).abs() < 4 * error).all()
    assert (kl_to_prior(mu, logvar) > 0).all()
    assert torch.equal(kl_to_prior(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2, 3))


KL_NATS = [[0.0, 3.0, 0.1], [1.6, 0.1, 0.2], [0.1, 0.2, 0.6]]  # means 0.57, 1.1 and 0.3; a part's would not do


def test_free_bits_are_the_batch_mean_per_dimension_and_stop_the_gradient():
    kl = torch.tensor(KL_NATS, requires_grad=True)
    loss = with_free_bits(kl, 0.5)
    assert loss.item() == pytest.approx(1.7 / 3 + 1.1 + 0.5)
    loss.backward()
    torch.testing.assert_close(kl.grad, torch.tensor([1 / 3, 1 / 3, 0]).expand(3, 3))
    assert with_free_bits(kl, 0.0).item() == pytest.approx(kl.sum(dim=1).mean().item())


def _free_bits_of_a_rank(rank, world, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    kl = torch.tensor(KL_NATS)
    own = slice(0, 2) if rank == 0 else slice(2, 3)
    part = kl[own].requires_grad_()
    loss = with_free_bits(part, 0.5) * share_weight(len(part))
    loss.backward()
    gradient, total = torch.zeros_like(kl), loss.detach() / world
    gradient[own] = part.grad / world  # what averaging parameter gradients makes of it
    torch.distributed.all_reduce(gradient)
    torch.distributed.all_reduce(total)
    if rank == 0:
        queue.put((total.item(), gradient.tolist()))
    torch.distributed.barrier()
    leave()


def test_free_bits_of_two_processes_equal_one(free_port):
    whole = torch.tensor(KL_NATS, requires_grad=True)
    wanted = with_free_bits(whole, 0.5)
    wanted.backward()
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_free_bits_of_a_rank, args=(2, free_port, queue), nprocs=2)
    loss, gradient = queue.get()
    assert loss == pytest.approx(wanted.item())
    torch.testing.assert_close(torch.tensor(gradient), whole.grad)


def test_noise_is_standard_normal():
    noise = normal(key(5_000), 1010, 41).double()
    assert noise.shape == (5_000, 41)
    ordered = noise.flatten().sort().values
    wanted = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    distance = (torch.distributions.Normal(0.0, 1.0).cdf(ordered) - wanted).abs().max()
    assert distance < 1.63 / math.sqrt(len(ordered))  # Kolmogorov-Smirnov, p = 0.01
    correlation = torch.corrcoef(noise.T) - torch.eye(41)  # the two halves of a pair too
    assert correlation.abs().max() < 5 / math.sqrt(5_000)


def test_noise_belongs_to_the_image_and_the_epoch_not_to_the_batch():
    whole, order = normal(key(8), 1010, 6), torch.tensor([5, 1, 7])
    assert torch.equal(normal(Key(0, 0, order), 1010, 6), whole[order])
    assert not torch.equal(normal(key(8, epoch=1), 1010, 6), whole)
    assert not torch.equal(normal(key(8), 1012, 6), whole)


# likelihoods


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("location", [-0.4, 0.0, 0.3, 1.0])
def test_the_256_levels_of_the_logistic_sum_to_one(location, scale):
    x = (torch.arange(256).double() / 255).view(256, 1, 1, 1)
    log_p = logistic_log_likelihood(x, torch.tensor(location).double(), torch.tensor(scale).double().log())
    assert torch.isfinite(log_p).all() and log_p.max() <= 1e-12
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_logistic_is_the_difference_of_its_distribution_function():
    x, location, scale = torch.tensor([0, 1, 128, 254, 255]).double() / 255, 0.45, 0.06
    edges = torch.stack([x - 0.5 / 255, x + 0.5 / 255])
    edges[0, 0], edges[1, -1] = -math.inf, math.inf
    below, above = torch.sigmoid((edges - location) / scale)
    log_p = logistic_log_likelihood(
        x.view(5, 1, 1, 1), torch.tensor(location, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64).log()
    )
    torch.testing.assert_close(log_p, (above - below).log(), rtol=1e-9, atol=1e-9)


def test_the_logistic_keeps_a_gradient_far_from_the_pixel():
    location = torch.full((1, 1, 1, 1), 0.9, requires_grad=True)
    logistic_log_likelihood(torch.zeros(1, 1, 1, 1), location, torch.tensor(1e-3).log()).sum().backward()
    logistic_log_likelihood(torch.full((1, 1, 1, 1), 0.2), location, torch.tensor(1e-3).log()).sum().backward()
    assert location.grad.item() == pytest.approx(-2 / 1e-3, rel=1e-3)  # -1/s in the tail, at either kind of level


def test_gaussian_and_bernoulli_equal_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    x, location = torch.rand(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    normal_p = torch.distributions.Normal(location, 0.2).log_prob(x).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_likelihood(x, location, torch.tensor(0.2).double().log()), normal_p)
    binary = (x > 0.5).double()
    bernoulli_p = torch.distributions.Bernoulli(logits=location).log_prob(binary).sum(dim=(1, 2, 3))
    torch.testing.assert_close(bernoulli_log_likelihood(binary, location), bernoulli_p)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    location, level = torch.rand(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    level = (level * 255).round() / 255
    level[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    inputs = location.requires_grad_(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda at, scale: gaussian_log_likelihood(level, at, scale), inputs)
    assert check(lambda at, scale: logistic_log_likelihood(level, at, scale), inputs)
    assert check(lambda at: bernoulli_log_likelihood(level.round(), at), inputs[:1])
    mu, logvar = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    for free_bits in (0.0, 0.5):
        kl = lambda *both: with_free_bits(kl_to_prior(*both), free_bits)
        assert check(kl, (mu.requires_grad_(), logvar.requires_grad_()))


def test_the_loss_of_a_constant_code():
    constant = torch.tensor([0.2, 0.6]).view(2, 1, 1, 1).expand(2, 3, 4, 4)  # spread 0.2 around 0.4 everywhere
    assert constant_code_loss(constant, "gaussian").item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.04))
    binary = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert constant_code_loss(binary, "bernoulli").item() == pytest.approx(entropy)
    # levels drawn from a logistic: the entropy of that logistic, ln s + 2 nats, in bins of 1/255
    uniform = torch.rand(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    drawn = ((0.5 + 0.03 * torch.logit(uniform)).clamp(0, 1) * 255).round() / 255
    assert constant_code_loss(drawn, "logistic").item() == pytest.approx(math.log(0.03) + 2 + math.log(255), abs=0.02)


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])
def test_a_model_without_a_code_sits_at_chance(likelihood):
    images = (0.5 + 0.1 * torch.randn(512, 3, *SIZE, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    images = (images * 255).round() / 255
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [8] * 4}, SIZE, mean=(0.5,), std=(0.1,))
    method = VAE(encoder, likelihood=likelihood, decoder_width=8)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
        out = method.loss([images], key(512))
    chance = constant_code_loss(images, likelihood).item()
    assert out["loss"].item() == pytest.approx(chance, abs=0.02 if likelihood == "logistic" else 2e-3)
    assert out["explained_variance"].item() == pytest.approx(0, abs=0.01)
    assert out["kl"].item() == pytest.approx(0, abs=1e-3) and out["active_units"].item() == 0


# the whole: pieces, beta, annealing, nested codes, refusals


def test_the_loss_is_made_of_its_pieces():
    images = levels(16)
    out = vae(likelihood="logistic", beta=3.0).loss([images], key(16))
    numbers = 3 * 64
    assert out["loss"].item() == pytest.approx((out["reconstruction"] + 3 * out["kl"]).item() / numbers, rel=1e-5)
    nats = (out["reconstruction"] + out["kl"]).item()
    assert out["bits_per_dim"].item() == pytest.approx(nats / (numbers * math.log(2)), rel=1e-5)
    plain = vae(likelihood="gaussian").loss([images], key(16))  # beta is 1: the VAE
    assert plain["loss"].item() == pytest.approx((plain["reconstruction"] + plain["kl"]).item() / numbers, rel=1e-5)
    assert "bits_per_dim" not in plain, "a density has no bits per dimension"
    assert all(not value.requires_grad for name, value in out.items() if name != "loss")


def test_explained_variance_is_counted_around_the_mean_image():
    mean = torch.linspace(0, 1, 192).view(1, 3, *SIZE)  # varies over the image: to know it explains nothing
    target = mean + 0.1 * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert explained_variance(target, mean).item() == pytest.approx(0, abs=1e-5)
    assert explained_variance(target, target).item() == 1
    assert explained_variance(target, (target + mean) / 2).item() == pytest.approx(0.75, abs=1e-5)


def test_active_units_are_those_whose_mean_varies_over_images():
    method = vae(dim=4)
    with torch.no_grad():
        method.encoder.model.fc.weight[:3] = 0
        method.encoder.model.fc.weight[3] = 100
    assert method.loss([levels(16)], key(16))["active_units"].item() == 0.25


def test_the_weight_of_the_kl_rises_over_the_epochs():
    method = vae(beta=2.0, anneal_epochs=3.0)
    assert method.kl_weight.item() == 2, "without a trainer it is evaluation"
    for step, wanted in [(0, 0.0), (10, 2 / 3), (15, 1.0), (30, 2.0), (90, 2.0)]:
        data = SimpleNamespace(steps_per_epoch=20)
        method.trainer = SimpleNamespace(global_step=step, accumulate_grad_batches=2, datamodule=data)
        method.on_train_batch_start({}, 0)
        assert method.kl_weight.item() == pytest.approx(wanted)
        out = method.loss([levels(8)], key(8))
        loss = (out["reconstruction"] + wanted * out["kl"]).item() / 192
        assert out["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert "kl_weight" not in method.state_dict(), "a resumed run computes it from its step"
    method.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, datamodule=data)
    method.on_train_batch_start({}, 0)
    method.on_train_end()
    assert method.kl_weight.item() == 2


def test_nested_codes_are_cut_per_image_and_pay_for_the_whole():
    method = vae(dims=(16, 4))
    assert method.encoder.dim == 16 and method.dims == (4, 16)
    z = torch.ones(4_000, 16)
    cut = method._cut(z, key(4_000))
    lengths = cut.sum(dim=1)
    assert set(lengths.tolist()) == {4, 16}
    assert (lengths == 4).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4_000))
    assert torch.equal(cut, (torch.arange(16) < lengths[:, None]).float())
    assert torch.equal(method._cut(z[:3], Key(0, 0, torch.tensor([7, 2, 9]))), cut[torch.tensor([7, 2, 9])])
    kl = kl_to_prior(*method.eval().posterior(levels(8))).sum(dim=1).mean()
    assert method.loss([levels(8)], key(8))["kl"].item() == pytest.approx(kl.item(), rel=1e-5)


def test_the_exported_code_is_mu(tmp_path):
    import timm

    method = vae(dim=5).eval()
    images = levels(4)
    mu, _ = method.posterior(images)
    assert mu.shape == (4, 5) and torch.equal(method.embed(images), mu)
    method.encoder.save(tmp_path / "encoder")
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    torch.testing.assert_close(model(method.encoder.normalise(images)), mu)


def test_augmented_takes_the_first_view_in_and_explains_the_second():
    method = vae(augmented=True, beta=0.0).eval()
    assert method.num_views == 2 and method.preset == "aavae" and vae().preset == "vae"
    view, target = levels(4), levels(4, seed=1)
    mu, logvar = method.posterior(view)
    z = mu + (0.5 * logvar).exp() * normal(key(4), 1010, 64)
    wanted = -gaussian_log_likelihood(target, method.decode(z), method.log_scale()).mean()
    out = method.loss([view, target], key(4))
    assert out["reconstruction"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx(wanted.item() / 192, rel=1e-5), "beta 0: no KL"


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (13, 22), (3, 3), (37, 20)])
def test_the_decoder_makes_images_of_any_size(size):
    method = vae(size=size, dim=3)
    assert method.decode(torch.randn(2, 3)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "message"),
    [
        ("bernoulli", 1.0, 0.5, r"bernoulli: got pixels such as 0\.5000 .* binarise"),
        ("logistic", 128 / 255, 0.5, r"logistic: got pixels such as 0\.5000 .* multiples of 1/255"),
    ],
)
def test_a_likelihood_refuses_pixels_it_is_not_for_at_the_first_step_only(likelihood, good, bad, message):
    fine, wrong = torch.full((2, 3, *SIZE), good), torch.full((2, 3, *SIZE), bad)
    with pytest.raises(UserError, match=message):
        vae(likelihood=likelihood).loss([wrong], key(2))
    method = vae(likelihood=likelihood)
    assert torch.isfinite(method.loss([fine], key(2))["loss"])
    method.loss([wrong], key(2))  # later steps do not wait for the device
    vae(likelihood="gaussian").loss([wrong], key(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim 0"),
        ({"dims": (4, 4)}, r"dims \(4, 4\)"),
        ({"dims": ()}, r"dims \(\)"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"free_bits": -0.1}, "free_bits -0.1"),
        ({"anneal_epochs": -1.0}, "anneal_epochs -1.0"),
        ({"decoder_width": 12}, "decoder_width 12"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        vae(**arguments)


def test_views_of_another_size_than_the_decoder_makes_are_refused():
    with pytest.raises(UserError, match=r"8 x 8 pixels, the views have 16 x 16; leave --grow out"):
        vae().loss([levels(2, (16, 16))], key(2))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "logistic"])
def test_every_likelihood_trains_every_parameter(likelihood):
    method = vae(likelihood=likelihood, dims=(4, 8), free_bits=0.01)
    images = levels(8) if likelihood != "bernoulli" else levels(8).round()
    method.loss([images], key(8))["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    out = method.eval().importance_weighted_nll([images], key(8), samples=3)
    assert out.shape == (8,) and torch.isfinite(out).all()


def test_pictures_show_what_they_say():
    method = vae(augmented=True, dims=(4, 8)).eval()
    with torch.no_grad():
        method.encoder.model.fc.weight.mul_(20)
        method.encoder.model.fc.weight[3] = 0  # a dimension that says nothing
        method.encoder.model.fc.bias[3] = 0
        views = [levels(5), levels(5, seed=1)]
        made = method.pictures(views, key(5))
        mu, _ = method.posterior(views[0])
    shown = made["reconstructions"]
    assert shown.columns == ("input", "target", "from 4", "from 8")
    assert torch.equal(shown.grid[:, 0], views[0]) and torch.equal(shown.grid[:, 1], views[1])
    torch.testing.assert_close(shown.grid[:, 3], method.decode(mu).clamp(0, 1))
    short = mu * (torch.arange(8) < 4)
    torch.testing.assert_close(shown.grid[:, 2], method.decode(short).clamp(0, 1))
    assert made["samples"].grid.shape[:2] == (8, 8)
    between = made["interpolations"].grid  # two pairs of the five images
    assert between.shape[:2] == (2, 9) and torch.equal(between[1, 0], views[0][2])
    torch.testing.assert_close(between[1, 1], method.decode(mu[2:3])[0].clamp(0, 1))
    torch.testing.assert_close(between[1, 7], method.decode(mu[3:4])[0].clamp(0, 1))
    assert made["traversals"].grid.shape[:2] == (7, 7), "seven of eight dimensions are active"
    assert "samples" not in vae(beta=0.0).eval().pictures([levels(2)], key(2)), "nothing ties codes to the prior"
    assert "traversals" not in _silent().pictures([levels(2)], key(2))


def _silent():
    method = vae().eval()
    with torch.no_grad():
        method.encoder.model.fc.weight.zero_()
        method.encoder.model.fc.bias.zero_()
    return method


# a linear-Gaussian VAE (probabilistic PCA, Tipping & Bishop 1999): log p(x) is known


class LinearEncoder(nn.Module):
    """mu = (x - b) A; stands for the encoder of a VAE."""

    def __init__(self, matrix, offset):
        super().__init__()
        self.matrix, self.offset, self.dim, self.image_size = matrix, offset, matrix.shape[1], (2, 3)

    def pooled(self, images):
        return images.flatten(1)

    def code(self, pooled):
        return (pooled - self.offset) @ self.matrix


@pytest.fixture
def linear():
    """A VAE with p(x|z) = N(W z + b, s^2 I), W with orthogonal columns, and q(z|x) = p(z|x); images; log p of them."""
    generator = torch.Generator().manual_seed(1)
    pixels, dim, s = 6, 2, 0.3
    basis = torch.linalg.qr(torch.randn(pixels, dim, generator=generator).double())[0]
    weight, offset = basis * torch.tensor([0.8, 0.4]).double(), torch.rand(pixels, generator=generator).double()
    precision = torch.diag(weight.T @ weight) / s**2 + 1  # of p(z|x), diagonal
    method = vae(size=(2, 3), dim=dim)
    method.encoder = LinearEncoder(weight / s**2 / precision, offset)
    method.decode = lambda z: (z.double() @ weight.T + offset).view(-1, 1, 2, 3)
    method.log_scale = lambda: torch.tensor(s).double().log()
    method.logvar = nn.Linear(pixels, dim)
    with torch.no_grad():
        method.logvar.weight.zero_()
        method.logvar.bias.copy_(-precision.log())
    draws = torch.randn(7, dim + pixels, generator=generator).double()
    x = draws[:, :dim] @ weight.T + offset + s * draws[:, dim:]
    marginal = torch.distributions.MultivariateNormal(offset, weight @ weight.T + s**2 * torch.eye(pixels).double())
    images, exact = x.view(-1, 1, 2, 3), marginal.log_prob(x)
    method._target = lambda views: views[-1]  # float64
    method.logvar.double()
    return method, images, exact


def elbo(method, images, draws=4_000):
    """(B,) -(reconstruction + kl) of each image, averaged over keys."""
    total = torch.zeros(len(images), dtype=torch.float64)
    with torch.no_grad():
        for position in range(len(images)):
            out = method.loss([images[position].expand(draws, -1, -1, -1)], key(draws, first=position * draws))
            total[position] = -(out["reconstruction"] + out["kl"])
    return total


def test_with_the_true_posterior_elbo_and_every_bound_are_log_p(linear):
    method, images, exact = linear
    for samples in (1, 2, 7):  # the weights are constant: no variance
        bound = -method.importance_weighted_nll([images], key(7), samples=samples)
        torch.testing.assert_close(bound, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(elbo(method, images), exact, atol=0.15, rtol=0)


def test_with_a_wrong_posterior_the_bounds_are_ordered_and_close_in_on_log_p(linear):
    method, images, exact = linear
    with torch.no_grad():
        method.encoder.matrix.mul_(0.9)
        method.logvar.bias.add_(0.5)  # too wide, so that the weights have finite variance
    means = [
        torch.stack([-method.importance_weighted_nll([images], key(7, seed), samples=k) for seed in range(runs)])
        .mean()
        .item()
        for k, runs in [(1, 400), (4, 200), (32, 60)]
    ]
    gap = elbo(method, images).mean().item()
    assert gap == pytest.approx(means[0], abs=0.05), "k = 1 is the ELBO"
    assert gap < exact.mean().item() - 0.05
    assert means[0] < means[1] < means[2] < exact.mean().item()
    bound = -method.importance_weighted_nll([images], key(7), samples=5_000)
    torch.testing.assert_close(bound, exact, atol=1e-2, rtol=0)


def test_the_bound_does_not_depend_on_how_it_is_blocked(linear):
    method, images, _ = linear
    with torch.no_grad():
        method.logvar.bias.add_(0.5)
    whole = method.importance_weighted_nll([images], key(7), samples=6, rows=1_000)
    for rows in (1, 4, 6, 13):
        torch.testing.assert_close(method.importance_weighted_nll([images], key(7), samples=6, rows=rows), whole)
