"""The executor on the accelerator (or the CPU): the same `Params`, batched torch operations, no loop over images.

Letters: N images, C channels, H x W as stored, h x w of the view.

Crop, resize, mirrors and the blur are matrices, two per image, so that they run as batched products on any device.
Every operation is applied to the whole batch, with identity parameters where an image does not want it: picking out
the images that do would make the device wait for the host, and would compile anew for every batch.
Each image has its own order of the jitter. Brightness, contrast and saturation have one form, `a x + b gray + c mean`,
so three such steps before one turn of the hue and three after it hold all 24 orders.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import full_float32, many_shapes
from ssl_kit.views import sample as col
from ssl_kit.views.sample import Params

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green, blue


def apply_device(images: Tensor, params: Params | Tensor, size: tuple[int, int], *, cropped: bool = False) -> Tensor:
    """Makes one view per image, on the device of `images`.

    Args:
        images: (N, C, H, W) uint8 or uint16.
        params: (N, COLUMNS) float32 of `sample`, or more columns, as an array or a tensor.
        size: (h, w) of the views.
        cropped: `images` are crops of that size already, and `params` what is left to do (`sample.cropped`).

    Returns:
        (N, C, h, w) float32 in [0, 1]; differs from `apply_host` by rounding only.

    Raises:
        UserError: a shape or dtype that does not fit, colour operations for C != 3 (checked for arrays only: looking
            into a tensor would make the host wait for the device).
    """
    if images.ndim != 4 or images.dtype not in (torch.uint8, torch.uint16) or 0 in images.shape[1:]:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise UserError(f"images are {got}; wanted uint8 or uint16 (images, channels, height, width)")
    channels = images.shape[1]
    col.check_shape(tuple(params.shape), len(images), channels)
    if isinstance(params, np.ndarray):
        col.check_colour(params, channels)
        params = torch.from_numpy(params)
    p = params.to(images.device, torch.float32, non_blocking=True)

    x = images.to(torch.float32) / torch.iinfo(images.dtype).max
    if not cropped:
        x = _resample(x, p, size)
    if p.shape[1] > col.COLUMNS:
        x = _jitter_apart(x, p)
    elif channels == 3:
        x = _jitter_colour(x, p)
    else:
        for position in range(4):
            x = _linear(x, *_linear_step(p, p[:, col.ORDER + position]))
    x = _blur(x, p[:, col.SIGMA])
    x = torch.where(x >= _wide(p[:, col.SOLARIZE]), 1 - x, x)
    if size[0] == size[1]:
        x = torch.where(_wide(p[:, col.TURNS]) % 2 == 1, x.transpose(2, 3), x)
    return torch.where(_erased(p, size, x.device), torch.zeros_like(x), x)


def _wide(column: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1)."""
    return column[:, None, None, None]


class DeviceViews:
    """`apply_device` as training uses it: in full float32 whatever TF32 says, and compiled, if asked.

    Compiled code is of one shape: for a batch of another number of images it is compiled anew.

    Args:
        compiled: by torch.compile: 0.8 instead of 7.6 ms for two views of 512 images of 32 px on an H200.
    """

    def __init__(self, compiled: bool = False):
        self._make: Callable[..., Tensor] = apply_device
        if compiled:
            many_shapes()
            self._make = torch.compile(apply_device, dynamic=False, fullgraph=True)

    def __call__(self, images: Tensor, params: Tensor, size: tuple[int, int], *, cropped: bool = False) -> Tensor:
        """As `apply_device`."""
        with full_float32():
            return self._make(images, params, size, cropped=cropped)


