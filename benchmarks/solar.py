"""Defects in solar cells: pretraining without labels on 2,624 electroluminescence images, judged by "defective".

    python benchmarks/solar.py runs/solar/cells [--recipe simclr_solar] [--seeds 3] [--keep runs/solar]
                               [--validate] [--prepare] [--quick] [--json FILE]

The images come with the package elpv-dataset (`pip install elpv-dataset`; CC BY-NC-SA 4.0, for research), 300 px,
grey, each with a probability of being defective. A cell is called defective from 0.5 on. CELLS becomes

    images/*.png      copies of the package's
    train.csv         three quarters of the cells: path, label, probability, module; split by label, probability and
    test.csv          the rest                      kind of module (mono- or polycrystalline), with a fixed seed
    unlabelled.csv    the paths of train.csv alone: what is pretrained on

Per seed: pretraining, `ssl-kit evaluate --balanced`, the linear probe on 10 % of the labels, and fine-tuning on 10 %
beside the same network from scratch. --validate puts a quarter of *train* into test.csv: settings were chosen so.
Finished parts of a seed are kept under --keep and not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image
from record import tell

from ssl_kit.core.errors import UserError
from ssl_kit.data.labels import stratified
from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.features import feature_sets
from ssl_kit.evaluation.fewshot import draw_rows
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.report.pictures import draw_grid
from ssl_kit.verbs.evaluate import evaluate
from ssl_kit.verbs.finetune import finetune

TEST = 0.25  # of the cells, as in the publication of the labels (arXiv:1807.02894)
DEFECTIVE = 0.5  # probability from which a cell is called so
FRACTION, DRAWS = 0.1, 5  # of the labels, and how often they are drawn for the linear probe
LAYERS = 4  # of the encoder: its stages side by side, 240 numbers; cracks are fine, and the last stage is coarse
QUICK = 100  # images
METRICS = ("balanced_accuracy", "macro_f1", "auroc")
COLUMNS = ("path", "label", "probability", "module")
QUERIES = ("images/cell0408.png", "images/cell1654.png")  # cracked cells of test: mono- and polycrystalline
SHOWN = 7  # neighbours of each
SIDE, BAR = 96, 6  # pixels of a cell in the picture, and of the bar below it
WHAT = {
    "linear/all": "linear probe, all labels",
    "linear/10pct": "linear probe, 10 % of the labels, 5 draws",
    "finetune/10pct": "fine-tuned, 10 % of the labels",
    "knn/all": "kNN, k chosen, all labels",
}
Row = dict[str, Any]


def package_cells() -> tuple[Path, list[Row]]:
    """Where the package keeps its data, and a row per cell."""
    found = find_spec("elpv_dataset")
    if found is None or found.origin is None:
        raise UserError("the images lie in the package elpv-dataset, which is missing: pip install elpv-dataset")
    data = Path(found.origin).parent / "data"
    rows = []
    for line in (data / "labels.csv").read_text().splitlines():
        path, probability, module = line.split()
        label = "defective" if float(probability) >= DEFECTIVE else "intact"
        rows.append({"path": path, "label": label, "probability": float(probability), "module": module})
    return data, rows


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test): a `TEST` share of the cells of each probability and kind of module."""
    strata = np.unique([f"{row['module']} {row['probability']}" for row in rows], return_inverse=True)[1]
    test = stratified(strata, TEST, seed)
    return tuple([row for row, held in zip(rows, test, strict=True) if held == part] for part in (False, True))


