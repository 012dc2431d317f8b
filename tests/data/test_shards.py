"""Shards as a source: the images of a folder whatever holds them; hostile and damaged shards; the order of an epoch."""

import io
import json
import os
import shutil
import tarfile
import tracemalloc
from itertools import islice

import hostile_parquet as crafted
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from stripes import make, pattern, png

from ssl_kit.core.errors import UserError
from ssl_kit.data import rowgroups, shards, sources
from ssl_kit.data import tar as walking
from ssl_kit.data.fingerprint import fingerprint
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.data.sources import Blocks, sampled
from ssl_kit.evaluation.features import fingerprint as evaluated
from ssl_kit.verbs.pack import pack
from ssl_kit.views.recipe import ViewRecipe

FORMS = ("folder", "packed", "foreign.tar", "several", "rows.parquet")


def tar(path, members, form=tarfile.GNU_FORMAT, end=True):
    """A tar of (name, bytes) as it comes; a member may be a TarInfo of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for name, data in members:
            head = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            head.size = len(data) if head.size == 0 and head.isreg() else head.size
            file.write(head.tobuf(form) + data + bytes(-len(data) % 512))
        file.write(bytes(1024 if end else 0))
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same 200 images in 4 classes: a folder, packed byte for byte, tars of somebody else, Parquet."""
    root = tmp_path_factory.mktemp("forms")
    for label, name in enumerate("abcd"):
        (root / "folder" / name).mkdir(parents=True)
        for number in range(50):
            ending = "jpg" if number % 3 else "png"
            Image.fromarray(pattern(label, number)).save(root / "folder" / name / f"{number:03d}.{ending}")
    ids = open_source(root / "folder", in_memory=False).ids()
    read = {name: (root / "folder" / name).read_bytes() for name in ids}
    pack(str(root / "folder"), str(root / "packed"), keep=True, shard_size="60kB")
    tar(root / "foreign.tar", [(f"./{name}", data) for name, data in read.items()])
    for number in range(3):
        some = ids[number * 67 : (number + 1) * 67]
        tar(root / "several" / f"{number}.tar", [(name, read[name]) for name in some], tarfile.PAX_FORMAT)
    said = json.dumps({"info": {"features": {"label": {"names": list("abcd"), "_type": "ClassLabel"}}}})
    table = pa.table(
        {
            "image": [{"bytes": data, "path": name} for name, data in read.items()],
            "label": ["abcd".index(name[0]) for name in ids],
        }
    )
    pq.write_table(table.replace_schema_metadata({"huggingface": said}), root / "rows.parquet", row_group_size=30)
    return root


def batches(source, steps):
    plan = TrainingPlan(len(source), 64, 3, blocks=source.blocks)
    loader = iter(ViewLoader(source, plan.batches, ViewRecipe().build((12, 12), 3, 2), seed=3, threads=2))
    return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_same_images_are_the_same_source_whatever_holds_them(forms, form):
    wanted, source = (open_source(forms / name, in_memory=False) for name in ("folder", form))
    assert source.ids() == wanted.ids() and source.classes == wanted.classes
    assert np.array_equal(source.labels(), wanted.labels())
    assert source.read(slice(None)) == wanted.read(slice(None))
    for one, other in zip(batches(source, 7), batches(wanted, 7), strict=True):  # two epochs
        assert torch.equal(one["key"].index, other["key"].index) and torch.equal(one["label"], other["label"])
        assert all(map(torch.equal, one["views"], other["views"]))
    if form != "rows.parquet":  # which does not know the bytes of each
        assert fingerprint(source, 1) == fingerprint(wanted, 1)
    decoded = open_source(forms / form, in_memory=True, limit=90)
    assert np.array_equal(decoded.stack[0], open_source(forms / "folder", limit=90).stack[0])
    assert decoded.content(7) == wanted.content(wanted.ids().index(decoded.ids()[7]))
    parts = [[part.ids() for part in open_labelled(one)] for one in (forms / form, forms / "folder")]
    assert parts[0] == parts[1]


def test_patterns_lists_and_parts_of_shards(forms, tmp_path):
    ids = open_source(forms / "folder", in_memory=False).ids()
    assert open_source(forms / "several" / "{0..2}.tar").ids() == ids
    assert open_source([forms / "several" / f"{number}.tar" for number in range(3)]).ids() == ids
    assert open_source(forms / "packed" / "{000000..000001}.tar").ids() == ids[:49]
    for place, number in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 0)):
        shutil.copy(forms / "several" / f"{number}.tar", tmp_path / f"{place}.tar")
    train, test = open_labelled(tmp_path)
    assert (train.ids(), test.ids()) == (ids[:134], ids[:67])
    with pytest.raises(UserError, match=r"kinds \.parquet, \.tar"):
        open_source([forms / "foreign.tar", forms / "rows.parquet"])
    with pytest.raises(UserError, match="folder holds no shards"):
        open_source([forms / "foreign.tar", forms / "folder"])
    with_images = make(tmp_path / "images", ["1.png", "2.png"])
    shutil.copy(forms / "foreign.tar", with_images)
    assert open_source(with_images).ids() == ["1.png", "2.png"]


