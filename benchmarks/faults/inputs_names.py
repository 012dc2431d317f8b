"""Folders of special, oddly named, equal and too few files: F7 to F10 of `inputs.py`."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from harness import fork_warmed
from inputs_files import good, noise, small_encoder
from inputs_pixels import encoded, picture
from isolated import told

from ssl_kit.data.listing import EXTENSIONS, list_images, unescape, write_skipped
from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.search import Index
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index
from ssl_kit.verbs.pretrain import pretrain

Cases = dict[str, str | None]


def special(place: Path, quick: bool) -> Cases:
    """F7: as a user who may not read everything; the same tree by `os.walk` gives the time to compare with."""
    root, cases = place / "root", Cases()
    good(root / "real", 20)
    for folder in range(100):
        (root / "many" / f"{folder:03d}").mkdir(parents=True)
        for number in range(100):
            (root / "many" / f"{folder:03d}" / f"{number:03d}.png").touch()
    seconds = {"plain": min(_timed(lambda: plain_listing(root)) for _ in range(9))}
    (root / "loop").symlink_to(root)
    (root / "real" / "up").symlink_to(root.parent)
    for number in range(40):
        (root / f"again{number}").symlink_to(root / "real")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "self.png").symlink_to("self.png")
    os.link(root / "real" / "00000.png", root / "hard link.png")
    os.mkfifo(root / "pipe.png")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(root)  # the address of a socket has at most 108 bytes
    listener.bind("socket.jpg")
    os.chdir(here)
    if os.geteuid() == 0:
        for name, minor in (("zero.png", 5), ("null.jpg", 3)):
            os.mknod(root / name, 0o666 | 0o020000, os.makedev(1, minor))
    (root / "secret.png").write_bytes(encoded(picture(20, 20), "PNG"))
    (root / "secret folder").mkdir()
    (root / "secret folder" / "1.png").write_bytes(encoded(picture(20, 20), "PNG"))
    os.chmod(root / "secret.png", 0)
    os.chmod(root / "secret folder", 0)
    place.chmod(0o755)
    place.parent.chmod(0o755)
    seconds["ours"] = min(_timed(lambda: list_images(root)) for _ in range(9))
    process = fork_warmed(lambda: _as_nobody(root), place / "log")
    process.join(60)
    cases["reading as a user without rights"] = None if process.exitcode == 0 else f"ended with {process.exitcode}"
    wanted = len(list(root.glob("real/*.png"))) + len(list(root.glob("many/*/*.png"))) + 2  # two secrets, seen by root
    ids = list_images(root).ids
    cases["each inode once"] = None if len(ids) == len(set(ids)) == wanted else f"{len(ids)} of {wanted}"
    for name in ("pipe.png", "socket.jpg", "zero.png", "null.jpg", "dangling.png", "self.png", "hard link.png"):
        cases[f"{name} is not listed"] = None if name not in ids or name == "hard link.png" else "listed"
    cases["one real name wins"] = (
        None if "real/00001.png" in ids and not any(n.startswith("again") for n in ids) else "no"
    )
    small = place / "one"
    good(small, 1)
    (small / "loop").symlink_to(small)
    cases["1 image and a loop"] = None if list_images(small).ids == ["00000.png"] else str(list_images(small).ids)
    ratio = seconds["ours"] / seconds["plain"]
    cases["listing at most twice as long as os.walk"] = None if ratio <= 2 else f"{ratio:.2f}"
    os.chmod(root / "secret folder", 0o755)
    return cases | {"#seconds_ours": round(seconds["ours"], 4), "#seconds_walk": round(seconds["plain"], 4)}  # type: ignore[dict-item]


def _as_nobody(root: Path) -> None:
    """Lists and decodes as the user `nobody`; raises unless what may not be read is skipped or told of."""
    if os.geteuid() == 0:
        os.setegid(65_534)
        os.seteuid(65_534)
    source = open_source(root, max_bad=1.0, in_memory=True)
    reasons = dict(source.bad.rows)
    if "Permission denied" not in reasons.get("secret.png", "") or len(source) != len(list(root.glob("real/*.png"))):
        raise RuntimeError(f"{len(source)} images, {reasons.get('secret.png')}")


def plain_listing(root: Path) -> list[str]:
    """What `os.walk` finds, sorted."""
    found = []
    for folder, _, names in os.walk(root):
        found += [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
    return sorted(found)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of processor time: other programs make the wall clock tell of themselves."""
    began = time.process_time()
    call()
    return time.process_time() - began


def odd_names() -> list[bytes]:
    """Names as bytes, without the ending."""
    texts = (
        *(
            "é NFC",
            "e\u0301 NFD",
            "\u202eright to left",
            "\u05d0\u05d1\u05d2",
            "😀🏳️‍🌈",
            "new\nline",
            "carriage\rreturn",
            "tab\there",
        ),
        *(
            "-dash",
            "--option=1",
            " leading",
            "trailing ",
            "quo\"te's",
            "a,b;c",
            "100%",
            "100%41",
            "%FF",
            "%25",
            "$HOME",
            "`id`",
        ),
        *(
            "back\\slash",
            "*?[a-z]",
            "&amp;<b>",
            "\u2028line",
            "\ufeffmark",
            "\ud7ff\ue000",
            "=1+1",
            "NULL",
            "nan",
            "true",
        ),
        *(
            "\x01\x1b[31m",
            "\u0000"[:0] + "con",
            "x" * 251,
            "日本語",
            "ẞß",
            "ﬁ",
            "İi",
            "#hash",
            "~",
            "a..",
            "http:",
        ),
    )
    return [text.encode() for text in texts] + [
        b"\xff",
        b"ok \xe9",
        b"%ff \xff",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\xf0\x9f\x98",
    ]


