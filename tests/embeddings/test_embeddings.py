"""The embeddings folder: exact round trips, damage, and `embed` against a direct forward pass."""

import csv
import json
import os
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pretended import accelerator
from torch import nn

import ssl_kit.embeddings.embeddings as module
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, read_json, sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.embeddings.folder import FORMAT, find_ids, read_rows, read_vectors
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.embed import embed as embed_verb
from ssl_kit.views.recipe import View, plain
from ssl_kit.views.sample import COLUMNS

pretended = pytest.fixture(accelerator)
AWKWARD = ["a/1.png", 'new\nline,"quoted".png', "100%41.png", "%FF.png", "é.png", "e\u0301.png", "😀.png", "-x.png"]


def some(rows=8, dims=5):
    random = np.random.default_rng(0)
    labels = np.arange(rows) % 3 - 1
    ids = [f"{row}/{AWKWARD[row % len(AWKWARD)]}" for row in range(rows)]
    info = {"layers": 2, "encoder_sha256": "abc", "source_root": "/photos"}
    return Embeddings(random.normal(size=(rows, dims)).astype(np.float32), labels, ("cat", "dög"), ids, info)


class Flatten(nn.Module):
    """(B, C, H, W) -> (B, C*H*W) through a batch norm and a dropout, which would show a wrong mode."""

    def __init__(self, values=48):
        super().__init__()
        self.norm = nn.BatchNorm1d(values)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        return self.dropout(self.norm(images.flatten(1)))


def source(count=10, side=4):
    images = np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return open_source((images, np.arange(count) % 2))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (3, 3), (6, 4)])  # as stored, smaller, enlarged and cut
