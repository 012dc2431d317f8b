"""What a time pays for: a ladder of networks and views, tried on throw-away weights."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.files import read_json
from ssl_kit.data.opening import open_source
from ssl_kit.methods.distillation import Distillation
from ssl_kit.verbs import budget
from ssl_kit.verbs.budget import Rung, fit_to_time
from ssl_kit.verbs.defaults import method_class
from ssl_kit.verbs.pretrain import Settings

SIMCLR, MAE, VAE = (f"ssl_kit.methods.{name}" for name in ("simclr.SimCLR", "mae.MAE", "vae.VAE"))


def spec(path=SIMCLR, **encoder):
    return {"class_path": path, "init_args": {"encoder": encoder}}


@pytest.fixture
def never_enough(monkeypatch):
    """The cheapest rung is taken, however fast the machine is."""
    monkeypatch.setattr(budget, "_IMAGES", 10**12)
    monkeypatch.setattr(budget, "_EPOCHS", 10**12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(48):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def rungs(size, **given):
    return budget._ladder(Settings("x", minutes=1, **given), (size, size))


def test_the_ladder_of_small_images_in_full():
    wide, narrow = (
        ("resnet18_small", {"channels": [32, 64, 128, 256]}),
        ("resnet18_small", {"channels": [16, 32, 64, 128]}),
    )
    halved = ("resnet18_small", {**narrow[1], "stem_stride": 2})
    assert rungs(64) == [
        Rung((64, 64), (32, 48), halved),
        Rung((64, 64), (32, 48), narrow),
        Rung((64, 64), (32, 48), wide),
        Rung((64, 64), None, wide),
    ]
    assert {rung.size for rung in rungs(28)} == {(28, 28)} and rungs(28)[0].sides == (16,)
    assert [rung.encoder for rung in rungs(32)] == [narrow, wide, wide]
    assert [rung.size[0] for rung in rungs(128)] == [64, 64, 64, 128, 128]  # large images have networks of one width
    assert [rung.size[0] for rung in rungs(96)] == sorted(rung.size[0] for rung in rungs(96))


def test_what_is_typed_is_in_every_rung():
    assert {rung.size for rung in rungs(64, image_size=64)} == {(64, 64)}
    assert {rung.sides for rung in rungs(64, grow={0: 40, 3: 56})} == {(40, 56)}
    mine = spec(name="resnet18_small", args={"channels": [8, 16, 32, 64]})
    assert {rung.encoder for rung in rungs(64, method=mine)} == {None}
    assert len(rungs(64, method=spec(name="auto"))) == 4
    assert {rung.size for rung in rungs(64, init="timm:resnet18")} == {(64, 64)}
    settings = Settings("x", minutes=1, image_size=(64, 64), method=mine, grow={0: 40})
    assert Rung((64, 64), (40,), None).applied(settings) == settings


@pytest.mark.parametrize(("enough", "wanted"), [(0, -1), (10**12, 0)])
def test_the_largest_rung_that_promises_enough_is_taken_and_else_the_cheapest(folder, monkeypatch, enough, wanted):
    monkeypatch.setattr(budget, "_IMAGES", enough)
    monkeypatch.setattr(budget, "_EPOCHS", 10**12)
    monkeypatch.setattr(budget, "_SHARE", 1.0)
    monkeypatch.setattr(budget, "_MOST", 100.0)
    settings = Settings(str(folder), minutes=100, batch_size=8)
    source = open_source(str(folder))
    ladder = budget._ladder(settings, (64, 64))[:3]
    number, sides, seconds = budget._climb(settings, source, ladder, 6000.0, 8, len(source))
    assert number == range(len(ladder))[wanted]
    assert tuple(sides) == (ladder[number].sides or ()) and len(seconds) == max(1, len(sides)) and min(seconds) > 0


@pytest.mark.parametrize(("path", "grows"), [(SIMCLR, True), (MAE, False), (VAE, False)])
def test_views_grow_where_the_method_takes_smaller_ones(folder, never_enough, path, grows):
    settings = Settings(str(folder), minutes=0.2, batch_size=8, method=spec(path, name="auto"))
    chosen, pace = fit_to_time(settings, open_source(str(folder)), 0.0)
    assert chosen.image_size == (64, 64) and bool(chosen.grow) == grows
    if grows:
        first, second = sorted(chosen.grow)
        assert [chosen.grow[first], chosen.grow[second]] == [32, 48]
        assert sorted(pace.seconds) == [0, second * 6]  # 48 images in steps of 8
    name, args = method_class(path).smaller_encoder((64, 64), 2)
    assert chosen.method == spec(path, name=name, args=args)
    assert replace(chosen, grow=None, image_size=None, method=settings.method) == settings  # nothing else was touched


@pytest.mark.parametrize("grow", [{2: 48, 0: 32}, {5: 48}])
def test_views_that_are_typed_cost_what_they_cost_from_their_epoch_on(folder, never_enough, monkeypatch, grow):
    pixels = lambda learner, views, count, precision, device: count * views[0].size[0] * views[0].size[1] * 1e-7
    monkeypatch.setattr(budget, "_step_seconds", pixels)  # a clock would say now this, now that
    settings = Settings(str(folder), minutes=0.5, batch_size=8, image_size=(64, 64), grow=grow)
    chosen, pace = fit_to_time(settings, open_source(str(folder)), 0.0)
    assert chosen.grow == grow and list(pace.seconds) == [0, 6 * max(grow)]
    first, second = pace.seconds.values()
    assert (first < second) == (0 in grow) and pace.work(3) > 0  # 32 before 48 px, or 64 before 48


def test_a_network_of_one_size_refuses_views_that_grow_in_its_own_words(folder, tmp_path, capsys):
    command = ["pretrain", str(folder), "--run", str(tmp_path / "run"), "-c", "mae", "--minutes", "0.2"]
    assert cli.main([*command, "--batch-size", "8", "--grow", "{0: 32, 3: 48}"]) == 2
    assert "takes images of 64 x 64 only; leave --grow out" in capsys.readouterr().err


def test_a_run_by_minutes_writes_its_choice_down_and_its_epochs_repeat_it(folder, never_enough, tmp_path, capsys):
    timed, again = str(tmp_path / "timed"), str(tmp_path / "again")
    options = {"batch_size": 16, "threads": 1, "evaluate_every": 1000}
    ssl_kit.pretrain(str(folder), run=timed, minutes=0.15, **options)
    told = capsys.readouterr().out
    recipe = yaml.safe_load((tmp_path / "timed" / "recipe.yaml").read_text())
    assert (
        tuple(recipe["image_size"]) == (64, 64) and recipe["method"]["init_args"]["encoder"]["args"]["stem_stride"] == 2
    )
    record = read_json(tmp_path / "timed" / "run.json")
    epochs = re.findall(r"--epochs ([\d.]+) (?:repeats|makes)", told)[-1]
    assert round(float(epochs) * 3) == record["steps"]
    if "steps_fitted" in record:  # the clock of a busy machine; then no run by epochs is the same
        assert "not to the bit" in told
        return
    command = ["pretrain", str(folder), "--run", again, "-c", str(tmp_path / "timed" / "recipe.yaml")]
    assert cli.main([*command, "--epochs", epochs, "--threads", "1"]) == 0
    assert read_json(tmp_path / "again" / "run.json")["encoder_sha256"] == record["encoder_sha256"]


def test_a_run_without_a_length_says_how_long_it_takes(folder, capsys):
    settings, pace = fit_to_time(Settings(str(folder), batch_size=8), open_source(str(folder)), 0.0)
    assert pace is None and settings.image_size is None and settings.epochs >= 100
    assert "this takes about" in (told := capsys.readouterr().out) and "--minutes" in told


@pytest.mark.parametrize(("cache", "asked"), [(True, 0), (False, 3)])
def test_what_a_teacher_says_once_is_no_cost_of_a_step(folder, monkeypatch, cache, asked):
    ask, sizes = Distillation._taught, []
    monkeypatch.setattr(Distillation, "_taught", lambda self, images: sizes.append(len(images)) or ask(self, images))
    method = {"class_path": f"{Distillation.__module__}.Distillation", "init_args": {"cache": cache}}
    settings = Settings("x", image_size=(32, 32), batch_size=16, method=method)
    assert 0 < budget.step_cost(settings, open_source(str(folder)), 16) < 1  # 1: it could not be tried
    assert sizes == asked * [16]
