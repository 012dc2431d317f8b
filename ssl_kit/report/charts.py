"""The bokeh charts: curves over training, scores by labels and by dimensions, ROC, the map. Colours are names.

A model that has a colour carries it as a tag `property=--variable`; `page.js` sets it from the page's CSS variables
at load and whenever the theme changes, so that charts and text share one palette. The fallbacks set here are those of
the light theme. No toolbar on the curves and no scroll or pan tools: a finger must be able to scroll past them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from ssl_kit.core.sealed import Entries
from ssl_kit.evaluation.catalog import EVALUATIONS
from ssl_kit.report.read import Roc, Run, number
from ssl_kit.report.scale import Scale
from ssl_kit.report.tables import Line, dimension_lines, few_shot_lines, storage

if TYPE_CHECKING:
    from bokeh.model import Model
    from bokeh.plotting import figure as Figure

MAX_POINTS = 2_000  # per line
_SMOOTH_FROM = 150  # rows from which a moving average is drawn over the logged line
_DOTS_TO = 40  # rows up to which each is marked with a dot
NUM_COLOURS = 10  # --c0 ... --c9 of style.css
MARKERS = ("circle", "triangle", "square", "diamond", "inverted_triangle")  # colour is never the only sign
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_CURVES = {  # column -> title, note
    "loss": ("Loss", "Lower is better. A collapsed model stays at the dashed line."),
    "knn_top1": ("kNN top-1 while training", "On held-out labelled images the encoder never trained on."),
    "crops_top1": (
        "Crop to crop, top-1",
        "How often the left half of an image finds its right half, among those of all images asked; no labels.",
    ),
    "effective_rank": ("Effective rank while training", "How many directions the features use; 1 means collapsed."),
    "lr": ("Learning rate", "As scheduled, after scaling with the batch."),
    "alignment": ("Alignment while training", "Distance between two views of one image; lower is closer."),
    "uniformity": ("Uniformity while training", "How evenly the features fill the sphere; lower is more even."),
}
# The same features have the same colour in every chart: their place in the palette; pretrained models get the rest
_PLACES = {"encoder": 0, "pixels": 1, "random_init": 6, "pca": 3}
_OTHERS = (2, 7, 8, 4)
_SHARES = ("knn_top1", "crops_top1")  # columns that may be spaced by their odds
_SHOWN = {"loss": ".3f", "effective_rank": ".1f"} | dict.fromkeys(_SHARES, ".3f")  # as the verdict writes them
_HEIGHT = 300  # of charts of scores
_DASHES = ("solid", "dashed", "dotted")
_LOWEST = 4  # classes whose ROC curve has a colour of its own
_FAINT = 40  # other classes that are drawn at all


@dataclass(frozen=True)
class Chart:
    """`name` is the key of its div; `legend` holds (text, colour, shape). `caption` and `spoken`, which is for screen
    readers only, say in words what the lines begin and end with."""

    name: str
    title: str
    caption: str
    legend: list[tuple[str, int, int]]
    model: Figure
    smoothed: bool = False
    spoken: str = ""


def embed(charts: Sequence[Chart], extra: Mapping[str, Figure]) -> tuple[str, dict[str, str]]:
    """Bokeh's script (without its tag) and the div of each chart, by name."""
    from bokeh.embed import components

    models: dict[str, Model] = {**{chart.name: chart.model for chart in charts}, **extra}
    if not models:
        return Markup(""), {}
    script, divs = components(models, wrap_script=False)
    return Markup(script), {name: Markup(div) for name, div in divs.items()}


def bokeh_js() -> Markup:
    """BokehJS as one inline script; only its core bundle (1.3 MB), which is all that these charts use."""
    from bokeh.resources import Resources

    return Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw))


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart per column of metrics.csv that was measured more than once, the runs overlaid."""
    axis = _time_axis(runs)
    charts = []
    for column, (title, note) in _CURVES.items():
        lines = [(run, *_line(run, axis, column)) for run in runs]
        if not any(len(x) > 1 for _, x, _ in lines):
            continue
        fig = _figure(axis)
        scale = _spread_out(fig, np.concatenate([y for _, _, y in lines])) if column in _SHARES else None
        smoothed = [_draw_curve(fig, x, y, position, scale) for position, (_, x, y) in enumerate(lines)]
        chances = [number(run.info.get("chance_loss")) for run in runs] if column == "loss" else []
        for chance in sorted({round(chance, 4) for chance in chances if chance is not None}):
            _draw_chance(fig, chance, [y for _, _, y in lines if len(y)])
        ends = "; ".join(_ends(column, run.name if len(runs) > 1 else "", y) for run, _, y in lines if len(y))
        legend = [(run.name, position, shape_of(position)) for position, run in enumerate(runs)]
        legend = legend if len(runs) > 1 else []
        charts.append(Chart(f"curve-{column}", title, f"{ends}. {note}", legend, fig, any(smoothed)))
    return charts


def single_values(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and value of each column that was measured no more than once in any run: no curve yet."""
    found = []
    for column, (title, _) in _CURVES.items():
        lines = [(run.name if len(runs) > 1 else "", _line(run, "step", column)[1]) for run in runs]
        if max(len(y) for _, y in lines) == 1:
            found.append((title, "; ".join(_ends(column, name, y) for name, y in lines if len(y))))
    return found


