"""From result records to tables and lines: an encoder beside its baselines, by evaluation and setting.

Of records with the same evaluation, features, settings and test set the last one counts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ssl_kit.core.sealed import Entries
from ssl_kit.evaluation.catalog import ABOVE, ENCODER, EVALUATIONS, GAIN, METRICS, PRETRAINED
from ssl_kit.report.read import Run, number
from ssl_kit.report.scale import Scale

Record: TypeAlias = Entries  # a line of results.jsonl
FEATURES = {
    **{ENCODER: "this encoder", "random_init": "same network, untrained"},
    **{"pixels": "raw pixels", "pca": "PCA of pixels", "patches": "k-means of patches"},
    "scratch": "same network, trained on the labels",
}
CROPS = "crops"  # the evaluation that needs no label
_MAX_COLUMNS = 5
_WAYS = {"cut": "cut", "pca": "PCA", "random": "random projection"}  # to fewer dimensions
_FULL = ""  # the way to all dimensions
_STRENGTHS, _PRETTY = (1, 2, 3), {"jpeg": "JPEG"}
_MOST = 10**7  # shots or dimensions; more of them no encoder has


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    of: str = ""  # classes in test, where they are not all

    @property
    def text(self) -> str:
        """Fractions with three decimals, larger values with fewer."""
        digits = 3 if abs(self.value) <= 1 else 2 if abs(self.value) < 10 else 1
        return f"{self.value:,.{digits}f}" + (f" on {self.of} classes" if self.of else "")

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends of the interval, where it has one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def interval(self) -> str:
        """`[0.700, 0.726]`, empty without an interval."""
        return f"[{self.low:.3f}, {self.high:.3f}]" if self.bounds else ""


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

    `axis` is the scale of the interval plot of the first metric, None when it has no interval. `others`
    are tables of the same evaluation and test set under other settings, shown folded.
    """

    title: str
    note: str
    setting: str
    metrics: list[str]
    rows: list[Row]
    axis: Scale | None
    others: list[Table] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The setting and the encoder's first metric, for a table that is folded away."""
        ours = next((row.scores[0] for row in self.rows if row.is_encoder and row.scores), None)
        return f"{self.setting or self.title}: {f'encoder {ours.text} {ours.interval}' if ours else 'baselines only'}"


class Line(NamedTuple):
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


class Grid(NamedTuple):
    """Scores by row and column; None where not measured."""

    columns: list[str]
    rows: list[tuple[str, list[Score | None]]]


class Hit(NamedTuple):
    """Top-1 on images corrupted at one strength, of the encoder and of the baseline beside it."""

    ours: Score | None
    other: Score | None


class Robustness(NamedTuple):
    """Top-1 on corrupted images.

    Attributes:
        baseline: the features beside the encoder, in words; "" for none.
        rows: (corruption, strengths 1 to 3), first the clean images and last the mean of all, one hit each.
        k: neighbours of the kNN.
    """

    baseline: str
    rows: list[tuple[str, list[Hit]]]
    k: object


def feature_name(features: str) -> str:
    """The words for a record's `features`."""
    name = features.removeprefix(PRETRAINED)
    return f"pretrained {name}" if name != features and name else FEATURES.get(features, features)


def feature_order(features: str) -> tuple[int, str]:
    """To sort by: the encoder, then pretrained models by name, then the baselines."""
    if features.startswith(PRETRAINED):
        return 1, features
    place = list(FEATURES).index(features) if features in FEATURES else len(FEATURES)
    return place + 2 if place else 0, features


def score(record: Record, metric: str) -> Score | None:
    """A metric of a record, None where it is missing or not a finite number."""
    value, low, high = (number(record["metrics"].get(f"{metric}{end}")) for end in ("", "_low", "_high"))
    of = record["settings"].get("test_classes") if low is not None else None
    return None if value is None else Score(value, low, high, of if isinstance(of, str) else "")


