"""VICReg: variance-invariance-covariance regularization for self-supervised learning.

Bardes, Ponce & LeCun 2022, arXiv:2105.04906; the authors' code: github.com/facebookresearch/vicreg.

Two views of each image pass through the encoder and an expander, and their outputs are to be alike. Nothing is compared
with other images and nothing follows slowly: what keeps it from collapsing is that each of the d outputs is to have a
standard deviation of at least gamma over the images of the step, and that no two of them are to be correlated.

    symbol      here          meaning
    h           expander      d outputs, of both views alike
    Z, Z'       first, second (B, d) each
    N           -             images of the step, of all processes together
    s, v, c     invariance, variance, covariance   the three terms
    lambda, mu, nu  weights   of the terms; 25, 25 and 1 in the paper
    gamma       1             the standard deviation that is asked for
    epsilon     1e-4          of the variance

Where paper and code disagree this is the code: s is a mean over the d outputs too (eq. 5 sums), and v the mean of the
two views' (eq. 6 adds them).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Norm, flatten_views, float32, mlp
from ssl_kit.training.distributed import all_gather, counts, world_size
from ssl_kit.training.optim import Optim

_EPSILON = 1e-4


class VICReg(Method):
    """VICReg with an expander of linear layers, a norm and ReLU between them.

    Args:
        encoder: of both views.
        expander: widths of its layers; the paper's are 8192, 8192, 8192. The covariance costs d^2 per image.
        norm: of the expander; with batch norm each process normalises its own images.
        weights: of invariance, variance and covariance.
        optim: optimiser and schedule.
    """

    num_views = 2
    preset = "byol"  # the paper's pair of views (appendix C.1)
    compares_images = True

    def __init__(
        self,
        encoder: Encoder,
        expander: tuple[int, ...] = (512, 512, 512),
        norm: Norm = "batch",
        weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
        optim: Optim = Optim(name="sgd", lr=0.1, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not expander or min(expander) < 1:
            raise UserError(f"expander {list(expander)}: wanted the widths of its layers, at least 1 each")
        if min(weights) < 0 or not max(weights) > 0:
            raise UserError(f"weights {list(weights)}: wanted three of at least 0, not all 0, such as 25, 25, 1")
        self.weights = weights
        self.expander = mlp(encoder.dim, expander, norm=norm)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Eq. 6 of the two views.

        Returns:
            loss: the weighted sum.
            invariance: 0 when the views of each image agree.
            variance: of the two views' hinges the mean; 0 when every output varies enough, 0.99 collapsed.
            covariance: 0 when no two outputs are correlated.
        """
        first, second = self.expander(self.encoder(flatten_views(views))).chunk(2)  # (B, d) each
        invariance, variance, covariance = vicreg_terms(first, second)
        a, b, c = self.weights
        total = a * invariance + b * variance + c * covariance
        told = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": total, **{name: term.detach() for name, term in told.items()}}

    def chance_loss(self, batch_size: int) -> float:
        """mu (1 - sqrt(epsilon)): all images have one code."""
        return self.weights[1] * (1 - _EPSILON**0.5)


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance (eq. 5), variance (eq. 1, 2) and covariance (eq. 3, 4): three scalars, float32.

    Variance and covariance are those of the images of all processes, which may have unequal shares. The mean of the
    terms over the processes, each weighted by its share, and its gradient, are those of one process on the joined
    batch.

    Args:
        first: (B, d) outputs for the first views.
        second: (B, d) outputs for the second views of the same images.

    Raises:
        UserError: there is one image only, which has no variance.
    """
    if len(first) == 1 and world_size() == 1:
        raise UserError("the loss compares images: got a step of one image, wanted two or more; raise --batch-size")
    with float32(first):
        first, second = first.float(), second.float()
        invariance = F.mse_loss(first, second)
        joined = all_gather(torch.cat([first, second], dim=1), counts(len(first), per_image=1))  # (N, 2d)
        centred = joined - joined.mean(dim=0)
        deviation = (centred.square().sum(dim=0) / (len(joined) - 1) + _EPSILON).sqrt()  # (2d,), eq. 2
        variance = F.relu(1 - deviation).mean()
        covariance = torch.stack([_covariance(view) for view in centred.chunk(2, dim=1)]).sum()
        return invariance, variance, covariance


def _covariance(centred: Tensor) -> Tensor:
    """Eq. 4 of centred outputs (N, d): the squared covariances of any two different ones, their sum over d."""
    matrix = centred.T @ centred / (len(centred) - 1)  # (d, d), eq. 3
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / len(matrix)
