"""The probe by SGD: torch's own optimiser step for step, the exact probe as its limit, honesty of the choice."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.evaluation.attentive import _SGD_STREAM, sgd_probe, train_linear
from ssl_kit.evaluation.linear import linear_probe


def clusters(count, dim=12, num_classes=4, seed=0):
    centres = np.random.default_rng(99).standard_normal((num_classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    return (centres[labels] + 1.5 * rng.standard_normal((count, dim))).astype(np.float32), labels


def as_embeddings(vectors, labels):
    return SimpleNamespace(vectors=vectors, labels=labels, classes=tuple("abcd"), info={}, groups=None)


def test_every_candidate_takes_the_steps_of_torchs_sgd():
    vectors, labels = clusters(130)
    x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
    found = train_linear(x, y, 4, [0.1, 2.0], 3, 50, seed=5)
    for candidate, lr in enumerate((0.1, 2.0)):
        layer = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(layer.parameters(), lr * 50 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 9)
        for epoch in range(3):
            for rows in torch.from_numpy(permutation(5, epoch, 130, _SGD_STREAM)).split(50):
                optimiser.zero_grad()
                F.cross_entropy(layer(x[rows]), y[rows]).backward()
                optimiser.step()
                schedule.step()
        assert torch.allclose(found.weights[candidate], layer.weight, atol=1e-5)
        assert torch.allclose(found.bias[candidate], layer.bias, atol=1e-5)


def test_it_comes_to_the_exact_probe():
    train, test = as_embeddings(*clusters(1_000)), as_embeddings(*clusters(1_000, seed=1))
    exact, found = linear_probe(train, test, l2=1e-6), sgd_probe(train, test, lr=0.3, epochs=60)
    assert (found.predictions == exact.predictions).mean() > 0.98
    assert found.metrics["auroc"] == pytest.approx(exact.metrics["auroc"], abs=0.005)


def test_the_rate_is_chosen_on_held_out_train_alone():
    train, test = as_embeddings(*clusters(300)), as_embeddings(*clusters(200, seed=1))
    honest = sgd_probe(train, test, lr=(1e-3, 1e3), epochs=5)
    scores = honest.settings["held_out_top1"]
    assert scores[0] != scores[1]
    assert honest.settings["lr"] == (1e-3, 1e3)[int(np.argmax(scores))]
    test.labels = np.random.default_rng(0).integers(0, 4, 200)
    shuffled = sgd_probe(train, test, lr=(1e-3, 1e3), epochs=5)
    assert shuffled.settings == honest.settings
    assert np.array_equal(shuffled.predictions, honest.predictions)


def test_no_epochs_are_one_line():
    train = as_embeddings(*clusters(50))
    with pytest.raises(UserError, match="0 epochs"):
        sgd_probe(train, train, epochs=0)