def full_size(records: Sequence[Record]) -> list[Record]:
    """The records at the features' own dimension: per evaluation and features the largest `dim`.

    PCA of the pixels stands beside the encoder, so the encoder's dimension is taken where it was measured.
    """
    own: dict[tuple[str, str], float] = {}
    for record in records:
        key = (record["evaluation"], record["features"])
        own[key] = max(own.get(key, -math.inf), _dim(record))
    measured = {(record["evaluation"], _dim(record)) for record in records if record["features"] == "pca"}
    for evaluation, dim in measured:
        if dim == own.get((evaluation, ENCODER)):
            own[evaluation, "pca"] = dim
    return [record for record in records if _dim(record) == own[record["evaluation"], record["features"]]]


def crops(run: Run) -> list[Record]:
    """What the looks during training compare without labels, as records: they stand in run.json, the last one whole."""
    told = run.info.get("crops")
    if not isinstance(told, dict) or not isinstance(found := told.get("top1"), dict):
        return []
    made_by = {"test": f"{number(told.get('images')) or 0:,.0f} {told.get('of') or 'images'}"}
    return [
        {"evaluation": CROPS, "features": str(name), "settings": {}, "made_by": made_by}
        | {"metrics": dict(zip(("top1", "top1_low", "top1_high"), values, strict=False))}
        for name, values in found.items()
        if isinstance(values, list)
    ]


