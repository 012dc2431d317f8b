"""`embed` killed at random moments and started again gives the bytes of an undisturbed run; so do two shards.

    python benchmarks/faults/embed.py data/cifar10/test --json embed.json      # goes on where it was stopped
    python benchmarks/faults/embed.py data/cifar10/test --quick

4,000 images in parts of 128 (a part has 65,536 images otherwise, so there would be one), a ResNet-18 of a quarter of
the usual width with random weights, one torch thread. All files are compared byte by byte, manifest included, but for
the empty `.lock`. A kill that comes after the end is drawn again. Every other trial is killed twice: the second time
while it goes on from the first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Rows, fork_warmed, kill_at_random, run_warmed, tail

import ssl_kit.embeddings.embeddings
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.embed import embed

IMAGES, PART = 4_000, 128


class Bench:
    """An encoder, its undisturbed embeddings, and the trials; all work is done by children of this process.

    Attributes:
        seconds: that an undisturbed run takes from the fork to the end.
        found: finished parts that each kill left.
    """

    def __init__(self, data: str, place: Path):
        self.data, self.place, self.log = data, place, place / "log.txt"
        self.found: list[int] = []

        def prepare() -> None:
            torch.manual_seed(0)
            Encoder("resnet18_small", {"channels": [16, 32, 64, 128]}).save(place / "encoder")

        def verify() -> None:
            assert len(Embeddings.load(place / "whole")) == IMAGES, "every image has its row"

        run_warmed(prepare, self.log)
        run_warmed(self.embedding("first"), self.log)  # compiles and fills the disk's cache
        self.seconds = run_warmed(self.embedding("whole"), self.log)
        run_warmed(verify, self.log)
        self.wanted = contents(place / "whole")
        assert contents(place / "first") == self.wanted, "two undisturbed runs are equal"

    def embedding(self, name: str, shard: str | None = None) -> Callable[[], None]:
        """The work of a child: `embed` into the folder `name`."""

        def work() -> None:
            ssl_kit.embeddings.embeddings.PART_ROWS = PART
            embed(str(self.place / "encoder"), self.data, out=str(self.place / name), limit=IMAGES, shard=shard)

        return work

    def compare(self, name: str) -> str | None:
        """None when the folder has the bytes of the undisturbed run, else what differs; removes the folder."""
        got = contents(self.place / name)
        shutil.rmtree(self.place / name)
        wrong = sorted(file for file in got.keys() | self.wanted.keys() if got.get(file) != self.wanted.get(file))
        return f"{', '.join(wrong[:5])} of {len(self.wanted)} files differ" if wrong else None

    def kill(self, name: str, generator: random.Random) -> str:
        """Kills `embed` at a random moment, which leaves the folder as it was then; tells where that was."""
        before, folder = self.place / f"{name}.before", self.place / name
        if folder.exists():
            shutil.copytree(folder, before)
        while (moment := kill_at_random(self.embedding(name), self.seconds, generator, self.log)) is None:
            shutil.rmtree(folder)  # it had ended: draw again
            if before.exists():
                shutil.copytree(before, folder)
        shutil.rmtree(before, ignore_errors=True)
        self.found.append(len(list(folder.glob("part-*.parquet"))))
        return f"at {moment:.2f} s with {self.found[-1]} parts"

    def kill_trial(self, number: int, generator: random.Random) -> str | None:
        told = [self.kill("killed", generator) for _ in range(1 + number % 2)]
        print(f"killed {', then '.join(told)}")
        return self.finish("killed")

    def finish(self, name: str) -> str | None:
        """Starts `embed` again and compares what it makes."""
        process = fork_warmed(self.embedding(name), self.log)
        process.join()
        if process.exitcode:
            shutil.rmtree(self.place / name, ignore_errors=True)
            return f"started again, it ended with {process.exitcode}: {tail(self.log, 2)}"
        return self.compare(name)

    def shard_trial(self, number: int, generator: random.Random) -> str | None:
        """0: one after the other; 1: side by side; 2: in two folders, then copied into one; 3: as 1, one killed."""
        shards = ["1/2", "0/2"]
        if number == 2:
            for shard in shards:
                run_warmed(self.embedding(f"apart-{shard[0]}", shard), self.log)
                shutil.copytree(self.place / f"apart-{shard[0]}", self.place / "both", dirs_exist_ok=True)
                shutil.rmtree(self.place / f"apart-{shard[0]}")
            return self.finish("both")
        if number == 0:
            for shard in shards:
                run_warmed(self.embedding("both", shard), self.log)
            return self.compare("both")
        other = fork_warmed(self.embedding("both", shards[0]), self.log)
        work = self.embedding("both", shards[1])
        if number == 3:
            kill_at_random(work, self.seconds / 2, generator, self.log)
        run_warmed(work, self.log)
        other.join()
        return f"a shard ended with {other.exitcode}" if other.exitcode else self.compare("both")


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files but the lock, which is empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="4,000 images or more, such as data/cifar10/test")
    parser.add_argument("--quick", action="store_true", help="4 kills")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = Rows(arguments.json)
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(arguments.data, Path(place))
        what = f"embed {IMAGES:,} images in {-(-IMAGES // PART)} parts"
        print(f"{what}: {bench.seconds:.2f} s undisturbed")
        count = 4 if arguments.quick else 20
        row = rows.run("embed/kill", f"{what}, killed and started again", count, bench.kill_trial)
        found = [*bench.found, *(row[key] for key in ("fewest_parts", "most_parts") if key in row)]
        rows.add({**row, "fewest_parts": min(found), "most_parts": max(found)})
        rows.run("embed/shards", f"{what} as two shards", 4, bench.shard_trial)


if __name__ == "__main__":
    main()
