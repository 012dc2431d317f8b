"""Choices of the machine are stated and can be overridden."""

import gc
import weakref
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from ssl_kit.core import machine
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import (
    available_cores,
    choose_channels_last,
    choose_compile,
    choose_device,
    choose_precision,
    choose_tf32,
    compile_blocks,
    cycles_freed,
    fast_bfloat16,
    lightning_precision,
    use_tf32,
)


def test_precision_is_as_asked_or_what_is_fast():
    for wanted, device in (("float32", "cpu"), ("bfloat16", "cpu"), ("float16", "cuda"), ("float16", "mps")):
        assert choose_precision(wanted, device).value == wanted
        assert lightning_precision(wanted)
    chosen = choose_precision("auto", "cpu")
    assert chosen.value == ("bfloat16" if fast_bfloat16() else "float32") and chosen.reason
    assert choose_precision("auto", "mps").value == "float32"
    with pytest.raises(UserError, match="bf16"):
        choose_precision("bf16", "cpu")


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_what_a_device_would_train_as_something_else_is_refused():
    """Lightning's own word for every precision: on a CPU it makes bfloat16 of float16."""
    for wanted, kept in (("float32", True), ("bfloat16", True), ("float16", False)):
        used = pl.Trainer(accelerator="cpu", precision=lightning_precision(wanted), logger=False).precision
        assert (used == lightning_precision(wanted)) is kept
        if kept:
            assert choose_precision(wanted, "cpu").value == wanted
            continue
        with pytest.raises(UserError, match=f"precision {wanted}: .* cpu .*bfloat16"):
            choose_precision(wanted, "cpu")


def test_a_precision_that_is_asked_for_where_it_is_slow_says_so(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(machine, "fast_bfloat16", lambda fast=fast: fast)
        assert ("no bfloat16 instructions" in choose_precision("bfloat16", "cpu").reason) is not fast


@pytest.mark.parametrize(("has", "emulates"), [(True, True), (False, True), (False, False)])
def test_bfloat16_on_a_gpu_without_it_is_told_or_refused(monkeypatch, has, emulates):
    # what torch says of a GPU that this machine has not
    supported = lambda including_emulation=True: emulates if including_emulation else has
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision("auto", "cuda").value == ("bfloat16" if has else "float16")
    if emulates:
        chosen = choose_precision("bfloat16", "cuda")
        assert chosen.value == "bfloat16" and ("emulated" in chosen.reason) is not has
    else:
        with pytest.raises(UserError, match=r"precision bfloat16: .* float16 or float32"):
            choose_precision("bfloat16", "cuda")


@pytest.mark.parametrize(
    ("width", "size", "stride", "device", "value"),
    [
        (8, 1, 2, "cpu", False),
        (16, 1, 2, "cpu", True),
        (8, 1, 1, "cpu", True),
        (8, 3, 2, "cpu", True),
        (8, 1, 2, "cuda", True),
    ],
)
def test_narrow_strided_convolutions_stay_contiguous_on_a_cpu(width, size, stride, device, value):
    # as channels_last, 31 images, 8 channels and two threads end the process with a segmentation fault (torch 2.14)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.Conv2d(width, width, size, stride))
    assert choose_channels_last(network, device).value is value


def test_a_network_of_one_convolution_does_not_convolve():
    assert choose_channels_last(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 4, 4)), "cpu").value is False


def test_device_and_cores():
    assert choose_device().value == ("cuda" if torch.cuda.is_available() else choose_device().value)
    assert 1 <= available_cores() <= 4096


def test_compiling_is_for_gpus_and_long_runs_where_a_compiler_works(monkeypatch):
    monkeypatch.setattr(machine, "_no_compiler", lambda device: "")
    assert not choose_compile("auto", "cpu", 10**6).value and not choose_compile("auto", "mps", None).value
    assert not choose_compile("auto", "cuda", 200).value and "200 steps" in choose_compile("auto", "cuda", 200).reason
    assert choose_compile("auto", "cuda", 100_000).value and choose_compile("auto", "cuda", None).value
    for wanted, value in (("on", True), ("off", False)):
        assert choose_compile(wanted, "cpu", 10).value is value and choose_compile(wanted, "cuda", 10**6).value is value
    assert not choose_compile("auto", "cuda", None, 2.0).value and choose_compile("auto", "cuda", None, 60.0).value
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    assert choose_compile("auto", "cuda", None).reason.startswith("it does not work here: ")
    with pytest.raises(UserError, match=r"--compile on: torch.compile does not work here .*no compiler is installed"):
        choose_compile("on", "cpu", None)


def broken(*_):
    raise RuntimeError("no compiler is installed")


def test_blocks_are_compiled_whichever_way_they_are_reached(monkeypatch):
    compiled = []

    def note(module, dynamic):
        compiled.append(module)
        assert dynamic is False

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    blocks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network = torch.nn.ModuleDict({"stem": torch.nn.Linear(2, 2), "act": torch.nn.ReLU(), "blocks": blocks})
    compile_blocks(network)
    assert compiled == [network["stem"], *blocks]


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_is_used_where_a_gpu_has_it(monkeypatch, capability, has):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_tf32("auto", "cuda").value is has and choose_tf32("off", "cuda").value is False
    if not has:
        with pytest.raises(UserError, match="Ampere"):
            choose_tf32("on", "cuda")
    assert choose_tf32("auto", "cpu").value is False


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_set_for_products_and_convolutions(on):
    use_tf32(on)
    assert torch.get_float32_matmul_precision() == ("high" if on else "highest")
    assert torch.backends.cudnn.allow_tf32 is on
    use_tf32(False)


class Ring:
    """An object that refers to itself."""

    def __init__(self):
        self.self = self


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_cycles_made_inside_are_freed_and_no_others_are_looked_for(no_collector):
    outside = weakref.ref(Ring())
    with cycles_freed():
        inside, kept = weakref.ref(Ring()), Ring()
    assert inside() is None and outside() is not None and kept.self is kept
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert outside() is None  # it is looked at again
    with pytest.raises(KeyError), cycles_freed():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_somebody_set_aside_stays_there(no_collector):
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with cycles_freed():
            inside = weakref.ref(Ring())
        assert inside() is None and gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
