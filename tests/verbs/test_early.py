"""Mistakes that need no library to be seen: told without one, in the words of the verbs, by the first of several."""

import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from every_method import methods
from pytorch_lightning import Trainer

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.named import default_run
from ssl_kit.core.options import Class, parts
from ssl_kit.evaluation.catalog import ONLY
from ssl_kit.training.optim import Optim
from ssl_kit.verbs import early
from ssl_kit.verbs.recipes import packaged
from ssl_kit.views.recipe import ViewRecipe

HEAVY = ("torch", "numpy", "timm", "pytorch_lightning", "faiss", "jsonargparse", "pyarrow")
ALONE = f"""
import sys, time
began = time.perf_counter()
from ssl_kit import cli
code = cli.main(sys.argv[1:])
heavy = [name for name in {HEAVY} if name in sys.modules]
print(code, *heavy)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, labelled_folder):
    """A folder with images, a run that has ended, what looks like its encoder, and one that was killed."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "images").symlink_to(labelled_folder)
    for name in ("run", "killed"):
        (folder / name).mkdir()
        record = {"format": "ssl_kit run 1", "files": ["recipe.yaml", "run.json"]}
        (folder / name / "run.json").write_text(json.dumps(record))
        (folder / name / "recipe.yaml").write_text("data: images\n")
    (folder / "run" / "encoder").mkdir()
    (folder / "run" / "encoder" / "encoder.json").write_text("{}")
    (folder / "table.txt").write_text("path\n")
    mistyped = "method: {class_path: ssl_kit.methods.simclr.SimCLR, init_args: {optim: {wieght_decay: 0.1}}}\n"
    (folder / "mistyped.yaml").write_text(mistyped)
    return folder


