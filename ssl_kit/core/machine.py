"""What this machine is and what suits it: cores, memory, device, precision; each choice with its reason in one line."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from ssl_kit.core.errors import UserError
from ssl_kit.core.process import cores, on_this_machine

if TYPE_CHECKING:  # imported where it is used: `ssl-kit index` does without it
    from torch import nn

T = TypeVar("T")
R = TypeVar("R")

Switch = Literal["auto", "on", "off"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_OWN_FROZEN = 1_000  # objects: Python 3.12 itself begins with 375 set aside
_COMPILE_STEPS = 3_000  # that make up for a minute of compiling: at 10 steps a second, 20 % faster
_COMPILE_MINUTES = 10.0  # likewise
_SHAPES = 64  # that code is kept for
_SHARE = 0.25  # of the available memory that decoded images may take without being asked
_ONEDNN_BLOCK = 16  # channels of oneDNN's AVX-512 kernels
_LIGHTNING = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


class Choice(NamedTuple, Generic[T]):
    """A setting and why it was chosen."""

    value: T
    reason: str


def choose_device() -> Choice[str]:
    """Lightning's accelerator name."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        more = (
            f"; {count} are visible, --trainer.devices {count} trains on all" if count > on_this_machine() == 1 else ""
        )
        return Choice("cuda", f"{torch.cuda.get_device_name(0)}{more}")
    if torch.backends.mps.is_available():
        return Choice("mps", "Apple GPU")
    return Choice("cpu", f"no accelerator; {torch.get_num_threads()} threads")


