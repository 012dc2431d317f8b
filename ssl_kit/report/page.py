"""Pages: the report of run folders and what a search found, from the templates that lie beside this file.

Only files are read, so a report can be written while training runs. Autoescape is always on, and a page may load
nothing: the Content-Security-Policy of `base.html` is what keeps "no request leaves the page" true even for a run
folder of a stranger. Only scripts with this page's nonce run, images are data URIs.
"""

from __future__ import annotations

import functools
import math
import re
import secrets
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ssl_kit import __version__
from ssl_kit.core.files import atomic_file
from ssl_kit.core.owned import GOING_ON, check_output
from ssl_kit.core.sealed import Entries
from ssl_kit.evaluation.catalog import ENCODER, EVALUATIONS
from ssl_kit.report import charts
from ssl_kit.report.head import data_root, facts, labelled, next_step, resuming, so_far, verdict
from ssl_kit.report.pictures import encode
from ssl_kit.report.read import VIEWS, Confusion, Run, read_run
from ssl_kit.report.scale import Scale
from ssl_kit.report.tables import (
    Score,
    axis_of,
    dimension_grids,
    feature_name,
    few_shot_grid,
    in_words,
    robustness_of,
    score_tables,
)

_DRAWN = ("few_shot", "robustness", "details")  # of one run: not as tables, but as charts and grids
_SEES = (  # where run.json does not tell what to look for
    "Each column is one image: the original on top, below it the views the method learns from. Could you tell that "
    "they belong together?"
)
_TITLES = {
    VIEWS: "Views",
    "reconstruction": "Image, what is seen of it, and what is filled in",
    "reconstructions": "Images and their reconstructions",
    "interpolations": "From one image to another",
    "samples": "Samples",
    "traversals": "What single numbers of the code change",
}
_WIDE = 1.5  # times as wide as high: such a picture gets the whole width of the page
_NEIGHBOURS_SHOWN = 10  # per strip
_LEGEND = 40  # classes with a button above the map, the most frequent ones
_MATRIX = 40  # classes that a matrix shows readably on 1,100 pixels
_RECALLS = 40
_PAIRS = 8
_STRONGEST = 48  # percent of the full colour: the number on it stays readable in both themes
_SEPARATORS = " _-./\\"
_PARTS = re.compile(rf"[^{re.escape(_SEPARATORS)}]*[{re.escape(_SEPARATORS)}]+|.+$", re.S)
Context: TypeAlias = dict[str, Any]  # what a template is given
_RELOAD = 15  # seconds between two looks at a run that goes on
_SEARCH_SIZE = 160  # pixels of the longer side


def write_report(runs: Sequence[Path | str], out: Path | str) -> Entries:
    """Writes the report of one run, or of several side by side.

    Args:
        runs: run folders, at least one.
        out: the HTML file, replaced in one step.

    Returns:
        `{"report": path, "bytes": size, "runs": [{"name", "status", "state", "verdict", "scores", "next"}]}`: how far
        it is, the verdict of run.json, its state alone and as a line, how the scores compare in words, empty without
        any, and the next command.

    Raises:
        UserError: one of `runs` is no run folder.
    """
    assert runs, "a report needs a run"
    read = [read_run(folder) for folder in runs]
    cards = [_card(run) for run in read]
    alone = read[0] if len(read) == 1 else None
    curves = charts.curve_charts(read)
    scores = _scores(read)
    extra = {"map": charts.map_model(alone.map)} if alone and alone.map else {}
    script, divs = charts.embed([*curves, *scores["charts"]], extra)
    page = render(
        "template.html",
        title=" and ".join(run.name for run in read) + ": report",
        cards=cards,
        axis=axis_of(row for card in cards for row in card["verdict"].rows),
        shape_of=charts.shape_of,
        sees=_sees(read),
        pictures=_shown_pictures(read),
        curves=curves,
        scores=scores,
        looks=alone and alone.looks,
        neighbours=_strips(alone.neighbours) if alone and alone.neighbours else None,
        duplicates=alone and alone.duplicates,
        map=_map_context(alone.map) if alone and alone.map else None,
        hints=_hints(read[0], scores["lacking"]),
        labelled=any(run.labelled for run in read),
        values=charts.single_values(read),
        reload=_RELOAD if any(run.info.get("status") in GOING_ON for run in read) else 0,
        resume=resuming(alone) if alone else "",
        written=round(time.time()),
        whole=Scale(0, 1),
        divs=divs,
        script=script,
        bokeh=charts.bokeh_js() if divs else "",
    )
    write_page(out, page)
    told = [
        {name: card[name] for name in ("name", "status")}
        | {"state": one.state, "verdict": one.line, "scores": one.scores, "next": card["next"].command}
        for card in cards
        for one in [card["verdict"]]
    ]
    return {"report": str(out), "bytes": Path(out).stat().st_size, "runs": told}


