"""BYOL: bootstrap your own latent.

Grill et al. 2020, arXiv:2006.07733.

Two views of each image. A predictor on top of the online network's projection of one view is to foretell the projection
that the target network makes of the other one; the target network is a slow average of the online one and gets no
gradient. Nothing is pushed apart: no negatives, and small batches do.

    symbol   here        meaning
    f, g, q  encoder, projector, predictor
    xi       target      weights of the target network: f and g, averaged
    z'_xi    wanted      the target's projection of the other view, (B, d)
    q(z)     foretold    (B, d)
    tau      tau         of the average; grows to 1 by a cosine over the run (section 3.3)

The predictor and batch norm are what keeps it from collapsing; a collapsed model has loss 0, so the loss alone tells
nothing: follow rank and kNN.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Momentum, Norm, flatten_views, float32, mlp
from ssl_kit.training.optim import Optim, cosine_decay


class BYOL(Method):
    """BYOL with the paper's heads: linear, norm, ReLU, linear.

    Args:
        encoder: f.
        projection: widths of the projector; the paper's are 4096 and 256.
        prediction: widths of the predictor; the last one is the projector's.
        norm: of the heads; with batch norm each process normalises its own images.
        tau: of the target network at the start.
        optim: optimiser and schedule.
    """

    num_views = 2
    preset = "byol"

    def __init__(
        self,
        encoder: Encoder,
        projection: tuple[int, ...] = (512, 128),
        prediction: tuple[int, ...] = (512, 128),
        norm: Norm = "batch",
        tau: float = 0.99,
        optim: Optim = Optim(name="sgd", lr=0.2, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not projection or not prediction or projection[-1] != prediction[-1]:
            raise UserError(f"projection {list(projection)}, prediction {list(prediction)}: wanted equal last widths")
        if not 0 <= tau <= 1:
            raise UserError(f"tau {tau}: wanted a decay in [0, 1], such as 0.99")
        self.tau = tau
        self.projector = mlp(encoder.dim, projection, norm=norm)
        self.predictor = mlp(projection[-1], prediction, norm=norm)
        self.target = Momentum(encoder, self.projector)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Eq. 2, symmetrised: the squared distance of the unit vectors, once from each view to the other."""
        images = flatten_views(views)  # (2B, C, h, w)
        foretold, wanted = self.predictor(self.projector(self.encoder(images))), self.target(images)  # (2B, d) each
        return {"loss": byol_loss(foretold, wanted)}

    def after_step(self, progress: float) -> None:
        """The target network follows."""
        self.target.follow(self.encoder, self.projector, tau=cosine_decay(self.tau, progress))

    def after_init(self) -> None:
        """The target network starts where the online one does."""
        self.target.follow(self.encoder, self.projector, tau=0)


def byol_loss(foretold: Tensor, wanted: Tensor) -> Tensor:
    """Eq. 2 in both directions, the mean over the images of this process: a scalar in [0, 8].

    Args:
        foretold: (2B, d) predictions, of the first views in rows 0..B-1, of the second ones in B..2B-1; any norm.
        wanted: (2B, d) the target's projections in the same order.
    """
    with float32(foretold):
        others = wanted.float().roll(len(wanted) // 2, dims=0)  # row i: of the other view of the same image
        cosines = F.cosine_similarity(foretold.float(), others, dim=1)  # (2B,)
        return 2 * (2 - 2 * cosines).mean()
