"""One table of all methods: kNN, linear and attentive probe, fine-tuning; at full length, at 64 and at 16 dimensions.

    python benchmarks/methods.py data/cifar10 [--recipes simclr_cifar10_small,...] [--seeds 3] [--keep runs/methods]
                                 [--finetune 0] [--scores FOLDER] [--quick] [--search] [--json FILE]

Pretrains each recipe once per seed (`ssl-kit pretrain DATA/train -c RECIPE --seed S`), then scores its encoder and the
same network untrained on DATA/train against DATA/test; pixels and their PCA once. A code that was trained to be cut
(`dims`) is cut; other features are reduced by PCA fitted on the training images. kNN has k = 20, T = 0.07; the linear
probe's l2 is chosen on a held-out fifth of train; test is read once per encoder. Fine-tuning, of the encoders of seed
--finetune, is `ssl-kit finetune --epochs 5` with all labels and with 1 % of them (at least 500 steps), each beside the
same network from scratch. Restartable: what was scored is kept in docs/numbers/methods/, with the machine and commit it
was made by, and not made again; encoders are kept under --keep, an interrupted pretraining is resumed.

--search tries four settings of each recipe, two learning rates by two of what matters next, for half the recipe's
length on 45,000 of the training images with one seed, scored on the other 5,000: test has no part in a recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from record import RECORDS, commit_now, machine, tell

from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import settled
from ssl_kit.evaluation.attentive import Tokens, attentive_probe
from ssl_kit.evaluation.features import FeatureSet, feature_sets, few_views, reduced
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import knn
from ssl_kit.verbs.finetune import finetune
from ssl_kit.views.recipe import plain

RECIPES = ("simclr_cifar10_small", "mae_cifar10_tiny", "vae_cifar10_small", "aavae_cifar10_small")
DIMS = (64, 16)
PCA_DIMS = (128, 64, 16)  # of the pixels
HELD_OUT = 500  # training images of each class that a search is scored on
STRENGTH = ("views.strength", (0.5, 1.0))
TRIED: dict[str, tuple[tuple[float, float], tuple[str, tuple[float, float]]]] = {  # recipe: rates, another option
    "simclr_cifar10_medium": ((0.5, 1.0), STRENGTH),
    "byol_cifar10_small": ((0.3, 1.0), STRENGTH),
    "dino_cifar10_small": ((1e-3, 2e-3), STRENGTH),
    "mocov3_cifar10_small": ((0.5, 1.0), STRENGTH),
    "vicreg_cifar10_small": ((0.1, 0.3), STRENGTH),
    "lejepa_cifar10_small": ((2e-3, 4e-3), STRENGTH),
    "mae_cifar10_tiny": ((2e-3, 4e-3), ("method.mask_ratio", (0.6, 0.75))),
}
FINETUNE_EPOCHS = 5
Row = dict[str, Any]
Sized = tuple[int, str, FeatureSet]


def pretrained(recipe: str, seed: int, data: Path, keep: Path, quick: bool) -> Path:
    """The run folder of a recipe and seed, trained if need be."""
    run = keep / f"{recipe}-{seed}"
    if not (run / "encoder" / "encoder.json").is_file():
        command = [sys.executable, "-m", "ssl_kit", "pretrain", str(data / "train"), "--run", str(run)]
        if (run / "checkpoints").is_dir():
            command += ["--resume"]
        else:
            command += ["-c", recipe, "--seed", str(seed), "--overwrite"]
            command += ["--limit", "2000", "--epochs", "1", "--minutes", "null"] if quick else []
        subprocess.run(command, check=True)
    return run


def cut(features: FeatureSet, dim: int) -> FeatureSet:
    """The first `dim` numbers of each vector."""
    parts = [replace(part, vectors=part.vectors[:, :dim].copy()) for part in (features.train, features.test)]
    return FeatureSet(features.name, *parts)


def sizes_of(features: FeatureSet, nested: tuple[int, ...], dims: tuple[int, ...]) -> Iterator[Sized]:
    """(dimension, how it was reduced, features): all of them, then `dims`."""
    own = features.train.vectors.shape[1]
    yield own, "full", features
    below = [dim for dim in dims if dim < own]
    cuts = [dim for dim in below if features.name == "encoder" and dim in nested]
    for dim in cuts:
        yield dim, "cut", cut(features, dim)
    by_pca = [dim for dim in below if dim not in cuts]
    for dim, part in zip(by_pca, reduced(features, by_pca), strict=True):
        yield dim, "pca", part


def probed(features: FeatureSet, nested: tuple[int, ...], dims: tuple[int, ...], seed: int) -> Iterator[Row]:
    """kNN and linear probe at every size."""
    for dim, how, part in sizes_of(features, nested, dims):
        row: Row = {"features": features.name, "dim": dim, "reduced": how}
        for name, result in (
            ("knn", knn(part.train, part.test, k=20, temperature=0.07)),
            ("linear", linear_probe(part.train, part.test, seed=seed)),
        ):
            row |= top1(name, result.metrics)
        yield row


def top1(name: str, metrics: dict[str, float]) -> Row:
    """Score and interval under `name`."""
    return {f"{name}{end}": round(metrics[f"top1{end}"], 4) for end in ("", "_low", "_high")}


def scores(run: Path, data: Path, seed: int, limit: int | None) -> list[Row]:
    """kNN, linear and attentive probe of the encoder and of the same network untrained."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    nested = tuple(recipe["method"].get("init_args", {}).get("dims") or ())
    facts = json.loads((run / "run.json").read_text())
    train, test = open_labelled(str(data), limit=limit)
    encoder, rows = Encoder.load(run / "encoder"), list[Row]()
    told = {"minutes": round(facts["seconds"] / 60, 2), "verdict": facts["verdict"]["state"]}
    for features in feature_sets(encoder, train, test, run / "features", baselines=("random_init",), seed=seed):
        rows += [row | told for row in probed(features, nested, DIMS, seed)]
    by_network = {row["features"]: row for row in rows if row["reduced"] == "full"}
    for name, network in (("encoder", encoder), ("random_init", encoder.fresh(seed))):
        module = Tokens(network)
        with settled(network, partial(few_views, train, network.image_size)):
            parts = [embed(module, part, view=plain(network.image_size)) for part in (train, test)]
        by_network[name] |= top1("attentive", attentive_probe(*parts, width=module.width, seed=seed).metrics)
    return rows


