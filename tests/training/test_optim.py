"""Units, groups and schedules of Optim; LARS against a step computed by hand."""

import math

import pytest
import torch
from torch import nn

from ssl_kit.training.optim import LARS, Optim, Schedule, parameter_groups


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
    wanted = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: half}
    assert {step: rates[step] / 0.4 for step in wanted} == pytest.approx(wanted)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.04)


@pytest.mark.parametrize("step", [0, 3, 7, 19])
def test_schedule_resumes_at_every_step(step):
    def fresh():
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimiser, Schedule(optimiser, warmup_steps=5, total_steps=20)

    optimiser, schedule = fresh()
    for _ in range(step):
        optimiser.step()
        schedule.step()
    resumed_optimiser, resumed = fresh()
    resumed_optimiser.load_state_dict(optimiser.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(3):
        for one, other in [(optimiser, schedule), (resumed_optimiser, resumed)]:
            one.step()
            other.step()
        assert resumed_optimiser.param_groups[0]["lr"] == optimiser.param_groups[0]["lr"]


def lars_step(weight, gradient, weight_decay):
    parameter = nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(gradient)
    groups = [{"params": [parameter], "weight_decay": weight_decay}]
    LARS(groups, lr=1.0, momentum=0.0, trust=0.001).step()
    return parameter.tolist()


def test_lars_step_by_hand():
    assert lars_step([3.0, 4.0], [0.6, 0.8], 0.1) == pytest.approx([2.997, 3.996], abs=1e-6)
    assert lars_step([3.0, 4.0], [0.6, 0.8], 0.0) == pytest.approx([2.4, 3.2], abs=1e-6)
    assert lars_step([0.0, 0.0], [0.6, 0.8], 0.1) == pytest.approx([-0.6, -0.8], abs=1e-6)


def test_warm_up_is_at_most_half_of_a_short_run():
    schedule = Schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup_steps=100, total_steps=10)
    assert schedule.factor(10) == 0 and math.isclose(schedule.factor(4), 1) and math.isclose(schedule.factor(0), 0.2)
    schedule.total_steps = 6  # a run by minutes learns its horizon on the way
    assert math.isclose(schedule.factor(2), 1) and schedule.factor(6) == 0
