"""Pretraining as a user sees it: the run folder, bitwise repetition, exact resume, refusals."""

import csv
import gc
import itertools
import json
import os
import shlex
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback
from safetensors.torch import load_file

import ssl_kit
from ssl_kit import cli, evaluate
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Choice
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data.opening import open_source
from ssl_kit.encoders import Encoder, encoder
from ssl_kit.encoders.encoder import choose_architecture
from ssl_kit.report.read import read_run
from ssl_kit.training import curves, duration
from ssl_kit.verbs import defaults, monitor
from ssl_kit.verbs.defaults import fit_to_data, view_size
from ssl_kit.verbs.pretrain import Settings

TINY = [
    *("--batch-size", "16", "--epochs", "6", "--method.encoder.args", "{channels: [8, 8, 16, 16]}"),
    *("--method.projection", "[32, 16]", "--method.optim.lr", "0.1", "--evaluate-every", "3"),
]
FEW = ["--trainer.max_steps", "3"]


def pretrain(folder, run, *options):
    assert cli.main(["pretrain", str(folder), "--run", str(run), *TINY, *options]) == 0
    return run


def test_memory_of_a_report_is_free_before_the_next_one(labelled_folder, tmp_path, monkeypatch):
    """A report is full of cycles, which the collector would let pile up."""
    written, left = [], []

    class Page:
        def __init__(self):
            self.self = self

    def write_report(runs, out):
        left.append(sum(page() is not None for page in written))
        written.append(weakref.ref(Page()))

    monkeypatch.setattr(curves, "_MEASURE_STEPS", 10)
    monkeypatch.setattr(monitor, "write_report", write_report)
    gc.collect()
    gc.disable()
    try:
        pretrain(labelled_folder, tmp_path / "run", "--evaluate-every", "1")
    finally:
        gc.enable()
    assert len(left) >= 3 and not any(left)


def losses(run):
    with open(run / "metrics.csv", newline="") as file:
        return [
            (row["step"], row["epoch"], row["images"], row["loss"], row["lr"])
            for row in csv.DictReader(file)
            if row["loss"]
        ]


def weights(run):
    return load_file(run / "encoder" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(labelled_folder, tmp_path_factory):
    return pretrain(labelled_folder, tmp_path_factory.mktemp("runs") / "finished")


def test_the_run_folder_is_complete(finished):
    present = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "run.json", "metrics.csv", "skipped.csv", "report.html", "pictures/views.png"} <= present
    assert {"encoder/config.json", "encoder/model.safetensors", "encoder/encoder.json"} <= present
    record = json.loads((finished / "run.json").read_text())
    assert record["status"] == "finished" and record["verdict"]["reason"] != "nothing was measured yet"
    assert record["data"]["images"] == 160 and record["encoder_sha256"] == Encoder.load(finished / "encoder").sha256
    assert record["chance_loss"] == pytest.approx(np.log(31))
    provenance = read_sealed(finished / "encoder" / "encoder.json")["provenance"]
    assert provenance["data"]["fingerprint"] == record["data"]["fingerprint"]
    assert ".png" in str(record["data"]) and ".png" not in str(provenance)  # names of images do not travel
    rows = list(csv.DictReader(open(finished / "metrics.csv", newline="")))  # noqa: SIM115
    assert [row["knn_top1"] for row in rows if row["knn_top1"]]
    assert sum(path.suffix in (".pt", ".ckpt", ".pkl", ".pth") for path in finished.rglob("*")) == 0


def test_the_resolved_recipe_repeats_the_run_bit_for_bit_with_other_threads(finished, tmp_path):
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["method"]["init_args"]["encoder"]["name"] == "resnet18_small"
    again = tmp_path / "again"
    assert cli.main(["pretrain", "-c", str(finished / "recipe.yaml"), "--run", str(again), "--threads", "3"]) == 0
    assert losses(again) == losses(finished) and equal(weights(again), weights(finished))


def test_another_seed_is_another_run(finished, labelled_folder, tmp_path):
    other = pretrain(labelled_folder, tmp_path / "other", "--seed", "1")
    assert losses(other) != losses(finished)


