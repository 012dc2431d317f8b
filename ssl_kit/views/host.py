"""The executor on the CPU: stored images and `Params` in, float views out, split over a pool of threads.

The kernel (`ssl_kit/views/kernel.py`) releases the GIL. It is compiled on the first call after installation and loaded
from numba's disk cache by later processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.views import sample as columns
from ssl_kit.views.recipe import plain
from ssl_kit.views.sample import Params

Images = np.ndarray | Sequence[np.ndarray] | tuple[np.ndarray, np.ndarray]


def apply_host(
    images: Images, params: Params, size: tuple[int, int], *, out: np.ndarray | None = None, threads: int = 1
) -> np.ndarray:
    """Makes one view per image.

    Args:
        images: (N, H, W, C) uint8 or uint16; or a list of (H_i, W_i, C) of either; or `(array, rows)`, the images
            `array[rows]` of a big array without the copy.
        params: (N, COLUMNS) float32 of `sample`, or more columns; boxes may be fractional (of images decoded at a
            reduced scale).
        size: (h, w) of the views.
        out: (N, C, h, w) float32 to write to; or uint8 or uint16 for rounded values, 0..255 or 0..65,535.
        threads: the images are split over so many threads; the result does not depend on it.

    Returns:
        (N, C, h, w) float32 in [0, 1], or `out`.

    Raises:
        UserError: a shape or dtype that does not fit, a box outside its image, colour operations for C != 3.
    """
    addresses, heights, widths, deep, channels, kept = _describe(images)
    params = np.require(params, np.float32, ["C", "W"])
    _check(params, heights, widths, channels, size)
    shape = (len(addresses), channels, *size)
    if out is None:
        out = np.empty(shape, np.float32)
    if out.shape != shape or out.dtype not in (np.float32, np.uint8, np.uint16) or not out.flags.c_contiguous:
        raise UserError(f"out is {out.dtype} {out.shape}; wanted float32, uint8 or uint16 {shape}, C-contiguous")
    count = len(addresses)
    parts = 1 if threads <= 1 else min(count, 4 * threads)
    edges = [count * part // max(1, parts) for part in range(parts + 1)]
    edges = sorted({*edges, *(np.flatnonzero(np.diff(deep)) + 1).tolist()})  # the kernel takes one type at a time
    jobs = [
        (addresses[a:b], heights[a:b], widths[a:b], channels, params[a:b], out[a:b], deep[a])
        for a, b in pairwise(edges)
    ]
    if threads > 1 and len(jobs) > 1:
        list(_pool(os.getpid(), threads).map(lambda job: _run(*job), jobs))
    else:
        for job in jobs:
            _run(*job)
    del kept  # the addresses above point into it
    return out


def plain_views(images: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(N, C, h, w) float32 in [0, 1]: what evaluation sees of images (H_i, W_i, C) uint8 or uint16."""
    heights, widths = np.array([image.shape[:2] for image in images]).T
    view = plain(size)
    return apply_host(list(images), columns.sample(view, 0, 0, np.arange(len(images)), 0, heights, widths), view.size)


_KINDS = np.empty(0, np.uint8), np.empty(0, np.uint16)  # what tells the kernel the type of the images
_ROUNDED_AT_ONCE = 16  # images; rounded output goes through a float buffer of this many


def _run(
    addresses: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    channels: int,
    params: Params,
    out: np.ndarray,
    deep: bool,
) -> None:
    from ssl_kit.views.kernel import make_views  # numba takes a second to import

    count, _, h, w = out.shape
    scratch = _scratch(params, h, w, channels)
    at_once = count if out.dtype == np.float32 else _ROUNDED_AT_ONCE
    for a in range(0, count, at_once):
        part = slice(a, a + at_once)
        views = out[part] if out.dtype == np.float32 else np.empty(out[part].shape, np.float32)
        planes = views.reshape(len(views), channels, h * w)
        make_views(addresses[part], heights[part], widths[part], params[part], h, w, scratch, planes, _KINDS[int(deep)])
        if out.dtype != np.float32:
            views *= np.iinfo(out.dtype).max
            views += 0.5
            out[part] = views


