from __future__ import annotations

import pytest
from fabricated import record, scores

from ssl_kit.report.reading import Run
from ssl_kit.report.scores import Score, axis_of, full_size, score_tables
from ssl_kit.report.verdict import verdict


def run_of(tmp_path, results=(), name="run", **info) -> Run:
    return Run(tmp_path / name, info={"name": name, **info}, results=list(results))


def test_the_sentence_of_the_design(tmp_path):
    judged = verdict(run_of(tmp_path, scores()))
    assert judged.state == "learning"
    expected = "kNN 0.71 [0.70, 0.72], 0.33 above raw pixels and 0.35 above the same network untrained."
    assert judged.sentence == expected
    assert [row.is_encoder for row in judged.rows] == [True, False, False]


@pytest.mark.parametrize(
    ("encoder", "state"),
    [(0.401, "learning"), (0.399, "weak"), (0.38, "weak"), (0.361, "weak"), (0.359, "stuck"), (0.1, "stuck")],
)
def test_learning_needs_an_interval_clear_of_the_best_baseline(tmp_path, encoder, state):
    # half widths are 0.01 and the best baseline is 0.38: clear from 0.40 on, clearly worse below 0.36
    assert verdict(run_of(tmp_path, scores(encoder))).state == state


def test_a_paired_interval_decides_where_there_is_one(tmp_path):
    # separate intervals touch, but on the same images the encoder is better (or worse) by more than chance
    for low, high, state in ((0.001, 0.019, "learning"), (-0.001, 0.02, "weak"), (-0.02, -0.001, "stuck")):
        results = scores(0.39)
        results[0]["metrics"] |= {"above_best_baseline": 0.01, "above_best_baseline_low": low}
        results[0]["metrics"] |= {"above_best_baseline_high": high}
        assert verdict(run_of(tmp_path, results)).state == state


def test_a_better_pretrained_model_is_shown_and_does_not_say_that_nothing_was_learnt(tmp_path):
    results = [*scores(0.71), record("knn", "pretrained:resnet18", 0.9, k=1, temperature=None, chosen=True, dim=512)]
    results[0]["settings"] |= {"best_baseline": "pretrained:resnet18"}
    for name, gap in (("above_best_baseline", -0.19), ("above_pixels", 0.33), ("above_pretrained:resnet18", -0.19)):
        results[0]["metrics"] |= {name: gap, f"{name}_low": gap - 0.01, f"{name}_high": gap + 0.01}
    run = run_of(tmp_path, results)
    judged = verdict(run)
    assert judged.state == "learning"
    assert judged.sentence.endswith("same network untrained and 0.19 below pretrained resnet18.")
    assert [row.name for row in judged.rows][:2] == ["this encoder", "pretrained resnet18"]
    (table,) = score_tables([run])
    assert table.metrics == ["Top-1", "Above the best baseline"]
    assert [row.name for row in table.rows][:2] == ["this encoder", "pretrained resnet18"]
    del results[0]["metrics"]["above_pixels"]  # as before there were several: its own intervals decide
    assert verdict(run).state == "learning"


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("flat", "Flat."),
        ("kNN 0.2 at the start", "kNN 0.2 at the start."),
        ("Done!", "Done!"),
        (" a b ", "A b."),
        ("", ""),
    ],
)
def test_a_reason_becomes_a_sentence(tmp_path, reason, told):
    judged = verdict(run_of(tmp_path, verdict={"state": "stuck", "reason": reason}))
    assert judged.sentence == (told or "No score yet.")


def test_without_baselines_nothing_is_claimed(tmp_path):
    judged = verdict(run_of(tmp_path, scores()[:1]))
    assert (judged.state, judged.sentence) == ("unknown", "kNN 0.71 [0.70, 0.72].")


def test_a_collapse_seen_in_training_is_kept_unless_the_scores_refute_it(tmp_path):
    told = {"state": "collapsed", "reason": "rank 1.0"}
    judged = verdict(run_of(tmp_path, scores(0.1), verdict=told))
    assert (judged.state, judged.reason) == ("collapsed", "Rank 1.0.") and "below raw pixels" in judged.sentence
    assert verdict(run_of(tmp_path, scores(0.71), verdict=told)).state == "learning"


@pytest.mark.parametrize(
    ("info", "state", "word"),
    [
        ({"verdict": {"state": "stuck", "reason": "flat"}}, "stuck", "Stuck"),
        ({"status": "running"}, "running", "Training"),
        ({"status": "finished", "verdict": {"state": "nonsense"}}, "unknown", "Not judged yet"),
        ({"verdict": "odd"}, "unknown", "Not judged yet"),
        ({}, "unknown", "Not judged yet"),
    ],
)
def test_without_scores_run_json_speaks(tmp_path, info, state, word):
    judged = verdict(run_of(tmp_path, **info))
    assert (judged.state, judged.word) == (state, word) and judged.sentence


def test_knn_does_not_condemn_a_masked_autoencoder_and_fine_tuning_goes_first(tmp_path):
    assert verdict(run_of(tmp_path, scores(0.1), method="ssl_kit.methods.mae.MAE")).state == "unknown"
    tuned = [record("finetune", "encoder", 0.9), record("finetune", "random_init", 0.7)]
    judged = verdict(run_of(tmp_path, scores(0.1) + tuned, method="MAE"))
    assert judged.state == "learning" and judged.sentence.startswith("Fine-tuning 0.90")


def test_the_chosen_row_is_quoted_whatever_the_order(tmp_path):
    customary = record("knn", "encoder", 0.60, k=200, chosen=False, dim=64)
    for results in ([customary, *scores()], [*scores(), customary]):
        assert verdict(run_of(tmp_path, results)).sentence.startswith("kNN 0.71")


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
    assert table.setting.startswith("k and temperature chosen") and table.axis == (0.3, 0.8)
    (folded,) = table.others
    assert folded.summary == "k = 200, temperature = 0.07: encoder 0.600 [0.590, 0.610]"


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