def prepare(folder: Path, validate: bool) -> None:
    """Writes CELLS; see the top of this file."""
    data, rows = package_cells()
    train, test = split(rows, seed=0)
    if validate:
        train, test = split(train, seed=1)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in train + test:
        if not (folder / row["path"]).exists():
            shutil.copyfile(data / row["path"], folder / row["path"])
    for name, part, columns in (("train", train, COLUMNS), ("test", test, COLUMNS), ("unlabelled", train, COLUMNS[:1])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(part)


def pretrained(recipe: str, seed: int, cells: Path, keep: Path, quick: bool) -> Path:
    """The run folder of a seed, trained if need be."""
    run = keep / f"{Path(recipe).stem}-{seed}"
    if not (run / "encoder" / "encoder.json").is_file():
        command = [sys.executable, "-m", "ssl_kit", "pretrain", str(cells / "unlabelled.csv"), "--run", str(run)]
        if (run / "checkpoints").is_dir() and not quick:
            command += ["--resume"]
        else:
            command += ["-c", recipe, "--seed", str(seed), "--overwrite"]
            command += ["--limit", str(QUICK), "--batch-size", "32", "--epochs", "1"] if quick else []
        subprocess.run(command, check=True)
    return run


def some(part: Embeddings, rows: np.ndarray) -> Embeddings:
    """The images at positions `rows`."""
    return replace(part, vectors=part.vectors[rows], labels=part.labels[rows], ids=[part.ids[row] for row in rows])


def few_labels(run: Path, cells: Path, seed: int, limit: int | None) -> dict[str, dict[str, float]]:
    """The balanced linear probe on `FRACTION` of the labels of each class, the mean of `DRAWS` draws, per features."""
    encoder = Encoder.load(run / "encoder")
    train, test = open_labelled(str(cells), reading=encoder.reading, limit=limit)
    found = {}
    for features in feature_sets(encoder, train, test, run / "features", layers=LAYERS, seed=seed):
        drawn = [draw_rows(features.train.labels, fraction=FRACTION, seed=seed, draw=draw) for draw in range(DRAWS)]
        scores = [
            linear_probe(some(features.train, rows), features.test, balanced=True, seed=seed).metrics for rows in drawn
        ]
        found[features.name] = {name: mean(score[name] for score in scores) for name in METRICS}
    return found


def scores_of(run: Path, cells: Path, seed: int, quick: bool) -> Row:
    """Every score of a seed, {"EVALUATION/LABELS/FEATURES": metrics}, and what the run says of itself."""
    limit = QUICK if quick else None
    only = "knn,linear,retrieval,health"
    results = evaluate(str(run), str(cells), only=only, layers=LAYERS, balanced=True, seed=seed, limit=limit)["results"]
    scores = {
        f"{result['evaluation']}/all/{result['features']}": result["metrics"]
        for result in results
        if result["evaluation"] == "linear" or (result["evaluation"] == "knn" and result["settings"]["chosen"])
    }
    scores |= {f"linear/10pct/{name}": found for name, found in few_labels(run, cells, seed, limit).items()}
    epochs = 1 if quick else 30
    tuned = finetune(str(run), str(cells), fraction=FRACTION, epochs=epochs, batch_size=64, seed=seed, limit=limit)
    names = {"encoder": "encoder", "random_init": "scratch"}
    scores |= {f"finetune/10pct/{names[result['features']]}": result["metrics"] for result in tuned["results"]}
    facts = json.loads((run / "run.json").read_text())
    return {"scores": scores, "minutes": facts["seconds"] / 60, "images_per_second": facts["images_per_second"]}


def table_of(seeds: Sequence[Row]) -> list[Row]:
    """A row per score: mean and standard deviation over the seeds, and the interval of the first one."""
    minutes = round(mean(one["minutes"] for one in seeds), 2)
    rows: list[Row] = [{"id": "solar/pretrain", "what": "pretraining", "seeds": len(seeds), "minutes": minutes}]
    first = seeds[0]["scores"]
    for kind, name in [(kind, name) for kind in WHAT for name in first if name.startswith(f"{kind}/")]:
        row: Row = {"id": f"solar/{name}", "what": WHAT[kind], "seeds": len(seeds)}
        for metric in [metric for metric in METRICS if metric in first[name]]:
            values = [one["scores"][name][metric] for one in seeds]
            row[metric] = round(mean(values), 4)
            row[f"{metric}_std"] = round(stdev(values), 4) if len(values) > 1 else None
            if f"{metric}_low" in first[name]:
                row[f"{metric}_interval"] = "..".join(
                    f"{first[name][f'{metric}_{end}']:.3f}" for end in ("low", "high")
                )
        rows.append(row)
    return rows


def draw_nearest(path: Path, run: Path, cells: Path) -> None:
    """A picture of the training cells nearest to each of `QUERIES`: a row by the encoder, a row by the pixels.

    The bar below a cell is its probability of being defective: light 0, black from end to end 1.
    """
    with open(cells / "train.csv") as one, open(cells / "test.csv") as two:
        probability = {row["path"]: float(row["probability"]) for file in (one, two) for row in csv.DictReader(file)}
    encoder = Encoder.load(run / "encoder")
    train, test = open_labelled(str(cells), reading=encoder.reading)
    rows = []
    for features in feature_sets(encoder, train, test, run / "features", baselines=("pixels",), layers=LAYERS):
        asked = [features.test.ids.index(query) for query in QUERIES]
        near = search(normalised(features.train.vectors), normalised(features.test.vectors[asked]), SHOWN)[1]
        rows += [
            [query, *(features.train.ids[row] for row in found)] for query, found in zip(QUERIES, near, strict=True)
        ]
    order = [row for pair in zip(rows[: len(QUERIES)], rows[len(QUERIES) :], strict=True) for row in pair]
    tiles = np.array([[tile(cells / name, probability[name]) for name in row] for row in order])
    draw_grid(
        path,
        tiles[:, :, None],  # (R, K, 1, h, w)
        ["cracked cell", *(f"{place}" for place in range(1, SHOWN + 1))],
        "Nearest training cells of two test cells: first by the encoder, then by the pixels. The bar below a cell is "
        "its probability of being defective. Images: elpv-dataset, CC BY-NC-SA 4.0, scaled down.",
    )


def tile(path: Path, probability: float) -> np.ndarray:
    """(h, w) in [0, 1]: a cell and the bar below it."""
    with Image.open(path) as image:
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
    bar = np.full((BAR, SIDE), 0.85, dtype=np.float32)
    bar[1:, : round(probability * SIDE)] = 0
    return np.concatenate((pixels, bar))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="folder to prepare the images and manifests in")
    parser.add_argument("--recipe", default="simclr_solar")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/solar"))
    parser.add_argument("--validate", action="store_true", help="hold a quarter of train out and leave test alone")
    parser.add_argument("--prepare", action="store_true", help="write the images and manifests, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 100 images: shows no quality")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    cells, keep, quick = arguments.cells, arguments.keep, arguments.quick
    prepare(cells, arguments.validate)
    if arguments.prepare:
        return
    keep = keep / "quick" if quick else keep
    found = []
    for seed in range(1 if quick else arguments.seeds):
        run = pretrained(arguments.recipe, seed, cells, keep, quick)
        kept = run / "solar.json"
        if quick or not kept.is_file():
            kept.write_text(json.dumps(scores_of(run, cells, seed, quick), indent=1) + "\n")
        found.append(json.loads(kept.read_text()))
        if seed == 0:
            draw_nearest(keep / "nearest.png", run, cells)
    tell(table_of(found), arguments.json)


if __name__ == "__main__":
    main()
