"""The terminal goes away, the disk is full, the process is killed: every verb, at random moments.

    python benchmarks/faults/terminal.py --json terminal.json        # goes on where it was stopped
    python benchmarks/faults/terminal.py --quick --only T1,T4

    K   SIGKILL
    T1  the terminal is closed: SIGHUP, and nothing can be printed from then on
    T2  the same under nohup, which puts SIGHUP off: the command ends as if nothing had happened
    T3  the pipe that it prints into has no reader any more: the same
    T4  the disk that it writes to is full at a random size: one line, exit code 2; what was there before is there
    T5  stdout and stderr lead to a full disk: the command ends as if nothing had happened

Trials go round through all verbs. Afterwards the same command, with --resume for a training, ends as the undisturbed
one: the files of its output that are the same each time are the same to the bit; of a training all rows, the encoder
and the last training state. In between, the record of a run is true: `interrupted` when it was told to stop.

The small disk is a tmpfs where one can be mounted, else no file may grow beyond a random size (RLIMIT_FSIZE).
"""

from __future__ import annotations

import argparse
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Rows, fork_warmed, kill_at, run_warmed
from trainings import SIDE, STEPS, Work, difference, look_often, outcome

from ssl_kit import cli
from ssl_kit.core.files import read_json, sha256
from ssl_kit.verbs import finetune as finetuning
from ssl_kit.verbs import manual

TRAININGS = ("pretrain", "finetune")
QUICK = ("pretrain", "embed")
DISK_MIB = 64
OFTEN = ["--checkpoint-minutes", "0.001"]
PRETRAIN = [
    *("--method.encoder.args", "{channels: [16, 16, 16, 16]}", "--method.projection", "[16, 8]", "--threads", "1"),
    *("--image-size", str(SIDE), "--batch-size", "16", "--epochs", "4", *OFTEN),
]


def words(verb: str, place: Path, out: Path) -> list[str]:
    """The command line of a verb; what it writes is `out`, or in it."""
    images, encoder = str(place / "images"), str(place / "encoder")
    return {
        "pretrain": [images, "--run", str(out), *PRETRAIN],
        "evaluate": [encoder, images, "--out", str(out), "--only", "knn,linear"],
        "finetune": [encoder, images, "--out", str(out), "--batch-size", "16", "--scratch", "false", *OFTEN],
        "embed": [encoder, images, "--out", str(out)],
        "index": [str(out)],
        "search": [str(place / "indexed"), f"{images}/class0/00.png", "--html", str(out / "found.html")],
        "duplicates": [str(place / "indexed"), "--csv", str(out / "twice.csv")],
        "report": [str(place / "finished"), "--out", str(out / "report.html")],
        "export": [encoder, "--out", str(out), "--images", images],
        "views": [images, "--out", str(out / "views.png"), "--count", "2"],
        "doctor": ["--seconds", "0.1"],
    }[verb]


