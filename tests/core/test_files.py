"""Files are whole or not there: interrupted writers leave the old content, readers notice any change."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ssl_kit.core import files
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import (
    DamagedError,
    FullError,
    atomic_file,
    atomic_folder,
    check_space,
    lock,
    read_json,
    read_manifest,
    write_json,
    write_sealed,
)


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


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    write(tmp_path / "elsewhere", "elsewhere")
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "folder", "new")
    assert whole(tmp_path / "folder") == "new" and not (tmp_path / "folder").is_symlink()
    assert whole(tmp_path / "elsewhere") == "elsewhere" and sorted(os.listdir(tmp_path)) == ["elsewhere", "folder"]


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
    code = f"from ssl_kit.core.files import lock\nwith lock({str(tmp_path)!r}): print('held')"
    with lock(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by another" in second.stderr and "held" not in second.stdout
    assert "held" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert issubclass(DamagedError, UserError)
