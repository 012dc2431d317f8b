"""`run.json`: what was run, on what, and how it went.

`evaluate` and `finetune` settle the verdict in it: what training said, and what scores on images that it never saw say
to it. Report and model card read that: there is one verdict.
"""

from __future__ import annotations

import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

import numpy as np
from pytorch_lightning.loggers import Logger

import ssl_kit
from ssl_kit.core.console import detail, say
from ssl_kit.core.files import entries, if_room
from ssl_kit.core.machine import peak_memory, size_text
from ssl_kit.core.named import check_run
from ssl_kit.core.owned import BROKEN_OFF, GOING_ON, RUN, Former, Record
from ssl_kit.core.sealed import Entries
from ssl_kit.evaluation.catalog import AS_IT_CAME, ENCODER
from ssl_kit.evaluation.metrics import wilson
from ssl_kit.report.head import BASELINES, Compared, compared
from ssl_kit.report.head import verdict as shown
from ssl_kit.report.page import write_report
from ssl_kit.report.read import Run, number, read_run
from ssl_kit.training.checkpoint import resumable
from ssl_kit.training.curves import Curves
from ssl_kit.training.distributed import all_gather_object, rank
from ssl_kit.training.verdict import BELOW, Row, Verdict, too_short

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "faiss-cpu", "numba", "numpy")


class RunRecord(Record):
    """The record of a run, `run.json`, written whenever an entry changes; a resumed run keeps those it was begun with.

    Inside a `with` block whatever ends the run early becomes its status: "interrupted" by a signal, or "failed". A
    sitting that ends before `begin` changes nothing.

    Attributes:
        former: the run that this one replaces, if any.
    """

    def __init__(self, folder: Path, resume: bool = False):
        super().__init__(folder, RUN)
        self.former = Former(folder)
        self._begun = False
        if not resume:  # of a former run, which is still whole
            self.entries, self.names = {}, {RUN}

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._begun:
            with if_room(self.folder / RUN):
                self.update(status="interrupted" if issubclass(kind, SystemExit | KeyboardInterrupt) else "failed")
                if rank() == 0 and (self.folder / "report.html").is_file():
                    write_report([self.folder], self.folder / "report.html")  # one that waits for no more
        super().__exit__(kind, value, trace)

    def begin(self, **entries: object) -> None:
        """The first entries of a run, or of a further sitting."""
        self._begun = True
        started = self.entries.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.update(
            run=str(self.folder),
            name=self.folder.name,
            status="starting",
            command=command(),
            started=started,
            **entries,
        )

    def update(self, **entries: object) -> None:
        """Sets entries and writes the file, the first of several processes for all."""
        self.entries |= entries
        if rank() == 0:
            self.write()

    @contextmanager
    def written_by_others(self, *folders: str) -> Iterator[None]:
        """Lists the files that loggers make in folders of the run, which know nothing of the record."""
        there = lambda: {
            f"{name}/{file}"
            for name in folders
            for file in entries(self.folder / name)
            if (self.folder / name / file).is_file() and not (self.folder / name / file).is_symlink()
        }
        before = there()
        try:
            yield
        finally:
            if rank() == 0 and (made := there() - before):
                self.names |= made
                self.write()

    def progress(self, curves: Curves) -> None:
        """Verdict, speed and time from the curves so far."""
        speeds = [row["images_per_second"] for row in curves.history if "images_per_second" in row]
        waiting = [row["waiting_share"] for row in curves.history if "waiting_share" in row]
        self.update(
            verdict=curves.verdict._asdict(),
            epochs=curves.row["epoch"],
            steps=curves.row["step"],
            seconds=curves.row["seconds"],
            images_per_second=float(np.median(speeds)),
            waiting_share=float(np.mean(waiting[1:] or waiting)),  # the first interval waits for the first batch
            crops=self._crops(curves.history),
        )

    def _crops(self, history: Sequence[Row]) -> Entries:
        """The encoder of the last look beside what it began as and beside pixels: top-1 with its 95 % interval."""
        told, looks = dict(self.entries.get("crops") or {}), [row for row in history if "crops_top1" in row]
        if not told or not looks:
            return told
        start, count = looks[0] if looks[0]["step"] == 0 else {}, told["images"]
        shares = {ENCODER: looks[-1]["crops_top1"], "pixels": start.get("crops_pixels"), "pca": start.get("crops_pca")}
        shares[AS_IT_CAME if self.entries.get("init") else "random_init"] = start.get("crops_top1")
        found = {
            name: [share, *wilson(round(share * count), count)] for name, share in shares.items() if share is not None
        }
        return told | {"top1": found}

    def peak(self) -> None:
        """The most memory that all processes together have held; all of them must call it."""
        peaks = all_gather_object(peak_memory())
        held = {place: sum(peak[place] for peak in peaks) for place in peaks[0]}
        self.update(peak_memory=held)
        detail("peak memory: " + ", ".join(f"{size_text(count)} ({place})" for place, count in held.items()))

    def provenance(self) -> Entries:
        """What made the encoder, for its folder, which travels: the names of single images stay in `run.json`."""
        keys = ("run", "command", "method", "data", "versions", "started")
        made = {key: self.entries[key] for key in keys if key in self.entries}
        return made | {
            "data": {key: value for key, value in made["data"].items() if key not in ("image", "marks", "read")}
        }