def names(place: Path, quick: bool) -> Cases:
    """F8: through listing, embeddings, index and skipped.csv and back to the bytes of the name."""
    root, cases = place / "photos", Cases()
    wanted: dict[bytes, bool] = {}
    for number, stem in enumerate(odd_names()):
        for folder, bad in ((b"good", False), (b"bad", True)):
            name = folder + b"/" + stem + b".png"
            path = os.path.join(os.fsencode(root), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(b"no image" if bad else noise(number))
            wanted[name] = bad
    out = place / "emb"
    embed(small_encoder(place), str(root), out=str(out), max_bad=1.0, precision="float32")
    index(str(out))
    listed = {unescape(name) for name in list_images(root).ids}
    stored = {unescape(name): name for name in Embeddings.load(out).ids}
    with open(out / "skipped.csv", newline="", encoding="utf-8") as file:
        skipped = {unescape(row[0]) for row in list(csv.reader(file))[1:]}
    opened = Index.load(out)
    for name, bad in wanted.items():
        if bad:
            right = name in skipped and name in listed
        else:
            own = opened.search(Path(os.fsdecode(os.path.join(os.fsencode(root), name))), 1)[0][0].id
            right = name in listed and name in stored and unescape(own) == name and opened.rows_of([stored[name]]) != []
        cases[repr(name)[:60]] = None if right else "lost or altered"
    cases["nothing else"] = None if set(wanted) == set(stored) | skipped else "more or fewer names"
    write_skipped(place / "again.csv", [(stored[name], "why") for name in stored])
    with open(place / "again.csv", newline="", encoding="utf-8") as file:
        again = {row[0] for row in list(csv.reader(file))[1:]}
    cases["CSV again"] = None if again == set(stored.values()) else "altered"
    return cases


def same(place: Path, quick: bool) -> Cases:
    """F9: ids are relative paths; equal names and equal contents stay apart."""
    root, cases = place / "photos", Cases()
    for folder in ("a", "b", "b/a", "c"):
        (root / folder).mkdir(parents=True)
        for number in range(5):
            (root / folder / f"{number}.png").write_bytes(noise(number))
    out = place / "emb"
    embed(small_encoder(place), str(root), out=str(out), precision="float32")
    index(str(out))
    ids = Embeddings.load(out).ids
    cases["20 files, 20 ids"] = None if len(set(ids)) == 20 else f"{len(set(ids))}"
    for name in ids:
        source = root / name
        cases[name] = None if source.is_file() else "no path below the root"
    moved = place / "moved"
    shutil.move(root, moved)
    cases["the same ids elsewhere"] = None if list_images(moved).ids == ids else "others"
    near = Index.load(out).search_ids(["a/3.png"], 3)[0]
    cases["copies are neighbours"] = (
        None if {one.id for one in near} == {"b/3.png", "b/a/3.png", "c/3.png"} else str(near)
    )
    return cases


def too_few(place: Path, quick: bool) -> Cases:
    """F10: what is wrong is said before the first step, with the numbers."""
    cases = Cases()
    (place / "nothing").mkdir()
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text("x")
    good(place / "one", 1)
    good(place / "ten", 10)
    good(place / "classes" / "cat", 4)
    good(place / "classes" / "dog", 4)
    (place / "classes" / "emu").mkdir()
    good(place / "one class" / "cat", 4)

    def case(name: str, words: str, call: Callable[[], object]) -> None:
        kind, text = told(call)
        cases[name] = None if kind == "refused" and re.search(words, text) else f"{kind}: {text}"

    train = lambda name, **options: pretrain(str(place / name), run=str(place / f"run {name}"), epochs=1, **options)
    case("empty folder", "no images in .*no files", lambda: train("nothing"))
    case("no images", r"saw 1 \.txt", lambda: train("texts"))
    case("no folder", "no such folder", lambda: train("elsewhere"))
    case("1 image", "1 image; at least 2", lambda: train("one"))
    case(
        "fewer than a batch",
        r"10 images are fewer than one step of 64 \(batch_size 64 x 1 ",
        lambda: train("ten", batch_size=64),
    )
    case("limit of 1", "at least 2", lambda: train("ten", limit=1))
    case(
        "empty folder, embed",
        "no images",
        lambda: embed(small_encoder(place), str(place / "nothing"), out=str(place / "x")),
    )
    case("no classes", "wanted at least two classes", lambda: open_labelled(place / "ten"))
    case("one class", "only the class 'cat'", lambda: open_labelled(place / "one class"))
    train_part, _ = open_labelled(place / "classes")
    cases["an empty class is none"] = None if train_part.classes == ("cat", "dog") else str(train_part.classes)
    return cases