def strip_html(
    path: Path | str,
    title: str,
    queries: Sequence[tuple[str, np.ndarray | None]],
    results: Sequence[Sequence[tuple[str, float, np.ndarray | None]]],
    note: str = "The most similar image comes first, with its cosine similarity.",
) -> None:
    """Writes the page of `ssl-kit search --html` and of `duplicates`: each query, then what was found, with scores.

    Args:
        path: the HTML file; self-contained, no request leaves it.
        title: the heading.
        queries: (name, (H, W, C) uint8 or None if it cannot be read) per query.
        results: per query its neighbours, nearest first: (id, similarity, image or None if it cannot be read).
        note: what the scores are, under the heading.
    """
    assert len(queries) == len(results), "one list of neighbours per query"
    shown = lambda image: None if image is None else encode(image, _SEARCH_SIZE, 80)
    rows = [
        (name, shown(image), [(found, score, shown(picture)) for found, score, picture in neighbours])
        for (name, image), neighbours in zip(queries, results, strict=True)
    ]
    write_page(path, render("search.html", title=title, rows=rows, note=note))


def render(template: str, /, **context: object) -> str:
    """The HTML of a template of this folder; every string of `context` is escaped unless it is `Markup`."""
    made = {"nonce": secrets.token_urlsafe(16), "version": __version__}
    return _environment().get_template(template).render(**made, **context)


@functools.cache  # compiling the templates takes 0.3 s, and a run writes its page again and again
def _environment() -> Environment:
    folder = files("ssl_kit.report")
    made = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"broken": _broken, "short": _short}
    return made


def _broken(name: str) -> Markup:
    """A name that may be broken after its separators, where it is too long for its place."""
    return Markup("<wbr>").join(_PARTS.findall(name))


def _short(name: str, most: int) -> str:
    """A name of at most `most` characters: of a longer one the first words and an ellipsis, at least one of them."""
    if len(name) <= most:
        return name
    parts = _PARTS.findall(name)
    kept = [one for one, end in zip(parts, accumulate(map(len, parts)), strict=True) if end < most] or parts[:1]
    return f"{''.join(kept).rstrip(_SEPARATORS)}…" if len(kept) < len(parts) else name


