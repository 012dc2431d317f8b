"""Every verb at the command line: one JSON document, quiet when asked, and Ctrl-C says what is kept."""

import json
import os
import shlex
import signal
import threading
import time

import pytest

from ssl_kit import cli
from ssl_kit.verbs import early, manual
from ssl_kit.verbs.monitor import kept

SMALL = ["--method.encoder.args={channels: [8, 8, 8, 8]}", "--batch_size=16", "--trainer.max_steps=2"]


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    monkeypatch.setattr("ssl_kit.verbs.finetune._FEWEST_STEPS", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory, labelled_folder):
    """A folder with a run, its embeddings and their index."""
    folder = tmp_path_factory.mktemp("terminal")
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(folder / "run"), *SMALL]) == 0
    assert cli.main(["embed", str(folder / "run"), str(labelled_folder), "--out", str(folder / "emb")]) == 0
    assert cli.main(["index", str(folder / "emb")]) == 0
    return folder


def command_lines(place, images, out):
    """verb -> its words; every verb is here, or `test_every_verb_is_here` fails."""
    run, emb = str(place / "run"), str(place / "emb")
    return {
        "views": [str(images), "--out", str(out / "v.png"), "--count", "2"],
        "pretrain": [str(images), "--run", str(out / "run"), *SMALL],
        "evaluate": [run, str(images), "--out", str(out / "scores"), "--only", "knn,health"],
        "report": [run, "--out", str(out / "report.html")],
        "finetune": [run, str(images), "--out", str(out / "tuned"), "--epochs", "1", "--batch_size", "16"],
        "embed": [run, str(images), "--out", str(out / "emb")],
        "index": [emb],
        "search": [emb, str(images / "a" / "003.png"), "-k", "3", "--html", str(out / "found.html")],
        "duplicates": [emb, "--csv", str(out / "d.csv")],
        "drift": [emb, emb, "--csv", str(out / "drift.csv")],
        "export": [run, "--out", str(out / "model"), "--images", str(images)],
        "pack": [str(images), str(out / "packed")],
        "plan": [str(images), *SMALL[:2], "--images", "1e6"],
        "recipes": [],
        "doctor": ["--seconds", "0"],
    }


def test_every_verb_is_here(place, labelled_folder, tmp_path):
    assert list(command_lines(place, labelled_folder, tmp_path)) == manual.verbs()


def test_three_lines_come_before_the_bar_and_the_rest_is_asked_for(labelled_folder, tmp_path, capfd):
    words = ["pretrain", str(labelled_folder), *SMALL, "--run", str(tmp_path / "run")]
    assert cli.main(words) == 0
    few = capfd.readouterr().out.splitlines()
    assert few[0] == f"pretrain {labelled_folder} -> {tmp_path / 'run'}; report: {tmp_path / 'run' / 'report.html'}"
    assert few[1].startswith(f"{labelled_folder}: ") and "classes" in few[1]
    assert few[2].startswith("SimCLR trains resnet18_small") and "16 images a step" in few[2]
    assert few[3].startswith("epoch 0") and few[-1].startswith("next: ")
    assert cli.main([*words, "--overwrite", "--verbose"]) == 0
    many = capfd.readouterr().out
    assert all(f"\n{name}: " in many for name in ("device", "precision", "memory format", "tf32", "optimiser"))
    assert set(few[:3]) <= set(many.splitlines())


def test_evaluate_ends_in_a_sentence(place, labelled_folder, tmp_path, capfd):
    out = tmp_path / "scores"
    assert (
        cli.main(["evaluate", str(place / "run"), str(labelled_folder), "--out", str(out), "--only", "knn,linear"]) == 0
    )
    said = capfd.readouterr().out.splitlines()
    assert said[-1].startswith("next: ") and said[-2].endswith(f"; report: {out / 'report.html'}")
    assert said[-2].startswith("by kNN ") and "; by linear probe " in said[-2]


@pytest.mark.parametrize("verb", manual.verbs())
def test_json_is_one_document_and_quiet_leaves_stderr_empty(verb, place, labelled_folder, tmp_path, capfd):
    words = command_lines(place, labelled_folder, tmp_path)[verb]
    assert cli.main([verb, *words, "--json", "--quiet"]) == 0
    printed = capfd.readouterr()
    assert isinstance(json.loads(printed.out), dict) and printed.out.count("\n") == 1
    assert printed.err == ""


@pytest.mark.parametrize("verb", manual.verbs())
def test_quiet_prints_the_result_and_no_next_command(verb, place, labelled_folder, tmp_path, capfd):
    words = command_lines(place, labelled_folder, tmp_path)[verb]
    assert cli.main([verb, *words, "--quiet"]) == 0
    printed = capfd.readouterr()
    assert printed.out.strip() and "next:" not in printed.out and printed.err == ""
    assert "\x1b" not in printed.out and "┃" not in printed.out and "│" not in printed.out


