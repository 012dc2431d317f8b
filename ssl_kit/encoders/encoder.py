"""Encoder: a timm model that normalises its own input, states its dimension and travels as a timm folder.

On disk an encoder is `config.json` + `model.safetensors` (what timm reads by itself) and `encoder.json` (ours: sha256
of the weights, provenance, preprocessing). Loading reads JSON and safetensors only: no pickle, no import path; what a
folder may say is judged in stored.py.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import atomic_folder, sha256, write_json, write_sealed
from ssl_kit.core.machine import choose_device, convolves
from ssl_kit.core.named import RECORD
from ssl_kit.core.reading import Reading
from ssl_kit.core.sealed import Entries
from ssl_kit.core.tensors import check_finite, read_tensors
from ssl_kit.encoders.weights import (
    CONFIG,
    SENSELESS,
    WEIGHTS,
    check_arguments,
    check_fits,
    check_sizes,
    read_stored,
    within_memory,
)

_HALVED = 48  # pixels: from there on a stem of stride 2 leaves enough to look at
_SMALL_IMAGE = 96  # pixels: below it a stride-4 stem leaves a ResNet too few positions (SimCLR appendix B.9 uses 32)


class Encoder(nn.Module):
    """Images (B, C, H, W), float in [0, 1], to features (B, dim), float32.

    Args:
        name: a timm model name, or "auto": resnet18_small below 96 px, resnet50 from there on.
        args: keyword arguments of the timm model, such as `{channels: [16, 32, 64, 128]}` or `{patch_size: 4}`.
        image_size: (height, width) in pixels that the encoder is meant for.
        channels: of the images, 3 (RGB) or any other number.
        mean: per-channel mean of the training images in [0, 1]; one number serves all channels.
        std: per-channel standard deviation likewise.

    Attributes:
        dim: length of a feature vector: of the code where the model has a classifier (`args.num_classes`).
        reading: which channels and values of stored images are meant; set by who has looked at the images.
        num_features: width of the pooled features.
        sha256: of the weights file that this encoder was loaded from or last saved to, else None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "auto",
        args: Entries | None = None,
        image_size: tuple[int, int] = (32, 32),
        channels: int = 3,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.25,),
    ):
        super().__init__()
        self.name, usual = choose_architecture(image_size) if name == "auto" else (name, {})
        self.args = {"num_classes": 0, **usual, **(args or {})}
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.channels = channels
        self.reading = Reading(channels)
        model = _create_timm(self.name, self.args, self.image_size, channels)
        self.model: Any = model
        self.num_features: int = model.head_hidden_size  # timm's num_features is the width before a head's own layers
        self.dim: int = self.args["num_classes"] or self.num_features
        self.sha256: str | None = None
        # not in the state dict: they travel as preprocessing in config.json, where timm expects them
        self.register_buffer("mean", _per_channel(mean, channels), persistent=False)
        self.register_buffer("std", _per_channel(std, channels), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to zero mean and unit variance over the training images."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] to (B, dim) float32: the pooled features, or the code if there is one."""
        return self.head(self.model.forward_features(self.normalise(images)))

    def head(self, features: Tensor) -> Tensor:
        """What `forward` makes of the model's last features: (B, dim) float32."""
        pooled = self.model.forward_head(features, pre_logits=True)
        return self.code(pooled) if self.args["num_classes"] else pooled.float()

    def pooled(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] to what enters the classifier, (B, num_features)."""
        return self.model.forward_head(self.model.forward_features(self.normalise(images)), pre_logits=True)

    def code(self, pooled: Tensor) -> Tensor:
        """The classifier of `pooled` features: (B, num_features) to (B, dim) float32, also under autocast.

        8 bits of a product in bfloat16 would leave ties among logits; in float32 the classifier costs next to nothing.
        """
        classifier = self.model.get_classifier()
        with torch.autocast(pooled.device.type, enabled=False):
            pooled = pooled.to(next(classifier.parameters()).dtype)
            if isinstance(classifier, nn.Conv2d):  # of 1 x 1, as DLA and DPN have it
                pooled = pooled[..., None, None]
            return classifier(pooled).flatten(1).float()

    def set_code(self, dim: int) -> None:
        """Gives the model a linear head of `dim` outputs as its timm classifier: then `forward` returns that code.

        With 0 the head is taken away, and `forward` returns the pooled features.

        Raises:
            UserError: the model has several classifiers, for distillation.
        """
        self.model.reset_classifier(dim)
        if dim and not isinstance(self.model.get_classifier(), nn.Module):
            raise UserError(f"{self.name} has several classifiers, a code needs one; choose another encoder.name")
        self.args["num_classes"], self.dim = dim, dim or self.num_features

    def layers(self, images: Tensor, last: int = 1) -> Tensor:
        """Concatenates the pooled outputs of the last `last` stages (CNN) or blocks (ViT): (B, sum of their widths).

        `last=1` is `forward`. Patch tokens are averaged; the class token leads where the model pools by it.
        """
        if last == 1:
            return self(images)
        return torch.cat([_pool(stage) for stage in self._intermediates(images, last)], dim=1).float()

    def _intermediates(self, images: Tensor, last: int) -> list[Tensor]:
        try:
            return self.model.forward_intermediates(self.normalise(images), indices=last, intermediates_only=True)
        except AssertionError as error:
            raise UserError(f"{self.name} has no {last} last layers to concatenate: {error}; ask for fewer") from error

    def train(self, mode: bool = True) -> Encoder:
        """Parts whose weights are all frozen stay in evaluation mode: their statistics do not move either."""
        super().train(mode)
        for part in self.model.modules():
            own = [*part.parameters(recurse=False)]
            if own and not any(weight.requires_grad for weight in own):
                part.training = False
        return self

    def least_bytes(self, size: tuple[int, int], precision: int = 2) -> int:
        """Bytes that one image of (height, width) takes at least: its pixels, and what the first convolution makes.

        Args:
            size: in pixels.
            precision: bytes of a number in the network; pixels are float32.
        """
        first = next((module for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)
        made = first.out_channels / math.prod(first.stride) if first is not None else 0
        return int(math.prod(size) * (4 * self.channels + precision * made))

    @property
    def fixed_size(self) -> bool:
        """Whether it takes images of `image_size` only: it has position embeddings made for that size."""
        return bool(_size_argument(self.name, self.image_size)) and not self.args.get("dynamic_img_size")

    @property
    def is_convolutional(self) -> bool:
        """Whether channels_last memory makes it faster: it holds 2-D convolutions other than a patch embedding."""
        return convolves(self.model)

    def save(self, folder: Path | str, provenance: Entries | None = None) -> Path:
        """Writes the encoder folder atomically, so that timm alone can load it, and sets `sha256`.

        Args:
            folder: replaced if it exists.
            provenance: what made it (command, data, commit, ...); JSON-able, kept in `encoder.json`.
        """
        folder = Path(folder)
        with atomic_folder(folder, record=RECORD) as temporary:
            # clones: safetensors refuses weights that two layers share, and timm asks for both names
            weights = {
                name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.model.state_dict().items()
            }
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            write_json(temporary / CONFIG, self._timm_config())
            digest = sha256(temporary / WEIGHTS)
            record = {
                "sha256": digest,
                "config_sha256": sha256(temporary / CONFIG),
                "dim": self.dim,
                "preprocessing": self.preprocessing(),
                "provenance": provenance or {},
            }
            write_sealed(temporary / RECORD, record)
        self.sha256 = digest
        return folder

    def preprocessing(self) -> Entries:
        """How pixels become input: what a user of the features must repeat, in JSON."""
        return {
            "image_size": list(self.image_size),
            "channels": self.channels,
            "resize": "shorter side, antialiased bilinear, centre crop",
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            **self.reading.to_json(),
        }

    def _timm_config(self) -> Entries:
        preprocessing = self.preprocessing()
        fixed = {"first_conv", "classifier", "pool_size", "fixed_input_size"}
        inherited = {key: value for key, value in self.model.pretrained_cfg.items() if key in fixed}
        return {
            "architecture": self.name,
            "num_classes": self.args["num_classes"],
            "num_features": self.model.num_features,
            "model_args": {**self.args, "in_chans": self.channels, **_size_argument(self.name, self.image_size)},
            "pretrained_cfg": {
                **inherited,
                "num_classes": self.args["num_classes"],
                "input_size": [self.channels, *self.image_size],
                "mean": preprocessing["mean"],
                "std": preprocessing["std"],
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "crop_mode": "center",
            },
        }

    @classmethod
    def load(cls, folder: Path | str) -> Encoder:
        """Reads an encoder folder that `save` wrote, in eval mode, after checking its files against `encoder.json`.

        Raises:
            DamagedError: a file is missing, altered, or not what an encoder can be; weights that do not fit, or NaN.
        """
        folder = Path(folder)
        stored = read_stored(folder)
        build = lambda: cls(*stored[:6])
        check_fits(lambda: build().model, folder / WEIGHTS)
        weights = read_tensors(folder / WEIGHTS)
        check_finite(weights, folder / WEIGHTS)
        encoder = build()
        encoder.model.load_state_dict(weights, strict=True)
        if encoder.dim != stored.dim:
            raise DamagedError(f"{folder / RECORD} says {stored.dim} features, the model has {encoder.dim}")
        encoder.sha256, encoder.reading = stored.sha256, stored.reading
        return encoder.eval()

    def fresh(self, seed: int = 0) -> Encoder:
        """The same architecture and preprocessing with random weights: the untrained baseline. In eval mode."""
        mean, std = tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Encoder(self.name, self.args, self.image_size, self.channels, mean, std).eval()
        made.reading = self.reading
        return made


def choose_architecture(image_size: Sequence[int], narrow: int = 0) -> tuple[str, Entries]:
    """The default timm name and arguments for images of this size, (height, width) in pixels, on this machine.

    A `narrow` one, 1, has half the width, where there is one; 2 halves the resolution too, from 48 pixels on. Without
    an accelerator networks are a quarter of the arithmetic: what learns nothing in an evening helps nobody.
    """
    alone = choose_device().value == "cpu"
    if min(image_size) < _SMALL_IMAGE:
        width = (32 if alone else 64) >> min(narrow, 1)
        args: Entries = {"channels": [width, 2 * width, 4 * width, 8 * width]} if width < 64 else {}
        return "resnet18_small", args | ({"stem_stride": 2} if narrow > 1 and min(image_size) >= _HALVED else {})
    return "resnet18" if alone or narrow else "resnet50", {}


def _create_timm(name: str, args: Entries, image_size: tuple[int, int], channels: int) -> Any:
    if not timm.is_model(name):  # also refuses `hf-hub:` and `local-dir:`, which would fetch or read elsewhere
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"no timm model is called {name!r}; nearest: {', '.join(near) or 'none'} (timm.list_models()); a network "
            "of your own must be given: --encoder MODULE:FUNCTION --allow MODULE, or "
            "ssl_kit.load_run(RUN, encoder=NETWORK)"
        )
    check_sizes(image_size, channels)
    check_arguments(args, f"encoder.args of {name}")
    try:
        if torch.empty(0).device.type != "meta":
            _afford(name, json.dumps(args), image_size, channels)
        return _build(name, args, image_size, channels)
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"timm's {name} does not take these arguments: {error}; see encoder.args") from error
    except SENSELESS as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"timm cannot build {name} with these arguments: {why}; see encoder.args") from error


def _build(name: str, args: Entries, image_size: tuple[int, int], channels: int) -> Any:
    return timm.create_model(name, pretrained=False, in_chans=channels, **_size_argument(name, image_size), **args)


@functools.lru_cache(1_024)  # 20 ms for a small network: once for each that is built
def _afford(name: str, args: str, image_size: tuple[int, int], channels: int) -> None:
    """Builds a model where tensors have no memory; `UserError` if this machine could not train it."""
    with torch.device("meta"), within_memory(f"{name} with these encoder.args"):
        _build(name, json.loads(args), image_size, channels)


def _size_argument(name: str, image_size: tuple[int, int]) -> Entries:
    # only models with position embeddings are built for one size; timm says so in their configuration
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"img_size": list(image_size)} if config is not None and config.fixed_input_size else {}


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    tensor = torch.tensor([float(value) for value in values])
    if tensor.numel() not in (1, channels):
        raise UserError(f"got {tensor.numel()} mean or std values for {channels} channels; wanted 1 or {channels}")
    return tensor.expand(channels).reshape(1, channels, 1, 1).clone()


def _pool(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features.mean(dim=1)
