"""What an encoder folder says of itself, judged before a model is built: a stranger's files may name only a model.

Two files of JSON describe an encoder: `config.json`, which timm reads by itself, and our sealed `encoder.json`. From
them come the name of a timm model, plain arguments of it and the preprocessing; never a path, an address, an import or
a size that the weights do not bear out.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import verify_file
from ssl_kit.core.named import RECORD
from ssl_kit.core.reading import MAX_CHANNELS, Reading, read_reading
from ssl_kit.core.sealed import Entries, read_json, read_sealed
from ssl_kit.core.tensors import count_values, tensor_shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Arguments of timm's factory, not of a model: paths, downloads, switches; those of `_OURS` are given by the encoder
_FACTORY = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"}
_FACTORY |= {"pretrained_model_args", "pretrained_custom_load", "checkpoint_path", "cache_dir", "scriptable"}
_FACTORY |= {"exportable", "no_jit", "features_only", "feature_cfg", "feature_cls", "out_indices", "model_cfg"}
_FACTORY |= {"kwargs_filter", "pruned", "device", "dtype"}
_OURS = ("in_chans", "img_size")
# Where timm itself would look for other weights than the folder's
_ELSEWHERE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
_LARGEST = 2**16  # of any number among the arguments: timm has no width, depth or count near it
_SPARE = 2**23  # numbers that a model may register beside those that it keeps: masks and positions of few MB
_MOST_ARGUMENTS, _LONGEST_TEXT, _DEEPEST = 1_000, 200, 4
MAX_SIDE = 4_096
_TRAINED = 16  # bytes of a parameter: itself, its gradient and two moments of Adam in float32
_MOST_MODULES = 5_000  # the deepest models of timm have 1,800
# What timm's models raise for arguments that make no sense (there is no common base class)
SENSELESS = (
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
)


class Stored(NamedTuple):
    """A checked description: model, preprocessing, length of its features, sha256 of the weights."""

    name: str
    args: Entries
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dim: int
    sha256: str
    reading: Reading


def read_stored(folder: Path) -> Stored:
    """Reads the description of an encoder folder; its files have the sha256 that its record says.

    Raises:
        DamagedError: a file is missing or altered, or says what no encoder can be.
    """
    record = read_sealed(folder / RECORD)
    for file, key in ((CONFIG, "config_sha256"), (WEIGHTS, "sha256")):
        if not isinstance(record.get(key), str):
            raise DamagedError(f"{folder / RECORD} lacks {key!r}; expected the record that ssl_kit writes")
        verify_file(folder, file, record[key])
    config, dim, seen = read_json(folder / CONFIG), record.get("dim"), record.get("preprocessing")
    if not isinstance(config, dict) or not isinstance(seen, dict) or type(dim) is not int:
        raise DamagedError(f"{folder}: {CONFIG} or {RECORD} lacks the model, its dim or its preprocessing")
    name, args = config.get("architecture"), config.get("model_args")
    if not isinstance(name, str) or not isinstance(args, dict):
        raise DamagedError(f"{folder / CONFIG} names no architecture or no model_args")
    described = config.get("pretrained_cfg")
    if isinstance(described, dict) and (elsewhere := [key for key in _ELSEWHERE if described.get(key)]):
        raise DamagedError(f"{folder / CONFIG} says {elsewhere[0]} in pretrained_cfg: weights from elsewhere; refused")
    check_arguments(args, f"{folder / CONFIG}: model_args")
    image_size, channels = _sizes(seen, folder / RECORD)
    mean, std = (_statistics(seen, key, channels, folder / RECORD) for key in ("mean", "std"))
    if min(std) <= 0:
        raise DamagedError(f"{folder / RECORD}: a standard deviation of {min(std)}; wanted more than 0")
    args = {key: value for key, value in args.items() if key not in _OURS}
    try:
        reading = read_reading(channels, seen.get("bands"), seen.get("range"), seen.get("reader"))
    except ValueError as error:
        raise DamagedError(f"{folder / RECORD}: {error}") from error
    return Stored(name, args, image_size, channels, mean, std, dim, record["sha256"], reading)


def check_arguments(args: Mapping[str, object], where: str) -> None:
    """Raises `UserError` for arguments of a timm model that are none: paths, switches of its factory, huge numbers."""
    if foreign := sorted(_FACTORY & set(args)):
        raise UserError(f"{where}: {', '.join(foreign)} are no arguments of a model; leave them out")
    pending: list[tuple[object, int]] = [(args, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if isinstance(value, dict):
            inside = list(value.values())
            plain = all(isinstance(key, str) for key in value)
        else:
            inside = list(value) if isinstance(value, list | tuple) else []
            plain = bool(inside) or isinstance(value, list | tuple) or _is_plain(value)
        if not plain or depth > _DEEPEST or count > _MOST_ARGUMENTS:
            raise UserError(f"{where}: got {str(value)[:60]!r}; wanted few plain numbers and words that timm knows")
        pending += [(one, depth + 1) for one in inside]


def _is_plain(value: object) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)


def _sizes(seen: Entries, path: Path) -> tuple[tuple[int, int], int]:
    size, channels = seen.get("image_size"), seen.get("channels")
    match size, channels:
        case [int(height), int(width)], int():
            try:
                check_sizes((height, width), channels)
            except UserError as error:
                raise DamagedError(f"{path}: {error}") from error
            return (height, width), channels
    raise DamagedError(f"{path}: image_size {size} and channels {channels}; wanted pixels and a number of channels")


def check_sizes(image_size: tuple[int, int], channels: int) -> None:
    """Raises `UserError` for (height, width) in pixels, or channels, that no encoder is made for."""
    if not 0 < min(image_size) <= max(image_size) <= MAX_SIDE:
        height, width = image_size
        raise UserError(f"images of {height:,} x {width:,} pixels; wanted 1 to {MAX_SIDE:,}, see --image-size")
    if not 0 < channels <= MAX_CHANNELS:
        raise UserError(f"images of {channels:,} channels; wanted 1 to {MAX_CHANNELS:,}, see --channels")


def _statistics(seen: Entries, key: str, channels: int, path: Path) -> tuple[float, ...]:
    """Mean or standard deviation, one or one per channel."""
    values = seen.get(key)
    listed = values if isinstance(values, list) and all(type(value) in (int, float) for value in values) else []
    if len(listed) not in (1, channels) or not all(map(math.isfinite, listed)):
        raise DamagedError(f"{path}: {key} is {str(values)[:60]}; wanted one number, or one for each of {channels}")
    return tuple(float(value) for value in listed)


def check_fits(build: Callable[[], nn.Module], path: Path) -> None:
    """Raises `DamagedError` unless a model has exactly the tensors of a weights file: names, shapes, types.

    It is built on torch's meta device, where tensors have no memory, and no further than the file's numbers go: neither
    a width of 10^6 nor a depth of 10^6 costs more than the file is large.

    Args:
        build: makes the model.
        path: safetensors.
    """
    shapes = tensor_shapes(path)
    most = 2 * count_values(shapes) + _SPARE
    told = DamagedError(f"{path.parent / CONFIG}: the model is larger than the {most:,} numbers that {WEIGHTS} allows")
    try:
        with torch.device("meta"), _at_most(most, told):
            own = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in build().state_dict().items()}
    except UserError:
        raise
    except SENSELESS as error:
        raise DamagedError(f"{path.parent / CONFIG}: timm cannot build such a model: {str(error)[:120]}") from error
    different = [name for name in (*own, *shapes) if own.get(name) != shapes.get(name)]
    if different:
        raise DamagedError(f"{path} does not hold the weights of its {CONFIG}: {different[0]!r} differs or is missing")


def within_memory(what: str) -> AbstractContextManager[None]:
    """Refuses to build what this machine could not train: the numbers of a recipe cost nothing to write.

    To be used on torch's meta device, where nothing has taken memory yet when the limit is reached.

    Args:
        what: for the message: what is built.

    Raises:
        UserError: in the block: its parameters do not fit into memory with their gradients and moments.
    """
    most = _machine_memory() // _TRAINED
    told = f"{what} has more than {most:,} parameters or {_MOST_MODULES:,} parts, too many for this machine to train"
    return _at_most(most, UserError(told))


def _machine_memory() -> int:
    """Bytes; 2^40 where the system does not say."""
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
    return math.prod(os.sysconf(name) for name in names) if known else 2**40


@contextmanager
def _at_most(values: int, told: UserError) -> Iterator[None]:
    """Stops the building of a model that gets more than `values` numbers, or senselessly many modules, by `told`.

    Parameters and buffers are counted as they are registered, which is before anything is written into their memory.
    """
    counted, thread = {"values": 0, "modules": 0}, threading.get_ident()  # the hooks see every thread's models

    def count_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and threading.get_ident() == thread:
            counted["values"] += tensor.numel()
            if counted["values"] > values:
                raise told

    def count_module(module: nn.Module, name: str, inside: nn.Module | None) -> None:
        counted["modules"] += threading.get_ident() == thread
        if counted["modules"] > _MOST_MODULES:
            raise told

    handles = [
        hooks.register_module_parameter_registration_hook(count_tensor),
        hooks.register_module_buffer_registration_hook(count_tensor),
        hooks.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
