"""Barlow Twins: self-supervised learning via redundancy reduction.

Zbontar, Jing, Misra, LeCun & Deny 2021, arXiv:2103.03230.

    symbol  here           meaning
    B       B              images of the batch, of all processes together
    z_A     first          projections of the first views, standardised over the batch, (B, width)
    C       c              their correlation with those of the second views, (width, width)
    lambda  off_diagonal   weight of the redundancy term
"""

import torch
from torch import Tensor

from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import flatten_views, float32, mlp
from ssl_kit.training.distributed import all_gather
from ssl_kit.training.optim import Optim


def barlow_loss(first: Tensor, second: Tensor, off_diagonal: float) -> Tensor:
    """Eq. 1 for projections (b, width) of two views: pulls the diagonal of C to 1 and all else to 0. A scalar.

    C is that of the images of all processes, which may have unequal shares b; nothing is computed in low precision.
    """
    with float32(first):
        first, second = all_gather(torch.cat([first, second], dim=1)).chunk(2, dim=1)  # (B, width) each
        first, second = ((z - z.mean(0)) / z.std(0, correction=0).clamp(min=1e-5) for z in (first, second))
        c = first.T @ second / len(first)  # (width, width)
        error = (c - torch.eye(len(c), device=c.device)).square()
        on_diagonal = error.diagonal().sum()
        return on_diagonal + off_diagonal * (error.sum() - on_diagonal)


class BarlowTwins(Method):
    """Barlow Twins with SimCLR's projection head.

    Args:
        encoder: f.
        off_diagonal: lambda.
        width: of the projections.
        optim: optimiser and schedule.
    """

    num_views = 2
    compares_images = True

    def __init__(
        self,
        encoder: Encoder,
        off_diagonal: float = 5e-3,
        width: int = 512,
        optim: Optim = Optim(name="sgd", lr=0.2, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        self.off_diagonal = off_diagonal
        self.head = mlp(encoder.dim, (width, width), last_norm=True)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """The redundancy-reduction loss of the two views."""
        first, second = self.head(self.encoder(flatten_views(views))).float().chunk(2)  # (b, width) each
        return {"loss": barlow_loss(first, second, self.off_diagonal)}