MISTAKES = {
    "pretrain nowhere": "no such folder or file: nowhere",
    "pretrain imags": "did you mean",
    "pretrain table.txt": "table.txt is a file; wanted a folder",
    "pretrain ftp://host/x.tar": "wanted a folder, or shards at s3://",
    "pretrain shards-{0..9}.tar": "10 of 10 files are not there",
    "pretrain digits:half": "a built-in set has the parts train and test",
    "pretrain": "no DATA was given: name a folder",
    "pretrain digits --run run": "run holds a run already; go on with --resume",
    "pretrain digits --run run --resume --overwrite": "got --resume and --overwrite",
    "pretrain digits --run none --resume": "--resume: none holds no run",
    "pretrain digits --run images": "images is a link",
    "pretrain digits --epoch 3": "no option is called --epoch; did you mean --epochs?",
    "pretrain digits --batch_sise 3": "did you mean --batch-size?",
    "pretrain digits --epochs many": "--epochs: wanted a number, got 'many'",
    "pretrain digits --epochs 0": "--epochs 0.0: wanted a number in (0, inf)",
    "pretrain digits --seed 1.5": "--seed: wanted a whole number, got '1.5'",
    "pretrain digits --when-full maybe": "--when-full: wanted continue or stop, got 'maybe'",
    "pretrain digits --precision bf16": "--precision: wanted one of auto, float32, bfloat16, float16, got 'bf16'",
    "pretrain digits --image-size large": "--image-size: wanted a whole number or a list",
    "pretrain digits --resume=maybe": "--resume: wanted true or false, got 'maybe'",
    "pretrain digits --epochs": "--epochs: a value is missing",
    "pretrain digits --epochs --quiet": "--epochs: a value is missing",
    "pretrain digits --init nowhere": "nowhere is not on this disk; wanted timm:NAME",
    "pretrain digits --trainer.max-epochs 3": "--trainer.max-epochs has no meaning here: use --epochs",
    "pretrain digits --trainer.max-stepz 3": "did you mean --trainer.max-steps?",
    "pretrain digits --method.init_args.temperatur 1": "did you mean --method.init-args.temperature?",
    "pretrain digits --method.optim.lrr 1": "no option is called --method.optim.lrr; did you mean --method.optim.lr?",
    "pretrain digits --method.encoder.init_args.nme x": "did you mean --method.encoder.init-args.name?",
    "pretrain digits --method.temperature high": "--method.temperature: wanted a number, got 'high'",
    "pretrain digits -c mae --method.temperature 1": "no option is called --method.temperature; did you mean",
    "pretrain digits --method ssl_kit.methods.simclr.SimCRL": "did you mean ssl_kit.methods.simclr.SimCLR?",
    "pretrain digits --views.strenght 0.5": "no option is called --views.strenght; did you mean --views.strength?",
    "pretrain digits --views.preset simcrl": "--views.preset: wanted one of simclr, byol, dino,",
    "pretrain digits -c mistyped.yaml": "no setting is called 'method.init_args.optim.wieght_decay'; did you mean",
    "views digits --views.hue red": "--views.hue: wanted a number, got 'red'",
    "views digits --init nowhere": "nowhere is not on this disk; wanted timm:NAME",
    "pretrain digits --reader mine": "--reader 'mine': wanted module:function",
    "pretrain digits --reader mine:read": "if you trust mine, add --allow mine",
    "pretrain digits --encoder resnet18": "--encoder 'resnet18': wanted module:function",
    "evaluate nowhere digits": "nowhere does not exist; give a run folder, an encoder folder, or photos32",
    "evaluate killed digits": "killed is a run without an encoder yet",
    "evaluate run nowhere": "no such folder or file: nowhere",
    "evaluate run": "no LABELLED was given: ssl-kit evaluate ENCODER LABELLED",
    "evaluate run digits --baseline nowhere": "nowhere is not on this disk",
    "evaluate run digits --only knn,linaer": "--only linaer: did you mean linear? wanted some of knn, linear,",
    "evaluate run digits --baselines pixel": "--baselines pixel: did you mean pixels? wanted some of pixels, pca,",
    "finetune run digits --views.scael [0.3,1]": "did you mean --views.scale?",
    "evaluate run digits --out table.txt": "table.txt is a file: name a folder",
    "evaluate run digits --onyl knn": "did you mean --only?",
    "finetune nowhere digits": "nowhere does not exist",
    "finetune run digits --lr fast": "--lr: wanted a number, got 'fast'",
    "embed run digits": "no --out was given: ssl-kit embed ENCODER DATA --out OUT",
    "embed run nowhere --out e": "no such folder or file",
    "embed run digits --out run": "run exists: choose another --out",
    "export run --out run": "run exists: choose another --out",
    "export nowhere --out e": "nowhere does not exist",
    "export run --out e --images nowhere": "no such folder or file: nowhere",
    "index run": "run is a run or an encoder, no embeddings: embed first",
    "search nowhere digits": "nowhere is no folder: give an embeddings folder",
    "search nowhere": "no IMAGES was given",
    "duplicates nowhere": "nowhere is no folder",
    "report nowhere": "nowhere is not a folder: expected the run folder",
    "report run --out images": "--out images is a folder",
    "views nowhere": "no such folder or file: nowhere",
    "views digits --out table.txt": "table.txt is there and was not made by ssl_kit",
    "doctor digits": "'digits' is one too many: ssl-kit doctor",
    "doctor --seconds long": "--seconds: wanted a number, got 'long'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_seen_early(line, place, monkeypatch):
    monkeypatch.chdir(place)
    verb, *rest = line.split()
    with pytest.raises(UserError) as told:
        early.look(verb, rest)
    assert MISTAKES[line] in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "line",
    [
        "pretrain digits --method.optim.lr 3e-4 --trainer.devices 2 --views.strength 0.5",
        "pretrain digits -c simclr --allow mine --grow {0:16} --image-size [16,24] --max_bad 0.1 --resume=false",
        "pretrain digits:train images --limit 40",
        "pretrain -c run/recipe.yaml --run new",
        "evaluate run digits --only knn --dims 8,16 --leaks false",
        "evaluate run run images --only=knn",
        "embed run digits --out e --shard 0/4",
        "finetune run digits --views.scale [0.3,1]",
        "search run 003.png -k 3",
        "doctor --seconds 0",
        "pretrain digits -- --anything",
        "pretrain digits --method.encoder.args.channels [8,8] --method.encoder.class_path x.Y --method.encoder.own 1",
        "pretrain digits --method mine.Method --allow mine --method.own 1 --trainer.log_every_n_steps 3",
        "evaluate run digits --baselines none --only [knn]",
    ],
)
def test_what_may_be_right_goes_on(line, place, monkeypatch):
    monkeypatch.chdir(place)
    verb, *rest = line.split()
    assert early.look(verb, rest).startswith(verb)


