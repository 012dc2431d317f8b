"""Labels and parts as people write them, alike from every kind of source; and whether images are the same as before."""

import csv
import os
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.data.fingerprint import difference, fingerprint
from ssl_kit.data.labels import encode, part_of
from ssl_kit.data.opening import open_labelled, open_source

CAFE = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def images(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 7 * number % 256, np.uint8)).save(root / name)


def table(path, rows, **options):
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["a", "", "NaN", "nan", "None", None, float("nan"), "b"], [0, -1, -1, -1, -1, -1, -1, 1], ("a", "b")),
        ([0.0, 2.0, float("nan"), 10.0], [0, 1, -1, 2], ("0", "2", "10")),
        (["0.0", "2.0", "", "10.0"], [0, 1, -1, 2], ("0", "2", "10")),  # as pandas writes integers with gaps
        ([0, 1, -1, 1], [0, 1, -1, 1], ("0", "1")),
        (["-1", "0", "-1"], [-1, 0, -1], ("0",)),
        (["-1", "-2", "3"], [1, 0, 2], ("-2", "-1", "3")),  # numbers of another kind
        (["-1", "cat", "dog"], [0, 1, 2], ("-1", "cat", "dog")),
        (["cat ", "cat", " cat"], [0, 0, 0], ("cat",)),
        ([*CAFE, "tea"], [0, 0, 1], (CAFE[0], "tea")),
        (["nanny", "Nan", "none"], [1, 0, 2], ("Nan", "nanny", "none")),
        ([True, False, None], [1, 0, -1], ("False", "True")),
        ([np.int64(3), np.float32(4)], [0, 1], ("3", "4")),
        ([b"x", "x"], [0, 0], ("x",)),
    ],
)
def test_what_is_a_class_and_what_is_unknown(names, labels, classes):
    got, found = encode(names, "set")
    assert got.tolist() == labels and found == classes


def test_what_was_taken_for_unknown_or_joined_is_said(capsys):
    encode(["a", "NaN", "NaN", "-1"], "set")
    assert capsys.readouterr().out == "set: no label is what 'NaN' 2 times stands for\n"
    encode(["1", "-1", None, ""], "set")
    assert capsys.readouterr().out == "set: no label is what '-1' 1 times stands for\n"
    encode([*CAFE, "cat ", "cat"], "set")
    told = capsys.readouterr().out
    assert "one class each" in told and "'cat', 'cat '" in told and "'cafe\\u0301', 'caf\\xe9'" in told
    encode(["None", "-1"], "set", folders=True)
    assert capsys.readouterr().out == ""


def test_the_same_labels_from_every_kind_of_source(tmp_path):
    names = ["cat", "dog ", "", "dog", "NaN", "cat"]
    images(tmp_path, [f"{n}.png" for n in range(6)])
    paths = [f"{n}.png" for n in range(6)]
    text = table(tmp_path / "a.csv", [["path", "label"], *zip(paths, names, strict=True)])
    nulls = [name if name not in ("", "NaN") else None for name in names]
    pq.write_table(pa.table({"path": paths, "label": nulls}), tmp_path / "a.parquet")
    pixels = np.zeros((6, 8, 8, 3), np.uint8)
    for data in (text, tmp_path / "a.parquet", (pixels, np.array(names, object)), (pixels, np.array(names))):
        source = open_source(data)
        assert source.labels().tolist() == [0, 1, -1, 1, -1, 0] and source.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([["path", "label"]], {"delimiter": ";"}, "separated by ';'"),
        ([["file_name", "class"]], {"delimiter": "\t"}, "'file_name' holds the paths, 'class' the labels"),
        ([["Image Path", "Category"]], {"encoding": "utf-16"}, "in UTF-16"),
        ([["label", "Path"]], {}, "'Path' holds the paths"),
        ([["id", "target", "filename"]], {"delimiter": "|"}, "'filename' holds the paths, 'target' the labels"),
    ],
)
def test_separator_encoding_and_columns_are_found_and_said(tmp_path, capsys, rows, options, said):
    images(tmp_path, ["0.png", "1.png"])
    cells = {"path": ["0.png", "1.png"], "label": ["a", CAFE[0]], "id": ["7", "8"]}
    kind = lambda name: "path" if "ath" in name or "file" in name else "id" if name == "id" else "label"
    columns = [cells[kind(name)] for name in rows[0]]
    path = table(tmp_path / "list.csv", [*rows, *zip(*columns, strict=True)], **options)
    source = open_source(path)
    assert source.classes == ("a", CAFE[0]) and source.ids() == ["0.png", "1.png"] and said in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_that_are_no_labels_are_named(tmp_path, capsys, ending):
    images(tmp_path, ["0.png", "1.png"])
    columns = {"path": ["0.png", "1.png"], "species": ["a", "b"], "split": ["train", "test"], "site": [1, 2]}
    path = tmp_path / f"list.{ending}"
    table(path, [list(columns), *zip(*columns.values(), strict=True)])
    if ending == "parquet":
        pq.write_table(pa.table(columns), path)
    why = "as none is called label (or class, class_name, category, target ...); if 'species', 'site' holds them, "
    assert open_source(path).classes == () and f"{path}: no labels, {why}" in capsys.readouterr().out
    for opened in (open_labelled, lambda path: open_source(path, labelled=True), lambda path: open_labelled([path])):
        with pytest.raises(UserError, match=re.escape(f"has no labels, {why}")):
            opened(path)


