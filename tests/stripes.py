"""Small images for tests: stripes with a label, and PNGs of noise."""

import io
import os

import numpy as np
from PIL import Image


def pattern(label: int, number: int, size: int = 16) -> np.ndarray:
    """(size, size, 3) uint8: stripes whose direction is the label, with random phase, colours and noise."""
    generator = np.random.default_rng(1000 * label + number)
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * label / 4
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (2 * (x * np.cos(angle) + y * np.sin(angle)) + generator.random()))
    colours = generator.random((2, 3))
    image = wave[..., None] * colours[0] + (1 - wave[..., None]) * colours[1]
    return (255 * np.clip(image + 0.05 * generator.standard_normal(image.shape), 0, 1)).astype(np.uint8)


def pixels(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed, height=8, width=8):
    data = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(data, "PNG")
    return data.getvalue()


def make(root, names, start=0):
    """One PNG per name; image i has the pixels of seed start + i."""
    for seed, name in enumerate(names, start):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(seed))
    return root