def _resample(x: Tensor, p: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop, resize and mirrors: (N, C, H, W) to (N, C, h, w)."""
    turns = p[:, col.TURNS]
    # a quarter turn is a mirror and a transposition, which comes last
    flip_y = (p[:, col.FLIP_Y] != 0) ^ (turns == 2) ^ (turns == 3)
    flip_x = (p[:, col.FLIP_X] != 0) ^ (turns == 1) ^ (turns == 2)
    rows = _triangle(p[:, col.TOP], p[:, col.HEIGHT], x.shape[2], size[0], flip_y)  # (N, h, H)
    columns = _triangle(p[:, col.LEFT], p[:, col.WIDTH], x.shape[3], size[1], flip_x)  # (N, w, W)
    # (N, 1, h, H) @ (N, C, H, W) @ (N, 1, W, w)
    return rows[:, None] @ (x @ columns[:, None].transpose(2, 3))


def _triangle(start: Tensor, length: Tensor, limit: int, size: int, flip: Tensor) -> Tensor:
    """(N, size, limit): the resampling matrices of one axis; the filter is that of `ssl_kit/views/kernel.py`."""
    start, length = start[:, None], length[:, None]  # (N, 1)
    pixel = torch.arange(limit, device=start.device, dtype=torch.float32)
    output = torch.arange(size, device=start.device, dtype=torch.float32)
    output = torch.where(flip[:, None], size - 1 - output, output)  # (N, size)
    scale = length / size
    first = start.floor().clamp(0, limit - 1)
    last = torch.maximum(first, torch.minimum((start + length).ceil() - 1, torch.full_like(start, limit - 1)))
    center = start + (output + 0.5) * scale - 0.5
    center = torch.where(scale <= 1, torch.minimum(torch.maximum(center, first), last), center)
    distance = (pixel - center[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]
    weight = (1 - distance).clamp(min=0)
    weight = weight * ((pixel >= first[:, :, None]) & (pixel <= last[:, :, None]))
    return weight / weight.sum(2, keepdim=True)


def _gray(x: Tensor) -> Tensor:
    """(N, C, h, w) to (N, 1, h, w): torchvision's grey for RGB, the mean of the channels otherwise."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return _GRAY[0] * x[:, 0:1] + _GRAY[1] * x[:, 1:2] + _GRAY[2] * x[:, 2:3]


def _linear_step(p: Tensor, operation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three numbers (N,) of `a x + b gray + c mean` for the operation (N,) that stands at one place."""
    one, zero = torch.ones_like(operation), torch.zeros_like(operation)
    brightness = torch.where(operation == 0, p[:, col.BRIGHTNESS], one)
    contrast = torch.where(operation == 1, p[:, col.CONTRAST], one)
    saturation = torch.where(operation == 2, p[:, col.SATURATION], one)
    return brightness * contrast * saturation, zero + 1 - saturation, zero + 1 - contrast


def _linear(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    gray = _gray(x)
    return (_wide(a) * x + _wide(b) * gray + _wide(c) * gray.mean((2, 3), keepdim=True)).clamp(0, 1)


def _jitter_colour(x: Tensor, p: Tensor) -> Tensor:
    """Three linear steps, the hue, three linear steps, the loss of colour; (N, 3, h, w)."""
    order = p[:, col.ORDER : col.ORDER + 4]
    place = (order == 3).to(torch.float32).argmax(1)  # (N,) where the hue stands
    nothing = torch.full_like(place, -1, dtype=torch.float32)
    for position in range(3):
        x = _linear(x, *_linear_step(p, torch.where(position < place, order[:, position], nothing)))
    x = _turn_hue(x, p[:, col.HUE])
    for position in range(1, 4):
        x = _linear(x, *_linear_step(p, torch.where(position > place, order[:, position], nothing)))
    return torch.where(_wide(p[:, col.GRAY]) != 0, _gray(x), x)


def _jitter_apart(x: Tensor, p: Tensor) -> Tensor:
    """Brightness and contrast of each channel in the drawn order, then the loss of one; (N, C, h, w)."""
    factors = p[:, col.DROPPED + 1 :].unflatten(1, (-1, 2))[..., None, None]  # (N, C, 2, 1, 1)
    for position in range(4):
        operation = _wide(p[:, col.ORDER + position])
        bright, contrast = factors[:, :, 0], factors[:, :, 1]
        scaled = torch.where(operation == 0, bright, torch.where(operation == 1, contrast, torch.ones_like(contrast)))
        offset = torch.where(operation == 1, 1 - contrast, torch.zeros_like(contrast))
        x = (scaled * x + offset * x.mean((2, 3), keepdim=True)).clamp(0, 1)
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return torch.where(channel == _wide(p[:, col.DROPPED]), torch.zeros_like(x), x)


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """HSV with the hue moved by `turns` (N,) and back, without a branch; the formula is that of `kernel.py`."""
    r, g, b = x[:, 0], x[:, 1], x[:, 2]
    high = x.amax(1)
    chroma = high - x.amin(1)
    scale = 1 / torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(high == g, 2 + (b - r) * scale, 4 + (r - g) * scale)
    hue = torch.where(high == r, (g - b) * scale, hue) + 6 * turns[:, None, None]
    n = 5 - 2 * torch.arange(3, device=x.device)[None, :, None, None]  # 5, 3, 1 without a copy from the host
    m = torch.remainder(n + hue[:, None], 6)
    turned = high[:, None] - chroma[:, None] * torch.minimum(m, 4 - m).clamp(0, 1)
    return torch.where(_wide(turns) == 0, x, turned)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian up to 3 sigma with mirrored borders, as two products per image; sigma 0 changes nothing."""
    rows, columns = (_gaussian(sigma, side) for side in x.shape[2:])
    return rows[:, None] @ (x @ columns[:, None].transpose(2, 3))


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """(N, size, size): row i holds the weights of the pixels for output i, those beyond the border folded back."""
    sigma = sigma[:, None, None]
    radius = (3 * sigma).ceil().clamp(max=size - 1)
    place = torch.arange(size, device=sigma.device, dtype=torch.float32)
    here, there = place[:, None], place[None, :]

    def weight(distance: Tensor) -> Tensor:
        """Zero beyond the radius; for sigma 0, one at distance 0."""
        value = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2)
        return value * (distance.abs() <= radius)

    total = weight(here - there)
    total = total + weight(here + there) * (there > 0)
    total = total + weight(2 * (size - 1) - here - there) * (there < size - 1)
    return total / total.sum(2, keepdim=True)


def _erased(p: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """(N, 1, h, w) bool: true where the pixels are erased."""
    y = torch.arange(size[0], device=device)[:, None]
    x = torch.arange(size[1], device=device)[None, :]
    top, left, height, width = (p[:, column, None, None] for column in range(col.ERASE_TOP, col.ERASE_WIDTH + 1))
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return inside[:, None]
