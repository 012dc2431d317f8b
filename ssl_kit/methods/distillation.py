"""Distillation: a small network learns to see what a large, finished one sees.

Features as targets: Romero et al. 2015 (FitNets), arXiv:1412.6550. The teacher sees the very view that the student
sees, and training is long: Beyer et al. 2022, arXiv:2106.05237 ("a good teacher is patient and consistent").

    symbol  here       meaning
    f       encoder    the student; any network, any image size
    T       teacher    a finished network, frozen
    t       wanted     T(x), pooled, less its mean over the training images: (B, D)
    W       head       linear, from the student's features to the teacher's

    pooled             sum |W f(x) - t|^2 over sum |t|^2: the share of the teacher's variance that is left unexplained
    patches            the same at each place of the feature maps, less the mean over the places of an image

Either is 1 for a student that says the mean to everything, and 0 for a copy of the teacher. Nothing is compared between
images, so that small batches do; nothing can collapse, since the targets stand still.

Without a teacher a network with random weights stands in for one: that is the experiment of Grill et al. 2020
(arXiv:2006.07733, section 2), where foretelling a random network gave 18.8 % where that network itself has 1.4 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.pretrained import load_pretrained
from ssl_kit.encoders.vit import positions
from ssl_kit.encoders.wrapped import in_eval_mode
from ssl_kit.methods.method import Method
from ssl_kit.methods.parts import float32
from ssl_kit.training.distributed import sum_of_all
from ssl_kit.training.optim import Optim

_MEASURED = 2_048  # images whose features by the teacher tell their mean and spread


class Distillation(Method):
    """Features of a frozen network as targets.

    Args:
        encoder: f.
        teacher: timm:NAME (weights on disk), or a run, an encoder or a timm folder; it keeps its own normalisation.
        teacher_size: side in pixels of what the teacher sees; by default its own. Views are enlarged or shrunk to it;
            for transformers of one size it is theirs.
        patches: weight of the patch features beside the pooled ones; 0 leaves them out.
        cache: let the teacher see each clean image once, before training, from which on the student's views of it
            have that one target: as many times faster as the teacher is dearer. Pooled features only.
        code: make W the encoder's timm classifier: features are then the teacher's, foretold, and as many.
        optim: optimiser and schedule.
    """

    num_views = 1
    preset = "mae"  # crops and mirrors: a teacher does not know jittered colours better than the student
    judged_by = ("knn", "linear", "finetune", "attentive")
    external: ClassVar[tuple[str, ...]] = ("teacher",)

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        encoder: Encoder,
        teacher: str | None = None,
        teacher_size: int | None = None,
        patches: float = 1.0,
        cache: bool = False,
        code: bool = False,
        optim: Optim = Optim(name="adamw", lr=1e-3, lr_per=None, weight_decay=0.05),  # noqa: B008 (frozen)
    ):
        super().__init__(encoder, optim)
        if patches < 0:
            raise UserError(f"patches {patches}: wanted a weight of at least 0")
        self.cache = cache
        if teacher is None:
            self.remark = (
                "no teacher: a network with random weights stands in for one; give --method.teacher timm:NAME or DIR"
            )
        self.teacher = _teacher(teacher, encoder, teacher_size).requires_grad_(False)
        self.patches = 0.0 if cache else patches
        if code:
            encoder.set_code(self.teacher.dim)
        self.head = nn.Identity() if code else nn.Linear(encoder.dim, self.teacher.dim)
        self.patch_head: nn.Module = nn.Identity()
        if self.patches:
            own, theirs = (
                _maps(network, torch.zeros(1, encoder.channels, *network.image_size)).shape[1]
                for network in (encoder, self.teacher)
            )
            self.patch_head = nn.Conv2d(own, theirs, 1)
        for weights in [*self.head.parameters(), *self.patch_head.parameters()]:
            nn.init.zeros_(weights)  # it begins by saying the mean: at chance, not beyond
        self.register_buffer("mean", torch.zeros(self.teacher.dim))
        self.register_buffer("variance", torch.ones(()))  # the mean of all dimensions'
        self._targets: Tensor | None = None  # (N, D) of all training images, with `cache`

    def prepare(self, embedded: Callable[[Encoder, int | None], Tensor]) -> None:
        """Mean and variance of the teacher's features, and all of them with `cache`."""
        features = embedded(self.teacher, None if self.cache else _MEASURED)  # NaN: could not be read
        known = features[features.isfinite().all(dim=1)]
        self.mean.copy_(known.mean(dim=0))
        self.variance.copy_(known.var(dim=0, correction=0).mean().clamp_min(1e-12))
        self._targets = features if self.cache else None
        self.teacher.to(self.mean.device)

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """The two shares of the teacher's variance, added; each stands beside them.

        Returns:
            loss: pooled + weight * patches.
            pooled, patches: in [0, 1] for a student that is better than the mean.
        """
        (images,) = views
        features = self.encoder.model.forward_features(self.encoder.normalise(images))
        foretold = self.head(self.encoder.head(features))  # (B, D)
        if self._targets is not None:
            self._targets = self._targets.to(images.device)  # once
            wanted, maps = self._targets[key.index], None
        else:
            wanted, maps = self._taught(images)
        with float32(foretold):
            wanted = (wanted.float() - self.mean) / self.variance.sqrt()
            known = wanted.isfinite().all(dim=1)  # (B,)
            missed = (foretold.float() - wanted.nan_to_num()).square().mean(dim=1)
            losses = {"pooled": (missed * known).mean()}
        if self.patches and maps is not None:
            own = self.patch_head(positions(self.encoder, features, images))
            losses["patches"] = unexplained(own, maps)
        return {"loss": losses["pooled"] + self.patches * losses.get("patches", 0.0), **losses}

    @torch.no_grad()
    def _taught(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the teacher makes of the student's views: pooled (B, D), and maps (B, C, h, w) if asked for."""
        if images.shape[2:] != self.teacher.image_size:
            images = F.interpolate(images, self.teacher.image_size, mode="bilinear", antialias=True).clamp(0, 1)
        features = self.teacher.model.forward_features(self.teacher.normalise(images))
        return self.teacher.head(features), positions(self.teacher, features, images) if self.patches else None

    def train(self, mode: bool = True) -> Distillation:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def chance_loss(self, batch_size: int) -> float:
        """Of the mean: 1 for the pooled features, and 1 for the patches."""
        return 1.0 + self.patches


def unexplained(foretold: Tensor, wanted: Tensor) -> Tensor:
    """The share of the variance between the places of maps that is not foretold: a scalar.

    Of several processes the mean of these, each weighted by its share of the images, is that of one process.

    Args:
        foretold: (B, C, h, w).
        wanted: (B, C, h', w'); of two grids each is averaged to the coarser one.
    """
    with float32(foretold):
        grid = min(foretold.shape[2], wanted.shape[2]), min(foretold.shape[3], wanted.shape[3])
        made, target = (  # (pooling has no deterministic gradient on a GPU)
            maps.float() if maps.shape[2:] == grid else F.adaptive_avg_pool2d(maps.float(), grid)
            for maps in (foretold, wanted)
        )
        made, target = (maps - maps.mean(dim=(2, 3), keepdim=True) for maps in (made, target))
        sums = sum_of_all(torch.stack([target.square().sum(), target.new_full((), len(target))]))
        return (made - target).square().sum() / len(made) / (sums[0] / sums[1]).clamp_min(1e-12)


def _teacher(given: str | None, encoder: Encoder, size: int | None) -> Encoder:
    """The teacher, which sees `size` pixels."""
    teacher = encoder.fresh(seed=1) if given is None else load_pretrained(given, encoder.channels)
    if size is not None and (size, size) != teacher.image_size:
        if teacher.fixed_size:
            side = teacher.image_size[0]
            raise UserError(f"teacher_size {size}: {teacher.name} takes images of {side} pixels only; leave it out")
        teacher.image_size = (size, size)
    return teacher


def _maps(network: Encoder, images: Tensor) -> Tensor:
    """(B, C, h, w) of the last layer, in evaluation mode."""
    with torch.no_grad(), in_eval_mode(network):
        return positions(network, network.model.forward_features(network.normalise(images)), images)
