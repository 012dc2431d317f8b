"""What training and evaluation reach on an accelerator, beside its limits: one command, under 270 s on one GPU.

    python benchmarks/gpu.py [data/cifar10] [--only gpu/loss,gpu/knn] [--quick] [--json FILE]

"bare" is the better of eager and compiled forward, backward and optimiser step of the same method on one fixed batch on
the device, in the same process: the limit of `pretrain`, which is timed between two steps, with the device waited for
at both. Rows are written as they are made; one that cannot be had here says why. --quick is a tenth of everything, for
machines without a GPU: it shows that the program runs, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from benchmarks.commands import first_step
from benchmarks.step import lightly_loop
from benchmarks.views import kornia, pictures
from ssl_kit.core.console import say, table
from ssl_kit.core.machine import (
    choose_channels_last,
    choose_device,
    choose_precision,
    choose_tf32,
    compile_blocks,
    use_tf32,
)
from ssl_kit.core.random import Key
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.simclr import nt_xent
from ssl_kit.verbs.defaults import build_method
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.verbs.pretrain import pretrain
from ssl_kit.views.device import DeviceViews
from ssl_kit.views.recipe import ViewRecipe, plain
from ssl_kit.views.sample import sample

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
DEVICE = choose_device().value
_TOGETHER = 1 if DEVICE == "cpu" else 10  # calls that are timed at once
NOTHING: Row = {"ours": None, "peer": None, "ratio": None}


class Subject(NamedTuple):
    """A training: its method, views, images of `stored` pixels, batch, timed steps, and whether code is compiled."""

    method: Row
    views: Row
    side: int
    stored: int
    batch: int
    steps: int
    compiled: bool = True


def _method(name: str, encoder: str, args: Row, **options: Any) -> Row:
    module = name.lower()
    path = f"ssl_kit.methods.{module}.{name}"
    return {"class_path": path, "init_args": {"encoder": {"name": encoder, "args": args}, **options}}


_TINY: Row = {"patch_size": 2, "embed_dim": 192, "depth": 12, "num_heads": 3}
_TINY |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
SUBJECTS = {
    "simclr-r18": Subject(_method("SimCLR", "resnet18_small", {}), {"preset": "simclr", "blur": 0.0}, 32, 32, 512, 200),
    "mae-vit": Subject(_method("MAE", "vit_tiny_patch16_224", _TINY), {"preset": "mae"}, 32, 32, 1024, 60),
    "vae": Subject(_method("VAE", "resnet18_small", {}, dim=128), {"preset": "plain", "flip_x": 0.5}, 32, 32, 512, 100),
    "dino-vit-s": Subject(
        _method("DINO", "vit_small_patch16_224", {"dynamic_img_size": True}), {"preset": "dino"}, 224, 256, 64, 20
    ),
    # compiling sixteen bottlenecks takes longer than all other rows; both sides are eager
    "simclr-r50-224": Subject(_method("SimCLR", "resnet50", {}), {"preset": "simclr"}, 224, 256, 128, 20, False),
}
_SMALL = {"channels": [8, 8, 16, 16]}


def quick(subject: Subject) -> Subject:
    """The same in small."""
    encoder = subject.method["init_args"]["encoder"]
    made = {"name": "resnet18_small", "args": _SMALL} if "resnet" in encoder["name"] else dict(encoder)
    if "vit" in encoder["name"]:
        made["args"] = {**encoder["args"], "embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4}
    method = {**subject.method, "init_args": {**subject.method["init_args"], "encoder": made}}
    views = {**subject.views, "blur": 0.0} | ({"local_size": 8} if subject.views["preset"] == "dino" else {})
    return Subject(method, views, 16, 16, 8, 2, compiled=False)


class Stopwatch(pl.Callback):
    """Times steps `first` to `last`, the device waited for at both ends."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.seconds, self._began = first, last, 0.0, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After each step."""
        if trainer.global_step in (self.first, self.last):
            wait()
            now = time.perf_counter()
            self.seconds, self._began = now - self._began, now