def pixel_scores(run: Path, data: Path, limit: int | None) -> list[Row]:
    """kNN and linear probe of the pixels, at the image size of a run, and of their PCA."""
    train, test = open_labelled(str(data), limit=limit)
    encoder = Encoder.load(run / "encoder")
    *_, pixels = feature_sets(encoder, train, test, run / "features", baselines=("pixels",))
    return list(probed(pixels, (), PCA_DIMS, 0))


def finetune_scores(run: Path, data: Path, seed: int, limit: int | None) -> list[Row]:
    """Fine-tuning with all labels and with 1 % of them, beside the same network from scratch."""
    rows = [{"features": name, "reduced": "full"} for name in ("encoder", "random_init")]
    for fraction in (1.0, 0.01):
        out = str(run / f"finetune-{fraction:g}")
        done = finetune(
            str(run), str(data), out=out, fraction=fraction, epochs=FINETUNE_EPOCHS, seed=seed, limit=limit, resume=True
        )
        for row, result in zip(rows, done["results"], strict=True):
            row.update(top1("finetune" if fraction == 1 else "finetune_1pct", result["metrics"]))
    return rows


def split(data: Path, keep: Path) -> Path:
    """A folder like `data` of its training images alone: the last of each class are its test/."""
    made = keep / "split"
    if not made.is_dir():
        for label in sorted((data / "train").iterdir()):
            images = sorted(label.iterdir())
            for part, paths in (("train", images[:-HELD_OUT]), ("test", images[-HELD_OUT:])):
                (made / part / label.name).mkdir(parents=True)
                for path in paths:
                    (made / part / label.name / path.name).symlink_to(path.resolve())
    return made


