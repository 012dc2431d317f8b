"""From results to what `ssl-kit evaluate` prints: the gain over the best baseline, scores, curve, and several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssl_kit.core.console import say, table
from ssl_kit.evaluation.result import Result, paired_difference
from ssl_kit.verbs.scoring import SHOWN, row_name

_GAIN = "above_best_baseline"
_PRETRAINED = "pretrained:"
_HEADLINES = ("knn", "linear", "attentive")
_BYTES = "bytes_per_million_images"  # the setting that only points of the dimension curve have


def compared(results: Sequence[Result], labels: np.ndarray, seed: int) -> list[Result]:
    """The encoder's top-1 gets its distances to the baselines of the same row, with paired 95 % intervals.

    `above_best_baseline`, and `above_NAME` for each of them, all with `_low` and `_high`; points of the dimension curve
    get the first only.
    """
    done = []
    for result in results:
        others = [other for other in results if other.features != "encoder" and row_name(other) == row_name(result)]
        if result.features == "encoder" and result.predictions is not None and others:
            best = max(others, key=lambda other: other.metrics["top1"])
            metrics = {**result.metrics, **_gap(_GAIN, result, best, labels, seed)}
            for other in others if _BYTES not in result.settings else ():
                metrics |= _gap(f"above_{other.features}", result, other, labels, seed)
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
    kinds = list(dict.fromkeys(result.features for result in results))
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        for metric, title in SHOWN[result.evaluation].metrics:
            if metric not in result.metrics:
                continue
            cells = rows.setdefault(f"{row_name(result)}{title}", {})
            cells[result.features] = _cell(result.metrics, metric)
            if metric == "top1" and _GAIN in result.metrics:
                cells["gain"] = _distance(result.metrics, _GAIN)
    if rows:
        columns = ["on test, 95 % intervals", *map(_title, kinds), "above the best baseline"]
        shown = [[name, *(cells.get(kind, "") for kind in [*kinds, "gain"])] for name, cells in rows.items()]
        table("scores", columns, shown)


def print_gaps(results: Sequence[Result]) -> None:
    """With pretrained models beside the encoder: its distance to every baseline, a line for each headline score."""
    if not any(result.features.startswith(_PRETRAINED) for result in results):
        return
    for result in results:
        headline = result.evaluation in _HEADLINES and result.features == "encoder" and _BYTES not in result.settings
        if not headline or not result.settings.get("chosen", True) or "reduced_by" in result.settings:
            continue
        names = [name for name in result.metrics if name.startswith("above_") and f"{name}_low" in result.metrics]
        gaps = [f"{_title(name.removeprefix('above_'))} {_distance(result.metrics, name)}" for name in names]
        if gaps:
            say(f"{row_name(result)}, encoder above {'; '.join(gaps[1:])}")  # the first is the best one's again


def print_curve(results: Sequence[Result]) -> None:
    """The dimension curve: a row per number of dimensions, with the storage of a million float32 vectors."""
    points = [result for result in results if _BYTES in result.settings]
    if not points:
        return
    columns: dict[str, dict[int, str]] = {}
    for point in points:
        evaluation = "kNN" if point.evaluation == "knn" else point.evaluation
        way = point.settings.get("reduced_by")
        # all dimensions: one score for every way there
        ways = [way] if way else sorted({one.settings.get("reduced_by") or "" for one in points if _alike(one, point)})
        for one in ways:
            name = f"{evaluation}, {_title(point.features)}{f' by {one}' if one else ''}"
            columns.setdefault(name, {})[point.settings["dim"]] = f"{point.metrics['top1']:.3f}"
    columns = {name: cells for name, cells in columns.items() if len(cells) > 1} or columns
    dims = sorted({dim for cells in columns.values() for dim in cells})
    rows = [[f"{dim}", f"{4 * dim:,}", *(cells.get(dim, "") for cells in columns.values())] for dim in dims]
    table("top-1 by dimensions", ["dims", "MB a million", *columns], rows)


def _alike(one: Result, other: Result) -> bool:
    return (one.evaluation, one.features) == (other.evaluation, other.features)


def _title(features: str) -> str:
    return features if features.startswith(_PRETRAINED) else features.replace("_", " ")


def _distance(metrics: dict[str, float], name: str) -> str:
    return _difference([metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]])


def _cell(metrics: dict[str, float], metric: str) -> str:
    value = metrics[metric]
    if f"{metric}_low" not in metrics:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3f} ±{(metrics[f'{metric}_high'] - metrics[f'{metric}_low']) / 2:.3f}"


def _difference(interval: Sequence[float]) -> str:
    value, low, high = interval
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass
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


def spread(runs: Sequence[Scored], seed: int = 0) -> list[dict[str, Any]]:
    """Every top-1 of the encoders over several runs: mean, standard deviation, and paired differences to the first.

    Returns:
        Per row: name, mean, std (R - 1 in its denominator), values (one per run), differences (each with its paired
        95 % interval, for all runs but the first).
    """
    rows = []
    for result in runs[0].results:
        if result.features != "encoder" or result.predictions is None:
            continue
        found = [_counterpart(result, run) for run in runs]
        same = [one for one in found if one is not None]
        if len(same) < len(runs):  # an evaluation that only some of the networks have
            continue
        values = [one.metrics["top1"] for one in same]
        differences = [
            paired_difference(run.labels, one.predictions, result.predictions, seed=seed)
            for run, one in zip(runs[1:], same[1:], strict=True)
            if one.predictions is not None and np.array_equal(run.labels, runs[0].labels)
        ]
        row = {"name": _full_name(result), "mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}
        rows.append({**row, "values": values, "differences": [list(difference) for difference in differences]})
    return rows


def print_spread(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A row per score: mean and standard deviation over the runs, each run, and its difference to the first."""
    columns = ["top-1 over runs", "mean ± std", names[0]]
    columns += [text for name in names[1:] for text in (name, f"{name} - {names[0]}")]
    shown = []
    for row in rows:
        cells = [row["name"], f"{row['mean']:.3f} ±{row['std']:.3f}", f"{row['values'][0]:.3f}"]
        for number, value in enumerate(row["values"][1:]):
            difference = row["differences"][number] if number < len(row["differences"]) else None
            cells += [f"{value:.3f}", _difference(difference) if difference else ""]
        shown.append(cells)
    table("several runs", columns, shown)


def _counterpart(result: Result, run: Scored) -> Result | None:
    return next(
        (one for one in run.results if one.features == "encoder" and _full_name(one) == _full_name(result)), None
    )


def _full_name(result: Result) -> str:
    way = result.settings.get("reduced_by")
    return f"{row_name(result)}{f' by {way}' if way else ''}"
