"""Encoder: a timm model that normalises its own input, states its dimension and travels as a timm folder.

On disk an encoder is `config.json` + `model.safetensors` (what timm reads by itself) and `encoder.json` (ours: sha256
of the weights, provenance, preprocessing). Loading reads JSON and safetensors only: no pickle, no import path.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, atomic_folder, read_json, sha256, verify_file, write_json

CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "encoder.json"
_SMALL_IMAGE = 96  # pixels: below it a stride-4 stem leaves a ResNet too few positions (SimCLR appendix B.9 uses 32)
_LEAST_MATCHED = 0.95  # fraction of an encoder's weights that `--init` must find


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
        dim: length of a feature vector.
        sha256: of the weights file that this encoder was loaded from or last saved to, else None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "auto",
        args: dict[str, Any] | None = None,
        image_size: tuple[int, int] = (32, 32),
        channels: int = 3,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.25,),
    ):
        super().__init__()
        self.name = choose_name(image_size) if name == "auto" else name
        self.args = {"num_classes": 0, **(args or {})}
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.channels = channels
        model = _create_timm(self.name, self.args, self.image_size, channels)
        self.model: Any = model
        self.dim: int = self.args["num_classes"] or model.num_features
        self.sha256: str | None = None
        # not in the state dict: they travel as preprocessing in config.json, where timm expects them
        self.register_buffer("mean", _per_channel(mean, channels), persistent=False)
        self.register_buffer("std", _per_channel(std, channels), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to zero mean and unit variance over the training images."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] to (B, dim) float32: the pooled features before any classifier."""
        return self.model(self.normalise(images)).float()

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

    @property
    def fixed_size(self) -> bool:
        """Whether it takes images of `image_size` only: it has position embeddings made for that size."""
        return bool(_size_argument(self.name, self.image_size))

    @property
    def is_convolutional(self) -> bool:
        """Whether channels_last memory makes it faster: it holds 2-D convolutions other than a patch embedding."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 1

    def save(self, folder: Path | str, provenance: dict[str, Any] | None = None) -> Path:
        """Writes the encoder folder atomically, so that timm alone can load it, and sets `sha256`.

        Args:
            folder: replaced if it exists.
            provenance: what made it (command, data, commit, ...); JSON-able, kept in `encoder.json`.
        """
        folder = Path(folder)
        with atomic_folder(folder) as temporary:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
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
            write_json(temporary / RECORD, record)
        self.sha256 = digest
        return folder

    def preprocessing(self) -> dict[str, Any]:
        """How pixels become input: what a user of the features must repeat, in JSON."""
        return {
            "image_size": list(self.image_size),
            "channels": self.channels,
            "resize": "shorter side, antialiased bilinear, centre crop",
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def _timm_config(self) -> dict[str, Any]:
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
        """Reads an encoder folder that `save` wrote, in eval mode, after checking both files against `encoder.json`.

        Raises:
            DamagedError: a file is missing, or its sha256 is not the recorded one.
        """
        folder = Path(folder)
        record = read_json(folder / RECORD)
        try:
            recorded, recorded_config = record["sha256"], record["config_sha256"]
            preprocessing = record["preprocessing"]
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{folder / RECORD} lacks {error}; expected the record that ssl_kit writes") from error
        verify_file(folder, CONFIG, recorded_config)
        verify_file(folder, WEIGHTS, recorded)
        config = read_json(folder / CONFIG)
        height, width = preprocessing["image_size"]
        channels = preprocessing["channels"]
        args = {key: value for key, value in config["model_args"].items() if key not in ("in_chans", "img_size")}
        mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        encoder = cls(config["architecture"], args, (height, width), channels, mean, std)
        encoder.model.load_state_dict(_read_weights(folder / WEIGHTS), strict=True)
        encoder.sha256 = recorded
        return encoder.eval()

    def fresh(self, seed: int = 0) -> Encoder:
        """The same architecture and preprocessing with random weights: the untrained baseline. In eval mode."""
        mean, std = tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Encoder(self.name, self.args, self.image_size, self.channels, mean, std).eval()


@dataclass(frozen=True)
class Matched:
    """What `initialise` found: how many of an encoder's weights, by number of values, it could set."""

    fraction: float
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def initialise(encoder: Encoder, init: str) -> Matched:
    """Sets the encoder's weights from `timm:NAME` (weights that are on disk already) or from an encoder folder.

    Raises:
        UserError: fewer than 95 % of the encoder's weights were found with the right shape, or nothing is there.
    """
    found = _find_weights(encoder, init)
    own = encoder.model.state_dict()
    fits = {name: tensor for name, tensor in found.items() if name in own and own[name].shape == tensor.shape}
    missing = tuple(name for name in own if name not in fits)
    unused = tuple(name for name in found if name not in fits)
    fraction = sum(own[name].numel() for name in fits) / sum(tensor.numel() for tensor in own.values())
    if fraction < _LEAST_MATCHED:
        raise UserError(
            f"--init {init} matches {fraction:.1%} of the weights of {encoder.name}, at least {_LEAST_MATCHED:.0%} are "
            f"wanted (missing: {', '.join(missing[:3])}...); choose the same model with --method.encoder.name"
        )
    encoder.model.load_state_dict(fits, strict=False)
    return Matched(fraction, missing, unused)


