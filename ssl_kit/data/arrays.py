"""`.npy` and `.npz` files as images; nothing in them is unpickled."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ssl_kit.core.reading import Reading
from ssl_kit.data.limits import UNREADABLE, BadImageError, check_cost, short
from ssl_kit.data.samples import Samples, is_channels_first, of_array

_MOST_ARRAYS = 2**10  # of a `.npz`
_LONGEST_HEADER = 10_000  # bytes, as numpy has it


def is_mine(data: bytes) -> bool:
    """Whether a file is a `.npy` or `.npz`."""
    return data[:6] == b"\x93NUMPY" or (data[:4] == b"PK\3\4" and b".npy" in data[:300])


def size(data: bytes) -> tuple[int, int]:
    """(height, width).

    Raises:
        BadImageError: see `read`.
    """
    try:
        for _, member in _members(data, ()):
            shape = _checked(member, data, 1)[0]
            height, width = shape[1:3] if len(shape) == 3 and is_channels_first(shape) else shape[:2]
            return height, width
    except BadImageError:
        raise
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise BadImageError(f"numpy file: {short(error)}") from error
    raise BadImageError(".npz without arrays")


def read(data: bytes, reading: Reading) -> Samples:
    """The image of a `.npy`; of a `.npz` its arrays as bands, in the order in which they are asked for or stored.

    Raises:
        BadImageError: damaged, of a shape that is no image, too large for its bytes, or of Python objects.
    """
    try:
        arrays = dict(_arrays(data, reading))
    except BadImageError:
        raise
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise BadImageError(f"numpy file: {short(error)}") from error
    first = next(iter(arrays.values()), None)
    if first is None:
        raise BadImageError(".npz without arrays")
    if len({(one.values.shape[:2], one.values.dtype) for one in arrays.values()}) > 1:
        raise BadImageError(".npz of arrays of different sizes or types; wanted bands of one image")
    if len(arrays) == 1:
        return first
    values = np.concatenate([one.values for one in arrays.values()], axis=2)
    names = tuple(arrays) if values.shape[2] == len(arrays) else ()
    return replace(first, values=values, colours=values.shape[2], names=names)


def _arrays(data: bytes, reading: Reading) -> Iterator[tuple[str, Samples]]:
    held = 1
    for name, member in _members(data, reading.bands):
        shape, fortran, dtype = _checked(member, data, held)
        count = math.prod(shape)
        held += count * dtype.itemsize
        if isinstance(member, io.BytesIO):  # the bytes at hand are the pixels, none is copied
            flat = np.frombuffer(data, dtype, count, member.tell())
        else:
            flat = np.frombuffer(member.read(count * dtype.itemsize), dtype, count)
        yield name, of_array(flat.reshape(shape, order="F" if fortran else "C"), "numpy file")


def _members(data: bytes, wanted: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """The arrays of a file, by name; of a `.npz` those that are wanted, where it has any of them."""
    if data[:2] != b"PK":
        yield "", io.BytesIO(data)
        return
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        found = {info.filename.removesuffix(".npy"): info for info in file.infolist()[:_MOST_ARRAYS]}
        for name in [name for name in wanted if name in found] or found:
            with file.open(found[name]) as member:
                yield name, member


def _checked(member: IO[bytes], data: bytes, held: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array; with the `held` bytes of others it takes no more memory than its file may."""
    version = npy.read_magic(member)
    wide = 2 if version == (1, 0) else 4
    length = member.read(wide)
    size = int.from_bytes(length, "little")
    if size > _LONGEST_HEADER:
        raise BadImageError(f"numpy file: a header of {size:,} bytes")
    shape, fortran, dtype = _header(version, length + member.read(size))
    if dtype.hasobject or not 2 <= len(shape) <= 3:
        raise BadImageError(f"array of {dtype} {shape}; wanted numbers, (height, width) or (height, width, channels)")
    pixels = max(1, shape[0] * shape[1])
    each = 3 * (held / pixels + math.prod(shape[2:]) * dtype.itemsize)  # as read, as one image, as pixels
    check_cost("array", shape[1], shape[0], each, data)
    return shape, fortran, dtype


@lru_cache(64)  # 50 microseconds, and the images of a set are often of a few sizes
def _header(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(io.BytesIO(header))
