"""`ssl-kit doctor`: the record has what its docstring promises, choices are pretrain's own, rates are rates."""

import json

import numpy as np
import pytest
import torch

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Choice, choose_device, choose_precision, choose_threads
from ssl_kit.data import loader, sources
from ssl_kit.data.decode import decode
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs import doctor as module
from ssl_kit.verbs.doctor import doctor
from ssl_kit.views.device import DeviceViews

SMALL = (
    module.Subject("16 px, in memory", 16, False, "resnet18_small", {"channels": [8, 8, 8, 8]}, 4),
    module.Subject("32 px, JPEG files", 32, True, "resnet18_small", {"channels": [8, 8, 8, 8]}, 4),
)


@pytest.fixture(autouse=True)
def small_subjects(monkeypatch):
    monkeypatch.setattr(module, "SUBJECTS", SMALL)


def test_the_record_and_the_text_say_the_same(capsys):
    assert cli.main(["doctor", "--seconds", "0.1", "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["versions"]["ssl_kit"] == ssl_kit.__version__ and record["versions"]["torch"]
    device = choose_device()
    assert record["chosen"]["device"] == device._asdict()
    assert record["chosen"]["precision"] == choose_precision("auto", device.value)._asdict()
    assert record["chosen"]["threads of the loader"] == choose_threads(device.value)._asdict()
    assert 0 < record["machine"]["memory_available"] <= record["machine"]["memory"] and record["machine"]["cores"] >= 1
    memory, files = record["speed"]
    assert memory["decode"] is None and memory["loader"] == memory["views"] > 0
    assert min(files[name] for name in ("decode", "views", "loader")) > 0
    for row in (memory, files):
        assert row["limit"] == ("loader" if row["loader"] < row["step"] else "step")
        assert f"{row['images']}: the {row['limit']} limits training" in printed.err
    assert (
        f"device: {device.value} ({device.reason})" in printed.err
        and "next: ssl-kit pretrain digits --minutes 1" in printed.err
    )


def test_without_time_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(module, "_rate", None)  # would fail if it were called
    assert doctor(seconds=0)["speed"] == []
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--seconds"):
            doctor(seconds=wrong)


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 2), (1.0, 4), (20.0, 21)])
def test_the_call_that_compiles_is_in_no_figure(seconds, calls):
    """A clock that only work moves: a minute for the first call, then 1.5 s once, and a second each."""
    now, made = [0.0], []

    def work():
        made.append({0: 60.0, 2: 1.5}.get(len(made), 1.0))
        now[0] += made[-1]

    assert module._rate(work, 10, seconds, lambda: now[0]) == 10.0  # images in the second of a usual call
    assert len(made) == calls


def test_every_figure_is_of_calls_after_a_first(monkeypatch):
    measured = []

    def rate(work, count, seconds):
        work()
        measured.append(getattr(work, "func", work).__name__)
        return float(len(measured))

    monkeypatch.setattr(module, "_rate", rate)
    memory, files = doctor(seconds=5)["speed"]
    assert measured == ["_load", "step", "_load", "_decode", "_load", "step"]
    assert (memory["views"], memory["loader"], memory["step"]) == (1, 1, 2)
    assert (files["views"], files["decode"], files["loader"], files["step"]) == (3, 4, 5, 6)


def test_files_are_decoded_as_training_decodes_them(tmp_path, monkeypatch):
    """The same sizes of the same files: the finest crop of an image's two views decides."""
    sizes, decode_file = {"training": [], "doctor": []}, decode

    def noting(who):
        def noted(*args, **options):
            sizes[who].append(decode_file(*args, **options)[0].shape)
            return decode_file(*args, **options)

        return noted

    monkeypatch.setattr(sources, "decode", noting("doctor"))
    monkeypatch.setattr(loader, "decode", noting("training"))
    _, files = module._sources(SMALL[1], tmp_path)
    plan = np.split(np.arange(64), 4)
    module._decode(files, plan, SMALL[1], 1)
    module._load(files, plan, SMALL[1], 1, None)
    assert sorted(sizes["doctor"]) == sorted(sizes["training"]) and len(set(sizes["doctor"])) > 1


@pytest.mark.parametrize("place", ["cpu", None])
def test_views_are_made_where_training_makes_them(place, tmp_path, monkeypatch):
    """On a device those of images of one size in memory, and what is left to do to the crops of others."""
    made, plan, make = [], np.split(np.arange(8), 2), DeviceViews.__call__
    note = lambda self, images, *args, cropped: (
        made.append((len(images), cropped)) or make(self, images, *args, cropped=cropped)
    )
    monkeypatch.setattr(DeviceViews, "__call__", note)
    memory, (photographs, files) = module._sources(SMALL[0], tmp_path)[0], module._sources(SMALL[1], tmp_path)
    for source, subject in ((memory, SMALL[0]), (photographs, SMALL[1]), (files, SMALL[1])):
        module._load(source, plan, subject, 1, place)
    assert made == ([(4, False)] * 4 + [(4, True)] * 8 if place else [])


def test_the_step_is_laid_out_as_training_chooses(monkeypatch):
    """Where channels_last would end the process, the doctor does not measure it."""
    formats = []
    loss = SimCLR.loss
    monkeypatch.setattr(
        module.SimCLR, "loss", lambda self, views, key: formats.append(views[0]) or loss(self, views, key)
    )
    for kept in (True, False):
        monkeypatch.setattr(module, "choose_channels_last", lambda network, device, kept=kept: Choice(kept, ""))
        module._step(SMALL[0], 4, "cpu", "float32")()
        assert formats[-1].is_contiguous(memory_format=torch.channels_last) is kept


def test_the_photographs_are_jpegs_of_their_size_and_no_two_are_alike(tmp_path):
    stored, files = module._sources(SMALL[1], tmp_path)
    data, images = files.read(slice(None)), stored.read(slice(None))
    assert {image.shape for image in images} == {(375, 500, 3)} and len(set(data)) == len(data) == 64
    assert all(one[:3] == b"\xff\xd8\xff" for one in data) and np.mean([len(one) for one in data]) > 20_000
