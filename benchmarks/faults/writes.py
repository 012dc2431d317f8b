"""What is written is whole or not there: writers killed, full and read-only disks, damage, two writers, two disks.

    python benchmarks/faults/writes.py --json writes.json        # goes on where it was stopped
    python benchmarks/faults/writes.py --quick --only A1,A2

    A1  a process that saves checkpoints over and over is killed by SIGKILL; the newest state it reported is there
    A2  the disk is full at every 4 KiB of a save: a small tmpfs where one can be mounted, else RLIMIT_FSIZE; the look
        at the free space before a save is left out
    A2/run  the disk is full from a moment of a training on, for a while or for good (where a tmpfs can be mounted)
    A3  no right to write: a read-only mount where one can be made, else a path below a file
    A4  the newest checkpoint is cut off or has a bit flipped: found, and the one before it is taken, aloud
    A5  two processes start in one run folder: one is refused
    A6  TMPDIR is on another disk than the target: nothing is ever written there
    A7  `ssl-kit index` is killed before every call to the file system: an index of as many rows as ids, or none

The state of step n is drawn from n, so that what is loaded can be compared with what was saved, to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Rows, fork_warmed, kill_at, run_warmed, tail
from trainings import SETTINGS, SUBJECTS, Work

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import FullError
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.search import Index, has_index
from ssl_kit.training import checkpoint
from ssl_kit.training.checkpoint import SafeCheckpointIO, newest
from ssl_kit.verbs.index import index
from ssl_kit.verbs.pretrain import pretrain

VALUES = 250_000  # of a state: 1 MB, saved in about 10 ms
PAGE = 4096


def state(step: int, values: int = VALUES) -> dict[str, Any]:
    """The training state of a step, as far as writing and reading go."""
    drawn = np.random.default_rng(step).random(values, np.float32)
    return {
        "global_step": step,
        "weights": {"a": torch.from_numpy(drawn), "b": torch.tensor(step)},
        "list": [step, "x"],
    }


def save(folder: Path, step: int, values: int = VALUES) -> Path:
    path = folder / f"step-{step:08d}"
    SafeCheckpointIO().save_checkpoint(state(step, values), path)
    return path


def whole(path: Path, values: int = VALUES) -> int:
    """The step of a checkpoint that is, to the bit, what was saved.

    Raises:
        AssertionError: it was loaded without complaint, and is something else.
    """
    loaded = SafeCheckpointIO().load_checkpoint(path)
    step = loaded["global_step"]
    wanted = state(step, values)
    assert loaded["list"] == wanted["list"] and loaded["weights"].keys() == wanted["weights"].keys(), path
    for name, tensor in wanted["weights"].items():
        assert np.array_equal(loaded["weights"][name].numpy(), tensor.numpy()), path
    return step


class Trials:
    """All trials; work is done in children of this process."""

    def __init__(self, place: Path):
        self.place, self.log, self.refused = place, place / "log.txt", 0
        self.work = Work(place)
        self.data = self.work.data

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        folder = self.place / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def can_mount(self) -> bool:
        """Whether small disks can be had here."""
        disk = self.fresh("disk")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, check=False)
        return mounted.returncode == 0 and subprocess.run(["umount", str(disk)], check=True).returncode == 0

    # A1

    def killed_saving(self, number: int, generator: random.Random) -> str | None:
        """Checkpoints by new names, and `best` by replacing it, until SIGKILL."""
        folder = self.fresh("saving")
        reported = folder / "reported"

        def work() -> None:
            for step in range(1, 10_000):
                path = save(folder, step)
                save_as(folder / "best", step)
                with open(reported, "a") as file:
                    file.write(f"{step}\n")
                if step > 2:
                    shutil.rmtree(path.parent / f"step-{step - 2:08d}")

        process = fork_warmed(work, self.log)
        while not reported.exists():  # the first one has nothing before it
            time.sleep(0.001)
        kill_at(process, 0.15 * generator.random())
        last = int(reported.read_text().split()[-1])
        path = newest(folder)
        if path is None or whole(path) < last:
            return f"step {last} was saved, {path} is the newest"
        if whole(folder / "best") < last:
            return f"best is {whole(folder / 'best')}, {last} was reported"
        run_warmed(lambda: [save(folder, 10_000), save_as(folder / "best", 10_000)], self.log)
        left = [path.name for path in folder.glob(".*") if "best" in path.name or "10000" in path.name]
        return f"the next writer leaves {left}" if left else None

    # A2

    def full(self, count: int) -> Callable[[int, random.Random], str | None]:
        """The disk has room for a first checkpoint and the number-th part of a second one."""
        values = 10_000
        checkpoint.check_space = lambda folder, needed: None  # it would refuse before anything is written
        needed = sum(file.stat().st_size for file in save(self.fresh("size"), 1, values).iterdir()) + 8 * PAGE

        def trial(number: int, generator: random.Random) -> str | None:
            room = int(needed * number / count) // PAGE * PAGE
            disk = self.fresh("disk")
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={needed + room}", "none", str(disk)],
                capture_output=True,
                check=False,
            )
            try:
                save(disk, 1, values)
                process = fork_warmed(
                    lambda: _save_in_little_room(disk, room, values, mounted.returncode != 0), self.log
                )
                process.join()
                self.refused += process.exitcode == 3
                return _told(process.exitcode, disk, values)
            finally:
                if mounted.returncode == 0:
                    subprocess.run(["umount", str(disk)], check=True)

        return trial

    def full_run(self, number: int, generator: random.Random) -> str | None:
        """The disk is full from a moment on: for a while, or until the run has ended for want of room for its end."""
        disk, name = self.fresh("disk"), "simclr"
        self.work.undisturbed(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=True)
        try:
            run, seconds = disk / "run", self.work.seconds[name]
            process = fork_warmed(self.work.run(name, run), self.log)
            while not (run / "metrics.csv").exists() and process.exitcode is None:
                time.sleep(0.01)
            process.join(0.4 * seconds * generator.random())
            with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(PAGE))
            process.join(0.3 * seconds if number % 2 else None)
            (disk / "filler").unlink()
            process.join()
            said = any(words in tail(self.log, 1) for words in ("No space left on device", "of free space"))
            if process.exitcode and not said:
                return f"it ended with {process.exitcode}: {tail(self.log, 1)}"
            self.refused += process.exitcode != 0
            return self.work.finish(name, run)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    # A3

    def forbidden(self, number: int, generator: random.Random) -> str | None:
        """A folder that cannot be written to: `save` raises and writes nothing."""
        folder = self.fresh("forbidden")
        save(folder, 1)
        kind = ("read-only mount", "below a file")[number % 2]
        target = folder
        if kind == "below a file":
            (folder / "file").write_text("x")
            target = folder / "file"
        elif subprocess.run(["mount", "--bind", "-o", "ro", str(folder), str(folder)], check=False).returncode:
            return None  # not allowed here; the other half is tried all the same
        try:
            save(target, 2)
            return f"{kind}: no error"
        except OSError:
            return None if whole(folder / "step-00000001") == 1 else f"{kind}: the former one is gone"
        finally:
            if kind == "read-only mount":
                subprocess.run(["umount", str(folder)], check=True)

    # A4

    def damaged(self, number: int, generator: random.Random) -> str | None:
        """Even numbers cut a file of the newest checkpoint off, odd ones flip a bit of it."""
        folder = self.fresh("damaged")
        for step in (1, 2):
            save(folder, step, 1_000)
        file = generator.choice(sorted((folder / "step-00000002").iterdir()))
        data = bytearray(file.read_bytes())
        if number % 2:
            bit = generator.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        else:
            data = data[: generator.randrange(len(data))]
        file.write_bytes(data)
        with redirect_stderr(StringIO()) as said:
            found = newest(folder)
        if found is None or whole(found, 1_000) != 1:
            return f"{file.name}: {found} was taken"
        if "step-00000002" not in said.getvalue():
            return "nothing was said"
        try:
            SafeCheckpointIO().load_checkpoint(folder / "step-00000002")
        except DamagedError:
            return None
        return f"{file.name}: it was loaded"

    # A5

    def two_runs(self, number: int, generator: random.Random) -> str | None:
        """Two `pretrain` of one folder, the second up to 0.3 s after the first."""
        run, method = self.place / "two", SUBJECTS["simclr"][0]
        shutil.rmtree(run, ignore_errors=True)

        def work() -> None:
            try:
                pretrain(str(self.data), method=method, run=str(run), **{**SETTINGS, "epochs": 1})
            except UserError as error:
                print(error)
                sys.exit(2)

        first = fork_warmed(work, self.log)
        time.sleep(0.3 * generator.random())
        second = fork_warmed(work, self.log)
        for process in (first, second):
            process.join()
        codes = sorted([first.exitcode or 0, second.exitcode or 0])
        if codes != [0, 2]:
            return f"exit codes {codes}"
        rows = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]
        return None if rows == sorted(rows, key=lambda row: (row != "step", len(row), row)) else "rows of both"

    # A6

    def other_disk(self, number: int, generator: random.Random) -> str | None:
        """TMPDIR is in shared memory; nothing is made there, and a kill is as harmless as elsewhere."""
        elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        os.environ["TMPDIR"], tempfile.tempdir = str(elsewhere), None
        try:
            wrong = self.killed_saving(number, generator)
            made = list(elsewhere.rglob("*"))
            same = os.stat(elsewhere).st_dev == os.stat(self.place).st_dev
            return wrong or (f"{made} in TMPDIR" if made else "TMPDIR is on the same disk" if same else None)
        finally:
            del os.environ["TMPDIR"]
            tempfile.tempdir = None
            shutil.rmtree(elsewhere)

    # A7

    def embedded(self) -> Path:
        """Embeddings of 300 rows."""
        folder = self.place / "embeddings"
        if not folder.exists():
            vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
            labels = np.full(300, -1, np.int64)
            Embeddings(vectors, labels, (), [f"{row}.png" for row in range(300)], {"layers": 1}).save(folder)
        return folder

    def killed_indexing(self, number: int, generator: random.Random) -> str | None:
        """The number-th call to the file system is the last one; every second time there is an index already."""
        folder = self.fresh("indexed")
        shutil.copytree(self.embedded(), folder, dirs_exist_ok=True)
        if number % 2:
            run_warmed(lambda: index(str(folder), key="IVF4,SQ8"), self.log)
        process = fork_warmed(lambda: _killed_before(number // 2, lambda: index(str(folder), key="Flat")), self.log)
        process.join()
        checked = fork_warmed(lambda: _check_index(folder), self.log)
        checked.join()
        if checked.exitcode:
            return f"killed before call {number // 2}: {tail(self.log, 1)}"
        run_warmed(lambda: index(str(folder), key="Flat"), self.log)
        left = [path.name for path in folder.glob(".*.tmp")]
        return f"left behind: {left}" if left else None


def save_as(path: Path, step: int) -> None:
    SafeCheckpointIO().save_checkpoint(state(step), path)


def _save_in_little_room(disk: Path, room: int, values: int, limit_files: bool) -> None:
    """Ends with 3 when there was no room and it was said in one error, 0 when there was."""
    if limit_files:  # no file may grow beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        save(disk, 2, values)
    except FullError:
        sys.exit(3)


def _told(code: int | None, disk: Path, values: int) -> str | None:
    """Whether all is well after a save that ended with `code`."""
    if whole(disk / "step-00000001", values) != 1:
        return "the former checkpoint is gone"
    litter = [path.name for path in disk.iterdir() if path.name.startswith(".")]
    if code == 3:
        return f"left behind: {litter}" if litter or (disk / "step-00000002").exists() else None
    return None if code == 0 and whole(disk / "step-00000002", values) == 2 else f"ended with {code}"


def _killed_before(call: int, work: Callable[[], Any]) -> None:
    """Does `work`, killed before that call of its to the file system."""
    left = [call]

    def count(event: str, arguments: Any) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


def _check_index(folder: Path) -> None:
    """Each row is its own nearest; an index that is listed opens, and has the rows of its embeddings."""
    loaded = Embeddings.load(folder)
    opened = Index.load(folder)  # none yet: the vectors answer
    if has_index(folder):
        assert opened._index.ntotal == len(opened) == len(loaded.ids), "as many vectors as ids"
    for row, near in enumerate(opened.search_vectors(loaded.vectors[:20], 1)):
        assert near[0].row == row and near[0].id == loaded.ids[row], "each row is its own nearest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="A1,A2,A2/run,A3,A4,A5,A6,A7", help="some of the ids")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: a few trials of each")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it holds")
    arguments = parser.parse_args()
    quick, rows = arguments.quick, Rows(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        full = 3 if quick else 60
        todo: dict[str, tuple[str, int, int, Callable[[int, random.Random], str | None]]] = {
            "A1": ("checkpoints and best, saver killed", 10, 200, trials.killed_saving),
            "A2": ("disk full during a save", full, full, trials.full(full)),
            "A3": ("no right to write", 2, 20, trials.forbidden),
            "A4": ("newest checkpoint cut off or a bit flipped", 20, 200, trials.damaged),
            "A5": ("two processes in one run folder", 2, 20, trials.two_runs),
            "A6": ("TMPDIR on another disk, saver killed", 2, 20, trials.other_disk),
            "A7": ("index killed before every call to the file system", 4, 120, trials.killed_indexing),
        }
        if trials.can_mount():
            todo["A2/run"] = ("disk full from a moment of a training on", 2, 20, trials.full_run)
        for name, (what, few, many, trial) in todo.items():
            if name in arguments.only.split(","):
                rows.run(name, what, few if quick else many, trial)
        print(f"A2: {trials.refused} found no room")


if __name__ == "__main__":
    main()
