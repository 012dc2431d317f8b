"""From result records to score tables: an encoder beside its baselines, one table per evaluation and setting.

A later record replaces an earlier one with the same evaluation, features, test set and settings.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_kit.evaluation.catalog import ABOVE, ENCODER, EVALUATIONS, GAIN, METRICS, PRETRAINED
from ssl_kit.report.reading import Run
from ssl_kit.report.untrusted import number

FEATURES = {
    ENCODER: "this encoder",
    "random_init": "same network, untrained",
    "pixels": "raw pixels",
    "pca": "PCA of pixels",
}
_MAX_COLUMNS = 5


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval, where it has one."""

    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Fractions with three decimals, larger values with fewer."""
        digits = 3 if abs(self.value) <= 1 else 2 if abs(self.value) < 10 else 1
        return f"{self.value:,.{digits}f}"

    @property
    def interval(self) -> str:
        """`[0.700, 0.726]`, empty without an interval."""
        return "" if self.low is None or self.high is None else f"[{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One line of a score table; `scores` are in the order of the table's metrics, None where not measured."""

    name: str
    detail: str
    is_encoder: bool
    scores: list[Score | None]


@dataclass(frozen=True)
class Table:
    """The scores of one evaluation under one setting, the encoder first, then the baselines from the best on.

    `axis` (low, high) is the scale of the interval plot of the first metric, None when it has no interval. `others`
    are tables of the same evaluation and test set under other settings, shown folded.
    """

    title: str
    note: str
    setting: str
    metrics: list[str]
    rows: list[Row]
    axis: tuple[float, float] | None
    others: list[Table] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The setting and the encoder's first metric, for a table that is folded away."""
        ours = next((row.scores[0] for row in self.rows if row.is_encoder and row.scores), None)
        return f"{self.setting or self.title}: {f'encoder {ours.text} {ours.interval}' if ours else 'baselines only'}"


def feature_name(features: str) -> str:
    """The words for a record's `features`."""
    name = features.removeprefix(PRETRAINED)
    return f"pretrained {name}" if name != features and name else FEATURES.get(features, features)


def feature_order(features: str) -> tuple[int, str]:
    """To sort by: the encoder, then pretrained models by name, then the baselines."""
    known = list(FEATURES)
    if features == ENCODER:
        return 0, ""
    return (
        (1, features)
        if features.startswith(PRETRAINED)
        else (2 + (known.index(features) if features in known else len(known)), features)
    )


def score(record: dict[str, Any], metric: str) -> Score | None:
    """A metric of a record, None where it is missing or not a finite number."""
    metrics = record["metrics"]
    value = number(metrics.get(metric))
    if value is None:
        return None
    return Score(value, number(metrics.get(f"{metric}_low")), number(metrics.get(f"{metric}_high")))