def score_tables(runs: Sequence[Run], without: Collection[str] = ()) -> list[Table]:
    """A table per evaluation and setting; with several runs each encoder row carries its run's name.

    Args:
        runs: whose results are shown.
        without: evaluations that are shown in another way.
    """
    groups: dict[tuple[str, str, str], dict[tuple[str, str], tuple[Run, Record]]] = {}
    for run in runs:
        latest = {}
        for record in full_size([one for one in (*crops(run), *run.results) if one["evaluation"] not in without]):
            latest[(record["evaluation"], measured_on(record), _setting(record)), record["features"]] = record
        for (key, features), record in latest.items():
            # a baseline that scores the same for several runs is the same baseline: one row is enough
            owner = str(run.folder) if features == ENCODER else json.dumps(record["metrics"])
            groups.setdefault(key, {})[owner, features] = (run, record)
    order = list(EVALUATIONS)
    known = sorted(groups, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    test_sets = Counter(evaluation for evaluation, _ in {key[:2] for key in groups})
    tables: dict[tuple[str, str], Table] = {}
    for key in sorted(known, key=lambda key: not any(one["settings"].get("chosen") for _, one in groups[key].values())):
        table = _table(key, list(groups[key].values()), several_runs=len(runs) > 1, several_tests=test_sets[key[0]] > 1)
        if tables.setdefault(key[:2], table) is not table:
            tables[key[:2]].others.append(table)
    return [tables[key] for key in dict.fromkeys(key[:2] for key in known)]


def _table(
    key: tuple[str, str, str], members: list[tuple[Run, Record]], *, several_runs: bool, several_tests: bool
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
        rows.append(Row(name, _detail(record), features == ENCODER, [score(record, metric) for metric in metrics]))
    entry = EVALUATIONS.get(evaluation)
    title = entry.title if entry else in_words(evaluation)
    title = f"{title}, on {test}" if (several_tests or evaluation == CROPS) and test else title
    heads = [METRICS.get(metric, in_words(metric)) for metric in metrics]
    return Table(title, entry.note if entry else "", setting, heads, best_first(rows), axis_of(rows))


def best_first(rows: Iterable[Row]) -> list[Row]:
    """The encoder's rows, then the others, each from the best first metric on."""
    first = lambda row: row.scores[0].value if row.scores and row.scores[0] else 0.0
    return sorted(rows, key=lambda row: (not row.is_encoder, -first(row)))


def axis_of(rows: Iterable[Row]) -> Scale | None:
    """The scale of an interval plot: of the intervals of the first metric."""
    first = [row.scores[0] for row in rows if row.scores and row.scores[0] and row.scores[0].bounds]
    return Scale.of(end for one in first for end in (*(one.bounds or ()), one.value))


def in_words(name: str) -> str:
    """The words for a name that has none of its own: `mean_rank` is "Mean rank"."""
    return name.replace("_", " ").capitalize()


def _metric_names(records: Iterable[Record]) -> list[str]:
    # metrics with an interval or a known name first; NAME_low and NAME_high belong to NAME
    names = {name: None for record in records for name in record["metrics"]}
    bases = [name for name in names if not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in names)]
    bases = [name for name in bases if name == GAIN or not name.startswith(ABOVE)]  # the best one's stands for all
    known = list(METRICS)
    return sorted(bases, key=lambda name: known.index(name) if name in known else len(known))[:_MAX_COLUMNS]


def _dim(record: Record) -> float:
    dim = number(record["settings"].get("dim"))
    return math.inf if dim is None else dim


def measured_on(record: Record) -> str:
    """What a score was measured on, for comparison and display."""
    test = record["made_by"].get("test")
    if isinstance(test, dict):
        test = test.get("root") or test.get("name") or json.dumps(test, sort_keys=True, default=str)
    return str(test or "")


def _setting(record: Record) -> str:
    """The words that name a row group: rows of one group differ in their features only."""
    settings = record["settings"]
    parts = [str(settings["protocol"])] if settings.get("protocol") else []
    if settings.get("chosen"):
        parts.append("k and temperature chosen on " + str(settings.get("chosen_on") or "a held-out part of train"))
    else:
        named = ("k", "temperature", "shots", "fraction")
        parts += [f"{name} = {settings[name]}" for name in named if name in settings]
    return ", ".join(parts)


def _detail(record: Record) -> str:
    """What a row's own settings were: its dimension and whatever was chosen for it."""
    settings = record["settings"]
    parts = [f"{settings['dim']:,} dimensions"] if isinstance(settings.get("dim"), int) else []
    if settings.get("chosen"):
        parts += [f"k {settings.get('k')}", f"temperature {settings.get('temperature')}"]
    elif "l2" in settings:
        parts.append(f"l2 {settings['l2']}")
    return ", ".join(parts)


def _latest(run: Run, evaluation: str) -> list[Record]:
    """The records of an evaluation on the test set of its last one."""
    records = [record for record in run.results if record["evaluation"] == evaluation]
    return [record for record in records if measured_on(record) == measured_on(records[-1])]


def _whole(value: object) -> int | None:
    """A number of shots or dimensions that can be, otherwise None."""
    return value if isinstance(value, int) and 0 < value < _MOST else None


def _few_shot(run: Run) -> dict[tuple[str, str], dict[tuple[int, float], Score]]:
    """(Protocol, features) -> top-1 by (0, shots per class) or (1, fraction of the labels), the encoder's first."""
    cells: dict[tuple[str, str], dict[tuple[int, float], Score]] = {}
    for record in _latest(run, "few_shot"):
        settings, value = record["settings"], score(record, "top1")
        shots, fraction = _whole(settings.get("shots")), number(settings.get("fraction"))
        size = (0, float(shots)) if shots else (1, fraction) if fraction is not None else None
        if size and value is not None:
            cells.setdefault((str(settings.get("protocol") or ""), record["features"]), {})[size] = value
    protocols = list(dict.fromkeys(protocol for protocol, _ in cells))
    return {key: cells[key] for key in sorted(cells, key=lambda key: (protocols.index(key[0]), feature_order(key[1])))}


def few_shot_lines(run: Run) -> dict[str, list[Line]]:
    """Protocol -> top-1 by labelled images per class, a line per features, the encoder's first."""
    found: dict[str, list[Line]] = {}
    for (protocol, features), cells in _few_shot(run).items():
        points = {int(size): value for (kind, size), value in sorted(cells.items()) if not kind}
        if points:
            found.setdefault(protocol, []).append(Line(features, feature_name(features), points))
    return {protocol: lines for protocol, lines in found.items() if any(len(line.points) > 1 for line in lines)}


def few_shot_grid(run: Run) -> Grid | None:
    """The same in numbers, with the columns that are fractions of the labels; None without any."""
    cells = _few_shot(run)
    sizes = sorted({size for row in cells.values() for size in row})
    columns = [f"{100 * size:g} % of the labels" if kind else f"{size:,.0f} per class" for kind, size in sizes]
    name = lambda protocol, features: f"{feature_name(features)}{f', {protocol}' if protocol else ''}"
    rows = [(name(*key), [row.get(size) for size in sizes]) for key, row in cells.items()]
    return Grid(columns, rows) if rows else None


def dimension_lines(run: Run) -> dict[str, list[Line]]:
    """Evaluation -> top-1 by the number of dimensions kept, a line per features and way to fewer dimensions.

    The score at all dimensions ends every line of its features. Lines of one point are left out, and so are evaluations
    without a line.
    """
    drawn = {evaluation: _dimension_lines(_latest(run, evaluation)) for evaluation in run.judged_by}
    return {evaluation: lines for evaluation, lines in drawn.items() if lines}


def _dimension_lines(records: Sequence[Record]) -> list[Line]:
    found: dict[str, dict[str, dict[int, Score]]] = {}
    # a score whose k was chosen on train goes before a customary one
    for record in sorted(records, key=lambda one: bool(one["settings"].get("chosen", True))):
        dim, value = _whole(record["settings"].get("dim")), score(record, "top1")
        if dim and value is not None:
            way = str(record["settings"].get("reduced_by") or _FULL)
            found.setdefault(record["features"], {}).setdefault(way, {})[dim] = value
    lines = []
    for features in sorted(found, key=feature_order):
        ways = [way for way in found[features] if way != _FULL] or [_FULL]
        ways.sort(key=lambda way: list(_WAYS).index(way) if way in _WAYS else len(_WAYS))
        for variant, way in enumerate(ways):
            points = dict(sorted({**found[features][way], **found[features].get(_FULL, {})}.items()))
            told = _WAYS.get(way, way) if features != "pca" else ""  # of the pixels: PCA is their only way
            lines.append(Line(features, f"{feature_name(features)}{f', {told}' if told else ''}", points, variant))
    return [line for line in lines if len(line.points) > 1]


def dimension_grids(run: Run) -> list[tuple[str, Grid]]:
    """The dimension curves in numbers, by evaluation: a row per number of dimensions with its storage."""
    grids = []
    for evaluation, lines in dimension_lines(run).items():
        dims = sorted({dim for line in lines for dim in line.points})
        rows = [(f"{dim:,} ({storage(dim)})", [line.points.get(dim) for line in lines]) for dim in dims]
        grids.append((EVALUATIONS[evaluation].title, Grid([line.name for line in lines], rows)))
    return grids


def storage(dim: int) -> str:
    """What a million float32 vectors of so many dimensions take: `256 MB`, `2 GB`."""
    megabytes = 4 * dim
    return f"{megabytes:,} MB" if megabytes < 1_000 else f"{megabytes / 1_000:.3g} GB"


def robustness_of(run: Run) -> Robustness | None:
    """The encoder beside the untrained network, or else beside the first other features measured."""
    latest = {record["features"]: record for record in _latest(run, "robustness")}
    ours = latest.pop(ENCODER, None)
    if ours is None:
        return None
    other = latest.get("random_init") or next(iter(latest.values()), None)
    hit = lambda metric: Hit(score(ours, metric), score(other, metric) if other else None)
    metrics = ours["metrics"]
    names = [name.removesuffix("_1") for name in metrics if name.endswith("_1") and f"{name}_low" in metrics]
    pretty = lambda name: _PRETTY.get(name, in_words(name))
    rows = [(pretty(name), [hit(f"{name}_{strength}") for strength in _STRENGTHS]) for name in names]
    rows = [("None", [hit("clean")]), *rows, ("Mean of all", [hit("top1")])]
    return Robustness(feature_name(other["features"]) if other else "", rows, ours["settings"].get("k", ""))
