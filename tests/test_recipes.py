"""Every packaged recipe is parsed and trained for two steps through the command line."""

import json
import re
from pathlib import Path

import pytest

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.verbs.recipes import packaged, read_recipe

RECIPES = sorted(packaged())


def test_recipes_are_found():
    assert "simclr_cifar10_small" in RECIPES
    assert {Path(path).parent.name for path in packaged().values()} == {"recipes"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_its_numbers_come_from(name):
    comment = [line for line in packaged()[name].read_text().splitlines() if line.startswith("#")]
    assert "arXiv" in " ".join(comment) and len(comment) >= 2


def test_recipes_are_listed_with_what_they_are_for_and_what_was_measured(capsys):
    assert cli.main(["recipes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["recipes"]
    assert list(told) == RECIPES
    for name, one in told.items():
        assert one["for"] and one["takes"] and one["verified"] == bool(re.search(r"\+-|seeds?\)", one["measured"]))
        unmeasured = re.search(
            r"not measured|[Uu]nverified|never run", packaged()[name].read_text().partition("\nseed")[0]
        )
        assert bool(one["verified"]) != bool(unmeasured), name
    assert cli.main(["recipes", "simclr", "mae_cifar10_tiny"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("simclr: your own images") and "; unverified: " in said[1] and "; verified: " in said[3]
    assert cli.main(["recipes", "simclrr"]) == 2 and "nearest: simclr" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in RECIPES if "image_size" in read_recipe(name)])
def test_views_of_a_measured_recipe_do_not_hang_on_defaults(name):
    """Below 96 px the default strength and blur are others; results were measured with what the recipe says."""
    views = read_recipe(name)["views"]
    assert views["preset"] in ("mae", "vae", "plain") or {"strength", "blur"} <= set(views)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_for_two_steps(name, labelled_folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--run", str(run), "--limit", "48", "--batch-size", "8", "--trainer.max_steps", "2", "--json"]
    recipe = read_recipe(name)
    if "minutes" in recipe:
        options += ["--minutes", "null", "--epochs", "1"]
    if recipe.get("image_size", 0) > 96:  # large networks at the size that they are made for take minutes here
        options += ["--image-size", "64"]
    if name == "mae_imagenet_vitb16":  # its checkpoints have a gigabyte each
        options += ["--method.encoder.args", "{depth: 2, embed_dim: 192, num_heads: 3}", "--method.decoder_depth", "1"]
    if "contrastive_batch" in recipe:
        options += ["--contrastive-batch", "16"]
    assert cli.main(["pretrain", str(labelled_folder), "-c", name, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 2 and record["status"] == "finished"
    assert (run / "encoder" / "model.safetensors").is_file() and (run / "report.html").is_file()


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"'simclr_cifar_small'; nearest: simclr_cifar10_small"):
        read_recipe("simclr_cifar_small")


@pytest.mark.parametrize("text", ["- 1\n- 2", "a: [", "just text"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        read_recipe(str(tmp_path / "r.yaml"))


def test_yaml_cannot_build_objects(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: !!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="is not YAML"):
        read_recipe(str(tmp_path / "r.yaml"))
