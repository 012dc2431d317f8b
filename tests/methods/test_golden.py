"""Losses of before, which no refactoring may move: to the bit on the machine that wrote them, within 2e-3 elsewhere.

`pytest tests/methods/test_golden.py --write-golden` writes them anew, and those of a new method for the first time.
"""

import json
import platform
import re
from pathlib import Path

import pytest
import torch
from every_method import methods
from test_contract import batch, method  # noqa: F401 (a fixture)

GOLDEN = Path(__file__).parents[1] / "golden"


def machine():
    """What the last bits of a sum depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else f"model name: {platform.processor()}"
    told = re.findall(r"^(?:cpu family|model|model name|stepping)\s*: (.*)", text, re.MULTILINE)[:4]
    return {"torch": torch.__version__, "cpu": " ".join([*told, torch.backends.cpu.get_cpu_capability()])}


@pytest.fixture
def one_thread():
    """Sums in one order, however many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_golden_losses(method, one_thread, request):  # noqa: F811
    """Of ten SGD steps, each on a batch of its own, in float32."""
    optimiser = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(10):
        loss = method.loss(*batch(method, seed=step))["loss"]
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step((step + 1) / 10)
    path = GOLDEN / f"{type(method).__name__}.json"
    if request.config.getoption("--write-golden"):
        path.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
    assert path.exists(), "a new method's are written by --write-golden"
    golden = json.loads(path.read_text())
    assert losses == pytest.approx(golden["losses"], abs=0 if golden["machine"] == machine() else 2e-3, rel=0)


def test_no_golden_losses_are_of_methods_that_are_gone():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {kind.__name__ for kind in methods()}
