"""The head of the page: the verdict of run.json word for word, how the scores compare, facts, and the next command.

Whether scores change the verdict is decided where they are made (`verbs/monitor.py`), and stands in run.json from then
on: a page judges nothing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_kit.core.owned import BROKEN_OFF, GOING_ON
from ssl_kit.evaluation.catalog import ABOVE, ENCODER, EVALUATIONS, PRETRAINED
from ssl_kit.report.read import Run, number
from ssl_kit.report.scale import Scale
from ssl_kit.report.tables import (
    CROPS,
    Record,
    Row,
    Score,
    axis_of,
    best_first,
    crops,
    feature_name,
    full_size,
    measured_on,
    score,
)

BASELINES = {
    "pixels": "raw pixels",
    "random_init": "the same network untrained",
    "pca": "PCA of the pixels",
    "patches": "k-means of patches",
    "scratch": "the same network trained on the labels",
}
LAMPS = {  # of the states that a training can have; any other is unknown
    "learning": "learning",
    "learns, less than raw pixels know": "weak",
    "stuck": "stuck",
    "collapsed": "collapsed",
}
_WAITING = {"starting": "Starting", "running": "Training", BROKEN_OFF: "Broken off"}  # a verdict is still to come


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
    record: Record
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
        metric: its title, and of which images.
    """

    state: str
    reason: str
    word: str
    lamp: str
    scores: str = ""
    rows: list[Row] = field(default_factory=list)
    axis: Scale | None = None
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
    word, lamp = state.capitalize(), LAMPS.get(state, "unknown")
    status = str(run.info.get("status") or "")
    if state == "unknown" and status in _WAITING:
        word, lamp = f"{_WAITING[status]}, unknown so far", "running" if status in GOING_ON else lamp
    found = compared(run)
    if not reason:
        reason = "no score yet: evaluate the encoder on labelled images" if found is None else "nothing was measured"
    shown = found or _by_crops(run)
    if shown is None:
        return Verdict(state, reason, word, lamp)
    scores = {ENCODER: shown.ours, **shown.others}
    rows = best_first(Row(feature_name(name), "", name == ENCODER, [one]) for name, one in scores.items())
    on = "test images" if found else measured_on(shown.record)
    sentence = _sentence(found, run) if found else ""  # without labels the reason says it
    return Verdict(state, reason, word, lamp, sentence, rows, axis_of(rows), f"{shown.title}, top-1, on {on}")


def _by_crops(run: Run) -> Compared | None:
    """The comparison that needs no label, for a run without a score by labels; it settles no verdict."""
    scores = {record["features"]: one for record in crops(run) if (one := score(record, "top1"))}
    record = next((one for one in crops(run) if one["features"] == ENCODER), None)
    if record is None or ENCODER not in scores:
        return None
    ours = scores.pop(ENCODER)
    return Compared(EVALUATIONS[CROPS].title, record, ours, scores, {}, False)


def compared(run: Run) -> Compared | None:
    """The evaluation that comes first for the run's method, of those that the encoder has a score in."""
    order = run.judged_by
    for evaluation in order:
        latest: dict[str, Record] = {}
        for record in full_size([one for one in run.results if one["evaluation"] == evaluation]):
            features = record["features"]
            # the row whose k was chosen on train is the figure to quote; a customary one only without it
            if features not in latest or record["settings"].get("chosen", True):
                latest[features] = record
        ours = score(latest[ENCODER], "top1") if ENCODER in latest else None
        if ours is None:
            continue
        names = [name for name in BASELINES if name in latest]
        names += sorted(name for name in latest if name.startswith(PRETRAINED))
        others = {name: value for name in names if (value := score(latest[name], "top1"))}
        signs = {name: _sign(ours, other, score(latest[ENCODER], ABOVE + name)) for name, other in others.items()}
        judges = evaluation != "knn" or order[0] == "knn"
        return Compared(EVALUATIONS[evaluation].title, latest[ENCODER], ours, others, signs, judges)
    return None


def _sign(ours: Score, other: Score, gap: Score | None) -> int:
    (low, high), (other_low, other_high) = (one.bounds or (one.value, one.value) for one in (ours, other))
    least, most = (gap and gap.bounds) or (low - other_high, high - other_low)
    return 1 if least > 0 else -1 if most < 0 else 0


