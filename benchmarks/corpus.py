"""A corpus of short runs, and what their curves tell: does the verdict say the truth, and can the end be foretold?

    python benchmarks/corpus.py make data/cifar10 [--runs 324] [--part 0/2] [--corpus FILE]   # goes on where it stopped
    python benchmarks/corpus.py score [--corpus FILE] [--json FILE]

Run number i is of method i % 6 and set i // 6 % 6; of each pair a third is spoilt on purpose, and the others draw their
settings by i: learning rate (a tenth to five times the usual), batch, images, size of the views, strength of the
augmentations, width. They train without labels, on 16 or 24 px, for 500 or 1,000 steps of 32 or 64 images on one thread
(20 to 90 s). Sets, of 32 px that are made smaller:

    cifar10    photographs                    digits     centred, as MNIST has them: pixels know them well
    places     digits at random places        textures   ten kinds in random colours, angles, scales
    shapes     ten kinds, coloured            solar      cells of solar modules, defective or not

A look is at the untrained encoder, after a fifth and at the end. What `metrics.csv` has of it is kept, and
(not after a fifth) what labels say, which no run sees: kNN among the training images and a linear probe, of 1,000 test
images, beside raw pixels and PCA of them; and scores of others and ours on the same features.

The truth of a run: is its encoder, by the score that its method is judged by, above pixels, PCA and itself untrained?
`score` prints how often the verdict, which has no labels here, is wrong; and of each score after a fifth and at the end
AUROC and rank correlation with that truth, beside those of a forecast by all of them, with each method and each set
left out in turn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minutes
import numpy as np
import solar
import torch
import verdict as planted
from PIL import Image, ImageDraw
from record import tell
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.transforms import v2

import ssl_kit
from ssl_kit.core.errors import UserError
from ssl_kit.core.spectrum import alpha_exponent
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import pixels
from ssl_kit.evaluation.features import Pca
from ssl_kit.evaluation.health import lidar
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.evaluation.retrieval import crops_top1
from ssl_kit.methods.method import Method
from ssl_kit.training import curves
from ssl_kit.training.curves import read_curves
from ssl_kit.training.verdict import BELOW, verdict
from ssl_kit.verbs import monitor
from ssl_kit.verbs import pretrain as verb

CORPUS = Path(__file__).parents[1] / "docs" / "numbers" / "corpus.jsonl"
METHODS = ("simclr", "mae", "vae", "byol", "dino", "vicreg")
SETS = ("cifar10", "digits", "places", "textures", "shapes", "solar")
SPOILT = 3  # of 9 runs of each method and set
BROKEN = ("lr0", "detached", "x255", "div255", "constant")
OWN = {"simclr": "no-negatives", "vae": "beta1000", "dino": "uniform", "vicreg": "invariance-alone"}
SIDE, TRAIN, TEST = 32, 2_000, 1_000
LIDAR_VIEWS, LIDAR_IMAGES, ASKED = 10, 100, 512
_POWERS = (-5, -4, -3, -2, -1)
_KNOWN: dict[tuple[object, ...], dict[str, float]] = {}  # of pixels, which runs of a process share
Images = tuple[np.ndarray, np.ndarray]  # (N, 32, 32, C) uint8, (N,) int64
Row = dict[str, Any]


# --- the sets


def shapes(count: int, generator: np.random.Generator) -> Images:
    """Ten kinds of shapes at random places, angles and sizes, a colour on a colour."""
    labels = np.arange(count) % 10
    return np.stack([_shape(int(kind), generator) for kind in labels]), labels


def _shape(kind: int, generator: np.random.Generator) -> np.ndarray:
    corners, inner = ((3, 1), (4, 1), (5, 1), (6, 1), (3, 0.4), (4, 0.4), (5, 0.45), (8, 0.5), (40, 1), (4, 0.8))[kind]
    wide = 4 * SIDE
    size, turn = generator.uniform(0.3, 0.45) * wide, generator.uniform(0, 2 * np.pi)
    x, y = generator.uniform(size, wide - size, 2)
    turns = turn + np.arange(2 * corners) * np.pi / corners
    lengths = size * np.where(np.arange(2 * corners) % 2, inner * (np.cos(np.pi / corners) if inner == 1 else 1), 1)
    points = [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(lengths, turns, strict=True)]
    ground, ink = generator.integers(0, 256, (2, 3))
    while abs(ground - ink).sum() < 200:
        ink = generator.integers(0, 256, 3)
    image = Image.new("RGB", (wide, wide), tuple(ground.tolist()))
    ImageDraw.Draw(image).polygon(points, fill=tuple(ink.tolist()))
    noisy = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) + generator.normal(0, 8, (SIDE, SIDE, 3))
    return np.asarray(noisy.clip(0, 255), np.uint8)


def _shrunk(images: np.ndarray) -> np.ndarray:
    to = v2.Resize((SIDE, SIDE), antialias=True)
    return np.asarray(to(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _each(source: Any) -> Iterator[np.ndarray]:
    """(1, H, W, C) uint8, one after the other."""
    return (pixels(source, row)[None] for row in range(len(source)))


def _opened(source: Any, count: int) -> Images:
    source = source.subset(np.sort(np.random.default_rng(0).permutation(len(source))[:count]))
    images = [_shrunk(part) for part in _each(source)]
    return np.concatenate(images), source.labels()


def made(name: str, data: Path, keep: Path) -> tuple[Images, Images]:
    """(train, test) of a set, kept in a file."""
    path = keep / f"{name}.npz"
    if not path.is_file():
        keep.mkdir(parents=True, exist_ok=True)
        np.savez(path, *(array for part in _made(name, data, keep) for array in part))
    with np.load(path) as file:
        first, labels, second, asked = (file[f"arr_{number}"] for number in range(4))
    return (first, labels), (second, asked)


def _made(name: str, data: Path, keep: Path) -> tuple[Images, Images]:
    generator = np.random.default_rng(0)
    if name == "shapes":
        return shapes(TRAIN, generator), shapes(TEST, generator)
    if name == "textures":
        kinds = np.arange(TRAIN + TEST) % 10
        drawn = np.stack([minutes.texture(int(kind), generator)[16:48, 16:48] for kind in kinds])
        return (drawn[:TRAIN], kinds[:TRAIN]), (drawn[TRAIN:], kinds[TRAIN:])
    if name == "digits":
        both, labels = _opened(open_source("mnist5k"), TRAIN + TEST)
        order = generator.permutation(len(both))
        both, labels = both[order], labels[order]
        return (both[:TRAIN], labels[:TRAIN]), (both[TRAIN:], labels[TRAIN:])
    if name == "solar":
        solar.prepare(keep / "cells", validate=False)
    train, test = {
        "cifar10": (str(data / "train"), str(data / "test")),
        "places": ("mnist64:train", "mnist64:test"),
        "solar": (str(keep / "cells" / "train.csv"), str(keep / "cells" / "test.csv")),
    }[name]
    return _opened(open_source(train), TRAIN), _opened(open_source(test), TEST)


# --- a run


def drawn(number: int) -> Row:
    """The settings of a run."""
    generator = np.random.default_rng(number)
    method, images, turn = METHODS[number % 6], SETS[number // 6 % 6], number // 36
    spoilt = turn % 9 % 3 == 2  # every third of the nine, so that a corpus that is cut short has them too
    faults = (*BROKEN, OWN[method]) if method in OWN else BROKEN
    size = {"batch": 32, "steps": 500, "side": 16, "narrow": True}
    grown = (("batch", 64), ("steps", 1_000), ("side", 24), ("narrow", False))  # one of them, or none: each doubles it
    size |= dict([(*grown, grown[0])[int(generator.integers(5))]] if generator.integers(4) == 0 else [])
    return {
        "run": number,
        "method": method,
        "set": images,
        "fault": faults[int(generator.integers(len(faults)))] if spoilt else "healthy",
        "rate": 1.0 if spoilt else round(float(10 ** generator.uniform(-1, 0.7)), 3),
        "images": int(generator.choice([1_000, 2_000])),
        "strength": float(generator.choice([0.25, 0.5, 1.0])),
        **size,
    }


def method_of(settings: Row) -> Row:
    """class_path and init_args."""
    kind, arguments, optim = planted.FAMILIES[settings["method"]]
    arguments, fault, mae = dict(arguments), settings["fault"], settings["method"] == "mae"
    encoder = arguments["encoder"]
    if settings["narrow"]:
        smaller = {"embed_dim": 48} if mae else {"channels": [8, 16, 32, 64]}
        arguments["encoder"] = {**encoder, "args": {**encoder["args"], **smaller}}
    rate = 1e-12 if fault == "lr0" else 0.5 * optim["lr"] * settings["rate"]  # the usual one is of steps of 128
    optim = {**optim, "warmup_epochs": 1, "lr": rate, "lr_per": None}
    path = f"{kind.__module__}.{kind.__name__}"
    if fault in planted.SPOILT:
        path = f"verdict.{planted.SPOILT[fault]}{kind.__name__}"
    elif fault == "no-negatives":
        path = "verdict.NoNegatives"
    return {"class_path": path, "init_args": {**arguments, **planted.COLLAPSING.get(fault, {}), "optim": optim}}


class Wider(monitor.Measure):
    """A look that also notes what labels say, and scores of others."""

    name, look = "", 0
    truth: tuple[Images, Images]

    def _scores(self, encoder: Any, *given: Any) -> dict[str, float]:
        scores, first = super()._scores(encoder, *given), bool(given[-1])
        scores |= {"crops": scores["crops_top1"], "alpha": alpha_exponent(given[0])}
        embedded = lambda images: _embedded(encoder, images)
        scores |= self._evidence(embedded, encoder.image_size)
        views = self._views(encoder.image_size, LIDAR_VIEWS, (0.3, 1.0), self.images.source, LIDAR_IMAGES)
        scores["lidar"] = lidar([embedded(view) for view in views])
        self.look = 0 if first else self.look + 1
        if self.look != 1:
            scores |= self._labels(embedded, encoder.image_size, "")
        if first:
            raw = lambda images: images.reshape(len(images), -1).astype(np.float32)
            pca = Pca.of(raw(self._stack(self.images.source, 2_048, encoder.image_size)), min(encoder.dim, 128))
            for name, network in (("pixels", raw), ("pca", lambda images: pca.apply(raw(images)))):
                given_names = self._evidence(network, encoder.image_size)
                scores |= {f"{one}_{name}": value for one, value in given_names.items()}
                scores |= self._labels(network, encoder.image_size, f"_{name}")
        return {name: float(value) for name, value in scores.items() if np.isfinite(value)}

    def _evidence(self, embedded: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]) -> dict[str, float]:
        """Retrieval of crops that do not overlap, and of random ones."""
        height, width = size
        wide = self._stack(self.images.source, ASKED, (height, 2 * width))
        both = np.concatenate([embedded(wide[:, :, :width]), embedded(wide[:, :, width:])], axis=1)
        random = self._views(size, 2, (0.2, 0.6), self.images.source, ASKED)
        instances = np.concatenate([embedded(view) for view in random], axis=1)
        return {"apart": crops_top1(both), "instances": crops_top1(instances)}

    def _labels(self, embedded: Callable[[np.ndarray], np.ndarray], size: tuple[int, int], of: str) -> dict[str, float]:
        (gallery, labels), (queries, asked) = self.truth
        known = (self.name, len(gallery), *size, of)
        if of == "_pixels" and known in _KNOWN:
            return _KNOWN[known]
        first, second = (embedded(_resized(images, size)) for images in (gallery, queries))
        mean, scale = first.mean(axis=0), (1.0 if of else first.std(axis=0) + 1e-6)
        centred = (first - mean, second - mean) if of else (first, second)  # as the pixels of the monitor
        found = {
            f"truth_knn{of}": knn_accuracy(centred[0].copy(), labels, centred[1].copy(), asked),
            f"truth_linear{of}": ridge((first - mean) / scale, labels, (second - mean) / scale, asked),
        }
        if of == "_pixels":
            _KNOWN[known] = found
        return found

    @staticmethod
    def _stack(source: Any, count: int, size: tuple[int, int]) -> np.ndarray:
        return _resized(np.concatenate(list(_each(source.subset(np.arange(min(count, len(source))))))), size)

    @staticmethod
    def _views(
        size: tuple[int, int], count: int, scale: tuple[float, float], source: Any, images: int
    ) -> list[np.ndarray]:
        crop, state = v2.RandomResizedCrop(size, scale=scale, antialias=True), torch.get_rng_state()
        torch.manual_seed(0)
        those = torch.from_numpy(Wider._stack(source, images, (SIDE, SIDE))).permute(0, 3, 1, 2)
        views = [torch.stack([crop(image) for image in those]).permute(0, 2, 3, 1).numpy() for _ in range(count)]
        torch.set_rng_state(state)
        return views


def _resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    moved = torch.from_numpy(images).permute(0, 3, 1, 2)
    return np.asarray(v2.functional.resize(moved, list(size), antialias=True).permute(0, 2, 3, 1))


def _embedded(encoder: Any, images: np.ndarray) -> np.ndarray:
    mode = encoder.training
    encoder.eval()
    with torch.inference_mode():
        parts: list[Tensor] = [
            encoder(part.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last))
            for part in torch.from_numpy(images).split(500)
        ]
    encoder.train(mode)
    return torch.cat(parts).float().numpy()


def ridge(train: np.ndarray, labels: np.ndarray, test: np.ndarray, asked: np.ndarray) -> float:
    """Top-1 of a linear classifier: least squares on the classes with a penalty chosen on a fifth of train.

    A logistic one takes a minute for the pixels, and orders features alike.
    """
    targets = np.eye(int(max(labels.max(), asked.max())) + 1)[labels] - 0.5
    held = np.arange(len(train)) % 5 == 0

    def solved(rows: np.ndarray, penalties: tuple[float, ...]) -> list[np.ndarray]:
        those = np.hstack([train[rows], np.ones((rows.sum(), 1), np.float32)]).astype(np.float64)
        values, basis = np.linalg.eigh(those.T @ those / len(those))
        against = basis.T @ (those.T @ targets[rows] / len(those))
        return [basis @ (against / (values.clip(0) + penalty)[:, None]) for penalty in penalties]

    score = lambda weights, points, wanted: float(((points @ weights[:-1] + weights[-1]).argmax(1) == wanted).mean())
    penalties = tuple(float(values.sum()) * 10.0**power for values in [np.square(train).mean(0)] for power in _POWERS)
    right = [score(weights, train[held], labels[held]) for weights in solved(~held, penalties)]
    return score(solved(np.ones_like(held), (penalties[int(np.argmax(right))],))[0], test, asked)


def trained(settings: Row, parts: tuple[Images, Images], keep: Path | None = None) -> Row:
    """A row of the corpus; the encoder goes to KEEP/encoders."""
    (images, labels), test = parts
    rows = np.sort(np.random.default_rng(0).permutation(len(images))[: settings["images"]])
    images, labels = images[rows], labels[rows]
    Wider.name, Wider.truth = settings["set"], ((images, labels), test)
    given = np.full_like(images, 128) if settings["fault"] == "constant" else images
    steps_per_epoch, began = -(-len(images) // settings["batch"]), time.perf_counter()
    curves._EARLY = (settings["steps"] // 5,)  # type: ignore[misc]
    curves._SHARE = 0.0  # type: ignore[misc]
    monitor._MEASURED = 1_000  # type: ignore[misc]
    verb.Measure, verb.see = Wider, lambda *_: {}  # type: ignore[assignment, misc]
    monitor.write_report = lambda *_: None  # type: ignore[assignment]
    folder, method = Path(tempfile.mkdtemp(prefix="corpus-")), method_of(settings)
    row = dict(settings)
    try:
        record = ssl_kit.pretrain(
            given, method=method, run=str(folder / "run"), image_size=settings["side"],
            batch_size=settings["batch"], epochs=settings["steps"] / steps_per_epoch, seed=settings["run"],
            views={} if settings["method"] in ("mae", "vae") else {"strength": settings["strength"]},
            threads=1, verbose=False,
        )  # fmt: skip
        row |= {"state": record["verdict"]["state"], "reason": record["verdict"]["reason"]}
        row |= {"dim": record.encoder.dim, "chance_loss": record.get("chance_loss")}
    except UserError as error:
        row |= {"state": "ended", "reason": str(error)[:80]}
    name, kind = method["class_path"].rsplit(".", 1)
    judged: type[Method] = getattr(__import__(name, fromlist=[kind]), kind)
    row |= {"judged_by": judged.judged_by[0], "compares_images": judged.compares_images}
    row["looks"] = _looks(read_curves(folder / "run" / "metrics.csv"))
    if keep is not None and (folder / "run" / "encoder").is_dir():  # for scores that somebody thinks of later
        shutil.copytree(folder / "run" / "encoder", keep / "encoders" / str(settings["run"]), dirs_exist_ok=True)
    shutil.rmtree(folder)
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def _looks(rows: list[dict[str, float]]) -> list[Row]:
    """The looks, each with what was logged last before it."""
    found, logged = [], dict[str, float]()
    for row in rows:
        if "loss" in row:
            logged = row
        if "effective_rank" in row:
            both = ({} if row["step"] == 0 else logged) | row
            dropped = ("seconds", "images_per_second", "waiting_share")
            found.append({name: float(f"{value:.5g}") for name, value in both.items() if name not in dropped})
    return found


def make(data: Path, count: int, part: str, corpus: Path, keep: Path) -> None:
    """Makes the runs that are missing; several processes may share them."""
    own, of = map(int, part.split("/"))
    mine = corpus.with_suffix(f".{own}of{of}.jsonl") if of > 1 else corpus
    done = {row["run"] for path in corpus.parent.glob(f"{corpus.stem}*.jsonl") for row in read(path)}
    for number in range(own, count, of):
        if number in done:
            continue
        settings = drawn(number)
        row = trained(settings, made(settings["set"], data, keep), keep)
        with open(mine, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = {name: row[name] for name in ("run", "method", "set", "fault", "state", "seconds")}
        last = row["looks"][-1] if row["looks"] else {}
        print(json.dumps(told | {name: last[name] for name in last if name.startswith("truth")}), flush=True)


def read(path: Path) -> list[Row]:
    """Rows of a corpus, in order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return sorted(rows, key=lambda row: row["run"])


