"""The record of a run: its commit; and the verdict after an evaluation, when scores on test images change it."""

import json
import os
import re
import subprocess

import pytest
from PIL import Image
from stripes import pattern

from ssl_kit import cli
from ssl_kit.core.files import read_json
from ssl_kit.core.owned import Record
from ssl_kit.report.read import Run, read_run
from ssl_kit.training.verdict import BELOW, Verdict
from ssl_kit.verbs.record import _commit, final_verdict, settle

SHA = "ab" * 32


def evaluated(gaps, evaluation="knn", sha=SHA):
    """Records of the encoder (0.5) and of the features that it stands above by `gaps`, sure to 0.02."""
    made_by = {"encoder_sha256": sha, "train": "pets:train", "test": "pets:test"}
    metrics = {"top1": 0.5, "top1_low": 0.48, "top1_high": 0.52}
    for name, gap in gaps.items():
        metrics |= {f"above_{name}": gap, f"above_{name}_low": gap - 0.02, f"above_{name}_high": gap + 0.02}
    records = [{"evaluation": evaluation, "features": "encoder", "metrics": metrics}]
    for name, gap in gaps.items():
        records.append({"evaluation": evaluation, "features": name, "metrics": {"top1": 0.5 - gap}})
    return [record | {"settings": {}, "made_by": made_by} for record in records]


def info(state, **more):
    verdict = {"state": state, "reason": "as training said"}
    return {"verdict": verdict, "steps": 2_000, "epochs": 10.0, "encoder_sha256": SHA, "method": "SimCLR", **more}


def final(tmp_path, state, gaps, evaluation="knn", sha=SHA, **more):
    return final_verdict(Run(tmp_path, info=info(state, **more), results=evaluated(gaps, evaluation, sha)))


ABOVE = {"pixels": 0.1, "pca": 0.08, "random_init": 0.2}
LEVEL = {"pixels": 0.1, "pca": 0.01, "random_init": 0.2}
BELOW_PIXELS = {"pixels": -0.05, "pca": 0.1, "random_init": 0.2}
BELOW_PCA = {"pixels": 0.1, "pca": -0.05, "random_init": 0.2}
UNTRAINED = {"pixels": 0.1, "pca": 0.1, "random_init": -0.1}
NO_GAIN = {"pixels": 0.1, "pca": 0.1, "random_init": 0.01}


@pytest.mark.parametrize(
    ("told", "gaps", "state"),
    [
        ("learning", ABOVE, "learning"),
        ("learning", LEVEL, "learning"),
        ("learning", BELOW_PIXELS, BELOW),
        ("learning", BELOW_PCA, BELOW),
        ("learning", UNTRAINED, "unknown"),
        ("learning", NO_GAIN, "learning"),  # the scores leave it open
        (BELOW, ABOVE, "learning"),
        (BELOW, LEVEL, "learning"),
        (BELOW, BELOW_PCA, BELOW),
        (BELOW, NO_GAIN, BELOW),
        (BELOW, {"random_init": 0.2}, BELOW),
        ("unknown", ABOVE, "learning"),
        ("unknown", BELOW_PIXELS, BELOW),
        ("unknown", NO_GAIN, "unknown"),
        ("unknown", UNTRAINED, "unknown"),
        ("stuck", ABOVE, "learning"),
        ("collapsed", ABOVE, "learning"),
        ("stuck", LEVEL, "stuck"),
        ("collapsed", BELOW_PCA, "collapsed"),
        ("stuck", {"random_init": 0.2}, "stuck"),
        ("collapsed", NO_GAIN, "collapsed"),
    ],
)
def test_scores_change_what_they_are_sure_of(tmp_path, told, gaps, state):
    verdict = final(tmp_path, told, gaps)
    assert verdict.state == state
    assert (verdict.reason == "as training said") == (state == told)


def test_the_reason_is_that_of_the_scores(tmp_path):
    words = "kNN 0.500 on pets:test, below raw pixels (0.550), above the same network untrained (0.300), "
    words += "above PCA of the pixels (0.400)"
    assert final(tmp_path, "learning", BELOW_PIXELS) == Verdict(BELOW, words)
    assert "level with PCA of the pixels (0.490)" in final(tmp_path, "unknown", LEVEL).reason


@pytest.mark.parametrize(("steps", "epochs"), [(199, 10.0), (2_000, 0.99), (None, None)])
def test_a_training_that_was_too_short_is_not_called_learning_by_any_score(tmp_path, steps, epochs):
    for told in ("unknown", "stuck", "collapsed"):
        assert final(tmp_path, told, ABOVE, steps=steps, epochs=epochs).state == told
    assert final(tmp_path, "unknown", ABOVE, steps=200, epochs=1.0).state == "learning"


