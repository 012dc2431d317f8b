"""Result records as lines and grids: few-shot curves, dimension curves, robustness.

Of one test set: that of the evaluation's last record, and of equal settings the last record counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_kit.evaluation.catalog import ENCODER
from ssl_kit.report.reading import Run
from ssl_kit.report.scores import (
    Score,
    feature_name,
    feature_order,
    measured_on,
    score,
)
from ssl_kit.report.untrusted import number

_WAYS = {"cut": "cut", "pca": "PCA", "random": "random projection"}  # to fewer dimensions
_FULL = ""  # the way to all dimensions
_STRENGTHS = (1, 2, 3)
_PRETTY = {"jpeg": "JPEG"}
_MOST = 10**7  # shots or dimensions; more of them no encoder has


@dataclass(frozen=True)
class Line:
    """Scores of one kind of features by an x: shots per class, dimensions.

    Attributes:
        features: of the records.
        name: in words.
        points: x -> score, ascending.
        variant: of the features, such as the way to fewer dimensions; 0 is the first one.
    """

    features: str
    name: str
    points: dict[int, Score]
    variant: int = 0


@dataclass(frozen=True)
class Grid:
    """Scores by row and column; None where not measured."""

    columns: list[str]
    rows: list[tuple[str, list[Score | None]]]


def few_shot_lines(run: Run) -> dict[str, list[Line]]:
    """Protocol -> top-1 by labelled images per class, a line per features, the encoder's first."""
    found: dict[str, dict[str, dict[int, Score]]] = {}
    for record in _latest(run, "few_shot"):
        shots, value = record["settings"].get("shots"), score(record, "top1")
        if isinstance(shots, int) and 0 < shots < _MOST and value is not None:
            protocol = str(record["settings"].get("protocol") or "")
            found.setdefault(protocol, {}).setdefault(record["features"], {})[shots] = value
    return {
        protocol: [
            Line(features, feature_name(features), dict(sorted(points.items())))
            for features, points in sorted(each.items(), key=lambda item: feature_order(item[0]))
        ]
        for protocol, each in found.items()
        if any(len(points) > 1 for points in each.values())
    }


def few_shot_grid(run: Run) -> Grid | None:
    """The same in numbers, with the rows that are fractions of the labels; None without any."""
    sizes: dict[tuple[int, float], str] = {}
    cells: dict[tuple[str, str], dict[tuple[int, float], Score | None]] = {}
    for record in _latest(run, "few_shot"):
        settings = record["settings"]
        shots, fraction = number(settings.get("shots")), number(settings.get("fraction"))
        if shots is None and fraction is None:
            continue
        size = (0, shots) if shots is not None else (1, fraction or 0.0)
        sizes[size] = f"{shots:,.0f} per class" if shots is not None else f"{100 * (fraction or 0):g} % of the labels"
        key = (str(settings.get("protocol") or ""), record["features"])
        cells.setdefault(key, {})[size] = score(record, "top1")
    if not cells:
        return None
    protocols = list(dict.fromkeys(protocol for protocol, _ in cells))
    keys = sorted(cells, key=lambda key: (protocols.index(key[0]), feature_order(key[1])))
    columns = [sizes[size] for size in sorted(sizes)]
    name = lambda protocol, features: f"{feature_name(features)}{f', {protocol}' if protocol else ''}"
    return Grid(columns, [(name(*key), [cells[key].get(size) for size in sorted(sizes)]) for key in keys])


def dimension_lines(run: Run) -> dict[str, list[Line]]:
    """Evaluation -> top-1 by the number of dimensions kept, a line per features and way to fewer dimensions.

    The score at all dimensions ends every line of its features. Lines of one point are left out, and so are evaluations
    without a line.
    """
    drawn = {}
    for evaluation in run.judged_by:
        found = _by_dimension(_latest(run, evaluation))
        lines = []
        for features in sorted(found, key=feature_order):
            ways = [way for way in found[features] if way != _FULL] or [_FULL]
            ways.sort(key=lambda way: list(_WAYS).index(way) if way in _WAYS else len(_WAYS))
            for variant, way in enumerate(ways):
                points = dict(sorted({**found[features][way], **found[features].get(_FULL, {})}.items()))
                told = _WAYS.get(way, way) if features != "pca" else ""  # of the pixels: PCA is their only way
                name = f"{feature_name(features)}{f', {told}' if told else ''}"
                lines.append(Line(features, name, points, variant))
        lines = [line for line in lines if len(line.points) > 1]
        if lines:
            drawn[evaluation] = lines
    return drawn


def _by_dimension(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, Score]]]:
    """Features -> way -> dimensions -> score; a score whose k was chosen on train goes before a customary one."""
    ranked: dict[str, dict[str, dict[int, tuple[bool, Score]]]] = {}
    for record in records:
        settings, value = record["settings"], score(record, "top1")
        dim, chosen = settings.get("dim"), bool(settings.get("chosen", True))
        if value is None or not isinstance(dim, int) or not 0 < dim < _MOST:
            continue
        points = ranked.setdefault(record["features"], {}).setdefault(str(settings.get("reduced_by") or _FULL), {})
        if dim not in points or chosen >= points[dim][0]:
            points[dim] = chosen, value
    return {
        features: {way: {dim: value for dim, (_, value) in points.items()} for way, points in ways.items()}
        for features, ways in ranked.items()
    }


@dataclass(frozen=True)
class Hit:
    """Top-1 on images corrupted at one strength, of the encoder and of the baseline beside it."""

    ours: Score | None
    other: Score | None


@dataclass(frozen=True)
class Robustness:
    """Top-1 on corrupted images: per corruption its mean and each strength.

    Attributes:
        baseline: the features beside the encoder, in words; "" for none.
        clean: of the same images, untouched.
        every: the mean over all corruptions and strengths.
        rows: (corruption, strengths 1 to 3).
        settings: of the record, for the caption.
    """

    baseline: str
    clean: Hit
    every: Hit
    rows: list[tuple[str, list[Hit]]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def robustness_of(run: Run) -> Robustness | None:
    """The encoder beside the untrained network, or else beside the first other features measured."""
    latest = {record["features"]: record for record in _latest(run, "robustness")}
    ours = latest.pop(ENCODER, None)
    if ours is None:
        return None
    other = latest.get("random_init") or next(iter(latest.values()), None)
    hit = lambda metric: Hit(score(ours, metric), score(other, metric) if other else None)
    names = [
        name.removesuffix("_1") for name in ours["metrics"] if name.endswith("_1") and f"{name}_low" in ours["metrics"]
    ]
    rows = [
        (_PRETTY.get(name, name.replace("_", " ").capitalize()), [hit(f"{name}_{strength}") for strength in _STRENGTHS])
        for name in names
    ]
    baseline = feature_name(other["features"]) if other else ""
    return Robustness(baseline, hit("clean"), hit("top1"), rows, ours["settings"])


def _latest(run: Run, evaluation: str) -> list[dict[str, Any]]:
    """The records of an evaluation on the test set of its last one."""
    records = [record for record in run.results if record["evaluation"] == evaluation]
    return [record for record in records if measured_on(record) == measured_on(records[-1])]
