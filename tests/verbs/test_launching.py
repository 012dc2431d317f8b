"""The launcher with programs of a few lines: what they find, the signals they get, and the exit code of the whole."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.core.process import LAUNCHER, LOST, processes_asked
from ssl_kit.verbs import launching
from ssl_kit.verbs.launching import launch

HEAD = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program in two processes, with TMP as its argument; (exit code, seconds)."""
    monkeypatch.setattr(launching, "_GRACE", 0.5)

    def run(program, count=2):
        began = time.monotonic()
        return launch([str(tmp_path)], count, (sys.executable, "-c", HEAD + program)), time.monotonic() - began

    return run


def test_each_process_finds_its_number_and_where_they_meet(run, tmp_path):
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", LAUNCHER, "OMP_NUM_THREADS")
    program = (
        f"text = ' '.join(os.environ[name] for name in {names})\nopen(sys.argv[1] + f'/{{rank}}', 'w').write(text)"
    )
    assert run(program, 3)[0] == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:3] for row in found] == [["3", "3", str(rank)] for rank in range(3)]
    assert found[0][3:] == found[1][3:] == found[2][3:] and int(found[0][4]) >= 1
    assert not os.path.exists(found[0][3])  # nothing is left of it


@pytest.mark.parametrize(
    ("program", "code", "told"),
    [
        ("sys.exit(2 if rank else 0)", 2, ""),  # a user's mistake, which the process has told
        ("sys.exit(2 if rank else 1)", 2, ""),
        (f"sys.exit(2 if rank else {LOST})", 2, ""),
        (f"sys.exit(1 if rank else {LOST})", 1, "process 1 has failed"),
        (f"rank and os.kill(os.getpid(), signal.SIGKILL)\nsys.exit({LOST})", 137, "process 1 was ended by SIGKILL"),
        ("rank or os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", 137, "process 0 was ended by SIGKILL"),
        (f"rank or time.sleep(60)\nsys.exit({LOST})", LOST, "process 0 did not answer"),  # it hangs
        (f"sys.exit({LOST})", LOST, "lost each other"),
        ("rank and sys.exit(143)\ntime.sleep(0.2)\nsys.exit(143)", 143, ""),
    ],
)
def test_the_code_is_that_of_what_happened_and_one_line_tells_it(run, capfd, program, code, told):
    got, seconds = run(program)
    text = capfd.readouterr().err
    assert got == code and seconds < 30
    assert text.count("\n") == bool(told) and told in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_every_process_once(run, tmp_path, number):
    program = (
        "got = []\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):\n"
        "    signal.signal(number, lambda number, frame: got.append(number))\n"
        "open(sys.argv[1] + f'/ready{rank}', 'w').close()\n"
        "end = time.monotonic() + 20\n"
        "while not got and time.monotonic() < end: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "assert len(got) == 1\n"
        "sys.exit(128 + got[0])"
    )

    def send():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    former = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    assert run(program)[0] == 128 + number
    assert signal.getsignal(number) == former


def test_under_nohup_a_closed_terminal_reaches_nobody(run, tmp_path):
    program = (
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
        "open(sys.argv[1] + f'/ready{rank}', 'w').close()\n"
        "while not os.path.exists(sys.argv[1] + '/sent'): time.sleep(0.01)"
    )

    def send():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        (tmp_path / "sent").touch()

    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Thread(target=send, daemon=True).start()
        assert run(program)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, former)


LIMITED = r"""
import resource, sys
from ssl_kit.core.errors import UserError
from ssl_kit.verbs.launching import launch
resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[1])))
program = "import os, resource; os.write(1, b'%d\\n' % resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
try:
    sys.exit(launch([], 2, (sys.executable, "-c", program)))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("most", "said"), [("1000", ["80", "80"]), ("60", ["60 files may be open at once"])])
def test_they_may_have_as_many_files_open_as_they_need(most, said):
    """With fewer, gloo waits for ever or aborts."""
    done = subprocess.run([sys.executable, "-c", LIMITED, most], capture_output=True, text=True, check=True)
    for line, words in zip(done.stdout.splitlines(), said, strict=True):
        assert line.startswith(words)


def test_their_addresses_are_of_this_machine(run, tmp_path):
    program = "open(sys.argv[1] + f'/{rank}', 'w').write(os.environ['GLOO_SOCKET_IFNAME'])"
    assert run(program)[0] == 0
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "lo"


@pytest.mark.parametrize(("devices", "count"), [(1, 1), ("2", 2), (3, 3), ("[0,1]", 2), ([1], 1), ([0, 1, 2], 3)])
def test_devices_are_a_number_or_a_list(devices, count, monkeypatch):
    assert processes_asked(devices) == count
    monkeypatch.setenv("RANK", "0")
    assert processes_asked(devices) == 1  # it was started as one of them


@pytest.mark.parametrize("devices", ["auto", -1, 0, "two", "[]", "1.5", None])
def test_other_devices_are_refused(devices):
    with pytest.raises(UserError, match=r"wanted how many processes to start"):
        processes_asked(devices)
