"""Keys: whose they are, how they come to be, and what is refused; signatures are RFC 2104 and stand for one thing."""

import hashlib
import hmac
import multiprocessing
import os
import stat

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.core.sealed import fingerprint
from ssl_kit.embeddings.signing import find_key, is_signed, key_file, make_key, signature

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("SSL_KIT_KEY", raising=False)
    return tmp_path


def test_a_key_is_made_once_and_for_its_user_alone(home):
    before = os.umask(0)
    try:
        assert find_key() is None and not (home / "data").exists()  # readers make none
        key = make_key()
    finally:
        os.umask(before)
    assert len(key) == 32 and key == find_key() == make_key() == key_file().read_bytes()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (key_file(), key_file().parent)] == [0o600, 0o700]
    assert os.listdir(home / "data" / "ssl_kit") == ["key"]
    key_file().unlink()
    assert make_key() != key


def test_the_usual_place_is_below_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    for value in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_DATA_HOME", value)
        assert key_file() == home / ".local" / "share" / "ssl_kit" / "key"


def _make_at_once(barrier, queue):
    barrier.wait()
    queue.put(make_key())


def test_processes_that_make_a_key_at_once_end_with_one(home, monkeypatch):
    fork = multiprocessing.get_context("fork")
    for number in range(5):
        monkeypatch.setenv("XDG_DATA_HOME", str(home / f"{number}"))
        barrier, queue = fork.Barrier(6), fork.Queue()
        processes = [fork.Process(target=_make_at_once, args=(barrier, queue)) for _ in range(6)]
        for process in processes:
            process.start()
        made = {queue.get(timeout=30) for _ in processes}
        for process in processes:
            process.join()
        assert made == {find_key()} and os.listdir(key_file().parent) == ["key"]


def test_where_nothing_can_be_written_there_is_no_key(home, monkeypatch):
    (home / "file").write_text("x")
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "file"))
    assert find_key() is None
    with pytest.raises(OSError, match="file"):
        make_key()
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    monkeypatch.chdir(home)
    assert find_key() is None
    with pytest.raises(OSError, match="no home"):
        make_key()
    assert os.listdir(home) == ["file"]


def written(path, data, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_a_group_shares_a_key_by_a_file_or_by_its_digits(home, monkeypatch, data):
    monkeypatch.setenv("SSL_KIT_KEY", str(written(home / "group", data)))
    assert find_key() == make_key() == KEY
    monkeypatch.setenv("SSL_KIT_KEY", KEY.hex())
    assert find_key() == make_key() == KEY and not (home / "data").exists()


@pytest.mark.parametrize("value", ["", "ab" * 31, "ab" * 32 + "c", "zz" * 32, "/nowhere/key", "~nobody/key", "."])
def test_what_is_no_key_is_refused_without_being_shown(monkeypatch, value):
    monkeypatch.setenv("SSL_KIT_KEY", value)
    for call in (find_key, make_key):
        with pytest.raises(UserError, match=rf"SSL_KIT_KEY holds {len(value)} characters.*64 hexadecimal") as caught:
            call()
        assert len(value) < 2 or value not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622, 0o777])
def test_a_key_that_others_may_read_or_write_is_refused(home, monkeypatch, mode):
    group = written(home / "group", KEY, mode)
    for value in (None, str(group)):
        if value is None:
            written(key_file(), KEY, mode)
        else:
            monkeypatch.setenv("SSL_KIT_KEY", value)
        for call in (find_key, make_key):
            with pytest.raises(UserError, match=rf"others may read or write the key .*mode {mode:04o}.*chmod 600"):
                call()


@pytest.mark.parametrize("data", [b"", KEY[:31], KEY + b"\n", KEY.hex().encode()[:-1], b"g" * 64, bytes(10_000)])
def test_a_key_of_another_length_is_refused(data):
    written(key_file(), data)
    for call in (find_key, make_key):
        with pytest.raises(UserError, match="wanted 32, or 64 hexadecimal digits"):
            call()


def test_a_key_that_is_a_link_or_no_file_is_refused(home):
    key_file().parent.mkdir(parents=True)
    for target in (written(home / "elsewhere", KEY), home / "nothing"):
        key_file().symlink_to(target)
        for call in (find_key, make_key):
            with pytest.raises(UserError, match="is a link"):
                call()
        key_file().unlink()
    os.mkfifo(key_file(), 0o600)
    with pytest.raises(UserError, match="is no file"):
        find_key()


def test_a_signature_is_an_hmac_of_one_value_for_one_purpose():
    value = {"b": [1, 2.5], "a": None}
    told = hmac.new(KEY, f"index\0{fingerprint(value)}".encode(), hashlib.sha256).hexdigest()
    assert signature(KEY, "index", value) == told and is_signed(KEY, "index", {"a": None, "b": [1, 2.5]}, told)
    others = [(KEY[::-1], "index", value), (KEY, "other", value), (KEY, "index", {"b": [1, 2.5]})]
    assert not any(is_signed(*other, told) for other in others)
    for by in (None, 1, "", told[:-1], told.upper(), "é" * 64, "\ud800", [told], told + "\n"):
        assert not is_signed(KEY, "index", value, by)
