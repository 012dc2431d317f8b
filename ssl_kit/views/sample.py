"""View + keys -> the numbers of each view, vectorised and without state.

The numbers are a pure function of (seed, epoch, image index, view number); `tests/views/test_sample.py` holds golden
values. View number `which` owns the streams 100 * which .. 100 * which + 99 of `ssl_kit.core.random`:
stream + 0 holds `_DRAWS` draws in the order of the constants below, stream + 1 .. 10 the ten tries of the crop (area,
aspect), stream + 11 the erased box's place and stream + 12 .. 21 its ten tries, and
stream + 22 what changes channels apart. Tries are drawn only for the images
that still need one, which changes no number because every draw has its own counter.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import uniform_array
from ssl_kit.views.recipe import MAX_VIEWS, View

Params = NDArray[np.float32]  # (N, COLUMNS), one row per image; the columns:

TOP, LEFT, HEIGHT, WIDTH = 0, 1, 2, 3  # the box in pixels of the stored image; integers from `sample`
FLIP_X, FLIP_Y, TURNS = 4, 5, 6  # 0 or 1, 0 or 1, quarter turns counter-clockwise 0..3, applied in this order
BRIGHTNESS, CONTRAST, SATURATION, HUE = 7, 8, 9, 10  # factors (1 = off) and turns of the colour circle (0 = off)
ORDER = 11  # and the three after it: which of the four above (0..3, counted from BRIGHTNESS) comes first, second, ...
GRAY = 15  # 0 or 1
SIGMA = 16  # of the blur, in pixels of the view; 0 = off
SOLARIZE = 17  # threshold in [0, 1]; 2 = off
ERASE_TOP, ERASE_LEFT, ERASE_HEIGHT, ERASE_WIDTH = 18, 19, 20, 21  # in pixels of the view; height 0 = off
COLUMNS = 22
# where the view changes channels apart, and then brightness and contrast of each channel, in turn
DROPPED = 22  # the channel that is set to 0; -1 = none

NAMES = (
    *("top", "left", "height", "width", "flip_x", "flip_y", "turns"),
    *("brightness", "contrast", "saturation", "hue", "order_0", "order_1", "order_2", "order_3"),
    *("gray", "sigma", "solarize", "erase_top", "erase_left", "erase_height", "erase_width"),
)

# draws of stream 100 * which
_D_CROP, _D_TOP, _D_LEFT, _D_FLIP_X, _D_FLIP_Y, _D_TURN, _D_TURNS = range(7)
_D_JITTER, _D_FACTORS, _D_ORDER, _D_GRAY, _D_BLUR, _D_SIGMA, _D_SOLARIZE, _D_ERASE = 7, 8, 12, 13, 14, 15, 16, 17
_DRAWS = 18
_S_APART = 22  # the stream of what changes channels apart: whether one is dropped, which, and two factors for each
_TRIES = 10  # torchvision gives up after ten boxes that do not fit
_CHUNK = 16384  # images; keeps the temporaries in the cache

_ORDERS = tuple(permutations(range(4)))


def sample(
    view: View, seed: int, epoch: int, index: np.ndarray, which: int, heights: np.ndarray, widths: np.ndarray
) -> Params:
    """Draws view number `which` of each image.

    Args:
        view: what may happen.
        seed: of the run.
        epoch: from 0.
        index: (N,) position of each image in its source.
        which: 0 .. 9, the view's number; two views of one image are independent.
        heights: (N,) of the stored images, in pixels.
        widths: (N,).

    Returns:
        (N, COLUMNS) float32; the columns are the constants of this module; with `view.bands` 1 + 2 * bands more.
    """
    if not 0 <= which < MAX_VIEWS:
        raise UserError(f"view number {which} was asked for; wanted 0 to {MAX_VIEWS - 1}")
    index, heights, widths = (np.atleast_1d(np.asarray(array)) for array in (index, heights, widths))
    if not index.shape == heights.shape == widths.shape or index.ndim != 1:
        shapes = f"{index.shape}, {heights.shape}, {widths.shape}"
        raise UserError(f"index, heights and widths have the shapes {shapes}; wanted one entry per image, (N,) each")
    params = np.empty((len(index), columns_of(view.bands)), np.float32)
    for start in range(0, len(index), _CHUNK):
        part = slice(start, start + _CHUNK)
        key = (seed, epoch, index[part], 100 * which)
        _sample(view, key, heights[part].astype(np.float64), widths[part].astype(np.float64), params[part])
    return params


def columns_of(bands: int) -> int:
    """How many columns views have that change so many channels apart."""
    return COLUMNS + (1 + 2 * bands if bands else 0)


def check_shape(shape: tuple[int, ...], count: int, channels: int) -> None:
    """Raises `UserError` unless parameters are (count, COLUMNS), or have the columns of each channel too."""
    if shape not in ((count, COLUMNS), (count, columns_of(channels))):
        raise UserError(f"params have the shape {shape}; wanted {(count, COLUMNS)}, or {(count, columns_of(channels))}")


def check_colour(params: Params, channels: int) -> None:
    """Raises `UserError` naming the operations in `params` that need red, green and blue when `channels` is not 3."""
    off = {"saturation": (SATURATION, 1), "hue": (HUE, 0), "gray": (GRAY, 0)}
    used = [name for name, (column, value) in off.items() if channels != 3 and (params[:, column] != value).any()]
    if used:
        raise UserError(f"{', '.join(used)} need 3 channels (red, green, blue), the images have {channels}")


def cropped(params: Params, size: tuple[int, int]) -> tuple[Params, Params]:
    """Two steps in the place of one: the crop, resized and turned to `size`; and what is left to do to that crop."""
    crop, rest = params.copy(), params.copy()
    crop[:, BRIGHTNESS : SATURATION + 1] = 1
    crop[:, [HUE, GRAY, SIGMA]] = 0
    crop[:, SOLARIZE] = 2
    crop[:, ERASE_TOP:COLUMNS] = 0
    if params.shape[1] > COLUMNS:
        crop[:, DROPPED], crop[:, DROPPED + 1 :] = -1, 1
    rest[:, : TURNS + 1] = 0
    rest[:, [HEIGHT, WIDTH]] = size
    return crop, rest


_Key = tuple[int, int, np.ndarray, int]  # seed, epoch, index (N,), first stream


def _sample(view: View, key: _Key, heights: np.ndarray, widths: np.ndarray, params: Params) -> None:
    seed, epoch, index, stream = key
    u = uniform_array(seed, epoch, index, stream, _DRAWS)

    boxes = centre_boxes(view, heights, widths)
    cropped = np.flatnonzero(u[:, _D_CROP] < view.crop)
    if len(cropped):
        boxes[cropped] = _crops(
            view, (seed, epoch, index[cropped], stream), u[cropped], heights[cropped], widths[cropped]
        )
    params[:, TOP : WIDTH + 1] = boxes

    params[:, FLIP_X] = u[:, _D_FLIP_X] < view.flip_x
    params[:, FLIP_Y] = u[:, _D_FLIP_Y] < view.flip_y
    params[:, TURNS] = np.where(u[:, _D_TURN] < view.turn, 1 + np.floor(u[:, _D_TURNS].astype(np.float64) * 3), 0)

    jittered = u[:, _D_JITTER] < view.jitter
    for column, half in enumerate((view.brightness, view.contrast, view.saturation)):
        params[:, BRIGHTNESS + column] = np.where(jittered, _factor(u[:, _D_FACTORS + column], half), 1)
    params[:, HUE] = np.where(jittered, (2 * u[:, _D_FACTORS + 3] - 1) * view.hue, 0)
    orders = np.array(_ORDERS, np.float32)
    params[:, ORDER : ORDER + 4] = orders[(u[:, _D_ORDER].astype(np.float64) * len(orders)).astype(np.int64)]

    params[:, GRAY] = u[:, _D_GRAY] < view.gray
    sigma = view.sigma[0] + u[:, _D_SIGMA] * (view.sigma[1] - view.sigma[0])
    params[:, SIGMA] = np.where(u[:, _D_BLUR] < view.blur, sigma, 0)
    params[:, SOLARIZE] = np.where(u[:, _D_SOLARIZE] < view.solarize, view.threshold, 2)

    if view.bands:
        _apart(view, key, jittered, params)
    params[:, ERASE_TOP:COLUMNS] = 0
    erased = np.flatnonzero(u[:, _D_ERASE] < view.erase)
    if len(erased):
        params[erased, ERASE_TOP:COLUMNS] = _erased(view, (seed, epoch, index[erased], stream))


def _factor(u: np.ndarray, half: float) -> np.ndarray:
    """Uniform draws to [max(0, 1 - half), 1 + half]."""
    low = max(0.0, 1 - half)
    return low + u * (1 + half - low)


def _apart(view: View, key: _Key, jittered: np.ndarray, params: Params) -> None:
    """Which channel is dropped, and brightness and contrast of each."""
    seed, epoch, index, stream = key
    u = uniform_array(seed, epoch, index, stream + _S_APART, 2 + 2 * view.bands)
    which = np.floor(u[:, 1].astype(np.float64) * view.bands)
    params[:, DROPPED] = np.where(u[:, 0] < view.drop, which, -1)
    for column, half in enumerate((view.brightness, view.contrast)):
        factors = np.where(jittered[:, None], _factor(u[:, 2 + column :: 2], half), 1)
        params[:, DROPPED + 1 + column :: 2] = factors
        params[:, BRIGHTNESS + column] = 1  # of all together


def centre_boxes(view: View, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N, 4) top, left, height, width: the largest centred box of the view's aspect ratio, times `view.fraction`."""
    aspect = view.size[1] / view.size[0]
    height = np.minimum(heights, widths / aspect) * view.fraction
    boxes = np.empty((len(heights), 4))
    boxes[:, 2] = np.clip(np.rint(height), 1, heights)
    boxes[:, 3] = np.clip(np.rint(height * aspect), 1, widths)
    boxes[:, 0] = (heights - boxes[:, 2]) // 2
    boxes[:, 1] = (widths - boxes[:, 3]) // 2
    return boxes


