"""kNN and linear probe beside lightly's: seconds, peak memory and accuracy of the same scores.

    python benchmarks/evaluate.py data/cifar10 [--encoder RUN] [--only knn/50000,probe] [--quick] [--json FILE]

`knn/N`: N gallery rows, 10,000 queries, k = 200, T = 0.1, vectors from overlapping Gaussians. Ours is
`ssl_kit.evaluation.knn` as a notebook calls it: checks, normalisation, exact search, vote, metrics with bootstrap
intervals. lightly's is what its KNNClassifier does with features: normalise, lay the bank out, `knn_predict` for 128
queries at a time, top-1 and top-5. Both get all cores; the two accuracies must agree within 0.2 points.
`probe/path/online`: labelled images to the score of a linear probe. Ours decodes and embeds them once, then solves the
path of 8 l2 values, chooses on held-out train and refits. lightly's is its LinearClassifier under Lightning's Trainer
(random crops and flips by worker processes, frozen encoder in float32, SGD with lr 0.1): seconds per image over some
batches, times the training images, times 90 epochs; its validation is not counted. Its accuracy is that of its head
trained by the same SGD for 90 epochs on our features, without the crops.
Memory is the peak of a fresh process over what it held before, after a warm-up; ratios are better-is-larger.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from ssl_kit.core.console import say, table
from ssl_kit.core.machine import available_cores
from ssl_kit.core.named import find_encoder
from ssl_kit.data.opening import open_labelled
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation import knn, linear_probe
from ssl_kit.evaluation.attentive import train_linear

Row = dict[str, Any]

QUERIES, CLASSES, K, T = 10_000, 10, 200, 0.1
DIMS = {50_000: 512, 1_000_000: 256}
BARS = {50_000: 1.3, 1_000_000: 2.0}
KNN_BATCH, PROBE_BATCH, EPOCHS, LR = 128, 256, 90, 0.1  # lightly's: queries, images, epochs, for 256 images a step
AGREE = 0.002  # of accuracy
WARM_UP = 2  # batches of the online probe that are not timed
PROBE = 50_000, 512  # images and dimensions of `probe/path/seconds`


def mixture(count: int, dim: int, seed: int) -> Embeddings:
    """`count` vectors of overlapping classes; the seed moves the sample, not the classes."""
    random, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    scales = (1 / np.sqrt(np.arange(1, dim + 1))).astype(np.float32)  # of features: their variances decay
    centres = 0.35 * fixed.standard_normal((10 * CLASSES, dim), dtype=np.float32)
    which = random.integers(0, len(centres), count)
    vectors = random.standard_normal((count, dim), dtype=np.float32)
    for start in range(0, count, 65_536):
        part = slice(start, start + 65_536)
        vectors[part] = (vectors[part] + centres[which[part]]) * scales
    return Embeddings.of(vectors, which % CLASSES)


def lightly_knn(train: Embeddings, test: Embeddings) -> tuple[np.ndarray, float, float]:
    """KNNClassifier's two validation loops on features: predictions, seconds for the bank and per query."""
    from lightly.utils.benchmarking import knn_predict
    from lightly.utils.benchmarking.topk import mean_topk_accuracy

    began = time.perf_counter()
    bank = F.normalize(torch.from_numpy(train.vectors), dim=1).t().contiguous()
    targets = torch.from_numpy(train.labels)
    middle, predictions = time.perf_counter(), []
    asked, wanted = (torch.from_numpy(part).split(KNN_BATCH) for part in (test.vectors, test.labels))
    for batch, labels in zip(asked, wanted, strict=True):
        ranked = knn_predict(F.normalize(batch, dim=1), bank, targets, CLASSES, knn_k=K, knn_t=T)
        mean_topk_accuracy(ranked, labels, k=(1, 5))
        predictions.append(ranked[:, 0])
    return torch.cat(predictions).numpy(), middle - began, (time.perf_counter() - middle) / len(test)


def first(part: Embeddings, count: int) -> Embeddings:
    return Embeddings(part.vectors[:count], part.labels[:count], part.classes, part.ids[:count])


def summary(name: str, what: str, pairs: Sequence[tuple[float, float]], peer: str, unit: str, bar: float | None) -> Row:
    """A row from (ours, peer) of which less is better."""
    ratios = [other / own for own, other in pairs]
    row: Row = {"id": name, "what": what, "ours": round(median(own for own, _ in pairs), 3)}
    row |= {"peer": round(median(other for _, other in pairs), 3), "peer_name": peer, "unit": unit}
    row |= {"ratio": round(median(ratios), 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)}
    return row | {"runs": len(pairs), "bar": bar}