def use_gpu(devices: object, deterministic: bool) -> None:
    """Makes this process's GPU the current one, before anything is put on another.

    Args:
        devices: of Lightning's Trainer; a list names the GPU of each process of this machine.
        deterministic: likewise; cuBLAS asks once, at its first product, whether its sums must repeat.
    """
    import torch

    place = int(os.environ.get("LOCAL_RANK", "0"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(devices[place] if isinstance(devices, list) else place)


def choose_precision(wanted: Precision, device: str) -> Choice[str]:
    """float32, bfloat16 or float16 for autocast on `device`.

    Raises:
        UserError: no such precision, or one that `device` would train as another.
    """
    import torch

    if wanted not in ("auto", *_LIGHTNING):
        raise UserError(f"precision {wanted!r} is not one of auto, {', '.join(_LIGHTNING)}")
    if wanted == "float16" and device == "cpu":
        raise UserError("precision float16: on a cpu Lightning makes bfloat16 of it; give bfloat16, float32 or auto")
    if wanted == "bfloat16":
        return _bfloat16(device)
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bfloat16", "the GPU has it") if fast else Choice("float16", "the GPU has no bfloat16")
    if device == "cpu" and fast_bfloat16():
        return Choice("bfloat16", "the CPU multiplies it in hardware, about twice as fast as float32")
    return Choice("float32", f"no fast bfloat16 on this {device}")


def _bfloat16(device: str) -> Choice[str]:
    """It was asked for. Where it is emulated it is slow, and as exact."""
    import torch

    emulated = not (fast_bfloat16() if device == "cpu" else device != "cuda" or torch.cuda.is_bf16_supported(False))
    if emulated and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("precision bfloat16: this GPU cannot compute it; give float16 or float32, or auto")
    why = f"; this {device} has no bfloat16 instructions: emulated, slower than float32" if emulated else ""
    return Choice("bfloat16", f"asked for{why}")


def choose_channels_last(network: nn.Module, device: str) -> Choice[bool]:
    """Whether weights and views are laid out channels last, which doubles the speed of convolutions.

    Not where the gradient of a weight would be wrong: in that layout oneDNN writes past its buffer in the backward pass
    of a strided 1x1 convolution of fewer channels than a block (https://github.com/uxlfoundation/oneDNN/issues/6035),
    and a process dies or learns from noise.
    """
    if not convolves(network):
        return Choice(False, "it does not convolve")
    strided = [one for one in _convolutions(network) if max(one.kernel_size) == 1 < max(one.stride)]
    if device == "cpu" and any(one.in_channels // one.groups < _ONEDNN_BLOCK for one in strided):
        return Choice(False, f"strided 1x1 convolutions of under {_ONEDNN_BLOCK} channels: oneDNN issue 6035")
    return Choice(True, "it convolves")


def convolves(network: nn.Module) -> bool:
    """Whether it holds 2-D convolutions other than a patch embedding."""
    return len(_convolutions(network)) > 1


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    from torch import nn

    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def lightning_precision(precision: str) -> str:
    """Lightning's word for a precision: weights stay float32, products run under autocast."""
    return _LIGHTNING[precision]


def choose_tf32(wanted: Switch, device: str) -> Choice[bool]:
    """Whether float32 products on a GPU may use TensorFloat-32: 10 bits of mantissa, exponents as float32.

    Only what is left in float32 is concerned: everything in a float32 run, the losses beside bfloat16.
    """
    import torch

    has = device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if not has:
        if wanted == "on":
            raise UserError(
                f"tf32 on: wanted an NVIDIA GPU of the Ampere generation or later, got {device}; leave it out"
            )
        return Choice(False, "an NVIDIA GPU of the Ampere generation or later would have it")
    if wanted != "auto":
        return Choice(wanted == "on", "asked for")
    return Choice(True, "the GPU has it: float32 products several times as fast, with 10 bits of mantissa")


def use_tf32(on: bool) -> None:
    """Sets it for products and convolutions."""
    import torch

    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, float32 products have all their bits, whatever `use_tf32` says; nothing waits for the device."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_compile(wanted: Switch, device: str, steps: int | None, minutes: float | None = None) -> Choice[bool]:
    """Whether device views and the encoder's blocks go through `torch.compile`.

    Args:
        wanted: auto, on or off.
        device: Lightning's name.
        steps: of the run, where it is known.
        minutes: of the run, if they decide; compiling is part of them.

    Raises:
        UserError: it was asked for, and no compiler works here.
    """
    if wanted == "off" or (wanted == "auto" and device != "cuda"):
        return Choice(False, "asked for" if wanted == "off" else f"measured to gain nothing on a {device}")
    if wanted == "auto" and steps is not None and steps < _COMPILE_STEPS:
        return Choice(False, f"{steps:,} steps are too few to make up for compiling")
    if wanted == "auto" and minutes is not None and minutes < _COMPILE_MINUTES:
        return Choice(False, f"{minutes:g} minutes are too few to make up for compiling")
    failed = _no_compiler(device)
    if failed and wanted == "on":
        raise UserError(f"--compile on: torch.compile does not work here ({failed}); leave it out")
    if failed:
        return Choice(False, f"it does not work here: {failed}")
    return Choice(True, "asked for" if wanted == "on" else "the run is long enough to make up for compiling")


def _no_compiler(device: str) -> str:
    """Why nothing can be compiled for a device; empty when a small function just was."""
    import torch

    try:
        torch.compile(lambda values: values.sin() + 1)(torch.zeros(8, device=device))
    except RuntimeError as error:  # all that Dynamo and its backends raise
        return " ".join(str(error).split())[:120] or type(error).__name__
    return ""


def many_shapes() -> None:
    """Lets torch.compile keep code for many shapes: two step sizes, times the sizes of the views, times equal blocks.

    Beyond its limit of 8 it would go on without compiling, which nobody would notice.
    """
    from torch._dynamo import config  # it takes a second to import

    config.recompile_limit = max(config.recompile_limit, _SHAPES)


def compile_blocks(network: nn.Module) -> None:
    """Compiles a network block by block, in place: equal blocks are compiled once, and every way through it profits.

    For each shape that comes, as it is: code for any shape is slower. (MAE leaves tokens out and the VAE stops before
    the classifier, so the network as a whole is not what runs.) State dicts, copies and exports are as before.
    """
    from torch import nn

    many_shapes()
    for child in network.children():
        for part in child.children() if isinstance(child, nn.Sequential) else (child,):
            if next(part.parameters(), None) is not None:
                part.compile(dynamic=False)


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled modules run as they were written: shapes that come once are not worth compiling for."""
    import torch

    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and it takes a second to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def available_cores() -> int:
    """Cores this process may use (a container or `taskset` may allow fewer than the machine has), or its share."""
    return max(1, cores() // on_this_machine())


def in_order(start: Callable[[T], Future[R]], items: Iterable[T], ahead: int) -> Iterator[R]:
    """What becomes of the items, in their order; so many are started ahead."""
    waiting = iter(items)
    pending = deque(map(start, islice(waiting, ahead)))
    while pending:
        result = pending.popleft().result()
        pending.extend(map(start, islice(waiting, 1)))
        yield result


def choose_threads(device: str) -> Choice[int]:
    """How many threads decode images and make views."""
    if device == "cpu":
        return Choice(max(1, available_cores() // 2), "half of the cores: the CPU trains too")
    return Choice(available_cores(), "all cores")


def available_memory() -> int:
    """Bytes that can still be allocated: what the system has, or what the container allows if that is less."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = (group / "memory.stat").read_text().split("inactive_file ")[1].split()[0]  # given back when needed
        free.append(limit - used + int(cache))
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or no limit ("max")
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)  # macOS tells only the total
    return min(free) if free else 4 * 2**30


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most, as far as known: `host`, and `device` for its GPU's tensors."""
    import torch

    peak = {}
    with suppress(OSError):  # getrusage would count what started this process, too
        status = Path("/proc/self/status").read_text().split("VmHWM:")
        peak["host"] = int(status[1].split()[0]) * 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak


def fits_in_memory(needed: float) -> tuple[bool, str]:
    """Whether `needed` decoded bytes may live in RAM, for each process of this machine; and the words that say why."""
    available = available_memory()
    fits = needed * on_this_machine() < _SHARE * available
    return fits, f"{size_text(needed)} decoded, {size_text(available)} of memory available"


def size_text(count: float) -> str:
    """Bytes as people write them, with three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def keep_memory() -> bool:
    """Asks glibc to keep freed memory for the next step instead of giving it back; whether it could be asked.

    Activations of a training step are tens of MB each. By default each is mapped and unmapped anew, and the page
    faults cost 10 % of a bf16 step (495..522 to 567..574 images/s, ResNet-18 of width 16 at 32 px on 2 cores), more in
    float32.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has neither
        return False
    most = 2**31 - 1
    return all(mallopt(option, most) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


@contextmanager
def cycles_freed() -> Iterator[None]:
    """Frees what is made inside and refers to itself, at once: the parts of a report do.

    Beside the 700,000 objects of torch, Lightning and Bokeh the collector looks at old ones only when 175,000 more have
    come together, which is after dozens of reports of 1.3 MiB each. Looking at all of them takes 0.3 s; set aside for
    the time being, 5 ms.
    """
    free = gc.get_freeze_count() <= _OWN_FROZEN  # else set aside already, and there is no way back
    if free:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if free:
            gc.unfreeze()


def fast_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions (avx512_bf16 or amx_bf16 on x86, bf16 on Arm)."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16"))
