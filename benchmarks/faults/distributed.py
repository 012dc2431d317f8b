"""Several processes on gloo: as one process, to rounding; and when one of them is killed, stopped or meets bad files.

    python benchmarks/faults/distributed.py --json distributed.json        # goes on where it was stopped
    python benchmarks/faults/distributed.py --quick --only D1,D5

    D1  gradients of W = 1..4 processes on disjoint parts of a batch against one process on the whole, per method
    D2  the same with parts of unequal size
    D4  features and kNN of 10,007 images in W processes: every image once, and the same numbers to the last bit
    D5  one process killed by SIGKILL in a random step: all end within 60 s with the reason, and the resumed run ends
        bit for bit as the undisturbed one
    D6  files that turn bad in a random step: within the budget the run ends well and lists them, beyond it all end
        within 60 s with one reason
    D7  gradients accumulated over 4 batches against one batch of 4 times the size, for losses that are means
    R5  stopped and gone on with 2, then 1, then 4 processes: every step sees the images that one process sees

Networks have no batch statistics (D1, D2: batch norm in evaluation mode). Training is `ssl-kit pretrain` of a small MAE
on 160 generated images of 16 px.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import bokeh.embed  # noqa: F401 (what a child would import, once)
import numpy as np
import torch
from harness import Rows, run_warmed, tail
from several import VIT, command, difference, in_processes, killing, training, write_images
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ssl_kit.verbs.pretrain  # noqa: F401 (likewise)
from ssl_kit.core.process import LOST
from ssl_kit.core.random import Key
from ssl_kit.data import sources
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.methods.dino import DINO
from ssl_kit.methods.mae import MAE
from ssl_kit.methods.method import Method
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.methods.vae import VAE
from ssl_kit.training.distributed import all_gather_object, rank
from ssl_kit.training.joining import joined
from ssl_kit.verbs.monitor import Share
from ssl_kit.views.recipe import plain

ENDED = 60.0  # seconds within which all must have ended after one has failed
BARS = {"float64": 1e-6, "float32": 1e-5}
EQUAL = {1: (24,), 2: (12, 12), 3: (8, 8, 8), 4: (6, 6, 6, 6)}
UNEQUAL = {2: (17, 7), 3: (7, 9, 8), 4: (3, 9, 11, 1)}
EVALUATED = 10_007  # images
STEPS, TRAINED = 28, 152  # of the training runs: 4 epochs of 7 steps; 8 of 160 images are held out
RESNET = {"channels": [4, 4, 8, 8]}


def build(name: str) -> Method:
    """A method by its row's name, with the same weights in every process."""
    torch.manual_seed(0)
    vit = lambda: Encoder("vit_tiny_patch16_224", VIT, (16, 16))
    resnet = lambda: Encoder("resnet18_small", RESNET, (16, 16))
    makers: dict[str, Callable[[], Method]] = {
        "simclr": lambda: SimCLR(resnet(), projection=(16, 8)),
        "decoupled": lambda: SimCLR(resnet(), projection=(16, 8), decoupled=True),
        "nested": lambda: SimCLR(resnet(), projection=(16, 8), dims=(4, 8)),
        "cached": lambda: SimCLR(resnet(), projection=(16, 8)),
        "mae": lambda: MAE(vit(), decoder_depth=1, decoder_width=16, decoder_heads=1),
        "mae_code": lambda: MAE(vit(), decoder_depth=1, decoder_width=16, decoder_heads=1, dims=(2, 4)),
        "dino": lambda: DINO(vit(), small_crops=0, prototypes=16, hidden=(16, 8)),
        "vae": lambda: VAE(resnet(), dim=4, decoder_width=8),
        "free_bits": lambda: VAE(resnet(), dim=4, decoder_width=8, free_bits=0.5),
        "aavae": lambda: VAE(resnet(), dim=4, decoder_width=8, augmented=True),
    }
    return makers[name]().eval()


METHODS = ("simclr", "decoupled", "nested", "cached", "mae", "mae_code", "vae", "free_bits", "aavae")
MEANS = ("mae", "mae_code", "vae", "aavae")  # losses that are means over images