def knn_times(count: int, queries: int, asked: int, runs: int) -> list[Row]:
    """Interleaved rounds; lightly answers `asked` queries, which stand for all of them."""
    train, test = mixture(count, DIMS[count], 0), mixture(queries, DIMS[count], 1)
    few = first(test, asked)
    knn(first(train, 2_000), few, k=K, temperature=T)
    lightly_knn(first(train, 2_000), few)
    pairs, accuracies = [], (0.0, 0.0)
    for _ in range(runs):
        began = time.perf_counter()
        ours = knn(train, test, k=K, temperature=T)
        spent = time.perf_counter() - began
        theirs, bank, each = lightly_knn(train, few)
        pairs.append((spent, bank + queries * each))
        assert ours.predictions is not None
        accuracies = tuple(float((one == few.labels).mean()) for one in (ours.predictions[:asked], theirs))
        if abs(accuracies[0] - accuracies[1]) > AGREE:
            raise SystemExit(f"knn/{count}: accuracies {accuracies} of the same {asked:,} queries differ")
    what = f"kNN of {queries:,} in {count:,} x {DIMS[count]}, k {K}"
    what += f"; lightly from {asked:,} queries" if asked < queries else ""
    row = summary(f"knn/{count}/lightly", what, pairs, "lightly", "s", BARS[count])
    return [row | {"accuracy": round(accuracies[0], 4), "peer_accuracy": round(accuracies[1], 4)}]


def memory(name: str, what: str, ours: int, theirs: int, limit: float | None = None) -> list[Row]:
    """Peaks of ours and of lightly's in fresh processes; a row of its own where ours has a limit, in MiB."""
    own = grown(f"{name}/ours", ours)
    pairs = [(own, grown(f"{name}/lightly", theirs))]
    rows = [summary(f"{name}/memory/lightly", what, pairs, "lightly", "MiB", None)]
    return rows + ([summary(f"{name}/memory", what, [(own, limit)], "limit", "MiB", 1.0)] if limit else [])


class Stopwatch(pl.Callback):
    """The times at which batches ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())


def online(encoder: Encoder, loader: Any, batches: int, precision: Any = "32-true") -> float:
    """Seconds per image of lightly's linear evaluation, over `batches` after a warm-up."""
    from lightly.utils.benchmarking import LinearClassifier

    classifier = LinearClassifier(encoder, PROBE_BATCH, lr=LR, feature_dim=encoder.num_features, num_classes=CLASSES)
    watch = Stopwatch()
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    silent |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": [watch]}
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=WARM_UP + batches, precision=precision, **silent)
    trainer.fit(classifier, loader)
    return (watch.times[-1] - watch.times[WARM_UP - 1]) / (batches * PROBE_BATCH)


