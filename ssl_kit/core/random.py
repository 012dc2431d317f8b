"""Stateless random numbers: a hash of (seed, epoch, image index, stream, draw) instead of a generator.

The same key gives the same number for ever, on every device, for any batch, thread count or number of processes.
Nothing has to be saved, so an interrupted run continues with the very views and masks it would have seen. This is
part of the format: `tests/core/test_random.py` holds golden values, and changing a constant here changes every run.

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195, fig. 17) applied once
per component of the key. The top 24 bits become a float32 in [0, 1), exactly representable on every device.

A *stream* separates uses of one key (crop of view 0, mask of MAE, ...): streams below 1,000 belong to views
(100 per view), from 1,000 on to methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:  # `ssl-kit index` does without it
    import torch
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive counters land far apart
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_SCALE = 2.0**-24
U = TypeVar("U", np.uint64, np.ndarray)


class Key(NamedTuple):
    """What a batch's random numbers are drawn from: `index` (B,) int64 is each image's position in its source.

    `group` (B,) int64: images that have the same number belong together, -1 stands alone; None where nothing is known.
    """

    seed: int
    epoch: int
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a key
    group: Tensor | None = None


def random_bits(seed: int, epoch: int, index: np.ndarray, stream: int, count: int) -> np.ndarray:
    """64 random bits per image and draw.

    Args:
        seed: of the run, any 64-bit integer.
        epoch: from 0.
        index: (N,) positions of the images in their source.
        stream: which use of the key this is; see the top of this file.
        count: draws per image.

    Returns:
        (N, count) uint64.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.uint64(_GOLDEN))
        state = _mix(state ^ (np.uint64(epoch) * np.uint64(_GOLDEN) + np.uint64(1)))
        state = _mix(state ^ (np.uint64(stream) * np.uint64(_GOLDEN) + np.uint64(2)))
        per_image = _mix(state ^ (np.asarray(index).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(3)))
        draws = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return _mix(per_image[:, None] + draws[None, :])


def uniform_array(seed: int, epoch: int, index: np.ndarray, stream: int, count: int) -> np.ndarray:
    """(N, count) float32 in [0, 1); see `random_bits` for the arguments."""
    return (random_bits(seed, epoch, index, stream, count) >> np.uint64(40)).astype(np.float32) * np.float32(_SCALE)


def uniform(key: Key, stream: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """(B, count) float32 in [0, 1), equal to `uniform_array` bit for bit, computed on `device` (default: the index's).

    The parts of the hash that are the same for the whole batch are computed on the host, so no sync is needed.
    """
    import torch

    index = key.index.to(device) if device is not None else key.index
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(key.seed & 0xFFFFFFFFFFFFFFFF) + np.uint64(_GOLDEN))
        state = _mix(state ^ (np.uint64(key.epoch) * np.uint64(_GOLDEN) + np.uint64(1)))
        state = _mix(state ^ (np.uint64(stream) * np.uint64(_GOLDEN) + np.uint64(2)))
    per_image = _mix_torch((index.long() * _signed(_GOLDEN) + 3) ^ _signed(int(state)))
    draws = torch.arange(1, count + 1, device=index.device) * _signed(_GOLDEN)
    bits = _mix_torch(per_image[:, None] + draws[None, :])
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * _SCALE


def permutation(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    """(count,) int64: `range(count)` shuffled, a pure function of its arguments (numpy promises no stable shuffle)."""
    return np.argsort(random_bits(seed, epoch, np.arange(count), stream, 1)[:, 0], kind="stable")


def _mix(z: U) -> U:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def _mix_torch(z: Tensor) -> Tensor:
    # torch has no unsigned 64-bit arithmetic: int64 products wrap alike, shifts must drop the copies of the sign bit
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
