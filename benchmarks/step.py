"""Images per second of training: ours through `pretrain`, beside the bare arithmetic and beside lightly's loop.

    python benchmarks/step.py data/cifar10/train [--only simclr-w16,vae] [--quick] [--json FILE]

Ours is `ssl_kit.pretrain` as a user calls it (loader, views, Lightning, callbacks), timed from step to step by a
callback after a warm-up; no measurement of features falls into the timed steps. "bare" is forward, backward and
optimiser step of the same method on one fixed batch of the same shapes, precision and memory format: the limit.
"lightly" is the loop of lightly's SimCLR example (its transform, projection head, NTXentLoss, SGD, DataLoader with
worker processes reading files, float32) on the same network; "lightly-same-precision" is that loop with channels_last
and bfloat16 autocast. Rounds are interleaved; rates are per second of wall time, medians of steps within a round and
of ratios over rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ssl_kit.core.console import say, table
from ssl_kit.core.machine import available_cores, fast_bfloat16, keep_memory
from ssl_kit.core.random import Key
from ssl_kit.encoders.vit import unfuse_attention
from ssl_kit.verbs.defaults import build_method
from ssl_kit.verbs.pretrain import pretrain

Rate = Callable[[], float]  # images per second of one round
Row = dict[str, Any]

SIZE = (32, 32)
LIMIT = 4_096  # images: enough for the timed steps, quickly decoded
STATISTICS: dict[str, Any] = {"channels": 3, "mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}


def _simclr(width: int) -> dict[str, Any]:
    encoder = {"name": "resnet18_small", "args": {"channels": [width, 2 * width, 4 * width, 8 * width]}}
    return {"class_path": "ssl_kit.methods.simclr.SimCLR", "init_args": {"encoder": encoder}}


# name -> (method, batch size, timed steps of a round)
SUBJECTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "simclr-w16": (_simclr(16), 256, 12),
    "simclr-w64": (_simclr(64), 64, 6),
    "mae-tiny": ({"class_path": "ssl_kit.methods.mae.MAE", "init_args": {}}, 256, 12),
    "vae": (
        {
            "class_path": "ssl_kit.methods.vae.VAE",
            "init_args": {"encoder": _simclr(16)["init_args"]["encoder"]},
        },
        256,
        12,
    ),
}
WARM_UP = 4  # steps of every round that are not timed


class Stopwatch(pl.Callback):
    """The times at which steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """Of a step, the median after the warm-up."""
        return median(np.diff(self.times[WARM_UP - 1 :]))


def ours(spec: dict[str, Any], data: str, batch: int, steps: int) -> Rate:
    def rate() -> float:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            pretrain(
                data,
                method=spec,
                run=f"{folder}/run",
                limit=LIMIT,
                image_size=SIZE[0],
                batch_size=batch,
                epochs=1000,
                evaluate_every=1000,
                trainer={"max_steps": WARM_UP + steps, "callbacks": [watch]},
            )
        return batch / watch.seconds()

    return rate


def _dtype() -> torch.dtype:
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def bare(spec: dict[str, Any], batch: int, steps: int) -> Rate:
    method = build_method(spec, image_size=SIZE, **STATISTICS).train()
    if _dtype() == torch.bfloat16:
        unfuse_attention(method)
    last = method.encoder.is_convolutional
    if last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser, _ = method.optim.build(method, images_per_step=batch, steps_per_epoch=16, total_steps=1000)
    views = [torch.rand(batch, 3, *SIZE) for _ in range(method.num_views)]
    views = [view.contiguous(memory_format=torch.channels_last) if last else view for view in views]
    key = Key(0, 0, torch.arange(batch))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", _dtype(), enabled=_dtype() != torch.float32):
            loss = method.loss(views, key)["loss"]
        loss.backward()
        optimiser.step()

    return timed(step, batch, steps)


def timed(step: Callable[[], None], batch: int, steps: int) -> Rate:
    def rate() -> float:
        times = []
        for _ in range(WARM_UP + steps):
            step()
            times.append(time.perf_counter())
        return batch / median(np.diff(times[WARM_UP - 1 :]))

    return rate