def test_a_table_is_read_once(tmp_path, capsys):
    images(tmp_path, [f"{n}.png" for n in range(8)])
    rows = [(f"{n}.png", "ab"[n % 2], n // 2) for n in range(8)]
    open_labelled(table(tmp_path / "list.csv", [["file", "class", "group"], *rows], delimiter=";"))
    said = capsys.readouterr().out
    assert said.count("the column 'file' holds the paths") == said.count("the column 'group' holds") == 1


def test_tables_of_windows(tmp_path, capsys):
    images(tmp_path, ["café.png", "1.png"])
    odd = b"\xe9.png"  # a name whose bytes are no UTF-8
    os.rename(tmp_path / "1.png", bytes(tmp_path) + b"/" + odd)
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9.png,th\xe9\n" + odd + b",b\n")
    source = open_source(tmp_path / "list.csv", in_memory=False)
    assert source.ids() == ["café.png", "%E9.png"] and source.classes == ("b", "thé")
    assert all(isinstance(stored, bytes) for stored in source.read([0, 1]))
    assert "1 rows are not UTF-8; they were read as Windows-1252" in capsys.readouterr().out


def test_parts_are_known_by_their_usual_names():
    for name in ("train", "Training", "TRAIN", " train"):
        assert part_of(name) == "train"
    for name in ("val", "valid", "Validation", "dev"):
        assert part_of(name) == "val"
    assert part_of("Testing") == part_of("test") == "test" and part_of("trainer") is None and part_of(None) is None


def test_folders_of_parts(tmp_path, capsys):
    for part, count in (("Training", 4), ("dev", 2), ("TEST", 3)):
        images(tmp_path, [f"{part}/{kind}/{n}.png" for kind in "ab" for n in range(count)])
    train, test = open_labelled(tmp_path)
    assert len(train) == 12 and len(test) == 6 and train.classes == test.classes == ("a", "b")
    assert train.ids()[:1] == ["Training/a/0.png"] and "dev/b/1.png" in train.ids() and test.ids()[0] == "a/0.png"
    assert f"{tmp_path}: dev joins train, as test is there" in capsys.readouterr().out
    assert np.bincount(train.labels()).tolist() == [6, 6]
    (tmp_path / "TEST").rename(tmp_path / "other")
    train, test = open_labelled(tmp_path)
    assert len(train) == 8 and len(test) == 4 and "dev is tested on" in capsys.readouterr().out


def test_a_column_of_parts(tmp_path, capsys):
    images(tmp_path, [f"{n}.png" for n in range(10)])
    parts = ["train"] * 4 + ["Valid"] * 2 + ["test"] * 4
    rows = [["path", "label", "Split"], *([f"{n}.png", "ab"[n % 2], part] for n, part in enumerate(parts))]
    train, test = open_labelled(table(tmp_path / "list.csv", rows))
    assert [int(name[:-4]) for name in train.ids()] == list(range(6)) and len(test) == 4
    assert "val joins train" in capsys.readouterr().out
    with pytest.raises(UserError, match="the column of parts holds 'fold 3'; wanted train, val or test"):
        open_labelled(table(tmp_path / "list.csv", [*rows, ["1.jpg", "a", "fold 3"]]))
    with pytest.raises(UserError, match="names train alone"):
        open_labelled(table(tmp_path / "list.csv", rows[:5]))


def test_a_test_part_that_tells_nothing_apart_is_refused(tmp_path, capsys):
    images(tmp_path, [*(f"a/{n}.png" for n in range(30)), "b/1.png"])
    with pytest.raises(UserError, match="no image of 'b' is in test, which has 1 class: nothing could be told apart"):
        open_labelled(tmp_path)
    images(tmp_path, [f"c/{n}.png" for n in range(30)])
    open_labelled(tmp_path)
    assert "no image of 'b' is in test: scores are of 2 classes only" in capsys.readouterr().err


def test_what_has_changed_is_named(tmp_path):
    names = [f"{n:03d}.png" for n in range(200)]
    images(tmp_path, names)
    had = fingerprint(open_source(tmp_path, in_memory=False), seed=1)
    assert difference(had, open_source(tmp_path, in_memory=True), 1) is None  # where they are kept is no difference
    drawn = next(iter(had["read"]))
    data = (tmp_path / drawn).read_bytes()
    (tmp_path / drawn).write_bytes(data[:-1] + b"x")
    assert (
        difference(had, open_source(tmp_path, in_memory=False), 1) == f"{drawn!r} is another picture of the same size"
    )
    (tmp_path / drawn).write_bytes(data)
    (tmp_path / "150.png").write_bytes(data + b"more")
    assert "'150.png' has another name or size" in difference(had, open_source(tmp_path, in_memory=False), 1)
    (tmp_path / "150.png").rename(tmp_path / "0999.png")
    assert "'0999.png' has another name" in difference(had, open_source(tmp_path, in_memory=False), 1)
    arrays = np.zeros((5, 4, 4), np.uint8), np.ones((5, 4, 4), np.uint8)
    first, second = (open_source(array) for array in arrays)
    assert "another picture" in difference(fingerprint(first, 0), second, 0)
