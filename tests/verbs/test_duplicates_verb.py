"""`ssl-kit duplicates`: planted copies of every kind are found and nothing else, within a folder and between two."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pretended import accelerator

import ssl_kit.verbs.duplicates as verb
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.embeddings import exact
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.alignment import edits
from ssl_kit.report.page import write_report
from ssl_kit.report.read import read_run
from ssl_kit.verbs import manual
from ssl_kit.verbs.duplicates import duplicates
from ssl_kit.verbs.embed import embed

pretended = pytest.fixture(accelerator)


def photograph(number):
    small = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC))


def make_encoder(folder, seed):
    torch.manual_seed(seed)
    return str(Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16)).save(folder / f"encoder{seed}"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with images/ (60 photographs and copies of 9 of them), test/ (20, of which 3 are in images/), encoders."""
    root = tmp_path_factory.mktemp("world")
    for name in ("images", "test"):
        (root / name).mkdir()
    for number in range(60):
        Image.fromarray(photograph(number)).save(root / "images" / f"{number:02d}.png")
    for number in range(3):
        shutil.copyfile(root / "images" / f"{number:02d}.png", root / "images" / f"{number:02d} file.png")
        Image.fromarray(photograph(10 + number)).save(root / "images" / f"{10 + number} pixels.bmp")
    for number, kind in enumerate(("jpeg", "crop", "brightness"), 20):
        made = edits(photograph(number), number)[kind]
        Image.fromarray(made).save(root / "images" / f"{number} {kind}.png")
    Image.fromarray(photograph(20)).save(root / "images" / "20 once more.bmp")  # a group of three
    for number in range(100, 117):
        Image.fromarray(photograph(number)).save(root / "test" / f"{number}.png")
    for number in (30, 31):
        shutil.copyfile(root / "images" / f"{number}.png", root / "test" / f"leak {number}.png")
    Image.fromarray(edits(photograph(32), 1)["jpeg"]).save(root / "test" / "leak 32.png")
    encoder = make_encoder(root, 0)
    for name in ("images", "test"):
        embed(encoder, str(root / name), out=str(root / f"{name}.emb"), layers=4, precision="float32")
    return root


@pytest.mark.parametrize("other", [None, "test.emb"])
def test_an_accelerator_finds_all_neighbours_and_they_are_the_same(world, other, monkeypatch, pretended):
    given = (str(world / "images.emb"), None if other is None else str(world / other))
    here = duplicates(*given)
    monkeypatch.setattr(verb, "solver", lambda: "cuda")
    monkeypatch.setattr(exact.faiss, "knn", None)
    there = duplicates(*given)
    for record in (here, there):
        record.pop("outliers", None)  # their distances differ by rounding
    assert json.dumps(there) == json.dumps(here)


def test_groups_are_the_planted_ones(world, tmp_path):
    table, page = tmp_path / "out.csv", tmp_path / "out.html"
    said = duplicates(str(world / "images.emb"), csv=str(table), html=str(page))
    found = [[one["id"] for one in members] for members in said["groups"]]
    planted = [
        *([f"{number:02d} file.png", f"{number:02d}.png"] for number in range(3)),
        *([f"{number} pixels.bmp", f"{number}.png"] for number in range(10, 13)),
        ["20 jpeg.png", "20 once more.bmp", "20.png"],
        ["21 crop.png", "21.png"],
        ["22 brightness.png", "22.png"],
    ]
    assert found == planted
    kinds = {one["id"]: one["kind"] for members in said["groups"] for one in members}
    assert (kinds["01 file.png"], kinds["11 pixels.bmp"], kinds["21 crop.png"]) == ("file", "pixels", "near")
    assert said["superfluous"] == 10 and said["pairs"] == {"file": 3, "pixels": 4, "near": 4, "features": 0}
    assert said["limits"]["planted"] == 3 * 70 and said["limits"]["planted_found"] > 0.9
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows if row["keep"] == "no"] == [name for group in planted for name in group[1:]]
    assert [row["kind"] for row in rows[-20:]] == ["outlier"] * 20
    assert page.read_text().count("<img ") == 19 + 21  # every member once; the first outlier twice


def drawing(number):
    """A few strokes of a pen on white paper."""
    rng, page = np.random.default_rng(number), Image.new("RGB", (64, 64), "white")
    for _ in range(rng.integers(1, 4)):
        ImageDraw.Draw(page).line([int(place) for place in rng.integers(4, 60, 4)], fill=(20, 20, 60), width=3)
    return page


def test_drawings_are_no_copies_for_the_noise_among_them(tmp_path):
    """Copies of noise hardly correlate when they are cropped: a limit for all would be met by any two drawings."""
    for number in range(60):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        page = Image.fromarray(noise) if number % 5 == 0 else drawing(number)
        (tmp_path / "images").mkdir(exist_ok=True)
        page.save(tmp_path / "images" / f"{number:02d}.png")
    Image.fromarray(edits(np.asarray(drawing(1)), 1)["jpeg"]).save(tmp_path / "images" / "01 jpeg.png")
    embed(make_encoder(tmp_path, 0), str(tmp_path / "images"), out=str(tmp_path / "emb"), layers=4)
    said = duplicates(str(tmp_path / "emb"))
    assert [[one["id"] for one in members] for members in said["groups"]] == [["01 jpeg.png", "01.png"]]
    assert said["limits"]["correlation"] < 0.8 and said["limits"]["by_chance"] <= 3


