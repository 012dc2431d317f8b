"""Compiled functions are kept in the cache folder alone, and a cache that fails costs time only."""

import resource
from pathlib import Path

import pytest

from ssl_kit.core.process import cache_folder
from ssl_kit.views.kernel_cache import cached


def compiled():
    @cached
    def twice(number):
        return 2 * number

    return twice


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(folder):
    return sorted(folder.rglob("*.nb[ic]"))


def used(function):
    assert function(21) == 42
    return sum(function.stats.cache_hits.values())


def test_it_is_compiled_once_and_kept_there_only(folder):
    beside = set(Path(__file__).parent.rglob("*"))
    assert used(compiled()) == 0 and len(kept(folder)) == 2
    assert used(compiled()) == 1
    assert {path for path in set(Path(__file__).parent.rglob("*")) - beside if path.suffix.startswith(".nb")} == set()


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"garbage" * 100)])
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_is_made_anew(folder, suffix, spoil, capsys):
    used(compiled())
    for path in kept(folder):
        if path.suffix == suffix:
            spoil(path)
    assert used(compiled()) == 0
    assert used(compiled()) == 1
    assert capsys.readouterr().err == ""


def test_no_room_for_it_is_said_once_and_it_works(folder, capsys):
    twice = compiled()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        assert used(twice) == 0 and twice(1.5) == 3  # two signatures
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("File too large") == 1


def test_an_unreadable_one_is_said_and_it_works(folder, capsys):
    used(compiled())
    for path in kept(folder):
        path.unlink()
        path.mkdir()
    assert used(compiled()) == 0
    assert "views are compiled anew" in capsys.readouterr().err


def test_no_place_for_it_is_said_and_it_works(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    beside = set(Path(__file__).parent.rglob("*.nb?"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert used(compiled()) == 0
    assert "XDG_CACHE_HOME names another place" in capsys.readouterr().err
    assert set(Path(__file__).parent.rglob("*.nb?")) == beside


def test_who_has_loaded_numba_before_gets_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert used(compiled()) == 0
    assert kept(cache_folder() / "numba")


def test_the_kernel_is_kept_so():
    from ssl_kit.views.kernel import make_views

    assert type(make_views._cache).__module__ == "ssl_kit.views.kernel_cache"
