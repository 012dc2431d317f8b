"""The bokeh charts: curves over training, the map, and what score_charts.py draws with. Colours are names.

A model that has a colour carries it as a tag `property=--variable`; `page.js` sets it from the page's CSS variables
at load and whenever the theme changes, so that charts and text share one palette. The fallbacks set here are those of
the light theme. No toolbar on the curves and no scroll or pan tools: a finger must be able to scroll past them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from ssl_kit.report.reading import Run
from ssl_kit.report.untrusted import number

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

MAX_POINTS = 2_000  # per line
_SMOOTH_FROM = 150  # rows from which a moving average is drawn over the logged line
_DOTS_TO = 40  # rows up to which each is marked with a dot
NUM_COLOURS = 8  # --c0 ... --c7 of style.css: Okabe & Ito, darkened or lightened for contrast with the page
MARKERS = ("circle", "triangle", "square", "diamond", "inverted_triangle")  # colour is never the only sign
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_CURVES = (
    ("loss", "Loss"),
    ("knn_top1", "kNN top-1 while training"),
    ("crops_top1", "Crop to crop, top-1"),
    ("effective_rank", "Effective rank"),
    ("lr", "Learning rate"),
    ("alignment", "Alignment"),
    ("uniformity", "Uniformity"),
)
_CURVE_NOTES = {
    "loss": "Lower is better. A collapsed model stays at the dashed line.",
    "knn_top1": "On held-out labelled images the encoder never trained on.",
    "crops_top1": "How often a crop of an image finds another one of it first, among those of 512.",
    "effective_rank": "How many directions the features use; 1 means collapsed.",
    "lr": "As scheduled, after scaling with the batch.",
    "alignment": "Distance between two views of one image; lower is closer.",
    "uniformity": "How evenly the features fill the sphere; lower is more even.",
}


@dataclass(frozen=True)
class Chart:
    """`name` is the key of its div; `legend` holds (text, colour, shape). `caption` and `spoken`, which is for screen
    readers only, say in words what the lines begin and end with."""

    name: str
    title: str
    caption: str
    legend: list[tuple[str, int, int]]
    model: Any
    smoothed: bool = False
    spoken: str = ""


def embed(charts: Sequence[Chart], extra: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Bokeh's script (without its tag) and the div of each chart, by name."""
    from bokeh.embed import components

    models = {chart.name: chart.model for chart in charts} | extra
    if not models:
        return Markup(""), {}
    script, divs = components(models, wrap_script=False)
    return Markup(script), {name: Markup(div) for name, div in divs.items()}


