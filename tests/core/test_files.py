"""Files are whole or not there: interrupted writers leave the old content, readers notice any change."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ssl_kit.core import files
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import (
    DamagedError,
    FullError,
    NotOursError,
    append_line,
    atomic_file,
    atomic_folder,
    check_space,
    read_json,
    read_manifest,
    write_json,
    write_sealed,
)
from ssl_kit.core.locking import given_up, lock


def child(work):
    """The wait status of a forked process that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed_before(call, work):
    """Does `work` in a process that is killed before that call of its to the file system; whether it came to that."""

    def killed():
        left = [call]

        def count(event, arguments):
            if event == "open" or event.startswith(("os.", "shutil.")):
                left[0] -= 1
                if left[0] == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    return os.WIFSIGNALED(child(killed))


def write(folder, text):
    with atomic_folder(folder, manifest={"text": text}) as temporary:
        (temporary / "a").write_text(text)


def whole(folder):
    """The text of a folder that `write` made."""
    text = read_manifest(folder)["text"]
    assert (folder / "a").read_text() == text
    return text


@pytest.mark.parametrize("exchange", [True, False])
def test_a_writer_killed_anywhere_leaves_the_old_folder_or_the_new_and_the_next_one_tidies_up(
    tmp_path, exchange, monkeypatch
):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    call, left = 0 if exchange else 24, []  # the two ways part there
    while True:
        folder = tmp_path / f"{call}" / "folder"
        write(folder, "old")
        if not killed_before(call, lambda folder=folder: write(folder, "new")):
            break
        left.append(whole(folder))
        write(folder, "next")
        assert whole(folder) == "next" and os.listdir(folder.parent) == ["folder"]
        call += 1
    assert whole(folder) == "new" and {"old", "new"} == set(left) and len(left) > 15


def test_a_file_of_a_killed_writer_is_tidied_up_too(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, 1)
    assert killed_before(6, lambda: write_json(target, 2))
    assert len(os.listdir(tmp_path)) == 2 and read_json(target) == 1
    write_json(target, 3)
    assert os.listdir(tmp_path) == ["a.json"] and read_json(target) == 3


def test_what_others_are_writing_or_own_is_left_alone(tmp_path):
    own = [".folder.notes.tmp", ".folder.12345678.txt", ".folder.12345678.tmp.txt", "folder.12345678.tmp"]
    for name in own:
        (tmp_path / name).write_text("own")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("first")
        write(tmp_path / "folder", "second")  # ends before the first one does
        assert (temporary / "x").exists()
    assert (tmp_path / "folder" / "x").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([*own, "folder"])


def test_a_failed_replacement_brings_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "folder", "old")
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    replace = os.replace

    def fails(source, target):
        if os.fspath(source).endswith(".tmp") and os.fspath(target) == os.fspath(tmp_path / "folder"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", fails)
        write(tmp_path / "folder", "new")
    assert whole(tmp_path / "folder") == "old" and os.listdir(tmp_path) == ["folder"]


def test_nothing_is_written_through_a_link_and_the_link_stays(tmp_path):
    write(tmp_path / "elsewhere", "elsewhere")
    (tmp_path / "elsewhere.json").write_text("1")
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(NotOursError, match="is a link"):
        write(tmp_path / "folder", "new")
    for call in (write_json, append_line):
        with pytest.raises(NotOursError, match="is a link"):
            call(tmp_path / "file.json", 2)
    assert whole(tmp_path / "elsewhere") == "elsewhere" and (tmp_path / "elsewhere.json").read_text() == "1"
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "file.json").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "elsewhere.json", "file.json", "folder"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_what_others_have_put_into_a_folder_of_ours_goes_on_into_the_new_one(tmp_path, exchange, linked, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    if not linked:
        monkeypatch.setattr(os, "link", fails_with(errno.EPERM))
    folder = tmp_path / "folder"
    write(folder, "old")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "there").symlink_to(tmp_path)
    write(folder, "new")
    assert whole(folder) == "new" and (folder / "notes" / "mine.txt").read_text() == "mine"
    assert (folder / "empty").is_dir() and (folder / "there").is_symlink()
    assert sorted(os.listdir(folder)) == ["a", "empty", "manifest.json", "notes", "there"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("mine")
    with pytest.raises(NotOursError, match="a is not ssl_kit's"):
        write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "a").read_text() == "mine" and os.listdir(tmp_path) == ["folder"]
    os.rename(tmp_path / "folder" / "a", tmp_path / "folder" / "b")
    write(tmp_path / "folder", "new")
    assert whole(tmp_path / "folder") == "new" and (tmp_path / "folder" / "b").read_text() == "mine"