def test_samples_of_a_webdataset(tmp_path, capsys):
    array = io.BytesIO()
    np.save(array, np.zeros((9, 7, 3), np.uint8))
    members = [("7.jpg", png(0)), ("7.cls", b"3"), ("7.mask.png", png(1)), ("8.NPY", array.getvalue())]
    members += [
        ("8.json", b'{"label": "cat", "caption": "x"}'),
        ("._9.png", png(2)),
        ("9.png", png(2)),
        ("9.cls", b"cat"),
    ]
    members += [("10.vec.npy", b"no array"), ("11.bin", png(3)), ("a.b.png", png(4)), ("a.c.png", png(5))]
    source = open_source(tar(tmp_path / "x.tar", members), in_memory=False)
    assert source.ids() == ["7.jpg", "8.NPY", "9.png", "11.bin", "a.b.png", "a.c.png"] and source.classes == (
        "3",
        "cat",
    )
    assert source.labels().tolist() == [0, 1, 1, -1, -1, -1] and source.sizes([1]).tolist() == [[9, 7]]
    assert source.bad.rows == [("x.tar: 7.mask.png", "belongs to another image of its sample")]
    texts = [[b"cat", b"dog", b"cat", b"dog"], [b"a cat", b"two dogs", b"cats", b"a dog"]]
    for number, said in enumerate(texts):
        words = [part for row, text in enumerate(said) for part in ((f"{row}.png", png(row)), (f"{row}.txt", text))]
        tar(tmp_path / str(number) / "x.tar", words)
    assert open_source(tmp_path / "0").classes == ("cat", "dog") and open_source(tmp_path / "1").classes == ()
    for number in range(2):
        tar(tmp_path / "same" / f"{number}.tar", [(f"{row}.png", png(row)) for row in range(3)])
    assert open_source(tmp_path / "same").ids()[2:4] == ["0/2.png", "1/0.png"]
    long = "é" * 130 + ".png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "long.tar"
        with tarfile.open(path, "w", format=form) as file:
            for name in (long, "2.png"):
                head = tarfile.TarInfo(name)
                head.size = len(png(0))
                file.addfile(head, io.BytesIO(png(0)))
        assert open_source(path).ids() == [long, "2.png"]


def head(name, size, kind=tarfile.REGTYPE, **more):
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for key, value in more.items():
        setattr(made, key, value)
    return made


def broken(data, at, new):
    """A header of which some bytes are others, its checksum made right again."""
    data = bytearray(data)
    data[at : at + len(new)] = new
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


