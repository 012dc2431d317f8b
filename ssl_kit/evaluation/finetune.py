"""Fine-tuning: the encoder and a linear classifier on top, trained end to end; the epoch is chosen on held-out images.

The classifier is the encoder's own timm classifier, so that the result is one timm folder whose output are logits.
MixUp (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) are torchvision's, LoRA
(Hu et al. 2021, arXiv:2106.09685) is peft's.
"""

from __future__ import annotations

import re

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.training.checkpoint import State
from ssl_kit.training.chunked import Batch, data_of
from ssl_kit.training.optim import Optim
from ssl_kit.views.recipe import plain

_ADAPTED = r"blocks\.\d+\.attn\.(qkv|proj)"  # of a timm VisionTransformer


class FineTune(pl.LightningModule):
    """Cross-entropy of the encoder's logits.

    Args:
        encoder: gets a new classifier of `num_classes` outputs; everything is trained, unless `lora` says otherwise.
        num_classes: C.
        optim: optimiser and schedule.
        mixup: alpha of MixUp's Beta distribution; 0 is off. With `cutmix` one of them is drawn per batch.
        cutmix: alpha of CutMix's.
        smoothing: of the labels, in [0, 1).
        lora: rank of adapters that are trained in the place of all but the classifier; 0 is none. `merge_lora` ends it.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        optim: Optim,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        lora: int = 0,
    ):
        super().__init__()
        encoder.set_code(num_classes)
        if lora:
            add_lora(encoder, lora)
        classifier = encoder.model.get_classifier()
        torch.nn.init.trunc_normal_(classifier.weight, std=0.01)
        torch.nn.init.zeros_(classifier.bias)
        self.encoder, self.optim, self.smoothing = encoder, optim, smoothing
        mixes: list[nn.Module] = []
        if mixup > 0:
            mixes.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            mixes.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch: its one view and its labels, all known."""
        images, labels = batch["views"][0], batch["label"]
        if self.mix is not None:
            images, labels = self.mix(images, labels)  # labels become (B, C) shares
            images = images.contiguous(memory_format=torch.channels_last) if self.encoder.is_convolutional else images
        return F.cross_entropy(self.encoder(images), labels, label_smoothing=self.smoothing)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser and its schedule."""
        return self.optim.configured(self)


def check_lora(encoder: Encoder) -> None:
    """Whether `add_lora` can do its work.

    Raises:
        UserError: the `lora` extra is missing, or the encoder is no timm VisionTransformer.
    """
    names = [name for name, _ in encoder.model.named_modules() if re.fullmatch(_ADAPTED, name)]
    # other transformers of timm have such names too, but some (BEiT) read `qkv.weight` past the adapted module
    if not isinstance(encoder.model, VisionTransformer) or not names:
        raise UserError(
            f"--lora adapts the attention of timm's VisionTransformers, and {encoder.name} has none: leave --lora out, "
            "all weights are trained then"
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"--lora needs the package {error.name}: pip install 'ssl-kit[lora]'") from error


def add_lora(encoder: Encoder, rank: int) -> None:
    """Puts B A beside the weight W of every attention's qkv and proj, and freezes all but B, A and the classifier.

    A is (rank, in), random; B is (out, rank), zero at first, so no output changes. The layer gives (W + B A) x + b.

    Args:
        encoder: with its classifier; changed in place.
        rank: at least 1.

    Raises:
        UserError: see `check_lora`.
    """
    check_lora(encoder)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_ADAPTED)  # peft scales B A by alpha / r
    inject_adapter_in_model(config, encoder.model)
    encoder.model.get_classifier().requires_grad_(True)


def merge_lora(encoder: Encoder) -> None:
    """Adds B A to the weights and takes the adapters out: an ordinary timm model again, with the same outputs."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            encoder.model.set_submodule(name, module.get_base_layer())
    encoder.model.requires_grad_(True)


def predict(encoder: Encoder, source: Source, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes, (N,) int64 each, of the images that can be decoded, seen as evaluation sees them."""
    found, labels = probabilities(encoder, source, label)
    return found.argmax(axis=1), labels


def probabilities(encoder: Encoder, source: Source, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the classes, (N, C) float32, rows sum to 1, and true classes (N,) int64; as `predict`."""
    logits = embed(encoder, source, view=plain(encoder.image_size), label=label)
    return torch.from_numpy(logits.vectors).softmax(dim=1).numpy(), logits.labels


class BestEpoch(pl.Callback):
    """Scores held-out images at the end of epochs, keeps the best weights, and stops when nothing gets better.

    Args:
        held_out: labelled images that are not trained on.
        every: epochs between two looks.
        patience: looks without a better score that end the training; None never does.

    Attributes:
        scores: top-1 of every look so far.
    """

    def __init__(self, held_out: Source, every: int = 1, patience: int | None = None):
        self.held_out, self.every, self.patience = held_out, every, patience
        self.scores: list[float] = []
        self.best: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Looks when an epoch is over, and at the last step."""
        steps_per_epoch = data_of(trainer).steps_per_epoch
        step, between = trainer.global_step, self.every * steps_per_epoch
        if step % between and step != trainer.max_steps:
            return
        assert isinstance(pl_module, FineTune)
        predicted, labels = predict(pl_module.encoder, self.held_out, "held-out images")
        self.scores.append(float((predicted == labels).mean()))
        if self.scores[-1] > max(self.scores[:-1], default=-1.0):
            self.best = {name: value.detach().cpu().clone() for name, value in pl_module.encoder.state_dict().items()}
        epoch, score = step / steps_per_epoch, self.scores[-1]
        say(f"epoch {epoch:.0f} of {trainer.max_steps / steps_per_epoch:.0f}: top-1 of held-out images {score:.3f}")
        trainer.should_stop |= self._exhausted()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A training that was ended by its patience is over when it is resumed, too."""
        trainer.should_stop |= self._exhausted()

    def _exhausted(self) -> bool:
        since = len(self.scores) - 1 - int(np.argmax(self.scores)) if self.scores else 0
        return self.patience is not None and since >= self.patience

    def restore(self, encoder: Encoder) -> None:
        """Puts the best weights back."""
        encoder.load_state_dict(self.best)

    def state_dict(self) -> State:
        """Scores and weights."""
        return {"scores": self.scores, "best": self.best}

    def load_state_dict(self, state_dict: State) -> None:
        """Continues with them."""
        self.scores, self.best = state_dict["scores"], state_dict["best"]
