"""MoCo v3: momentum contrast without a queue, for CNNs and vision transformers.

Chen, Xie & He 2021, arXiv:2104.02057 (algorithm 1); the authors' code: github.com/facebookresearch/moco-v3.

Two views of each image. A predictor on top of the network's projection of one view is to find the projection that a
slow average of the network, which gets no gradient, makes of the other view, among those of all images of the step.

    symbol     here        meaning
    f_q        encoder, projector, predictor
    f_k        target      encoder and projector, averaged
    q1, q2     queries     f_q of the two views, L2-normalised, (B, d) each
    k1, k2     wanted      f_k of them, L2-normalised, (B, d) each
    N          -           images of the step, of all processes together
    tau        temperature
    m          momentum    of the average; grows to 1 by a cosine over the run

A transformer's patch projection keeps its first values, as the paper found training steadier that way (section 4.2):
random ones, or those of `--init`. It is a frozen weight of the encoder: it is exported, averaged and copied to f_k as
the others are.

Unlike the authors', the last norm of the projector and of the predictor has a scale and a shift (`parts.mlp`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Momentum, Norm, flatten_views, float32, mlp
from ssl_kit.training.distributed import all_gather, counts, rank, world_size
from ssl_kit.training.optim import Optim, cosine_decay


class MoCoV3(Method):
    """MoCo v3 with heads whose layers all have a norm, the last ones too (section 4, "MLP heads").

    Args:
        encoder: a CNN or a vision transformer.
        projection: widths of the projector; the paper's are 4096, 4096 (ViTs only) and 256.
        prediction: widths of the predictor, 4096 and 256 in the paper; the last one is the projector's.
        norm: of the heads; with batch norm each process normalises its own images.
        temperature: tau; the paper's is 0.2 for ViTs and 1 for ResNet-50.
        momentum: m at the start.
        frozen_patches: keep a vision transformer's patch projection as it is; other encoders have none.
        optim: optimiser and schedule.
    """

    num_views = 2
    preset = "byol"  # whose pair of views the paper takes
    compares_images = True

    def __init__(
        self,
        encoder: Encoder,
        projection: tuple[int, ...] = (512, 128),
        prediction: tuple[int, ...] = (512, 128),
        norm: Norm = "batch",
        temperature: float = 0.2,
        momentum: float = 0.99,
        frozen_patches: bool = True,
        optim: Optim = Optim(name="sgd", lr=0.3, weight_decay=5e-4),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not projection or not prediction or projection[-1] != prediction[-1]:
            raise UserError(f"projection {list(projection)}, prediction {list(prediction)}: wanted equal last widths")
        if not temperature > 0:
            raise UserError(f"temperature {temperature}: wanted more than 0")
        if not 0 <= momentum <= 1:
            raise UserError(f"momentum {momentum}: wanted a decay in [0, 1], such as 0.99")
        self.temperature, self.momentum = temperature, momentum
        if frozen_patches and isinstance(encoder.model, VisionTransformer | Eva):
            encoder.model.patch_embed.requires_grad_(False)
        self.projector = mlp(encoder.dim, projection, norm=norm, last_norm=True)
        self.predictor = mlp(projection[-1], prediction, norm=norm, last_norm=True)
        self.target = Momentum(encoder, self.projector)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Algorithm 1: ctr(q1, k2) + ctr(q2, k1)."""
        images = flatten_views(views)  # (2B, C, h, w)
        queries, wanted = self.predictor(self.projector(self.encoder(images))), self.target(images)  # (2B, d) each
        return {"loss": contrastive_loss(queries, wanted, self.temperature, key.group)}

    def after_step(self, progress: float) -> None:
        """The momentum network follows."""
        self.target.follow(self.encoder, self.projector, tau=cosine_decay(self.momentum, progress))

    def after_init(self) -> None:
        """The momentum network starts where the other one does."""
        self.target.follow(self.encoder, self.projector, tau=0)

    def chance_loss(self, batch_size: int) -> float:
        """4 tau ln N: every image has the same key."""
        return 4 * self.temperature * math.log(batch_size)


def contrastive_loss(queries: Tensor, wanted: Tensor, temperature: float, group: Tensor | None = None) -> Tensor:
    """2 tau (CE(q1 k2^T / tau) + CE(q2 k1^T / tau)) of algorithm 1, the mean over the images of this process: a scalar.

    The other images of a step are the negatives, those of all processes: the mean of the losses over the processes,
    each weighted by its share of the images, and its gradient, are those of one process on the joined batch. The factor
    2 tau keeps the gradient alike over temperatures (the paper's footnote 5).

    Args:
        queries: (2B, d) predictions, of the first views in rows 0..B-1, of the second ones in B..2B-1; any norm.
        wanted: (2B, d) projections of the momentum network, in the same order, without gradient; any norm.
        temperature: tau > 0.
        group: (B,) int64: images of one number, -1 aside, belong together and are no negatives of each other.

    Raises:
        UserError: there is one image only, hence no negative: the loss would be 0.
    """
    images = len(queries) // 2
    if images == 1 and world_size() == 1:
        raise UserError("the loss compares images: got a step of one image, wanted two or more; raise --batch-size")
    with float32(queries):
        q1, q2 = F.normalize(queries.float(), dim=1).chunk(2)  # (B, d) each
        both = F.normalize(wanted.float(), dim=1).chunk(2)
        everywhere = counts(images, per_image=1)
        k1, k2 = all_gather(torch.cat(both, dim=1), everywhere).chunk(2, dim=1)  # (N, d) each
        own = sum(everywhere[: rank()]) if world_size() > 1 else 0  # where this process's keys begin
        labels = own + torch.arange(images, device=queries.device)
        kin = None
        if group is not None:
            kin = (group[:, None] == all_gather(group, everywhere)) & (group >= 0)[:, None]  # (B, N) bool
            kin = kin.scatter(1, labels[:, None], False)
        losses = []
        for q, k in ((q1, k2), (q2, k1)):
            logits = q @ k.T / temperature  # (B, N)
            if kin is not None:
                logits = logits.masked_fill(kin, -math.inf)
            losses.append(F.cross_entropy(logits, labels))
        return 2 * temperature * torch.stack(losses).sum()