# --- what the corpus says


def told(row: Row, rows: list[dict[str, float]] | None = None) -> str:
    """The state that the verdict gives these looks, by crops alone; at the end the guard may have ended the run."""
    if row["state"] == "ended" and rows is None:
        return "ended"
    return verdict(
        rows or row["looks"], dim=row["dim"], chance_loss=row["chance_loss"], contrastive=row["compares_images"],
        chance_margin=planted.FAMILIES[row["method"]][0].chance_margin, cropped=ASKED,
        knn_judges=row["judged_by"] == "knn",
    ).state  # fmt: skip


def margin(row: Row) -> float:
    """How far the finished encoder is above the best baseline, as a difference of log odds of the score that judges it.

    Methods that are judged by fine-tuning first are judged by the linear probe here.
    """
    by = "truth_knn" if row["judged_by"] == "knn" else "truth_linear"
    start, end = row["looks"][0], row["looks"][-1]
    return _odds(end[by], TEST) - max(_odds(start[f"{by}{of}"], TEST) for of in ("", "_pixels", "_pca"))


def _odds(share: float, count: int = ASKED) -> float:
    return float(np.log((share * count + 0.5) / ((1 - share) * count + 0.5)))


def signs(row: Row, look: int) -> dict[str, float]:
    """What a look without labels gives, larger is thought to be better; scores of crops beside pixels and the start."""
    start, now, chance = row["looks"][0], row["looks"][look], row["chance_loss"]
    found = {"loss": -now["loss"] if chance is None else (chance - now["loss"]) / abs(chance)}
    for name in ("crops", "apart", "instances"):
        best = max(_odds(start[f"{name}_pixels"]), _odds(start[f"{name}_pca"]))
        found |= {name: _odds(now[name]) - best, f"{name}, gained": _odds(now[name]) - _odds(start[name])}
    ranks = {"effective_rank": now["effective_rank"] / start["effective_rank"], "lidar": now["lidar"] / start["lidar"]}
    found |= {f"{name}, gained": float(np.log(value)) for name, value in ranks.items()}
    found |= {
        "effective_rank": now["effective_rank"] / row["dim"],
        "lidar": now["lidar"],
        "alpha": -now.get("alpha", 0.0),
    }
    return found | {"uniformity": -now["uniformity"], "alignment": -now.get("alignment", 1.0)}


