"""Method: the only base class. An encoder, an optimiser record, and one thing to write: `loss(views, key)`."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder, choose_architecture
from ssl_kit.training.checkpoint import State
from ssl_kit.training.chunked import Batch, Chunkable, chunked, no_chunks
from ssl_kit.training.distributed import share_weight
from ssl_kit.training.optim import Optim


class Picture(NamedTuple):
    """What a method shows of itself: `grid` (R, K, C, h, w) in [0, 1], R rows of K images.

    `columns` are the K captions (or none), `caption` is a sentence that says what is seen and in which units.
    """

    grid: Tensor
    columns: tuple[str, ...]
    caption: str


class Method(pl.LightningModule):
    """Base of all pretraining methods.

    A subclass sets `num_views`, takes typed keyword arguments (the recipe's `init_args`) and implements `loss`. It
    receives tensors only: it never sees files or evaluation, nor labels unless it says so. What happens around a step,
    and in which order, is told in `training/loop.py`.

    Args:
        encoder: what is trained and kept.
        optim: optimiser and schedule, in units of epochs and images.

    Attributes:
        num_views: how many views of each image `loss` takes.
        preset: of the views, where a recipe names none.
        judged_by: evaluations that judge it, the first one measured is the headline; verdict and report ask this.
        compares_images: whether the loss of an image depends on the other images of its step.
        uses_labels: whether `loss` takes the labels as well, `loss(views, key, labels)`: (B,) int64, -1 where unknown
            or held out. The run says so.
        chance_margin: share of `chance_loss` that a loss must have come down by to count as learning.
        external: names of frozen modules (a teacher of others) that are left out of checkpoints and averages; a
            resumed run must bring the same ones.
        remark: what a user should know before such a run begins; nothing by default.
        shows: what to look for in its `pictures`, a sentence or two for the report.
    """

    num_views: int
    preset: ClassVar[Any] = "simclr"  # a word of views/recipe.py; the VAE's is a property
    judged_by: ClassVar[tuple[str, ...]] = ("knn", "linear", "finetune", "attentive")
    compares_images: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    chance_margin: ClassVar[float] = 0.05
    external: ClassVar[tuple[str, ...]] = ()
    remark: str = ""
    shows: ClassVar[str] = (
        "Each column is one image: the original on top, below it the views the method learns from. Could you tell that "
        "they belong together?"
    )

    def __init__(self, encoder: Encoder, optim: Optim):
        super().__init__()
        self.encoder = encoder
        self.optim = optim

    @classmethod
    def default_encoder(cls, image_size: tuple[int, int]) -> tuple[str, dict[str, object]]:
        """The timm name and arguments where a recipe leaves the encoder open, for images of (height, width) pixels."""
        return choose_architecture(image_size)

    @classmethod
    def smaller_encoder(cls, image_size: tuple[int, int], narrow: int) -> tuple[str, dict[str, object]]:
        """The same where the time is short: `narrow` 1, and 2; a method's own choice has no smaller one by itself."""
        own = cls.default_encoder(image_size)
        return choose_architecture(image_size, narrow) if own == choose_architecture(image_size) else own

    @property
    def takes_groups(self) -> bool:
        """Whether another image of its group may stand for an image in all views but the first."""
        return self.num_views > 1

    @abstractmethod
    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        """The training objective.

        Args:
            views: `num_views` tensors (B, C, h, w), float in [0, 1]; row i of each shows the same image.
            key: of the batch; masks and noise are drawn from it, so that they do not depend on the process.

        Returns:
            "loss", a scalar that is minimised, and any other scalars worth a curve.
        """

    def chance_loss(self, batch_size: int) -> float | None:
        """The loss of a collapsed model for `batch_size` images a step (over all processes); None if unknown."""
        return None

    def after_step(self, progress: float) -> None:
        """Once after each optimiser step that was not held back: a teacher, a temperature moves on.

        On accelerators it is asked after every step, and buffers and frozen parameters are put back where the step was
        held: keep all state in those. What moves with the images of a batch moves in `loss`, while training.

        Args:
            progress: fraction of the run that is over, in [0, 1]; it never falls.
        """

    vars(after_step).update(idle=True)  # where a method leaves it so, nothing is kept to be put back

    def prepare(self, embedded: Callable[[Encoder, int | None], Tensor]) -> None:
        """Once before the first step of a sitting, on the device of the training; what it takes is training time.

        A trial of what a step costs (`--minutes`) calls it too, with random numbers for features.

        Args:
            embedded: what a frozen encoder makes of clean images of its own size, (n, dim) on the CPU: of so many
                training images, evenly spread, or of all (None), row i then of image `key.index` i; NaN where an image
                cannot be read. All processes must ask.
        """

    def after_init(self) -> None:
        """After `--init` has set the encoder's weights: a teacher starts from them, too."""

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, h, w) in [0, 1] to the representation that is evaluated and exported, (B, D)."""
        return self.encoder(images)

    def pictures(self, views: list[Tensor], key: Key) -> dict[str, Picture]:
        """What the method makes of a few images, by file name: reconstructions, samples, ... None by default.

        Args:
            views: as `loss` takes them, of a few fixed images.
            key: likewise.
        """
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step for Lightning: `loss`; where the batch comes in chunks, `contrast` of the projections of all chunks.

        Means over this process's images are weighted so that averaging them, and gradients, over processes is right
        for slices of unequal size.
        """
        views, key = batch["views"], batch["key"]
        if "chunks" in batch:
            if not isinstance(self, Chunkable):
                raise UserError(no_chunks(type(self).__name__))
            groups: list[Tensor | None] = []  # of the chunks as they are projected: some images may have been replaced

            def project(part: list[Tensor], part_key: Key) -> Tensor:
                groups.append(part_key.group)
                return self.project(part, part_key)

            z = chunked(self, project, batch["chunks"], self.num_views)
            known = [group for group in groups if group is not None]
            losses = self.contrast(z, torch.cat(known)) if known else self.contrast(z)
        elif len(views) == self.num_views:
            losses = self.loss(views, key, *([batch["label"]] if self.uses_labels else []))
        else:
            raise ValueError(f"{type(self).__name__} takes {self.num_views} views of each image, got {len(views)}")
        weight = share_weight(len(key.index))
        return {name: value * weight for name, value in losses.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights and buffers, but for those of the `external` modules."""
        state: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        for name in [name for name in state if self._is_external(name)]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """Takes what `state_dict` gave; `external` modules stay as they are."""
        own = {name: value for name, value in super().state_dict().items() if self._is_external(name)}
        return super().load_state_dict({**own, **state_dict}, strict, assign)

    def _is_external(self, name: str) -> bool:
        return name.partition(".")[0] in self.external

    def on_save_checkpoint(self, checkpoint: State) -> None:
        """Adds the sha256 of the `external` modules, which are not in the checkpoint."""
        checkpoint["external"] = {name: fingerprint(self.get_submodule(name)) for name in self.external}

    def on_load_checkpoint(self, checkpoint: State) -> None:
        """Raises `UserError` when an `external` module is another one than the run was begun with."""
        for name, begun in checkpoint["external"].items():
            if fingerprint(self.get_submodule(name)) != begun:
                raise UserError(f"--resume: {name} has other weights than the run was begun with ({begun[:12]})")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule."""
        return self.optim.configured(self)


def fingerprint(module: nn.Module) -> str:
    """The sha256 of a module's weights and buffers: of their names, types and bytes."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
