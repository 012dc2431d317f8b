"""Pretrained models of others as encoders, with their own preprocessing, from what is on this disk. Nothing is fetched.

Weights are read from safetensors files only; a stranger's `config.json` says which of timm's models it is and with
which plain arguments, never where else to read, nor more than its weights bear out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import sha256
from ssl_kit.core.sealed import Entries, read_json
from ssl_kit.core.tensors import check_finite, read_tensors
from ssl_kit.encoders.encoder import Encoder, cached_weights, find_encoder
from ssl_kit.encoders.weights import CONFIG, RECORD, WEIGHTS, check_arguments, check_fits

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
    folder = Path(given)
    if (folder / CONFIG).is_file() and not (folder / RECORD).is_file():
        return _from_timm_folder(folder, channels)
    if not folder.exists():
        raise UserError(f"{given} is not on this disk; wanted timm:NAME, or a run, an encoder or a timm folder")
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
