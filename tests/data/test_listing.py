"""Listing and ids on folders made for each test: awkward names, links, loops, pipes."""

import os
import socket
import time

import numpy as np
import pyarrow as pa
from stripes import make, pixels, png

from ssl_kit.data import listing
from ssl_kit.data.listing import escape, list_images, unescape
from ssl_kit.data.opening import open_source

NAMES = [
    "b.png",
    "a/deep/er/x.png",
    "a/x.png",
    "Ünïcode NFC é.png",
    "NFD e\u0301.png",
    "new\nline.png",
    "-dash.png",
    "\u202eright to left.png",
    "😀.png",
    "100%.png",
    "100%41.png",
    b"invalid \xff\xfe utf8.png",
    b"a/\xe9/%ff \xff.png",
    "n" * 251 + ".png",
]


def test_ids_are_sorted_stable_and_lead_back_to_the_bytes_of_the_name(tmp_path):
    make(tmp_path, NAMES)
    source = open_source(tmp_path)
    wanted = {os.fsencode(name) for name in NAMES}
    assert {unescape(name) for name in source.ids()} == wanted and len(source) == len(NAMES)
    assert source.ids() == sorted(source.ids())
    assert {"Ünïcode NFC é.png", "100%.png", "100%2541.png"} <= set(source.ids())
    assert "invalid %FF%FE utf8.png" in source.ids()
    for row, name in enumerate(source.ids()):
        name.encode("utf-8")  # Parquet and JSON need it
        seed = [os.fsencode(n) for n in NAMES].index(unescape(name))
        assert np.array_equal(source.read([row])[0], pixels(seed))
    assert source.classes == () and (source.labels() == -1).all()


def test_escaping_is_reversible():
    random = np.random.default_rng(0)
    alphabet = [b"%", b"4", b"1", b"F", b"\xff", b"\xc3", b"\xa9", b"/", "é".encode(), b"\xed\xa0\x80", b"%25"]
    seen = {}
    for _ in range(3000):
        name = b"".join(alphabet[i] for i in random.integers(0, len(alphabet), random.integers(1, 7)))
        assert unescape(escape(name)) == name
        assert seen.setdefault(escape(name), name) == name


def test_listing_takes_images_only_and_each_once(tmp_path, monkeypatch):
    root = make(tmp_path / "root", ["a/1.png", "a/2.png", "b/3.png"])
    outside = make(tmp_path / "outside", ["4.png", "deep/5.png"], start=10)
    (root / "b" / "no_extension").write_bytes(png(7))
    (root / "b" / "photo.bin").write_bytes(png(8))
    (root / "b" / "words").write_text("BM are two letters")
    for n in range(3):
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{n}.txt").write_text("x")
    make(root, [".hidden.png", ".folder/x.png"])
    (root / "loop").symlink_to(root)
    (root / "a" / "up").symlink_to(tmp_path)  # would list everything again, and `outside`
    (root / "a" / "dangling.png").symlink_to(tmp_path / "nothing")
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "0 link.png").symlink_to(root / "b" / "3.png")  # sorts before the real name, which still wins
    (root / "0 linked").symlink_to(root / "b")
    (root / "elsewhere").symlink_to(outside)
    (root / "twice").symlink_to(outside / "deep")
    os.link(root / "a" / "1.png", root / "z hard link.png")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(root)  # the address of a socket has at most 108 bytes
        server.bind("socket.jpg")
        began = time.perf_counter()
        found = list_images(root)
    assert time.perf_counter() - began < 1
    assert found.ids == [
        "a/1.png",
        "a/2.png",
        "b/3.png",
        "b/no_extension",
        "b/photo.bin",
        "elsewhere/4.png",
        "elsewhere/deep/5.png",
    ]
    assert found.others == {".txt": 3, "(no extension)": 1, "(broken link)": 2}
    assert found.links == 6  # loop, up, 0 link.png, 0 linked, twice, z hard link.png
    assert list_images(root / "loop").ids == found.ids  # a root that is a link


def test_listing_does_not_depend_on_the_order_of_creation(tmp_path):
    names = [f"{c}/{n}.png" for c in "cab" for n in (2, 1, 10)]
    assert list_images(make(tmp_path / "1", names)).ids == list_images(make(tmp_path / "2", names[::-1])).ids


def test_an_unreadable_folder_is_reported(tmp_path, monkeypatch, capsys):
    make(tmp_path, ["a/1.png", "a/2.png", "b/3.png"])
    scandir = os.scandir

    def refusing(path):  # permissions do not stop root, who may run these tests
        if path.endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(open_source(tmp_path)) == 2
    assert "1 folders cannot be read, first 'b'" in capsys.readouterr().err


def test_ids_are_arrow_and_read_as_text(tmp_path):
    """Also where a device numbers its files in more than 64 bits, as Windows' ReFS does."""
    walk = listing._Walk(os.fsencode(tmp_path))
    walk.take([b"b.png", b"100%41.png"], 1, [2**64 + 1, 2**65 + 1], False)
    walk.take([b"again.png", b"a.png"], 1, [2**64 + 1, 2**65], True)
    found = walk.result()
    assert found.links == 1 and found.ids.array.type == pa.large_string()
    assert found.ids == ["100%2541.png", "a.png", "b.png"] and found.ids != ["a.png"] * 3
    rows = np.arange(3).repeat(9)[::-1]
    assert found.ids.texts(rows) == [found.ids[row] for row in rows] and found.ids.texts(rows[:2]) == ["b.png"] * 2
