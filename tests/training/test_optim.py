"""Units, groups and schedules of Optim; LARS against a step computed by hand; the moving average (EMA)."""

import math
from dataclasses import replace

import pytest
import timm.optim
import torch
from tiny_runs import Tiny, train
from torch import nn

from ssl_kit.core.errors import UserError
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import EMA, LARS, Optim, Schedule, cosine_decay, parameter_groups


def test_the_rate_is_for_a_stated_number_of_images():
    assert Optim(lr=0.5, lr_per=256).peak_lr(1024) == 2.0
    assert Optim(lr=1e-3, lr_per=None).peak_lr(1024) == 1e-3


def test_norms_and_biases_are_not_decayed():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, free = parameter_groups(network.named_parameters(), 0.1)
    assert [parameter.ndim for parameter in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert {parameter.ndim for parameter in free["params"]} == {1} and free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(list(network.parameters()))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_schedule_reaches_its_five_points(name):
    network = nn.Linear(2, 2)
    record = Optim(name=name, lr=0.4, lr_per=None, warmup_epochs=1, final_lr=0.1)
    optimiser, schedule = record.build(network, images_per_step=8, steps_per_epoch=10, total_steps=110)
    rates = []
    for _ in range(110):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    half = 0.1 + 0.9 * 0.5
    quarter = 0.9 * 0.5 * math.sqrt(0.5)
    wanted = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: half + quarter, 60: half, 85: half - quarter}
    assert {step: rates[step] / 0.4 for step in wanted} == pytest.approx(wanted)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize("step", range(20))
