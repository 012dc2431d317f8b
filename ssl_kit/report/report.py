"""`write_report`: run folders in, one HTML file out. Reads files only, so it can be written while training runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssl_kit.evaluation.catalog import ENCODER
from ssl_kit.report import charts
from ssl_kit.report.looks import look_rows
from ssl_kit.report.page import render, write_page
from ssl_kit.report.reading import Run, read_run
from ssl_kit.report.score_section import score_section
from ssl_kit.report.scores import axis_of
from ssl_kit.report.sections import duplicate_strips, map_context, seen, shown_pictures, strips
from ssl_kit.report.untrusted import number
from ssl_kit.report.verdict import Verdict, verdict


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


def write_report(runs: Sequence[Path | str], out: Path | str) -> dict[str, Any]:
    """Writes the report of one run, or of several side by side.

    Args:
        runs: run folders, at least one.
        out: the HTML file, replaced in one step.

    Returns:
        `{"report": path, "bytes": size, "runs": [{"name", "state", "verdict", "scores"}]}`: the verdict of run.json,
        its state alone and as a line, and how the scores compare in words, empty without any.

    Raises:
        UserError: one of `runs` is no run folder.
    """
    assert runs, "a report needs a run"
    read = [read_run(folder) for folder in runs]
    cards = [_card(run) for run in read]
    alone = read[0] if len(read) == 1 else None
    curves = charts.curve_charts(read)
    scores = score_section(alone, read)
    extra = {"map": charts.map_model(alone.map)} if alone and alone.map else {}
    script, divs = charts.embed([*curves, *scores.charts], extra)
    page = render(
        "template.html",
        title=" and ".join(run.name for run in read) + ": report",
        cards=cards,
        axis=axis_of(row for card in cards for row in card["verdict"].rows),
        shape_of=charts.shape_of,
        sees=seen(read),
        pictures=shown_pictures(read),
        curves=curves,
        smoothed=any(chart.smoothed for chart in curves),
        scores=scores,
        looks=alone.looks and {"rows": look_rows(alone.looks), "prototypes": alone.looks["prototypes"]}
        if alone
        else None,
        neighbours=strips(alone.neighbours) if alone and alone.neighbours else None,
        duplicates=duplicate_strips(alone.duplicates) if alone and alone.duplicates else None,
        map=map_context(alone.map) if alone and alone.map else None,
        hints=_hints(read[0], scores.lacking),
        divs=divs,
        script=script,
        bokeh=charts.bokeh_js() if divs else "",
    )
    write_page(out, page)
    heads = [(card["name"], card["verdict"]) for card in cards]
    told = [{"name": name, "state": one.state, "verdict": one.line, "scores": one.scores} for name, one in heads]
    return {"report": str(out), "bytes": Path(out).stat().st_size, "runs": told}


def _card(run: Run) -> dict[str, Any]:
    """What the page says about one run."""
    judged = verdict(run)
    eyebrow = [run.method, str(run.info.get("status") or ""), str(run.info.get("started") or "")]
    return {
        "name": run.name,
        "trained": bool(run.info or run.metrics or run.pictures or run.recipe),  # not only scores of some encoder
        "eyebrow": [part for part in eyebrow if part],
        "verdict": judged,
        "facts": facts(run),
        "next": next_step(run, judged),
        "problems": [*run.problems, *_stale(run)],
        "command": str(run.info.get("command") or ""),
        "made": _made(run),
        "recipe": run.recipe,
        "skipped": run.skipped,
        "num_skipped": run.num_skipped,
    }


def _stale(run: Run) -> list[str]:
    """Says so when the scores are those of an encoder that the run no longer holds (training went on since)."""
    now = run.info.get("encoder_sha256")
    scored = {one["made_by"].get("encoder_sha256") for one in run.results if one.get("features") == ENCODER} - {None}
    if not now or not scored or now in scored:
        return []
    return ["The scores are those of an earlier encoder of this run: evaluate again."]


def facts(run: Run) -> list[Fact]:
    """The facts strip; what run.json does not say is left out."""
    info, data = run.info, run.info.get("data")
    data = data if isinstance(data, dict) else {}
    found = []
    if data.get("root"):
        root = Path(str(data["root"]))
        found.append(Fact("data", root.name or str(root), f"in {root.parent.name}" * bool(root.parent.name), str(root)))
    images, skipped = number(data.get("images")), number(data.get("skipped")) or float(run.num_skipped)
    if images is not None:
        found.append(Fact("images", f"{images:,.0f}", f"{skipped:,.0f} skipped" if skipped else "none skipped"))
    epochs, seconds = number(info.get("epochs")), number(info.get("seconds"))
    if epochs is not None:
        found.append(Fact("epochs", f"{epochs:,.4g}"))
    if seconds is not None:
        found.append(Fact("time", duration(seconds)))
    speed, waiting = number(info.get("images_per_second")), number(info.get("waiting_share"))
    if speed is not None:
        found.append(Fact("images per second", f"{speed:,.0f}"))
    if waiting is not None:
        found.append(Fact("waiting for data", f"{100 * waiting:.0f} %", "of the time"))
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
    folder, status, data = shlex.quote(str(run.folder)), run.info.get("status"), _data_root(run)
    if status == "interrupted":
        return Step(f"ssl-kit pretrain {data} --run {folder} --resume", "continues where the run was cut off")
    if judged.state in ("stuck", "collapsed"):
        if not run.recipe:
            return Step(f"ssl-kit pretrain {data}", "train longer, or on images closer to these")
        return Step(
            f"ssl-kit views {data} -c {folder}/recipe.yaml --out views.png",
            "are the views still recognisable? Then try another learning rate or temperature",
        )
    if not any(record.get("features") == ENCODER for record in run.results):
        why = "once training has ended" if status in ("starting", "running") else "is it better than raw pixels?"
        return Step(f"ssl-kit evaluate {folder} LABELLED", why)
    return Step(f"ssl-kit embed {folder} {data} --out EMB", "then index and search it")


def _data_root(run: Run) -> str:
    data = run.info.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return shlex.quote(str(root)) if root else "DATA"


def _hints(run: Run, lacking: Sequence[str]) -> dict[str, str]:
    """The commands that make what is missing."""
    folder = shlex.quote(str(run.folder))
    evaluate = f"ssl-kit evaluate {folder} LABELLED"
    return {
        "pretrain": f"ssl-kit pretrain {_data_root(run)} --run {folder}",
        "evaluate": evaluate,
        "more": f"{evaluate} --only {','.join(lacking)}",
        "looks": f"{evaluate} --only looks",
    }


def _made(run: Run) -> list[tuple[str, str]]:
    """Rows of "versions, seed, hashes"."""
    info, data = run.info, run.info.get("data")
    rows: dict[str, Any] = {name: info.get(name) for name in ("method", "seed", "device", "started", "git", "wandb")}
    if isinstance(data, dict):
        rows |= {"data": data.get("root"), "data fingerprint": data.get("fingerprint")}
    for record in run.results:
        if record.get("features") == ENCODER and record["made_by"].get("encoder_sha256"):
            rows["encoder sha256"] = record["made_by"]["encoder_sha256"]
    versions = info.get("versions")
    rows |= versions if isinstance(versions, dict) else {}
    return [(str(name), str(value)) for name, value in rows.items() if value is not None]
