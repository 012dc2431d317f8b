"""What a user has is never lost: where runs go, what `--overwrite` replaces and when, what a recipe may say."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.core.owned import Former, our_files
from ssl_kit.data import module
from ssl_kit.encoders import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.training.checkpoint import Checkpoints
from ssl_kit.verbs.recipes import places_in, read_recipe

TINY = [
    *("--batch-size", "16", "--epochs", "1", "--method.encoder.args", "{channels: [8, 8, 8, 8]}"),
    *("--method.projection", "[16, 8]", "--image-size", "16"),
]


def pretrain(folder, run, *options):
    return cli.main(["pretrain", str(folder), "--run", str(run), *TINY, *options])


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def told(capsys):
    """The one line of a mistake."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ssl-kit: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def images(labelled_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "photos"
    for name in "ab":
        shutil.copytree(labelled_folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain(images, run) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A finished run in which a user has left things."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("notes.txt", "pictures/mine.png", "encoder/mine.txt", "checkpoints/mine/state.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return folder


def test_a_record_lists_every_file_of_a_run(finished):
    assert our_files(finished) == sorted(files(finished))
    assert "metrics.csv" in json.loads((finished / "run.json").read_text())["files"]


@pytest.mark.parametrize("options", [["--overwrite"], [], ["--resume"]])
@pytest.mark.parametrize("place", ["", "a", "new", "..", "../photos/"])
def test_no_run_goes_into_the_images_or_around_them(images, capsys, options, place):
    before = files(images.parent)
    assert pretrain(images, f"{images}/{place}", *options) == 2
    assert "images" in told(capsys) and files(images.parent) == before and not (images / "new").exists()


def test_the_working_folder_is_not_overwritten(run, images, capsys, monkeypatch):
    monkeypatch.chdir(run)
    before = files(run)
    assert pretrain(images, ".", "--overwrite") == 2
    assert "the working folder" in told(capsys) and files(run) == before


def test_a_folder_that_is_no_run_keeps_what_has_the_names_of_one(images, tmp_path, capsys):
    for name in ("checkpoints/state.json", "metrics.csv", "recipe.yaml"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text("mine")
        for options in ([], ["--overwrite"]):
            assert pretrain(images, tmp_path / "own", *options) == 2
            assert "no record of ssl_kit" in told(capsys)
    assert set(files(tmp_path / "own")) == {"checkpoints/state.json", "metrics.csv", "recipe.yaml"}


def test_what_is_not_ours_outlives_the_run_around_it(run, images, capsys):
    old = load_file(run / "encoder" / "model.safetensors")
    assert pretrain(images, run, "--overwrite", "--seed", "1") == 0
    assert "'checkpoints/mine/state.json', 'encoder/mine.txt', 'notes.txt' and 1 more are not ssl_kit's, kept" in (
        capsys.readouterr().out
    )
    kept = {name for name, text in files(run).items() if text == b"mine"}
    assert kept == {"notes.txt", "pictures/mine.png", "encoder/mine.txt", "checkpoints/mine/state.json"}
    new = load_file(run / "encoder" / "model.safetensors")
    assert any(not old[name].equal(new[name]) for name in old) and not (run / ".former").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--ema", "1.5"],
        ["--ema", "nan"],
        ["--seed", "-1"],
        ["--seed", "99999999999"],
        ["--max-bad", "7"],
        ["--evaluate-every", "nan"],
        ["--checkpoint-minutes", "-1"],
        ["--image-size", "0"],
        ["--method.encoder.name", "vit_tiny_patch16_224", "--image-size", "8", "--method.encoder.args", "{}"],
        ["--method.encoder.name", "vgg11", "--image-size", "8", "--method.encoder.args", "{}"],
        ["--method.encoder.args", "{channels: [8]}"],
        ["--method.projection", "[-1]"],
    ],
)
def test_a_mistake_is_found_before_anything_is_removed_or_trained(run, images, capsys, wrong):
    before = files(run)
    assert pretrain(images, run, "--overwrite", *wrong) == 2
    told(capsys)
    assert files(run) == before


def test_a_network_whose_weights_cannot_be_kept_is_not_trained(run, images, capsys, monkeypatch):
    def sparse(self, *arguments, **options):
        original(self, *arguments, **options)
        self.model.register_buffer("again", torch.eye(2).to_sparse())  # safetensors does not store that

    original = Encoder.__init__
    monkeypatch.setattr(Encoder, "__init__", sparse)
    before = files(run)
    assert pretrain(images, run, "--overwrite") == 2
    assert "could not be kept after training" in told(capsys) and files(run) == before


def test_an_encoder_that_comes_back_otherwise_is_not_trained(run, images, capsys, monkeypatch):
    load = Encoder.load.__func__
    monkeypatch.setattr(Encoder, "load", classmethod(lambda kind, folder: spoiled(load(kind, folder))))
    before = files(run)
    assert pretrain(images, run, "--overwrite") == 2
    assert "gives other features after it is saved and loaded" in told(capsys) and files(run) == before


