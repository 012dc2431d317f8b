"""Tensors from safetensors files of strangers: the header is judged before anything is allocated for them.

safetensors itself refuses offsets that overlap, leave gaps or leave the file, and shapes that disagree with them; here
the header is kept small (safetensors reads up to 100 MB of it), unknown types are refused, and so is NaN where asked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.sealed import MAX_JSON, parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Shape(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    size: tuple[int, ...]


def tensor_shapes(path: Path | str) -> dict[str, Shape]:
    """Name -> type and shape of every tensor in a safetensors file, from its header alone.

    Raises:
        DamagedError: no such header, one of more than 8 MiB, or a type that is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    with open(path, "rb") as file:
        length, rest = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
        if not 2 <= length <= min(rest, MAX_JSON):
            raise DamagedError(f"{path} is not a safetensors file: its header would have {length:,} bytes")
        header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise DamagedError(f"{path} is not a safetensors file: its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    return {name: _shape(entry, name, path) for name, entry in header.items()}


def _shape(entry: object, name: str, path: Path) -> Shape:
    dtype, size = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    plain = isinstance(size, list) and all(type(length) is int and 0 <= length < 2**48 for length in size)
    if not plain or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamagedError(f"{path}: {name!r} has type {dtype} and shape {size}; wanted one of {', '.join(_DTYPES)}")
    assert isinstance(size, list)
    return Shape(_DTYPES[dtype], tuple(size))


def count_values(shapes: Mapping[str, Shape]) -> int:
    """How many numbers the tensors hold together."""
    return sum(math.prod(shape.size) for shape in shapes.values())


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, mapped into memory.

    Raises:
        DamagedError: it is none, or damaged.
    """
    tensor_shapes(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Raises `DamagedError` when a floating-point tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        # NaN and infinity go through a sum, ten times as fast as aminmax; only where it is not finite are all looked at
        if tensor.is_floating_point() and tensor.numel() and not math.isfinite(tensor.sum(dtype=torch.float32)):
            low, high = torch.aminmax(tensor)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DamagedError(f"{path}: {name!r} holds NaN or infinite values")


def check_weights(found: object, own: Mapping[str, Tensor], where: Path | str) -> None:
    """Raises `DamagedError` unless `found` has exactly the tensors of `own`, by name, shape and type, and all finite.

    torch itself would turn whole numbers into weights without a word.
    """
    if not isinstance(found, Mapping):
        raise DamagedError(f"{where} holds no weights")
    for name in (*own, *found):
        one, other = own.get(name), found.get(name)
        if one is None or not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            raise DamagedError(f"{where} does not hold the weights of this model: {name!r} differs or is missing")
    check_finite(found, where)
