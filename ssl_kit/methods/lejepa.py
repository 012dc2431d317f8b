"""LeJEPA: joint embeddings that predict each other and are Gaussian.

Balestriero & LeCun 2025, arXiv:2511.08544, algorithms 1 (SIGReg) and 2 (LeJEPA).

Large and small crops of each image pass through the encoder and a projector. Every crop is to predict the mean of the
large ones. What keeps it from collapsing is that the projections of a crop over the images of the step are to look like
a sample of the standard Gaussian N(0, I), seen along random directions: each line of numbers is held to the normal
distribution by the statistic of Epps & Pulley 1983. No teacher, no stopped gradient, no negatives; one trade-off.

    symbol   here         meaning
    V, V_g   -            crops of an image, large ones among them (the first two)
    N        -            images of the step, of all processes together
    K        -            width of a projection
    z        z            projections, (V, B, K)
    A        directions   M random unit vectors, (K, M), new in each step, alike in all processes
    phi      target       characteristic function of N(0, 1), exp(-t^2 / 2)
    phi_N    -            that of the N numbers along one direction, the mean of exp(i t x)
    w        weight       of a frequency t in the integral, exp(-t^2 / 2)
    lambda   trade_off    share of SIGReg in the loss

The trade-off has to be tuned for each set. EB-JEPA, a reproduction, reports an accuracy of 0.272, 0.869, 0.910 and
0.809 on CIFAR-10 (ResNet-18, 300 epochs) for a coefficient of 0.1, 1, 10 and 100 in front of SIGReg, on a scale of its
own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key, uniform
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Norm, by_size, float32, mlp
from ssl_kit.training.distributed import all_gather, counts, sum_of_all
from ssl_kit.training.optim import Optim

_LARGE = 2  # crops whose mean is predicted
_REACH, _KNOTS = 5.0, 17  # algorithm 1: so many frequencies from -5 to 5
_DIRECTIONS = 1_000  # random stream


class LeJEPA(Method):
    """LeJEPA with two large and further small crops, and a projector of linear layers, a norm and ReLU between them.

    Args:
        encoder: where there are small crops it must take several sizes (a ViT with `dynamic_img_size: true`).
        small_crops: beside the two large ones, 0 to 8; their side is `--views.local-size`.
        projection: widths of the projector; the last one is K.
        norm: of the projector; with batch norm each process normalises its own images.
        trade_off: lambda, in [0, 1]; the paper's advice is 0.05, and 0.01 to 0.1 to try.
        directions: M, random directions that a step looks along.
        optim: optimiser and schedule; the paper's weight decay is 0.05 for ViTs and 5e-4 for ResNets.
    """

    num_views = 8
    preset = "dino"
    compares_images = True

    def __init__(
        self,
        encoder: Encoder,
        small_crops: int = 6,
        projection: tuple[int, ...] = (512, 512, 64),
        norm: Norm = "batch",
        trade_off: float = 0.05,
        directions: int = 256,
        optim: Optim = Optim(name="adamw", lr=5e-4, weight_decay=0.05),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not 0 <= small_crops <= 8:
            raise UserError(f"small_crops {small_crops}: wanted 0 to 8, beside two large ones")
        if not projection or min(projection) < 1:
            raise UserError(f"projection {list(projection)}: wanted the widths of its layers, at least 1 each")
        if not 0 <= trade_off <= 1 or directions < 1:
            raise UserError(f"trade_off {trade_off}, directions {directions}: wanted a share in [0, 1], and 1 or more")
        if small_crops and encoder.fixed_size:
            raise UserError(
                f"{encoder.name} takes one size only: give --method.small-crops 0, or a ViT "
                "--method.encoder.args '{dynamic_img_size: true}'"
            )
        self.num_views = _LARGE + small_crops
        self.trade_off, self.directions = trade_off, directions
        self.width = projection[-1]
        self.projector = mlp(encoder.dim, projection, norm=norm)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Algorithm 2: (1 - lambda) prediction + lambda SIGReg.

        Returns:
            loss: their weighted sum.
            prediction: mean squared distance to the mean of the large crops.
            sigreg: distance from N(0, I); N times 0.409 when all projections are 0, about 1 for a Gaussian sample.
        """
        z = torch.stack(by_size(lambda crops: self.projector(self.encoder(crops)), views))  # (V, B, K)
        drawn = directions_of(key, self.width, self.directions, z.device)
        prediction, gaussian = prediction_loss(z), sigreg(z, drawn)
        total = (1 - self.trade_off) * prediction + self.trade_off * gaussian
        return {"loss": total, "prediction": prediction.detach(), "sigreg": gaussian.detach()}

    def chance_loss(self, batch_size: int) -> float:
        """lambda N times the integral for numbers that are all 0: every image has one code."""
        t, weight = frequencies()
        return self.trade_off * batch_size * ((1 - (-t.square() / 2).exp()).square() @ weight).item()


def prediction_loss(z: Tensor) -> Tensor:
    """Algorithm 2, `sim`: squared distance of all crops to the mean of the large ones, mean over V, B, K: a scalar.

    Args:
        z: (V, B, K) projections, those of the large crops first; of this process's images.
    """
    with float32(z):
        z = z.float()
        return (z[:_LARGE].mean(dim=0) - z).square().mean()


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Algorithm 1: N * integral |phi_N(t) - phi(t)|^2 w(t) dt, the mean over directions and crops: a scalar, float32.

    phi_N is that of the images of all processes, which may have unequal shares: the mean of the losses over the
    processes, each weighted by its share, and its gradient, are those of one process on the joined batch. Processes
    exchange the sums of phi_N, not projections, so that each one's work is that of its own images.

    Args:
        z: (V, B, K) projections of this process's images.
        directions: (K, M) unit vectors, alike in all processes.
    """
    with float32(z):
        t, weight = frequencies(z.device)  # (T,) each
        target = (-t.square() / 2).exp()  # phi
        turned = (z.float() @ directions)[..., None] * t  # (V, B, M, T), radians
        sums = torch.stack([turned.cos().sum(dim=1), turned.sin().sum(dim=1)])  # (2, V, M, T), of exp(i t x)
        everywhere = counts(z.shape[1], per_image=1)
        real, imaginary = all_gather(sums[None], [1] * len(everywhere)).sum(dim=0) / sum(everywhere)
        error = (real - target).square() + imaginary.square()  # (V, M, T)
        return sum(everywhere) * (error @ weight).mean()


def frequencies(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Frequencies t >= 0 and what each counts in the integral over [-5, 5]: the trapezoid rule times w, (9,) each.

    The integrand is even, since phi is real: t and -t give the same, and half of the 17 knots do.
    """
    t = torch.linspace(0, _REACH, _KNOTS // 2 + 1, device=device)
    step = 2 * _REACH / (_KNOTS - 1)
    both = torch.full_like(t, 2 * step)
    both[0] = both[-1] = step  # t = 0 is there once, and the ends of the trapezoid rule count half
    return t, both * (-t.square() / 2).exp()


def directions_of(key: Key, width: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """(width, count) float32: unit vectors, uniform on the sphere, of the step that this key's images make.

    They are drawn from seed, epoch and the sum of the positions of all processes' images, and so alike in all of them,
    however the images are shared out.
    """
    step = Key(key.seed, key.epoch, sum_of_all(key.index.sum()[None]))
    half = -(-width * count // 2)
    radius, angle = uniform(step, _DIRECTIONS, 2 * half, device).view(2, half)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle  # 1 - u is in (0, 1]: never ln 0
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()])  # Box & Muller 1958
    drawn = normal[: width * count].view(width, count)
    return drawn / drawn.norm(dim=0)
