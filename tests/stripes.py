"""Small labelled images for tests: stripes."""

import numpy as np


def pattern(label: int, number: int, size: int = 16) -> np.ndarray:
    """(size, size, 3) uint8: stripes whose direction is the label, with random phase, colours and noise."""
    generator = np.random.default_rng(1000 * label + number)
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * label / 4
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (2 * (x * np.cos(angle) + y * np.sin(angle)) + generator.random()))
    colours = generator.random((2, 3))
    image = wave[..., None] * colours[0] + (1 - wave[..., None]) * colours[1]
    return (255 * np.clip(image + 0.05 * generator.standard_normal(image.shape), 0, 1)).astype(np.uint8)