def test_an_accelerator_gets_pixels_as_they_are_stored_and_makes_the_same_features(deep, size, monkeypatch, pretended):
    images = source(count=10)
    if deep:
        pixels = np.random.default_rng(1).integers(0, 65_536, (10, 4, 4, 3), dtype=np.uint16)
        images = open_source((pixels, np.arange(10) % 2))
    encoder, made = Flatten(size[0] * size[1] * 3).train(), {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(module, "_device", lambda encoder, device=device: torch.device(device))
        made[device] = embed(encoder, images, view=plain(size), batch_size=4, precision="float32")
        assert encoder.training
    stored = torch.uint16 if deep else torch.uint8
    assert pretended.sent == {stored: 10 * 48} | ({} if size == (4, 4) else {torch.float32: 10 * COLUMNS})
    assert np.allclose(made["cpu"].vectors, made["cuda"].vectors, atol=1e-6)
    assert made["cpu"].ids == made["cuda"].ids and np.array_equal(made["cpu"].labels, made["cuda"].labels)


def test_what_is_made_at_random_goes_to_an_accelerator_as_views(monkeypatch, pretended):
    monkeypatch.setattr(module, "_device", lambda encoder: torch.device("cuda"))
    mirrored = View((4, 4), flip_x=0.5)
    embed(Flatten(), source(), view=mirrored, batch_size=4, precision="float32")
    assert pretended.sent == {torch.float32: 10 * 48}


@pytest.mark.parametrize("part_rows", [3, 4, 8, 65_536])
def test_round_trip_is_exact(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(module, "PART_ROWS", part_rows)
    before = some()
    before.skipped = [("bad\n,.png", "empty file")]
    after = Embeddings.load(before.save(tmp_path / "EMB"))
    assert np.array_equal(after.vectors, before.vectors) and after.vectors.dtype == np.float32
    assert np.array_equal(after.labels, before.labels) and after.labels.dtype == np.int64
    assert after.ids == before.ids and after.classes == before.classes
    assert after.info["layers"] == 2 and after.info["encoder_sha256"] == "abc" and after.info["skipped"] == 1
    parts = sorted(tmp_path.glob("EMB/part-*.parquet"))
    assert [path.name for path in parts] == [f"part-{n:05d}.parquet" for n in range(-(-8 // part_rows))]
    schema = pq.read_schema(parts[0])
    assert schema.names == ["id", "label", "embedding"]
    assert str(schema.field("embedding").type).startswith("fixed_size_list<") and "[5]" in str(
        schema.field("embedding")
    )
    assert pq.read_table(parts[0])["label"].to_pylist()[:3] == [None, "cat", "dög"]
    with open(tmp_path / "EMB" / "skipped.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["path", "reason"], ["bad\n,.png", "empty file"]]


def test_manifest(tmp_path):
    folder = some().save(tmp_path / "EMB", "float16")
    manifest = read_json(folder / "manifest.json")
    assert {"format": FORMAT, "rows": 8, "dims": 5, "dtype": "float16", "metric": "cosine"}.items() <= manifest.items()
    assert manifest["normalised"] is False and manifest["classes"] == ["cat", "dög"]
    assert manifest["files"] == {name: sha256(folder / name) for name in ("part-00000.parquet", "skipped.csv")}
    Embeddings.load(folder).save(tmp_path / "again", "float16")  # what was read can be written again
    assert read_json(tmp_path / "again" / "manifest.json") == manifest


def test_float16(tmp_path):
    wide = some()
    after = Embeddings.load(wide.save(tmp_path / "EMB", "float16"))
    assert np.array_equal(after.vectors, wide.vectors.astype(np.float16).astype(np.float32))
    wide.vectors[3, 2] = 70_000
    with pytest.raises(UserError, match="7e\\+04, float16 ends at 65,504"):
        wide.save(tmp_path / "EMB2", "float16")
    assert not (tmp_path / "EMB2").exists()


def test_normalised():
    before = some()
    before.vectors[2] = 0
    after = before.normalised()
    lengths = np.linalg.norm(after.vectors, axis=1)
    assert np.allclose(np.delete(lengths, 2), 1, atol=1e-6) and lengths[2] == 0
    assert after.info["normalised"] is True and not before.info.get("normalised")


def test_empty(tmp_path):
    empty = Embeddings(np.zeros((0, 7), np.float32), np.zeros(0, np.int64), (), [])
    assert Embeddings.load(empty.save(tmp_path / "EMB")).vectors.shape == (0, 7)


def damaged(folder, change):
    """Alters the manifest's entries and makes its seal right again: only the reader's own checks are left."""
    manifest = read_sealed(folder / "manifest.json")
    change(manifest)
    write_sealed(folder / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("format", "other"),
        *(("rows", value) for value in (9, 7, -1, 10**12, "8", True)),
        *(("dims", value) for value in (4, 0)),
        *(("dtype", value) for value in ("float16", "object")),
        *(("classes", value) for value in (["cat"], None, [1, 2], ["cat", "dög", "cat"])),
    ],
)
def test_a_manifest_that_disagrees_is_refused(tmp_path, entry, value):
    folder = some().save(tmp_path / "EMB")
    damaged(folder, lambda manifest: manifest.update({entry: value}))
    with pytest.raises(DamagedError):
        Embeddings.load(folder)


def test_damaged_parts_are_named(tmp_path):
    folder = some().save(tmp_path / "EMB")
    part = folder / "part-00000.parquet"
    good = part.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(30):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        part.write_bytes(bad)
        with pytest.raises(DamagedError, match=r"part-00000\.parquet is damaged"):
            Embeddings.load(folder)
    for cut in random.integers(0, len(good), 30):
        part.write_bytes(good[:cut])
        with pytest.raises(DamagedError, match=r"part-00000\.parquet"):
            Embeddings.load(folder, verify=False)
    part.unlink()
    with pytest.raises(DamagedError, match=r"part-00000\.parquet is missing"):
        Embeddings.load(folder)
    with pytest.raises(DamagedError, match=r"no manifest\.json"):
        Embeddings.load(tmp_path)


def mended(folder, **entries):
    """The manifest with its hashes set right, as a stranger would."""
    manifest = read_sealed(folder / "manifest.json") | entries
    manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
    write_sealed(folder / "manifest.json", manifest)


def rewrite(folder, **columns):
    table = pq.read_table(folder / "part-00000.parquet")
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    compression = {"id": "zstd", "label": "zstd", "embedding.list.element": "none"}
    pq.write_table(table, folder / "part-00000.parquet", compression=compression)
    mended(folder)


def test_parts_of_strangers_are_judged(tmp_path):
    import pyarrow as pa

    folder = some().save(tmp_path / "EMB")
    no_text = pa.array([b"\xc0\xff"] * 8).view(pa.string())
    rewrite(folder, id=no_text)
    with pytest.raises(DamagedError, match=r"part-00000\.parquet cannot be read"):
        Embeddings.load(folder)
    with pytest.raises(DamagedError, match="cannot be read"):
        find_ids(folder, read_sealed(folder / "manifest.json"), ["x"])
    with pytest.raises(DamagedError, match="cannot be read"):
        read_rows(folder, read_sealed(folder / "manifest.json"), np.array([1]), "id")
    rewrite(folder, id=pa.array([f"{n}.png" for n in range(8)]))
    vectors = np.ones((8, 5), np.float32)
    vectors[6, 1] = np.nan
    rewrite(folder, embedding=pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 5))
    for read in (Embeddings.load, lambda folder: list(read_vectors(folder, read_sealed(folder / "manifest.json")))):
        with pytest.raises(DamagedError, match=r"1 vectors are NaN or infinite, first '6\.png'"):
            read(folder)


def test_a_manifest_cannot_ask_for_more_than_its_parts_hold(tmp_path):
    folder = some().save(tmp_path / "EMB")
    mended(folder, dims=1_000_000, rows=65_000)
    with pytest.raises(
        DamagedError, match=r"part-00000\.parquet have [\d,]+ bytes; 65,000 vectors of 1000000 float32 take"
    ):
        Embeddings.load(folder)


def test_ids_that_unpack_without_end_are_refused(tmp_path):
    import pyarrow as pa

    folder = some().save(tmp_path / "EMB")
    rewrite(folder, id=pa.array([str(row) * 30_000_000 for row in range(8)]))
    with pytest.raises(DamagedError, match="8 rows of 240,"):
        Embeddings.load(folder)


def test_embed_equals_a_direct_pass_and_leaves_the_encoder_alone():
    net, images = Flatten().train(), source()
    net.dropout.eval()  # frozen by its owner
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    got = embed(net, images, view=plain((4, 4)), batch_size=3, precision="float32")
    pixels = torch.from_numpy(images.stack[0]).permute(0, 3, 1, 2).float() / 255
    expected = pixels.flatten(1).numpy() / np.sqrt(1 + net.norm.eps)  # running mean 0, variance 1
    assert np.allclose(got.vectors, expected, atol=1e-6)
    assert got.ids == images.ids() and np.array_equal(got.labels, images.labels()) and got.classes == ("0", "1")
    assert net.training and net.norm.training and not net.dropout.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not any(parameter.grad is not None for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size_or_threads(batch_size):
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16))
    images = source(20, 20)
    one = embed(encoder, images, batch_size=20, precision="float32")
    other = embed(encoder, images, batch_size=batch_size, precision="float32", threads=3)
    assert np.allclose(one.vectors, other.vectors, rtol=1e-5, atol=1e-6)
    assert one.info["encoder_sha256"] is None and one.info["precision"] == "float32"


def test_bfloat16_stays_close():
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16))
    exact, fast = (embed(encoder, source(20, 20), precision=p).vectors for p in ("float32", "bfloat16"))
    cosines = (exact * fast).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(fast, axis=1)
    assert cosines.min() > 0.999 and not np.array_equal(exact, fast)


def test_layers_are_concatenated():
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16)).eval()
    assert embed(encoder, source(), layers=2).vectors.shape == (10, 32)


