"""A long training that is killed again and again, beside an undisturbed one, while others embed and search.

    python benchmarks/faults/soak.py data/cifar10/train --json soak.json            # about 45 minutes
    python benchmarks/faults/soak.py data/cifar10/train --minutes 2 --every 10 20

SimCLR on 10,000 images at 16 px, one torch thread, the report written as usual; --minutes is what the undisturbed run
takes. Its twin gets SIGKILL every 60 to 120 s, with a state saved three times in between, and is resumed until it ends.
All the while a third process embeds images with two encoders in turn into one folder and indexes it, and a fourth one
searches there.

    soak/state    the twins are the same: rows of metrics.csv, encoder, last state, bit for bit
    soak/kills    how many kills the second twin went on from; after each there was a state that verified
    soak/search   answers from the folder while it was replaced: those of the old or of the new encoder, or an error in
                  words; `refused` counts those, and `died` the processes that ended by anything else
    soak/memory   resident memory of the undisturbed twin: its median over the last fifth of the run is at most 2 % over
                  that of the second fifth; and no life of the killed twin needed 5 % more than the undisturbed one
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness import Rows, fork_warmed, run_warmed, tail
from trainings import difference, load_kernels, outcome, simclr

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_json
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.search import Index
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.training.checkpoint import newest
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index
from ssl_kit.verbs.pretrain import pretrain

NARROW = {"name": "resnet18_small", "args": {"channels": [16, 32, 64, 128]}}
IMAGES, SIDE, BATCH = 10_000, 16, 128
EMBEDDED, QUERIES = 500, 3
GROWTH, MORE = 1.02, 1.05  # of resident memory
LATE = 3  # times --minutes, after which the killed twin has lost its way


class Memory:
    """Resident memory of a process in MiB, twice a second, from a thread of this process; `alive` ends it."""

    def __init__(self, process: ForkProcess):
        self.samples: list[float] = []
        self._process = process
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while self._process.exitcode is None:
            try:
                pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                return
            self.samples.append(pages * page / 2**20)
            time.sleep(0.5)

    def fifth(self, number: int) -> float:
        """The median over a fifth of the time, counted from 0."""
        size = len(self.samples) // 5
        return median(self.samples[number * size : (number + 1) * size])


class Soak:
    """The work of the four processes; all of it is done by children."""

    def __init__(self, data: str, place: Path, every: float):
        self.data, self.place, self.log = data, place, place / "log.txt"
        self.checkpoint_minutes = every / 3 / 60
        load_kernels(Path(data))
        run_warmed(self._prepare, self.log)

    def _prepare(self) -> None:
        for number in range(2):
            torch.manual_seed(number)
            Encoder(NARROW["name"], NARROW["args"], (SIDE, SIDE)).save(self.place / f"encoder-{number}")

    def training(self, name: str, epochs: float) -> Callable[[], None]:
        """Pretrains in the folder `name`, or goes on with it."""
        run = self.place / name

        def work() -> None:
            settings: dict[str, Any] = {
                **{"image_size": SIDE, "batch_size": BATCH, "limit": IMAGES, "threads": 1, "epochs": epochs},
                **{"checkpoint_minutes": self.checkpoint_minutes},
            }
            resume = (run / "recipe.yaml").exists()
            pretrain(self.data, method=simclr(NARROW), run=str(run), resume=resume, **settings)

        return work

    def seconds_per_epoch(self) -> float:
        """Of two trainings side by side, start and end not counted."""

        def timed(name: str, epochs: float) -> float:
            both = [fork_warmed(self.training(f"{name}-{number}", epochs), self.log) for number in range(2)]
            began = time.perf_counter()
            for process in both:
                process.join()
                assert process.exitcode == 0, tail(self.log)
            return time.perf_counter() - began

        return max(timed("long", 3) - timed("short", 1), 0.1) / 2

    def write(self, number: int, folder: Path) -> None:
        """Embeds with one of the two encoders, and indexes."""
        embed(
            str(self.place / f"encoder-{number}"), self.data, out=str(folder), limit=EMBEDDED, overwrite=folder.exists()
        )
        index(str(folder), key="Flat")

    def answer(self, folder: Path) -> list[Any]:
        """What a search by id finds."""
        opened = Index.load(folder)
        ids = Embeddings.load(folder).ids[:QUERIES]
        return [[(one.id, round(one.score, 4)) for one in found] for found in opened.search_ids(ids, 5)]

    def writing(self, rounds: Path) -> Callable[[], None]:
        """Replaces the folder for ever, and counts in a file."""

        def work() -> None:
            number = 0
            while True:
                self.write(number % 2, self.place / "embedded")
                number += 1
                write_json(rounds, number)

        return work

    def wanted(self) -> list[Any]:
        """The answers of either encoder."""
        told = self.place / "wanted.json"

        def work() -> None:
            for number in range(2):
                self.write(number, self.place / f"alone-{number}")
            write_json(told, [self.answer(self.place / f"alone-{number}") for number in range(2)])

        run_warmed(work, self.log)
        answers = json.loads(told.read_text())
        assert answers[0] != answers[1], "the encoders are told apart by their answers"
        return answers

    def searching(self, told: Path) -> Callable[[], None]:
        """Searches for ever; counts answers of one encoder, refusals, and anything else."""
        wanted = self.wanted()

        def work() -> None:
            counts = {"answers": 0, "refused": 0, "wrong": 0}
            while True:
                try:
                    found = json.loads(json.dumps(self.answer(self.place / "embedded")))
                    counts["answers" if found in wanted else "wrong"] += 1
                except UserError:  # it is being replaced
                    counts["refused"] += 1
                write_json(told, counts)
                time.sleep(0.2)

        return work


def soak(place: Path, data: str, minutes: float, every: tuple[float, float], rows: Rows) -> None:
    """All rows."""
    work, generator = Soak(data, place, every[0]), random.Random("soak")
    per_epoch = work.seconds_per_epoch()
    epochs = max(2, round(60 * minutes / per_epoch))
    print(f"{per_epoch:.1f} s per epoch: {epochs} epochs", flush=True)
    searches, rounds = place / "searches.json", place / "rounds.json"
    others = [fork_warmed(work.searching(searches), work.log), fork_warmed(work.writing(rounds), work.log)]
    calm = fork_warmed(work.training("calm", epochs), work.log)
    calm_memory = Memory(calm)
    kills, broken, peak, process = 0, 0, 0.0, None
    deadline = time.monotonic() + 60 * minutes * LATE
    while time.monotonic() < deadline:
        process = fork_warmed(work.training("killed", epochs), work.log)
        memory = Memory(process)
        process.join(generator.uniform(*every))
        peak = max([peak, *memory.samples])
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        kills += 1
        broken += newest(place / "killed" / "checkpoints") is None
        print(f"kill {kills}", flush=True)
    calm.join()
    gone = [other.exitcode for other in others if other.exitcode is not None]
    for other in others:
        other.kill()
    ended = process is not None and process.exitcode == 0 and calm.exitcode == 0
    wrong = difference(outcome(place / "killed"), outcome(place / "calm")) if ended else tail(work.log, 3)
    spent = {"minutes": round(minutes, 1), "epochs": epochs}
    rows.add({"id": "soak/state", "tried": 1, "survived": int(wrong is None), "failed": wrong or "", **spent})
    rows.add({"id": "soak/kills", "tried": kills, "survived": kills - broken})
    counts = json.loads(searches.read_text())
    tried = counts["answers"] + counts["wrong"]
    replaced = {"refused": counts["refused"], "replaced": json.loads(rounds.read_text()), "died": len(gone)}
    rows.add({"id": "soak/search", "tried": tried + len(gone), "survived": counts["answers"], **replaced})
    early, late, most = calm_memory.fifth(1), calm_memory.fifth(4), max(calm_memory.samples)
    flat = [late <= GROWTH * early, peak <= MORE * most]
    figures = {
        "mib_early": round(early),
        "mib_late": round(late),
        "mib_peak": round(most),
        "mib_peak_killed": round(peak),
    }
    rows.add({"id": "soak/memory", "tried": len(flat), "survived": int(np.sum(flat)), **figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of at least 10,000 images")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--every", type=float, nargs=2, default=(60, 120), metavar=("FROM", "TO"), help="s between kills"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    rows = Rows(None)
    try:
        soak(place, arguments.data, arguments.minutes, tuple(arguments.every), rows)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for row in rows.rows:
        print(" · ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json is not None:
        write_json(arguments.json, rows.rows)
    if any(row["survived"] < row["tried"] for row in rows.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
