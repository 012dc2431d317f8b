from __future__ import annotations

import pytest
from fabricated import more_scores, record, scores

from ssl_kit.report.read import Run
from ssl_kit.report.scale import Scale
from ssl_kit.report.tables import (
    Score,
    axis_of,
    dimension_lines,
    feature_order,
    few_shot_grid,
    few_shot_lines,
    full_size,
    robustness_of,
    score_tables,
)


def run_of(tmp_path, results=(), name="run") -> Run:
    return Run(tmp_path / name, info={"name": name}, results=list(results))


def test_few_shot_lines_go_by_shots_with_the_encoder_first(tmp_path):
    lines = few_shot_lines(run_of(tmp_path, more_scores()))
    assert list(lines) == ["linear probe", "nearest class mean"]
    assert [line.features for line in lines["linear probe"]] == ["encoder", "random_init", "pixels"]
    points = lines["linear probe"][0].points
    assert list(points) == [1, 5, 50] and [one.value for one in points.values()] == [0.4, 0.45, 0.5]


def test_the_grid_holds_the_fractions_of_the_labels_too(tmp_path):
    grid = few_shot_grid(run_of(tmp_path, more_scores()))
    assert grid.columns == ["1 per class", "5 per class", "50 per class", "1 % of the labels"]
    assert [name for name, _ in grid.rows][:2] == [
        "this encoder, linear probe",
        "same network, untrained, linear probe",
    ]
    assert [one.value for one in grid.rows[0][1]] == [0.4, 0.45, 0.5, 0.55]
    assert few_shot_grid(run_of(tmp_path, scores())) is None


def test_one_size_is_no_curve(tmp_path):
    assert (
        few_shot_lines(run_of(tmp_path, [record("few_shot", "encoder", 0.5, protocol="linear probe", shots=5)])) == {}
    )


def test_of_two_test_sets_the_last_one_counts_and_of_equal_settings_the_last_record(tmp_path):
    old, new = more_scores(), more_scores()
    for one in old:
        one["made_by"] = one["made_by"] | {"test": "another"}
        one["settings"]["shots"] = 2
    new += [record("few_shot", "encoder", 0.99, protocol="linear probe", draws=5, dim=64, shots=5)]
    points = few_shot_lines(run_of(tmp_path, [*old, *new]))["linear probe"][0].points
    assert list(points) == [1, 5, 50] and points[5].value == 0.99


def test_every_way_to_fewer_dimensions_ends_at_all_of_them(tmp_path):
    drawn = dimension_lines(run_of(tmp_path, more_scores()))
    assert list(drawn) == ["knn", "linear"]
    lines = drawn["linear"]
    assert [(line.features, line.name, line.variant) for line in lines] == [
        ("encoder", "this encoder, PCA", 0),
        ("encoder", "this encoder, random projection", 1),
        ("pca", "PCA of pixels", 0),
    ]
    assert [list(line.points) for line in lines] == [[2, 8, 32, 64]] * 3
    assert all(line.points[64].value == 0.75 for line in lines[:2])
    assert list(drawn["knn"][0].points) == [2, 8, 32]  # all dimensions were not scored by kNN


def test_a_single_size_is_no_line_and_the_chosen_score_goes_before_a_customary_one(tmp_path):
    assert dimension_lines(run_of(tmp_path, scores())) == {}
    sizes = [record("knn", "encoder", 0.5, chosen=True, dim=8, reduced_by="pca"),
             record("knn", "encoder", 0.4, chosen=False, dim=8, reduced_by="pca"),
             record("knn", "encoder", 0.7, chosen=True, dim=64)]  # fmt: skip
    for results in (sizes, sizes[::-1]):
        points = dimension_lines(run_of(tmp_path, results))["knn"][0].points
        assert [(dim, one.value) for dim, one in points.items()] == [(8, 0.5), (64, 0.7)]


def test_odd_numbers_of_a_stranger_draw_nothing(tmp_path):
    odd = [record("knn", "encoder", 0.5, dim=dim) for dim in (10**300, -4, 0, "8", None, [2])]
    odd += [record("few_shot", "encoder", 0.5, protocol=[], shots=shots) for shots in (10**300, -1, "5", None)]
    run = run_of(tmp_path, odd)
    assert dimension_lines(run) == {} and few_shot_lines(run) == {}


def test_robustness_stands_beside_the_untrained_network(tmp_path):
    found = robustness_of(run_of(tmp_path, more_scores()))
    assert found.baseline == "same network, untrained"
    assert [(name, len(hits)) for name, hits in found.rows] == [
        ("None", 1), ("Noise", 3), ("JPEG", 3), ("Mean of all", 1),
    ]  # fmt: skip
    assert {(hit.ours.value, hit.other.value) for _, hits in found.rows for hit in hits} == {(0.6, 0.3)}
    pixels = record("robustness", "pixels", 0.5, k=20)
    assert robustness_of(run_of(tmp_path, [pixels, *more_scores()])).baseline == "same network, untrained"
    alone = robustness_of(run_of(tmp_path, [one for one in more_scores() if one["features"] != "random_init"]))
    assert alone.baseline == "" and alone.rows[0][1][0].other is None
    assert robustness_of(run_of(tmp_path, scores())) is None


