"""Does the verdict tell broken trainings from healthy ones? Short runs of every method, most of them spoilt on purpose.

    python benchmarks/verdict.py data/cifar10/train --json verdict.json            # goes on where it was stopped
    python benchmarks/verdict.py data/cifar10/train --only simclr/healthy --seeds 2
    python benchmarks/verdict.py data/cifar10/train --quick                        # one seed of five runs, 2 minutes

Each run has 200 steps of 128 views of 16 pixels: 4,000 images, a ResNet-18 of a quarter of the usual width (MAE: a ViT
of 4 blocks), 15 to 30 s on two cores. A broken run is found when the verdict is `stuck` or `collapsed`, or the guard
ends it. A healthy run that is called so is accused; 200 steps and 200 held-out images need not be enough for
`learning`, so that `unknown` is no mistake. With --learns healthy runs of 1,000 steps are made too, which must read
`learning`. The last rows are the counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ssl_kit
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.methods.byol import BYOL
from ssl_kit.methods.dino import DINO
from ssl_kit.methods.lejepa import LeJEPA
from ssl_kit.methods.mae import MAE
from ssl_kit.methods.method import Method
from ssl_kit.methods.mocov3 import MoCoV3
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.methods.vae import VAE
from ssl_kit.methods.vicreg import VICReg
from ssl_kit.training.curves import read_curves

STEPS, BATCH, SIDE, LIMIT = 200, 128, 16, 4_000
NARROW = {"name": "resnet18_small", "args": {"channels": [16, 32, 64, 128]}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "args": {
        **{"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
        **{"class_token": False, "global_pool": "avg", "fc_norm": False},
    },
}
SGD = {"name": "sgd", "lr": 0.5, "weight_decay": 5e-4}
FAMILIES: dict[str, tuple[type[Method], dict[str, Any], dict[str, Any]]] = {  # class, arguments, optimiser
    "simclr": (SimCLR, {"encoder": NARROW, "projection": [256, 64]}, {"name": "sgd", "lr": 0.5, "weight_decay": 5e-4}),
    "simclr-adamw": (SimCLR, {"encoder": NARROW, "projection": [256, 64]}, {"name": "adamw", "lr": 2e-3}),
    "mae": (MAE, {"encoder": VIT}, {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05}),
    "vae": (VAE, {"encoder": NARROW, "decoder_width": 16}, {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-4}),
    "aavae": (
        VAE,
        {"encoder": NARROW, "decoder_width": 16, "augmented": True},
        {"name": "adamw", "lr": 2e-3, "weight_decay": 1e-4},
    ),
    "byol": (BYOL, {"encoder": NARROW, "projection": [256, 64], "prediction": [256, 64], "tau": 0.97}, SGD),
    "dino": (
        DINO,
        {"encoder": NARROW, "small_crops": 2, "prototypes": 256, "hidden": [256, 64], "norm": "batch", "tau": 0.99},
        {"name": "adamw", "lr": 2e-3, "weight_decay": 0.04, "clip": 3.0},
    ),
    "mocov3": (MoCoV3, {"encoder": NARROW, "projection": [256, 64], "prediction": [256, 64], "momentum": 0.9}, SGD),
    "vicreg": (VICReg, {"encoder": NARROW, "expander": [256, 256]}, {**SGD, "lr": 0.1}),
    "lejepa": (
        LeJEPA,
        {"encoder": NARROW, "small_crops": 2, "projection": [256, 64], "trade_off": 0.02},
        {"name": "adamw", "lr": 2e-3, "weight_decay": 5e-4},
    ),
}
EVERYWHERE = ("lr0", "lr100", "constant", "detached", "x255", "div255")
FAULTS = {
    "simclr": (*EVERYWHERE, "no-negatives"),
    "simclr-adamw": (),
    "mae": EVERYWHERE,
    "vae": (*EVERYWHERE, "beta1000"),
    "aavae": (),
    "byol": ("detached", "lr100"),
    "dino": ("detached", "uniform"),
    "mocov3": ("detached", "lr100"),
    "vicreg": ("detached", "invariance-alone"),
    "lejepa": ("detached", "prediction-alone"),
}
COLLAPSING = {  # a setting under which nothing keeps features apart
    "uniform": {"teacher_temperature": [5.0, 5.0]},
    "invariance-alone": {"weights": [25.0, 0.0, 0.0]},
    "prediction-alone": {"trade_off": 1e-6},
    "beta1000": {"beta": 1_000.0},
}


class Detached:
    """No gradient reaches the encoder: only what stands on it learns."""

    def configure_optimizers(self: Any) -> Any:
        self.encoder.requires_grad_(False)
        return super().configure_optimizers()  # type: ignore[misc]


class Bytes:
    """Views in [0, 255]."""

    factor = 255.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch["views"] = [view * self.factor for view in batch["views"]]
        super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]


class Dark(Bytes):
    """Views in [0, 1/255]: divided once too often."""

    factor = 1 / 255


# the command line names classes by module and name
for _mixin in (Detached, Bytes, Dark):
    for _kind in (SimCLR, MAE, VAE, BYOL, DINO, MoCoV3, VICReg, LeJEPA):
        globals()[_name] = type(
            _name := f"{_mixin.__name__}{_kind.__name__}", (_mixin, _kind), {"__module__": __name__}
        )


class NoNegatives(SimCLR):
    """Asks for equal views and nothing else."""

    def loss(self, views: list[Tensor], key: Key) -> dict[str, Tensor]:
        first, second = F.normalize(self.project(views, key), dim=1).chunk(2)
        return {"loss": (first - second).square().sum(dim=1).mean()}

    def chance_loss(self, batch_size: int) -> float:
        return None  # type: ignore[return-value]


SPOILT = {"detached": "Detached", "x255": "Bytes", "div255": "Dark"}


def train(data: Path, family: str, fault: str, seed: int, run: Path, steps: int = STEPS) -> dict[str, Any]:
    """One row. A healthy run of 1,000 steps is to read `learning`; shorter ones are not to be accused."""
    kind, arguments, optim = FAMILIES[family]
    arguments, optim, path = dict(arguments), {**optim, "warmup_epochs": 1}, f"{kind.__module__}.{kind.__name__}"
    if fault in SPOILT:
        path = f"__main__.{SPOILT[fault]}{kind.__name__}"
    elif fault == "no-negatives":
        path = "__main__.NoNegatives"
    elif fault == "lr0":
        optim["lr"] = 1e-12
    elif fault == "lr100":
        optim["lr"] *= 100
    elif fault in COLLAPSING:
        arguments |= COLLAPSING[fault]
    if fault == "constant":
        data = run / "grey"
        grey_images(data)
    spec = {"class_path": path, "init_args": {**arguments, "optim": optim}}
    began = time.perf_counter()
    row: dict[str, Any] = {"id": f"{family}/{fault}/{seed}", "fault": fault}
    try:
        steps_per_epoch = -(-(LIMIT * 95 // 100) // BATCH)
        record = ssl_kit.pretrain(
            str(data), method=spec, run=str(run / "run"), overwrite=True, limit=LIMIT, image_size=SIDE,
            batch_size=BATCH, epochs=steps / steps_per_epoch, seed=seed, evaluate_every=1_000,
        )  # fmt: skip
        row |= {"state": record["verdict"]["state"], "reason": record["verdict"]["reason"]}
    except UserError as error:
        row |= {"state": "ended", "reason": str(error)[:80]}
    if fault == "learns":
        return row | {"right": row["state"] == "learning", "seconds": round(time.perf_counter() - began, 1)}
    broken = fault != "healthy"
    row["right"] = (row["state"] in ("stuck", "collapsed", "ended")) == broken
    return row | {"seconds": round(time.perf_counter() - began, 1)} | _signs(run / "run" / "metrics.csv")


def _signs(metrics: Path) -> dict[str, float]:
    """First and last value of what the verdict looks at."""
    rows = read_curves(metrics)
    signs = {}
    columns = ("loss", "effective_rank", "embedding_std", "uniformity", "alignment", "turned", "grown", "knn_top1")
    for name in (*columns, "knn_pixels", "knn_pca", "crops_top1", "crops_pixels"):
        found = [row[name] for row in rows if name in row]
        if found:
            signs |= {f"{name}_first": found[0], f"{name}_last": found[-1]}
    return signs


def grey_images(folder: Path) -> None:
    """4,000 images of one grey in two classes."""
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for number in range(LIMIT // 2):
            Image.fromarray(np.full((SIDE, SIDE, 3), 128, np.uint8)).save(folder / label / f"{number:04d}.png")


def counts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many of the broken were found, and how many of the healthy were not accused."""
    made = []
    for name, those in (
        ("broken-found", lambda fault: fault not in ("healthy", "learns")),
        ("healthy-not-accused", lambda fault: fault == "healthy"),
        ("learning-after-1000-steps", lambda fault: fault == "learns"),
    ):
        these = [row for row in rows if those(row["fault"])]
        right = sum(row["right"] for row in these)
        share = right / len(these) if these else None
        made.append({"id": f"verdict/{name}", "tried": len(these), "survived": right, "share": share})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, default=Path("verdict.json"))
    parser.add_argument("--seeds", type=int, default=2, help="of each broken run; healthy ones get twice as many")
    parser.add_argument("--only", default="", help="beginning of the ids to run")
    parser.add_argument("--learns", type=int, default=0, help="seeds of healthy runs of 1,000 steps of each method")
    parser.add_argument("--quick", action="store_true", help="one seed of a healthy run and of four faults")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
    rows = [row for row in rows if "fault" in row]
    plan = [
        (family, fault, seed)
        for seed in range(2 * arguments.seeds)
        for family in FAMILIES
        for fault in ("healthy", *FAULTS[family])
        if fault == "healthy" or seed < arguments.seeds
    ]
    plan += [(family, "learns", seed) for seed in range(arguments.learns) for family in FAMILIES]
    if arguments.quick:
        plan = [("simclr", fault, 0) for fault in ("healthy", "lr0", "lr100", "x255")] + [("mae", "detached", 0)]
    for family, fault, seed in plan:
        name = f"{family}/{fault}/{seed}"
        if name.startswith(arguments.only) and name not in [row["id"] for row in rows]:
            folder = Path(tempfile.mkdtemp(prefix="verdict-"))
            rows.append(train(arguments.data, family, fault, seed, folder, 1_000 if fault == "learns" else STEPS))
            shutil.rmtree(folder)
            print(json.dumps(rows[-1]), flush=True)
            arguments.json.write_text(json.dumps(rows + counts(rows), indent=1) + "\n")
    for row in counts(rows):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
