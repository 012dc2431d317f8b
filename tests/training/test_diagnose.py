"""Gradient norms and dead units against what autograd and the network give by hand."""

import csv

import pytest
import torch
from tiny_runs import Random, Tiny, train
from torch import nn

from ssl_kit.training.guard import Diagnose
from ssl_kit.training.optim import Optim

SGD = Optim(name="sgd", lr=1e-12, lr_per=None, warmup_epochs=0)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network():
    module = Tiny(SGD)
    with torch.no_grad():
        module.encoder[1].bias[:] = torch.tensor([-100.0, 0, 0, 0])  # one of four channels is dead
    return module


def test_rows_are_the_norms_and_dead_units_of_their_step(tmp_path):
    train(network(), [Diagnose(tmp_path / "diagnose.csv", interval=4)])
    found = {row["layer"]: row for row in rows(tmp_path / "diagnose.csv") if row["step"] == "8"}
    assert list(found) == ["encoder.0", "encoder.1", "head", "encoder.2"]
    by_hand = network()
    by_hand.training_step(Random(8)._batch(7), 0)["loss"].backward()
    for name, layer in (("encoder.0", by_hand.encoder[0]), ("head", by_hand.head)):
        gradient = torch.cat([weight.grad.flatten() for weight in layer.parameters()]).norm().item()
        weights = torch.cat([weight.detach().flatten() for weight in layer.parameters()]).norm().item()
        assert float(found[name]["gradient_norm"]) == pytest.approx(gradient, rel=1e-4)
        assert float(found[name]["weight_norm"]) == pytest.approx(weights, rel=1e-4)
    assert float(found["encoder.2"]["dead"]) == 0.25 and found["head"]["dead"] == ""


def test_only_those_steps_are_watched(tmp_path):
    calls = []

    class Counted(Diagnose):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            calls.append(len(self._hooks))
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    module = network()
    train(module, [Counted(tmp_path / "diagnose.csv", interval=4)])
    assert calls == [0, 0, 0, 1, 0, 0, 0, 1]
    assert not any(part._forward_hooks for part in module.modules() if isinstance(part, nn.ReLU))


def test_a_new_run_drops_the_rows_of_an_older_one(tmp_path):
    for _ in range(2):
        train(network(), [Diagnose(tmp_path / "diagnose.csv", interval=4)])
    assert [row["step"] for row in rows(tmp_path / "diagnose.csv")] == ["4"] * 4 + ["8"] * 4