def write_page(path: Path | str, page: str) -> None:
    """Writes a page atomically; what UTF-8 cannot hold (a stray surrogate of a file name) becomes `?`."""
    check_output(path)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _card(run: Run) -> Context:
    """What the page says about one run."""
    judged = verdict(run)
    status = so_far(run)
    eyebrow = [run.method, status, str(run.info.get("started") or "")]
    return {
        "name": run.name,
        "status": status,
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


def _encoders(run: Run) -> list[str]:
    """The sha256 of the encoders that have scores."""
    found = [one["made_by"].get("encoder_sha256") for one in run.results if one["features"] == ENCODER]
    return [str(sha256) for sha256 in found if sha256]


def _stale(run: Run) -> list[str]:
    """Says so when the scores are those of an encoder that the run no longer holds (training went on since)."""
    now, scored = run.info.get("encoder_sha256"), _encoders(run)
    if not now or not scored or now in scored:
        return []
    return ["The scores are those of an earlier encoder of this run: evaluate again."]


def _hints(run: Run, lacking: Sequence[str]) -> dict[str, str]:
    """The commands that make what is missing."""
    folder = shlex.quote(str(run.folder))
    evaluate = f"ssl-kit evaluate {folder} {labelled(run)}"
    return {
        "pretrain": f"ssl-kit pretrain {data_root(run)} --run {folder}",
        "evaluate": evaluate,
        "more": f"{evaluate} --only {','.join(lacking)}",
        "looks": f"{evaluate} --only looks",
    }


def _made(run: Run) -> list[tuple[str, str]]:
    """Rows of "versions, seed, hashes"."""
    info = run.info
    rows: dict[str, object] = {name: info.get(name) for name in ("method", "seed", "device", "started", "git", "wandb")}
    rows |= {"data": run.data.get("root"), "data fingerprint": run.data.get("fingerprint")}
    rows["encoder sha256"] = next(reversed(_encoders(run)), None)
    rows |= info["versions"] if isinstance(info.get("versions"), dict) else {}
    return [(str(name), str(value)) for name, value in rows.items() if value is not None]


def _sees(runs: Sequence[Run]) -> str:
    """What to look for in the pictures of the method, as run.json has it; nothing for several methods."""
    told = runs[0].info.get("shows")
    return (told if isinstance(told, str) and told else _SEES) if len({run.method for run in runs}) == 1 else ""


def _shown_pictures(runs: Sequence[Run]) -> list[Context]:
    """The pictures with their titles and captions: all of one run, the first one of each of several."""
    several, places = len(runs) > 1, list(_TITLES)
    # what a method shows of itself says more than its input; that is what the first screen of several has room for
    place = lambda name: (several and name == VIEWS, places.index(name) if name in places else len(places))
    shown = []
    for run in runs:
        for picture in sorted(run.pictures, key=lambda one: place(one.name))[: 1 if several else None]:
            title = _TITLES.get(picture.name, in_words(picture.name))
            wide = picture.width > _WIDE * picture.height or len(run.pictures) == 1
            told = f"{run.name}: {title[:1].lower()}{title[1:]}" if several else title
            shown.append({"title": told, "picture": picture, "wide": wide and not several})
    return shown


def _scores(runs: Sequence[Run]) -> Context:
    """The section of scores: tables alone of several runs; of one also charts and grids, and what is lacking."""
    alone = runs[0] if len(runs) == 1 else Run(runs[0].folder)
    few_shot, dimensions = charts.few_shot_charts(alone), charts.dimension_charts(alone)
    robustness = robustness_of(alone)
    roc = charts.roc_chart(alone.roc) if alone.roc and alone.roc.classes else None
    there: dict[str, object] = {"few_shot": few_shot, "curve": dimensions, "robustness": robustness}
    there |= {"details": alone.confusion and alone.roc and alone.wrong, "looks": alone.looks}
    scored = len(runs) == 1 and alone.labelled
    lacking = [entry for entry in EVALUATIONS.values() if scored and entry.absent and not there[entry.name]]
    recalls = sorted((one for one in alone.classes if one.num_images), key=lambda one: one.recall)
    return {
        "tables": score_tables(runs, without=_DRAWN if len(runs) == 1 else ()),
        "few_shot": few_shot,
        "few_shot_grid": few_shot_grid(alone),
        "dimensions": dimensions,
        "dimension_grids": dimension_grids(alone),
        "robustness": robustness,
        "roc": roc,
        "charts": [*few_shot, *dimensions, *([roc] if roc else [])],
        "confusion": confusion_grid(alone.confusion) if alone.confusion else None,
        "recalls": [(one, Score(one.recall, one.low, one.high)) for one in recalls[:_RECALLS]],
        "num_recalls": len(recalls),
        "wrong": alone.wrong,
        "suspected": _suspected(alone),
        "missing": [entry.absent for entry in lacking],
        "lacking": [entry.name for entry in lacking],
        "by_labels": any(run.results for run in runs),
    }


def _suspected(run: Run) -> str:
    """Label errors that neighbours suspect, in words; empty where nothing looked for them."""
    found = [one["metrics"] for one in run.results if one["evaluation"] == "details"]
    shares = [(part, found[-1].get(f"suspected_{part}")) for part in ("train", "test")] if found else []
    told = [f"{100 * share:.1f} % of {part}" for part, share in shares if isinstance(share, int | float)]
    return f"Neighbours disagree with the label of {' and '.join(told)}: see details/suspected_*.csv." if told else ""


def confusion_grid(confusion: Confusion) -> Context:
    """The matrix as rows of cells: percent of the row's images, and how strongly a cell is coloured.

    Of more than 40 classes the 40 with the lowest recall are shown, and what they were taken for beyond these is one
    column.
    """
    counts, names = confusion.counts, confusion.classes
    images = counts.sum(axis=1)
    shown = np.arange(len(counts))
    if len(shown) > _MATRIX:
        recall = np.where(images > 0, counts.diagonal() / np.maximum(images, 1), np.inf)
        shown = np.sort(np.argsort(recall, kind="stable")[:_MATRIX])
    rows = []
    for place in shown.tolist():
        cells = [_cell(counts[place, other], images[place], place == other) for other in shown.tolist()]
        if len(shown) < len(counts):
            cells.append(_cell(counts[place].sum() - counts[place, shown].sum(), images[place], False))
        rows.append({"name": names[place], "cells": cells})
    errors = counts - np.diag(counts.diagonal())
    order = np.argsort(-errors, axis=None, kind="stable")[:_PAIRS].tolist()  # the most frequent confusions
    pairs = [(names[place // len(names)], names[place % len(names)], *_of(errors, images, place)) for place in order]
    return {
        "names": [names[place] for place in shown],
        "others": len(counts) - len(shown),
        "rows": rows,
        "total": int(images.sum()),
        "right": int(counts.trace()),
        "pairs": [pair for pair in pairs if pair[2]],
    }


def _of(errors: np.ndarray, images: np.ndarray, place: int) -> tuple[int, int]:
    return int(errors.flat[place]), int(images[place // len(images)])


def _cell(count: int, images: int, right: bool) -> Context:
    share = float(count / max(images, 1))
    return {
        "text": f"{100 * share:.0f}" if share >= 0.005 else "<1" if count else "",
        "told": f"{count:,} of {images:,}" if count else "",
        "strength": round(_STRONGEST * math.sqrt(share)),  # errors are small shares: the root makes 4 % visible
        "right": right,
    }


def _strips(value: Entries) -> Context:
    """The query strips as the page shows them: the encoder's row first, ten neighbours, right or wrong where known."""
    labels, names = value["labels"], sorted(value["found"], key=lambda name: name != ENCODER)
    class_of = lambda place, unknown: value["classes"][labels[place]] if labels[place] >= 0 else unknown
    queries, right, asked = [], Counter[str](), Counter[str]()
    for position, query in enumerate(value["queries"]):
        rows = []
        for name in names:
            shown = value["found"][name][position][:_NEIGHBOURS_SHOWN]
            marks = ["" if labels[query] < 0 else "right" if labels[one] == labels[query] else "wrong" for one in shown]
            told = f", {marks.count('right')} of {len(shown)} right" if labels[query] >= 0 else ""
            right[name] += marks.count("right")
            asked[name] += len(shown) * (labels[query] >= 0)
            named = [(class_of(one, "unlabelled"), value["images"][one]) for one in shown]
            hits = [(*one, mark) for one, mark in zip(named, marks, strict=True)]
            rows.append({"name": feature_name(name), "told": told, "hits": hits})
        called = class_of(query, f"query {position + 1}")
        queries.append({"name": called, "image": value["images"][query], "rows": rows})
    sums = [f"{right[name]} of {asked[name]} by {feature_name(name)}" for name in names if asked[name]]
    marked = bool(sums)
    told = " ".join(filter(None, (value["told"], f"Of the query's class: {', '.join(sums)}." if marked else "")))
    return {"queries": queries, "told": told, "marked": marked}


def _map_context(value: Entries) -> Context:
    """The classes that have a button above the map, and what the map is."""
    counts = Counter(label for label in value["labels"] if label >= 0)
    shown = sorted(label for label, _ in counts.most_common(_LEGEND))
    count = f"{len(value['labels']):,}"
    return {
        "legend": [(label, charts.shape_of(label), value["classes"][label], counts[label]) for label in shown],
        "count": count,
        "told": (value["projection"].rstrip(".") or f"{count} images in the plane") + ".",
    }