@contextmanager
def opened(folder: Path, resume: bool, overwrite: bool) -> Iterator[RunRecord]:
    """The record of the run that begins or goes on in `folder`; the first of several processes looks after the folder.

    A run that `overwrite` replaces is put back where the new one ends before it could be resumed.
    """
    if rank() > 0:
        yield RunRecord(folder, resume)
        return
    former = Former(folder)
    former.settle(resumable(folder / "checkpoints"))
    check_run(folder, resume, overwrite)
    try:
        with RunRecord(folder, resume) as record:
            yield record
    except BaseException:
        former.settle(resumable(folder / "checkpoints"))
        raise


def command() -> str:
    """The command line of this process, as one would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["ssl-kit" if name == "__main__.py" else name, *sys.argv[1:]])  # python -m ssl_kit


def versions() -> dict[str, str | None]:
    """Versions of everything that can move a number, and the git commit when run from a checkout."""
    found: dict[str, str | None] = {"ssl_kit": ssl_kit.__version__, "commit": _commit()}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """The commit of this program where it runs from a checkout, which is only read: `describe --dirty` would write."""
    root = Path(ssl_kit.__file__).parent.parent
    if not (root / ".git").exists():
        return None

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=False).stdout.strip()

    try:
        commit = ask("describe", "--always", "--abbrev=12")
        return commit + "-dirty" * bool(ask("status", "--porcelain", "--untracked-files=no")) if commit else None
    except OSError:  # no git here
        return None


_PIXELS = ("pixels", "pca")


def settle(record: Record) -> None:
    """Gives the record of a run the verdict that takes its results into account, and says a change.

    Args:
        record: of a folder whose results are written; that of scores alone, without a training, stays as it is.
    """
    if record.entries.get("status") in GOING_ON:  # who settles it holds the folder, so nobody trains
        record.entries["status"] = BROKEN_OFF
        record.write()
    run = read_run(record.folder)
    told, final = shown(run), final_verdict(run)
    if final.state != told.state:
        say(f"verdict: {final.state} - {final.reason}; in training it was {told.state}")
        record.entries["verdict"] = final._asdict()
        record.write()


def final_verdict(run: Run) -> Verdict:
    """The verdict of run.json, changed where scores on test images are sure of something else.

    - learning, but surely below raw pixels or PCA of the pixels: `BELOW`; surely below the untrained network: unknown.
    - `BELOW` or unknown, but surely above the untrained network, after training for long enough: learning, or `BELOW`.
    - stuck or collapsed, but surely above every baseline, likewise: learning.

    What the scores leave open stays as it was, and so does all where they are of an earlier encoder, or of an
    evaluation that does not judge the method.
    """
    head, found = shown(run), compared(run)
    told = Verdict(head.state, head.reason)
    if found is None or not found.judges or _outdated(found, run):
        return told
    pixels = [found.signs[name] for name in _PIXELS if name in found.signs]
    untrained = found.signs.get("random_init", 0)
    enough = not too_short(number(run.info.get("steps")) or 0, number(run.info.get("epochs")) or 0)
    state = told.state
    if told.state == "learning" and untrained < 0:
        state = "unknown"
    elif told.state in ("learning", BELOW):
        state = BELOW if -1 in pixels else "learning" if pixels and untrained > 0 else told.state
    elif told.state == "unknown" and enough and untrained > 0:
        state = BELOW if -1 in pixels else "learning"
    elif told.state in ("stuck", "collapsed") and enough and untrained > 0 and set(pixels) == {1}:
        state = "learning"
    return told if state == told.state else Verdict(state, _reason(found))


def _outdated(found: Compared, run: Run) -> bool:
    now, then = run.info.get("encoder_sha256"), found.record["made_by"].get("encoder_sha256")
    return None not in (now, then) and now != then


def _reason(found: Compared) -> str:
    where = {1: "above", 0: "level with", -1: "below"}
    places = [
        f"{where[found.signs[name]]} {words} ({found.others[name].value:.3f})"
        for name, words in BASELINES.items()
        if name in found.others
    ]
    test = found.record["made_by"].get("test")
    return f"{found.title} {found.ours.value:.3f}{f' on {test}' if test else ''}, {', '.join(places)}"


def loggers(wandb: bool, tensorboard: bool, folder: Path) -> list[Logger]:
    """The opt-in loggers beside `metrics.csv`."""
    made: list[Logger] = []
    if wandb:
        from pytorch_lightning.loggers import WandbLogger

        offline = not _has_wandb_key()
        say(f"wandb: {'offline, no key is set (`wandb sync` uploads later)' if offline else 'online'}")
        made.append(WandbLogger(project="ssl_kit", name=folder.name, save_dir=str(folder), offline=offline))
    if tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        made.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    return made


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