def _spread_out(fig: Figure, values: Iterable[float]) -> Scale | None:
    """Gives the chart an axis by odds where values come near 1; None where it stays even."""
    from bokeh.models import FixedTicker

    scale = Scale.of(values)
    if scale is None or not scale.odds:
        return None
    places = [float(place) for place in scale.spaced(scale.ticks)]
    told: Any = {place: f"{tick:g}" for place, tick in zip(places, scale.ticks, strict=True)}
    fig.yaxis.ticker, fig.yaxis.major_label_overrides = FixedTicker(ticks=places), told
    fig.ygrid.ticker = FixedTicker(ticks=places)
    return scale


def few_shot_charts(run: Run) -> list[Chart]:
    """A chart per protocol: top-1 against labelled images per class."""
    caption = "Top-1 on the test images, the mean over several draws of labels; bars are 95 % intervals."
    return [
        _score_chart(
            f"few-shot-{place}",
            f"Few-shot: {protocol}" if protocol else "Few-shot",
            caption,
            lines,
            _figure("labelled images per class", x_scale="log", height=_HEIGHT),
            "{:,}".format,
        )
        for place, (protocol, lines) in enumerate(few_shot_lines(run).items())
    ]


def dimension_charts(run: Run) -> list[Chart]:
    """A chart per evaluation: top-1 against the dimensions kept, with what a million vectors take to store."""
    caption = "Bars are 95 % intervals. Fewer dimensions cost less to store and search."
    return [
        _score_chart(
            f"dimensions-{evaluation}",
            f"{EVALUATIONS[evaluation].title} top-1 by number of dimensions",
            caption,
            lines,
            _figure("dimensions; storage of a million float32 vectors", x_scale="log", height=_HEIGHT + 30),
            lambda dim: f"{dim:,}\n{storage(dim)}",
        )
        for evaluation, lines in dimension_lines(run).items()
    ]


def roc_chart(roc: Roc) -> Chart:
    """Recall against false-positive rate: the mean over classes, the classes of lowest area, the others faintly."""
    fig = _figure("false-positive rate", height=_HEIGHT)
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
        _draw_line(fig, data, position, 0, tooltips, dots=False, width=1.5 if position else 3)
        legend.insert(0, (f"{line.name}, area {line.auroc:.3f}", position, 0))
    others = len(ranked) - _LOWEST
    told = "Each class against the rest, by the linear probe. Dashed: chance, area 0.5."
    if others > 0:
        told += f" Coloured: the {_LOWEST} classes of the lowest area; thin and grey: {min(others, _FAINT)} others."
    return Chart("roc", "ROC", told, legend, fig)


def _score_chart(
    name: str, title: str, caption: str, lines: Sequence[Line], fig: Figure, tick: Callable[[int], str]
) -> Chart:
    """Lines with their intervals; ticks where something was measured. Variants of features differ by shape and dash."""
    from bokeh.models import NoOverlap

    legend, ends = [], []
    every = [one for line in lines for one in line.points.values()]
    scale = _spread_out(fig, [end for one in every for end in (one.value, *(one.bounds or ()))]) or Scale(0, 1)
    for line in lines:
        place = _place_of(line.features, lines)
        shape = shape_of(line.variant if any(one.variant for one in lines) else place % NUM_COLOURS)
        bounded = [(x, *one.bounds) for x, one in line.points.items() if one.bounds]
        if bounded:
            x, low, high = (list(column) for column in zip(*bounded, strict=True))
            bars = fig.segment(x, scale.spaced(low), x, scale.spaced(high), line_width=5, line_alpha=0.3)
            _colour(bars.glyph, place, "line_color")
        scores = list(line.points.values())
        told = [f"{one.text} {one.interval}".strip() for one in scores]
        data: dict[str, Sequence[object]] = {"x": list(line.points), "told": told}
        data["y"] = scale.spaced([one.value for one in scores]).tolist()
        tooltips = [(line.name, "@told"), ("at", "@x{0,0}")]
        _draw_line(fig, data, place, shape, tooltips, dash=_DASHES[line.variant % len(_DASHES)])
        legend.append((line.name, place, shape))
        first, last = min(line.points), max(line.points)
        ends.append(f"{line.name}: {scores[0].value:.3f} at {first:,}, {scores[-1].value:.3f} at {last:,}")
    ticks: Any = {x: tick(x) for line in lines for x in line.points}
    fig.xaxis.ticker, fig.xaxis.major_label_overrides = sorted(ticks), ticks
    fig.xaxis.major_label_policy = NoOverlap(min_distance=6)  # on a phone
    return Chart(name, title, caption, legend, fig, spoken=f"{'; '.join(ends)}.")


