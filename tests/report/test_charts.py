from __future__ import annotations

import numpy as np
import pytest
from bokeh.models.annotations import Span

from ssl_kit.report.charts import MARKERS, NUM_COLOURS, curve_charts, decimate, map_model, moving_average, shape_of
from ssl_kit.report.reading import Run


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
    assert chart.title == "Effective rank" and chart.caption.startswith("10 at first, 30 at last.")
    assert chart.model.renderers[0].data_source.data["x"].tolist() == [1, 3]


def test_only_noise_is_smoothed(tmp_path):
    step, rng = np.arange(400), np.random.default_rng(0)
    charts = curve_charts([run_of(tmp_path, step=step, loss=rng.normal(size=400), lr=np.sin(step / 127))])
    assert {chart.title: (chart.smoothed, len(chart.model.renderers)) for chart in charts} == {
        "Loss": (True, 2), "Learning rate": (False, 1),
    }  # fmt: skip


def test_colour_and_shape_together_tell_40_classes_apart():
    assert len({(label % NUM_COLOURS, shape_of(label)) for label in range(40)}) == 40 == NUM_COLOURS * len(MARKERS)


def test_the_map_shows_unlabelled_images_too():
    value = {"classes": ["cat"], "labels": [0, -1], "images": ["aa", "bb"], "indices": [5, 6], "x": [0, 1], "y": [2, 3]}
    source = map_model(value).renderers[0].data_source
    assert source.name == "map" and source.data["name"] == ["cat", ""]
    assert source.data["thumb"] == ["aa", "bb"] and source.data["index"] == [5, 6]