@pytest.mark.parametrize(
    "line",
    [
        *("pretrain nowhere", "pretrain digits --run run", "pretrain digits --epoch 3", "evaluate nowhere digits"),
        "pretrain digits --method.optim.lrr 1",
        "pretrain digits --trainer.max-stepz 3",
        "evaluate run digits --only knn,linaer",
    ],
)
def test_no_library_is_loaded_for_it(line, place):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *line.split()], cwd=place, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2\n" and done.stderr.count("\n") == 1


def test_the_verbs_say_the_same(place, monkeypatch, capsys):
    """Without the early look a command ends in the same line."""
    monkeypatch.chdir(place)
    late = {}
    with monkeypatch.context() as patch:
        patch.setattr("ssl_kit.verbs.early.look", lambda *_: "")
        for line in SAME:
            assert cli.main(line.split()) == 2
            late[line] = capsys.readouterr().err.splitlines()[-1]
    for line in SAME:
        assert line in MISTAKES and cli.main(line.split()) == 2
        assert capsys.readouterr().err.splitlines() == [late[line]]


SAME = (
    "pretrain nowhere",
    "pretrain table.txt",
    "pretrain ftp://host/x.tar",
    "pretrain",
    "pretrain digits --run run",
    "pretrain digits --run none --resume",
    "pretrain digits --epoch 3",
    "pretrain digits --epochs many",
    "pretrain digits --epochs 0",
    "pretrain digits --seed 1.5",
    "pretrain digits --precision bf16",
    "pretrain digits --image-size large",
    "pretrain digits --trainer.max-epochs 3",
    "pretrain digits --reader mine:read",
    "evaluate nowhere digits",
    "evaluate killed digits",
    "evaluate run",
    "evaluate run digits --onyl knn",
    "pretrain digits --views.strenght 0.5",
    "pretrain digits --method.temperature high",
    "evaluate run digits --only knn,linaer",
    "export run --out run",
    "report nowhere",
    "index run",
)


def test_of_several_processes_the_first_speaks_and_none_looks_at_a_run_that_others_may_have_begun(place):
    several = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "ssl_kit", "pretrain", "nowhere"]
    done = subprocess.run(command, cwd=place, env=several, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout and not done.stderr


def test_a_run_is_looked_at_by_one_process_alone(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert early.look("pretrain", ["digits", "--run", "run"]) == "pretrain digits -> run; report: run/report.html"


def test_what_is_read_from_the_source_is_what_the_libraries_see():
    assert early.evaluations() == list(ONLY)
    for of in (Trainer, Optim, ViewRecipe, *methods()):
        home = Class(Path(inspect.getsourcefile(of)), of.__name__)
        assert [*parts(home)] == [*inspect.signature(of).parameters], of


@pytest.mark.parametrize("name", sorted(packaged()))
def test_no_packaged_recipe_is_refused(name):
    verb, *rest = ["pretrain", "digits", "-c", name, "--run", "nothing"]
    assert early.look(verb, rest).startswith("pretrain digits")


def test_the_first_line_comes_before_the_libraries(place):
    """It says what is going to be done; under --json on stderr, and not at all under --quiet."""
    command = [sys.executable, "-m", "ssl_kit", "views", "digits", "--out", "v.png", "--count", "1"]
    for more, told in (([], "views digits -> v.png"), (["--json"], ""), (["--quiet"], "v.png: 1 originals")):
        done = subprocess.run([*command, *more], cwd=place, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(told) and ("views digits -> v.png" in done.stdout + done.stderr) != bool(
            "--quiet" in more
        )
        assert not told or not done.stdout.startswith("{")


def test_where_a_run_goes_by_default():
    assert [str(default_run(name)) for name in ("data/photos", "a b", "", "/")] == [
        "runs/photos",
        "runs/a",
        "runs/run",
        "runs/run",
    ]


def test_an_engine_that_is_not_installed_is_told(labelled_folder, encoder, tmp_path):
    if find_spec("ray") is not None:
        pytest.skip("it is")
    with pytest.raises(UserError, match=r"--engine ray needs the package ray: pip install 'ssl-kit\[ray\]'"):
        early.look("embed", [str(encoder), str(labelled_folder), "--out", str(tmp_path / "EMB"), "--engine", "ray"])
