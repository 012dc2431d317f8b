from __future__ import annotations

import numpy as np
from fabricated import more_scores, record, scores

from ssl_kit.report.details import confusion_grid, recalls
from ssl_kit.report.reading import Run
from ssl_kit.report.reading_details import ClassRow, Confusion
from ssl_kit.report.scores import feature_order
from ssl_kit.report.series import dimension_lines, few_shot_grid, few_shot_lines, robustness_of


def run_of(tmp_path, results=(), **info) -> Run:
    return Run(tmp_path / "run", info={"name": "run", **info}, results=list(results))


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
    assert [name for name, _ in found.rows] == ["Noise", "JPEG"]
    assert (found.clean.ours.value, found.clean.other.value, found.every.ours.value) == (0.6, 0.3, 0.6)
    assert [(hit.ours.value, hit.other.value) for hit in found.rows[0][1]] == [(0.6, 0.3)] * 3
    pixels = record("robustness", "pixels", 0.5, k=20)
    assert robustness_of(run_of(tmp_path, [pixels, *more_scores()])).baseline == "same network, untrained"
    alone = robustness_of(run_of(tmp_path, [one for one in more_scores() if one["features"] != "random_init"]))
    assert alone.baseline == "" and alone.clean.other is None
    assert robustness_of(run_of(tmp_path, scores())) is None


def test_pretrained_models_follow_the_encoder():
    names = ["pixels", "pretrained:b", "unheard of", "encoder", "pca", "pretrained:a", "random_init"]
    assert sorted(names, key=feature_order) == [
        "encoder", "pretrained:a", "pretrained:b", "random_init", "pixels", "pca", "unheard of",
    ]  # fmt: skip


def test_confusions_are_shares_of_their_row_and_named_by_count():
    grid = confusion_grid(Confusion(["a", "b", "c"], np.array([[8, 2, 0], [0, 300, 1], [0, 0, 0]])))
    assert [[cell["text"] for cell in row["cells"]] for row in grid["rows"]] == [
        ["80", "20", ""], ["", "100", "<1"], ["", "", ""],
    ]  # fmt: skip
    assert grid["rows"][0]["cells"][1]["told"] == "2 of 10" and grid["rows"][1]["cells"][1]["right"]
    assert (grid["right"], grid["total"], grid["others"]) == (308, 311, 0)
    assert [(pair["label"], pair["predicted"], pair["count"]) for pair in grid["pairs"]] == [
        ("a", "b", 2),
        ("b", "c", 1),
    ]


def test_of_many_classes_the_worst_are_shown_and_the_rest_is_a_column():
    size = 50
    counts = np.diag(np.full(size, 100))
    counts[3, 3], counts[3, 45], counts[7, 7], counts[7, 3] = 40, 60, 70, 30
    counts[20] = 0  # a class without images is not among the worst
    grid = confusion_grid(Confusion([f"class {row}" for row in range(size)], counts))
    assert len(grid["names"]) == 40 and grid["others"] == 10 and "class 20" not in grid["names"]
    assert {"class 3", "class 7"} <= set(grid["names"]) and "class 45" not in grid["names"]
    row = next(row for row in grid["rows"] if row["name"] == "class 3")
    assert len(row["cells"]) == 41 and row["cells"][-1]["text"] == "60" and row["cells"][-1]["told"] == "60 of 100"


def test_recalls_begin_with_the_lowest():
    row = lambda name, recall, images=10: ClassRow(name, images, recall, 0.0, 1.0, float("nan"), "")
    found = recalls([row("a", 0.9), row("b", 0.2), row("none", float("nan"), 0), row("c", 0.5)])
    assert [one["row"].name for one in found["rows"]] == ["b", "c", "a"] and found["count"] == 3
    assert found["rows"][0]["precision"] == "never predicted"
    assert len(recalls([row(str(place), place / 100) for place in range(90)])["rows"]) == 40