def _scratch(
    params: np.ndarray, h: int, w: int, channels: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """What one call of `make_views` works in; nothing is read before it is written.

    Returns:
        maps: first stored pixel, taps and covered pixels of both axes (2, 3) int64; where each output pixel's taps
            begin (2, max(h, w)) uint32; their weights (2, max(h, w), K) float32; spread out rows (h + 3, w * C + 1).
        buffers: (2, M) float32, for stored rows and the blur.
    """
    taps = int(np.ceil(2 * max(params[:, 2].max() / h, params[:, 3].max() / w))) + 2
    border = 3 * float(params[:, 16].max()) + 4
    blurred = int((h + 2 * border) * (w + 2 * border)) + 1 if params[:, 16].max() > 0 else 0
    stored = (max(int(params[:, 3].max()) + 5, w + 1)) * channels
    maps = (
        np.empty((2, 3), np.int64),
        np.empty((2, max(h, w)), np.uint32),
        np.empty((2, max(h, w), taps), np.float32),
        np.empty((h + 3, w * channels + 1), np.float32),  # one more: the three-channel loop writes four
    )
    return maps, np.empty((2, max(blurred, stored)), np.float32)


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Held for the process; keyed by its id because threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="views")


_Described = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, object]


def _describe(images: Images) -> _Described:
    """Addresses, heights, widths (N,) int64, deep (N,) bool: uint16, and the channels of images, and what must live."""
    if isinstance(images, np.ndarray):
        return _describe_rows(images, np.arange(len(images)))
    if isinstance(images, tuple) and len(images) == 2 and images[0].ndim == 4:
        return _describe_rows(images[0], np.asarray(images[1], np.int64))
    kept = []
    for position, image in enumerate(images):
        if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16) or image.size == 0:
            raise UserError(
                f"image {position} is {image.dtype} {image.shape}; wanted uint8 or uint16 (height, width, channels)"
            )
        kept.append(np.ascontiguousarray(image))
    channels = {image.shape[2] for image in kept}
    if len(channels) > 1:
        raise UserError(f"the images have {sorted(channels)} channels; wanted one number for all of them")
    sizes = np.array([image.shape[:2] for image in kept], np.int64).reshape(-1, 2)
    addresses = np.array([image.ctypes.data for image in kept], np.int64)
    deep = np.array([image.dtype == np.uint16 for image in kept], bool)
    return addresses, sizes[:, 0].copy(), sizes[:, 1].copy(), deep, channels.pop() if channels else 3, kept


def _describe_rows(array: np.ndarray, rows: np.ndarray) -> _Described:
    if array.ndim != 4 or array.dtype not in (np.uint8, np.uint16) or 0 in array.shape[1:]:
        raise UserError(
            f"images are {array.dtype} {array.shape}; wanted uint8 or uint16 (images, height, width, channels)"
        )
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(array):
        raise UserError(f"rows {rows.min()} to {rows.max()} were asked for; the array has {len(array)} images")
    array = np.ascontiguousarray(array)
    addresses = array.ctypes.data + rows.astype(np.int64) * array.strides[0]
    heights, widths = (np.full(len(rows), side, np.int64) for side in array.shape[1:3])
    return addresses, heights, widths, np.full(len(rows), array.dtype == np.uint16), array.shape[3], array


def _check(params: Params, heights: np.ndarray, widths: np.ndarray, channels: int, size: tuple[int, int]) -> None:
    columns.check_shape(params.shape, len(heights), channels)
    if min(size) < 1:
        raise UserError(f"size is {size}; wanted (height, width) of at least 1 pixel")
    if not np.isfinite(params).all():
        raise UserError("params hold NaN or infinity; wanted the numbers that sample() draws")
    top, left, height, width = params[:, : columns.WIDTH + 1].T
    slack = 1e-3  # pixels: boxes scaled to a reduced image carry rounding
    inside = (top >= -slack) & (left >= -slack) & (height > 0) & (width > 0)
    inside &= (top + height <= heights + slack) & (left + width <= widths + slack)
    if not inside.all():
        n = int(np.argmin(inside))
        box = tuple(params[n, : columns.WIDTH + 1].tolist())
        raise UserError(
            f"box {box} of image {n} (top, left, height, width) leaves its {heights[n]} x {widths[n]} pixels"
        )
    columns.check_colour(params, channels)
    if size[0] != size[1] and (params[:, columns.TURNS] % 2 == 1).any():
        raise UserError(f"quarter turns need a square view, size is {size}")
