"""Charts of scores: by labels, by dimensions, ROC. The same features have the same colour in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ssl_kit.evaluation.catalog import EVALUATIONS
from ssl_kit.report.charts import NUM_COLOURS, Chart, colour, draw_line, new_figure, shape_of
from ssl_kit.report.reading import Run
from ssl_kit.report.reading_details import Roc, RocLine
from ssl_kit.report.series import Line, dimension_lines, few_shot_lines

_HEIGHT = 300
_PLACES = {"encoder": 0, "pixels": 1, "random_init": 6, "pca": 3}  # in the palette; pretrained models get the rest
_OTHERS = (2, 5, 7, 4)
_DASHES = ("solid", "dashed", "dotted")
_LOWEST = 4  # classes whose ROC curve has a colour of its own
_FAINT = 40  # other classes that are drawn at all


def few_shot_charts(run: Run) -> list[Chart]:
    """A chart per protocol: top-1 against labelled images per class."""
    charts = []
    for number, (protocol, lines) in enumerate(few_shot_lines(run).items()):
        fig = new_figure("labelled images per class", x_scale="log", height=_HEIGHT)
        legend = _draw(fig, lines, {line.features for line in lines})
        _label(fig, {shots: f"{shots:,}" for line in lines for shots in line.points})
        title = f"Few-shot: {protocol}" if protocol else "Few-shot"
        caption = "Top-1 on the test images, the mean over several draws of labels; bars are 95 % intervals."
        charts.append(Chart(f"few-shot-{number}", title, caption, legend, fig, spoken=_ends(lines)))
    return charts


def dimension_charts(run: Run) -> list[Chart]:
    """A chart per evaluation: top-1 against the dimensions kept, with what a million vectors take to store."""
    charts = []
    for evaluation, lines in dimension_lines(run).items():
        fig = new_figure("dimensions; storage of a million float32 vectors", x_scale="log", height=_HEIGHT + 30)
        legend = _draw(fig, lines, {line.features for line in lines})
        _label(fig, {dim: f"{dim:,}\n{storage(dim)}" for line in lines for dim in line.points})
        title = f"{EVALUATIONS[evaluation].title} top-1 by number of dimensions"
        caption = "Bars are 95 % intervals. Fewer dimensions cost less to store and search."
        charts.append(Chart(f"dimensions-{evaluation}", title, caption, legend, fig, spoken=_ends(lines)))
    return charts


def roc_chart(roc: Roc) -> Chart:
    """Recall against false-positive rate: the mean over classes, the classes of lowest area, the others faintly."""
    fig = new_figure("false-positive rate", height=_HEIGHT)
    fig.yaxis.axis_label = "recall"
    fig.yaxis[0].tags = [*fig.yaxis[0].tags, "axis_label_text_color=--muted"]
    chance = fig.line([0, 1], [0, 1], line_dash="dashed", line_width=1)
    chance.glyph.tags = ["line_color=--muted"]
    ranked = sorted(roc.classes, key=lambda line: line.auroc)
    for line in ranked[_LOWEST : _LOWEST + _FAINT]:
        faint = fig.line(roc.rates, line.recalls, line_width=1, line_alpha=0.3)
        faint.glyph.tags = ["line_color=--muted"]
    legend: list[tuple[str, int, int]] = []
    for position, line in reversed(list(enumerate([roc.macro, *ranked[:_LOWEST]]))):  # the macro average on top
        data = {"x": roc.rates, "y": line.recalls}
        tooltips = [("false-positive rate", "@x{0.000}"), ("recall", "@y{0.000}")]
        draw_line(fig, data, position, 0, tooltips, dots=False, width=1.5 if position else 3)
        legend.insert(0, (_named(line), position, 0))
    others = len(ranked) - _LOWEST
    told = "Each class against the rest, by the linear probe. Dashed: chance, area 0.5."
    if others > 0:
        told += f" Coloured: the {_LOWEST} classes of the lowest area; thin and grey: {min(others, _FAINT)} others."
    return Chart("roc", "ROC", told, legend, fig)


def storage(dim: int) -> str:
    """What a million float32 vectors of so many dimensions take: `256 MB`, `2 GB`."""
    megabytes = 4 * dim
    return f"{megabytes:,} MB" if megabytes < 1_000 else f"{megabytes / 1_000:.3g} GB"


def place_of(features: str, others: Iterable[str]) -> int:
    """Where in the palette the colour of some features is; pretrained models among `others` share what is left."""
    if features in _PLACES:
        return _PLACES[features]
    unknown = sorted(name for name in {features, *others} if name not in _PLACES)
    return _OTHERS[unknown.index(features) % len(_OTHERS)]


def _draw(fig: Any, lines: Sequence[Line], features: Iterable[str]) -> list[tuple[str, int, int]]:
    """Draws lines with their intervals; returns the legend. Variants of the same features differ by shape and dash."""
    legend = []
    others = list(features)
    for line in lines:
        place = place_of(line.features, others)
        shape = shape_of(line.variant if any(one.variant for one in lines) else place % NUM_COLOURS)
        points = list(line.points.items())
        bounded = [(x, one.low, one.high) for x, one in points if one.low is not None and one.high is not None]
        if bounded:
            x, low, high = (list(column) for column in zip(*bounded, strict=True))
            bars = fig.segment(x, low, x, high, line_width=5, line_alpha=0.3)
            colour(bars.glyph, place, "line_color")
        data = {
            "x": [x for x, _ in points],
            "y": [one.value for _, one in points],
            "told": [f"{one.text} {one.interval}".strip() for _, one in points],
        }
        tooltips = [(line.name, "@told"), ("at", "@x{0,0}")]
        draw_line(fig, data, place, shape, tooltips, dash=_DASHES[line.variant % len(_DASHES)])
        legend.append((line.name, place, shape))
    return legend


def _label(fig: Any, labels: dict[int, str]) -> None:
    """Ticks of a logarithmic axis where something was measured, and nowhere else."""
    from bokeh.models import NoOverlap

    fig.xaxis.ticker = sorted(labels)
    fig.xaxis.major_label_overrides = labels
    fig.xaxis.major_label_policy = NoOverlap(min_distance=6)  # on a phone


def _ends(lines: Sequence[Line]) -> str:
    """First and last value of each line in words, for those who cannot see it."""
    told = []
    for line in lines:
        (first, low), (last, high) = (list(line.points.items())[end] for end in (0, -1))
        told.append(f"{line.name}: {low.value:.3f} at {first:,}, {high.value:.3f} at {last:,}")
    return "; ".join(told) + "."


def _named(line: RocLine) -> str:
    return f"{line.name}, area {line.auroc:.3f}"