def spoiled(encoder):
    encoder.mean += 1
    return encoder


def test_a_trial_moves_no_generator_and_is_not_made_of_a_run_that_goes_on(finished, images, tmp_path, monkeypatch):
    called = []
    loss = SimCLR.loss
    monkeypatch.setattr(SimCLR, "loss", lambda self, *given: called.append(len(given[1].index)) or loss(self, *given))
    assert pretrain(images, tmp_path / "again") == 0
    assert called[:2] == [2, 16]  # one size of views: one trial
    same = load_file(finished / "encoder" / "model.safetensors")
    again = load_file(tmp_path / "again" / "encoder" / "model.safetensors")
    assert all(same[name].equal(again[name]) for name in same)
    called.clear()
    assert pretrain(images, tmp_path / "again", "--resume", "--epochs", "2") == 0 and 2 not in called


def test_the_former_run_goes_when_the_new_one_could_be_resumed_and_not_sooner(run, images, monkeypatch):
    there = []
    save = Checkpoints.save

    def seen(self, *arguments, **options):
        there.append((run / ".former" / "run.json").exists())
        save(self, *arguments, **options)
        there.append((run / ".former").exists())

    monkeypatch.setattr(Checkpoints, "save", seen)
    assert pretrain(images, run, "--overwrite") == 0 and there == [True, False]


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_a_former_run_is_back_when_the_new_one_ends_too_soon(run, images, monkeypatch, how):
    before = files(run)

    def ends(self, *arguments, **options):
        assert not (run / "encoder" / "model.safetensors").exists() and (run / ".former" / "run.json").exists()
        with pytest.raises(UserError, match="in use"), lock(run):  # replacing a run does not let go of the folder
            pass
        raise how("now")

    monkeypatch.setattr(module.ImageData, "train_dataloader", ends)
    with pytest.raises(RuntimeError) if how is RuntimeError else nullcontext():
        assert pretrain(images, run, "--overwrite") == 130
    assert files(run) == before


