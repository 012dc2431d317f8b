"""A fourth method costs one file and one recipe: Barlow Twins, written here outside the package, through the CLI."""

import json
import sys

import pytest

from ssl_kit import cli

METHOD = '''
"""Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230, eq. 1)."""

from torch import eye

from ssl_kit.encoders.encoder import Encoder
from ssl_kit.methods.method import Method, flatten_views
from ssl_kit.methods.simclr import projection_head
from ssl_kit.training.optim import Optim


class BarlowTwins(Method):
    num_views = 2

    def __init__(self, encoder: Encoder, off_diagonal: float = 5e-3, width: int = 32, optim: Optim = Optim(lr=0.05)):
        super().__init__(encoder, optim)
        self.off_diagonal = off_diagonal
        self.head = projection_head(encoder.dim, (width, width))

    def loss(self, views, key):
        first, second = self.head(self.encoder(flatten_views(views))).float().chunk(2)  # (B, width) each
        first, second = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (first, second))
        c = first.T @ second / len(first)  # (width, width)
        error = (c - eye(len(c), device=c.device)).square()
        on_diagonal = error.diagonal().sum()
        return {"loss": on_diagonal + self.off_diagonal * (error.sum() - on_diagonal)}
'''
RECIPE = """
# Barlow Twins, arXiv:2103.03230
epochs: 2
batch_size: 32
image_size: 16
views: {strength: 0.5, blur: 0.0}
method:
  class_path: barlow.BarlowTwins
  init_args:
    encoder: {name: resnet18_small, args: {channels: [8, 8, 16, 16]}}
"""


@pytest.fixture
def barlow(tmp_path, monkeypatch):
    (tmp_path / "barlow.py").write_text(METHOD)
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
    (barlow / "stranger.py").write_text(METHOD)  # a module that nothing has imported before
    (barlow / "stranger.yaml").write_text(RECIPE.replace("barlow.", "stranger."))
    options = ["-c", str(barlow / "stranger.yaml"), "--run", str(barlow / "run")]
    assert cli.main(["pretrain", str(labelled_folder), *options]) == 2
    assert "--allow stranger" in capsys.readouterr().err and "stranger" not in sys.modules
