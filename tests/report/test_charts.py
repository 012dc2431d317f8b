from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from bokeh.models.annotations import Span
from fabricated import record

from ssl_kit.report import head
from ssl_kit.report.charts import (
    MARKERS,
    NUM_COLOURS,
    curve_charts,
    decimate,
    dimension_charts,
    few_shot_charts,
    map_model,
    moving_average,
    roc_chart,
    shape_of,
    single_values,
)
from ssl_kit.report.read import Roc, RocLine, Run


@pytest.mark.parametrize("count", [10, 2000, 2001, 12345])
def test_decimation_keeps_extremes_order_and_the_limit(count):
    rng = np.random.default_rng(count)
    x, y = np.arange(count, dtype=float), rng.normal(size=count)
    y[count // 3] = 50.0  # a spike of one step
    thin_x, thin_y = decimate(x, y)
    assert len(thin_x) == len(thin_y) <= 2000
    assert (np.diff(thin_x) > 0).all()
    assert thin_y.max() == 50.0 and thin_y.min() == y.min()
    assert np.array_equal(thin_y, y[thin_x.astype(int)])
    if count <= 2000:
        assert np.array_equal(thin_x, x)


def test_moving_average_is_a_mean_of_what_is_there():
    y = np.array([1.0, 2.0, 6.0, 3.0])
    assert np.allclose(moving_average(y, 3), [1.5, 3.0, 11 / 3, 4.5])


def run_of(tmp_path, **metrics) -> Run:
    columns = {name: np.asarray(values, dtype=float) for name, values in metrics.items()}
    return Run(tmp_path, info={"chance_loss": 6.2, "data": {"images": 100}}, metrics=columns)


def axis_and_ends(charts):
    (chart,) = charts
    x = chart.model.renderers[0].data_source.data["x"]
    return chart.model.xaxis[0].axis_label, x[0], x[-1]


def test_time_is_epochs_where_they_are_known_and_steps_otherwise(tmp_path):
    fine = run_of(tmp_path, step=[10, 20], epoch=[0.5, 1.0], loss=[5, 4])
    coarse = run_of(tmp_path, step=[1, 2, 3, 4], epoch=[0, 0, 0, 0], images=[20, 40, 60, 80], loss=[5, 4, 3, 2])
    none = run_of(tmp_path, step=[10, 20], loss=[5, 4])
    assert axis_and_ends(curve_charts([fine])) == ("epoch", 0.5, 1.0)
    assert axis_and_ends(curve_charts([coarse])) == ("epoch", 0.2, 0.8)
    assert axis_and_ends(curve_charts([none])) == ("step", 10, 20)
    assert axis_and_ends(curve_charts([fine, none])) == ("step", 10, 20)


def test_the_chance_level_is_drawn_and_in_sight(tmp_path):
    (chart,) = curve_charts([run_of(tmp_path, step=[1, 2], loss=[4.0, 3.0])])
    (span,) = [one for one in chart.model.center if isinstance(one, Span)]
    assert (span.location, span.line_dash) == (6.2, [6])
    assert chart.model.y_range.start < 3.0 and chart.model.y_range.end > 6.2


def test_empty_cells_are_left_out_and_empty_columns_have_no_chart(tmp_path):
    run = run_of(tmp_path, step=[1, 2, 3], effective_rank=[10, np.nan, 30], knn_top1=[np.nan] * 3)
    (chart,) = curve_charts([run])
    assert chart.title == "Effective rank while training"
    assert chart.caption.startswith("10.0 at first, 30.0 at last.")
    assert chart.model.renderers[0].data_source.data["x"].tolist() == [1, 3]


def test_only_noise_is_smoothed(tmp_path):
    step, rng = np.arange(400), np.random.default_rng(0)
    charts = curve_charts([run_of(tmp_path, step=step, loss=rng.normal(size=400), lr=np.sin(step / 127))])
    assert {chart.title: (chart.smoothed, len(chart.model.renderers)) for chart in charts} == {
        "Loss": (True, 2), "Learning rate": (False, 1),
    }  # fmt: skip


def test_colour_and_shape_together_tell_50_classes_apart():
    assert len({(label % NUM_COLOURS, shape_of(label)) for label in range(50)}) == 50 == NUM_COLOURS * len(MARKERS)


def lab(colour: str) -> tuple[np.ndarray, float]:
    """CIELAB of `#rrggbb`, and its luminance as WCAG 2.2 has it."""
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]), float(to_xyz[1] @ linear)


def test_ten_classes_have_ten_colours_that_are_told_apart_in_both_themes():
    css = (Path(head.__file__).parent / "style.css").read_text(encoding="utf-8")
    found = dict(re.findall(r"--(c\d|bg): light-dark\(([^)]+)\)", css))
    for theme in (0, 1):
        of = {name: lab(colours.split(", ")[theme]) for name, colours in found.items()}
        page = of.pop("bg")[1]
        assert len(of) == NUM_COLOURS == 10
        assert min(np.linalg.norm(one - two) for (one, _), (two, _) in combinations(of.values(), 2)) > 25
        for _, luminance in of.values():
            darker, lighter = sorted((page, luminance))
            assert (lighter + 0.05) / (darker + 0.05) > 3