def test_schedule_resumes_at_every_step(step):
    def fresh():
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimiser, Schedule(optimiser, warmup_steps=5, total_steps=20)

    optimiser, schedule = fresh()
    schedule.total_steps = 16  # a run by minutes has learnt its horizon on the way; the new one has not
    for _ in range(step):
        optimiser.step()
        schedule.step()
    resumed_optimiser, resumed = fresh()
    resumed_optimiser.load_state_dict(optimiser.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(step, 20):
        for one, other in [(optimiser, schedule), (resumed_optimiser, resumed)]:
            one.step()
            other.step()
        assert resumed_optimiser.param_groups[0]["lr"] == optimiser.param_groups[0]["lr"]


def lars_step(weight, gradient, weight_decay):
    parameter = nn.Parameter(torch.tensor([weight]))  # (1, 2)
    parameter.grad = torch.tensor([gradient])
    groups = [{"params": [parameter], "weight_decay": weight_decay}]
    LARS(groups, lr=1.0, momentum=0.0, trust=0.001).step()
    return parameter.tolist()[0]


def test_lars_step_by_hand():
    assert lars_step([3.0, 4.0], [0.6, 0.8], 0.1) == pytest.approx([2.997, 3.996], abs=1e-6)
    assert lars_step([3.0, 4.0], [0.6, 0.8], 0.0) == pytest.approx([2.997, 3.996], abs=1e-6)
    assert lars_step([0.0, 0.0], [0.6, 0.8], 0.1) == pytest.approx([-0.6, -0.8], abs=1e-6)
    assert lars_step([3.0, 4.0], [-1.5, -2.0], 0.5) == [3, 4]  # gradient and decay cancel


LAYERS = {"conv": (4, 3, 3, 3), "linear": (5, 4), "bias": (5,), "norm": (4,)}  # as the optimiser numbers them
STEPS = 6


def draws(seed, like=None):
    """Values for every layer, float64; of the shape of the layers, or along `like`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    if like is None:
        return {name: draw(shape) for name, shape in LAYERS.items()}
    return {name: value.detach() * draw(()).abs() for name, value in like.items()}


def build_lars(weights, weight_decay):
    """Our LARS as `Optim` builds it."""
    network = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in weights.items()})
    record = Optim(name="lars", lr=0.3, lr_per=None, weight_decay=weight_decay, momentum=0.9)
    optimiser, _ = record.build(network, images_per_step=8, steps_per_epoch=1, total_steps=STEPS)
    for group in optimiser.param_groups:
        group["lr"] = 0.3
    return network, optimiser


def authors(weights, weight_decay):
    """What SimCLR's `lars_optimizer.py` does, classic momentum, norms and biases left out of decay and adaptation."""
    values, velocity = dict(weights), {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(STEPS):
        for name, drawn in draws(step).items():
            gradient, ratio = drawn, 1.0
            if name in ("conv", "linear"):
                gradient = drawn + weight_decay * values[name]
                ratio = 0.001 * values[name].square().sum().sqrt() / gradient.square().sum().sqrt()
            velocity[name] = 0.9 * velocity[name] + 0.3 * ratio * gradient
            values[name] = values[name] - velocity[name]
    return values


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
def test_lars_is_that_of_simclrs_authors(weight_decay):
    weights = draws(99)
    network, optimiser = build_lars(weights, weight_decay)
    for step in range(STEPS):
        for name, gradient in draws(step).items():
            network[name].grad = gradient
        optimiser.step()
    torch.testing.assert_close(dict(network.items()), authors(weights, weight_decay), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_timms_where_the_two_definitions_meet(weight_decay):
    """timm divides by |g| + wd |w|, we by |g + wd w|: the same without decay, and for gradients along the weights."""
    weights = draws(99)
    network, optimiser = build_lars(weights, weight_decay)
    theirs = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    matrices, vectors = ([value for value in theirs.values() if (value.ndim > 1) is large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay, "always_adapt": True}, {"params": vectors}]
    reference = timm.optim.Lars(groups, lr=0.3, momentum=0.9, eps=0.0, trust_clip=False, always_adapt=False)
    for step in range(STEPS):
        for name, gradient in draws(step, like=weights if weight_decay else None).items():
            network[name].grad, theirs[name].grad = gradient, gradient.clone()  # timm's adds the decay in place
        optimiser.step()
        reference.step()
    torch.testing.assert_close(dict(network.items()), theirs, rtol=1e-12, atol=1e-12)


def test_a_lars_state_of_earlier_versions_goes_on():
    """The groups and the state that they wrote: nothing more is asked for."""
    weights = draws(99)
    network, optimiser = build_lars(weights, 0.1)
    common = {"lr": 0.3, "momentum": 0.9, "trust": 0.001, "initial_lr": 0.3}
    groups = [{**common, "weight_decay": 0.1, "params": [0, 1]}, {**common, "weight_decay": 0.0, "params": [2, 3]}]
    state = {number: {"momentum_buffer": value} for number, value in enumerate(draws(5).values())}
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    for name, gradient in draws(0).items():
        network[name].grad = gradient
    optimiser.step()
    momenta, gradients = draws(5), draws(0)
    decayed = gradients["conv"] + 0.1 * weights["conv"]
    scaled = 0.001 * weights["conv"].norm() / decayed.norm() * decayed
    wanted = {"conv": 0.9 * momenta["conv"] + scaled, "norm": 0.9 * momenta["norm"] + gradients["norm"]}
    for name, step in wanted.items():
        torch.testing.assert_close(network[name].detach(), weights[name] - 0.3 * step)


def test_warm_up_is_at_most_half_of_a_short_run():
    schedule = Schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup_steps=100, total_steps=10)
    assert schedule.factor(10) == 0 and math.isclose(schedule.factor(4), 1) and math.isclose(schedule.factor(0), 0.2)
    schedule.total_steps = 6  # a run by minutes learns its horizon on the way
    assert math.isclose(schedule.factor(2), 1) and schedule.factor(6) == 0


def test_layers_learn_at_rates_that_fall_with_their_depth():
    encoder = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=12, num_heads=3, num_classes=0, img_size=32)
    network = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(12, 2)})
    record = Optim(name="adamw", lr=1.0, lr_per=None, warmup_epochs=0, layer_decay=0.5)
    optimiser, _ = record.build(network, images_per_step=8, steps_per_epoch=10, total_steps=100)
    rates = {weight: group["initial_lr"] for group in optimiser.param_groups for weight in group["params"]}
    assert rates.keys() == set(network.parameters())
    assert rates[network["head"].weight] == rates[network["head"].bias] == 1.0
    found = [rates[encoder.patch_embed.proj.weight], *(rates[block.mlp.fc1.weight] for block in encoder.blocks)]
    assert [2 * rate for rate in found[:-1]] == found[1:]  # half of that of the layer above
    reference = timm.optim.param_groups_layer_decay(encoder, layer_decay=0.5)
    theirs = {weight: group["lr_scale"] for group in reference for weight in group["params"]}
    assert {weight: rates[weight] for weight in theirs} == theirs
    decays = {weight: group["weight_decay"] for group in optimiser.param_groups for weight in group["params"]}
    assert all((decay > 0) == (weight.ndim >= 2) for weight, decay in decays.items())


def test_layer_decay_needs_layers_and_numbers_need_sense():
    with pytest.raises(UserError, match="names its layers"):
        Optim(layer_decay=0.5).build(nn.Linear(2, 2), images_per_step=8, steps_per_epoch=10, total_steps=100)
    for wrong in ({"layer_decay": 1.5}, {"clip": 0.0}, {"accumulate": 0}):
        with pytest.raises(UserError, match=f"optim.{next(iter(wrong))}"):
            Optim(**wrong)


