"""The picture of the views shows the originals and the very views that training would see."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.verbs import budget
from ssl_kit.verbs.views import views
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe
from ssl_kit.views.sample import sample

GAP = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "images" / f"{n}.png")
    return tmp_path / "images"


def test_the_grid_holds_the_views_of_training(folder: Path) -> None:
    out = folder.parent / "pictures" / "views.png"
    recipe = ViewRecipe(preset="dino")
    record = views(str(folder), out=str(out), views=recipe, image_size=32, count=3, views_per_image=3, seed=5, epoch=2)
    assert record["originals"] == ["0.png", "1.png", "2.png"]
    grid = np.asarray(Image.open(out))
    assert grid.shape == (3 * 36 + GAP, 4 * 36 + GAP, 3)
    image = np.asarray(Image.open(folder / "1.png"))
    for which, view in enumerate(recipe.fitted("simclr", (32, 32), 3).build((32, 32), 3, 3)):
        params = sample(view, 5, 2, np.array([1]), which, np.array([40]), np.array([50]))
        wanted = apply_host(image[None], params, view.size)[0].transpose(1, 2, 0) * 255
        margin = (32 - view.size[0]) // 2
        top, left = GAP + 36 + margin, GAP + (which + 1) * 36 + margin
        got = grid[top : top + view.size[0], left : left + view.size[1]]
        assert np.abs(got - wanted).max() <= 0.5 + 1e-3


def test_the_size_follows_the_images_and_gray_stays_gray(folder: Path) -> None:
    out = folder.parent / "gray.png"
    record = views(str(folder), out=str(out), views=ViewRecipe(preset="gray"), channels=1, count=1, views_per_image=1)
    assert record["image_size"] == [40, 40]
    assert Image.open(out).mode == "L"


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="--count 0: wanted"):
        views(str(folder), count=0)
    with pytest.raises(UserError, match="hue need 3 channels"):
        views(str(folder), out=str(folder.parent / "x.png"), views=ViewRecipe(hue=0.1), channels=1)


def test_the_recipe_of_a_run_says_its_size_by_two_sides(folder: Path) -> None:
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("{image_size: [16, 16], views: {preset: mae}}")
    out = folder.parent / "views.png"
    assert cli.main(["views", str(folder), "-c", str(recipe), "--out", str(out), "--count", "1"]) == 0
    assert Image.open(out).size == (9 * 20 + 4, 20 + 4)


def test_the_next_command_reads_images_alike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bands = folder.parent / "my bands"
    bands.mkdir()
    for n in range(4):
        np.save(bands / f"{n}.npy", np.random.default_rng(n).integers(0, 4096, (16, 20, 5), np.uint16))
    options = ["--channels", "5", "--range", "0,4095", "--views.scale", "[0.5, 1.0]", "--image-size", "[16, 16]"]
    assert cli.main(["views", str(bands), "--out", str(folder.parent / "v.png"), *options]) == 0
    hint = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert hint[:4] == ["next:", "ssl-kit", "pretrain", str(bands)]
    assert hint[4:] == options
    quick = ["--run", str(folder.parent / "run"), "--trainer.max_steps=1", "--batch_size=2"]
    assert cli.main([*hint[2:], *quick, "--method.encoder.args", "{channels: [8, 8, 8, 8]}"]) == 0


def test_minutes_draw_the_sizes_that_pretrain_would_choose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_IMAGES", 10**12)  # never enough: the cheapest rung, however fast the machine is
    monkeypatch.setattr(budget, "_EPOCHS", 10**12)
    out = folder.parent / "views.png"
    record = views(str(folder), out=str(out), minutes=0.2, batch_size=2, views_per_image=6)
    later = record["views"][1]["epoch"]
    wanted = [{"epoch": 0, "size": [16, 16], "count": 3}, {"epoch": later, "size": [24, 24], "count": 3}]
    assert record["views"] == wanted and later > 0
    grid, image = np.asarray(Image.open(out)), np.asarray(Image.open(folder / "1.png"))
    view = ViewRecipe().fitted("simclr", (40, 40), 3).build((24, 24), 3, 1)[0]
    params = sample(view, 0, later, np.array([1]), 2, np.array([40]), np.array([50]))
    seen = apply_host(image[None], params, view.size)[0].transpose(1, 2, 0) * 255
    top, left = GAP + 44 + 8, GAP + 6 * 44 + 8
    assert np.abs(grid[top : top + 24, left : left + 24] - seen).max() <= 0.5 + 1e-3


def test_growing_views_and_the_method_are_those_of_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("{grow: {0: 16, 5: 24}, method: {class_path: ssl_kit.methods.byol.BYOL}, image_size: 32}")
    options = ["-c", str(recipe), "--views-per-image=4", "--epoch", "7", "--method.tau=0.9"]
    assert cli.main(["views", str(folder), "--out", str(folder.parent / "v.png"), *options, "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["views"] == [{"epoch": 7, "size": [24, 24], "count": 4}] and record["preset"] == "byol"
    assert shlex.split(said.err.splitlines()[-1])[1:] == [
        *["ssl-kit", "pretrain", str(folder), "-c", str(recipe), "--method.tau=0.9"]
    ]