def test_pretrained_models_follow_the_encoder():
    names = ["pixels", "pretrained:b", "unheard of", "encoder", "pca", "pretrained:a", "random_init"]
    assert sorted(names, key=feature_order) == [
        "encoder", "pretrained:a", "pretrained:b", "random_init", "pixels", "pca", "unheard of",
    ]  # fmt: skip


def test_full_size_takes_pca_at_the_encoders_dimension():
    results = [record("knn", features, 0.1, dim=dim) for features, dims in
               {"encoder": (8, 64), "random_init": (64,), "pca": (8, 64, 128), "pixels": (3072,)}.items()
               for dim in dims]  # fmt: skip
    kept = {(one["features"], one["settings"]["dim"]) for one in full_size(results)}
    assert kept == {("encoder", 64), ("random_init", 64), ("pca", 64), ("pixels", 3072)}


def test_a_table_puts_the_encoder_first_then_the_best_and_folds_other_settings(tmp_path):
    results = [*reversed(scores()), record("knn", "encoder", 0.6, k=200, temperature=0.07, chosen=False, dim=64)]
    (table,) = score_tables([run_of(tmp_path, results)])
    assert [row.name for row in table.rows] == ["this encoder", "raw pixels", "same network, untrained"]
    assert table.setting.startswith("k and temperature chosen") and table.axis == Scale(0.3, 0.8)
    (folded,) = table.others
    assert folded.summary == "k = 200, temperature = 0.07: encoder 0.600 [0.590, 0.610]"


@pytest.mark.parametrize(
    ("values", "low", "high", "odds"),
    [([0.32, 0.71], 0.3, 0.8, False), ([0.3, 0.991, 0.996], 0.25, 0.998, True), ([0.95, 1.0], 0.95, 0.9999, True),
     ([-0.1, 0.95], -0.1, 1.0, False), ([0.5, 0.5], 0.5, 0.6, False), ([1.0], 0.999, 0.9999, True),
     ([10.0, 57.7], 10.0, 57.7, False)],
)  # fmt: skip
def test_a_scale_holds_its_values_and_is_of_odds_near_1(values, low, high, odds):
    scale = Scale.of(values)
    assert (scale.low, scale.high, scale.odds) == (pytest.approx(low), pytest.approx(high, abs=0.1), odds)
    assert {scale.percent(scale.low), scale.percent(scale.high)} == {"0.00%", "100.00%"}
    assert {scale.low, scale.high} <= set(scale.ticks) and len(scale.ticks) <= 5
    assert all(0 <= float(scale.percent(one)[:-1]) <= 100 for one in values)


def test_near_1_half_as_many_mistakes_are_seen_beside_a_baseline_far_below():
    scale = Scale.of([0.3, 0.991, 0.996])
    assert float(scale.percent(0.996)[:-1]) - float(scale.percent(0.991)[:-1]) > 10
    assert Scale.of([]) is None


CROPS = {"images": 512, "of": "held-out images", "top1": {"encoder": [0.34, 0.3, 0.38], "pixels": [0.1, 0.07, 0.13]}}


def test_what_needs_no_label_is_a_table_too_and_damage_costs_it_alone(tmp_path):
    run = run_of(tmp_path, [])
    run.info["crops"] = CROPS
    (table,) = score_tables([run])
    assert table.title == "Crop to crop, on 512 held-out images" and [row.name for row in table.rows] == [
        "this encoder", "raw pixels",
    ]  # fmt: skip
    assert table.rows[0].scores[0].interval == "[0.300, 0.380]"
    for odd in ("x", {}, {"top1": 3}, {"top1": {}}, {"images": "x", "top1": {}}, {"top1": {"encoder": 3, "pca": None}}):
        run.info["crops"] = odd
        assert score_tables([run]) == []


def test_a_later_record_replaces_an_earlier_one(tmp_path):
    (table,) = score_tables([run_of(tmp_path, scores(0.5) + scores(0.7))])
    assert len(table.rows) == 3 and table.rows[0].scores[0].value == 0.7


def test_a_metric_missing_somewhere_is_none_and_bounds_are_no_metrics(tmp_path):
    health = record("health", "encoder", 0.5)
    health["metrics"] = {"effective_rank": 57.7, "alignment": float("nan"), "top1": True}
    other = record("health", "pixels", 0.5)
    (table,) = score_tables([run_of(tmp_path, [health, other])])
    assert table.metrics == ["Top-1", "Effective rank", "Alignment"]
    assert [one and one.text for one in table.rows[0].scores] == [None, "57.7", None]


def test_baselines_that_differ_between_runs_stay_apart(tmp_path):
    first = run_of(tmp_path, scores(), "a")
    second = run_of(tmp_path, [*scores()[:2], record("knn", "random_init", 0.2, chosen=True, dim=64)], "b")
    (table,) = score_tables([first, second])
    assert [row.name for row in table.rows] == [
        "a: encoder", "b: encoder", "raw pixels", "a: same network, untrained", "b: same network, untrained",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [(0.7126, "0.713"), (1.0, "1.000"), (-2.714, "-2.71"), (57.69, "57.7")])
def test_numbers_are_short(value, text):
    assert Score(value, None, None).text == text


def test_no_interval_no_plot():
    assert axis_of([]) is None