class Trials:
    """All trials; every command runs in a child of this process."""

    def __init__(self, place: Path, verbs: tuple[str, ...]):
        self.place, self.verbs, self.log, self.disk = place, verbs, place / "log.txt", place / "disk"
        self.wanted: dict[str, dict[str, Any]] = {}
        self.sizes: dict[str, int] = {}
        self.refused = 0
        self.seconds: dict[str, float] = {}
        Work(place)  # images, an encoder, compiled views
        for name in ("home", "tmp", "disk"):
            (place / name).mkdir()
        os.environ |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        tempfile.tempdir = None

    def undisturbed(self, verb: str) -> None:
        """Makes what the trials of a verb are compared with, twice: what differs is not compared."""
        if verb in self.wanted:
            return
        if verb == "report":
            self.undisturbed("pretrain")
        if verb in ("search", "duplicates"):
            self.undisturbed("index")
        ends = []
        for _ in range(1 if verb in TRAININGS else 2):
            out = self.out(self.place / ("finished" if verb == "pretrain" else "out"), verb)
            began = time.perf_counter()
            run_warmed(self.command(verb, out), self.log)
            self.seconds[verb] = time.perf_counter() - began
            ends.append(self.made(verb, out))
            self.sizes[verb] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            if verb == "index":
                shutil.copytree(out, self.place / "indexed", dirs_exist_ok=True)
        first, second = ends[0], ends[-1]
        if verb == "index":  # its manifest tells how long a query took
            first["manifest.json"] = None
        same = {name: value if value == second.get(name) else None for name, value in first.items()}
        self.wanted[verb] = first if verb in TRAININGS else same

    def out(self, out: Path, verb: str) -> Path:
        """An empty place for what a verb writes; `index` finds embeddings there."""
        shutil.rmtree(out, ignore_errors=True)
        if verb == "index":
            embeddings = self.place / "embeddings"
            if not embeddings.exists():
                run_warmed(self.command("embed", embeddings), self.log)
            shutil.copytree(embeddings, out)
        return out

    def command(self, verb: str, out: Path, more: list[str] | None = None) -> Callable[[], None]:
        """The work of a child: the whole command, as a shell would start it."""
        line = [verb, *words(verb, self.place, out), *(more or [])]

        def work() -> None:
            look_often(pages=self.verbs != QUICK)
            finetuning._FEWEST_STEPS = STEPS  # type: ignore[misc]
            sys.argv = ["ssl-kit", *line]
            cli.run()

        return work

    def made(self, verb: str, out: Path) -> dict[str, Any]:
        """What a verb has made: names and sha256; of a training what two runs must share to be the same."""
        if verb in TRAININGS:
            return outcome(out)
        files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
        return {str(path.relative_to(out)): sha256(path) for path in files if path.name != ".lock"}

    def unlike(self, verb: str, out: Path) -> str | None:
        """How what is there differs from what the undisturbed command made; None when it does not."""
        made, wanted = self.made(verb, out), self.wanted[verb]
        if verb in TRAININGS:
            return difference(made, wanted)
        if made.keys() != wanted.keys():
            return f"files {sorted(made.keys() ^ wanted.keys())} are missing or left over"
        wrong = [name for name, value in made.items() if wanted[name] not in (None, value)]
        return f"{wrong} differ" if wrong else None

    def again(self, verb: str, out: Path) -> str | None:
        """The same command once more, to its end; what is wrong then."""
        if verb == "duplicates" and (out / "twice.csv").exists():  # a table is never replaced: it is whole
            return self.unlike(verb, out)
        begun = (out / ("recipe.yaml" if verb == "pretrain" else "finetuning")).exists()
        more = ["--resume"] if verb in TRAININGS and begun else ["--overwrite"] if verb == "export" else []
        process = fork_warmed(self.command(verb, out, more), self.log)
        process.join()
        if process.exitcode:
            return f"{verb} again ended with {process.exitcode}: {self.said()}"
        return _prefixed(f"{verb} again", self.unlike(verb, out))

    def said(self) -> str:
        return " | ".join(self.log.read_text(errors="replace").strip().splitlines()[-2:])

    def start(self, number: int, generator: random.Random) -> tuple[str, Path, float]:
        """The verb of a trial, its empty output and the moment at which something happens, in seconds."""
        verb = self.verbs[number % len(self.verbs)]
        self.undisturbed(verb)
        self.log.write_text("")
        return verb, self.out(self.place / "out", verb), generator.random() * self.seconds[verb]

    # the kinds

    def killed(self, number: int, generator: random.Random) -> str | None:
        verb, out, moment = self.start(number, generator)
        kill_at(fork_warmed(self.command(verb, out), self.log), moment)
        return self.again(verb, out)

    def closed(self, number: int, generator: random.Random) -> str | None:
        verb, out, moment = self.start(number, generator)
        code = self.on_terminal(verb, out, moment, nohup=False)
        if code not in (0, -signal.SIGHUP, 128 + signal.SIGHUP):
            return f"{verb} ended with {code}"
        record = out / "run.json"
        status = read_json(record)["status"] if record.exists() else None
        true = {0: ("finished",), 128 + signal.SIGHUP: (None, "interrupted")}.get(code, (None, "finished"))
        if verb == "pretrain" and status not in true:  # None: it had not begun
            return f"it ended with {code}, its record says {status}"
        return self.again(verb, out) if code or verb not in TRAININGS else self.unlike(verb, out)

    def closed_under_nohup(self, number: int, generator: random.Random) -> str | None:
        verb, out, moment = self.start(number, generator)
        code = self.on_terminal(verb, out, moment, nohup=True)
        return f"{verb} ended with {code}" if code else _prefixed(verb, self.unlike(verb, out))

    def on_terminal(self, verb: str, out: Path, moment: float, *, nohup: bool) -> int | None:
        """The exit code of a command whose terminal is closed at a moment."""
        ours, theirs = pty.openpty()
        work = self.command(verb, out)

        def inside() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
            os.close(ours)
            try:
                os.login_tty(theirs)  # a session of its own, whose terminal this is, and the three streams
            except OSError:  # it is closed already: what would have been started hears it at once
                sys.exit(128 + signal.SIGHUP)
            work()

        process = fork_warmed(inside, self.log)
        os.close(theirs)
        _read_until(ours, time.monotonic() + moment, process.is_alive)
        os.close(ours)
        process.join()
        return process.exitcode

    def unread(self, number: int, generator: random.Random) -> str | None:
        verb, out, moment = self.start(number, generator)
        ours, theirs = os.pipe()
        work = self.command(verb, out)

        def inside() -> None:
            os.close(ours)
            for stream in (1, 2):
                os.dup2(theirs, stream)
            os.close(theirs)
            work()

        process = fork_warmed(inside, self.log)
        os.close(theirs)
        _read_until(ours, time.monotonic() + moment, process.is_alive)
        os.close(ours)
        process.join()
        return f"{verb} ended with {process.exitcode}" if process.exitcode else _prefixed(verb, self.unlike(verb, out))

    def full(self, number: int, generator: random.Random) -> str | None:
        """Every second time something is there already that the command would replace."""
        verb, _, _ = self.start(number, generator)
        replaces = verb not in (*TRAININGS, "duplicates") and number // len(self.verbs) % 2 == 1
        mounted = _mounted(self.disk, DISK_MIB)
        try:
            out = self.out(self.disk / "out", verb)
            more = ["--overwrite"] if replaces and verb == "export" else []
            if replaces:
                run_warmed(self.command(verb, out), self.log)
                self.log.write_text("")
            room = generator.randrange(2 * self.sizes[verb] + 4096)
            if mounted:
                _fill(self.disk, room)
            process = fork_warmed(_with_little_room(self.command(verb, out, more), self.disk, room, mounted), self.log)
            process.join()
            (self.disk / "filler").unlink(missing_ok=True)
            self.refused += process.exitcode != 0
            wrong = self.told(process.exitcode) or (self.unlike(verb, out) if replaces else None)
            if wrong is None:
                wrong = self.again(verb, out) if process.exitcode else self.unlike(verb, out)
            return _prefixed(f"{verb} with {room:,} bytes", wrong)
        finally:
            shutil.rmtree(self.disk / "out", ignore_errors=True)
            if mounted:
                subprocess.run(["umount", str(self.disk)], check=True)

    def told(self, code: int | None) -> str | None:
        """Whether a command that ended with `code` has said so in one line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("ssl-kit: ")]
        if code == 0 and not lines:
            return None
        full = ("No space left on device", "of free space", "File too large")
        told = code == 2 and len(lines) == 1 and any(words in lines[0] for words in full)
        return None if told else f"it ended with {code}: {self.said()}"

    def nowhere(self, number: int, generator: random.Random) -> str | None:
        verb, out, _ = self.start(number, generator)
        work = self.command(verb, out)

        def inside() -> None:
            full = os.open("/dev/full", os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(full, stream)
            work()

        process = fork_warmed(inside, self.log)
        process.join()
        return f"{verb} ended with {process.exitcode}" if process.exitcode else _prefixed(verb, self.unlike(verb, out))


def _mounted(disk: Path, mib: int) -> bool:
    """Puts a small disk at an empty folder; False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _fill(disk: Path, room: int) -> None:
    """Leaves so many bytes, to a page."""
    with open(disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, max(4096, shutil.disk_usage(disk).free - room))


