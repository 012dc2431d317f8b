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

Unlike the authors' code, the prototypes learn from the first step on (there they wait for an epoch).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import Center, Momentum, Norm, Prototypes, by_size, float32, mlp, sinkhorn
from ssl_kit.training.optim import Optim, cosine_decay

_LARGE = 2  # views that the teacher sees


class DINO(Method):
    """DINO with two large and further small crops.

    Args:
        encoder: of the student; where there are small crops it must take several sizes (a ViT with
            `dynamic_img_size: true`).
        small_crops: beside the two large ones, 0 to 8; their side is `--views.local_size`.
        prototypes: K; the paper's is 65,536.
        hidden: widths of the head before the prototypes; the last one is the bottleneck.
        norm: of the head; none in the paper for ViTs.
        temperature: tau_s.
        teacher_temperature: tau_t at the start and after the warm-up.
        warmup: fraction of the run in which it grows.
        balance: how the teacher is kept from collapsing.
        tau: of the teacher's weights at the start; grows to 1 by a cosine over the run.
        optim: optimiser and schedule.
    """

    num_views = 8
    preset = "dino"
    compares_images = True  # by the center
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
        optim: Optim = Optim(name="adamw", lr=5e-4, weight_decay=0.04, clip=3.0, final_lr=0.002),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if not 0 <= small_crops <= 8:
            raise UserError(f"small_crops {small_crops}: wanted 0 to 8, beside two large ones")
        if min(temperature, *teacher_temperature) <= 0 or not 0 <= warmup <= 1 or not 0 <= tau <= 1:
            raise UserError("temperatures: wanted more than 0; warmup and tau: a fraction in [0, 1]")
        if small_crops and encoder.fixed_size:
            raise UserError(
                f"{encoder.name} takes one size only: give --method.small_crops 0, or a ViT "
                "--method.encoder.args '{dynamic_img_size: true}'"
            )
        self.num_views = _LARGE + small_crops
        self.temperature, self.teacher_temperature, self.warmup = temperature, teacher_temperature, warmup
        self.tau, self.balance = tau, balance
        self.head = nn.Sequential(
            mlp(encoder.dim, hidden, norm=norm, activation=nn.GELU), Prototypes(hidden[-1], prototypes)
        )
        self.teacher = Momentum(encoder, self.head)
        self.center = Center(prototypes)
        self.register_buffer("temperature_now", torch.tensor(teacher_temperature[0]))

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """Eq. 3: the cross-entropy of every student's view with every teacher's, but for the same one.

        Returns:
            loss: nats.
            teacher_entropy: nats, of the teacher's mean distribution over this process's images: ln K when prototypes
                are used alike, 0 when all images have one.
        """
        student = [scores / self.temperature for scores in by_size(lambda x: self.head(self.encoder(x)), views)]
        large = torch.cat(views[:_LARGE])
        teacher = self._assigned(self.teacher(large)).chunk(_LARGE)  # (B, K) each, rows sum to 1
        mean = torch.cat(teacher).mean(dim=0)
        entropy = -torch.special.xlogy(mean, mean).sum()
        return {"loss": dino_loss(student, list(teacher)), "teacher_entropy": entropy}

    def _assigned(self, scores: Tensor) -> Tensor:
        """The teacher's scores (2B, K) as distributions."""
        with float32(scores):
            if self.balance == "sinkhorn":
                return sinkhorn(scores, self.temperature_now)
            return (self.center(scores) / self.temperature_now).softmax(dim=1)

    def after_step(self, progress: float) -> None:
        """The teacher follows, and its temperature grows."""
        self.teacher.follow(self.encoder, self.head, tau=cosine_decay(self.tau, progress))
        first, last = self.teacher_temperature
        self.temperature_now.fill_(first + (last - first) * min(1.0, progress / max(self.warmup, 1e-9)))

    def after_init(self) -> None:
        """The teacher starts where the student does."""
        self.teacher.follow(self.encoder, self.head, tau=0)

    def chance_loss(self, batch_size: int) -> float:
        """ln K: every image has all prototypes alike."""
        return math.log(self.center.mean.numel())


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
