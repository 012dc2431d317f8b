"""Our views in others' loops: the examples of docs/other_loops.md before and after, images/s and kNN over seeds.

    python benchmarks/loops.py TRAIN TEST [--images 3000] [--epochs 6] [--seeds 3] [--quick] [--json FILE]

TRAIN and TEST are folders of class folders; so many images of TRAIN, equally of each class, are trained on
in batches of 128. Each example is a process of its own, before and after in turn. Speed is from the first step to the
last; kNN (k=20, a gallery of the training images, queries of TEST) is of the backbone's features. The difference of the
means is told with its standard error over the seeds.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import tell

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
NAMES = {"lightly_cifar": "lightly", "plain_loop": "torchvision"}
CHILD = """
import json, runpy, sys
script, train, test = sys.argv[1:]
sys.argv = [script, train]
made = runpy.run_path(script, run_name="__main__")
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.views.recipe import plain
network = made["model"].backbone if "model" in made else made["backbone"]
mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if "transform" in made else ((0.0,), (1.0,))
wrapped = Wrapped(network, (32, 32), mean=mean, std=std)  # as lightly's own transform hands images over
parts = [embed(wrapped, open_source(one, labelled=True), view=plain((32, 32))) for one in (train, test)]
arrays = [array for part in parts for array in (part.vectors, part.labels)]
print(json.dumps({"speed": made["speed"], "knn": knn_accuracy(*arrays)}))
"""


def one(script: str, train: Path, test: Path, seed: int, epochs: int) -> dict[str, float]:
    environment = {**os.environ, "LOOP_SEED": str(seed), "LOOP_EPOCHS": str(epochs), "LOOP_BATCH": "128"}
    command = [sys.executable, "-c", CHILD, str(EXAMPLES / f"{script}.py"), str(train), str(test)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=train.parent, check=False)
    if made.returncode:
        sys.exit(made.stderr)
    return json.loads(made.stdout.splitlines()[-1])


def some(folder: Path, images: int, place: Path) -> Path:
    """A copy of so many images, equally of each class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for inside in classes:
        (place / inside.name).mkdir(parents=True)
        for path in sorted(inside.iterdir())[: images // len(classes)]:
            shutil.copy(path, place / inside.name)
    return place


def changed(script: str) -> int:
    """Lines of the example that are others afterwards, without its docstring and blank ones."""
    texts = [(EXAMPLES / f"{name}.py").read_text().splitlines()[1:] for name in (script, f"{script}_ours")]
    lines = [line for line in difflib.unified_diff(*texts, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    return max(sum(line[0] == sign and bool(line[1:].strip()) for line in lines) for sign in "+-")


def row(script: str, before: list[dict[str, float]], after: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [ours["speed"] / theirs["speed"] for ours, theirs in zip(after, before, strict=True)]
    knn = [np.array([run["knn"] for run in runs]) for runs in (after, before)]
    error = float(np.sqrt(sum(scores.var(ddof=1) / len(scores) for scores in knn))) if len(ratios) > 1 else None
    return {
        "id": f"loops/{script}",
        "what": f"{changed(script)} lines changed",
        "ours": float(np.median([run["speed"] for run in after])),
        "peer": float(np.median([run["speed"] for run in before])),
        "peer_name": NAMES[script],
        "unit": "images/s",
        "ratio": float(np.median(ratios)),
        "low": min(ratios),
        "high": max(ratios),
        "runs": len(ratios),
        "knn": float(knn[0].mean()),
        "knn_before": float(knn[1].mean()),
        "difference": float(knn[0].mean() - knn[1].mean()),
        "standard_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--images", type=int, default=3_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="600 images, an epoch, a seed")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.quick:
        given.images, given.epochs, given.seeds = 600, 1, 1
    rows = []
    with tempfile.TemporaryDirectory() as place:
        train = some(given.train, given.images, Path(place) / "train")
        test = some(given.test, given.images // 2, Path(place) / "test")
        for script in NAMES:
            runs: dict[str, list[dict[str, float]]] = {script: [], f"{script}_ours": []}
            for seed in range(given.seeds):
                for name, found in runs.items():
                    found.append(one(name, train, test, seed, given.epochs))
                    print(name, seed, found[-1], flush=True)
            rows.append(row(script, *runs.values()))
    tell(rows, given.json)


if __name__ == "__main__":
    main()
