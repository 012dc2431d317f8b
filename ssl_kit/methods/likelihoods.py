"""How probable an image is under a decoder's prediction, and what a decoder without a code would reach.

Letters: B images, C channels, H x W pixels in [0, 1].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.errors import UserError

Likelihood = Literal["gaussian", "bernoulli", "logistic"]


def gaussian_log_likelihood(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """ln N(x; location, scale^2), summed over an image: a density in nats, which may be positive.

    Args:
        x: (B, C, H, W) in [0, 1].
        location: (B, C, H, W).
        log_scale: scalar, or broadcasting to `x`.

    Returns:
        (B,).
    """
    error = (x - location) * (-log_scale).exp()
    return -(0.5 * error.square() + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(dim=1)


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """ln of the probability of binary pixels, summed over an image: (B, C, H, W), values 0 and 1, twice to (B,)."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(dim=1)


def logistic_log_likelihood(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """ln of the probability of 256 levels under a discretised logistic, summed over an image (arXiv:1701.05517, eq. 2).

    A level k / 255 takes the mass of [k - 1/2, k + 1/2] / 255; the first and the last take the tails too, so that the
    256 probabilities sum to 1. With a > b the arguments of the sigmoid at the two edges,

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)),

    which in logarithms neither cancels nor underflows (the authors' code falls back to the density there).

    Args:
        x: (B, C, H, W), multiples of 1/255 in [0, 1].
        location: (B, C, H, W).
        log_scale: scalar: ln of the logistic's scale, in the units of x.

    Returns:
        (B,), at most 0.
    """
    inverse = (-log_scale).exp()
    upper = (x - location + 0.5 / 255) * inverse
    lower = (x - location - 0.5 / 255) * inverse
    above, below = F.logsigmoid(upper), F.logsigmoid(-lower)  # the two tails that an inner level cuts off
    inner = above + below + torch.log(-torch.expm1(-inverse / 255))
    log_p = torch.where(x < 0.5 / 255, above, torch.where(x > 1 - 0.5 / 255, below, inner))
    return log_p.flatten(1).sum(dim=1)


def constant_code_loss(target: Tensor, likelihood: Likelihood) -> Tensor:
    """Where a model sits whose decoder ignores the code, in the units of `loss`: chance level, estimated from images.

    The best constant image is fitted to `target` (B, C, H, W) itself, and one scale for all pixels; the more images,
    the better (1,000 are plenty). KL and code are zero there.

    Returns:
        Scalar, nats per dimension.
    """
    mean = target.double().mean(dim=0, keepdim=True)
    if likelihood == "bernoulli":
        return -(torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).mean()
    variance = (target - mean).square().mean().clamp(min=1e-12)
    if likelihood == "gaussian":
        return 0.5 * (2 * math.pi * math.e * variance).log()
    scales = 0.5 * variance.log() + torch.linspace(-2, 0, 21, device=target.device)  # ln; the best is inside
    losses = [-logistic_log_likelihood(target.double(), mean, scale).mean() for scale in scales]
    return torch.stack(losses).min() / target[0].numel()


def check_values(target: Tensor, likelihood: Likelihood) -> None:
    """Raises `UserError` when the likelihood is not for such pixels: it would be a number without a meaning."""
    if likelihood == "bernoulli":
        odd = (target != 0) & (target != 1)
        wanted = "0 and 1 only; binarise the images and use --views.preset plain, or --method.likelihood gaussian"
    elif likelihood == "logistic":
        levels = target * 255
        odd = ((levels - levels.round()).abs() > 1e-3) | (target < 0) | (target > 1)
        wanted = (
            "multiples of 1/255, pixels as stored; use --views.preset plain (flips may stay) with --image-size of the "
            "images, or --method.likelihood gaussian"
        )
    else:
        return
    if odd.any():
        raise UserError(
            f"likelihood {likelihood}: got pixels such as {float(target[odd][0]):.4f} "
            f"({float(odd.float().mean()):.0%} are not fitting); wanted {wanted}"
        )
