"""Pictures, and the same numbers through torchvision's functionals: what the executors are compared with."""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as oracle

from ssl_kit.views import sample as col

LEVEL = 1 / 255


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture with smooth parts, edges, saturated colours, black and white: (height, width, channels) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-60, 316, (max(1, height // 6), max(1, width // 6), channels)).clip(0, 255).astype(np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC) for c in range(channels)]
    picture = np.stack([np.asarray(plane) for plane in planes], axis=2).astype(np.int64)
    picture[: height // 3, : width // 3] = rng.integers(0, 256, channels)
    return (picture + rng.integers(-8, 9, picture.shape)).clip(0, 255).astype(np.uint8)


def identity(count: int, height: float, width: float) -> np.ndarray:
    """Params that take the whole image and change nothing."""
    params = np.zeros((count, col.COLUMNS), np.float32)
    params[:, [col.HEIGHT, col.WIDTH]] = height, width
    params[:, col.BRIGHTNESS : col.SATURATION + 1] = 1
    params[:, col.ORDER : col.ORDER + 4] = range(4)
    params[:, col.SOLARIZE] = 2
    return params


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255


def torchvision_policy(image: np.ndarray, p: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The same numbers through torchvision's functionals, one after the other, in float: (C, h, w)."""
    top, left, height, width = (int(v) for v in p[:4])
    x = oracle.resized_crop(tensor(image), top, left, height, width, list(size), antialias=True)
    x = oracle.hflip(x) if p[col.FLIP_X] else x
    x = oracle.vflip(x) if p[col.FLIP_Y] else x
    x = torch.rot90(x, int(p[col.TURNS]), (1, 2))
    adjust = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
    for operation in p[col.ORDER : col.ORDER + 4].astype(int):
        factor = float(p[col.BRIGHTNESS + operation])
        if factor != (0 if operation == 3 else 1):
            x = adjust[operation](x, factor)
    x = oracle.rgb_to_grayscale(x, x.shape[0]) if p[col.GRAY] else x
    if p[col.SIGMA] > 0:
        radius = int(np.ceil(3 * p[col.SIGMA]))
        kernel = [2 * min(radius, size[1] - 1) + 1, 2 * min(radius, size[0] - 1) + 1]
        x = oracle.gaussian_blur(x, kernel, [float(p[col.SIGMA])] * 2)
    x = oracle.solarize(x, float(p[col.SOLARIZE])) if p[col.SOLARIZE] <= 1 else x
    top, left, height, width = (int(v) for v in p[col.ERASE_TOP :])
    return oracle.erase(x, top, left, height, width, torch.zeros(1)).numpy() if height else x.numpy()