def lightly_loader(folder: Path, encoder: Encoder) -> Any:
    """As lightly's benchmarks load images for their linear evaluation."""
    from lightly.data import LightlyDataset
    from torchvision import transforms

    steps = [transforms.RandomResizedCrop(encoder.image_size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    dataset = LightlyDataset(input_dir=str(folder), transform=transforms.Compose(steps))  # the encoder normalises
    cores = available_cores()
    return DataLoader(dataset, PROBE_BATCH, shuffle=True, drop_last=True, num_workers=cores)


def network(folder: str | None) -> Encoder:
    """The encoder to evaluate; untrained, ResNet-18 for 32 px, when none is given: speed does not depend on it."""
    if folder is not None:
        return Encoder.load(find_encoder(folder))
    torch.manual_seed(0)
    return Encoder("resnet18_small", {}, (32, 32), 3, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)).eval()


def probe(data: str, folder: str | None, limit: int | None, batches: int, runs: int, quick: bool) -> list[Row]:
    """Interleaved rounds of the whole way from files to a score."""
    encoder = network(folder)
    loader = lightly_loader(Path(data) / "train", encoder)
    pairs, fast, alone, accuracies = [], [], [], (0.0, 0.0)
    for _ in range(runs):
        began = time.perf_counter()
        parts = open_labelled(data, limit=limit)
        train, test = (embed(encoder, part, label="embedding") for part in parts)
        middle = time.perf_counter()
        scored = linear_probe(train, test)
        spent, own = time.perf_counter() - began, time.perf_counter() - middle
        images = EPOCHS * len(train)
        pairs.append((spent, images * online(encoder, loader, batches)))
        alone.append((own, 20.0))
        if not quick:
            last = network(folder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            fast.append((spent, images * online(last, loader, batches, "bf16-mixed")))
        head = train_linear(
            torch.from_numpy(train.vectors), torch.from_numpy(train.labels), CLASSES, [LR], EPOCHS, PROBE_BATCH, 0
        )
        right = head.predict(torch.from_numpy(test.vectors))[0] == test.labels
        accuracies = scored.metrics["top1"], float(right.mean())
    shape = f"{len(train):,} x {train.vectors.shape[1]}"
    what = f"files to score, {shape}: 8 l2, choice, refit; lightly's {EPOCHS} epochs from {batches} batches"
    both = {"accuracy": round(accuracies[0], 4), "peer_accuracy": round(accuracies[1], 4)}
    rows = [summary("probe/path/online", what, pairs, "lightly", "s", 50.0) | both]
    if fast:
        peer = "lightly in bfloat16, channels_last"
        rows.append(summary("probe/path/online-bfloat16", what, fast, peer, "s", None) | both)
    if quick:  # the probe alone is of the full size all the same, on features that are made up
        alone = [(linear_probe(mixture(*PROBE, 0), mixture(10_000, PROBE[1], 1)).seconds, 20.0)]
        shape = f"{PROBE[0]:,} x {PROBE[1]} made up"
    return [*rows, summary("probe/path/seconds", f"8 l2, choice and refit of {shape}", alone, "limit", "s", 1.0)]


def peak(anew: bool = False) -> float:
    """MiB of the largest resident memory; `anew`: since now, with freed memory given back first (Linux)."""
    if anew:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def grown(subject: str, size: int) -> float:
    """MiB that a fresh process's peak grows by in `measure(subject, size)`."""
    command = [sys.executable, __file__, "--measure", subject, str(size)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout.split()[-1])


def measure(subject: str, size: int) -> float:
    """What one call adds to the peak of this process: `size` queries, training vectors, or images of a batch."""
    kind, name, whose = subject.split("/")
    call: Callable[..., Any] = partial(knn, k=K, temperature=T) if kind == "knn" else linear_probe
    if (kind, whose) == ("probe", "lightly"):
        images, labels = torch.rand(8 * size, 3, 32, 32), torch.randint(0, CLASSES, (8 * size,))
        loader, encoder = DataLoader(TensorDataset(images, labels), size), network(None)
        before = peak(anew=True)
        online(encoder, loader, 2)
        return peak() - before
    rows, dim, queries = (int(name), DIMS[int(name)], size) if kind == "knn" else (size, PROBE[1], QUERIES)
    call = lightly_knn if whose == "lightly" else call
    large = mixture(rows, dim, 0), mixture(queries, dim, 1)
    call(*(first(part, 500) for part in large))
    before = peak(anew=True)
    call(*large)
    return peak() - before


def measurements(arguments: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """What there is to measure, in order."""
    quick = arguments.quick
    queries, asked = (4_000, 256) if quick else (QUERIES, 1_024)
    limit, batches, runs = (1_800, 3, 1) if quick else (None, 16, 3)
    beside = "peak beside the vectors, kNN of {:,} in {:,} x {}".format
    features = "peak of the probe beside {:,} x {} features, of lightly's beside its network".format(*PROBE)
    small, large, two = 50_000, 1_000_000, 2 * KNN_BATCH
    made = {
        "knn/50000/lightly": partial(knn_times, small, QUERIES, QUERIES, 2 if quick else 7),
        "knn/50000/memory": partial(memory, "knn/50000", beside(QUERIES, small, DIMS[small]), QUERIES, two),
        "knn/1000000/lightly": partial(knn_times, large, queries, asked, 1 if quick else 3),
        "knn/1000000/memory": partial(memory, "knn/1000000", beside(queries, large, DIMS[large]), queries, two, 3_072),
        "probe/path": partial(probe, arguments.data, arguments.encoder, limit, batches, runs, quick),
    }
    return made if quick else made | {"probe/memory": partial(memory, "probe/path", features, PROBE[0], PROBE_BATCH)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="data/cifar10", help="images in train/ and test/, for the probe")
    parser.add_argument("--encoder", help="run or encoder folder; by default an untrained ResNet-18, d = 512")
    parser.add_argument(
        "--only", default="", help="beginnings of knn/N/lightly, knn/N/memory, probe/path, probe/memory"
    )
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: fewer rounds, queries and images")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure[0], int(arguments.measure[1])))
        return
    rows: list[Row] = []
    for name, make in measurements(arguments).items():
        if any(name.startswith(wanted) for wanted in arguments.only.split(",")):
            made = make()
            rows += made
            say("\n".join(f"{row['id']}: {row['ours']:,} {row['unit']}, ratio {row['ratio']}" for row in made))
            if arguments.json is not None:  # as it goes: the whole takes a quarter of an hour
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    columns = ("id", "ours", "peer", "unit", "ratio", "bar", "accuracies")
    cells = []
    for row in rows:
        scores = f"{row['accuracy']} / {row['peer_accuracy']}" if "accuracy" in row else ""
        numbers = (f"{row['ours']:,}", f"{row['peer']:,}", row["unit"], row["ratio"], row["bar"] or "")
        cells.append((row["id"], *numbers, scores))
    table("scores beside lightly's", columns, cells)


if __name__ == "__main__":
    main()
