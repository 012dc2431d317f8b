"""SimCLR: a simple framework for contrastive learning of visual representations.

Chen, Kornblith, Norouzi & Hinton 2020, arXiv:2002.05709.

Two random views of each image pass through the encoder f and a projection head g. The loss (eq. 1, NT-Xent) asks each
view to find the other view of its image among the 2N - 1 other views of the batch. The head is thrown away afterwards:
h = f(x) is the representation.

    symbol  here          meaning
    N       B             images in the batch (all processes together)
    h_i     features      f(x_i), (2B, dim)
    z_i     z             g(h_i), L2-normalised, (2B, d)
    tau     temperature   scale of the similarities

Like the authors' code and unlike eq. 1's sum over pairs, the loss is the mean over all 2N anchors, which is the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method, flatten_views
from ssl_kit.training.distributed import gather, rank
from ssl_kit.training.optim import Optim


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR eq. 1), mean over all anchors of this process.

    With several processes the other processes' views are negatives too, gathered with their gradient: the mean of
    the losses over the processes, and its gradient, are those of one process on the joined batch.

    Args:
        z: (2B, d) projections, first view in rows 0..B-1, second view of the same images in rows B..2B-1; any norm.
        temperature: tau > 0.

    Returns:
        Scalar, float32 or better; ln(2B - 1) when all projections are equal.
    """
    z = F.normalize(z.float() if z.dtype in (torch.bfloat16, torch.float16) else z, dim=1)  # (2B, d)
    pairs = z.shape[0] // 2
    candidates = gather(z)  # (W*2B, d), this process's rows start at rank * 2B
    first = rank() * z.shape[0]
    similarity = z @ candidates.T / temperature  # (2B, W*2B)
    own = torch.arange(first, first + z.shape[0], device=z.device)
    similarity = similarity.scatter(1, own[:, None], -math.inf)  # a view is not its own candidate
    positive = own.roll(pairs)  # row i's other view is row i + B, or i - B
    return F.cross_entropy(similarity, positive)


class SimCLR(Method):
    """SimCLR with a projection head of linear layers, batch norm and ReLU.

    Args:
        encoder: f.
        temperature: tau; the paper uses 0.5 for CIFAR-10 with long schedules and 0.1 for ImageNet.
        projection: widths of the head's layers; the last one is d.
        optim: optimiser and schedule.
    """

    num_views = 2

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        projection: tuple[int, ...] = (512, 128),
        optim: Optim = Optim(name="sgd", lr=0.5, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        self.temperature = temperature
        self.head = projection_head(encoder.dim, projection)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """NT-Xent between the two views."""
        features = self.encoder(flatten_views(views))  # (2B, dim)
        return {"loss": nt_xent(self.head(features), self.temperature)}

    def chance_loss(self, batch_size: int) -> float:
        """ln(2N - 1): every view looks the same."""
        return math.log(2 * batch_size - 1)


def projection_head(dim: int, widths: tuple[int, ...]) -> nn.Sequential:
    """g of the paper: linear layers without bias, each with batch norm, ReLU between them (authors' `resnet_v2`).

    (B, dim) to (B, widths[-1]).
    """
    layers: list[nn.Module] = []
    for position, width in enumerate(widths):
        if position:
            layers.append(nn.ReLU(inplace=True))
        layers += [nn.Linear(dim, width, bias=False), nn.BatchNorm1d(width)]
        dim = width
    return nn.Sequential(*layers)