def test_resuming_needs_nothing_said_again_and_a_finished_run_stays_as_it_is(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert losses(run) == losses(finished) and equal(weights(run), weights(finished))
    capsys.readouterr()
    for option, value in [("--seed", "5"), ("--batch-size", "8"), ("--method.temperature", "0.9")]:
        assert cli.main(["pretrain", "--run", str(run), "--resume", option, value]) == 2
        assert f"--resume: {option.strip('-').split('.')[0].replace('-', '_')} was" in capsys.readouterr().err


def test_a_longer_run_goes_on_with_a_schedule_of_its_new_length(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert cli.main(["pretrain", "--run", str(run), "--resume", "--epochs", "12"]) == 0
    added = losses(run)[len(losses(finished)) :]
    assert float(added[0][4]) > 0 and float(added[-1][4]) == 0


def test_a_mistake_costs_nothing(finished, labelled_folder, tmp_path, capsys):
    run = tmp_path / "run"
    for wrong in (["--batch-size", "1000"], ["--batch-size", "0"], ["--minutes", "1"], ["--method.optim.lr", "-1"]):
        assert cli.main(["pretrain", str(labelled_folder), "--run", str(run), *TINY, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for wrong in (["--trainer.max_epochs", "3"], ["--trainer.devices", "all"], ["--grow", "{0: 0}"]):
        assert cli.main(["pretrain", str(labelled_folder), "--run", str(run), *TINY, *wrong]) == 2
    assert not (run / "run.json").exists()
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert cli.main(["pretrain", str(tmp_path / "nowhere"), "--run", str(copy), "--overwrite"]) == 2
    assert equal(weights(copy), weights(finished))
    pretrain(labelled_folder, copy, "--overwrite", "--epochs", "1")
    assert not equal(weights(copy), weights(finished))


def test_small_classes_train_without_a_monitor_of_their_labels(tmp_path):
    for label in range(60):
        (tmp_path / "images" / f"{label:02d}").mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(label * 2 + number).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{label:02d}" / f"{number}.png")
    run = pretrain(tmp_path / "images", tmp_path / "run", "--epochs", "1")
    assert "0.000" not in json.loads((run / "run.json").read_text())["verdict"]["reason"]


def test_an_existing_run_is_refused_with_the_two_ways_on(finished, labelled_folder, tmp_path, capsys):
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(finished), *TINY]) == 2
    message = capsys.readouterr().err
    assert "--resume" in message and "--overwrite" in message
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(tmp_path / "new"), "--resume"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_minutes_end_the_run_with_the_schedule_at_its_end(labelled_folder, tmp_path, monkeypatch):
    clock = (0.05 * look for look in itertools.count())  # it goes on when it is looked at, on any machine
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = tmp_path / "timed"
    tiny = [option for option in TINY if option not in ("--epochs", "6")]
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(run), *tiny, "--minutes", "0.1"]) == 0
    last = losses(run)[-1]
    assert 56 <= int(last[0]) <= 115  # 6 s, of which up to half went before, 0.05 s a step
    rates = [float(row[4]) for row in losses(run)]
    assert float(last[4]) < 0.1 * 0.1 * 16 / 256 and rates.index(max(rates)) <= len(rates) // 2
    steps = losses(run)
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert losses(run) == steps and len(list(run.glob("checkpoints/step-*"))) == 1  # not a step more


