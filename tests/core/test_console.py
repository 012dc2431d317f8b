"""What people read is what was meant: names as they are, plain lines in files, results only under --quiet."""

import io
import os
import pty
import re
import sys
import threading
from contextlib import contextmanager

import pytest

from ssl_kit.core.console import (
    configure,
    if_interrupted,
    next_command,
    printable,
    progress,
    result,
    say,
    shows_bars,
    table,
    warn,
)

ROWS = [["mean of all", 0.5, "[x]"], ["a", 12.25, ""], ["a row with fewer cells"]]


def everything():
    say("a choice")
    result("a result")
    warn("a warning")
    table("scores", ["score", "value", "why"], ROWS)
    with progress(10, "counting") as bar:
        bar.advance(bar.task_ids[0], 10)
    next_command("ssl-kit doctor")


@contextmanager
def terminal(**environment):
    """Both streams on a pseudo-terminal inside the block; yields a list that holds what was printed after it."""
    ours, theirs = pty.openpty()
    printed = []

    def read():
        while True:
            try:
                printed.append(os.read(ours, 4096))
            except OSError:  # the other end is closed
                break

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, open(theirs, "w", encoding="utf-8") as stream:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield printed
    reader.join()
    os.close(ours)
    printed[:] = [b"".join(printed).decode()]


def test_names_are_printed_as_they_are(capsys):
    say("mnist5k:train: [bold]4[/bold] images :smile:")
    warn("a:train: [x]")
    table("t", ["id"], [[":train: [red]a"]])
    printed = capsys.readouterr()
    assert "mnist5k:train: [bold]4[/bold] images :smile:" in printed.out and ":train: [red]a" in printed.out
    assert "a:train: [x]" in printed.err


def test_names_cannot_steer_the_terminal_or_stop_the_print():
    name = "a\x1b[31mb\rc\x9bd\udcff.jpg"
    with terminal() as printed:
        say(name)
        warn(name)
        table(name, ["id"], [[name]])
    text = printed[0]
    assert text.count(r"a\x1b[31mb\x0dc\x9bd\udcff.jpg") == 4 and "\x9b" not in text


def test_what_an_encoding_lacks_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert printable("0.5 ±0.1 \t|\n", stream) == "0.5 \\xb10.1 \t|\n"


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    everything()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "a choice",
        "a result",
        "scores",
        "score                   value  why",
        "mean of all               0.5  [x]",
        "a                       12.25",
        "a row with fewer cells",
        "next: ssl-kit doctor",
    ]
    assert printed.err == "warning: a warning\n"


def test_a_row_is_one_line_however_long(capsys):
    table("t", ["name", "text"], [["x" * 300, "two\nlines"]])
    assert capsys.readouterr().out.splitlines()[2] == "x" * 300 + "  two lines"


def test_quiet_prints_results_and_warnings_only(capsys):
    configure(quiet=True)
    everything()
    printed = capsys.readouterr()
    assert "a result" in printed.out and "mean of all" in printed.out and printed.err == "warning: a warning\n"
    assert "a choice" not in printed.out and "next:" not in printed.out


def test_json_moves_everything_to_stderr_and_quiet_takes_the_results_off(capsys):
    configure(to_stderr=True)
    everything()
    printed = capsys.readouterr()
    assert printed.out == "" and "a choice" in printed.err and "mean of all" in printed.err
    configure(to_stderr=True, quiet=True)
    everything()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "warning: a warning\n"


def test_a_terminal_gets_colours_frames_and_bars():
    with terminal() as printed:
        assert shows_bars()
        everything()
    assert "\x1b[33m" in printed[0] and "┃" in printed[0] and "counting" in printed[0]


def test_no_color_is_obeyed():
    with terminal(NO_COLOR="1") as printed:
        everything()
    text = printed[0]
    codes = {int(code) for codes in re.findall(r"\x1b\[([\d;]*)m", text) for code in codes.split(";") if code}
    assert not {code for code in codes if 30 <= code <= 49 or 90 <= code <= 107}, codes
    assert "counting" in text


def test_quiet_shows_no_bar_on_a_terminal():
    configure(quiet=True)
    with terminal() as printed:
        assert not shows_bars()
        everything()
    assert "counting" not in printed[0] and "a warning" in printed[0]


def test_an_interrupt_says_what_is_kept():
    with pytest.raises(KeyboardInterrupt, match="3 parts are kept"), if_interrupted(lambda: "3 parts are kept"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="step 7"), if_interrupted(lambda: "step 7"):  # as Lightning puts it
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    with pytest.raises(SystemExit, match="143"), if_interrupted(lambda: "no"):  # stopped at a step's end, and said so
        raise SystemExit(143)
    with pytest.raises(OSError), if_interrupted(lambda: "no"):
        raise OSError