def _crops(view: View, key: _Key, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(N, 4) boxes by torchvision's `RandomResizedCrop.get_params`."""
    area = heights * widths
    height, width, missing = _fit(key[:3], key[3] + 1, view.scale, view.ratio, area, heights, widths)
    # ten misses: the whole image, cut to the nearest aspect ratio allowed
    h, w = heights[missing], widths[missing]
    height[missing] = np.clip(np.minimum(h, np.rint(w / view.ratio[0])), 1, h)
    width[missing] = np.clip(np.minimum(w, np.rint(h * view.ratio[1])), 1, w)
    top = np.floor(u[:, _D_TOP] * (heights - height + 1))
    left = np.floor(u[:, _D_LEFT] * (widths - width + 1))
    top[missing] = (h - height[missing]) // 2
    left[missing] = (w - width[missing]) // 2
    return np.stack((top, left, height, width), axis=1)


def _fit(
    key: tuple[int, int, np.ndarray],
    stream: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    areas: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first of ten (height, width) drawn that fits in (heights, widths); and the positions of those without."""
    seed, epoch, index = key
    height, width = np.zeros_like(heights), np.zeros_like(widths)
    missing = np.arange(len(heights))
    for attempt in range(_TRIES):
        if len(missing) == 0:
            break
        area, aspect = tries(seed, epoch, index[missing], stream + attempt, scale, ratio)
        area *= areas[missing]
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= widths[missing]) & (h > 0) & (h <= heights[missing])
        height[missing[fits]], width[missing[fits]] = h[fits], w[fits]
        missing = missing[~fits]
    return height, width, missing


def tries(
    seed: int, epoch: int, index: np.ndarray, stream: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """One try of a box per image: (N,) area as a fraction, uniform in `scale`; (N,) aspect, log-uniform in `ratio`."""
    u = uniform_array(seed, epoch, index, stream, 2).astype(np.float64)
    low, high = np.log(ratio)
    return scale[0] + u[:, 0] * (scale[1] - scale[0]), np.exp(low + u[:, 1] * (high - low))


def _erased(view: View, key: _Key) -> np.ndarray:
    """(N, 4) boxes in the view by torchvision's `RandomErasing.get_params`; ten misses erase nothing."""
    seed, epoch, index, stream = key
    height, width = view.size
    # torchvision wants the box smaller than the view, and its ratio is height / width
    sizes = [np.full(len(index), value, np.float64) for value in (height * width, height - 1, width - 1)]
    boxes = np.zeros((len(index), 4))
    inverse = (1 / view.erase_ratio[1], 1 / view.erase_ratio[0])
    boxes[:, 2], boxes[:, 3], _ = _fit((seed, epoch, index), stream + 12, view.erase_scale, inverse, *sizes)
    u = uniform_array(seed, epoch, index, stream + 11, 2)
    boxes[:, 0] = np.floor(u[:, 0] * (height - boxes[:, 2] + 1))
    boxes[:, 1] = np.floor(u[:, 1] * (width - boxes[:, 3] + 1))
    boxes[boxes[:, 2] == 0] = 0
    return boxes
