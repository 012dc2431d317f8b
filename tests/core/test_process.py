"""Where libraries may write, what they do not send, and what is said when the machine refuses something."""

import errno
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_kit.core.process import _CACHES, _NOTHING_SENT, cache_folder, imports_set_aside, prepare, refusal


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user whose folders are all new, and who has set nothing."""
    for name in (*_CACHES, *_NOTHING_SENT, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "home"


def test_all_caches_are_in_one_folder_and_nothing_is_sent(home, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare()
    assert {Path(os.environ[name]).parent for name in _CACHES} == {home / ".cache" / "ssl_kit"}
    assert {os.environ[name] for name in _NOTHING_SENT} == {"1"}
    assert os.stat(cache_folder()).st_mode & 0o777 == 0o700


def test_what_the_user_has_set_wins(home, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "NUMBA_CACHE_DIR": "/mine", "ORT_DISABLE_TELEMETRY": "0"})
    prepare()
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine" and os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_the_folder_follows_xdg(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere" / "ssl_kit"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the specification
    assert cache_folder() == home / ".cache" / "ssl_kit"


def a_file(home):
    home.parent.mkdir(exist_ok=True)
    home.write_text("")


def below_a_file(home):
    home.mkdir()
    (home / ".cache").write_text("")


def others_may_write(home):
    (home / ".cache" / "ssl_kit").mkdir(parents=True)
    (home / ".cache" / "ssl_kit").chmod(0o777)


def of_another(home):
    (home / ".cache" / "ssl_kit").mkdir(parents=True)
    if os.getuid():
        pytest.skip("only root can give a folder away")
    os.chown(home / ".cache" / "ssl_kit", 12345, 12345)


@pytest.mark.parametrize("spoil", [a_file, below_a_file, others_may_write, of_another])
def test_without_a_home_to_write_to_it_is_in_tmp(home, tmp_path, spoil):
    spoil(home)
    assert cache_folder() == tmp_path / f"ssl_kit-{os.getuid()}"


def test_a_folder_that_another_has_put_into_tmp_is_not_used(home, tmp_path):
    """numba runs what it finds there."""
    a_file(home)
    (tmp_path / "own").mkdir()
    (tmp_path / f"ssl_kit-{os.getuid()}").symlink_to(tmp_path / "own")
    assert cache_folder() is None


def test_no_folder_at_all_is_none(home, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nothing")
    monkeypatch.setenv("HOME", "/proc/nothing")
    assert cache_folder() is None
    prepare()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user whom the system does not know")
def test_a_user_without_a_home_gets_one(tmp_path):
    """As in a container that is run under any number; Bokeh cannot be loaded without."""
    program = "import os, pathlib, pwd, tempfile\nfrom ssl_kit.core.process import prepare\nos.setuid(12345)\n"
    program += "prepare()\nprint(pathlib.Path.home())"
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid():  # pytest's own are for one user
            parent.chmod(parent.stat().st_mode | 0o055)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.strip() == str(tmp_path / "ssl_kit-12345"), done.stderr


def test_python_users_have_it_before_anything_is_loaded(tmp_path):
    program = "import os, sys, ssl_kit\nassert 'NUMBA_CACHE_DIR' not in os.environ\n"
    program += "try: ssl_kit.doctor\nexcept ImportError: pass\nprint(os.environ['NUMBA_CACHE_DIR'])"
    blocked = f"import sys\nsys.modules['torch'] = sys.modules['numba'] = None\n{program}"  # loading them takes seconds
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / ".cache" / "ssl_kit" / "numba")


def test_in_a_process_of_somebody_else_the_collector_is_left_alone():
    before = gc.get_freeze_count()
    with imports_set_aside():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def too_many_files():
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        Path("/dev/null").read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def no_room():
    with open("/dev/full", "w") as full:
        full.write("x")


def circle(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    (folder / "a").read_text()


def from_a_library(folder):
    try:
        too_many_files()
    except OSError as error:
        raise ImportError("no module of that name") from error


def while_handling(folder):
    try:
        too_many_files()
    except OSError:
        raise RuntimeError("something is wrong")


# way -> what the line says; what makes the error is real
REFUSED = {
    "Not a directory; choose another path": lambda folder: (folder / "file" / "x").write_text("x"),
    "Is a directory; choose another path": lambda folder: folder.write_text("x"),
    "File exists; choose another path": lambda folder: folder.mkdir(),
    "Directory not empty": lambda folder: folder.rmdir(),
    "File name too long": lambda folder: (folder / ("x" * 300)).write_text("x"),
    "Too many levels of symbolic links": circle,
    "No such file or directory": lambda folder: (folder / "gone").read_text(),
    "Too many open files; allow this process more open files, such as ulimit -n": lambda folder: too_many_files(),
    "No space left on device; make room": lambda folder: no_room(),
    "Too many open files; allow this": from_a_library,
    "Too many open files; allow": while_handling,
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_the_machine_refuses_is_a_line(tmp_path, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception) as caught:
        REFUSED[words](tmp_path)
    line = refusal(caught.value)
    assert line is not None and words in line and "\n" not in line
    assert not isinstance(caught.value, OSError) or caught.value.filename is None or str(caught.value.filename) in line


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EDQUOT, errno.ENFILE])
def test_so_is_what_cannot_be_had_here(number):
    assert refusal(OSError(number, os.strerror(number), "a/path")).startswith(f"a/path: {os.strerror(number)}; ")


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "libx.so.2: cannot open shared object file: Too many open files",
        "could not open /x/index for writing: Permission denied",
        "The server socket has failed to bind. code: -24, name: EMFILE, message: too many open files",
    ],
)
def test_so_is_what_libraries_say_in_their_own_words(text):
    assert refusal(RuntimeError(text)).startswith(f"{text}; ")


def unfinished():
    try:
        Path("/nowhere/at/all").read_text()
    except FileNotFoundError:
        return {}["a mistake of ours"]


def two_paths(folder):
    os.rename(folder / "a", folder / "b")


def test_both_paths_are_named(tmp_path):
    with pytest.raises(OSError) as caught:
        two_paths(tmp_path)
    assert refusal(caught.value).startswith(f"{tmp_path / 'a'} and {tmp_path / 'b'}: No such file")


def test_a_file_is_named_as_it_was_to_be_named():
    """Not as the file beside it that was to get the name."""
    line = refusal(OSError(errno.EROFS, "-", "/a/.b.png.x_0y1z2w.tmp/part", None, "c"))
    assert line.startswith("/a/b.png/part and c: -; ")
    assert refusal(OSError(errno.ENOSPC, "full", ".d.csv.abcdefgh.tmp")).startswith("d.csv: full; ")
    assert refusal(OSError(errno.EIO, "fails", b"/e")).startswith("/e: fails; ")


def test_mistakes_of_ours_stay_what_they_are():
    for wrong in (unfinished, lambda: os.close(12345), lambda: 1 / 0, lambda: socket.socket().fileno().missing):
        with pytest.raises(Exception) as caught:
            wrong()
        assert refusal(caught.value) is None