def test_a_messy_folder_trains_and_names_exactly_the_broken_files(tmp_path):
    folder = tmp_path / "messy"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "texts").mkdir()
    generator = np.random.default_rng(0)
    modes = ["RGB", "L", "P", "CMYK", "RGBA", "I;16", "1", "LA"]
    for number in range(996):
        pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
        mode = modes[number % len(modes)]
        image = Image.fromarray(pixels)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        name = f"{number:03d}." + {"CMYK": "jpg", "RGB": "jpg"}.get(mode, "png")
        image.save((folder if number % 2 else folder / "deep" / "er") / name)
    for number, word in enumerate(["ünïcode 图像", "emoji 🦊", "new\nline", "-dash"]):
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{word}{number}.png")
    png, jpeg = (folder / "001.png").read_bytes(), (folder / "deep" / "er" / "000.jpg").read_bytes()
    broken = {f"empty{number}.png": b"" for number in range(3)}
    broken |= {f"cut{number}.png": png[: len(png) * number // 4] for number in range(1, 4)}
    broken |= {f"deep/cut{number}.jpg": jpeg[: len(jpeg) * number // 3] for number in range(1, 3)}
    broken |= {"text.jpg": b"this is no picture", "page.png": b"<html><body>404</body></html>"}
    assert len(broken) == 10
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    (folder / "texts" / "notes.txt").write_text("x")
    os.symlink(folder, folder / "deep" / "loop")
    run = pretrain(folder, tmp_path / "run", "--image-size", "16", "--batch-size", "100", "--epochs", "1")
    with open(run / "skipped.csv", newline="", encoding="utf-8") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(broken)
    assert json.loads((run / "run.json").read_text())["data"]["images"] == 1000
    embeddings = tmp_path / "embeddings"
    assert cli.main(["embed", str(run), str(folder), "--out", str(embeddings)]) == 0
    from ssl_kit.embeddings.embeddings import Embeddings

    loaded = Embeddings.load(embeddings)
    assert len(loaded.ids) == 1000 and not set(broken) & set(loaded.ids) and any("图像" in name for name in loaded.ids)


def test_pretrain_is_a_python_function_too(labelled_folder, tmp_path):
    encoder = {"name": "resnet18_small", "args": {"channels": [8, 8, 8, 8]}}
    method = {"class_path": "ssl_kit.methods.simclr.SimCLR", "init_args": {"encoder": encoder}}
    record = ssl_kit.pretrain(str(labelled_folder), method=method, run=str(tmp_path / "run"), epochs=1, batch_size=32)
    assert record["method"] == "SimCLR" and record["dim"] == 8
    with pytest.raises(UserError, match="start the program by torchrun --nproc-per-node 2"):
        ssl_kit.pretrain(str(labelled_folder), run=str(tmp_path / "other"), trainer={"devices": 2})
    with pytest.raises(UserError, match="temprature"):
        broken = {**method, "init_args": {"encoder": encoder, "temprature": 1}}
        ssl_kit.pretrain(str(labelled_folder), method=broken, run=str(tmp_path / "other"), epochs=1)


def test_what_a_run_was_begun_with_stands_beside_it_as_it_came(finished, labelled_folder, tmp_path, capsys):
    start, run = str(finished / "encoder"), tmp_path / "run"
    # a rate that spoils whatever it began with
    pretrain(labelled_folder, run, "--init", start, "--freeze", "2", "--method.optim.lr", "300")
    assert "frozen: the stem and 2 blocks" in capsys.readouterr().out
    before, after = (load_file(one / "encoder" / "model.safetensors") for one in (finished, run))
    assert torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert not torch.equal(before["layer4.0.conv1.weight"], after["layer4.0.conv1.weight"])
    made = evaluate(str(run), str(labelled_folder), only="knn", baselines="random_init")
    features = {one["features"] for one in made["results"]}
    assert features == {"encoder", "random_init", "pretrained:as it came"}
    alone = evaluate(start, str(labelled_folder), only="knn", baselines="none", out=str(tmp_path / "alone"))
    top1 = lambda record, name: next(
        one["metrics"]["top1"] for one in record["results"] if one["features"] == name and one["settings"]["chosen"]
    )
    assert top1(made, "pretrained:as it came") == top1(alone, "encoder")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "init": str(tmp_path / "gone")}))
    evaluate(str(run), str(labelled_folder), only="knn", baselines="none")
    assert "as it came: what the run was begun with is not scored beside it" in capsys.readouterr().out


def test_init_starts_from_an_encoder(finished, labelled_folder, tmp_path, capsys):
    run = pretrain(
        labelled_folder, tmp_path / "run", "--init", str(finished), "--method.optim.lr", "1e-12", "--epochs", "1"
    )
    assert "100.0% of the weights matched" in capsys.readouterr().out
    one, other = weights(run), weights(finished)
    assert torch.allclose(one["conv1.weight"], other["conv1.weight"], atol=1e-6)
    assert (
        cli.main(["pretrain", str(labelled_folder), "--run", str(tmp_path / "x"), *TINY, "--init", "timm:resnet18"])
        == 2
    )


def test_views_of_either_executor_train_alike(labelled_folder, tmp_path):
    runs = [
        pretrain(labelled_folder, tmp_path / place, "--views-on", place, "--precision", "float32", *FEW)
        for place in ("device", "host")
    ]
    first, second = (float(losses(run)[0][3]) for run in runs)
    assert first == pytest.approx(second, rel=1e-4)  # later steps part: training magnifies roundings


def test_wandb_and_tensorboard_are_opt_in_and_offline(labelled_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = pretrain(labelled_folder, tmp_path / "run", "--wandb", "--tensorboard", "--epochs", "1")
    assert "wandb: offline" in capsys.readouterr().out
    assert list((run / "wandb").glob("offline-run-*")) and list((run / "tensorboard").rglob("events.out.*"))


def test_growing_views_train_and_are_refused_where_they_cannot(labelled_folder, tmp_path, capsys):
    run = pretrain(labelled_folder, tmp_path / "run", "--grow", "{0: 8, 3: 12}", "--image-size", "16")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["grow"] == {0: 8, 3: 12}
    assert Encoder.load(run / "encoder").image_size == (16, 16)
    vit = ["--method.encoder.name", "vit_tiny_patch16_224", "--method.encoder.args", "{patch_size: 4, depth: 1}"]
    options = [*TINY, *vit, "--image-size", "16", "--grow", "{0: 8}"]
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(tmp_path / "vit"), *options]) == 2
    assert "takes images of 16 x 16 only" in capsys.readouterr().err