def wait() -> None:
    """For the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(act: Callable[[], object], seconds: float) -> float:
    """Seconds of one call, the median of those that fit into so long, after two."""
    for _ in range(2):
        act()
    wait()
    times: list[float] = []
    while _TOGETHER * sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        for _ in range(_TOGETHER):  # the device is waited for at both ends only, as in training
            act()
        wait()
        times.append((time.perf_counter() - began) / _TOGETHER)
    return median(times)


def our_step(subject: Subject, images: np.ndarray) -> float:
    """Images per second of `pretrain`."""
    warm = 10 if subject.steps > 2 else 1
    watch = Stopwatch(warm, warm + subject.steps)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            images,
            method=subject.method,
            views=ViewRecipe(**subject.views),
            run=f"{folder}/run",
            image_size=subject.side,
            batch_size=subject.batch,
            epochs=1_000_000,
            evaluate_every=1_000_000,
            compile="on" if subject.compiled and DEVICE == "cuda" else "off",
            trainer={"max_steps": warm + subject.steps, "callbacks": [watch]},
        )
    return subject.batch * subject.steps / watch.seconds


def bare_step(subject: Subject, images: np.ndarray) -> float:
    """Images per second of the same method on one batch."""
    size, count = (subject.side, subject.side), subject.batch
    use_tf32(choose_tf32("auto", DEVICE).value)
    method = build_method(subject.method, image_size=size, channels=3, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    method.to(DEVICE).train()
    recipe = ViewRecipe(**subject.views).fitted(method.preset, size, 3)
    views = [torch.rand(count, 3, *view.size, device=DEVICE) for view in recipe.build(size, 3, method.num_views)]
    if choose_channels_last(method.encoder.model, DEVICE).value:
        method.to(memory_format=torch.channels_last)
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    optimiser, _ = method.optim.build(method, images_per_step=count, steps_per_epoch=100, total_steps=1000)
    kind = getattr(torch, choose_precision("auto", DEVICE).value)
    key = Key(0, 0, torch.arange(count, device=DEVICE))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
            loss = method.loss(views, key)["loss"]
        loss.backward()
        optimiser.step()

    seconds = [timed(step, 0.02 * subject.steps)]
    if subject.compiled and DEVICE == "cuda":
        compile_blocks(method.encoder.model)
        seconds.append(timed(step, 0.02 * subject.steps))
    return count / min(seconds)


def steps(small: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A row of each subject."""
    for name, subject in SUBJECTS.items():
        yield f"gpu/{name}/bare", partial(step_row, quick(subject) if small else subject)


def step_row(subject: Subject) -> Row:
    """Ours, bare, ours, bare."""
    images = pictures(min(64, 4 * subject.batch), subject.stored)
    images = images[np.arange(4 * subject.batch) % len(images)]
    pairs = [(our_step(subject, images), bare_step(subject, images)) for _ in range(2)]
    ratios = [ours / bare for ours, bare in pairs]
    ours, bare = (median(rates) for rates in zip(*pairs, strict=True))
    return figures(ours, bare, "images/s", median(ratios), ratios)


def figures(ours: float, peer: float, unit: str, ratio: float, ratios: list[float] | None = None) -> Row:
    """A row's numbers; the ratio is better-is-larger."""
    low, high = (min(ratios), max(ratios)) if ratios else (ratio, ratio)
    row: Row = {"ours": float(f"{ours:.4g}"), "peer": float(f"{peer:.4g}"), "unit": unit, "ratio": round(ratio, 3)}
    return row | {"low": round(low, 3), "high": round(high, 3), "runs": len(ratios or [0])}