def _with_little_room(work: Callable[[], None], disk: Path, room: int, mounted: bool) -> Callable[[], None]:
    """`work`, whose temporary files are on the disk as well; without a mount no file may grow beyond `room`."""

    def inside() -> None:
        if mounted:
            os.environ["TMPDIR"], tempfile.tempdir = str(disk), None
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        work()

    return inside


def _read_until(descriptor: int, deadline: float, alive: Callable[[], bool]) -> None:
    """Takes what is printed, as a terminal does, until a moment or the end of the command."""
    while (left := deadline - time.monotonic()) > 0 and alive():
        if select.select([descriptor], [], [], min(left, 0.05))[0]:
            try:
                if not os.read(descriptor, 65_536):
                    return
            except OSError:  # EIO: nobody has the other end any more
                return


def _prefixed(what: str, wrong: str | None) -> str | None:
    return None if wrong is None else f"{what}: {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="K,T1,T2,T3,T4,T5", help="some of the ids")
    parser.add_argument("--quick", action="store_true", help=f"under 2 minutes: {', '.join(QUICK)} only")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it holds")
    arguments = parser.parse_args()
    rows = Rows(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder).resolve(), QUICK if arguments.quick else tuple(manual.verbs()))
        todo: dict[str, tuple[str, int, Callable[[int, random.Random], str | None]]] = {
            "K": ("verbs killed once, then ended", 3, trials.killed),
            "T1": ("terminal of a verb closed, then ended", 3, trials.closed),
            "T2": ("terminal of a verb closed under nohup", 1, trials.closed_under_nohup),
            "T3": ("pipe of a verb closed", 1, trials.unread),
            "T4": ("disk full while a verb writes, then ended", 4, trials.full),
            "T5": ("stdout and stderr of a verb on a full disk", 1, trials.nowhere),
        }
        for name, (what, rounds, trial) in todo.items():
            if name in arguments.only.split(","):
                rows.run(name, what, (1 if arguments.quick else rounds) * len(trials.verbs), trial)
        print(f"T4: {trials.refused} found no room")


if __name__ == "__main__":
    main()