def test_knn_does_not_speak_against_a_method_that_is_fine_tuned(tmp_path):
    tuned = {"judged_by": ["finetune", "linear", "knn"]}
    assert final(tmp_path, "learning", BELOW_PIXELS, **tuned).state == "learning"
    assert final(tmp_path, "learning", BELOW_PIXELS, "linear", **tuned).state == BELOW
    assert final(tmp_path, "unknown", {"random_init": 0.2}, "finetune", **tuned).state == "learning"


def test_scores_of_an_earlier_encoder_change_nothing(tmp_path):
    assert final(tmp_path, "learning", BELOW_PIXELS, sha="cd" * 32).state == "learning"
    assert final(tmp_path, "learning", BELOW_PIXELS, sha=None).state == BELOW


def test_the_record_of_the_run_holds_the_verdict_that_all_read(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(info("learning", name="pets", versions={"ssl_kit": "0"})))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluated(BELOW_PCA)))
    before = read_json(tmp_path / "run.json")
    settle(Record(tmp_path))
    after = read_json(tmp_path / "run.json")
    assert after["verdict"] == final_verdict(read_run(tmp_path))._asdict() and after["verdict"]["state"] == BELOW
    assert {key: after[key] for key in before if key != "verdict"} == {
        key: before[key] for key in before if key != "verdict"
    }
    said = capsys.readouterr().out
    assert f"verdict: {BELOW} - {after['verdict']['reason']}; in training it was learning" in said
    settle(Record(tmp_path))  # once settled it stays
    assert read_json(tmp_path / "run.json") == after and capsys.readouterr().out == ""


def test_a_folder_of_scores_alone_gets_no_verdict(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluated(ABOVE)))
    settle(Record(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl"]


@pytest.fixture
def stripes(tmp_path):
    """800 images of 16 px in a folder each for four classes, 240 of them without folders."""
    for label, name in enumerate("abcd"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        (tmp_path / "bare").mkdir(exist_ok=True)
        for number in range(200):  # so many that the scores are sure of it, however the threads round
            image = Image.fromarray(pattern(label, number))
            image.save(tmp_path / "labelled" / name / f"{number:03d}.png")
            if number < 60:
                image.save(tmp_path / "bare" / f"{name}{number:03d}.png")
    return tmp_path


def test_terminal_record_report_and_card_say_the_same(stripes, capsys):
    """A SimCLR whose crops find each other; its mirrored views hide what the classes differ in, so pixels know more."""
    run, labelled = stripes / "run", stripes / "labelled"
    tiny = ["--batch-size", "16", "--method.encoder.args", "{channels: [8, 8, 8, 8]}", "--threads", "1"]
    tiny += ["--method.projection", "[32, 16]", "--method.optim.lr", "0.2", "--epochs", "14"]
    assert cli.main(["pretrain", str(stripes / "bare"), "--run", str(run), *tiny]) == 0
    assert_told_alike(run, re.findall("^verdict: (.*)$", capsys.readouterr().out, re.MULTILINE), "learning", capsys)
    assert cli.main(["evaluate", str(run), str(labelled), "--only", "knn"]) == 0
    changed = re.findall("^verdict: (.*); in training it was learning$", capsys.readouterr().out, re.MULTILINE)
    assert_told_alike(run, changed, BELOW, capsys)
    assert cli.main(["export", str(run), "--out", str(stripes / "model"), "--images", str(labelled)]) == 0
    assert f"| verdict | {changed[0]} |" in (stripes / "model" / "README.md").read_text(encoding="utf-8")


def assert_told_alike(run, lines, state, capsys):
    """The terminal's line is that of run.json, of `report` and of its page."""
    verdict = read_json(run / "run.json")["verdict"]
    assert verdict["state"] == state
    line = f"{verdict['state']} - {verdict['reason']}"
    assert lines == [line]
    assert cli.main(["report", str(run)]) == 0
    assert f"run: {line}\n" in capsys.readouterr().out
    head = (run / "report.html").read_text(encoding="utf-8").split('<section class="hero"')[1].split("</section>")[0]
    assert f'<span class="word">{state.capitalize()}</span>' in head and verdict["reason"] in head
    assert cli.main(["report", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runs"]
    assert (row["state"], row["verdict"]) == (state, line)


def test_the_commit_of_a_checkout_is_read_and_nothing_in_it_is_written(tmp_path, monkeypatch):
    """`git describe --dirty` would write the index anew where a file was touched."""
    git = lambda *words: (
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout
    )
    (tmp_path / "ssl_kit").mkdir()
    file = tmp_path / "ssl_kit" / "__init__.py"
    file.write_text("one\n")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    monkeypatch.setattr("ssl_kit.__file__", str(file))
    os.utime(file, (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    commit = _commit()
    assert commit == git("rev-parse", "--short=12", "HEAD").strip()
    file.write_text("two\n")
    assert _commit() == f"{commit}-dirty"
    assert (tmp_path / ".git" / "index").read_bytes() == before