def lightly_loop(
    data: str, batch: int, same_precision: bool = False, device: str = "cpu", images: int | None = None
) -> Callable[[], Iterator[float]]:
    """The example of lightly's documentation for SimCLR, on our network: the time after each step of an epoch."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms.simclr_transform import SimCLRTransform

    encoder = build_method(_simclr(16 if device == "cpu" else 64), image_size=SIZE, **STATISTICS).encoder
    model = torch.nn.Sequential(encoder, SimCLRProjectionHead(encoder.dim, 512, 128)).to(device).train()
    if same_precision:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    transform = SimCLRTransform(input_size=SIZE[0], gaussian_blur=0.0, cj_strength=0.5)
    dataset: Any = LightlyDataset(input_dir=data, transform=transform)
    if images is not None:
        dataset = torch.utils.data.Subset(dataset, np.linspace(0, len(dataset) - 1, images).astype(int).tolist())
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=available_cores()
    )
    criterion, optimiser = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def epoch() -> Iterator[float]:
        for views, *_ in loader:
            views[:] = [view.to(device) for view in views]
            if same_precision:
                views[:] = [view.contiguous(memory_format=torch.channels_last) for view in views]
            with torch.autocast("cpu", _dtype(), enabled=same_precision):
                loss = criterion(model(views[0]), model(views[1]))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            loss.item()  # as the example adds it up
            yield time.perf_counter()

    return epoch


def lightly(data: str, batch: int, steps: int, same_precision: bool) -> Rate:
    epoch = lightly_loop(data, batch, same_precision)

    def rate() -> float:
        times = [*islice(epoch(), WARM_UP + steps)]
        return batch * (len(times) - WARM_UP) / (times[-1] - times[WARM_UP - 1])  # mean: the loader comes in bursts

    return rate


def compare(name: str, what: str, our: Rate, peer: Rate, peer_name: str, runs: int) -> Row:
    """Interleaved rounds."""
    pairs = [(our(), peer()) for _ in range(runs)]
    ratios = [a / b for a, b in pairs]
    row: Row = {"id": name, "what": what, "ours": round(median(a for a, _ in pairs), 1)}
    row |= {"peer": round(median(b for _, b in pairs), 1), "peer_name": peer_name, "unit": "images/s"}
    return {
        **row,
        "ratio": round(median(ratios), 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of small images in class folders, such as CIFAR-10's training images")
    parser.add_argument("--only", default=",".join(SUBJECTS), help=f"some of {', '.join(SUBJECTS)}")
    parser.add_argument("--runs", type=int, default=7, help="rounds")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: two rounds of simclr-w16, no lightly")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    keep_memory()
    names = ["simclr-w16"] if arguments.quick else arguments.only.split(",")
    runs = 2 if arguments.quick else arguments.runs
    rows: list[Row] = []

    def note(row: Row) -> None:  # as it goes: the whole takes up to three quarters of an hour
        rows.append(row)
        say(f"{row['id']}: {row['ours']} against {row['peer']} {row['unit']}, {row['ratio']}")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")

    for name in names:
        spec, batch, steps = SUBJECTS[name]
        our = ours(spec, arguments.data, batch, steps)
        note(compare(f"step/{name}/bare", f"{name}, batch {batch}", our, bare(spec, batch, steps), "bare", runs))
        if name == "simclr-w16" and not arguments.quick:
            for peer_name, same in (("lightly", False), ("lightly-same-precision", True)):
                peer = lightly(arguments.data, batch, steps, same)
                note(compare(f"step/{name}/{peer_name}", f"{name} from files", our, peer, peer_name, runs))
    cells = [(r["id"], r["ours"], r["peer"], r["unit"], r["ratio"], f"{r['low']} .. {r['high']}") for r in rows]
    table("training steps, interleaved", ("id", "ours", "peer", "unit", "ratio", "range"), cells)


if __name__ == "__main__":
    main()
