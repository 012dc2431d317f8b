"""NT-Xent forward and backward, and contrastive batches in chunks: time and memory beside public libraries.

    python benchmarks/loss.py [--only time/4096,cache] [--quick] [--json FILE]

N counts rows (two per image), d = 128. Time is that of the processor in one thread, in interleaved rounds (ours, peer,
ours, peer, ...). Memory is the peak of a fresh process over what it held before, after a warm-up on a few rows. The
peers take float32, so do we; `bfloat16` rows are ours with products in bfloat16, where the processor has it. The plain
formula is the N x N matrix of similarities and torch's cross-entropy. `cache/memory` is a training step of ResNet-18
(width 16, 32 px) on 4,096 images in chunks of 128 against a plain step on 128, both with glibc told to give freed
blocks back at once, so that the peak is what the tensors need and not how the heap is cut up; `cache/time` compares the
time per image of the two. `processes/*` is the largest relative error of the parameters' gradient of W processes with
unequal slices against one, as the limit divided by the error.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kit.core.console import say, table
from ssl_kit.core.machine import available_memory, fast_bfloat16
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.simclr import SimCLR, nt_xent

Loss = Callable[[Tensor], Tensor]
Row = dict[str, Any]

DIM, TEMPERATURE = 128, 0.2
METRIC_LARGEST = 1_024  # rows: pytorch-metric-learning holds every pair of a pair of pairs, 17 GB there
METRIC_NEEDS = 20e9


def ours() -> Loss:
    return lambda z: nt_xent(z, TEMPERATURE)


def ours_fast() -> Loss:
    return lambda z: nt_xent(z, TEMPERATURE, bfloat16=True)


def lightly() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def metric_learning() -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z: loss(z, torch.arange(len(z) // 2).repeat(2))


def plain() -> Loss:
    def loss(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        s = z @ z.T / TEMPERATURE
        s.fill_diagonal_(-torch.inf)
        return F.cross_entropy(s, torch.arange(len(z)).roll(len(z) // 2))

    return loss


LOSSES: dict[str, Callable[[], Loss]] = {
    "float32": ours,
    "bfloat16": ours_fast,
    "lightly": lightly,
    "pytorch-metric-learning": metric_learning,
    "plain": plain,
}


def projections(rows: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()


def seconds(loss: Loss, z: Tensor, repeats: int) -> float:
    """Processor time of one forward and backward pass."""
    began = time.process_time()
    for _ in range(repeats):
        z.grad = None
        loss(z).backward()
    return (time.process_time() - began) / repeats


def summary(name: str, what: str, pairs: list[tuple[float, float]], peer_name: str, unit: str) -> Row:
    """A row from (ours, peer) of which less is better."""
    ratios = [peer / own for own, peer in pairs]
    row: Row = {"id": name, "what": what}
    row |= {"ours": round(median(own for own, _ in pairs), 3), "peer": round(median(peer for _, peer in pairs), 3)}
    row |= {"peer_name": peer_name, "unit": unit, "ratio": round(median(ratios), 2)}
    return row | {"low": round(min(ratios), 2), "high": round(max(ratios), 2), "runs": len(pairs)}


def times(rows: int, precision: str, peer: str, runs: int) -> list[Row]:
    z, own, other = projections(rows), LOSSES[precision](), LOSSES[peer]()
    for loss in (own, other):
        seconds(loss, z, 1)
    repeats = [max(1, round(0.05 / max(seconds(loss, z, 1), 1e-4))) for loss in (own, other)]
    pairs = [(1e3 * seconds(own, z, repeats[0]), 1e3 * seconds(other, z, repeats[1])) for _ in range(runs)]
    what = f"forward and backward, {rows:,} rows, {precision}"
    return [summary(f"loss/time/{rows}/{precision}/{peer}", what, pairs, peer, "ms")]


def forget_peak() -> None:
    """Gives freed memory back and starts the kernel's record of the peak anew (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MiB of the largest resident memory since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def grown(*arguments: str) -> float:
    """MiB that a fresh process's peak grows by in `measure(*arguments)`."""
    command = [sys.executable, __file__, "--measure", *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(
        subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout.split()[-1]
    )


def measure(subject: str, size: int, chunk: int) -> float:
    """What one pass adds to the peak of this process: a loss of `size` rows, or a step of `size` images."""
    torch.set_num_threads(1)
    if subject == "step":
        small, large = Step(16, 8 if chunk else 0), Step(size, chunk)
        small()
        forget_peak()
        before = peak()
        large()
    else:
        loss, z = LOSSES[subject](), projections(size)
        seconds(loss, projections(8), 1)
        forget_peak()
        before = peak()
        seconds(loss, z, 1)
    return peak() - before


def memory(rows: int, peer: str, runs: int) -> list[Row]:
    needed = METRIC_NEEDS if peer == "pytorch-metric-learning" else 17.5 * 2**30 * (rows / 32_768) ** 2
    if available_memory() < needed:
        say(f"left out: {rows:,} rows of {peer} need more memory than is free")
        return []
    pairs = [(grown("float32", str(rows), "0"), grown(peer, str(rows), "0")) for _ in range(runs)]
    what = f"peak of forward and backward, {rows:,} rows"
    return [summary(f"loss/memory/{rows}/float32/{peer}", what, pairs, peer, "MiB")]


class Step:
    """A training step of ResNet-18 of width 16 on 32-px images: plain, or in chunks whose views are made when asked."""

    def __init__(self, images: int, chunk: int):
        torch.manual_seed(0)
        encoder = Encoder("resnet18_small", {"channels": [16, 32, 64, 128]}, (32, 32))
        self.method = SimCLR(encoder).to(memory_format=torch.channels_last)
        self.images, self.chunk = images, chunk
        self.optimiser = torch.optim.SGD(self.method.parameters(), lr=0.1, momentum=0.9)

    def __len__(self) -> int:
        return self.images // self.chunk

    def __getitem__(self, number: int) -> tuple[list[Tensor], Key]:
        count = self.chunk or self.images
        generator = torch.Generator().manual_seed(number)
        views = [torch.rand(count, 3, 32, 32, generator=generator) for _ in range(2)]
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        return views, Key(0, 0, torch.arange(count))

    def __call__(self) -> None:
        key = Key(0, 0, torch.arange(self.images))
        batch: dict[str, Any] = {"views": [], "key": key, "chunks": self} if self.chunk else {}
        if not self.chunk:
            batch = {"views": self[0][0], "key": key}
        self.optimiser.zero_grad()
        self.method.training_step(batch, 0)["loss"].backward()
        self.optimiser.step()


def cache(runs: int) -> list[Row]:
    large, small = 4_096, 128
    pairs = [(grown("step", str(large), str(small)), grown("step", str(small), "0")) for _ in range(runs)]
    what = f"peak of a step: {large:,} images in chunks of {small} over {small}"
    rows = [summary("cache/memory/4096/128", what, pairs, f"a plain step of {small}", "MiB")]
    chunks, alone = Step(1_024, small), Step(small, 0)
    spent = []
    for _ in range(1 + runs):
        began = time.process_time()
        chunks()
        middle = time.process_time()
        alone()
        spent.append((1e3 * (middle - began) / 1_024, 1e3 * (time.process_time() - middle) / small))
    what = f"step of 1,024 images in chunks of {small} over plain steps of {small}, per image"
    return [*rows, summary("cache/time/1024/128", what, spent[1:], f"plain steps of {small}", "ms/image")]


def processes(worlds: list[int]) -> list[Row]:
    """W processes against one, by the worker of the tests."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "methods"))
    import socket

    from test_simclr import against_one_process

    rows = []
    for world in worlds:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        for place, (dtype, limit) in enumerate([("float32", 1e-5), ("float64", 1e-6)]):
            worst = max(errors[place] for errors in against_one_process(world, port + place))
            what = f"{world} processes, unequal slices: gradient against one process, {dtype}"
            row: Row = {"id": f"processes/{world}/{dtype}", "what": what, "ours": worst, "peer": limit}
            row |= {"peer_name": "limit", "unit": "relative error", "ratio": round(limit / max(worst, 1e-16), 1)}
            rows.append(row | {"low": row["ratio"], "high": row["ratio"], "runs": 1})
    return rows


def measurements(quick: bool) -> dict[str, Callable[[], list[Row]]]:
    """What there is to measure, in order."""
    made: dict[str, Callable[[], list[Row]]] = {}
    for size in [1_024, 4_096] if quick else [64, 256, 1_024, 2_048, 4_096, 8_192, 16_384]:
        runs = 5 if quick else 7 if size <= 4_096 else 3
        for precision in ("float32", "bfloat16") if fast_bfloat16() else ("float32",):
            for peer in ["lightly"] if quick else ["lightly", "plain"]:
                made[f"time/{size}/{precision}/{peer}"] = partial(times, size, precision, peer, runs)
    for size in [4_096] if quick else [4_096, 16_384, 32_768]:
        made[f"memory/{size}"] = partial(memory, size, "lightly", 1 if quick else 3)
    if not quick:
        made["time/metric-learning"] = partial(times, METRIC_LARGEST // 4, "float32", "pytorch-metric-learning", 3)
        made["memory/metric-learning"] = partial(memory, METRIC_LARGEST, "pytorch-metric-learning", 1)
    made["cache"] = partial(cache, 1 if quick else 3)
    if not quick:
        made["processes"] = partial(processes, [2, 3, 4])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: 1,024 and 4,096 rows against lightly")
    parser.add_argument(
        "--only", default="", help="beginnings of time/ROWS/PRECISION/PEER, memory/ROWS, cache, processes"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        subject, size, chunk = arguments.measure
        print(measure(subject, int(size), int(chunk)))
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, make in measurements(arguments.quick).items():
        if any(name.startswith(wanted) for wanted in arguments.only.split(",")):
            rows += make()
            say(" · ".join(f"{row['id']} {row['ratio']}" for row in rows[-3:]))
            if arguments.json is not None:  # as it goes: the whole takes half an hour
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    cells = [
        (row["id"], f"{row['ours']:,}", f"{row['peer']:,}", row["unit"], row["ratio"], f"{row['low']} .. {row['high']}")
        for row in rows
    ]
    table("loss: NT-Xent, forward and backward", ("id", "ours", "peer", "unit", "ratio", "range"), cells)


if __name__ == "__main__":
    main()