def views_row(size: int, stored: int, count: int, seconds: float) -> Row:
    """Two views of a batch, beside kornia's of one."""
    images = pictures(min(count, 64), stored)[np.arange(count) % min(count, 64)]
    there = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)
    view, sides = ViewRecipe(blur=0.5).build((size, size), 3, 1)[0], np.full(count, stored)
    params = torch.from_numpy(sample(view, 0, 0, np.arange(count), 0, sides, sides)).to(DEVICE)
    make = DeviceViews(compiled=DEVICE == "cuda")
    ours = timed(lambda: make(there, params, view.size), seconds)
    peer = kornia(images, size, 0.5, device=DEVICE, batch=count)
    theirs = timed(lambda: peer(count), seconds)
    return figures(1e3 * ours, 1e3 * theirs, "ms", theirs / ours)


def loss_row(rows: int, memory: bool, seconds: float) -> Row:
    """NT-Xent forward and backward beside the plain formula: milliseconds, or MiB above the input."""
    z = torch.randn(rows, 128, device=DEVICE, requires_grad=True)

    def plain_formula() -> None:
        unit = F.normalize(z, dim=1)
        s = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
        F.cross_entropy(s, torch.arange(rows, device=DEVICE).roll(rows // 2)).backward()

    acts = (lambda: nt_xent(z, 0.2).backward(), plain_formula)
    if memory:
        if DEVICE != "cuda":
            return NOTHING | {"unit": "MiB", "note": "memory of a GPU"}
        ours, plainly = (_peak(act) / 2**20 for act in acts)
        return figures(ours, plainly, "MiB", plainly / ours)
    ours, plainly = (1e3 * timed(act, seconds) for act in acts)
    return figures(ours, plainly, "ms", plainly / ours)


def _peak(act: Callable[[], object]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    return torch.cuda.max_memory_allocated() - before


def knn_row(gallery: int, queries: int) -> Row:
    """Exact search of k = 200 at 512 numbers on the device, beside FAISS on all cores."""
    rng = np.random.default_rng(0)
    known, asked = (normalised(rng.standard_normal((count, 512), np.float32)) for count in (gallery, queries))
    k = min(200, gallery)
    search(known, asked, k, device=DEVICE)
    seconds = []
    for device in (DEVICE, "cpu"):
        began = time.perf_counter()
        search(known, asked, k, device=device)
        seconds.append(time.perf_counter() - began)
    return figures(seconds[0], seconds[1], "s", seconds[1] / seconds[0])


def embed_row(count: int, batch: int, small: bool) -> Row:
    """`embed` of images in memory, beside the encoder alone on one batch that is there already; images per second."""
    images = pictures(64, 32)[np.arange(count) % 64]
    encoder = Encoder("resnet18_small", _SMALL if small else {}, (32, 32)).to(DEVICE).eval()
    if choose_channels_last(encoder.model, DEVICE).value:
        encoder.to(memory_format=torch.channels_last)
    source = open_source(images)
    ours = count / timed(
        lambda: embed(encoder, source, view=plain((32, 32)), batch_size=batch), 3.0 if count > 999 else 0
    )
    there = torch.rand(batch, 3, 32, 32, device=DEVICE)
    if choose_channels_last(encoder.model, DEVICE).value:
        there = there.contiguous(memory_format=torch.channels_last)
    kind = getattr(torch, choose_precision("auto", DEVICE).value)
    with torch.inference_mode(), torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
        forward = batch / timed(lambda: encoder(there), 1.0 if count > 999 else 0)
    return figures(ours, forward, "images/s", ours / forward)


def start_row(train: Path) -> Row:
    """Seconds of `pretrain` from the command to the first step."""
    return NOTHING | {"ours": first_step(str(train), 1)["ours"], "unit": "s"}


def evaluate_row(data: Path) -> Row:
    """Seconds of `evaluate` after imports, baselines and report included, of a ResNet-18 after one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"method": SUBJECTS["simclr-r18"].method, "batch_size": 512, "epochs": 1, "image_size": 32}
        pretrain(str(data / "train"), run=f"{folder}/run", **options)
        return NOTHING | {"ours": evaluate(f"{folder}/run", str(data))["seconds"], "unit": "s"}


def lightly_row(train: Path, limit: int) -> Row:
    """Two epochs of lightly's own SimCLR script on so many files, beside ours on them; images per second."""
    epoch = lightly_loop(str(train), 256, device=DEVICE, images=limit)
    began = time.perf_counter()
    theirs = 256 * (len([*epoch()]) + len([*epoch()])) / (time.perf_counter() - began)
    subject = SUBJECTS["simclr-r18"]
    with tempfile.TemporaryDirectory() as folder:
        made = pretrain(
            str(train), method=subject.method, run=f"{folder}/run", limit=limit, batch_size=256, epochs=2, image_size=32
        )
        ours = 2 * limit / made["seconds"]
        return figures(ours, theirs, "images/s", ours / theirs)


def equal_row() -> Row:
    """How many of the tests that need a GPU pass here."""
    program = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests" / "test_gpu.py")]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*program, f"--junitxml={folder}/said.xml"], capture_output=True, cwd=ROOT, check=False)
        cases = ElementTree.parse(f"{folder}/said.xml").getroot().iter("testcase")
        kinds = {case.attrib["name"]: {part.tag for part in case} for case in cases}
    tried = [name for name, kind in kinds.items() if "skipped" not in kind]
    failed = [name for name in tried if kinds[name] & {"failure", "error"}]
    return {"tried": len(tried), "survived": len(tried) - len(failed), "note": ", ".join(failed)}


def rows(data: Path | None, small: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every row's id, and what makes it; the dearest last."""
    seconds = 0.05 if small else 1.0
    yield "gpu/equal", equal_row
    yield "gpu/loss/1024/plain", partial(loss_row, 64 if small else 1_024, False, seconds)
    yield "gpu/loss/16384/plain", partial(loss_row, 64 if small else 16_384, True, seconds)
    yield "gpu/knn/50000/faiss-cpu", partial(knn_row, *((200, 20) if small else (50_000, 10_000)))
    yield "gpu/views/32/kornia", partial(views_row, 32, 32, 8 if small else 512, seconds)
    yield "gpu/views/224/kornia", partial(views_row, 32 if small else 224, 256, 4 if small else 256, seconds)
    yield "gpu/embed/forward", partial(embed_row, 64 if small else 20_000, 32 if small else 512, small)
    yield from steps(small)
    if data is None:
        missing = lambda: NOTHING | {"note": "no data given"}
        yield from ((name, missing) for name in ("gpu/start/seconds", "gpu/evaluate/seconds", "gpu/simclr-r18/lightly"))
        return
    train = data / "train"
    yield "gpu/start/seconds", partial(start_row, train)
    yield "gpu/evaluate/seconds", partial(evaluate_row, data)
    yield "gpu/simclr-r18/lightly", partial(lightly_row, train, 512 if small else 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="CIFAR-10 as folders train/ and test/")
    parser.add_argument("--only", default="", help="rows whose ids begin so, with commas")
    parser.add_argument("--quick", action="store_true", help="in small, for a machine without a GPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    made: list[Row] = []
    for name, make in rows(arguments.data, arguments.quick):
        if not name.startswith(tuple(arguments.only.split(","))):
            continue
        began = time.perf_counter()
        try:
            row = make() if DEVICE != "cpu" or arguments.quick else NOTHING | {"note": "not measured: no accelerator"}
        except ImportError as error:
            row = NOTHING | {"note": str(error)}
        except Exception as error:  # the other rows are still worth having
            row = NOTHING | {"note": f"{type(error).__name__}: {str(error)[:200]}"}
        made.append({"id": name, "what": DEVICE, **row, "took": round(time.perf_counter() - began, 1)})
        say(" · ".join(f"{key} {value}" for key, value in made[-1].items() if value is not None))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(made, indent=1) + "\n")
    cells = [[row["id"], *(row.get(key, "") for key in ("ours", "peer", "unit", "ratio", "note"))] for row in made]
    table("on the accelerator", ("id", "ours", "limit or peer", "unit", "ratio", "note"), cells)


if __name__ == "__main__":
    main()