def _place_of(features: str, lines: Iterable[Line]) -> int:
    others = sorted({line.features for line in lines} - _PLACES.keys())
    return _PLACES[features] if features in _PLACES else _OTHERS[others.index(features) % len(_OTHERS)]


def map_model(value: Entries) -> Figure:
    """The map: a scatter with the thumbnail in the tooltip; `page.js` pins what is clicked and dims classes."""
    from bokeh.models import ColumnDataSource, HoverTool, PanTool, ResetTool, TapTool, WheelZoomTool

    labels = value["labels"]
    data = {
        "x": value["x"],
        "y": value["y"],
        "thumb": value["images"],
        "label": labels,
        "name": [value["classes"][label] if label >= 0 else "" for label in labels],
        "index": value["indices"],
        "marker": [MARKERS[shape_of(label)] if label >= 0 else "circle" for label in labels],
        "color": ["#0072B2"] * len(labels),
        "alpha": [0.8] * len(labels),
    }
    source = ColumnDataSource(data, name="map")
    fig = _figure("")
    fig.sizing_mode = "stretch_both"  # style.css gives the height: less on a phone
    fig.axis.visible = False
    fig.grid.visible = False
    fig.match_aspect = True
    dots = fig.scatter("x", "y", source=source, marker="marker", size=8, color="color", alpha="alpha", line_color=None)
    dots.selection_glyph = dots.nonselection_glyph = None
    # BokehJS escapes what it fills in; `thumb` was checked to be base64 when it was read
    tooltip = (
        '<div style="text-align:center"><img src="data:image/webp;base64,@thumb" alt="" style="width:88px;'
        'image-rendering:pixelated;border-radius:4px;display:block;margin:2px auto 4px"><b>@name</b> #@index</div>'
    )
    fig.add_tools(HoverTool(tooltips=tooltip, renderers=[dots], visible=False))
    fig.add_tools(TapTool(renderers=[dots], visible=False), PanTool(), WheelZoomTool(), ResetTool())
    fig.toolbar_location = "above"
    fig.toolbar.active_drag = fig.toolbar.active_scroll = None
    return fig


