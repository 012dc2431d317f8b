"""The verdict after an evaluation: what training said, and what scores on images that it never saw say to it.

`evaluate` and `finetune` write it into the run's record, which report and model card read: there is one verdict.
"""

from __future__ import annotations

from ssl_kit.core.console import say
from ssl_kit.core.owned import Record
from ssl_kit.report.reading import Run, read_run
from ssl_kit.report.untrusted import number
from ssl_kit.report.verdict import BASELINES, Compared, compared
from ssl_kit.report.verdict import verdict as shown
from ssl_kit.training.verdict import BELOW, Verdict, too_short

_PIXELS = ("pixels", "pca")


def settle(record: Record) -> None:
    """Gives the record of a run the verdict that takes its results into account, and says a change.

    Args:
        record: of a folder whose results are written; that of scores alone, without a training, stays as it is.
    """
    run = read_run(record.folder)
    told, final = shown(run), final_verdict(run)
    if final.state != told.state:
        say(f"verdict: {final.state} - {final.reason}; in training it was {told.state}")
        record.entries["verdict"] = final._asdict()
        record.write()


def final_verdict(run: Run) -> Verdict:
    """The verdict of run.json, changed where scores on test images are sure of something else.

    - learning, but surely below raw pixels or PCA of the pixels: `BELOW`; surely below the untrained network: unknown.
    - `BELOW` or unknown, but surely above the untrained network, after training for long enough: learning, or `BELOW`.
    - stuck or collapsed, but surely above every baseline, likewise: learning.

    What the scores leave open stays as it was, and so does all where they are of an earlier encoder, or of an
    evaluation that does not judge the method.
    """
    head, found = shown(run), compared(run)
    told = Verdict(head.state, head.reason)
    if found is None or not found.judges or _outdated(found, run):
        return told
    pixels = [found.signs[name] for name in _PIXELS if name in found.signs]
    untrained = found.signs.get("random_init", 0)
    enough = not too_short(number(run.info.get("steps")) or 0, number(run.info.get("epochs")) or 0)
    state = told.state
    if told.state == "learning" and untrained < 0:
        state = "unknown"
    elif told.state in ("learning", BELOW):
        state = BELOW if -1 in pixels else "learning" if pixels and untrained > 0 else told.state
    elif told.state == "unknown" and enough and untrained > 0:
        state = BELOW if -1 in pixels else "learning"
    elif told.state in ("stuck", "collapsed") and enough and untrained > 0 and set(pixels) == {1}:
        state = "learning"
    return told if state == told.state else Verdict(state, _reason(found))


def _outdated(found: Compared, run: Run) -> bool:
    now, then = run.info.get("encoder_sha256"), found.record["made_by"].get("encoder_sha256")
    return None not in (now, then) and now != then


def _reason(found: Compared) -> str:
    where = {1: "above", 0: "level with", -1: "below"}
    places = [
        f"{where[found.signs[name]]} {words} ({found.others[name].value:.3f})"
        for name, words in BASELINES.items()
        if name in found.others
    ]
    test = found.record["made_by"].get("test")
    return f"{found.title} {found.ours.value:.3f}{f' on {test}' if test else ''}, {', '.join(places)}"