def bokeh_js() -> Markup:
    """BokehJS as one inline script; only its core bundle (1.3 MB), which is all that these charts use."""
    from bokeh.resources import Resources

    return Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw))


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart per measured column of metrics.csv, the runs overlaid."""
    axis = _time_axis(runs)
    charts = []
    for column, title in _CURVES:
        lines = [(run, *_line(run, axis, column)) for run in runs]
        if not any(len(x) for _, x, _ in lines):
            continue
        fig = new_figure(axis)
        smoothed = [_draw_curve(fig, x, y, position) for position, (_, x, y) in enumerate(lines)]
        chances = [number(run.info.get("chance_loss")) for run in runs] if column == "loss" else []
        for chance in sorted({round(chance, 4) for chance in chances if chance is not None}):
            _draw_chance(fig, chance, [y for _, _, y in lines if len(y)])
        ends = "; ".join(_ends(run.name if len(runs) > 1 else "", y) for run, _, y in lines if len(y))
        legend = [(run.name, position, shape_of(position)) for position, run in enumerate(runs)]
        caption = f"{ends}. {_CURVE_NOTES[column]}"
        charts.append(Chart(f"curve-{column}", title, caption, legend if len(runs) > 1 else [], fig, any(smoothed)))
    return charts


def map_model(value: dict[str, Any]) -> Any:
    """The map: a scatter with the thumbnail in the tooltip; `page.js` pins what is clicked and dims classes."""
    from bokeh.models import ColumnDataSource, HoverTool, PanTool, ResetTool, TapTool, WheelZoomTool

    labels = np.array(value["labels"], dtype=np.int64)
    names = [value["classes"][label] if label >= 0 else "" for label in labels]
    data = {
        "x": value["x"],
        "y": value["y"],
        "thumb": value["images"],
        "label": labels.tolist(),
        "name": names,
        "index": value["indices"],
        "marker": [MARKERS[shape_of(int(label))] if label >= 0 else "circle" for label in labels],
        "color": ["#0072B2"] * len(labels),
        "alpha": [0.8] * len(labels),
    }
    source = ColumnDataSource(data, name="map")
    fig = new_figure("")
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
    """Index of `MARKERS` for the class or line at `position`: 40 pairs of colour and shape before one comes again."""
    return position % len(MARKERS)  # 5 shapes and 8 colours have no common factor


def decimate(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a line (N,), (N,): the lowest and the highest of each of limit / 2 stretches.

    A spike of one step survives, which taking every n-th row would lose.
    """
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(y), limit // 2 + 1).astype(np.int64)
    kept = [start + extreme for start, end in pairwise(edges) for extreme in _extremes(y[start:end])]
    order = np.unique(kept)
    return x[order], y[order]


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """(N,) centred means over `window` rows, over fewer at the ends: the line starts and ends where the data does."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    reach = window // 2
    start = np.clip(np.arange(len(y)) - reach, 0, None)
    end = np.clip(np.arange(len(y)) + reach + 1, None, len(y))
    return (sums[end] - sums[start]) / (end - start)


def _extremes(y: np.ndarray) -> list[int]:
    return sorted({int(y.argmin()), int(y.argmax())})


def _line(run: Run, axis: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The (N,) positions in time and values of a column, without the rows where either is missing."""
    none = np.zeros(0)
    x, y = _positions(run, axis), run.metrics.get(column)
    if x is None or y is None:
        return none, none
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _time_axis(runs: Sequence[Run]) -> str:
    # one axis for all runs: epochs where every run knows them, otherwise steps
    return "epoch" if all(_positions(run, "epoch") is not None for run in runs if run.metrics) else "step"


def _positions(run: Run, axis: str) -> np.ndarray | None:
    """(rows,) epochs or steps; whole epochs, the same for many rows, are made finer from the images seen."""
    if axis == "step":
        return run.metrics.get("step")
    epochs, seen, data = run.metrics.get("epoch"), run.metrics.get("images"), run.info.get("data")
    if epochs is not None and 2 * len(np.unique(epochs)) > len(epochs):
        return epochs
    per_epoch = number(data.get("images")) if isinstance(data, dict) else None
    return seen / per_epoch if seen is not None and per_epoch else None


def _ends(name: str, y: np.ndarray) -> str:
    told = f"{name} " if name else ""
    return f"{told}{y[-1]:.4g}" if len(y) == 1 else f"{told}{y[0]:.4g} at first, {y[-1]:.4g} at last"


def new_figure(x_label: str, *, x_scale: Literal["linear", "log"] = "linear", height: int = 240) -> Figure:
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


def _draw_curve(fig: Figure, x: np.ndarray, y: np.ndarray, position: int) -> bool:
    """Draws a run's line; says whether a moving average lies over a noisy one."""
    if not len(x):
        return False
    thin_x, thin_y = decimate(x, y)
    turns = np.count_nonzero(np.diff(np.sign(np.diff(y))))  # a schedule turns once or twice, noise at every other row
    noisy = bool(len(x) >= _SMOOTH_FROM and turns > len(x) / 10)
    if noisy:
        faint = fig.line(thin_x, thin_y, line_width=1, line_alpha=0.3)
        colour(faint.glyph, position, "line_color")
        thin_x, thin_y = decimate(x, moving_average(y, max(3, len(y) // 40)))
    tooltips = [(str(fig.xaxis[0].axis_label), "@x{0,0.[00]}"), ("value", "@y{0.[0000]}")]
    draw_line(fig, {"x": thin_x, "y": thin_y}, position, shape_of(position), tooltips, dots=len(x) <= _DOTS_TO)
    return noisy


def draw_line(
    fig: Figure,
    data: dict[str, Any],
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
    colour(line.glyph, position, "line_color")
    if dots:
        marks = fig.scatter("x", "y", source=source, size=7, marker=MARKERS[shape])
        colour(marks.glyph, position, "line_color", "fill_color")
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


def colour(glyph: Any, position: int, *properties: str) -> None:
    """Has page.js set these properties to the palette's colour at `position`."""
    glyph.tags = [f"{name}=--c{position % NUM_COLOURS}" for name in properties]