def full_size(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records at the features' own dimension: per evaluation and features the largest `dim`.

    PCA of the pixels stands beside the encoder, so the encoder's dimension is taken where it was measured.
    """
    own: dict[tuple[str, str], float] = {}
    for record in records:
        key = (record["evaluation"], record["features"])
        own[key] = max(own.get(key, -math.inf), _dim(record))
    measured = {(record["evaluation"], record["features"], _dim(record)) for record in records}
    for evaluation in {name for name, features in own if features == "pca"}:
        wanted = own.get((evaluation, ENCODER))
        if wanted is not None and (evaluation, "pca", wanted) in measured:
            own[evaluation, "pca"] = wanted
    return [record for record in records if _dim(record) == own[record["evaluation"], record["features"]]]


def score_tables(runs: Sequence[Run], without: Collection[str] = ()) -> list[Table]:
    """A table per evaluation and setting; with several runs each encoder row carries its run's name.

    Args:
        runs: whose results are shown.
        without: evaluations that are shown in another way.
    """
    groups: dict[tuple[str, str, str], dict[tuple[str, str], tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        latest = {}
        for record in full_size([one for one in run.results if one["evaluation"] not in without]):
            key = (record["evaluation"], measured_on(record), _setting(record))
            latest[key, record["features"]] = record
        for (key, features), record in latest.items():
            # a baseline that scores the same for several runs is the same baseline: one row is enough
            owner = str(run.folder) if features == ENCODER else json.dumps(record["metrics"])
            groups.setdefault(key, {})[owner, features] = (run, record)
    order = list(EVALUATIONS)
    known = sorted(groups, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    test_sets = Counter(evaluation for evaluation, _ in {key[:2] for key in groups})
    tables: dict[tuple[str, str], Table] = {}
    for key in sorted(known, key=lambda key: not _is_chosen(groups[key])):
        table = _table(key, list(groups[key].values()), several_runs=len(runs) > 1, several_tests=test_sets[key[0]] > 1)
        if key[:2] in tables:
            tables[key[:2]].others.append(table)
        else:
            tables[key[:2]] = table
    return [tables[key] for key in dict.fromkeys(key[:2] for key in known)]


def _is_chosen(members: dict[tuple[str, str], tuple[Run, dict[str, Any]]]) -> bool:
    return any(record["settings"].get("chosen") for _, record in members.values())


def _table(
    key: tuple[str, str, str],
    members: list[tuple[Run, dict[str, Any]]],
    *,
    several_runs: bool,
    several_tests: bool,
) -> Table:
    evaluation, test, setting = key
    metrics = _metric_names(record for _, record in members)
    counts = Counter(record["features"] for _, record in members)
    rows = []
    for run, record in members:
        features = record["features"]
        name = feature_name(features)
        if several_runs and (features == ENCODER or counts[features] > 1):
            name = f"{run.name}: {'encoder' if features == ENCODER else name}"
        scores = [score(record, metric) for metric in metrics]
        rows.append(Row(name, _detail(record), features == ENCODER, scores))
    rows.sort(key=lambda row: (not row.is_encoder, -(row.scores[0].value if row.scores and row.scores[0] else 0.0)))
    entry = EVALUATIONS.get(evaluation)
    title = entry.title if entry else evaluation.replace("_", " ").capitalize()
    title = f"{title}, on {test}" if several_tests and test else title
    return Table(
        title, entry.note if entry else "", setting, [metric_name(metric) for metric in metrics], rows, axis_of(rows)
    )


def axis_of(rows: Iterable[Row]) -> tuple[float, float] | None:
    """The scale of an interval plot: the intervals of the first metric, rounded outwards to tenths."""
    first = [row.scores[0] for row in rows if row.scores and row.scores[0] and row.scores[0].low is not None]
    ends = [end for one in first for end in (one.low, one.high, one.value) if end is not None]
    if not ends:
        return None
    low, high = math.floor(10 * min(ends)) / 10, math.ceil(10 * max(ends)) / 10
    return low, high if high > low else low + 0.1


def metric_name(metric: str) -> str:
    """The words for a metric's name."""
    return METRICS.get(metric, metric.replace("_", " ").capitalize())


def _metric_names(records: Iterable[dict[str, Any]]) -> list[str]:
    # metrics with an interval or a known name first; NAME_low and NAME_high belong to NAME
    names = {name: None for record in records for name in record["metrics"]}
    bases = [name for name in names if not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in names)]
    bases = [name for name in bases if name == GAIN or not name.startswith(ABOVE)]  # the best one's stands for all
    known = list(METRICS)
    bases.sort(key=lambda name: known.index(name) if name in known else len(known))
    return bases[:_MAX_COLUMNS]


def _dim(record: dict[str, Any]) -> float:
    dim = number(record["settings"].get("dim"))
    return math.inf if dim is None else dim


def measured_on(record: dict[str, Any]) -> str:
    """What a score was measured on, for comparison and display."""
    test = record["made_by"].get("test")
    if isinstance(test, dict):
        test = test.get("root") or test.get("name") or json.dumps(test, sort_keys=True, default=str)
    return str(test or "")


def _setting(record: dict[str, Any]) -> str:
    """The words that name a row group: rows of one group differ in their features only."""
    settings = record["settings"]
    parts = [str(settings["protocol"])] if settings.get("protocol") else []
    if settings.get("chosen"):
        parts.append("k and temperature chosen on " + str(settings.get("chosen_on") or "a held-out part of train"))
    else:
        parts += [
            f"{name} = {settings[name]}" for name in ("k", "temperature", "shots", "fraction") if name in settings
        ]
    return ", ".join(parts)


def _detail(record: dict[str, Any]) -> str:
    """What a row's own settings were: its dimension and whatever was chosen for it."""
    settings = record["settings"]
    parts = [f"{settings['dim']:,} dimensions"] if isinstance(settings.get("dim"), int) else []
    if settings.get("chosen"):
        parts += [f"k {settings.get('k')}", f"temperature {settings.get('temperature')}"]
    elif "l2" in settings:
        parts.append(f"l2 {settings['l2']}")
    return ", ".join(parts)