def test_near_1_a_curve_is_spaced_by_its_odds_and_tells_its_values(tmp_path):
    (chart,) = curve_charts([run_of(tmp_path, step=[1, 2, 3], knn_top1=[0.3, 0.991, 0.996])])
    data = chart.model.renderers[0].data_source.data
    assert data["value"].tolist() == [0.3, 0.991, 0.996]
    height = (data["y"] - data["y"].min()) / np.ptp(data["y"])
    assert height[2] - height[1] > 0.1  # on an even axis they are 0.007 apart
    assert "0.99" in chart.model.yaxis[0].major_label_overrides.values()
    assert chart.caption.startswith("0.300 at first, 0.996 at last.")
    (even,) = curve_charts([run_of(tmp_path, step=[1, 2], knn_top1=[0.3, 0.6])])
    assert even.model.renderers[0].data_source.data["y"].tolist() == [0.3, 0.6]


def test_a_curve_of_one_point_is_a_value(tmp_path):
    run = run_of(tmp_path, step=[1, 2], loss=[5, 4], knn_top1=[np.nan, 0.25])
    assert [chart.title for chart in curve_charts([run])] == ["Loss"]
    assert single_values([run]) == [("kNN top-1 while training", "0.250")]


def test_the_map_shows_unlabelled_images_too():
    value = {"classes": ["cat"], "labels": [0, -1], "images": ["aa", "bb"], "indices": [5, 6], "x": [0, 1], "y": [2, 3]}
    source = map_model(value).renderers[0].data_source
    assert source.name == "map" and source.data["name"] == ["cat", ""]
    assert source.data["thumb"] == ["aa", "bb"] and source.data["index"] == [5, 6]


def few(features, *values):
    return [
        record("few_shot", features, value, protocol="probe", shots=10**place) for place, value in enumerate(values)
    ]


def test_the_same_features_have_the_same_colour_in_every_chart(tmp_path):
    names = ["pixels", "encoder", "pretrained:b", "pretrained:a", "random_init"]
    results = [one for name in names for one in few(name, 0.2, 0.3)]
    results += [record("linear", name, dim / 100, dim=dim, reduced_by="pca") for name in names for dim in (2, 4)]
    run = Run(tmp_path, results=results)
    (shots,), (dims,) = few_shot_charts(run), dimension_charts(run)
    colours = {name: place for name, place, _ in shots.legend}
    assert list(colours) == ["this encoder", "pretrained a", "pretrained b", "same network, untrained", "raw pixels"]
    assert len(set(colours.values())) == 5 and colours["this encoder"] == 0
    assert {name.removesuffix(", PCA"): place for name, place, _ in dims.legend} == colours
    assert len({(place, shape) for _, place, shape in shots.legend}) == 5


def test_ways_to_fewer_dimensions_differ_by_shape_and_dash(tmp_path):
    results = [record("linear", "encoder", dim / 100, dim=dim, reduced_by=way) for way in ("random", "pca", "cut")
               for dim in (2, 4)]  # fmt: skip
    (chart,) = dimension_charts(Run(tmp_path, results=results))
    assert [name for name, _, _ in chart.legend] == [
        "this encoder, cut", "this encoder, PCA", "this encoder, random projection",
    ]  # fmt: skip
    assert [(place, shape) for _, place, shape in chart.legend] == [(0, 0), (0, 1), (0, 2)]
    lines = [one.glyph for one in chart.model.renderers if one.glyph.__class__.__name__ == "Line"]
    assert [line.line_dash for line in lines] == [[], [6], [2, 4]]


def test_each_number_of_dimensions_says_what_it_costs_and_intervals_are_drawn(tmp_path):
    results = [record("linear", "encoder", dim / 1000, dim=dim) for dim in (8, 512)]
    (chart,) = dimension_charts(Run(tmp_path, results=results))
    assert chart.model.xaxis[0].major_label_overrides == {8: "8\n32 MB", 512: "512\n2.05 GB"}
    assert chart.spoken == "this encoder: 0.008 at 8, 0.512 at 512."
    bars = next(one for one in chart.model.renderers if one.glyph.__class__.__name__ == "Segment")
    assert list(bars.data_source.data["y0"]) == pytest.approx([-0.002, 0.502])
    assert few_shot_charts(Run(tmp_path)) == [] and dimension_charts(Run(tmp_path)) == []


def test_the_mean_curve_leads_and_the_lowest_classes_have_colours():
    lines = [RocLine(f"class {place}", 0.5 + place / 20, [0.0, 1.0]) for place in range(9)]
    chart = roc_chart(Roc([0.0, 1.0], RocLine("macro average", 0.7, [0.0, 1.0]), lines))
    assert [name for name, _, _ in chart.legend] == [
        "macro average, area 0.700", *(f"class {place}, area {0.5 + place / 20:.3f}" for place in range(4)),
    ]  # fmt: skip
    assert [place for _, place, _ in chart.legend] == [0, 1, 2, 3, 4] and "5 others" in chart.caption
    last = chart.model.renderers[-1].glyph
    assert (last.line_width, last.tags) == (3, ["line_color=--c0"])
