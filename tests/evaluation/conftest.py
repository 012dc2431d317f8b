"""A tiny labelled image folder and a tiny encoder, made once."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kit.encoders.encoder import Encoder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ and test/ with three classes that differ in colour, 16 px: 24 and 10 images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 10)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3))
                pixels[..., channel] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def encoder(make_encoder):
    """An encoder folder with random weights, outside any run."""
    return make_encoder(1)


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory):
    """Seed -> the folder of a small encoder with random weights."""

    def make(seed):
        torch.manual_seed(seed)
        model = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16), 3, (0.4,), (0.2,))
        return model.save(tmp_path_factory.mktemp("encoders") / "tiny")

    return make
