"""DINO: self-distillation with no labels.

Caron et al. 2021, arXiv:2104.14294.

A student is to name the same prototypes for every view of an image as a teacher, its own slow average, does for the two
large views. Large and small crops (multi-crop): the small ones are shown to the student only. What keeps it from
collapsing is that the teacher's scores are centred (no prototype dominates) and sharpened (a low temperature); or, as
in DINOv2 (arXiv:2304.07193), assigned evenly by Sinkhorn-Knopp.

    symbol      here                  meaning
    g_s, g_t    encoder+head, teacher
    K           prototypes            outputs of the head
    tau_s       temperature           of the student
    tau_t       teacher_temperature   of the teacher; grows over the first `warmup` of the run
    C           center                running mean of the teacher's scores, (K,)
    P_s, P_t    student, teacher      distributions over prototypes, (B, K) for each view

Two options of DINOv2: iBOT (Zhou et al. 2022, arXiv:2111.07832), for transformers: the student sees the large views
without a block of their patches and names the prototypes of those, too; and KoLeo (Sablayrolles et al. 2019,
arXiv:1806.03198, eq. 3), which holds the features of a step apart. Unlike there, every image has a block, all blocks
have one number of patches, and KoLeo looks at the images of all processes.

Unlike the authors' code, the prototypes learn from the first step on (there they wait for an epoch).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key, uniform
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.vit import grid, take, tokens, vision_transformer
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Center, Momentum, Norm, Prototypes, by_size, float32, mlp, sinkhorn
from ssl_kit.training.distributed import all_gather, counts, rank, world_size
from ssl_kit.training.optim import Optim, cosine_decay

_STREAM = 1_300  # of core/random.py
_TINY = 1e-8  # of a distance, as DINOv2 has it
_LARGE = 2  # views that the teacher sees


class DINO(Method):
    """DINO with two large and further small crops.

    Args:
        encoder: of the student; where there are small crops it must take several sizes (a ViT with
            `dynamic_img_size: true`).
        small_crops: beside the two large ones, 0 to 8; their side is `--views.local-size`.
        prototypes: K; the paper's is 65,536.
        hidden: widths of the head before the prototypes; the last one is the bottleneck.
        norm: of the head; none in the paper for ViTs.
        temperature: tau_s.
        teacher_temperature: tau_t at the start and after the warm-up.
        warmup: fraction of the run in which it grows.
        balance: how the teacher is kept from collapsing.
        tau: of the teacher's weights at the start; grows to 1 by a cosine over the run.
        ibot: weight of the loss of hidden patches (DINOv2's is 1); 0 hides none. For VisionTransformers and Evas.
        hidden_patches: fraction of the patches of a large view that is hidden.
        koleo: weight of KoLeo (DINOv2's is 0.1).
        optim: optimiser and schedule.
    """

    num_views = 8
    preset = "dino"
    compares_images = True  # by the center
    chance_margin = 0.002  # the teacher is nearly uniform at first: healthy runs stay within 2 % of ln K for long
    temperature_now: Tensor

    def __init__(
        self,
        encoder: Encoder,
        small_crops: int = 6,
        prototypes: int = 4096,
        hidden: tuple[int, ...] = (512, 512, 128),
        norm: Norm | None = None,
        temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        balance: Literal["center", "sinkhorn"] = "center",
        tau: float = 0.996,
        ibot: float = 0.0,
        hidden_patches: float = 0.3,
        koleo: float = 0.0,
        optim: Optim = Optim(name="adamw", lr=5e-4, weight_decay=0.04, clip=3.0, final_lr=0.002),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not 0 <= small_crops <= 8:
            raise UserError(f"small_crops {small_crops}: wanted 0 to 8, beside two large ones")
        if min(temperature, *teacher_temperature) <= 0 or not 0 <= warmup <= 1 or not 0 <= tau <= 1:
            raise UserError("temperatures: wanted more than 0; warmup and tau: a fraction in [0, 1]")
        if small_crops and encoder.fixed_size:
            raise UserError(
                f"{encoder.name} takes one size only: give --method.small-crops 0, or a ViT "
                "--method.encoder.args '{dynamic_img_size: true}'"
            )
        if min(ibot, koleo) < 0 or not 0 < hidden_patches < 1:
            raise UserError("ibot, koleo: wanted weights of at least 0; hidden_patches: a fraction between 0 and 1")
        self.num_views = _LARGE + small_crops
        self.temperature, self.teacher_temperature, self.warmup = temperature, teacher_temperature, warmup
        self.tau, self.balance = tau, balance
        self.head = nn.Sequential(
            mlp(encoder.dim, hidden, norm=norm, activation=nn.GELU), Prototypes(hidden[-1], prototypes)
        )
        self.teacher = Momentum(encoder, self.head)
        self.center = Center(prototypes)
        self.ibot, self.hidden_patches, self.koleo = ibot, hidden_patches, koleo
        if ibot:
            width = vision_transformer(encoder).embed_dim
            self.patch_head = nn.Sequential(
                mlp(width, hidden, norm=norm, activation=nn.GELU), Prototypes(hidden[-1], prototypes)
            )
            self.patch_teacher, self.patch_center = Momentum(self.patch_head), Center(prototypes)
            self.patch_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("temperature_now", torch.tensor(teacher_temperature[0]))

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Eq. 3: the cross-entropy of every student's view with every teacher's, but for the same one.

        Returns:
            loss: nats.
            teacher_entropy: nats, of the teacher's mean distribution over this process's images: ln K when prototypes
                are used alike, 0 when all images have one.
            patches: nats, of the hidden patches, with `ibot`.
            koleo: with `koleo`.
        """
        large, seen = torch.cat(views[:_LARGE]), list[Tensor]()

        def score(images: Tensor) -> Tensor:
            seen.append(self.encoder(images))
            return self.head(seen[-1])

        patches: dict[str, Tensor] = {}
        if self.ibot:
            hidden = hidden_blocks(self.encoder, large, key, self.hidden_patches)  # (2B, M)
            sequence = tokens(self.encoder, large, instead=(hidden, self.patch_token))
            seen.append(self.encoder.head(sequence))
            student = [*self.head(seen[0]).chunk(_LARGE), *by_size(score, views[_LARGE:])]
            taught, theirs = self._taught(large, hidden)
            patches = {"patches": self._of_patches(take(sequence[:, -theirs.shape[1] :], hidden), theirs, hidden)}
        else:
            student, taught = by_size(score, views), self.teacher(large)
        teacher = self._assigned(taught, self.center).chunk(_LARGE)  # (B, K) each, rows sum to 1
        mean = torch.cat(teacher).mean(dim=0)
        entropy = -torch.special.xlogy(mean, mean).sum()
        total = dino_loss([scores / self.temperature for scores in student], list(teacher))
        if self.ibot:
            total = total + self.ibot * patches["patches"]
        if self.koleo:
            apart = torch.stack([koleo(part) for part in seen[0][: len(large)].chunk(_LARGE)]).sum()
            total, patches["koleo"] = total + self.koleo * apart, apart
        return {"loss": total, "teacher_entropy": entropy, **patches}

    def _assigned(self, scores: Tensor, center: Center) -> Tensor:
        """The teacher's scores (N, K) as distributions."""
        with float32(scores):
            if self.balance == "sinkhorn":
                return sinkhorn(scores, self.temperature_now)
            return (center(scores) / self.temperature_now).softmax(dim=1)

    @torch.no_grad()
    def _taught(self, large: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's scores of the large views (2B, K), and its last tokens of all their patches (2B, L, width)."""
        encoder, head = self.teacher.modules_in_row
        assert isinstance(encoder, Encoder)
        sequence = tokens(encoder, large)
        return head(encoder.head(sequence)), sequence[:, encoder.model.num_prefix_tokens :]

    def _of_patches(self, foretold: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """iBOT, eq. 2: the cross-entropy of the student's hidden patches (2B, M, width) with what the teacher sees."""
        wanted = self._assigned(self.patch_teacher(take(seen, hidden).flatten(0, 1)), self.patch_center)
        scores = self.patch_head(foretold.flatten(0, 1)) / self.temperature
        with float32(scores):
            return -(wanted * scores.float().log_softmax(dim=1)).sum(dim=1).mean()

    def after_step(self, progress: float) -> None:
        """The teacher follows, and its temperature grows."""
        self._follow(cosine_decay(self.tau, progress))
        first, last = self.teacher_temperature
        self.temperature_now.fill_(first + (last - first) * min(1.0, progress / max(self.warmup, 1e-9)))

    def after_init(self) -> None:
        """The teacher starts where the student does."""
        self._follow(0)

    def _follow(self, tau: float) -> None:
        self.teacher.follow(self.encoder, self.head, tau=tau)
        if self.ibot:
            self.patch_teacher.follow(self.patch_head, tau=tau)

    def chance_loss(self, batch_size: int) -> float | None:
        """ln K: every image, and every patch, has all prototypes alike. Unknown with KoLeo."""
        return None if self.koleo else (1 + self.ibot) * math.log(self.center.mean.numel())


def dino_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Eq. 3, the mean over pairs of different views and over images: a scalar, in nats.

    Args:
        student: V scores (B, K), divided by their temperature; the first ones are of the teacher's views.
        teacher: 2 distributions (B, K).
    """
    with float32(student[0]):
        logs = [scores.float().log_softmax(dim=1) for scores in student]
        pairs = [(p, log) for i, p in enumerate(teacher) for j, log in enumerate(logs) if i != j]
        return torch.stack([-(p * log).sum(dim=1).mean() for p, log in pairs]).mean()


def koleo(features: Tensor) -> Tensor:
    """KoLeo of this process's images among those of all: minus the mean log distance of unit rows to the nearest one.

    Args:
        features: (B, D), at least two images over all processes.
    """
    with float32(features):
        unit = F.normalize(features.float(), dim=1)
        everywhere = counts(len(unit), per_image=1)
        others = all_gather(unit, everywhere)
        own = sum(everywhere[: rank()]) if world_size() > 1 else 0
        cosines = (unit @ others.T).detach()
        cosines.diagonal(own).fill_(-2)
        distance = F.pairwise_distance(unit, others[cosines.argmax(dim=1)], eps=_TINY)
        return -(distance + _TINY).log().mean()


def hidden_blocks(encoder: Encoder, large: Tensor, key: Key, share: float) -> Tensor:
    """(2B, M) int64: of each large view the numbers of M patches around a place, an ellipse, drawn from the key."""
    rows, columns = grid(encoder, large)
    count = min(rows * columns - 1, max(1, round(share * rows * columns)))
    drawn = torch.cat([uniform(key, _STREAM + view, 3, large.device) for view in range(_LARGE)])  # (2B, 3)
    stretch = torch.exp((2 * drawn[:, 2:] - 1) * math.log(2))  # from half to twice as high as wide
    y = (torch.arange(rows, device=large.device) + 0.5) / rows - drawn[:, :1]
    x = (torch.arange(columns, device=large.device) + 0.5) / columns - drawn[:, 1:2]
    distance = (y / stretch).square()[:, :, None] + (x * stretch).square()[:, None]  # (2B, rows, columns)
    return distance.flatten(1).topk(count, largest=False).indices
