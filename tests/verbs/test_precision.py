"""A precision, a device or a step that would become another, or nothing, is refused before anything is touched."""

from dataclasses import replace

import numpy as np
import pytest

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Choice
from ssl_kit.data.module import views_speed
from ssl_kit.data.opening import open_source
from ssl_kit.encoders import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs import defaults
from ssl_kit.verbs.finetune import finetune
from ssl_kit.verbs.pretrain import Settings
from ssl_kit.views.recipe import ViewRecipe

SMALL = ["--method.encoder.name=resnet18_small", "--method.encoder.args={channels: [8, 8, 8, 8]}"]


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (["--precision=float16"], "bfloat16"),
        (["--trainer.precision=32-true", "--precision=bfloat16"], "--precision"),
        (["--trainer.precision=16-mixed"], "--precision"),
        (["--trainer.accelerator=gpu"], "CUDA_VISIBLE_DEVICES"),
        (["--batch_size=1"], "one image"),
        (["-c", "vae", "--image_size=8", "--batch_size=1"], "more than 1 value per channel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pretraining_refuses_it_and_the_folder_stays_empty(
    options, instead, labelled_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = ["--run", str(tmp_path / "run"), "--trainer.max_steps=2", "--threads=1", *SMALL]
    assert cli.main(["pretrain", str(labelled_folder), "--image_size=16", *run, *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and instead in said[0]
    assert not [path.name for path in (tmp_path / "run").glob("*") if not path.name.startswith(".")]


def test_fine_tuning_refuses_float16_on_a_cpu_and_keeps_the_states_of_a_training(
    labelled_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16)).save(tmp_path / "encoder")
    begun = tmp_path / "out" / "finetuning" / "settings.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    with pytest.raises(UserError, match="precision float16"):
        finetune(str(tmp_path / "encoder"), str(labelled_folder), out=str(tmp_path / "out"), precision="float16")
    assert begun.read_text() == "{}"


@pytest.mark.parametrize("sizes", ["one", "several"])
def test_what_was_tried_is_written_into_the_recipe_as_if_typed(sizes, monkeypatch, capsys):
    """On an accelerator, which is pretended here; what is typed is not tried."""
    images = [np.zeros((16, 16 + (sizes == "several" and row == 3), 3), np.uint8) for row in range(40)]
    source, tried = open_source(images), []
    speeds = {"host": 20.0, "device": 10.0}
    monkeypatch.setattr(defaults, "choose_device", lambda: Choice("cuda", "pretended"))
    monkeypatch.setattr(defaults, "use_gpu", lambda *_: None)
    monkeypatch.setattr(defaults, "choose_tf32", lambda *_: Choice(False, "pretended"))
    monkeypatch.setattr(defaults, "choose_compile", lambda wanted, *_: Choice(wanted != "off", "pretended"))
    monkeypatch.setattr(defaults, "views_speed", lambda *args: tried.append(args[-1]) or speeds[args[-1]])

    def fitted(**typed):
        learner = SimCLR(Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16)), projection=(16, 8))
        settings = Settings("images", epochs=1, batch_size=8, threads=1, precision="float32", **typed)
        views = defaults.schedule_views(ViewRecipe().fitted("simclr", (16, 16), 3), (16, 16), None, learner)
        loader, _, made = defaults.fit_to_machine(learner, source, views, settings, 8)
        recipe = defaults.resolved_recipe(replace(settings, **made.decided), learner)
        return loader.views_on, recipe["views_on"], recipe["compile"]

    place = "device" if sizes == "one" else "host"
    assert fitted() == (place, place, "on") and tried == ([] if sizes == "one" else ["host", "device"])
    assert ("tried: host 20, device 10 images/s" in capsys.readouterr().out) == (sizes == "several")
    del tried[:]
    assert fitted(views_on="device", compile="off") == ("device", "device", "off") and not tried


@pytest.mark.parametrize("place", ["host", "device"])
def test_views_are_tried_in_both_places(place):
    images = [np.zeros((16, 16 + row % 2, 3), np.uint8) for row in range(40)]
    views = ViewRecipe().build((8, 8), 3, 2)
    assert 0 < views_speed(open_source(images), views, 1, "cpu", place) < 1e7
