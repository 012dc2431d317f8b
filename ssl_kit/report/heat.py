"""Maps drawn over images, as functions of arrays: dark to bright for amounts, blue to orange for signed ones.

The same two scales are in style.css (.heat, .signed). Letters: (H, W) pixels of the image, (h, w) positions of the map.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ssl_kit.report.pictures import to_image

# matplotlib's inferno at 0, 1/4, ... 1: it grows brighter evenly, also in grey and for the colour-blind
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)
_LOWER, _RAISE = np.array([86, 180, 233.0]), np.array([230, 120, 20.0])  # of Okabe & Ito: told apart by everyone
_KEPT = 0.4  # of the grey image below a map
_SHOWN = 112  # pixels of the shorter side, at least, after enlarging by an integer


def enlarged(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 as RGB, enlarged by an integer to about 112 pixels where smaller: pixels stay pixels."""
    picture = to_image(image)
    factor = max(1, _SHOWN // min(picture.size))
    size = (factor * picture.width, factor * picture.height)
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST))


def overlay(image: np.ndarray, heat: np.ndarray, low: float, high: float, *, smooth: bool = False) -> np.ndarray:
    """An amount drawn over an image: dark at `low`, bright at `high`; values beyond are clipped.

    Args:
        image: (H, W, C) uint8, enlarged as by `enlarged`.
        heat: (h, w) float.
        low: drawn darkest.
        high: drawn brightest, above `low`.
        smooth: interpolate between positions instead of drawing squares.

    Returns:
        (H', W', 3) uint8.
    """
    below = _grey(image)
    level = np.clip((_resized(heat, below.shape[:2], smooth) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(level, stops, _HEAT[:, channel]) for channel in range(3)], axis=2)
    return _to_uint8(_KEPT * below + (1 - _KEPT) * colours)


def signed_overlay(image: np.ndarray, values: np.ndarray, limit: float) -> np.ndarray:
    """A signed amount: orange where positive, blue where negative, fully so from `limit` on; the image in grey at 0.

    Args:
        image: (H, W, C) uint8, enlarged as by `enlarged`.
        values: (h, w) float.
        limit: above 0.
    """
    below = _grey(image)
    level = np.clip(_resized(values, below.shape[:2], False) / max(limit, 1e-12), -1, 1)[..., None]
    colours = np.where(level > 0, _RAISE, _LOWER)
    strength = np.abs(level)
    return _to_uint8((1 - strength) * _KEPT * below + strength * colours)


def colours_of(colours: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) float in [0, 1] as squares of an image of (H, W) pixels, uint8."""
    channels = [_resized(colours[..., channel], shape, False) for channel in range(3)]
    return _to_uint8(255 * np.stack(channels, axis=2))


def framed(image: np.ndarray, place: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """A white frame around the position (row, column) of a (rows, columns) grid over an image (H, W, 3) uint8."""
    drawn = image.copy()
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    top, left = round(place[0] * height), round(place[1] * width)
    bottom, right = round((place[0] + 1) * height), round((place[1] + 1) * width)
    for side in (0, 1):  # white inside, black around it: seen on every background
        drawn[[top + side, bottom - 1 - side], left + side : right - side] = 255 * side
        drawn[top + side : bottom - side, [left + side, right - 1 - side]] = 255 * side
    return drawn


def _grey(image: np.ndarray) -> np.ndarray:
    grey = np.asarray(Image.fromarray(enlarged(image)).convert("L"), dtype=np.float64)
    return np.repeat(grey[..., None], 3, axis=2)


def _resized(heat: np.ndarray, shape: tuple[int, int], smooth: bool) -> np.ndarray:
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize(shape[::-1], how), dtype=np.float64)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
