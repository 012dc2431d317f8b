"""A fourth method costs one file and one recipe: Barlow Twins of docs/examples, through the command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from ssl_kit import cli

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "barlow.py"
RECIPE = """
# Barlow Twins, arXiv:2103.03230
epochs: 2
batch_size: 32
image_size: 16
views: {strength: 0.5, blur: 0.0}
method:
  class_path: barlow.BarlowTwins
  init_args:
    width: 32
    encoder: {name: resnet18_small, args: {channels: [8, 8, 16, 16]}}
"""


@pytest.fixture
def barlow(tmp_path, monkeypatch):
    shutil.copy(EXAMPLE, tmp_path)
    (tmp_path / "barlow.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("barlow", None)


def test_it_trains_through_the_command_line(barlow, labelled_folder, capsys):
    options = ["-c", str(barlow / "barlow.yaml"), "--run", str(barlow / "run"), "--json", "--allow", "barlow"]
    assert cli.main(["pretrain", str(labelled_folder), *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "BarlowTwins" and record["status"] == "finished" and record["steps"] == 10
    assert (barlow / "run" / "encoder" / "model.safetensors").is_file()
    again = ["evaluate", str(barlow / "run"), str(labelled_folder), "--only", "knn", "--json"]
    assert cli.main(again) == 0


def test_without_permission_it_is_not_imported(barlow, labelled_folder, capsys):
    shutil.copy(EXAMPLE, barlow / "stranger.py")  # a module that nothing has imported before
    (barlow / "stranger.yaml").write_text(RECIPE.replace("barlow.", "stranger."))
    options = ["-c", str(barlow / "stranger.yaml"), "--run", str(barlow / "run")]
    assert cli.main(["pretrain", str(labelled_folder), *options]) == 2
    assert "--allow stranger" in capsys.readouterr().err and "stranger" not in sys.modules
