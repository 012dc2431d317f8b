"""What is printed may be lost, and nothing else; what is printed by anybody cannot steer a terminal."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
import threading

import pytest

PROTECTED = "import os, sys\nfrom ssl_kit.core.process import protect, terminal, lost\nprotect()\n"


def start(program, *options, **streams):
    return subprocess.Popen([sys.executable, *options, "-c", PROTECTED + program], **streams)


def told(process):
    """What a program writes to the descriptor it is given, and its exit code."""
    return process.communicate(timeout=60)[0].decode(), process.returncode


GOES_ON = """
for number in range(3):
    print("x" * 10_000, flush=True)
    print("y" * 10_000, file=sys.stderr)
    os.write(2, b"a library in C")
    input()
open(sys.argv[1], "w").write("done")
"""


def goes_on(path, process):
    process.stdin.write(b"\n\n\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert path.read_text() == "done"


def test_a_pipe_without_a_reader_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROTECTED + GOES_ON, tmp_path / "end"],
        stdin=subprocess.PIPE, stdout=writer, stderr=writer,
    )  # fmt: skip
    os.close(writer)
    os.close(reader)
    goes_on(tmp_path / "end", process)


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_terminal_that_is_closed_ends_nothing(tmp_path, options):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *options, "-c", PROTECTED + GOES_ON, tmp_path / "end"],
        stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 1) == b"x"
    os.close(ours)
    goes_on(tmp_path / "end", process)


def test_a_disk_that_is_full_for_a_while_takes_what_comes_later(tmp_path):
    program = """
import resource
print("before", flush=True)
for size in (6, 1_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    print("at", size, flush=True)
    print(lost(terminal(sys.stdout)), file=sys.stderr)
"""
    with open(tmp_path / "log", "wb") as log:
        process = start(program, stdout=log, stderr=subprocess.PIPE)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0 and "File too large" in error
    assert (tmp_path / "log").read_text() == "before\nat 1000\n"


def test_a_full_device_ends_nothing():
    with open("/dev/full", "wb") as full:
        for options in ((), ("-u",)):
            assert start("print('x' * 100_000)", *options, stdout=full, stderr=full).wait(timeout=60) == 0


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    file = tmp_path / "file"
    program = f"opened = open({str(file)!r}, 'w')\nprint('no')\nos.write(2, b'no')\nsys.exit(opened.fileno() < 3)"
    process = start(program, preexec_fn=lambda: os.closerange(0, 3))
    assert process.wait(timeout=60) == 0 and file.read_text() == ""


def test_what_does_not_wait_gets_everything():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)
    process = start("for n in range(20_000): print(n, 'x' * 20)", stdout=writer)
    os.close(writer)
    got = []
    with open(reader, encoding="ascii") as lines:
        got = [int(line.split()[0]) for line in lines]
    assert process.wait(timeout=60) == 0 and got == list(range(20_000))


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_the_order_of_what_is_printed_is_kept(options):
    program = "from rich.console import Console\nfor n in range(5):\n    print(n)\n"
    program += "    Console(file=terminal(sys.stdout)).print(n, n)"
    text, code = told(start(program, *options, stdout=subprocess.PIPE))
    assert code == 0 and text.splitlines() == [line for n in range(5) for line in (str(n), f"{n} {n}")]


NASTY = "a\x1b[31mb\x1b]0;title\x07c\x9bd\rebackspace\x08\u202egnp.exe\x7f"
SHOWN = r"a\x1b[31mb\x1b]0;title\x07c\x9bd\x0debackspace\x08\u202egnp.exe\x7f"
WAYS = {
    "print": "print(nasty)",
    "writelines": "sys.stderr.writelines([nasty])",
    "traceback": "raise RuntimeError(nasty)",
    "exit": "sys.exit(nasty)",
    "warning": "import warnings\nwarnings.warn(nasty)",
    "logging": "import logging\nlogging.warning('%s', nasty)",
    "thread": "import threading\nthreading.Thread(target=lambda: 1 / 0, name=nasty).start()",
    "unraisable": "class Odd:\n    def __del__(self): raise ValueError(nasty)\nOdd()",
    "above a bar": "from ssl_kit.core import console\nwith console.progress(3, 'bar') as bar:\n    print(nasty)",
    "warned above a bar": "from ssl_kit.core import console\nwith console.progress(3, 'bar'):\n    console.warn(nasty)",
}


@pytest.mark.parametrize("way", WAYS)
def test_nobody_can_steer_the_terminal(way):
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # or the terminal itself makes \r\n of \n
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "300", "NO_COLOR": "1"}
    program = f"nasty = {NASTY!r}\n{WAYS[way]}\n"
    process = start(program, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []

    def read():
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(timeout=60)
    reader.join()
    os.close(ours)
    text = b"".join(parts).decode()
    assert not [
        steering for steering in ("\x1b[31m", "\x1b]", "\x07", "\x9b", "\x08", "\u202e", "\x7f") if steering in text
    ]
    assert SHOWN in text or way == "above a bar"  # where rich cuts it