def test_a_file_of_somebody_else_in_a_folder_of_ours_is_not_replaced(tmp_path):
    with atomic_folder(tmp_path / "folder", manifest={}) as temporary:
        (temporary / "b").write_text("ours")
    (tmp_path / "folder" / "a").write_text("mine")
    with pytest.raises(NotOursError, match="a is not ssl_kit's"):
        write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "a").read_text() == "mine" and (tmp_path / "folder" / "b").exists()


def fails_with(number):
    def fails(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_lock_that_is_no_file_is_told_in_one_line(tmp_path, kind):
    path = tmp_path / "run" / ".lock"
    path.parent.mkdir()
    {"folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "x"), "pipe": lambda: os.mkfifo(path)}[kind]()
    told: list[bool] = []
    asking = threading.Thread(target=lambda: told.append(given_up(tmp_path / "run")), daemon=True)
    asking.start()
    asking.join(timeout=20)
    assert told == [kind != "link"]  # a pipe is not waited for
    with pytest.raises(UserError, match=r"\.lock cannot be opened"), lock(tmp_path / "run"):
        pass
    assert os.path.lexists(path) and not (tmp_path / "x").exists()


def test_what_is_in_a_lock_file_of_somebody_else_stays(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_folder_that_was_only_locked_is_gone_again_and_one_that_was_there_stays(tmp_path):
    with lock(tmp_path / "new" / "run"):
        pass
    assert not os.listdir(tmp_path)
    (tmp_path / "old").mkdir()
    with lock(tmp_path / "old"):
        pass
    with lock(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "a").touch()
    assert sorted(os.listdir(tmp_path)) == ["new", "old"] and (tmp_path / "new" / "run" / "a").exists()


def test_a_lock_that_its_former_holder_removes_is_taken_anew(tmp_path):
    folder = tmp_path / "run"
    holding, done = threading.Event(), threading.Event()

    def first():
        with lock(folder):
            holding.set()
            time.sleep(0.2)  # the other one opens the file and waits for it; then it is removed

    thread = threading.Thread(target=first)
    thread.start()
    holding.wait()
    with lock(folder, wait=True):
        done.set()
        assert (folder / ".lock").exists()
        with pytest.raises(UserError, match="in use"), lock(folder):
            pass
    thread.join()
    assert done.is_set()


def in_little_room(size, work):
    """Does `work` in a process whose files may not grow beyond `size` bytes; the error it ends with."""
    read, end = os.pipe()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
        except FullError as error:
            os.write(end, str(error).encode())

    child(limited)
    os.close(end)
    with os.fdopen(read) as file:
        return file.read()


def test_no_room_is_one_error_in_words_whoever_writes(tmp_path):
    write(tmp_path / "folder", "old")

    def tensors():
        with atomic_folder(tmp_path / "folder") as temporary:
            save_file({"x": np.zeros(10_000)}, temporary / "x.safetensors")

    works = {
        "folder": [tensors, lambda: write(tmp_path / "folder", "n" * 20_000)],
        "a.json": [lambda: write_json(tmp_path / "a.json", "n" * 20_000)],
    }
    for name, tried in works.items():
        for work in tried:
            said = in_little_room(8_192, work)
            assert said.startswith(f"{tmp_path / name} could not be written: File too large") and "\n" not in said
    assert whole(tmp_path / "folder") == "old" and os.listdir(tmp_path) == ["folder"]


def test_work_goes_on_where_a_full_disk_does_not_matter(capsys):
    with files.if_room("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert capsys.readouterr().err.startswith("warning: /dev/full could not be written: No space left on device")
    with pytest.raises(ValueError, match="other"), files.if_room("/dev/full"):
        raise ValueError("other")


def test_other_errors_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "file" / "a.json", 1)
    with pytest.raises(OSError) as error, atomic_file(tmp_path / "a"):
        raise OSError(errno.EIO, "the disk is broken")
    assert not isinstance(error.value, FullError)


def test_room_is_looked_for_before_it_is_needed(tmp_path):
    check_space(tmp_path / "not" / "there", 1_000)
    with pytest.raises(FullError, match=r"MiB of free space and 1,073,741,824\.0 are needed"):
        check_space(tmp_path / "not" / "there", 2**50)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_folder_keeps_the_old_one(tmp_path):
    with atomic_folder(tmp_path / "f", manifest={}) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f", manifest={}) as folder:
        (folder / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "f" / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]
    read_manifest(tmp_path / "f")


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "f", manifest={"name": name}) as folder:
            (folder / name).write_text(name)
    assert sorted(os.listdir(tmp_path / "f")) == ["manifest.json", "second"]
    assert read_manifest(tmp_path / "f")["name"] == "second"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_found_and_named(tmp_path, damage):
    with atomic_folder(tmp_path / "f", manifest={}) as folder:
        (folder / "x.bin").write_bytes(bytes(range(200)))
    file = tmp_path / "f" / "x.bin"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "f" / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match=r"manifest.json" if damage == "manifest" else r"x\.bin"):
        read_manifest(tmp_path / "f")


@pytest.mark.parametrize("look", [1, 2, 3])
def test_a_folder_that_goes_while_it_is_read_is_told(tmp_path, monkeypatch, look):
    write(tmp_path / "folder", "text")
    looks, is_file = [], Path.is_file

    def last_seen(path):
        seen = is_file(path)
        looks.append(path)
        if len(looks) == look:
            shutil.rmtree(tmp_path / "folder")
        return seen

    monkeypatch.setattr(Path, "is_file", last_seen)
    with pytest.raises(DamagedError, match=r"manifest.json is missing|folder was replaced while it was read"):
        read_manifest(tmp_path / "folder")
    assert len(looks) >= look


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "f"
    folder.mkdir()
    write_sealed(folder / "manifest.json", {"files": {"../secret": "0"}})
    with pytest.raises(DamagedError, match="outside"):
        read_manifest(folder)


def test_json_refuses_nan_and_deep_nesting(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(DamagedError, match=r"deep\.json"):
        read_json(tmp_path / "deep.json")


def test_a_second_process_is_refused_while_the_lock_is_held(tmp_path):
    code = f"from ssl_kit.core.locking import lock\nwith lock({str(tmp_path)!r}): print('held')"
    with lock(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another" in second.stderr and "held" not in second.stdout
    assert "held" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert issubclass(DamagedError, UserError)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """What the disk is asked for, in order: ("sync", inode, bytes by then), and ("name", inode) of a new `target`."""
    asked, target = [], tmp_path / "target"
    fsync = os.fsync

    def noted(handle):
        fsync(handle)
        asked.append(("sync", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def naming(rename):
        def renamed(one, other):
            done = rename(one, other)
            if os.path.lexists(target) and asked[-1:] != [("name", target.stat().st_ino)]:
                asked.append(("name", target.stat().st_ino))
            return done

        return renamed

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", naming(os.replace))
    monkeypatch.setattr(files, "_exchanged", naming(files._exchanged))
    return asked


def around_the_name(asked, path):
    """{inode: bytes} of what was on the disk before `path` had its name, and after."""
    named = asked.index(("name", path.stat().st_ino))
    return [{inode: size for kind, inode, *size in part if kind == "sync"} for part in (asked[:named], asked[named:])]


@pytest.mark.parametrize("manifest", [None, {}])
@pytest.mark.parametrize("way", ["new", "exchanged", "moved"])
def test_a_folder_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(
    tmp_path, disk, monkeypatch, way, manifest
):
    """After a power cut there is the old one or the new: every file, each folder, then the name, then its parent."""
    target = tmp_path / "target"
    if way != "new":
        write(target, "old")
    if way == "moved":
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    disk.clear()
    with atomic_folder(target, manifest) as temporary:
        (temporary / "deeper").mkdir()
        for name in ("a", "deeper/b"):
            (temporary / name).write_text(name * 10_000)
    before, after = around_the_name(disk, target)
    for name in ("a", "deeper/b", *(["manifest.json"] if manifest is not None else [])):
        assert before[(target / name).stat().st_ino] == [(target / name).stat().st_size], name
    assert {target.stat().st_ino, (target / "deeper").stat().st_ino} <= before.keys()
    assert tmp_path.stat().st_ino in after


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, disk, old):
    target = tmp_path / "target"
    if old:
        target.write_text(old)
    with atomic_file(target) as temporary:
        temporary.write_text("new" * 10_000)
    before, after = around_the_name(disk, target)
    assert before == {target.stat().st_ino: [30_000]} and tmp_path.stat().st_ino in after


def test_an_appended_line_is_on_the_disk_when_it_is_told(tmp_path, disk):
    for number in range(2):
        append_line(tmp_path / "lines", {"number": number})
        lines = (tmp_path / "lines").stat()
        assert disk[-1] == ("sync", lines.st_ino, lines.st_size)