def searched(recipe: str, data: Path, keep: Path, folder: Path) -> Iterator[Row]:
    """A row for each of the four settings: kNN and linear probe on images held out of train."""
    halves, (option, values) = split(data, keep), TRIED[recipe][1]
    written = yaml.safe_load((Path(__file__).parent.parent / "recipes" / f"{recipe}.yaml").read_text())
    short = ["--epochs", f"{written['epochs'] / 2:g}"]
    if "grow" in written:
        short += ["--grow", str({epoch // 2: side for epoch, side in written["grow"].items()})]
    for rate in TRIED[recipe][0]:
        for value in values:
            name = f"search-{recipe}-{rate:g}-{value:g}"

            def make() -> list[Row]:
                given = [*short, "--method.optim.lr", f"{rate:g}", f"--{option}", f"{value:g}"]  # noqa: B023
                run = keep / name  # noqa: B023
                if not (run / "encoder" / "encoder.json").is_file():
                    begin = ["--resume"] if (run / "checkpoints").is_dir() else ["-c", recipe, *given, "--overwrite"]
                    subprocess.run(
                        [sys.executable, "-m", "ssl_kit", "pretrain", str(halves / "train"), "--run", str(run), *begin],
                        check=True,
                    )
                train, test = open_labelled(str(halves))
                encoder, facts = Encoder.load(run / "encoder"), json.loads((run / "run.json").read_text())
                features = next(feature_sets(encoder, train, test, run / "features", baselines=()))
                row = next(probed(features, (), (), 0))
                return [row | {"lr": rate, option: value, "verdict": facts["verdict"]["state"]}]  # noqa: B023

            for row in kept(folder / f"{name}.json", make):
                yield {"id": f"methods/{name}"} | row


COLUMNS = ("knn", "linear", "attentive", "finetune", "finetune_1pct")


def table_of(found: dict[str, list[list[Row]]]) -> list[Row]:
    """A row per recipe, features and dimension: mean over the seeds, spread, and the interval of the first seed."""
    rows = []
    for recipe, per_seed in found.items():
        for position, first in enumerate(per_seed[0]):
            same = [one[position] for one in per_seed]
            assert len({(one["features"], one["dim"], one["reduced"]) for one in same}) == 1, same
            row: Row = {"id": f"methods/{recipe}/{first['features']}/{first['dim']}", "reduced": first["reduced"]}
            for name in [name for name in COLUMNS if name in first]:
                values = [one[name] for one in same if name in one]
                row[name] = round(mean(values), 4)
                row[f"{name}_std"] = round(stdev(values), 4) if len(values) > 1 else None
                row[f"{name}_interval"] = f"{first[name + '_low']}..{first[name + '_high']}"
            rows.append(row | {"minutes": first.get("minutes"), "seeds": len(same)})
    return rows


def kept(path: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows of `path`; made and written, with where they came from, if they are not there."""
    if not path.is_file():
        made = {"commit": commit_now(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}
        made |= {"rows": make()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made, indent=1) + "\n")
    return json.loads(path.read_text())["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ in class folders")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=Path("runs/methods"))
    parser.add_argument("--scores", type=Path, default=RECORDS / "methods")
    parser.add_argument("--first-seed", type=int, default=0, help="begin with this seed")
    parser.add_argument("--finetune", type=int, default=0, help="fine-tune the encoders of this seed; -1: none")
    parser.add_argument("--search", action="store_true", help="four settings of each recipe, on training images alone")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch of 2,000 images: shows no quality")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    data, seeds, keep, folder, limit = arguments.data, arguments.seeds, arguments.keep, arguments.scores, None
    if arguments.quick:
        seeds, keep, folder, limit = 1, keep / "quick", keep / "quick" / "scores", 3000
    if arguments.search:
        recipes = TRIED if arguments.recipes == ",".join(RECIPES) else arguments.recipes.split(",")
        tell([row for recipe in recipes for row in searched(recipe, data, keep, folder)], arguments.json)
        return
    found: dict[str, list[list[Row]]] = {recipe: [] for recipe in arguments.recipes.split(",")}
    runs: dict[tuple[str, int], Path] = {}
    for seed in range(arguments.first_seed, seeds):
        for recipe, per_seed in found.items():
            make = partial(pretrained, recipe, seed, data, keep, arguments.quick)
            per_seed.append(kept(folder / f"{recipe}-{seed}.json", lambda: scores(make(), data, seed, limit)))  # noqa: B023
            runs[recipe, seed] = keep / f"{recipe}-{seed}"
    for (recipe, seed), run in runs.items():
        path = folder / f"{recipe}-{seed}-finetune.json"
        if seed == arguments.finetune or (seed == 0 and path.is_file()):
            tuned = {row["features"]: row for row in kept(path, partial(finetune_scores, run, data, seed, limit))}
            for row in found[recipe][seed - arguments.first_seed]:
                if row["reduced"] == "full":
                    row.update({name: value for name, value in tuned[row["features"]].items() if name not in row})
    if runs:
        some = next(iter(runs.values()))
        found["pixels"] = [kept(folder / "pixels.json", lambda: pixel_scores(some, data, limit))]
    tell(table_of(found), arguments.json)


if __name__ == "__main__":
    main()