class Parts:
    """A batch in chunks of 4, as gradient caching takes it."""

    def __init__(self, views: list[torch.Tensor], key: Key):
        self.views, self.key = views, key

    def __len__(self) -> int:
        return (len(self.key.index) + 3) // 4

    def __getitem__(self, number: int) -> tuple[list[torch.Tensor], Key]:
        part = slice(4 * number, 4 * number + 4)
        return [view[part] for view in self.views], self.key._replace(index=self.key.index[part])


class Step(nn.Module):
    """A training step, for torch's DDP."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.method.training_step(batch, 0)["loss"]


def gradient(name: str, precision: str, rows: list[slice], answer: Path, accumulated: bool = False) -> None:
    """Writes the gradient of a step; of several processes each takes its slice of `rows`, which one process joins."""
    if precision == "float64":  # features and losses are cast to float32 at least, which would hide smaller errors
        cast = torch.Tensor.float
        torch.Tensor.float = lambda tensor: tensor if tensor.dtype == torch.float64 else cast(tensor)  # type: ignore
    with joined():
        kind = getattr(torch, precision)
        method = build(name).to(kind)
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(24, 3, 16, 16, generator=generator, dtype=kind)
        noise = [0.1 * torch.rand(images.shape, generator=generator, dtype=kind) for _ in range(method.num_views)]
        step = Step(method)
        wrapped = DistributedDataParallel(step) if torch.distributed.is_initialized() else step
        own = rows if accumulated else [rows[rank()] if len(rows) > 1 else slice(0, 24)]
        for part in own:
            views, key = [(images + one)[part].clamp(0, 1) for one in noise], Key(0, 0, torch.arange(24)[part])
            batch: dict[str, Any] = {"views": views, "key": key}
            if name == "cached":
                batch = {"views": [], "key": key, "chunks": Parts(views, key)}
            (wrapped(batch) / len(own)).backward()
        found = [parameter.grad.flatten() for parameter in method.parameters() if parameter.grad is not None]
        if rank() == 0:
            np.save(answer, torch.cat(found).double().numpy())


class Bench:
    """The trials, in a folder that they share."""

    def __init__(self, folder: Path, rows: Rows, quick: bool):
        self.folder, self.rows, self.quick = folder, rows, quick
        self.images, self.logs = folder / "images", folder / "logs"
        if not self.images.exists():
            write_images(self.images)

    def run(self, only: list[str]) -> None:
        """Everything, or the rows in `only`."""
        for name in ("D1", "D2", "D4", "D5", "D6", "D7", "R5"):
            if not only or name in only:
                getattr(self, name)()

    def D1(self) -> None:
        cases = [(m, p, parts) for parts in EQUAL.values() for p in BARS for m in METHODS]
        self._gradients("D1", "gradients of W processes, equal parts", cases)

    def D2(self) -> None:
        cases = [(m, p, parts) for parts in UNEQUAL.values() for p in BARS for m in METHODS]
        self._gradients("D2", "gradients of W processes, unequal parts", cases)

    def _gradients(self, row: str, what: str, cases: list[tuple[str, str, tuple[int, ...]]]) -> None:
        if self.quick:
            cases = cases[:: len(cases) // 6 + 1]  # each of another method

        def trial(number: int, generator: random.Random) -> str | None:
            method, precision, counts = cases[number]
            edges = np.cumsum([0, *counts])
            rows = [slice(int(a), int(b)) for a, b in pairwise(edges)]
            return self._compare(method, precision, rows, len(counts), accumulated=False)

        self.rows.run(row, what, len(cases), trial)

    def D7(self) -> None:
        cases = MEANS[::2] if self.quick else MEANS
        rows = [slice(6 * part, 6 * part + 6) for part in range(4)]
        trial = lambda number, _: self._compare(cases[number], "float64", rows, 1, accumulated=True)
        self.rows.run("D7", "gradients accumulated over 4 batches of 6 images", len(cases), trial)

    def _compare(self, method: str, precision: str, rows: list[slice], count: int, *, accumulated: bool) -> str | None:
        one, several = self.folder / "one.npy", self.folder / "several.npy"
        run_warmed(lambda: gradient(method, precision, [slice(0, 24)], one), self.folder / "one.log")
        work = lambda: gradient(method, precision, rows, several, accumulated)
        codes, _ = in_processes(count, work, self.logs)
        if any(codes):
            return f"exit codes {codes}: {tail(self.logs / '0.log')}"
        wanted, got = np.load(one), np.load(several)
        error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        bar = BARS[precision]
        return None if error <= bar else f"{method} {precision} {rows}: relative error {error:.1e}, above {bar:.0e}"

    def D4(self) -> None:
        """One image more or less, or one bit, and it fails."""
        counts = (2, 4) if self.quick else (2, 3, 4, 8)

        def trial(number: int, generator: random.Random) -> str | None:
            found = []
            for count in (1, counts[number]):
                answer = self.folder / f"evaluated-{count}.npz"
                codes, _ = in_processes(count, lambda: evaluate(answer), self.logs)  # noqa: B023 (it runs at once)
                if any(codes):
                    return f"exit codes {codes}: {tail(self.logs / '0.log')}"
                found.append(dict(np.load(answer)))
            one, several = found
            if sorted(several["seen"].tolist()) != list(range(EVALUATED)):
                return "not every image once"
            other = [name for name in ("vectors", "labels", "accuracy") if not np.array_equal(one[name], several[name])]
            return f"{counts[number]} processes: other {', '.join(other)}" if other else None

        self.rows.run("D4", f"evaluation of {EVALUATED:,} images", len(counts), trial)

    def D5(self) -> None:
        """Equal bit by bit for two processes; with more, torch's reduction adds up in another order after a start."""

        def trial(number: int, generator: random.Random) -> str | None:
            count, run = 2 if self.quick else (2, 2, 3, 4)[number % 4], self._emptied("killed")
            victim, step = generator.randrange(count), generator.randrange(1, STEPS - 1)
            kill = killing(0.05 * generator.random())
            begin = command(self.images, run, count, "--checkpoint-minutes", "0.0002")
            codes, took = in_processes(count, lambda: training(begin, victim, step, kill), self.logs, 2 * ENDED)
            others = [code for process, code in enumerate(codes) if process != victim]
            if codes[victim] != -signal.SIGKILL or set(others) != {LOST} or took > ENDED:
                return f"{count} processes, exit codes {codes} after {took:.0f} s"
            if "another one has ended" not in self._told(count):
                return "no reason was given"
            go_on = ["pretrain", "--run", str(run), "--resume"]
            codes, _ = in_processes(count, lambda: training(go_on), self.logs)
            return f"resumed: exit codes {codes}" if any(codes) else self._differs(run, count, exact=count == 2)

        self.rows.run("D5", "one process killed, then resumed", 2 if self.quick else 20, trial)

    def D6(self) -> None:
        """Every second run is strict: one bad file ends it."""

        def trial(number: int, generator: random.Random) -> str | None:
            count, strict = generator.randrange(2, 5), number % 2 == 1
            files, run = self._emptied("files"), self._emptied("bad")
            shutil.copytree(self.images, files)
            chosen = generator.sample(sorted(files.rglob("*.png")), generator.randrange(1, 5))
            damage = lambda: [path.write_bytes(path.read_bytes()[:90]) for path in chosen]
            victim, step = generator.randrange(count), generator.randrange(1, STEPS // 2 - 3)
            begin = command(files, run, count, "--max-bad", "0" if strict else "0.05")
            work = lambda: training(begin, victim, step, damage, files=True)
            codes, took = in_processes(count, work, self.logs, 2 * ENDED)
            if None in codes or took > ENDED:
                return f"{count} processes, exit codes {codes} after {took:.0f} s"
            if strict:
                told = self._told(count)
                once = told.count("could not be decoded") == 1
                return None if sorted(set(codes)) == [2, LOST] and once else f"exit codes {codes}: {told[-300:]}"
            if any(codes):
                return f"{count} processes, exit codes {codes}: {tail(self.logs / '0.log')}"
            with open(run / "skipped.csv", newline="", encoding="utf-8") as file:
                listed = {row["path"] for row in csv.DictReader(file)}
            wanted = {str(path.relative_to(files)) for path in chosen}
            return None if listed == wanted else f"{count} processes: {len(listed)} of {len(wanted)} bad files listed"

        self.rows.run("D6", "files turn bad in one step", 4 if self.quick else 100, trial)

    def R5(self) -> None:
        """SIGTERM to one process; the step keeps its 24 images."""

        def trial(number: int, generator: random.Random) -> str | None:
            run, seen = self._emptied("moved"), self.folder / "seen"
            seen.unlink(missing_ok=True)
            stops = sorted(generator.sample(range(1, STEPS - 1), 2))
            begin, go_on = command(self.images, run, 2), ["pretrain", "--run", str(run), "--resume"]
            for count, stop, line in zip((2, 1, 4), (*stops, 0), (begin, go_on, go_on), strict=True):
                wrong = self._sitting([*line, "--trainer.devices", str(count)], count, stop, seen, generator)
                if wrong is not None:
                    return wrong
            steps: dict[int, list[int]] = {}
            for line in seen.read_text().splitlines():
                step, rows = json.loads(line)
                steps.setdefault(step, []).extend(rows)
            epochs = [sorted(chain(*(steps[7 * epoch + step] for step in range(1, 8)))) for epoch in range(STEPS // 7)]
            if any(rows != list(range(TRAINED)) for rows in epochs):
                return f"stopped at {stops}: not every image once in an epoch"
            return self._differs(run, 1, exact=False)

        self.rows.run("R5", "2, then 1, then 4 processes", 1 if self.quick else 10, trial)

    def _sitting(self, line: list[str], count: int, stop: int, seen: Path, generator: random.Random) -> str | None:
        victim, terminate = generator.randrange(count), lambda: os.kill(os.getpid(), signal.SIGTERM)
        codes, _ = in_processes(count, lambda: training(line, victim, stop, terminate, seen=seen), self.logs)
        right = codes == [143 if stop else 0] * count
        return None if right else f"{count} processes, exit codes {codes}: {tail(self.logs / '0.log')}"

    def _emptied(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def _told(self, count: int) -> str:
        return "".join((self.logs / f"{process}.log").read_text() for process in range(count))

    def _differs(self, run: Path, count: int, *, exact: bool) -> str | None:
        """How a run's weights and losses differ from those of the undisturbed run in `count` processes, if they do."""
        whole = self.folder / f"whole-{count}"
        if not (whole / "encoder").exists():
            codes, _ = in_processes(count, lambda: training(command(self.images, whole, count)), self.logs)
            assert not any(codes), tail(self.logs / "0.log")
        return difference(run, whole, 0 if exact else 1e-5)


def evaluate(answer: Path) -> None:
    """Features of generated images, shared by the processes of a run, and the kNN accuracy of a part of them."""
    with joined():
        torch.manual_seed(0)
        encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (8, 8)).eval()
        generator = np.random.default_rng(0)
        names = np.array([f"{number % 10}" for number in range(EVALUATED)])
        source = sources.open_source((generator.integers(0, 256, (EVALUATED, 8, 8, 3), np.uint8), names))
        share = Share(source)
        vectors, labels = share.embedded(encoder, plain((8, 8)), "D4")
        seen = all_gather_object(share.rows.tolist())
        if rank() == 0:
            accuracy = knn_accuracy(vectors[2_000:], labels[2_000:], vectors[:2_000], labels[:2_000])
            np.savez(answer, vectors=vectors, labels=labels, accuracy=accuracy, seen=np.concatenate(seen))


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few trials of each row, below 2 minutes")
    parser.add_argument("--only", default="", help="rows, such as D1,D5")
    parser.add_argument("--json", type=Path, help="file of rows; one that is there is gone on with")
    parser.add_argument("--folder", type=Path, help="scratch folder; a temporary one by default")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="distributed-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(folder, Rows(arguments.json), arguments.quick)
        bench.run([name for name in arguments.only.split(",") if name])
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