def test_what_is_said_are_the_absolute_numbers(capsys):
    record = Optim(name="sgd", lr=0.5, lr_per=256, accumulate=4, clip=1.0, warmup_epochs=2)
    record.build(nn.Linear(2, 2), images_per_step=1024, steps_per_epoch=10, total_steps=100)
    said = capsys.readouterr().out
    assert "peak lr 2 (lr 0.5 per 256 images, 1024 images a step)" in said and "warm-up 20 of 100 steps" in said
    assert "4 batches a step" in said and "gradient norm at most 1" in said and said.count("peak lr") == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_and_plain_optimisers_agree(name):
    networks = []
    for fused in (True, False):
        torch.manual_seed(0)
        network = nn.Linear(3, 3)
        record = Optim(name=name, lr=0.1, lr_per=None, warmup_epochs=0, weight_decay=0.1, fused=fused)
        optimiser, _ = record.build(network, images_per_step=8, steps_per_epoch=10, total_steps=100)
        for step in range(3):
            network.weight.grad, network.bias.grad = torch.full((3, 3), 0.1 * step + 0.1), torch.ones(3)
            optimiser.step()
        networks.append(network)
    torch.testing.assert_close(networks[0].weight, networks[1].weight)
    torch.testing.assert_close(networks[0].bias, networks[1].bias)


def test_lars_divides_by_a_scale_and_skips_a_step():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimiser = LARS([{"params": [parameter]}], lr=1.0, momentum=0.5)
    parameter.grad = torch.tensor([float("nan"), 0.8])
    optimiser.found_inf = torch.tensor(1.0)
    optimiser.step()
    assert parameter.tolist() == [3, 4] and optimiser.state[parameter]["momentum_buffer"].tolist() == [0, 0]
    parameter.grad = torch.tensor([6.0, 8.0])
    optimiser.found_inf, optimiser.grad_scale = torch.tensor(0.0), torch.tensor(10.0)
    optimiser.step()
    assert parameter.tolist() == pytest.approx([2.4, 3.2], abs=1e-6)


# EMA: the weighted mean of all weights so far, in closed form

SGD = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0)


def averaged(optim=SGD, decay=0.8, **options):
    """The averaged encoder after eight batches, and the trained one before them and after each step."""

    class Encoders(EMA):
        def move(self, trained, step, total, held):
            encoders.append({name: value.clone() for name, value in trained.state_dict().items()})
            return super().move(trained, step, total, held)

    module, ema = Tiny(optim), Encoders(decay, **options)
    encoders = [{name: value.clone() for name, value in module.encoder.state_dict().items()}]
    train(module, Loop(ema=ema), accumulate=optim.accumulate)
    return ema.encoder(module).state_dict(), encoders


def test_cosine_reaches_its_five_points():
    wanted = [0.996, 0.9965858, 0.998, 0.9994142, 1.0]
    assert [cosine_decay(0.996, done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize(("cosine", "accumulate"), [(False, 1), (True, 1), (False, 4)])
def test_it_is_the_weighted_mean_of_all_steps_and_copies_running_statistics(cosine, accumulate):
    found, (first, *trained) = averaged(replace(SGD, accumulate=accumulate), cosine=cosine)
    wanted = first["0.weight"].double()
    assert len(trained) == 8 // accumulate
    for step, weights in enumerate(trained):
        decay = cosine_decay(0.8, step / 7) if cosine else 0.8
        wanted = decay * wanted + (1 - decay) * weights["0.weight"].double()
    torch.testing.assert_close(found["0.weight"].double(), wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(found["0.weight"], trained[-1]["0.weight"], atol=1e-4)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(found[name], trained[-1][name])


def test_constant_weights_stay_and_one_jump_decays():
    module, ema = Tiny(SGD), EMA(0.9)
    module.requires_grad_(False)
    module.head.bias.requires_grad_(True)
    with torch.no_grad():
        ema.encoder(module.encoder)[0].weight.add_(1)  # theta_0 = w + 1
    train(module, Loop(ema=ema))
    moved = ema.encoder(module.encoder)
    torch.testing.assert_close(moved[0].weight - module.encoder[0].weight, torch.full((4, 3, 3, 3), 0.9**8))
    assert torch.equal(moved[0].bias, module.encoder[0].bias)


def test_the_average_survives_a_restart():
    module, ema, resumed = Tiny(SGD), EMA(0.9), EMA(0.9)
    train(module, Loop(ema=ema))
    found = ema.encoder(module.encoder).state_dict()
    resumed.load_state_dict(ema.state_dict())
    assert resumed.state_dict()["encoder"].keys() == found.keys()  # also before it is used
    for name, value in resumed.encoder(Tiny(SGD).encoder).state_dict().items():
        assert torch.equal(value, found[name]), name
    assert not resumed.encoder(module.encoder).training


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UserError, match="between 0 and 1"):
        EMA(decay)