def test_a_user_without_labels_is_shown_what_was_learnt_and_can_search_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos, rng = tmp_path / "my photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(64):
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((40, 40))
        image.save(photos / f"{number:02d}.png")
        if number < 2:
            image.save(photos / f"copy {number}.jpg", quality=80)
    options = ("--image-size", "16", "--overwrite")
    for _ in range(2):  # what the first leaves is replaced
        pretrain("my photos", "my run", *options)
        said = capsys.readouterr().out.splitlines()
        run = tmp_path / "my run"
        assert not (run / "embeddings" / "manifest.json").exists()  # of the run that was replaced
        record = json.loads((run / "run.json").read_text())
        assert {name: record["seen"][name] for name in ("images", "of", "near_duplicates")} == {
            "images": 66, "of": 66, "near_duplicates": 2,
        }  # fmt: skip
        assert set(record["crops"]["top1"]) == {"encoder", "random_init", "pixels", "pca"}
        assert all(low <= value <= high for value, low, high in record["crops"]["top1"].values())
        found = read_run(run)
        copies = [sorted(found.duplicates["ids"][place] for place in group) for group in found.duplicates["groups"]]
        assert sorted(copies) == [
            ["00.png", "copy 0.jpg"], ["01.png", "copy 1.jpg"],
        ]  # fmt: skip
        assert len(found.duplicates["outliers"]) == 12 and len(found.map["x"]) == 66
        neighbours = found.neighbours
        for rows in neighbours["found"].values():
            for query, row in zip(neighbours["queries"], rows, strict=True):
                images = {neighbours["images"][place] for place in row}
                assert len(images) == 8 and neighbours["images"][query] not in images  # it is not its own neighbour
        page = (run / "report.html").read_text()
        assert "LABELLED" not in page and "images trained on" in page and "yet." not in page
        assert said[-2] == f"look: {(run / 'report.html').as_uri()}"
        words = shlex.split(said[-1].removeprefix("next: "))
        assert words[:3] == ["ssl-kit", "search", "my run"] and cli.main(words[1:]) == 0  # as it stands
        capsys.readouterr()
    before = page
    assert cli.main(["report", "my run"]) == 0
    drawn = [html.count("data:image/webp") for html in (before, (run / "report.html").read_text())]
    assert drawn[0] == drawn[1] > 100  # from what the run holds: nothing is lost


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs"), [(1_000_000, 256, 100), (5_000, 256, 100), (160, 16, 200), (3, 2, 1000)]
)
def test_batch_and_length_follow_from_the_number_of_images(count, batch_size, epochs):
    settings = fit_to_data(Settings("images"), count)
    assert (settings.batch_size, settings.epochs) == (batch_size, epochs)


@pytest.mark.parametrize(("side", "wanted"), [(28, 32), (100, 96), (140, 128), (200, 192), (900, 224), (5, 8)])
def test_the_view_is_what_patches_and_strides_divide(side, wanted, monkeypatch):
    images = np.zeros((3, side, side + 7, 3), np.uint8)
    for device, most in (("cuda", 224), ("cpu", 128)):
        monkeypatch.setattr(defaults, "choose_device", lambda device=device: Choice(device, ""))
        assert view_size(None, open_source(images)) == (min(wanted, most),) * 2


def test_the_network_is_smaller_without_an_accelerator(monkeypatch):
    for device, small, large in (("cuda", 512, "resnet50"), ("cpu", 256, "resnet18")):
        monkeypatch.setattr(encoder, "choose_device", lambda device=device: Choice(device, ""))
        assert Encoder(image_size=(32, 32)).dim == small
        assert choose_architecture((128, 128)) == (large, {})


class Counted(Callback):
    """Counts steps."""

    steps = 0

    def on_train_batch_end(self, *_):
        self.steps += 1


def test_callbacks_given_from_python_run_and_are_left_out_of_the_recipe(labelled_folder, tmp_path):
    counted, run = Counted(), tmp_path / "run"
    ssl_kit.pretrain(str(labelled_folder), run=str(run), trainer={"max_steps": 2, "callbacks": [counted]})
    assert counted.steps == 2
    assert yaml.safe_load((run / "recipe.yaml").read_text())["trainer"] == {"max_steps": 2}
