"""`ssl-kit drift`: from two embeddings folders to a sentence, a table and pictures."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.drift import drift
from ssl_kit.verbs.embed import embed


def images(folder, seed, count, base):
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        noise = generator.normal(base + generator.uniform(-40, 40, 3), 20, (16, 16, 3))
        Image.fromarray(np.asarray(noise.clip(0, 255), np.uint8)).save(folder / f"{number:03d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Embeddings of grey images, of others like them, and of such with five blue ones among them."""
    root = tmp_path_factory.mktemp("drift")
    torch.manual_seed(0)
    encoder = str(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16)).save(root / "encoder"))
    for name, seed, base in (("old", 0, 120), ("same", 1, 120), ("darker", 2, 60)):
        embed(encoder, images(root / f"{name} images", seed, 60, base), out=str(root / name))
    other = str(Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16)).save(root / "another"))
    embed(other, str(root / "old images"), out=str(root / "by another"))
    return root


def test_what_is_alike_and_what_is_not(folders, tmp_path, capsys):
    old, pages = str(folders / "old"), tmp_path / "drift.html"
    assert not drift(old, str(folders / "same"))["drifted"]
    assert "no drift is seen: p = " in capsys.readouterr().out
    command = ["drift", old, str(folders / "darker"), "--html", str(pages), "--csv", str(tmp_path / "d.csv"), "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["drifted"] and told["p"] == 0.002 and told["images"] == [60, 60] and len(told["unfamiliar"]) == 12
    with open(tmp_path / "d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    farthest = max(rows, key=lambda row: float(row["distance"]))
    assert len(rows) == 60 and farthest["id"] == told["unfamiliar"][0]["id"]
    page = pages.read_text()
    assert "unlike all old ones" in page and page.count("<img") == 12 * 7


def test_what_cannot_be_compared_is_named(folders):
    old = str(folders / "old")
    with pytest.raises(UserError, match="differ in encoder_sha256"):
        drift(old, str(folders / "by another"))
    with pytest.raises(UserError, match="--level 2"):
        drift(old, str(folders / "same"), level=2)
    with pytest.raises(UserError, match="--unfamiliar -1"):
        drift(old, str(folders / "same"), unfamiliar=-1)