def find_encoder(path: Path | str) -> Path:
    """The encoder folder meant by a run folder or an encoder folder."""
    path = Path(path)
    for folder in (path, path / "encoder"):
        if (folder / RECORD).is_file():
            return folder
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder or an encoder folder")
    if (path / "run.json").is_file():
        raise UserError(
            f"{path} is a run without an encoder yet; let `ssl-kit pretrain ... --run {path} --resume` finish"
        )
    raise UserError(f"{path} holds no {RECORD}; give a run folder or an encoder folder that ssl_kit wrote")


def choose_name(image_size: Sequence[int]) -> str:
    """The default architecture for images of this size, (height, width) in pixels."""
    return "resnet18_small" if min(image_size) < _SMALL_IMAGE else "resnet50"


def _create_timm(name: str, args: dict[str, Any], image_size: tuple[int, int], channels: int) -> Any:
    if not timm.is_model(name):  # also refuses `hf-hub:` and `local-dir:`, which would fetch or read elsewhere
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"no timm model is called {name!r}; nearest: {', '.join(near) or 'none'} (timm.list_models())")
    try:
        return timm.create_model(name, pretrained=False, in_chans=channels, **_size_argument(name, image_size), **args)
    except TypeError as error:
        raise UserError(f"timm's {name} does not take these arguments: {error}; see encoder.args") from error


def _size_argument(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
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


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}") from error


def _find_weights(encoder: Encoder, init: str) -> dict[str, Tensor]:
    if not init.startswith("timm:"):
        bare = Path(init) / WEIGHTS
        if bare.is_file() and not (Path(init) / RECORD).is_file():  # a timm folder from elsewhere
            return _read_weights(bare)
        folder = find_encoder(init)
        verify_file(folder, WEIGHTS, read_json(folder / RECORD)["sha256"])
        return _read_weights(folder / WEIGHTS)
    name = init.removeprefix("timm:")
    if not timm.is_model(name):
        raise UserError(f"--init {init}: no timm model is called {name!r}; see timm.list_models(pretrained=True)")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    file = try_to_load_from_cache(config.hf_hub_id, WEIGHTS) if config is not None and config.hf_hub_id else None
    if not isinstance(file, str):  # never fetched: nothing here uses the network
        raise UserError(f"--init {init}: no weights of {name} in timm's cache on this disk; give an encoder folder")
    local = {"file": file, "hf_hub_id": None}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=local, num_classes=0, in_chans=encoder.channels
    )
    return model.state_dict()