@pytest.mark.parametrize("levels", [1, 2])
def test_images_without_anything_to_see_are_one_group(tmp_path, levels):
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (100 + number % levels,) * 3).save(tmp_path / "images" / f"{number:02d}.png")
    embed(make_encoder(tmp_path, 0), str(tmp_path / "images"), out=str(tmp_path / "emb"), layers=4)
    said = duplicates(str(tmp_path / "emb"))
    assert sum(map(len, said["groups"])) == 12 and len(said["groups"]) <= levels


def test_leaks_between_two_folders(world, tmp_path):
    said = duplicates(str(world / "test.emb"), str(world / "images.emb"), csv=str(tmp_path / "leaks.csv"))
    assert [(one["id"], one["other"], one["kind"]) for one in said["leaks"]] == [
        ("leak 30.png", "30.png", "file"),
        ("leak 31.png", "31.png", "file"),
        ("leak 32.png", "32.png", "near"),
    ]
    back = duplicates(str(world / "images.emb"), str(world / "test.emb"))
    assert [(one["id"], one["other"]) for one in back["leaks"]] == [(one["other"], one["id"]) for one in said["leaks"]]
    assert (said["leaked"], said["images"], said["other_images"]) == (3, 20, 70)
    assert (tmp_path / "leaks.csv").read_text().splitlines()[1] == "leak 30.png,30.png,1.0,file"


def test_a_given_threshold_is_kept(world):
    said = duplicates(str(world / "images.emb"), threshold=1.0)
    assert said["limits"]["cosine"] == 1.0
    assert said["pairs"]["near"] == 0 and said["pairs"]["file"] == 3  # equal pictures count whatever is asked for
    with pytest.raises(UserError, match=r"--threshold 95: wanted a number in \[-1, 1\]"):
        duplicates(str(world / "images.emb"), threshold=95)


def test_without_the_images_features_decide(world, tmp_path):
    folder = shutil.copytree(world / "images.emb", tmp_path / "emb")
    manifest = read_sealed(folder / "manifest.json")
    write_sealed(folder / "manifest.json", manifest | {"source_root": "/nowhere"})
    said = duplicates(str(folder), encoder="/nowhere")
    found = [{one["id"] for one in members} for members in said["groups"]]
    assert {"01 file.png", "01.png"} in found and {"12 pixels.bmp", "12.png"} in found
    assert said["limits"]["by"] == "features" and said["pairs"]["features"] == sum(said["pairs"].values())


def test_outliers_are_far_from_their_neighbours(world):
    said = duplicates(str(world / "images.emb"), outliers=70)
    distances = [one["distance"] for one in said["outliers"]]
    assert len(distances) == 70 and distances == sorted(distances, reverse=True)
    assert duplicates(str(world / "images.emb"), outliers=0)["outliers"] == []


def test_other_encoders_are_refused(world, tmp_path):
    other = make_encoder(tmp_path, 1)
    embed(other, str(world / "test"), out=str(tmp_path / "emb"), layers=4)
    with pytest.raises(UserError, match="differ in encoder_sha256"):
        duplicates(str(tmp_path / "emb"), str(world / "images.emb"))


def test_the_command_line_takes_one_folder_or_two(world, capsys):
    assert cli.main(["duplicates", str(world / "images.emb"), "--json", "--threshold", "0.999"]) == 0
    assert cli.main(["duplicates", str(world / "test.emb"), str(world / "images.emb"), "--json"]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["superfluous"] >= 6 and one["limits"]["cosine"] == 0.999 and two["leaked"] == 3
    assert manual.verb_help("duplicates").startswith("usage: ssl-kit duplicates EMB [OTHER] [options]")


def test_the_report_of_the_encoders_run_shows_groups_and_outliers(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "encoder0", run / "encoder")
    (run / "run.json").write_text(json.dumps({"encoder_sha256": Encoder.load(run / "encoder").sha256}))
    emb = str(tmp_path / "emb")
    embed(str(run), str(world / "images"), out=emb, layers=4, precision="float32")
    said = duplicates(emb)
    shown = read_run(run).duplicates
    found = [{shown["ids"][place] for place in group} for group in shown["groups"]]
    assert found[0] == {"20 jpeg.png", "20 once more.bmp", "20.png"}  # the largest first
    assert sorted(map(sorted, found)) == sorted(sorted(one["id"] for one in members) for members in said["groups"])
    assert [shown["ids"][place] for place, _ in shown["outliers"]] == [one["id"] for one in said["outliers"]][:12]
    assert (shown["num_images"], shown["num_groups"], shown["superfluous"]) == (70, 9, said["superfluous"])
    write_report([run], tmp_path / "report.html")
    assert "9 groups show the same picture; 10 images could go" in (tmp_path / "report.html").read_text()
    (run / "pictures" / "duplicates.json").unlink()
    (run / "run.json").write_text(json.dumps({"encoder_sha256": "of another"}))  # trained on since
    duplicates(emb)
    duplicates(str(world / "images.emb"))  # of an encoder in no run
    assert not (run / "pictures" / "duplicates.json").exists()