def test_a_former_run_is_back_after_the_new_one_was_killed(run, images):
    before = files(run)
    words = ["pretrain", str(images), "--run", str(run), *TINY, "--overwrite"]
    code = (
        "import os\nfrom ssl_kit import cli\nfrom ssl_kit.data.module import ImageData\n"
        f"ImageData.train_dataloader = lambda self: os._exit(9)\ncli.main({words!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 9
    assert Former(run) and not (run / "encoder" / "model.safetensors").exists()
    assert pretrain(images, run) == 2  # the next one that comes puts it back, and is refused: it holds a run
    assert files(run) == before


def test_a_refused_sitting_leaves_the_record_of_a_finished_run(run, images, tmp_path, capsys):
    before = files(run)
    for wrong in ([], ["--resume", "--seed", "5"], ["--resume", "--overwrite"], ["--resume", "--limit", "20"]):
        assert pretrain(images, run, *wrong) == 2
    assert cli.main(["pretrain", str(tmp_path / "nowhere"), "--run", str(run), "--resume"]) == 2
    assert files(run) == before and json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_refusal_leaves_no_folder(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data, options in (("nowhere", []), (str(images), ["--seed", "-1"]), (str(images), ["--resume"])):
        assert cli.main(["pretrain", data, *TINY, *options]) == 2
    assert cli.main(["pretrain", str(images), *TINY, "--batch-size", "9999", "--run", "deep/er/run"]) == 2
    assert not list(tmp_path.iterdir())


PLACES = {
    **{"run": "x", "out": "x", "html": "x", "json": True, "resume": True, "overwrite": True, "allow": "os"},
    **{"wandb": True, "tensorboard": True, "csv": "x"},
    **{f"trainer.{key}": "x" for key in ("strategy", "default_root_dir", "logger", "callbacks", "profiler")},
    **{"trainer.devices": 2, "trainer.num_nodes": 2},
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("verb", ["pretrain", "views"])
def test_a_recipe_says_how_and_not_where(images, tmp_path, monkeypatch, capsys, name, verb):
    monkeypatch.chdir(tmp_path)
    key, _, inside = name.partition(".")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({key: {inside: PLACES[name]} if inside else PLACES[name]}))
    assert cli.main([verb, str(images), "-c", "r.yaml", *(TINY if verb == "pretrain" else [])]) == 2
    assert f"leave {name} out, give --{name.replace('_', '-')}" in told(capsys) and [*tmp_path.iterdir()] == [
        tmp_path / "r.yaml"
    ]


def test_the_recipe_of_a_run_says_nothing_of_where_and_that_of_an_older_one_is_still_read(run, images, tmp_path):
    assert cli.main(["pretrain", "-c", str(run / "recipe.yaml"), "--run", str(tmp_path / "a"), "--tensorboard"]) == 0
    recipe = read_recipe(str(tmp_path / "a" / "recipe.yaml"))
    assert not places_in(recipe) and not {"tensorboard", "wandb", "run"} & set(recipe)
    assert any(name.startswith("tensorboard/") for name in our_files(tmp_path / "a"))
    older = recipe | {"wandb": False, "tensorboard": False}
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(older))
    assert cli.main(["pretrain", "-c", str(tmp_path / "older.yaml"), "--run", str(tmp_path / "b")]) == 0
    (run / "recipe.yaml").write_text(yaml.safe_dump(older | {"tensorboard": True, "trainer": {"devices": 1}}))
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0


def test_of_epochs_and_minutes_what_is_named_last_counts(images, tmp_path):
    for name, recipe in (("epochs", {"epochs": 1}), ("minutes", {"minutes": 0.01})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    shared = [option for option in TINY if option not in ("--epochs", "1")]
    epochs, minutes = (["-c", str(tmp_path / f"{name}.yaml")] for name in ("epochs", "minutes"))
    for number, (options, wanted) in enumerate(
        (
            ([*epochs, "--minutes", "0.01"], "minutes"),
            ([*minutes, "--epochs", "1"], "epochs"),
            ([*epochs, *minutes], "minutes"),
        )
    ):
        run = tmp_path / f"{number}"
        assert cli.main(["pretrain", str(images), "--run", str(run), *shared, *options]) == 0
        assert {"epochs", "minutes"} & set(read_recipe(str(run / "recipe.yaml"))) == {wanted}
    assert pretrain(images, tmp_path / "both", "--minutes", "1") == 2


def test_embeddings_that_are_replaced_go_when_the_new_ones_are_complete(
    finished, images, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "emb"
    assert cli.main(["embed", str(finished), str(images), "--out", str(out)]) == 0
    assert cli.main(["index", str(out)]) == 0
    (out / "part-00007.parquet").write_text("mine")
    (out / "index.html").write_text("mine")
    before = files(out)
    for wrong in (["nowhere"], [str(images), "--layers", "99"], [str(images), "--batch-size", "0"]):
        assert cli.main(["embed", str(finished), *wrong, "--out", str(out), "--overwrite"]) == 2
        assert files(out) == before
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Encoder, "layers", lambda *given: None)
        assert cli.main(["embed", str(finished), str(images), "--out", str(out), "--overwrite"]) == 130
    assert files(out) == before
    assert cli.main(["embed", str(finished), str(images), "--out", str(out), "--overwrite", "--dtype", "float16"]) == 0
    kept = files(out)
    assert kept["part-00007.parquet"] == kept["index.html"] == b"mine" and not (out / ".former").exists()
    assert kept["part-00000.parquet"] != before["part-00000.parquet"] and "index.faiss" not in kept


def test_other_verbs_leave_what_is_not_theirs(finished, images, tmp_path, capsys):
    for name in ("page.html", "picture.png", "table.csv"):
        (tmp_path / name).write_text("mine")
    emb = tmp_path / "emb"
    assert cli.main(["embed", str(finished), str(images), "--out", str(emb)]) == 0
    first = next(path for path in images.rglob("*.png"))
    for line in (
        ["search", str(emb), str(first), "--html", str(tmp_path / "page.html")],
        ["duplicates", str(emb), "--threshold", "0.99", "--html", str(tmp_path / "page.html")],
        ["duplicates", str(emb), "--threshold", "0.99", "--csv", str(tmp_path / "table.csv")],
        ["views", str(images), "--out", str(tmp_path / "picture.png")],
        ["views", str(images), "--out", str(images / "views.png")],
        ["report", str(finished), "--out", str(tmp_path / "page.html")],
        ["export", str(finished), "--out", str(tmp_path), "--overwrite"],
        ["embed", str(finished), str(images), "--out", str(tmp_path), "--overwrite"],
        ["embed", str(finished), str(images), "--out", str(images / "emb")],
        ["evaluate", str(finished), str(images), "--out", str(images / "scores")],
    ):
        capsys.readouterr()
        assert cli.main(line) == 2, line
        told(capsys)
    assert all((tmp_path / name).read_text() == "mine" for name in ("page.html", "picture.png", "table.csv"))
    assert {path.suffix for path in images.rglob("*") if path.is_file()} == {".png"} and first.read_bytes()[
        :4
    ] == b"\x89PNG"
    assert not (images / "views.png").exists() and not (images / "emb").exists()


def test_scores_in_a_folder_of_their_own_have_a_record_there(finished, images, tmp_path, capsys):
    out = tmp_path / "scores"
    line = ["evaluate", str(finished), str(images), "--out", str(out), "--only", "knn", "--baselines", "pixels"]
    assert cli.main(line) == 0 and cli.main(line) == 0
    assert our_files(out) == sorted(files(out)) and "results.json" in files(out)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "report.html").write_text("mine")
    capsys.readouterr()
    assert cli.main([*line[:4], str(tmp_path / "own"), *line[5:]]) == 2
    assert "no record" in told(capsys) and (tmp_path / "own" / "report.html").read_text() == "mine"
