"""Pretrained models of others as encoders, with their own preprocessing, from what is on this disk. Nothing is fetched.

Weights are read from safetensors files only; a stranger's `config.json` says which of timm's models it is and with
which plain arguments, never where else to read, nor more than its weights bear out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from timm.models import group_parameters
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import sha256, verify_file
from ssl_kit.core.named import RECORD, check_pretrained, find_encoder
from ssl_kit.core.sealed import Entries, read_json, read_sealed
from ssl_kit.core.tensors import check_finite, read_tensors
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.weights import CONFIG, WEIGHTS, check_arguments, check_fits

_LEAST_MATCHED = 0.95  # fraction of an encoder's weights that `--init` must find
_GIVEN_APART = {"num_classes", "in_chans", "img_size"}  # by the encoder


def load_pretrained(given: str, channels: int = 3) -> Encoder:
    """A pretrained model that sees images of its own size, normalised its own way; in eval mode.

    Of the original preprocessing the crop is left out: like every other encoder it is shown all of an image.

    Args:
        given: `timm:NAME`, weights that timm has cached on this disk; or a run folder, an encoder folder, or a timm
            folder (config.json and model.safetensors), whose classifier, if it has one, is taken off.
        channels: of the images. timm adapts the first layer of its models where they were trained on another number;
            mean and standard deviation are then the average of theirs.

    Returns:
        The encoder; its `sha256` is that of the weights file.

    Raises:
        UserError: nothing of that name is on this disk, it is not what it says, or it takes other channels.
    """
    if given.startswith("timm:"):
        name = given.removeprefix("timm:")
        file = cached_weights(name, given)
        config = timm.get_pretrained_cfg(name)
        assert config is not None, "cached_weights has refused names without one"
        return _loaded(given, name, {}, config.to_dict(), file, channels)
    check_pretrained(given)
    folder = Path(given)
    if (folder / CONFIG).is_file() and not (folder / RECORD).is_file():
        return _from_timm_folder(folder, channels)
    encoder = Encoder.load(find_encoder(folder))
    if encoder.channels != channels:
        raise UserError(f"{given} takes images of {encoder.channels} channels, here they have {channels}")
    return encoder


def _from_timm_folder(folder: Path, channels: int) -> Encoder:
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has a {CONFIG} but no {WEIGHTS}; other formats of weights are not read")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UserError(f"{folder / CONFIG} names no architecture; wanted the {CONFIG} of a timm folder")
    described, args = config.get("pretrained_cfg"), config.get("model_args") or {}
    if not isinstance(described, dict) or not isinstance(args, dict):
        raise UserError(f"{folder / CONFIG} lacks pretrained_cfg; wanted the {CONFIG} of a timm folder")
    check_arguments(args, f"{folder / CONFIG}: model_args")
    described = {**described, "num_classes": config.get("num_classes", described.get("num_classes"))}
    args = {key: value for key, value in args.items() if key not in _GIVEN_APART}
    return _loaded(str(folder), config["architecture"], args, described, folder / WEIGHTS, channels, foreign=True)


def _loaded(
    given: str,
    name: str,
    args: Entries,
    described: Entries,
    file: Path,
    channels: int,
    *,
    foreign: bool = False,
) -> Encoder:
    """The model `name`, built as it was trained, filled from `file`; then without its classifier."""
    try:
        source_channels, height, width = (int(size) for size in described["input_size"])
        mean, std = (tuple(float(value) for value in described[key]) for key in ("mean", "std"))
        num_classes = int(described["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{given}: input_size, mean, std or num_classes are missing or odd: {error}") from error
    trained = {**args, "num_classes": num_classes}  # only then does timm insist on every weight
    if foreign:
        check_fits(lambda: Encoder(name, trained, (height, width), source_channels).model, file)
        check_finite(read_tensors(file), file)
    if channels != source_channels:
        mean, std = _average(mean), _average(std)
    encoder = Encoder(name, args, (height, width), channels, mean, std)
    # from this file, in timm's own format, whatever timm knows of the origin of its weights
    local: Entries = {"file": str(file), "source": "", "hf_hub_id": None, "custom_load": False}
    local |= {"num_classes": num_classes, "input_size": (source_channels, height, width)}  # sizes position embeddings
    try:
        model: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=local, in_chans=channels, **trained
        )
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{given}: {file} does not hold the weights of {name}: {str(error)[:200]}") from error
    model.reset_classifier(0)
    encoder.model = model
    encoder.sha256 = sha256(file)
    return encoder.eval()


def _average(values: Sequence[float]) -> tuple[float, ...]:
    return (sum(values) / len(values),)


def initialise(encoder: Encoder, init: str) -> float:
    """Sets the encoder's weights from `timm:NAME` (weights that are on disk already) or from an encoder folder.

    Returns:
        The fraction of the encoder's weights, by number of values, that were found.

    Raises:
        UserError: fewer than 95 % of the encoder's weights were found with the right shape, some are NaN, or nothing is
            there.
    """
    found = _find_weights(encoder, init)
    own = encoder.model.state_dict()
    fits = {name: tensor for name, tensor in found.items() if name in own and _alike(own[name], tensor)}
    check_finite(fits, init)
    missing = [name for name in own if name not in fits]
    fraction = sum(own[name].numel() for name in fits) / sum(tensor.numel() for tensor in own.values())
    if fraction < _LEAST_MATCHED:
        raise UserError(
            f"--init {init} matches {fraction:.1%} of the weights of {encoder.name}, at least {_LEAST_MATCHED:.0%} are "
            f"wanted (missing: {', '.join(missing[:3])}...); choose the same model with --method.encoder.name"
        )
    encoder.model.load_state_dict(fits, strict=False)
    return fraction


def _alike(own: Tensor, found: Tensor) -> bool:
    """Whether one can be set to the other: float16 may become float32, whole numbers may not."""
    return own.shape == found.shape and own.is_floating_point() == found.is_floating_point()


def _find_weights(encoder: Encoder, init: str) -> dict[str, Tensor]:
    if not init.startswith("timm:"):
        check_pretrained(init)
        bare = Path(init) / WEIGHTS
        if bare.is_file() and not (Path(init) / RECORD).is_file():  # a timm folder from elsewhere
            return read_tensors(bare)
        folder = find_encoder(init)
        verify_file(folder, WEIGHTS, str(read_sealed(folder / RECORD).get("sha256")))
        return read_tensors(folder / WEIGHTS)
    name = init.removeprefix("timm:")
    local = {"file": str(cached_weights(name, f"--init {init}")), "hf_hub_id": None, "custom_load": False}
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=local, num_classes=0, in_chans=encoder.channels
    )
    return model.state_dict()


def cached_weights(name: str, given: str) -> Path:
    """The safetensors file of a timm model's weights in timm's cache on this disk; it is never fetched.

    Args:
        name: of the model, with or without a tag.
        given: what the user typed, for the message.

    Raises:
        UserError: there is no such model, or no such file.
    """
    if not timm.is_model(name):
        raise UserError(f"{given}: no timm model is called {name!r}; see timm.list_models(pretrained=True)")
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:  # the model is known, the tag behind its dot is not
        raise UserError(
            f"{given}: {error} See timm.list_models('{name.partition('.')[0]}*', pretrained=True)"
        ) from error
    file = try_to_load_from_cache(config.hf_hub_id, WEIGHTS) if config is not None and config.hf_hub_id else None
    if not isinstance(file, str):  # never fetched: nothing here uses the network
        raise UserError(f"{given}: no weights of {name} in timm's cache on this disk; give an encoder folder")
    return Path(file)


def freeze(encoder: Encoder, blocks: int) -> float:
    """Lets the stem and the lowest blocks of an encoder learn nothing, as timm counts its layers (`group_matcher`).

    Args:
        encoder: of a timm model.
        blocks: that are frozen; 0 freezes the stem alone.

    Returns:
        The fraction of the encoder's weights, by number of values, that is frozen.

    Raises:
        UserError: its layers have no order, or nothing would be left to learn.
    """
    matcher: Callable[..., dict[str, object]] | None = getattr(encoder.model, "group_matcher", None)
    if matcher is None:
        raise UserError(f"--freeze {blocks}: {encoder.name} does not name its layers; leave it out")
    layers = group_parameters(encoder.model, matcher(coarse=False), reverse=True)  # weight's name -> layer
    weights = dict(encoder.model.named_parameters())
    top = max(layers.values())
    if not 0 <= blocks < top:
        raise UserError(
            f"--freeze {blocks}: {encoder.name} has {top} blocks above its stem; wanted fewer, or leave it out"
        )
    frozen = [weights[name] for name, layer in layers.items() if layer <= blocks]
    for weight in frozen:
        weight.requires_grad_(False)
    encoder.train(encoder.training)
    return sum(weight.numel() for weight in frozen) / sum(weight.numel() for weight in weights.values())
