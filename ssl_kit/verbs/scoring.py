"""What `ssl-kit evaluate` measures, entry by entry of `evaluation/catalog.py`, and what it prints of it.

A function `score_NAME` scores one kind of features at a time (`feature_sets` holds one in memory) and gives its
results; none where it does not apply to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypedDict

import numpy as np

from ssl_kit.core.console import say, table, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_memory, size_text
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.evaluation.attentive import Tokens, attentive_probe, sgd_probe
from ssl_kit.evaluation.catalog import (
    ABOVE,
    AS_IT_CAME,
    ENCODER,
    EVALUATIONS,
    GAIN,
    JUDGED_BY,
    ONLY,
    PRETRAINED,
    row_name,
)
from ssl_kit.evaluation.features import FeatureSet, reduced
from ssl_kit.evaluation.fewshot import Way, dimension_curve, few_shot
from ssl_kit.evaluation.health import augmented, health
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import CUSTOMARY, knn_rows
from ssl_kit.evaluation.result import Result, paired_difference
from ssl_kit.evaluation.retrieval import instance_retrieval, retrieval
from ssl_kit.evaluation.robustness import robustness
from ssl_kit.verbs import pictures
from ssl_kit.views.recipe import plain

_NETWORKS = (ENCODER, "random_init")  # what label-free health says something about
_BYTES = "bytes_per_million_images"  # the setting that only points of the dimension curve have


@dataclass(frozen=True)
class Task:
    """What is scored, and the options that can move a score.

    Attributes:
        train: labelled images.
        test: labelled images.
        folder: where files that belong to a score go.
        dims: to which features are also reduced, ascending.
        nested: whether the encoder gives a code, whose first dimensions may stand alone.
        balanced: weigh classes alike in the linear probe.
        seed: of everything drawn.
        batch_size: images per forward pass.
        device: that searches and solves; networks compute where their weights are.
    """

    train: Source
    test: Source
    folder: Path
    dims: tuple[int, ...] = ()
    nested: bool = False
    balanced: bool = False
    seed: int = 0
    batch_size: int = 256
    device: str = "cpu"


def default_names(encoder: Encoder | Wrapped) -> tuple[str, ...]:
    """What is measured when nothing is asked for."""
    plain = isinstance(encoder, Wrapped) or encoder.is_convolutional
    kinds = ("always",) if plain else ("always", "transformers")
    return tuple(name for name in ONLY if EVALUATIONS[name].default in kinds)


def score_knn(task: Task, features: FeatureSet) -> Iterator[Result]:
    """With k and T chosen on train, and as customary; after PCA to the task's dimensions too."""
    name, seed = features.name, task.seed
    yield from knn_rows(features.train, features.test, seed=seed, features=name, device=task.device)
    if name == "pixels":  # PCA of the pixels stands for them at lower dimensions
        return
    for smaller in reduced(features, task.dims, seed, task.device):
        asked = ((None, None), CUSTOMARY[0])
        rows = knn_rows(smaller.train, smaller.test, asked, seed=seed, features=name, device=task.device)
        for row in rows:
            row.settings["reduced_by"] = "pca"
        yield from rows


def score_linear(task: Task, features: FeatureSet) -> Iterator[Result]:
    """With every metric of probabilities."""
    train, test, balanced = features.train, features.test, task.balanced
    yield linear_probe(train, test, balanced=balanced, seed=task.seed, features=features.name, device=task.device)


def score_sgd(task: Task, features: FeatureSet) -> Iterator[Result]:
    """The literature's linear probe."""
    yield sgd_probe(features.train, features.test, seed=task.seed, features=features.name, device=task.device)


