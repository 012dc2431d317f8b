"""Shared by all tests: small images, free ports, quiet threads."""

import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import pattern

from ssl_kit.core.console import configure, live
from ssl_kit.encoders.encoder import Encoder

LONG = [
    *("test_docs", "test_several", "test_faults", "test_pretrain", "test_recipes", "test_api", "test_environment"),
    *("test_stopping", "test_options", "test_slurm", "test_distributed", "test_browser", "test_page", "test_bounds"),
]


def pytest_addoption(parser):
    parser.addoption(
        "--write-golden", action="store_true", help="write tests/golden anew, from the methods as they are"
    )


def pytest_configure(config):
    """The suite is of the CPU, wherever it runs; `-m gpu` asks for the tests of the GPU."""
    config.addinivalue_line("markers", "gpu: needs a GPU; run by `pytest -m gpu`")
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product


def pytest_collection_modifyitems(items):
    """Files of minutes come first: begun last, one of them keeps one of two processes waiting for ten minutes."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def usual_console():
    """What one test's `--quiet` or `--json` chose is not what the next one starts with."""
    configure()
    live(False)


@pytest.fixture(scope="session", autouse=True)
def own_key(tmp_path_factory):
    """Indexes are signed by a key of the tests, not by that of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("keys")))
        patch.delenv("SSL_KIT_KEY", raising=False)
        yield


@pytest.fixture
def free_port() -> int:
    """A TCP port on this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory):
    """A folder with class sub-folders a, b, c, d of 40 PNGs of 16 px each."""
    root = tmp_path_factory.mktemp("images") / "stripes"
    for label, name in enumerate("abcd"):
        (root / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(pattern(label, number)).save(root / name / f"{number:03d}.png")
    return root


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