@pytest.mark.parametrize("verb", ["views", "embed", "index", "evaluate", "recipes", "doctor"])
def test_the_next_command_can_be_typed_as_it_stands(verb, place, labelled_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, *command_lines(place, labelled_folder, tmp_path)[verb]]) == 0
    program, again, *words = shlex.split(capfd.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert program == "ssl-kit" and early.look(again, words) and not any(word.isupper() for word in words)


def test_numbers_that_json_lacks_are_null(capsys, monkeypatch):
    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", lambda **_: {"a": [float("nan"), 1.5], "b": float("inf")})
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None}


def test_a_library_that_prints_does_not_spoil_the_document(capsys, monkeypatch):
    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", lambda **_: print("noise") or {"a": "ä\udcff"})
    assert cli.main(["doctor", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"a": "ä\udcff"} and printed.err == "doctor\nnoise\n"


# verb -> where Ctrl-C comes, what is then said
INTERRUPTED = {
    "pretrain": ("ssl_kit.verbs.pretrain.channel_statistics", "nothing was trained yet"),
    "evaluate": ("ssl_kit.verbs.evaluate.compared", "features made so far are kept in "),
    "finetune": ("ssl_kit.verbs.finetune.probabilities", " are kept; go on with --resume"),
    "embed": ("ssl_kit.embeddings.store._complete", "1 finished parts are kept; the same command goes on"),
    "index": ("ssl_kit.verbs.index.build_index", " are kept; the same command makes their index"),
    "search": ("ssl_kit.verbs.search._answers", "nothing was written"),
    "duplicates": ("ssl_kit.verbs.duplicates._neighbours", "nothing was written"),
    "drift": ("ssl_kit.verbs.drift.shift", "nothing was written"),
    "pack": ("ssl_kit.verbs.pack._Packing._complete", "finished shards are kept; the same command goes on"),
    "plan": ("ssl_kit.verbs.plan._kept", "nothing was written"),
    "report": ("ssl_kit.report.page.write_report", "nothing was written"),
    "export": ("ssl_kit.verbs.export._compared", "nothing was written"),
    "views": ("ssl_kit.verbs.views._grid", "nothing was written"),
    "recipes": ("ssl_kit.verbs.recipes.about", "nothing was written"),
    "doctor": ("ssl_kit.verbs.doctor._chosen", "nothing was written"),
}


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_an_interrupt_says_what_is_kept_and_it_is(verb, place, labelled_folder, tmp_path, capsys, monkeypatch):
    where, said = INTERRUPTED[verb]
    words = command_lines(place, labelled_folder, tmp_path)[verb]
    with monkeypatch.context() as patch:
        patch.setattr(where, stop)
        assert cli.main([verb, *words]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ssl-kit: interrupted; ") and said in line
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    if said == "nothing was written":
        assert not {path for path in left if path.name != ".lock"}
    if verb == "evaluate":
        assert any("features" in path.parts for path in left) and not any("results" in path.name for path in left)
    again = ["--resume"] if said.endswith("--resume") else []
    assert cli.main([verb, *words, *again]) == 0  # and the same command goes on


def test_the_newest_step_is_the_one_that_is_kept(tmp_path):
    assert kept(tmp_path) == "nothing was trained yet"
    (tmp_path / "run.json").write_text("{}")
    assert kept(tmp_path) == f"nothing was trained yet; go on with: ssl-kit pretrain --run {tmp_path} --resume"
    for step in (90, 1200):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert kept(tmp_path).startswith("step 1,200 is kept; ")


def test_ctrl_c_while_training_keeps_the_step(labelled_folder, tmp_path, capsys):
    run = tmp_path / "run"

    def press():
        deadline = time.monotonic() + 60
        while not (run / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    options = [*SMALL[:2], "--trainer.max_steps=5000", "--quiet"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", str(labelled_folder), "--run", str(run), *options])
    thread.join()
    assert stopped.value.code == 128 + signal.SIGINT
    said = capsys.readouterr().out
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert f"stopped; step {int(steps[-1][5:]):,} is kept; go on with: ssl-kit pretrain --run {run} --resume" in said


def test_ctrl_c_while_fine_tuning_keeps_the_step(place, labelled_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "ssl_kit.evaluation.finetune.BestEpoch.on_train_batch_end", lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune", *command_lines(place, labelled_folder, tmp_path)["finetune"], "--quiet"])
    assert stopped.value.code == 128 + signal.SIGINT
    assert "stopped at step 1 of encoder; go on with --resume" in capsys.readouterr().out
    assert list((tmp_path / "tuned" / "finetuning" / "encoder").glob("step-*1"))