GOOD = [("1.png", png(1)), ("2.png", png(2))]
SIZE = 124  # where a header has it
HOSTILE = {  # members behind two good ones -> what is said, in a warning or as what was skipped
    "negative size": (broken(tarfile.TarInfo("3.png").tobuf(), SIZE, b"\xff" * 12), "a member of -1 bytes"),
    "absurd size": (broken(tarfile.TarInfo("3.png").tobuf(), SIZE, b"\x80" + bytes(3) + b"\x7f" * 8), "ends inside"),
    "beyond the end": (head("3.png", 2**33).tobuf(), "ends inside"),
    "long name of a gigabyte": (head("x", 2**30, tarfile.GNUTYPE_LONGNAME).tobuf(), "a name of 1,073,741,824 bytes"),
    "pax of a gigabyte": (head("x", 2**30, tarfile.XHDTYPE).tobuf(), "a name of 1,073,741,824 bytes"),
    "pax without sense": (head("x", 9, tarfile.XHDTYPE).tobuf() + b"99999 a=b".ljust(512, b"\0"), "makes no sense"),
    "pax whose length is 0": (head("x", 6, tarfile.XHDTYPE).tobuf() + b"0 b=c\n".ljust(512, b"\0"), "makes no sense"),
    "pax of a negative size": (
        head("x", 12, tarfile.XHDTYPE).tobuf() + b"12 size=-99\n".ljust(512, b"\0") + tarfile.TarInfo("3.png").tobuf(),
        "a member of -99 bytes",
    ),
    "pax of no size": (
        head("x", 11, tarfile.XHDTYPE).tobuf() + b"11 size=ab\n".ljust(512, b"\0") + tarfile.TarInfo("3.png").tobuf(),
        "damaged at byte",
    ),
    "noise": (np.random.default_rng(0).bytes(4096), "damaged at byte"),
    "wrong checksum": (tarfile.TarInfo("3.png").tobuf()[:-400].ljust(512, b"x"), "damaged at byte"),
    "cut in a header": (tarfile.TarInfo("3.png").tobuf()[:200], "cut off at byte"),
    "cut in an image": (head("3.png", 600).tobuf() + png(3)[:100], "ends inside"),
    "symbolic link": (head("3.png", 0, tarfile.SYMTYPE, linkname="/etc/passwd").tobuf(), "a link"),
    "hard link": (head("3.png", 0, tarfile.LNKTYPE, linkname="1.png").tobuf(), "a link"),
    "sparse": (head("3.png", 0, tarfile.GNUTYPE_SPARSE).tobuf(), "sparse"),
    "name twice": (head("2.png", len(png(3))).tobuf() + png(3).ljust(512, b"\0"), "a second member of this name"),
    "image of 3 GB": (head("3.png", 3 * 2**30).tobuf(), "the limit is"),
    "no end": (b"", "ends without an end"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars_cost_what_is_hostile_and_no_memory(tmp_path, capsys, case):
    data, told = HOSTILE[case]
    path = tar(tmp_path / "x.tar", GOOD, end=False)
    path.write_bytes(path.read_bytes() + data)
    tracemalloc.start()
    source = open_source(path, in_memory=False, max_bad=0.9)
    stored = source.read(slice(None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.ids()[:2] == ["1.png", "2.png"] and stored[:2] == [png(1), png(2)] and len(source) <= 3
    assert all(isinstance(one, BadImageError) for one in stored[2:])
    assert told in " ".join(why for _, why in source.bad.rows) + capsys.readouterr().err
    assert peak < 2**24


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"", "it is empty"), (b"<html>" * 200, "no tar file"), (bytes(2048), ""), (b"\x1f\x8b" * 512, "no tar file")],
)
def test_what_is_no_tar_is_refused_by_name(tmp_path, capsys, data, told):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"x.tar: 0 image"):
        open_source(tmp_path / "x.tar")
    assert told in capsys.readouterr().err


def test_names_of_a_tar_lead_nowhere(tmp_path):
    """They are ids, and no paths: nothing is read or written by them."""
    source = open_source(tar(tmp_path / "x.tar", [("/etc/1.png", png(1)), ("../../2.png", png(2))]), in_memory=False)
    pack(str(tmp_path / "x.tar"), str(tmp_path / "out"), keep=True)
    with tarfile.open(tmp_path / "out" / "000000.tar") as file:
        assert file.getnames() == ["etc/1.png", "2.png"]
    assert open_source(tmp_path / "out", in_memory=False).ids() == source.ids() == ["/etc/1.png", "../../2.png"]


