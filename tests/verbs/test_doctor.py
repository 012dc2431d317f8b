"""`ssl-kit doctor`: the record has what its docstring promises, choices are pretrain's own, rates are rates."""

import json
import time

import numpy as np
import pytest

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import choose_device, choose_precision, choose_threads
from ssl_kit.verbs import doctor as module
from ssl_kit.verbs.doctor import doctor
from ssl_kit.verbs.recipes import packaged

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
    assert set(record["recipes"]) == set(packaged()) and "arXiv" in record["recipes"]["simclr"]
    memory, files = record["speed"]
    assert memory["decode"] is None and memory["loader"] == memory["views"] > 0
    assert files["loader"] == pytest.approx(1 / (1 / files["decode"] + 1 / files["views"]))
    for row in (memory, files):
        assert row["limit"] == ("loader" if row["loader"] < row["step"] else "step")
        assert f"{row['images']}: the {row['limit']} limits training" in printed.err
    assert f"device: {device.value} ({device.reason})" in printed.err and "next: ssl-kit pretrain DATA" in printed.err


def test_without_time_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(module, "_rate", None)  # would fail if it were called
    assert doctor(seconds=0)["speed"] == []
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--seconds"):
            doctor(seconds=wrong)


def test_a_rate_leaves_the_first_call_out_where_there_is_time_for_more(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    seconds = iter([9.0, 1.0, 100.0])

    def work():
        now[0] += next(seconds)

    assert module._rate(work, 10, 10.0) == 10.0  # 10 images in the second of the second call
    assert module._rate(work, 10, 1.0) == 0.1  # one call was all there was time for


def test_the_photographs_are_jpegs_of_their_size_and_no_two_are_alike():
    images, files = module._images(SMALL[1])
    assert {image.shape for image in images} == {(375, 500, 3)} and len(set(files)) == len(files) == len(images)
    assert all(data[:3] == b"\xff\xd8\xff" for data in files) and np.mean([len(data) for data in files]) > 20_000