def photographs(folder, count=12):
    folder.mkdir()
    for n in range(count):
        Image.fromarray(np.full((9 + n, 12, 3), 20 * n, np.uint8)).save(folder / f"{n:02d}.png")
    with open(os.fsencode(folder) + b"/x\xff.png", "wb") as file:
        file.write((folder / "00.png").read_bytes())
    (folder / "05 bad.png").write_bytes(b"nothing")
    return folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_undecodable_rows_are_dropped_and_reported(tmp_path, in_memory):
    images = open_source(photographs(tmp_path / "photos"), in_memory=in_memory, max_bad=0.2)
    got = embed(Flatten(), images, view=plain((4, 4)), batch_size=4, precision="float32")
    assert got.ids == [*(f"{n:02d}.png" for n in range(12)), "x%FF.png"]
    assert [name for name, _ in got.skipped] == ["05 bad.png"]
    grey = np.array([*(20 * n for n in range(12)), 0])[:, None] / 255 / np.sqrt(1 + 1e-5)
    assert np.allclose(got.vectors, np.broadcast_to(grey, (13, 48)), atol=1e-4)


def test_too_many_undecodable_files_stop(tmp_path):
    images = open_source(photographs(tmp_path / "photos"), in_memory=False)
    with pytest.raises(UserError, match="1 of 14 images could not be decoded"):
        embed(Flatten(), images, view=plain((4, 4)))


