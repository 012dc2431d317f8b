"""Shared by all tests: small images, free ports, quiet threads."""

import socket

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def pattern(label: int, number: int, size: int = 16) -> np.ndarray:
    """(size, size, 3) uint8: stripes whose direction is the label, with random phase, colours and noise."""
    generator = np.random.default_rng(1000 * label + number)
    y, x = np.mgrid[:size, :size] / size
    angle = np.pi * label / 4
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (2 * (x * np.cos(angle) + y * np.sin(angle)) + generator.random()))
    colours = generator.random((2, 3))
    image = wave[..., None] * colours[0] + (1 - wave[..., None]) * colours[1]
    return (255 * np.clip(image + 0.05 * generator.standard_normal(image.shape), 0, 1)).astype(np.uint8)


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory):
    """A folder with class sub-folders a, b, c, d of 40 PNGs of 16 px each."""
    root = tmp_path_factory.mktemp("images") / "stripes"
    for label, name in enumerate("abcd"):
        (root / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(pattern(label, number)).save(root / name / f"{number:03d}.png")
    return root
