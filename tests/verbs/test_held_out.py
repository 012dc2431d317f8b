"""Images that are held out to choose or to score by are never trained on, told by the colours that networks see."""

import numpy as np
import pytest
from PIL import Image

from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation.finetune import BestEpoch, FineTune
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs.finetune import finetune
from ssl_kit.verbs.monitor import hold_out
from ssl_kit.verbs.pretrain import pretrain
from ssl_kit.views.recipe import ViewRecipe

NET = {"channels": [8, 8, 8, 8]}
SAME_COLOUR = ViewRecipe(preset="mae")  # crops and mirrors only
STEP = 8  # between two colours, in 1/255


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Class folders of 40 images of 16 px, each of one colour that no other has; {colour: id}."""
    folder, names = tmp_path_factory.mktemp("colours"), {}
    for number in range(160):
        name = f"{'abcd'[number % 4]}/{number:03d}.png"
        colour = (number % 16, number // 16, 12)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), tuple(STEP * value for value in colour)).save(folder / name)
        names[colour] = name
    return folder, names


def named(views, names):
    """The ids of the images that views (B, 3, h, w) are of."""
    values = views[:, :, 0, 0].float().cpu().numpy() * 255 / STEP
    assert np.abs(values - values.round()).max() < 0.1
    return {names[tuple(colour)] for colour in values.round().astype(int).tolist()}


def test_pretraining_sees_all_images_but_those_of_the_knn(colours, tmp_path, monkeypatch):
    folder, names = colours
    trained, step = set(), SimCLR.training_step

    def seen(self, batch, batch_idx):
        for views in batch["views"]:
            trained.update(named(views, names))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SimCLR, "training_step", seen)
    method = {"class_path": "ssl_kit.methods.simclr.SimCLR"}
    method["init_args"] = {"encoder": {"name": "resnet18_small", "args": NET}, "projection": [8]}
    settings = {"image_size": 16, "batch_size": 38, "epochs": 1, "threads": 1, "views": SAME_COLOUR, "method": method}
    pretrain(str(folder), run=str(tmp_path / "run"), **settings)
    training, gallery, queries = hold_out(open_source(folder))
    assert len(queries) == 8 and trained == set(names.values()) - set(queries.ids()) == set(training.ids())
    assert set(gallery.ids()) <= trained  # who votes is no query


def test_fine_tuning_sees_neither_the_images_that_choose_the_epoch_nor_the_test_images(colours, tmp_path, monkeypatch):
    folder, names = colours
    trained, chosen_by, step, built = set(), set(), FineTune.training_step, BestEpoch.__init__

    def seen(self, batch, batch_idx):
        trained.update(named(batch["views"][0], names))
        return step(self, batch, batch_idx)

    def choosing(self, held_out, *rest):
        chosen_by.update(held_out.ids())
        built(self, held_out, *rest)

    monkeypatch.setattr(FineTune, "training_step", seen)
    monkeypatch.setattr(BestEpoch, "__init__", choosing)
    monkeypatch.setattr("ssl_kit.verbs.finetune._FEWEST_STEPS", 1)
    Encoder("resnet18_small", NET, (16, 16)).save(tmp_path / "encoder")
    settings = {"epochs": 1, "batch_size": 32, "threads": 1, "views": SAME_COLOUR, "scratch": False}
    finetune(str(tmp_path / "encoder"), str(folder), out=str(tmp_path / "out"), **settings)
    tested = set(open_labelled(str(folder))[1].ids())
    assert len(tested) == 32 and len(chosen_by) >= 12 and not chosen_by & tested
    assert trained == set(names.values()) - tested - chosen_by