def test_diverged_encoders_are_refused():
    net = Flatten()
    net.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite features for '0'"):
        embed(net, source(), view=plain((4, 4)))


# --- the verb


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 16))
    return encoder.save(tmp_path_factory.mktemp("run") / "encoder")


def test_the_verb_writes_a_folder_and_says_what_is_next(tmp_path, encoder_folder, capsys):
    photos, out = photographs(tmp_path / "photos"), tmp_path / "E M B"
    said = embed_verb(
        str(encoder_folder.parent), str(photos), out=str(out), max_bad=0.1, normalise=True, dtype="float16"
    )
    json.dumps(said)
    text, first = capsys.readouterr().out, Embeddings.load(out).ids[0]
    assert text.rstrip().endswith(f"next: ssl-kit search '{out}' {shlex.quote(first)} -k 12") and "images/s" in text
    saved = Embeddings.load(out)
    assert said["rows"] == len(saved) == 13 and said["skipped"] == 1 and said["dims"] == 16
    assert np.allclose(np.linalg.norm(saved.vectors, axis=1), 1, atol=1e-3)
    assert saved.info["encoder_sha256"] == sha256(encoder_folder / "model.safetensors") == said["encoder_sha256"]
    assert saved.info["encoder"] == str(encoder_folder.resolve())
    assert saved.info["source_root"] == str(photos.resolve()) and saved.info["normalised"]
    assert "05 bad.png" in (out / "skipped.csv").read_text()


def test_the_verb_never_replaces_what_it_did_not_write(tmp_path, encoder_folder):
    photos = photographs(tmp_path / "photos")
    arguments = {"data": "digits", "limit": 20}
    with pytest.raises(UserError, match="exists: choose another --out, or replace it with --overwrite"):
        embed_verb(str(encoder_folder), out=str(photos), **arguments)
    for there in (photos, encoder_folder, photos / "00.png"):
        with pytest.raises(UserError, match=r"not an embeddings folder|is a file"):
            embed_verb(str(encoder_folder), out=str(there), overwrite=True, **arguments)
    assert len(list(photos.iterdir())) == 14 and (encoder_folder / "model.safetensors").exists()
    out = str(tmp_path / "EMB")
    embed_verb(str(encoder_folder), out=out, **arguments)
    (tmp_path / "EMB" / "index.faiss").write_bytes(b"an index that no manifest lists")
    assert embed_verb(str(encoder_folder), "digits", out=out, limit=10, overwrite=True)["rows"] == 10
    assert (tmp_path / "EMB" / "index.faiss").exists()
