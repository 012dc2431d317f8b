"""Barlow Twins against its equation, term by term."""

import torch
from barlow import barlow_loss


def test_it_is_equation_1():
    """In double precision, from random projections."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            a, b = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            c = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
            expected += (1 - c) ** 2 if i == j else 0.01 * c**2
    assert torch.allclose(barlow_loss(first, second, 0.01), expected)


def test_equal_decorrelated_projections_cost_nothing():
    """Their correlation is the identity."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_loss(z, z, 0.01) == 0
