"""Shared by all tests: small images, free ports, quiet threads."""

import socket

import pytest
from PIL import Image
from stripes import pattern

from ssl_kit.core.console import configure, live


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
