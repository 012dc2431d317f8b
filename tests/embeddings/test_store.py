"""Embedding part by part: bytes equal to one pass, after any interruption, by any shards; bounded memory; refusals."""

import csv
import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import ssl_kit.embeddings.embeddings as module
from ssl_kit.core import files
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, read_json
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.embeddings import embed as embed_at_once
from ssl_kit.embeddings.folder import find_ids, part_names, read_rows, read_vectors
from ssl_kit.embeddings.store import Shard, embed_to, parse_shard
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.embed import embed

PART, IMAGES = 5, 23  # 5 parts, the last one shorter
BAD = (7, 10, 11, 12, 13, 14)  # one in the second part, all of the third


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", PART)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (8, 8))
    return encoder.save(tmp_path_factory.mktemp("run") / "encoder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """23 images in 2 classes, 6 of them broken, one with a name that is not UTF-8."""
    root = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for number in range(IMAGES):
        path = root / "ab"[number >= 12] / f"{number:02d}.png"
        if number in BAD:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(random.integers(0, 256, (10, 9, 3), dtype=np.uint8)).save(path)
    os.rename(root / "b" / "22.png", os.fsencode(root) + b"/b/22\xff.png")
    return root


@pytest.fixture
def run(encoder_folder, photos):
    """Embeds the photographs to a folder with the verb."""

    def run(out, **options):
        options = {"max_bad": 0.5, "batch_size": 2, "precision": "float32"} | options
        return embed(str(encoder_folder), str(photos), out=str(out), **options)

    return run


@pytest.fixture
def undisturbed(run, tmp_path):
    run(tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_parts_hold_what_one_pass_gives(run, tmp_path, encoder_folder, photos):
    said = run(tmp_path / "EMB")
    wanted = embed_at_once(
        Encoder.load(encoder_folder),
        open_source(photos, in_memory=False, max_bad=0.5),
        batch_size=2,
        precision="float32",
    )
    got = Embeddings.load(tmp_path / "EMB")
    assert np.array_equal(got.vectors, wanted.vectors) and np.array_equal(got.labels, wanted.labels)
    assert got.ids == wanted.ids and got.ids[-1] == "b/22%FF.png" and got.classes == wanted.classes == ("a", "b")
    assert said["rows"] == len(got) == IMAGES - len(BAD) and said["complete"] and said["skipped"] == len(BAD)
    rows = {name: len(pq.read_table(tmp_path / "EMB" / name)) for name in part_names(got.info)}
    assert list(rows.values()) == [5, 4, 5, 3] and "part-00002.parquet" not in rows  # blocks of source rows
    with open(tmp_path / "EMB" / "skipped.csv", newline="", encoding="utf-8") as file:
        assert [row[0][2:4] for row in list(csv.reader(file))[1:]] == [f"{row:02d}" for row in BAD]


def test_normalised_float16_and_layers_are_stated(run, tmp_path):
    run(tmp_path / "EMB", normalise=True, dtype="float16", layers=2)
    got = Embeddings.load(tmp_path / "EMB")
    assert got.vectors.shape[1] == 16 and np.allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=2e-3)
    assert (got.info["normalised"], got.info["dtype"], got.info["layers"]) == (True, "float16", 2)


def test_shards_give_the_bytes_of_one_run_in_any_order(run, tmp_path, undisturbed):
    order = ["2/3", "0/3", "1/3"]
    for number, shard in enumerate(order):
        said = run(tmp_path / "EMB", shard=shard)
        assert said["complete"] == (number == 2)
        assert (tmp_path / "EMB" / "manifest.json").exists() == said["complete"]
    assert contents(tmp_path / "EMB") == undisturbed
    assert run(tmp_path / "EMB", shard="0/3")["embedded"] == 0  # an array job may be sent again


def test_shards_made_apart_are_merged_by_copying(run, tmp_path, undisturbed):
    for shard in range(2):
        run(tmp_path / f"EMB{shard}", shard=f"{shard}/2")
        for path in (tmp_path / f"EMB{shard}").iterdir():
            (tmp_path / "both").mkdir(exist_ok=True)
            (tmp_path / "both" / path.name).write_bytes(path.read_bytes())
    assert run(tmp_path / "both")["embedded"] == 0
    assert contents(tmp_path / "both") == undisturbed


def test_an_interruption_at_any_write_changes_nothing(run, tmp_path, undisturbed, monkeypatch):
    """The process is stopped before the n-th time that a file is made safe, for every n."""
    sync, interrupted = files.sync, 0
    while True:
        left = [interrupted]

        def stop(path, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            sync(path)

        monkeypatch.setattr(files, "sync", stop)
        out = tmp_path / f"EMB{interrupted}"
        try:
            run(out)
            break
        except KeyboardInterrupt:
            assert not (out / "manifest.json").exists() or interrupted > 20
        monkeypatch.setattr(files, "sync", sync)
        (out / ".part-00001.parquet.abcdefgh.tmp").write_bytes(b"left by a killed writer")
        run(out)
        assert contents(out) == undisturbed, interrupted
        interrupted += 3
    assert interrupted > 20


def test_what_is_left_between_manifest_and_tidying_is_removed(run, tmp_path, undisturbed):
    run(tmp_path / "EMB")
    for name in ("plan.json", "part-00001.json", ".manifest.json.abcdefgh.tmp"):
        (tmp_path / "EMB" / name).write_text("{}")
    assert run(tmp_path / "EMB")["embedded"] == 0
    assert contents(tmp_path / "EMB") == undisturbed


def test_a_killed_process_leaves_what_the_next_one_needs(run, tmp_path, undisturbed, encoder_folder, photos):
    code = (
        "import ssl_kit.embeddings.embeddings as module; from ssl_kit.verbs.embed import embed; import time\n"
        f"module.PART_ROWS = {PART}\n"
        "forward = module.forward\n"
        "module.forward = lambda *arguments: (time.sleep(0.2), forward(*arguments))[1]\n"
        f"embed({str(encoder_folder)!r}, {str(photos)!r}, out={str(tmp_path / 'EMB')!r}, max_bad=0.5, batch_size=2,"
        " precision='float32')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    record = tmp_path / "EMB" / "part-00000.json"
    while process.poll() is None and not record.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and record.exists()
    with pytest.raises(DamagedError, match="no manifest"):
        Embeddings.load(tmp_path / "EMB")
    assert 0 < run(tmp_path / "EMB")["embedded"] < IMAGES
    assert contents(tmp_path / "EMB") == undisturbed


def test_memory_does_not_grow_with_the_number_of_parts(encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 256)
    encoder = Encoder.load(encoder_folder)

    def peak(count):
        images = np.zeros((count, 8, 8, 3), dtype=np.uint8)
        source = open_source(images)
        place = tmp_path / f"EMB{count}-{len(list(tmp_path.iterdir()))}"
        gc.collect()
        tracemalloc.start()
        embed_to(place, encoder, source, batch_size=256, layers=4)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    _, small, large = (peak(count) for count in (256, 512, 4_096))  # the first one also imports and compiles
    large = min(large, peak(4_096))  # what happens to be freed late differs by 40 kB
    vectors = 4_096 * 24 * 4  # bytes of all features
    assert large - small < vectors / 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 4}, "batch_size 2, now 4"),
        ({"dtype": "float16"}, "dtype float32, now float16"),
        ({"normalise": True}, "normalised False, now True"),
        ({"layers": 2}, "layers 1, now 2"),
        ({"limit": 20}, "images 23, now 20"),
    ],
)
def test_other_settings_do_not_mix(run, tmp_path, options, told):
    run(tmp_path / "EMB", shard="0/2")
    with pytest.raises(UserError, match=f"was begun otherwise .*{told}.*--overwrite"):
        run(tmp_path / "EMB", shard="1/2", **options)
    run(tmp_path / "EMB", shard="1/2")
    with pytest.raises(UserError, match="was begun otherwise"):  # a finished folder likewise
        run(tmp_path / "EMB", **options)


def test_overwriting_starts_anew_and_keeps_what_no_plan_names(run, tmp_path):
    run(tmp_path / "EMB", shard="0/2")
    with pytest.raises(UserError, match="--overwrite with --shard"):
        run(tmp_path / "EMB", shard="1/2", overwrite=True)
    (tmp_path / "EMB" / "index.faiss").write_bytes(b"old")
    (tmp_path / "EMB" / "notes.txt").write_text("the user's own")
    assert run(tmp_path / "EMB", overwrite=True, dtype="float16")["embedded"] == IMAGES
    assert (tmp_path / "EMB" / "index.faiss").read_bytes() == b"old" and (tmp_path / "EMB" / "notes.txt").exists()


def test_a_damaged_part_is_named_before_it_counts(run, tmp_path):
    run(tmp_path / "EMB", shard="0/2")
    part = tmp_path / "EMB" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match=r"part-00000\.parquet is damaged"):
        run(tmp_path / "EMB")
    part.unlink()
    assert run(tmp_path / "EMB")["complete"]  # a record without its part counts for nothing


def test_bad_files_of_earlier_calls_count(run, tmp_path):
    run(tmp_path / "EMB", shard="0/2", max_bad=0.23)  # 5 of 23 are bad, 0.217
    with pytest.raises(UserError, match=r"6 of 23 images could not be decoded, more than the 23%"):
        run(tmp_path / "EMB", shard="1/2", max_bad=0.23)
    assert not (tmp_path / "EMB" / "manifest.json").exists()


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "1/", "/2", "1/2/3"])
def test_shards_are_checked(text):
    with pytest.raises(UserError, match="wanted i/N"):
        parse_shard(text)


def test_shards_are_told_apart():
    assert parse_shard("3/4") == Shard(3, 4)


def test_reading_by_parts(run, tmp_path):
    run(tmp_path / "EMB")
    whole, info = Embeddings.load(tmp_path / "EMB"), read_json(tmp_path / "EMB" / "manifest.json")
    assert np.array_equal(np.concatenate(list(read_vectors(tmp_path / "EMB", info))), whole.vectors)
    rows = np.array([[16, 3], [5, -1]])
    assert read_rows(tmp_path / "EMB", info, rows, "id") == {row: whole.ids[row] for row in (3, 5, 16)}
    vectors = read_rows(tmp_path / "EMB", info, rows, "embedding")
    assert all(np.array_equal(vectors[row], whole.vectors[row]) for row in (3, 5, 16))
    assert find_ids(tmp_path / "EMB", info, ["b/22%FF.png", "nothing", whole.ids[4]]) == {
        "b/22%FF.png": 16,
        whole.ids[4]: 4,
    }
    with pytest.raises(DamagedError, match="row 17 was asked for"):
        read_rows(tmp_path / "EMB", info, np.array([17]), "id")
    with pytest.raises(DamagedError, match="says 18 rows"):
        list(read_vectors(tmp_path / "EMB", info | {"rows": 18}))