def _sentence(found: Compared, run: Run) -> str:
    ours = found.ours
    told = f"{found.title} {ours.value:.3f} {ours.interval}".strip()
    gaps = [
        _gap(ours.value - other.value, found.signs[name], BASELINES.get(name, feature_name(name)))
        for name, other in found.others.items()
    ]
    told = f"{', '.join([told, *gaps[:-2], ' and '.join(gaps[-2:])] if gaps else [told])}."
    if not found.judges:
        told += f" {found.title} does not judge {run.method}: {EVALUATIONS[run.judged_by[0]].title.lower()} does."
    return told


def _gap(difference: float, sign: int, name: str) -> str:
    if not sign:
        return f"level with {name}"
    return f"{abs(difference):.3f} {'above' if sign > 0 else 'below'} {name}"


class Fact(NamedTuple):
    """An entry of the facts strip; `note` stands below the value in small, `title` shows on hover."""

    label: str
    value: str
    note: str = ""
    title: str = ""


class Step(NamedTuple):
    """The next command to type, and why."""

    command: str
    why: str


def facts(run: Run) -> list[Fact]:
    """The facts strip; what run.json does not say is left out."""
    info, data, found = run.info, run.data, []
    if data.get("root"):
        root = Path(str(data["root"]))
        found.append(Fact("data", root.name or str(root), f"in {root.parent.name}" * bool(root.parent.name), str(root)))
    images, skipped = number(data.get("images")), number(data.get("skipped")) or run.num_skipped
    if images is not None:
        found.append(Fact("images", f"{images:,.0f}", f"{skipped:,.0f} skipped" if skipped else "none skipped"))
    numbers = (
        ("epochs", "epochs", lambda value: f"{value:,.4g}", ""),
        ("seconds", "time", duration, ""),
        ("images_per_second", "images per second", lambda value: f"{value:,.0f}", ""),
        ("waiting_share", "waiting for data", lambda value: f"{100 * value:.0f} %", "of the time"),
    )
    for name, label, shown, note in numbers:
        if (value := number(info.get(name))) is not None:
            found.append(Fact(label, shown(value), note))
    if info.get("device"):
        found.append(Fact("device", str(info["device"])))
    if info.get("seed") is not None:
        found.append(Fact("seed", str(info["seed"])))
    return found


def duration(seconds: float) -> str:
    """`42 s`, `14 min 30 s` or `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def next_step(run: Run, judged: Verdict) -> Step:
    """What to type next, from how far the run is and what was found."""
    folder, status, data = shlex.quote(str(run.folder)), run.info.get("status"), data_root(run)
    if status in ("interrupted", BROKEN_OFF) and run.recipe:
        return Step(resuming(run), "continues where the run was cut off")
    if judged.state in ("stuck", "collapsed"):
        if not run.recipe:
            return Step(f"ssl-kit pretrain {data}", "train longer, or on images closer to these")
        return Step(
            f"ssl-kit views {data} -c {folder}/recipe.yaml --out views.png",
            "are the views still recognisable? Then try another learning rate or temperature",
        )
    image = shlex.quote(str(run.data["image"])) if run.data.get("image") else "IMAGE.jpg"
    search = f"ssl-kit search {folder} {image} --html neighbours.html"
    waits = "once training has ended" if status in GOING_ON else ""
    if not run.labelled:
        return Step(search, waits or "which images are like this one?")
    if not any(record.get("features") == ENCODER for record in run.results):
        return Step(f"ssl-kit evaluate {folder} {labelled(run)}", waits or "is it better than raw pixels?")
    return Step(search, "which images are like this one?")


def resuming(run: Run) -> str:
    """The command that goes on with the run."""
    return f"ssl-kit pretrain {data_root(run)} --run {shlex.quote(str(run.folder))} --resume"


def so_far(run: Run) -> str:
    """The status of a run, in words; of one that was broken off the last step that is known of."""
    status, steps = str(run.info.get("status") or ""), run.metrics.get("step", np.empty(0))
    return status + (f" at step {np.nanmax(steps):,.0f}" if status == BROKEN_OFF and np.isfinite(steps).any() else "")


def labelled(run: Run) -> str:
    """The labelled images that belong to a run, as they are typed in a command: with the part to test on, if any."""
    if not number(run.data.get("classes")):
        return "LABELLED"
    root = Path(str(run.data.get("root") or "DATA").removesuffix(":train"))
    return shlex.quote(str(root.parent if root.name == "train" and (root.parent / "test").is_dir() else root))


def data_root(run: Run) -> str:
    """The images of the run as they are typed in a command."""
    return shlex.quote(str(run.data["root"])) if run.data.get("root") else "DATA"
