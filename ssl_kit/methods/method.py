"""Method: the only base class. An encoder, an optimiser record, and one thing to write: `loss(views, key)`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.training.optim import Optim


class Method(pl.LightningModule):
    """Base of all pretraining methods.

    A subclass sets `num_views`, takes typed keyword arguments (the recipe's `init_args`) and implements `loss`. It
    receives tensors only: it never sees labels, files or evaluation.

    Args:
        encoder: what is trained and kept.
        optim: optimiser and schedule, in units of epochs and images.
    """

    num_views: ClassVar[int]

    def __init__(self, encoder: Encoder, optim: Optim):
        super().__init__()
        self.encoder = encoder
        self.optim = optim

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

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, h, w) in [0, 1] to the representation that is evaluated and exported, (B, D)."""
        return self.encoder(images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One step for Lightning: checks the number of views, then `loss`."""
        views = batch["views"]
        if len(views) != self.num_views:
            raise ValueError(f"{type(self).__name__} takes {self.num_views} views of each image, got {len(views)}")
        return self.loss(views, batch["key"])

    def configure_optimizers(self) -> Any:
        """Builds the optimiser and its schedule; the trainer knows the batch, the processes and the steps."""
        trainer = self.trainer
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        optimiser, schedule = self.optim.build(
            self,
            images_per_step=data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
            steps_per_epoch=data.steps_per_epoch / trainer.accumulate_grad_batches,
            total_steps=trainer.max_steps if trainer.max_steps > 0 else data.total_steps,
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def flatten_views(views: list[Tensor]) -> Tensor:
    """V views (B, C, h, w) to (V*B, C, h, w), view by view: one pass through the encoder serves all."""
    return torch.cat(views, dim=0)
