"""Files are whole or not there: interrupted writers leave the old content, readers notice any change."""

import os
import subprocess
import sys

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import (
    DamagedError,
    atomic_file,
    atomic_folder,
    lock,
    read_json,
    read_manifest,
    write_json,
)


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


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "f"
    folder.mkdir()
    write_json(folder / "manifest.json", {"files": {"../secret": "0"}})
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
