from __future__ import annotations

import pytest
from fabricated import record, scores

from ssl_kit.methods.method import Method
from ssl_kit.report.head import LAMPS, duration, facts, labelled, next_step, verdict
from ssl_kit.report.read import Run
from ssl_kit.report.tables import score_tables
from ssl_kit.training.verdict import BELOW


def run_of(tmp_path, results=(), name="run", **info) -> Run:
    return Run(tmp_path / name, info={"name": name, **info}, results=list(results))


LEARNING = {"state": "learning", "reason": "kNN 0.7 against 0.2 at the start"}


def test_the_head_is_what_run_json_says_with_the_scores_as_facts_beside_it(tmp_path):
    head = verdict(run_of(tmp_path, scores(), verdict=LEARNING))
    assert (head.state, head.word, head.lamp, head.reason) == ("learning", "Learning", "learning", LEARNING["reason"])
    assert head.line == "learning - kNN 0.7 against 0.2 at the start"
    expected = "kNN 0.710 [0.700, 0.720], 0.330 above raw pixels and 0.350 above the same network untrained."
    assert head.scores == expected
    assert [row.is_encoder for row in head.rows] == [True, False, False]


@pytest.mark.parametrize("encoder", [0.71, 0.38, 0.1])
@pytest.mark.parametrize("state", [*LAMPS, "unknown"])
def test_no_score_makes_the_page_say_another_verdict(tmp_path, encoder, state):
    head = verdict(run_of(tmp_path, scores(encoder), verdict={"state": state, "reason": "so it is"}))
    assert (head.state, head.word.lower(), head.reason) == (state, state, "so it is") and head.scores


def test_every_verdict_that_training_gives_has_a_lamp(tmp_path):
    given = {"learning", BELOW, "stuck", "collapsed"}
    assert set(LAMPS) == given and len(set(LAMPS.values())) == len(given)


@pytest.mark.parametrize(
    ("encoder", "place"),
    [(0.401, "0.021 above raw pixels"), (0.399, "level with raw pixels"), (0.359, "0.021 below raw pixels")],
)
def test_a_distance_is_told_where_the_intervals_do_not_touch(tmp_path, encoder, place):
    # half widths are 0.01 and pixels have 0.38
    assert f", {place} and " in verdict(run_of(tmp_path, scores(encoder))).scores


def test_a_paired_interval_decides_where_there_is_one(tmp_path):
    # separate intervals touch, but on the same images the encoder is better (or worse) by more than chance
    for low, high, place in (
        (0.001, 0.019, "0.010 above"),
        (-0.001, 0.02, "level with"),
        (-0.02, -0.001, "0.010 below"),
    ):
        results = scores(0.37 if high < 0 else 0.39)
        results[0]["metrics"] |= {"above_pixels": 0.01, "above_pixels_low": low, "above_pixels_high": high}
        assert f", {place} raw pixels" in verdict(run_of(tmp_path, results)).scores


def test_a_better_pretrained_model_is_a_fact_like_the_others(tmp_path):
    results = [*scores(0.71), record("knn", "pretrained:resnet18", 0.9, k=1, temperature=None, chosen=True, dim=512)]
    results[0]["settings"] |= {"best_baseline": "pretrained:resnet18"}
    for name, gap in (("above_best_baseline", -0.19), ("above_pixels", 0.33), ("above_pretrained:resnet18", -0.19)):
        results[0]["metrics"] |= {name: gap, f"{name}_low": gap - 0.01, f"{name}_high": gap + 0.01}
    run = run_of(tmp_path, results)
    head = verdict(run)
    assert head.scores.endswith("same network untrained and 0.190 below pretrained resnet18.")
    assert [row.name for row in head.rows][:2] == ["this encoder", "pretrained resnet18"]
    (table,) = score_tables([run])
    assert table.metrics == ["Top-1", "Above the best baseline"]
    assert [row.name for row in table.rows][:2] == ["this encoder", "pretrained resnet18"]


@pytest.mark.parametrize(
    ("reason", "small"), [("flat", True), ("kNN 0.2 at the start", False), ("100 steps", False), ("", True)]
)
def test_a_reason_stands_word_for_word_with_a_capital_letter_where_it_needs_one(tmp_path, reason, small):
    head = verdict(run_of(tmp_path, verdict={"state": "stuck", "reason": reason}))
    assert head.reason == (reason or "no score yet: evaluate the encoder on labelled images")
    assert head.starts_small == small


