"""Packing: bytes that hang on images and options alone, after any interruption; what is stored; training from it."""

import csv
import hashlib
import json
import os
import signal
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from stripes import make, pattern, png

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import Reading
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import pixels
from ssl_kit.embeddings.search import read_file
from ssl_kit.verbs.pack import _keys, pack

TINY = ["--batch-size=64", "--method.encoder.args={channels: [4, 4, 8, 8]}", "--method.projection=[32, 16]"]


@pytest.fixture
def photos(tmp_path):
    """26 images of several sizes in 2 classes, one of them broken."""
    for number in range(26):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pattern(number % 2, number, 24 + 8 * (number % 3))).save(path, quality=95)
    (tmp_path / "photos" / "a" / "08.jpg").write_bytes(png(3)[:60])
    return tmp_path / "photos"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _die_at(number):
    """This process ends at its n-th call that changes a name or what it allows."""
    calls = iter(range(number))

    def dying(real):
        def call(*given, **named):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in ("replace", "unlink", "chmod"):
        setattr(os, name, dying(getattr(os, name)))


def test_a_folder_is_the_same_after_being_killed_at_every_point(photos, tmp_path):
    """A process ends at its n-th call that makes something last, for every n; the next one goes on."""
    options = {"size": 16, "shard_size": "16kB"}
    pack(str(photos), str(tmp_path / "whole"), **options)
    wanted = contents(tmp_path / "whole")
    assert len([name for name in wanted if name.endswith(".tar")]) == 4
    killed, out, kept = 0, tmp_path / "out", []
    while True:
        child = os.fork()
        if child == 0:
            try:
                _die_at(killed % 12 + 1)  # further each time, from what is there
                pack(str(photos), str(out), **options)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        if status == 0:
            break
        killed += 1
        kept.append(len([path for path in out.glob("0*.tar")]) if out.exists() else 0)
        assert killed < 60
    assert contents(out) == wanted and killed > 8 and kept == sorted(kept)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack(str(photos), str(out), **options)["packed"] == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_what_a_packed_folder_holds(photos, tmp_path, capsys):
    record = pack(str(photos), str(tmp_path / "out"), size=16)
    assert (record["images"], record["skipped"], record["shards"]) == (25, 1, 1)
    source, originals = open_source(tmp_path / "out", in_memory=False), open_source(photos, in_memory=False)
    assert source.ids() == [name for name in originals.ids() if name != "a/08.jpg"] and source.classes == ("a", "b")
    assert source.sizes(slice(None)).tolist() == [[16, 16]] * 25
    with open(tmp_path / "out" / "skipped.csv", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", "a/08.jpg"]
    with tarfile.open(tmp_path / "out" / "000000.tar") as file:
        members = file.getmembers()
        assert {(one.mtime, one.uid, one.gid, one.uname, one.mode) for one in members} == {(0, 0, 0, "", 0o644)}
        assert file.extractfile("b/01.cls").read() == b"1"
        table = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()
        for row in table:
            member = file.getmember(row["id"])
            assert (member.offset_data, member.size, row["shard"]) == (row["offset"], row["size"], "000000.tar")
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for name, digest in said["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    info = {"source_root": str(tmp_path / "out")}  # as embeddings name it
    assert read_file(info, "b/01.jpg") == source.content(source.ids().index("b/01.jpg"))
    assert read_file(info, "b/99.jpg") is None


def test_raw_pixels_are_those_of_the_images(tmp_path):
    grey16 = np.random.default_rng(0).integers(0, 2**16, (40, 30), dtype=np.uint16)
    (tmp_path / "deep").mkdir()
    for number in range(3):
        Image.fromarray(np.roll(grey16, number)).save(tmp_path / "deep" / f"{number}.png")
    images = make(tmp_path / "plain", [f"{number}.png" for number in range(3)])
    pack(str(images), str(tmp_path / "raw"), raw=True)
    raw, plain = (open_source(tmp_path / name, in_memory=True) for name in ("raw", "plain"))
    assert np.array_equal(raw.stack[0], plain.stack[0]) and raw.ids() == plain.ids()
    pack(str(tmp_path / "deep"), str(tmp_path / "raw16"), raw=True, channels=1)
    deep = open_source(tmp_path / "raw16", reading=Reading(1), in_memory=True)
    assert np.array_equal(deep.stack[0][1, :, :, 0], np.roll(grey16, 1))
    pack(str(tmp_path / "deep"), str(tmp_path / "small"), raw=True, channels=1, size=15)
    half = pixels(open_source(tmp_path / "small", reading=Reading(1), in_memory=False), 0)
    assert half.dtype == np.uint16 and half.shape == (20, 15, 1) and abs(float(half.mean()) - grey16.mean()) < 500
    with pytest.raises(UserError, match=r"'0.png' has 16 bits and 1 channels, which no JPEG holds: give --raw"):
        pack(str(tmp_path / "deep"), str(tmp_path / "jpeg"), channels=1)
    with pytest.raises(UserError, match="--keep: '00' is no file"):
        pack(np.zeros((12, 8, 8, 3), np.uint8), str(tmp_path / "array"), keep=True)


def test_names_of_samples_differ_and_stay_inside():
    names = ["a/1.jpg", "a/1.png", "a/x.y.jpg", "a/x_y.png", "../../b.png", "/etc/c.png", "07", ".d.png"]
    assert [*_keys(names)] == ["a/1", "a/1__2", "a/x_y", "a/x_y__2", "b", "etc/c", "07", "_d"]


def test_what_cannot_be_packed_is_said(photos, tmp_path):
    out = tmp_path / "out"
    for options, told in (
        ({"raw": True, "keep": True}, "--raw and --keep"),
        ({"quality": 101}, "--quality 101"),
        ({"size": 0}, "--size 0"),
        ({"shard_size": "many"}, "--shard-size many"),
        ({"max_bad": 0.0}, "--max-bad 0 allows none"),
    ):
        with pytest.raises(UserError, match=told):
            pack(str(photos), str(out), **options)
    with pytest.raises(UserError, match=r"was begun otherwise \(size\)"):
        pack(str(photos), str(out), size=16)
    with pytest.raises(UserError, match="other things than shards"):
        pack(str(photos), str(make(tmp_path / "other", ["1.png"])))
    with pytest.raises(UserError, match="lies in the images"):
        pack(str(photos), str(photos / "out"))
    assert cli.main(["pack", str(photos), str(photos / "a"), "--json"]) == 2


def test_training_is_the_same_to_the_bit(photos, tmp_path):
    """From the folder, and from its files in shards."""
    pack(str(photos), str(tmp_path / "kept"), keep=True, shard_size="20kB", max_bad=0.1)
    (photos / "a" / "08.jpg").unlink()
    losses = []
    for name in ("photos", "kept"):
        run = tmp_path / "runs" / name
        options = ["--trainer.max_steps=3", "--image-size=16", "--batch-size=8", *TINY[1:]]
        assert cli.main(["pretrain", str(tmp_path / name), "--run", str(run), *options]) == 0
        with open(run / "metrics.csv", encoding="utf-8") as file:
            losses.append([row["loss"] for row in csv.DictReader(file) if row.get("loss")])
    assert losses[0] and losses[0] == losses[1]


def test_a_shard_that_is_gone_is_made_again_and_what_no_jpeg_holds_is_left_out(photos, tmp_path):
    out = tmp_path / "out"
    pack(str(photos), str(out))
    before = contents(out)
    (out / "000000.tar").unlink()
    assert pack(str(photos), str(out))["packed"] and contents(out) == before
    Image.fromarray(np.zeros((1, 65_501, 3), np.uint8)).save(photos / "wide.png")
    assert pack(str(photos), str(tmp_path / "wide"), max_bad=0.5)["skipped"] == 2  # and the broken one
    assert 'wide.png,"65,501 pixels' in (tmp_path / "wide" / "skipped.csv").read_text()