def forecast(rows: list[Row], look: int, left_out: str) -> np.ndarray:
    """(N,) probabilities that runs end above the best baseline: logistic, each `left_out` foretold by the others."""
    points = np.array([list(signs(row, look).values()) for row in rows])
    truth, parts = np.array([margin(row) > 0 for row in rows]), np.array([row[left_out] for row in rows])
    found = np.full(len(rows), truth.mean())
    for part in np.unique(parts):
        fitted = parts != part
        if len(np.unique(truth[fitted])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(points[fitted], truth[fitted])
            found[~fitted] = model.predict_proba(points[~fitted])[:, 1]
    return found


def calibration(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error over five bins of equal count."""
    parts = np.array_split(np.argsort(probabilities, kind="stable"), 5)
    return float(sum(len(part) * abs(probabilities[part].mean() - truth[part].mean()) for part in parts) / len(truth))


def score(rows: list[Row]) -> list[Row]:
    """The figures, as rows of a record."""
    whole = [row for row in rows if row["looks"] and row["looks"][-1]["step"] == row["steps"]]
    healthy = [row for row in rows if row["fault"] == "healthy"]
    broken = [row for row in rows if row["fault"] != "healthy"]
    accused = ("stuck", "collapsed", "ended")
    share = lambda name, those, right: {
        "id": f"corpus/{name}", "tried": len(those), "survived": sum(map(right, those)),
        "share": round(sum(map(right, those)) / max(1, len(those)), 3),
    }  # fmt: skip
    above = lambda row: margin(row) > 0
    ended = [row for row in whole if row["fault"] == "healthy"]
    made = [
        share("broken/found", broken, lambda row: told(row) in accused),
        share("healthy/accused", healthy, lambda row: told(row) in accused),
        share("healthy/accused, above the best baseline", [row for row in ended if told(row) in accused], above),
        share("healthy/unknown", healthy, lambda row: told(row) == "unknown"),
        share("healthy/above the best baseline", ended, above),
        share("learning/above the best baseline", [row for row in whole if told(row) == "learning"], above),
        share("below pixels/above the best baseline", [row for row in whole if told(row) == BELOW], above),
    ]
    truth = np.array([above(row) for row in whole])
    for place, look in (("fifth", 1), ("end", -1)):
        for name in signs(whole[0], look):
            values = np.array([signs(row, look)[name] for row in whole])
            rank = spearmanr(values, [margin(row) for row in whole]).statistic
            auroc = round(float(roc_auc_score(truth, values)), 3)
            made.append({"id": f"corpus/{place}/{name}", "auroc": auroc, "spearman": round(float(rank), 3)})
        for left_out in ("method", "set"):
            found = forecast(whole, look, left_out)
            made.append({
                "id": f"corpus/{place}/forecast, a {left_out} left out",
                "auroc": round(float(roc_auc_score(truth, found)), 3),
                "calibration_error": round(calibration(found, truth), 3),
            })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("make", "score"))
    parser.add_argument("data", type=Path, nargs="?", help="make: CIFAR-10, train/ and test/ in class folders")
    parser.add_argument("--runs", type=int, default=324)
    parser.add_argument("--part", default="0/1", help="i/N: of N processes that share the runs")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--keep", type=Path, default=Path("runs/corpus"))
    parser.add_argument("--json", type=Path, help="score: write the rows to this file")
    arguments = parser.parse_args()
    if arguments.verb == "make":
        make(arguments.data, arguments.runs, arguments.part, arguments.corpus, arguments.keep)
    else:
        tell(score(read(arguments.corpus)), arguments.json)


if __name__ == "__main__":
    main()