def test_the_labelled_images_are_named_with_the_part_to_test_on(tmp_path):
    named = lambda root, classes=2: labelled(run_of(tmp_path, data={"root": str(root), "classes": classes}))
    for part in ("my sets/train", "my sets/test", "alone/train"):
        (tmp_path / part).mkdir(parents=True)
    assert named("mnist64:train") == "mnist64" and named("photos", 0) == "LABELLED"
    assert named(tmp_path / "my sets/train") == f"'{tmp_path / 'my sets'}'"
    assert named(tmp_path / "alone/train") == str(tmp_path / "alone/train")


def test_scores_without_baselines_claim_nothing(tmp_path):
    head = verdict(run_of(tmp_path, scores()[:1]))
    assert (head.state, head.scores) == ("unknown", "kNN 0.710 [0.700, 0.720].")


@pytest.mark.parametrize(
    ("info", "state", "word", "lamp"),
    [
        ({"verdict": {"state": "stuck", "reason": "flat"}}, "stuck", "Stuck", "stuck"),
        ({"verdict": {"state": BELOW, "reason": "x"}}, BELOW, "Learns, less than raw pixels know", "weak"),
        ({"status": "running"}, "unknown", "Training, unknown so far", "running"),
        ({"status": "starting"}, "unknown", "Starting, unknown so far", "running"),
        ({"status": "running", "verdict": LEARNING}, "learning", "Learning", "learning"),
        ({"status": "finished", "verdict": {"state": "nonsense"}}, "unknown", "Unknown", "unknown"),
        ({"verdict": "odd"}, "unknown", "Unknown", "unknown"),
        ({}, "unknown", "Unknown", "unknown"),
    ],
)
def test_without_scores_run_json_speaks(tmp_path, info, state, word, lamp):
    head = verdict(run_of(tmp_path, **info))
    assert (head.state, head.word, head.lamp) == (state, word, lamp) and head.reason and not head.scores


def test_knn_does_not_judge_a_masked_autoencoder_and_fine_tuning_goes_first(tmp_path):
    told = {"method": "ssl_kit.methods.mae.MAE", "judged_by": ["finetune", "unheard of", 3, "knn"]}
    head = verdict(run_of(tmp_path, scores(0.1), **told))
    assert head.scores.endswith("untrained. kNN does not judge MAE: fine-tuning does.")
    tuned = [record("finetune", "encoder", 0.9), record("finetune", "random_init", 0.7)]
    head = verdict(run_of(tmp_path, scores(0.1) + tuned, **told))
    assert head.scores == "Fine-tuning 0.900 [0.890, 0.910], 0.200 above the same network untrained."


@pytest.mark.parametrize("told", [None, [], "finetune", ["unheard of"], {"finetune": 1}])
def test_a_run_that_does_not_tell_what_judges_it_is_judged_as_most(tmp_path, told):
    assert run_of(tmp_path, method="MAE", judged_by=told).judged_by == Method.judged_by


def test_the_chosen_row_is_quoted_whatever_the_order(tmp_path):
    customary = record("knn", "encoder", 0.60, k=200, chosen=False, dim=64)
    for results in ([customary, *scores()], [*scores(), customary]):
        assert verdict(run_of(tmp_path, results)).scores.startswith("kNN 0.71")


@pytest.mark.parametrize(
    ("info", "results", "expected"),
    [
        ({"status": "interrupted"}, [], "ssl-kit pretrain DATA --run 'my run' --resume"),
        ({"status": "finished"}, [], "ssl-kit evaluate 'my run' LABELLED"),
        ({"status": "finished"}, scores(), "ssl-kit search 'my run' IMAGE.jpg --html neighbours.html"),
        ({"data": {"root": "a b", "classes": 3}}, [], "ssl-kit evaluate 'my run' 'a b'"),
        (
            {"data": {"classes": 0, "image": "a b/1.jpg"}},
            [],
            "ssl-kit search 'my run' 'a b/1.jpg' --html neighbours.html",
        ),
        ({"verdict": {"state": "collapsed"}}, [], "ssl-kit views DATA -c 'my run'/recipe.yaml --out views.png"),
    ],
)
def test_the_next_command_fits_the_state(tmp_path, info, results, expected):
    run = Run(tmp_path / "my run", info=info, results=results, recipe="seed: 0")
    run.folder = run.folder.relative_to(tmp_path)
    assert next_step(run, verdict(run)).command == expected


def test_facts_leave_out_what_is_not_known(tmp_path):
    assert facts(Run(tmp_path)) == []
    told = facts(
        Run(tmp_path, info={"waiting_share": 0.018, "data": {"root": "/a/b/c", "images": 50000, "skipped": 3}})
    )
    assert [(one.label, one.value, one.note) for one in told] == [
        ("data", "c", "in b"),
        ("images", "50,000", "3 skipped"),
        ("waiting for data", "2 %", "of the time"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (871.2, "14 min 31 s"), (11100, "3 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
