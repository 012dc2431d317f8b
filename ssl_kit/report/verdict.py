"""The verdict in one sentence: what the scores say beside their baselines, otherwise what run.json says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_kit.report.reading import Run
from ssl_kit.report.scores import (
    ABOVE,
    ENCODER,
    EVALUATIONS,
    GAIN,
    HEADLINES,
    HEADLINES_BY_METHOD,
    PRETRAINED,
    Row,
    Score,
    axis_of,
    feature_name,
    full_size,
    score,
)

BASELINES = {"pixels": "raw pixels", "random_init": "the same network untrained", "pca": "PCA of the pixels"}


@dataclass(frozen=True)
class Verdict:
    """`state` picks the lamp: learning, weak, stuck, collapsed, running or unknown. `word` and `sentence` say it."""

    state: str
    word: str
    sentence: str
    reason: str = ""
    rows: list[Row] = field(default_factory=list)
    axis: tuple[float, float] | None = None
    metric: str = ""


def verdict(run: Run) -> Verdict:
    """The sentence at the top: from the scores when the run was evaluated, otherwise from run.json."""
    told = run.info.get("verdict")
    told = told if isinstance(told, dict) else {}
    state, reason = str(told.get("state") or "unknown"), _sentence(str(told.get("reason") or ""))
    judged = _judged(run)
    if judged is None:
        return _unjudged(run, state, reason)
    if state in ("collapsed", "stuck") and judged.state != "learning":
        return Verdict(state, state.capitalize(), judged.sentence, reason, judged.rows, judged.axis, judged.metric)
    return judged


def _sentence(text: str) -> str:
    # run.json's reasons start small and end bare; on the page they stand alone. kNN stays kNN
    text = text.strip()
    first = text[:1].upper() if text[:2].islower() else text[:1]
    return first + text[1:] + ("." if text[-1:].isalnum() else "") if text else ""


def _unjudged(run: Run, state: str, reason: str) -> Verdict:
    status = str(run.info.get("status") or "")
    if state in ("learning", "stuck", "collapsed"):
        return Verdict(state, state.capitalize(), reason or "No score yet.")
    if status in ("starting", "running"):
        sentence = reason or "No score yet: curves appear after the first steps, scores after the first evaluation."
        return Verdict("running", "Starting" if status == "starting" else "Training", sentence)
    return Verdict("unknown", "Not judged yet", reason or "No score yet: evaluate the encoder on labelled images.")


def _judged(run: Run) -> Verdict | None:
    """Compares the encoder with its baselines on the headline evaluation; None if there is no encoder score."""
    for evaluation in HEADLINES_BY_METHOD.get(run.method, HEADLINES):
        latest: dict[str, dict[str, Any]] = {}
        for record in full_size([one for one in run.results if one["evaluation"] == evaluation]):
            features = record["features"]
            # the row whose k was chosen on train is the figure to quote; a customary one only without it
            if features not in latest or record["settings"].get("chosen", True):
                latest[features] = record
        if ENCODER in latest and score(latest[ENCODER], "top1"):
            return _compared(evaluation, latest, judges=evaluation != "knn" or run.method != "MAE")
    return None


def _compared(evaluation: str, latest: dict[str, dict[str, Any]], *, judges: bool) -> Verdict:
    ours = score(latest[ENCODER], "top1")
    assert ours is not None
    others = {name: value for name in BASELINES if name in latest and (value := score(latest[name], "top1"))}
    models = sorted(name for name in latest if name.startswith(PRETRAINED))
    beside = others | {name: value for name in models if (value := score(latest[name], "top1"))}
    title = EVALUATIONS[evaluation][0]
    gaps = [_gap(ours.value - other.value, BASELINES.get(name, feature_name(name))) for name, other in beside.items()]
    sentence = f"{title} {_short(ours)}{', ' if gaps else ''}{_listed(gaps)}."
    rows = [Row(feature_name(name), "", name == ENCODER, [one]) for name, one in [(ENCODER, ours), *beside.items()]]
    rows[1:] = sorted(rows[1:], key=lambda row: -(row.scores[0].value if row.scores[0] else 0.0))
    state, word, reason = _state(ours, list(others.values()), _gain(latest[ENCODER], others))
    if not judges and state != "learning":
        state, word, reason = "unknown", "Not judged yet", "kNN does not judge a masked autoencoder: fine-tuning does."
    return Verdict(state, word, sentence, reason, rows, axis_of(rows), f"{title}, top-1")


def _gain(record: dict[str, Any], others: dict[str, Score]) -> Score | None:
    """The paired distance to the best of `others`; a pretrained model, which may be better, is none of them."""
    if not others:
        return None
    best = max(others, key=lambda name: others[name].value)
    measured = score(record, f"{ABOVE}{best}")
    if measured is None and record["settings"].get("best_baseline", best) in others:
        return score(record, GAIN)  # the only distance in records of before there were several
    return measured


def _state(ours: Score, others: list[Score], gain: Score | None) -> tuple[str, str, str]:
    """State, word and reason: by the paired interval of the gain, otherwise by whether the two intervals touch."""
    if not others:
        return "unknown", "No baseline", "There is nothing to compare with: baselines are missing."
    if gain is None or gain.low is None or gain.high is None:
        best = max(others, key=lambda other: other.value)
        gain = Score(ours.value - best.value, _low(ours) - _high(best), _high(ours) - _low(best))
    if _low(gain) > 0:
        return "learning", "Learning", ""
    if _high(gain) < 0:
        return "stuck", "Worse than its baselines", "What it learnt is of less use than the best baseline."
    return "weak", "No clear gain", f"The difference to the best baseline may be nothing: {gain.interval}."


def _low(one: Score) -> float:
    return one.value if one.low is None else one.low


def _high(one: Score) -> float:
    return one.value if one.high is None else one.high


def _short(one: Score) -> str:
    interval = "" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}{interval}"


def _gap(difference: float, name: str) -> str:
    if abs(difference) < 0.005:
        return f"level with {name}"
    return f"{abs(difference):.2f} {'above' if difference > 0 else 'below'} {name}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
