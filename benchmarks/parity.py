"""Do our views teach as much as torchvision's? SimCLR with each, otherwise equal, on CIFAR-10.

    python benchmarks/parity.py data/cifar10/train [--seeds 5] [--keep runs/parity] [--jobs 2] [--quick] [--json FILE]

Trains SimCLR (ResNet-18 of width 16, 32 px, 3 epochs: about 5 minutes on one core pair) once per seed and arm, on
45,000 of the training images, and scores kNN (k = 20) of the other 5,000 against them; test images are never read.
Same policy in both arms (SimCLR's for CIFAR: crop, flip, jitter at strength 0.5, gray), same order of images, same
initial weights per seed; "torchvision" runs torchvision.transforms v1 on PIL images, one by one, with its own
generators. A finished training is kept as a file under --keep: started again, the benchmark goes on with what is
missing. Each of the --jobs trainings at a time has one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_kit.core.random import Key
from ssl_kit.data.labels import stratified
from ssl_kit.data.opening import open_source
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.training.optim import Optim
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe, plain
from ssl_kit.views.sample import sample

ARMS = ("ours", "torchvision")
SIZE, BATCH, EPOCHS = (32, 32), 256, 3
STRENGTH = 0.5
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)

MakeViews = Callable[[np.ndarray, int, np.ndarray], list[Tensor]]  # (images, epoch, rows) -> two (B, 3, 32, 32)


def our_views(seed: int) -> MakeViews:
    views = ViewRecipe(strength=STRENGTH, blur=0.0).build(SIZE, 3, 2)

    def make(images: np.ndarray, epoch: int, rows: np.ndarray) -> list[Tensor]:
        sides = np.full(len(rows), SIZE[0])
        made = []
        for which, view in enumerate(views):
            params = sample(view, seed, epoch, rows, which, sides, sides)
            made.append(torch.from_numpy(apply_host((images, rows), params, view.size)))
        return made

    return make


def torchvision_views(seed: int) -> MakeViews:
    from torchvision import transforms as v1

    # the seed of the generators that torchvision draws from was set by the caller
    colour = v1.ColorJitter(0.8 * STRENGTH, 0.8 * STRENGTH, 0.8 * STRENGTH, 0.2 * STRENGTH)
    crop = [v1.RandomResizedCrop(SIZE[0]), v1.RandomHorizontalFlip()]
    policy = v1.Compose([*crop, v1.RandomApply([colour], p=0.8), v1.RandomGrayscale(0.2), v1.ToTensor()])

    def make(images: np.ndarray, epoch: int, rows: np.ndarray) -> list[Tensor]:
        pictures = [Image.fromarray(images[row]) for row in rows]
        return [torch.stack([policy(picture) for picture in pictures]) for _ in range(2)]

    return make


def train(arm: str, seed: int, training: Source, steps: int) -> SimCLR:
    """The recipe's SimCLR after `steps` steps; only the maker of the views differs between the arms."""
    torch.manual_seed(seed)
    encoder = Encoder("resnet18_small", {"channels": [16, 32, 64, 128]}, SIZE, mean=MEAN, std=STD)
    optim = Optim(name="sgd", lr=0.5, lr_per=256, weight_decay=5e-4, warmup_epochs=0.5)
    method = SimCLR(encoder, temperature=0.2, projection=(512, 128), optim=optim)
    method.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert training.stack is not None, "a built-in set or an array"
    images = training.stack[0][training.stack[1]]
    plan = TrainingPlan(len(training), BATCH, seed)
    optimiser, schedule = optim.build(
        method, images_per_step=BATCH, steps_per_epoch=plan.steps_per_epoch, total_steps=steps
    )
    make = {"ours": our_views, "torchvision": torchvision_views}[arm](seed)
    for _, planned in zip(range(steps), plan.batches(), strict=False):
        rows = np.asarray(planned.rows)
        views = [view.contiguous(memory_format=torch.channels_last) for view in make(images, planned.epoch, rows)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(views, Key(seed, planned.epoch, torch.from_numpy(rows)))["loss"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return method.eval()


def one(arm: str, seed: int, data: str, steps: int | None, kept: Path) -> None:
    """Trains and scores one run; writes its record."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    source = open_source(data)
    held = stratified(source.labels(), 0.1)  # 5,000 of 50,000, the same for all runs
    training, queries = source.subset(~held), source.subset(held)
    plan = TrainingPlan(len(training), BATCH, seed)
    encoder = train(arm, seed, training, steps or EPOCHS * plan.steps_per_epoch).encoder
    seconds = time.perf_counter() - began
    known, asked = (embed(encoder, part, view=plain(SIZE)) for part in (training, queries))
    score = knn_accuracy(known.vectors, known.labels, asked.vectors, asked.labels)
    kept.parent.mkdir(parents=True, exist_ok=True)
    record = {"arm": arm, "seed": seed, "knn": round(float(score), 4), "seconds": round(seconds), "steps": steps}
    kept.write_text(json.dumps(record) + "\n")
    print(f"{arm} seed {seed}: kNN {score:.4f} in {seconds:.0f} s", flush=True)


def run_all(seeds: int, data: str, steps: int | None, keep: Path, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Runs what is missing, `jobs` at a time, arms alternating; the records of all runs per arm, in order of seed."""
    missing = [(arm, seed) for seed in range(seeds) for arm in ARMS if not (keep / f"{arm}-{seed}.json").exists()]
    running: list[subprocess.Popen[bytes]] = []
    try:
        while missing or running:
            while missing and len(running) < jobs:
                arm, seed = missing.pop(0)
                command = [sys.executable, __file__, data, "--one", arm, str(seed), "--keep", str(keep)]
                running.append(subprocess.Popen([*command, *(["--steps", str(steps)] if steps else [])]))
            time.sleep(0.5)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    raise SystemExit(f"a training failed with status {process.returncode}; see above")
    finally:
        for process in running:
            process.terminate()
    return {arm: [json.loads((keep / f"{arm}-{seed}.json").read_text()) for seed in range(seeds)] for arm in ARMS}


def rows_of(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row per run, one per arm and the difference of the means with its standard error."""
    rows: list[dict[str, Any]] = []
    scores = {arm: [record["knn"] for record in records] for arm, records in runs.items()}
    for arm, records in runs.items():
        for record in records:
            row = {"id": f"parity/{arm}/{record['seed']}", "what": "kNN (k = 20) of 5,000 held-out training images"}
            rows.append({**row, "value": record["knn"], "seconds": record["seconds"]})
    for arm, values in scores.items():
        spread = stdev(values) if len(values) > 1 else None
        row = {"id": f"parity/{arm}", "what": f"mean of {len(values)} seeds", "value": round(mean(values), 4)}
        rows.append({**row, "std": None if spread is None else round(spread, 4)})
    ours, theirs = scores["ours"], scores["torchvision"]
    error = None
    if len(ours) > 1:
        error = round(((stdev(ours) ** 2 + stdev(theirs) ** 2) / len(ours)) ** 0.5, 4)
    difference = round(mean(ours) - mean(theirs), 4)
    rows.append({"id": "parity/difference", "what": "ours - torchvision", "value": difference, "std": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the training images of CIFAR-10, in class folders")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path, default=Path("runs/parity"), help="folder of finished trainings")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--steps", type=int, help="steps of each training instead of 3 epochs")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: one seed, 30 steps; shows no parity")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arm, seed = arguments.one[0], int(arguments.one[1])
        one(arm, seed, arguments.data, arguments.steps, arguments.keep / f"{arm}-{seed}.json")
        return
    seeds, steps, keep = arguments.seeds, arguments.steps, arguments.keep
    if arguments.quick:
        seeds, steps, keep = 1, 30, keep / "quick"
    rows = rows_of(run_all(seeds, arguments.data, steps, keep, arguments.jobs))
    for row in rows:
        print(f"{row['id']:28} {row['value']:8.4f}  {row.get('std') or ''}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