def score_attentive(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of networks; the tokens of all images are in memory meanwhile."""
    if features.network is None or not isinstance(features.network.module, Encoder):
        return
    network = features.network.module
    module = Tokens(network)
    needed, available = 4.0 * module.dim * (len(task.train) + len(task.test)), available_memory()
    if needed > available / 2:
        told = f"the tokens of all images take {size_text(needed)}, {size_text(available)} of memory are available; "
        told += "use --limit, or leave attentive out of --only"
        if features.name == ENCODER:
            raise UserError(told)
        warn(f"{features.name} has no attentive probe: {told}")  # a larger network than the encoder
        return
    view, label = plain(network.image_size), f"tokens, {features.name}"
    parts = [
        embed(module, part, view=view, batch_size=task.batch_size, label=label) for part in (task.train, task.test)
    ]
    yield attentive_probe(*parts, width=module.width, seed=task.seed, features=features.name, device=task.device)


def score_health(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of the encoder and the untrained network, without labels."""
    if features.name not in _NETWORKS or features.network is None:
        return
    views = augmented(features.network, task.test, seed=task.seed) if features.name == ENCODER else None
    yield health(features.train, views=views, seed=task.seed, features=features.name, device=task.device)


def score_few_shot(task: Task, features: FeatureSet) -> Iterator[Result]:
    """A row per protocol and number of labels."""
    yield from few_shot(features.train, features.test, seed=task.seed, features=features.name, device=task.device)


def score_retrieval(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Among the test images."""
    yield retrieval(features.test, seed=task.seed, features=features.name, device=task.device)


def score_instances(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of networks: one crop of a test image by another."""
    if features.network is not None:
        yield instance_retrieval(features.network, task.test, seed=task.seed, features=features.name)


def score_curve(task: Task, features: FeatureSet) -> Iterator[Result]:
    """By dimensions, a row per way to fewer of them; of a nested code cut short, too."""
    if features.name == "pixels":  # PCA of the pixels stands for them
        return
    ways: tuple[Way, ...] = ("pca", "random") if features.name == ENCODER else ("pca",)
    if features.name == ENCODER and task.nested:
        ways = ("cut", *ways)
    yield from dimension_curve(
        features, dims=task.dims, ways=ways, balanced=task.balanced, seed=task.seed, device=task.device
    )


def score_robustness(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of networks: corrupted test images."""
    if features.network is not None:
        yield robustness(
            features.train, task.test, features.network, seed=task.seed, features=features.name, device=task.device
        )


def score_details(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of the encoder: classes, confusions, ROC, confident mistakes and suspected label errors, as files."""
    if features.name != ENCODER:
        return
    train, test, folder = features.train, features.test, task.folder / "details"
    probe = linear_probe(
        train, test, balanced=task.balanced, seed=task.seed, keep_probabilities=True, device=task.device
    )
    scores = pictures.write_classes(folder, test, probe)
    pictures.write_mistakes(task.folder, task.test, test, probe)
    metrics = {"lowest_recall": min(score.recall for score in scores if score.num_images)}
    for name, part in (("train", train), ("test", test)):
        metrics[f"suspected_{name}"] = pictures.write_suspects(folder / f"suspected_{name}.csv", part, task.device)
    yield Result("details", features.name, metrics, probe.settings, probe.made_by, probe.seconds)


def score_looks(task: Task, features: FeatureSet) -> Iterable[Result]:
    """Of the encoder: what it looks at, as pictures; nothing is scored."""
    network = features.network
    if features.name == ENCODER and network is not None and isinstance(network.module, Encoder):
        pictures.draw(task.folder / "pictures", network.module, features, task.train, task.test, task.seed)
    return ()


def compared(results: Sequence[Result], labels: np.ndarray, seed: int) -> list[Result]:
    """The encoder's top-1 gets its distances to the baselines of the same row, with paired 95 % intervals.

    `above_best_baseline`, and `above_NAME` for each of them, all with `_low` and `_high`; points of the dimension curve
    get the first only.
    """
    done = []
    for result in results:
        others = [other for other in results if other.features != ENCODER and row_name(other) == row_name(result)]
        if result.features == ENCODER and result.predictions is not None and others:
            best = max(others, key=lambda other: other.metrics["top1"])
            metrics = {**result.metrics, **_gap(GAIN, result, best, labels, seed)}
            for other in others if _BYTES not in result.settings else ():
                metrics |= _gap(f"{ABOVE}{other.features}", result, other, labels, seed)
            result = replace(result, metrics=metrics, settings={**result.settings, "best_baseline": best.features})  # noqa: PLW2901
        done.append(result)
    return done


def _gap(name: str, result: Result, other: Result, labels: np.ndarray, seed: int) -> dict[str, float]:
    assert result.predictions is not None and other.predictions is not None
    gap = paired_difference(labels, result.predictions, other.predictions, seed=seed)
    return dict(zip((name, f"{name}_low", f"{name}_high"), gap, strict=True))


def print_scores(results: Sequence[Result]) -> None:
    """One table: a row per score, a column per kind of features, the distance to the best baseline last."""
    results = [result for result in results if _BYTES not in result.settings]
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        for metric, words in EVALUATIONS[result.evaluation].metrics.items():
            if metric in result.metrics:
                cells = rows.setdefault(", ".join(filter(None, (row_name(result), words))), {})
                cells[result.features] = _cell(result, metric)
                if metric == "top1" and GAIN in result.metrics:
                    cells["gain"] = _distance(result.metrics, GAIN)
    kinds = list(dict.fromkeys(result.features for result in results))
    if rows:
        columns = ["on test, 95 % intervals", *map(_title, kinds), "above the best baseline"]
        table(
            "scores",
            columns,
            [[name, *(cells.get(kind, "") for kind in [*kinds, "gain"])] for name, cells in rows.items()],
        )


def in_words(results: Sequence[Result]) -> str:
    """What is best by kNN and by the linear probe, by how much, and how surely: by paired 95 % intervals."""
    told = []
    for result in results:
        settings, metrics = result.settings, result.metrics
        quoted = "reduced_by" not in settings and _BYTES not in settings and settings.get("chosen", True)
        if result.evaluation not in ("knn", "linear") or GAIN not in metrics or not quoted:
            continue
        gap, low, high = (metrics[f"{GAIN}{end}"] for end in ("", "_low", "_high"))
        other, by = _title(settings["best_baseline"]), f"by {EVALUATIONS[result.evaluation].row}"
        sure = "surely" if low > 0 or high < 0 else "but not surely"
        if gap > 0:
            told.append(f"{by} the encoder is best, {metrics['top1']:.3f}, {sure} {gap:.3f} above {other}")
        elif gap < 0:
            best = metrics["top1"] - gap
            told.append(f"{by} {other} is best, {best:.3f}, {sure} {-gap:.3f} above the encoder")
        else:
            told.append(f"{by} the encoder and {other} are level, {metrics['top1']:.3f}")
    return "; ".join(told)


def print_gaps(results: Sequence[Result]) -> None:
    """With pretrained models beside the encoder: its distance to every baseline, a line for each headline score.

    Where it is surely below what it was begun with, a warning.
    """
    if not any(result.features.startswith(PRETRAINED) for result in results):
        return
    worse = []
    for result in results:
        settings, metrics = result.settings, result.metrics
        at_full_size = "reduced_by" not in settings and _BYTES not in settings
        if result.evaluation in JUDGED_BY and at_full_size and settings.get("chosen", True):
            names = [name for name in metrics if name.startswith(ABOVE) and name != GAIN and f"{name}_low" in metrics]
            gaps = [f"{_title(name.removeprefix(ABOVE))} {_distance(metrics, name)}" for name in names]
            if gaps:
                say(f"{row_name(result)}, encoder above {'; '.join(gaps)}")
            if metrics.get(f"{ABOVE}{AS_IT_CAME}_high", 0.0) < 0:
                worse.append(f"{row_name(result)} {metrics['top1']:.3f}, {_distance(metrics, f'{ABOVE}{AS_IT_CAME}')}")
    if worse:
        warn(f"training has made worse what it began with: {'; '.join(worse)}; use that, or train less of it")


def print_curve(results: Sequence[Result]) -> None:
    """The dimension curve: a row per number of dimensions, with the storage of a million float32 vectors."""
    columns: dict[str, dict[int, str]] = {}
    points = [result for result in results if _BYTES in result.settings]
    for point in sorted(points, key=lambda one: "reduced_by" not in one.settings):  # all dimensions end every way
        name = f"{'kNN' if point.evaluation == 'knn' else point.evaluation}, {_title(point.features)}"
        way = point.settings.get("reduced_by")
        ways = [f"{name} by {way}"] if way else [one for one in columns if one.startswith(f"{name} by ")] or [name]
        for one in ways:
            columns.setdefault(one, {})[point.settings["dim"]] = f"{point.metrics['top1']:.3f}"
    columns = {name: cells for name, cells in columns.items() if len(cells) > 1} or columns
    dims = sorted({dim for cells in columns.values() for dim in cells})
    rows = [[f"{dim}", f"{4 * dim:,}", *(cells.get(dim, "") for cells in columns.values())] for dim in dims]
    if rows:
        table("top-1 by dimensions", ["dims", "MB a million", *columns], rows)


def _title(features: str) -> str:
    return features if features.startswith(PRETRAINED) else features.replace("_", " ")


def _cell(result: Result, metric: str) -> str:
    """A score and half its interval; of fewer classes than there are it says so."""
    metrics, value = result.metrics, result.metrics[metric]
    if f"{metric}_low" not in metrics:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    of = f" on {result.settings['test_classes']} classes" if "test_classes" in result.settings else ""
    return f"{value:.3f} ±{(metrics[f'{metric}_high'] - metrics[f'{metric}_low']) / 2:.3f}{of}"


def _distance(metrics: dict[str, float], name: str) -> str:
    return _difference([metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]])


def _difference(interval: Sequence[float]) -> str:
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class Scored:
    """One evaluated run.

    Attributes:
        name: of the run, as it was given.
        results: with predictions.
        labels: (N,) of the test images.
    """

    name: str
    results: list[Result]
    labels: np.ndarray


class Spread(TypedDict):
    """A top-1 over several runs.

    Attributes:
        name: of the score.
        mean: over the runs.
        std: likewise, with R - 1 in its denominator.
        values: one per run.
        differences: to the first run, each with its paired 95 % interval, for all runs but the first.
    """

    name: str
    mean: float
    std: float
    values: list[float]
    differences: list[list[float]]


def spread(runs: Sequence[Scored], seed: int = 0) -> list[Spread]:
    """Every top-1 that all encoders have, a row each."""
    rows = []
    for result in runs[0].results:
        found = [_counterpart(result, run) for run in runs]
        predictions = [one.predictions for one in found if one is not None and one.predictions is not None]
        if result.features != ENCODER or len(predictions) < len(runs):  # only some of the networks have it
            continue
        values = [one.metrics["top1"] for one in found if one is not None]
        differences = [
            list(paired_difference(run.labels, theirs, predictions[0], seed=seed))
            for run, theirs in zip(runs[1:], predictions[1:], strict=True)
            if np.array_equal(run.labels, runs[0].labels)
        ]
        name, mean, std = _full_name(result), float(np.mean(values)), float(np.std(values, ddof=1))
        rows.append(Spread(name=name, mean=mean, std=std, values=values, differences=differences))
    return rows


def print_spread(rows: Sequence[Spread], names: Sequence[str]) -> None:
    """A row per score: mean and standard deviation over the runs, each run, and its difference to the first."""
    columns = ["top-1 over runs", "mean ± std", names[0]]
    columns += [text for name in names[1:] for text in (name, f"{name} - {names[0]}")]
    shown = []
    for row in rows:
        cells = [row["name"], f"{row['mean']:.3f} ±{row['std']:.3f}", f"{row['values'][0]:.3f}"]
        for value, difference in zip_longest(row["values"][1:], row["differences"]):
            cells += [f"{value:.3f}", _difference(difference) if difference else ""]
        shown.append(cells)
    table("several runs", columns, shown)


def _counterpart(result: Result, run: Scored) -> Result | None:
    same = (one for one in run.results if one.features == ENCODER and _full_name(one) == _full_name(result))
    return next(same, None)


def _full_name(result: Result) -> str:
    way = result.settings.get("reduced_by")
    return f"{row_name(result)}{f' by {way}' if way else ''}"
