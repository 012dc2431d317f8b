"""The head of the page: the verdict of run.json word for word, and beside it how the scores compare, as facts.

Whether scores change the verdict is decided where they are made (`verbs/monitor.py`), and stands in run.json from then
on: a page judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_kit.evaluation.catalog import ABOVE, ENCODER, EVALUATIONS, PRETRAINED
from ssl_kit.report.reading import Run
from ssl_kit.report.scores import (
    Row,
    Score,
    axis_of,
    feature_name,
    full_size,
    score,
)

BASELINES = {"pixels": "raw pixels", "random_init": "the same network untrained", "pca": "PCA of the pixels"}
LAMPS = {  # of the states that a training can have; any other is unknown
    "learning": "learning",
    "learns, less than raw pixels know": "weak",
    "stuck": "stuck",
    "collapsed": "collapsed",
}
_WAITING = {"starting": "Starting", "running": "Training"}  # statuses of a run whose verdict is still to come


@dataclass(frozen=True)
class Compared:
    """The encoder beside its baselines in the evaluation that comes first for its method.

    Attributes:
        record: of the encoder, as results.jsonl has it.
        others: score by features: baselines, then pretrained models.
        signs: by features, 1: the encoder is surely above, -1: surely below, 0: neither. By the paired 95 % interval of
            the difference where it was measured, otherwise by whether the intervals of the two touch.
        judges: whether this evaluation may speak against the method.
    """

    title: str
    record: dict[str, Any]
    ours: Score
    others: dict[str, Score]
    signs: dict[str, int]
    judges: bool


@dataclass(frozen=True)
class Verdict:
    """What the head of the page says.

    Attributes:
        state: that run.json tells, "unknown" where it tells none.
        reason: likewise, word for word; may be empty.
        word: the headline.
        lamp: its sign and colour: learning, weak, stuck, collapsed, running or unknown.
        scores: how they compare, in a sentence; empty without any.
        rows: of the plot beside the headline.
        axis: its scale.
        metric: its title.
    """

    state: str
    reason: str
    word: str
    lamp: str
    scores: str = ""
    rows: list[Row] = field(default_factory=list)
    axis: tuple[float, float] | None = None
    metric: str = ""

    @property
    def line(self) -> str:
        """State and reason as the last line of `ssl-kit pretrain` has them."""
        return f"{self.state} - {self.reason}"

    @property
    def starts_small(self) -> bool:
        """Whether the reason needs a capital letter where it stands alone; "kNN" stays as it is."""
        return self.reason[:2].islower()


def verdict(run: Run) -> Verdict:
    """What run.json says of the run, and what its scores say beside their baselines."""
    told = run.info.get("verdict")
    told = told if isinstance(told, dict) else {}
    state = str(told.get("state"))
    state = state if state in LAMPS else "unknown"
    reason = str(told.get("reason") or "").strip()
    status = str(run.info.get("status") or "")
    word, lamp = state.capitalize(), LAMPS.get(state, "unknown")
    if state == "unknown" and status in _WAITING:
        word, lamp = f"{_WAITING[status]}, unknown so far", "running"
    found = compared(run)
    if not reason:
        reason = "no score yet: evaluate the encoder on labelled images" if found is None else "nothing was measured"
    if found is None:
        return Verdict(state, reason, word, lamp)
    rows = [_row(name, one) for name, one in found.others.items()]
    rows = [_row(ENCODER, found.ours), *sorted(rows, key=lambda row: -(row.scores[0].value if row.scores[0] else 0.0))]
    return Verdict(state, reason, word, lamp, _sentence(found, run), rows, axis_of(rows), f"{found.title}, top-1")


def compared(run: Run) -> Compared | None:
    """The evaluation that comes first for the run's method, of those that the encoder has a score in."""
    order = run.judged_by
    for evaluation in order:
        latest: dict[str, dict[str, Any]] = {}
        for record in full_size([one for one in run.results if one["evaluation"] == evaluation]):
            features = record["features"]
            # the row whose k was chosen on train is the figure to quote; a customary one only without it
            if features not in latest or record["settings"].get("chosen", True):
                latest[features] = record
        ours = score(latest[ENCODER], "top1") if ENCODER in latest else None
        if ours is None:
            continue
        names = [name for name in BASELINES if name in latest] + sorted(n for n in latest if n.startswith(PRETRAINED))
        others = {name: value for name in names if (value := score(latest[name], "top1"))}
        signs = {name: _sign(ours, other, score(latest[ENCODER], ABOVE + name)) for name, other in others.items()}
        judges = evaluation != "knn" or order[0] == "knn"
        return Compared(EVALUATIONS[evaluation].title, latest[ENCODER], ours, others, signs, judges)
    return None


def _sign(ours: Score, other: Score, gap: Score | None) -> int:
    if gap is None or gap.low is None or gap.high is None:
        gap = Score(ours.value - other.value, _low(ours) - _high(other), _high(ours) - _low(other))
    return 1 if _low(gap) > 0 else -1 if _high(gap) < 0 else 0


def _low(one: Score) -> float:
    return one.value if one.low is None else one.low


def _high(one: Score) -> float:
    return one.value if one.high is None else one.high


def _row(features: str, one: Score) -> Row:
    return Row(feature_name(features), "", features == ENCODER, [one])


def _sentence(found: Compared, run: Run) -> str:
    interval = (
        "" if found.ours.low is None or found.ours.high is None else f" [{found.ours.low:.2f}, {found.ours.high:.2f}]"
    )
    gaps = [
        _gap(found.ours.value - other.value, found.signs[name], BASELINES.get(name, feature_name(name)))
        for name, other in found.others.items()
    ]
    told = f"{found.title} {found.ours.value:.2f}{interval}{', ' if gaps else ''}{_listed(gaps)}."
    if not found.judges:
        told += f" {found.title} does not judge {run.method}: {EVALUATIONS[run.judged_by[0]].title.lower()} does."
    return told


def _gap(difference: float, sign: int, name: str) -> str:
    if not sign:
        return f"level with {name}"
    return f"{abs(difference):.2f} {'above' if sign > 0 else 'below'} {name}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