def test_a_truncated_or_missing_shard_costs_its_own_images(forms, tmp_path, capsys):
    shutil.copytree(forms / "packed", tmp_path / "packed")
    first, second = (tmp_path / "packed" / f"00000{number}.tar" for number in (0, 1))
    os.truncate(first, first.stat().st_size // 2)
    source = open_source(tmp_path / "packed", in_memory=False, max_bad=0.5)
    stored = source.read(slice(None))
    bad = [name for name, one in zip(source.ids(), stored, strict=True) if isinstance(one, BadImageError)]
    whole = open_source(forms / "packed", in_memory=False)
    of_first = whole.ids()[: int((whole.store.shard == 0).sum())]
    assert source.ids() == whole.ids() and bad == of_first[-len(bad) :] and 0.4 < len(bad) / len(of_first) < 0.6
    made = open_source(tmp_path / "packed", in_memory=True, max_bad=0.5)
    assert set(made.ids()) == set(whole.ids()) - set(bad)
    second.unlink()
    rest = open_source(tmp_path / "packed", in_memory=False)
    assert set(whole.ids()) - set(rest.ids()) == set(np.array(whole.ids())[whole.store.shard == 1])
    assert "1 shards are missing, first 000001.tar" in capsys.readouterr().err


def test_an_index_is_believed_only_as_far_as_it_can_be_true(forms, tmp_path, capsys):
    shutil.copytree(forms / "packed", tmp_path / "packed")
    index = tmp_path / "packed" / shards.INDEX
    table = pq.read_table(index)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["offset"][0], columns["size"][1], columns["size"][2] = 2**60, 2**40, 10**9
    columns["shard"][3] = "../../secret.tar"
    pq.write_table(pa.table(columns), index)
    source = open_source(tmp_path / "packed", in_memory=False)
    assert len(source) == 199 and all(isinstance(one, BadImageError) for one in source.read([0, 1, 2]))
    assert isinstance(source.read([3])[0], bytes)
    columns["offset"][0] = -1
    lists = columns | {"offset": [0] * 200, "text": [[7] * 9] * 200}  # few bytes may stand for any number of values
    for made in (columns, lists):
        pq.write_table(pa.table(made), index)
        assert len(open_source(tmp_path / "packed", in_memory=False)) == 200  # from the tars
    pq.write_table(table, index)
    tar(tmp_path / "packed" / "000000.tar", [(f"{row}.png", png(row) + bytes(2**14)) for row in range(9)])
    other = open_source(tmp_path / "packed", in_memory=False)
    assert other.ids()[:9] == [f"{row}.png" for row in range(9)] and "is another file than" in capsys.readouterr().err
    index.write_bytes(crafted.repeated({"id": b"x" * 99, "shard": b"0.tar", "offset": b"1", "size": b"2"}, 2**26))
    with pytest.raises(UserError, match="rows of"):
        open_source(tmp_path / "packed")


def test_the_walk_of_a_large_shard_is_kept(forms, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shards, "_KEPT_FROM", 0)
    path = tmp_path / "x.tar"
    shutil.copy(forms / "foreign.tar", path)
    wanted = open_source(path, in_memory=False)
    walked = []
    monkeypatch.setattr(shards, "walk", walked.append)
    again = open_source(path, in_memory=False)
    assert not walked and again.ids() == wanted.ids() and again.read([5]) == wanted.read([5])
    tar(path, GOOD)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_source(path).ids() == ["1.png", "2.png"]  # another file
    monkeypatch.setattr(shards, "_KEPT_FROM", 0)
    odd = tmp_path / os.fsdecode(b"\xff.tar")
    tar(odd, [*GOOD, ("1.json", b'{"label": "\\ud800"}')])  # half a character
    assert [open_source(odd).classes for _ in range(2)] == [("?",)] * 2
    for _ in range(2):
        with pytest.raises(UserError, match="0 image"):
            open_source(
                tar(tmp_path / "none.tar", []) if not (tmp_path / "none.tar").exists() else tmp_path / "none.tar"
            )


def test_an_epoch_of_blocks_shows_every_image_once_and_holds_few_blocks_at_a_time():
    of, whole = np.repeat(np.arange(40), 25), None
    for world in (1, 3):
        plans = [TrainingPlan(1000, 30 // world, 5, rank, world, blocks=Blocks(of, 4)) for rank in range(world)]
        streams = [plan.batches() for plan in plans]
        epochs = [
            np.concatenate([next(stream).rows for _ in range(plans[0].steps_per_epoch) for stream in streams])
            for _ in range(2)
        ]
        for epoch in epochs:
            assert sorted(epoch) == list(range(1000))
            assert all(len(set(of[epoch[start : start + 100]])) == 4 for start in range(0, 1000, 100))
        assert not np.array_equal(*epochs)
        whole = whole or epochs
        assert all(map(np.array_equal, whole, epochs))
    begun = TrainingPlan(1000, 30, 5, blocks=Blocks(of, 4))
    assert np.array_equal(next(begun.batches(40)).rows, next(islice(begun.batches(), 40, None)).rows)
    plain, one = TrainingPlan(1000, 30, 5), TrainingPlan(1000, 30, 5, blocks=Blocks(of, 40))
    assert np.array_equal(next(plain.batches()).rows, next(one.batches()).rows)


def test_groups_of_rows_are_read_once_and_few_are_held(forms, monkeypatch):
    monkeypatch.setattr(rowgroups, "_HELD", 50_000)  # two groups
    source, read = open_source(forms / "rows.parquet", in_memory=False), []
    unpacked = rowgroups.Groups._unpacked
    monkeypatch.setattr(
        rowgroups.Groups, "_unpacked", lambda self, *where: read.append(where) or unpacked(self, *where)
    )
    assert source.blocks.held == 2
    source.store._kept.clear()
    batches(source, 2)  # and two that are made ahead: an epoch
    assert 4 <= len(read) == len(set(read)) <= 7
    assert len(source.store._kept) <= 6
    monkeypatch.setattr(sources, "_SAMPLED", 2)
    assert len(set(source.blocks.of[sampled(source, 50)])) == 2


def test_columns_of_bytes_and_rows_without_names(tmp_path):
    table = pa.table({"content": [png(1), png(2), None, b"no image"], "class_name": ["x", "y", "x", "y"]})
    for number in range(2):
        (tmp_path / "several").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "several" / f"{number}.parquet")
    source = open_source(tmp_path / "several", in_memory=False)
    assert source.ids()[2:5] == ["0/2", "0/3", "1/0"] and source.classes == ("x", "y")
    assert source.read([4]) == [png(1)] and isinstance(source.read([2])[0], BadImageError)
    with pytest.raises(UserError, match="4 of 8 images could not be decoded"):
        open_source(tmp_path / "several", in_memory=True)
    paths = pa.table({"path": pa.array([b"1.png", b"2.png"], pa.binary())})
    make(tmp_path / "list", ["1.png", "2.png"])
    pq.write_table(paths, tmp_path / "list" / "list.parquet")
    assert open_source(tmp_path / "list" / "list.parquet").ids() == ["1.png", "2.png"]


def test_odd_shards_are_read_all_the_same(tmp_path):
    images = [png(1), png(2)]
    write = lambda name, **columns: pq.write_table(pa.table(columns), tmp_path / name) or tmp_path / name
    flat = write(
        "flat.parquet", **{"image.bytes": images, "image.path": ["a", "b"], "label": images, "group": [[1], [2]]}
    )
    assert open_source(flat).ids() == ["0", "1"] and not open_source(flat).classes  # masks are no classes
    same = write("same.parquet", image=[{"bytes": one, "path": "image.png"} for one in images])
    assert open_source(same).ids() == ["0/image.png", "1/image.png"]
    parts = write("parts.parquet", image=[{"bytes": one, "path": [1, 2]} for one in images])
    assert open_source(parts).ids() == ["0", "1"]
    told = pa.table({"image": images, "label": [0, 1]}).replace_schema_metadata({"huggingface": "[" * 100_000})
    pq.write_table(told, tmp_path / "told.parquet")
    assert open_source(tmp_path / "told.parquet").classes == ("0", "1")
    for name in (b"\xff.tar", b"b.tar"):
        tar(tmp_path / "odd" / os.fsdecode(name), GOOD)
    assert open_source(tmp_path / "odd").ids() == ["b/1.png", "b/2.png", "%FF/1.png", "%FF/2.png"]
    beside = tmp_path / "beside{2..1}"
    make(beside, ["1.png", "2.png"])
    (beside / "features.parquet").write_bytes(b"no table")
    assert open_source(beside).ids() == ["1.png", "2.png"]


def test_what_follows_a_sparse_file_is_read(tmp_path):
    sparse = head("disk", 512, tarfile.GNUTYPE_SPARSE).tobuf()
    data = broken(sparse, 482, b"\x01") + bytes(512) + b"x" * 512  # its map goes on for a block, then 512 bytes of it
    path = tar(tmp_path / "x.tar", GOOD, end=False)
    path.write_bytes(
        path.read_bytes() + data + head("3.png", len(png(3))).tobuf() + png(3).ljust(512, b"\0") + bytes(1024)
    )
    assert open_source(path).ids() == ["1.png", "2.png", "3.png"]


def test_shards_are_read_where_there_is_no_pread(forms, monkeypatch):
    wanted = open_source(forms / "foreign.tar", in_memory=False).read([7, 3])
    monkeypatch.setattr(walking, "_pread", walking._seek_and_read)  # as on Windows
    assert open_source(forms / "foreign.tar", in_memory=False).read([7, 3]) == wanted


def test_hostile_parquet_files_take_no_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    value = pa.array([png(1) + bytes(2**20)], pa.binary())  # in a dictionary, where it stands for 3 GB
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3_000, np.int32)), value)
    pq.write_table(pa.table({"image": same}), path, store_schema=False, dictionary_pagesize_limit=2**22)
    source = open_source(path, in_memory=False)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    monkeypatch.setattr(rowgroups, "_GROUP", 2**26)
    with_reason = source.read([0])[0]
    assert isinstance(with_reason, BadImageError) and "a group of rows of more than" in str(with_reason)
    assert pa.total_allocated_bytes() - before < 2**28 and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        open_source(path)


def test_stamps_change_with_the_shard(forms, tmp_path):
    shutil.copy(forms / "foreign.tar", tmp_path)
    before = evaluated(open_source(tmp_path / "foreign.tar", in_memory=False))
    assert evaluated(open_source(tmp_path / "foreign.tar", in_memory=False)) == before
    os.utime(tmp_path / "foreign.tar", (1, 1))
    assert evaluated(open_source(tmp_path / "foreign.tar", in_memory=False)) != before