def shape_of(position: int) -> int:
    """Index of `MARKERS` for the class or line at `position`: 50 pairs of colour and shape before one comes again."""
    return (position + position // NUM_COLOURS) % len(MARKERS)


def decimate(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a line (N,), (N,): the lowest and the highest of each of limit / 2 stretches.

    A spike of one step survives, which taking every n-th row would lose.
    """
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(y), limit // 2 + 1).astype(np.int64)
    stretches = [(start, y[start:end]) for start, end in pairwise(edges)]
    order = np.unique([start + place for start, part in stretches for place in (part.argmin(), part.argmax())])
    return x[order], y[order]


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """(N,) centred means over `window` rows, over fewer at the ends: the line starts and ends where the data does."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    reach = window // 2
    start = np.clip(np.arange(len(y)) - reach, 0, None)
    end = np.clip(np.arange(len(y)) + reach + 1, None, len(y))
    return (sums[end] - sums[start]) / (end - start)


def _line(run: Run, axis: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The (N,) positions in time and values of a column, without the rows where either is missing."""
    x, y = _positions(run, axis), run.metrics.get(column)
    if x is None or y is None:
        return np.zeros(0), np.zeros(0)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _time_axis(runs: Sequence[Run]) -> str:
    # one axis for all runs: epochs where every run knows them, otherwise steps
    return "epoch" if all(_positions(run, "epoch") is not None for run in runs if run.metrics) else "step"


def _positions(run: Run, axis: str) -> np.ndarray | None:
    """(rows,) epochs or steps; whole epochs, the same for many rows, are made finer from the images seen."""
    if axis == "step":
        return run.metrics.get("step")
    epochs, seen, per_epoch = run.metrics.get("epoch"), run.metrics.get("images"), number(run.data.get("images"))
    if epochs is not None and 2 * len(np.unique(epochs)) > len(epochs):
        return epochs
    return seen / per_epoch if seen is not None and per_epoch else None


def _ends(column: str, name: str, y: np.ndarray) -> str:
    told, how = f"{name} " if name else "", _SHOWN.get(column, ".4g")
    return f"{told}{y[-1]:{how}}" if len(y) == 1 else f"{told}{y[0]:{how}} at first, {y[-1]:{how}} at last"


def _figure(x_label: str, *, x_scale: Literal["linear", "log"] = "linear", height: int = 240) -> Figure:
    """An empty figure in the look of the page."""
    from bokeh.plotting import figure

    fig = figure(
        height=height, sizing_mode="stretch_width", tools="", toolbar_location=None,
        x_axis_type=x_scale, x_axis_label=x_label, background_fill_color=None, border_fill_color=None,
        outline_line_color=None, min_border_left=8, min_border_right=12, min_border_top=8, min_border_bottom=4,
    )  # fmt: skip
    fig.toolbar.logo = None
    for axis in fig.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.tags = ["axis_label_text_color=--muted", "major_label_text_color=--muted", "axis_line_color=--rule"]
    fig.yaxis.axis_line_color = None
    fig.yaxis[0].tags = ["major_label_text_color=--muted"]
    fig.xgrid.grid_line_color = None
    fig.ygrid[0].tags = ["grid_line_color=--rule"]
    return fig


def _draw_curve(fig: Figure, x: np.ndarray, y: np.ndarray, position: int, scale: Scale | None = None) -> bool:
    """Draws a run's line; says whether a moving average lies over a noisy one."""
    if not len(x):
        return False
    thin_x, thin_y = decimate(x, y)
    turns = np.count_nonzero(np.diff(np.sign(np.diff(y))))  # a schedule turns once or twice, noise at every other row
    noisy = bool(len(x) >= _SMOOTH_FROM and turns > len(x) / 10)
    if noisy:
        faint = fig.line(thin_x, thin_y, line_width=1, line_alpha=0.3)
        _colour(faint.glyph, position, "line_color")
        thin_x, thin_y = decimate(x, moving_average(y, max(3, len(y) // 40)))
    tooltips = [(str(fig.xaxis[0].axis_label), "@x{0,0.[00]}"), ("value", "@value{0.[0000]}")]
    data = {"x": thin_x, "y": thin_y if scale is None else scale.spaced(thin_y), "value": thin_y}
    _draw_line(fig, data, position, shape_of(position), tooltips, dots=len(x) <= _DOTS_TO)
    return noisy


def _draw_line(
    fig: Figure,
    data: Mapping[str, Sequence[object] | np.ndarray],
    position: int,
    shape: int,
    tooltips: list[tuple[str, str]],
    *,
    dots: bool = True,
    dash: str = "solid",
    width: float = 2.25,
) -> None:
    """Draws columns x and y of `data` as a line, whose hover tells `tooltips`; with a dot of a shape at each point."""
    from bokeh.models import ColumnDataSource, HoverTool

    source = ColumnDataSource(data)
    line = fig.line("x", "y", source=source, line_width=width, line_dash=dash, line_join="round", line_cap="round")
    _colour(line.glyph, position, "line_color")
    if dots:
        marks = fig.scatter("x", "y", source=source, size=7, marker=MARKERS[shape])
        _colour(marks.glyph, position, "line_color", "fill_color")
    fig.add_tools(HoverTool(renderers=[line], mode="vline", line_policy="nearest", tooltips=tooltips, visible=False))


def _draw_chance(fig: Figure, chance: float, lines: Sequence[np.ndarray]) -> None:
    from bokeh.models import Range1d
    from bokeh.models.annotations import Label, Span

    span = Span(location=chance, dimension="width", line_dash="dashed", line_width=1.5)
    span.tags = ["line_color=--bad"]
    note = Label(x=0, x_units="screen", x_offset=6, y=chance, y_offset=4, text=f"collapsed: {chance:.3g}")
    note.update(text_font_size="12px", text_font=_FONT, tags=["text_color=--bad"])
    fig.add_layout(span)
    fig.add_layout(note)
    # a Span does not take part in the automatic range, and it is the line everything is read against
    low, high = min(chance, *(y.min() for y in lines)), max(chance, *(y.max() for y in lines))
    room = 0.12 * (high - low or 1.0)
    fig.y_range = Range1d(low - room / 2, high + room)


def _colour(glyph: Model, position: int, *properties: str) -> None:
    """Has page.js set these properties to the palette's colour at `position`."""
    glyph.tags = [f"{name}=--c{position % NUM_COLOURS}" for name in properties]
