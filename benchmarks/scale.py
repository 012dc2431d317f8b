"""Search in a million vectors: the index that --key auto builds, and a memory-mapped one, beside exact search.

    python benchmarks/scale.py [--encoder RUN --data data/cifar10/train] [--quick] [--json FILE]

With an encoder, vectors are features of randomly cropped and jittered copies of the images; without one, a mixture of
1,000 Gaussians in a space of decaying variances. Queries are held out of the gallery. Times are of 1,000 queries
together, exact and approximate in turn, the latter after as many other queries; memory is bytes of the index file over
bytes of the float32 vectors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.embeddings.index import build_index, fast_key, search_index
from ssl_kit.embeddings.signing import read_index, write_index

DIM = 128
QUERIES = 1_000
K = 10
RUNS = 5


def mixture(count: int) -> np.ndarray:
    """(count, DIM) float32."""
    random = np.random.default_rng(0)
    scales = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
    centres = random.standard_normal((1_000, DIM), dtype=np.float32)
    made = np.empty((count, DIM), dtype=np.float32)
    for start in range(0, count, 65_536):
        part = made[start : start + 65_536]
        part[:] = centres[random.integers(0, len(centres), len(part))]
        part += 0.7 * random.standard_normal(part.shape, dtype=np.float32)
        part *= scales
    return made


def augmented(encoder: str, data: str, count: int) -> np.ndarray:
    """(count, D) features of views of the images, as many of each as are needed."""
    import torch

    from ssl_kit.core.console import progress
    from ssl_kit.core.named import find_encoder
    from ssl_kit.data.loader import ViewLoader
    from ssl_kit.data.opening import open_source
    from ssl_kit.encoders.encoder import Encoder
    from ssl_kit.views.recipe import View

    loaded = Encoder.load(find_encoder(encoder))
    source = open_source(data, reading=loaded.reading)
    view = View(size=loaded.image_size, crop=1.0, scale=(0.3, 1.0), flip_x=0.5)
    plan = [np.arange(start, min(start + 256, len(source))) for start in range(0, len(source), 256)]
    made, done, epoch = np.empty((count, loaded.dim), dtype=np.float32), 0, 0
    with progress(count, "views") as bar, torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        while done < count:
            for batch in ViewLoader(source, plan, (view,), epoch=epoch):
                features = loaded(batch["views"][0].contiguous(memory_format=torch.channels_last)).float().numpy()
                part = features[: count - done]
                made[done : done + len(part)] = part
                done += len(part)
                bar.advance(bar.task_ids[0], len(part))
                if done == count:
                    break
            epoch += 1
    return made


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, gallery: np.ndarray, queries: np.ndarray, key: str, mapped: bool) -> list[dict[str, Any]]:
    """Recall, speed and memory of one index, and whether it finds the same when it is read again."""
    exact = search(gallery, queries, K)[1]
    began = time.perf_counter()
    built = build_index(gallery, key, 0.95, mapped=mapped)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "index.faiss"
        write_index(built.index, path)
        memory = path.stat().st_size / gallery.nbytes
        read = read_index(path, len(gallery), gallery.shape[1], mapped)
        found = search_index(read, queries, K)[1]
        same = float(np.mean(found == search_index(built.index, queries, K)[1]))
        slow, fast = [], []
        for _ in range(RUNS):
            slow.append(timed(lambda: search(gallery, queries, K)))
            search_index(read, gallery[:: len(gallery) // QUERIES], K)  # the exact search has emptied the caches
            fast.append(timed(lambda: search_index(read, queries, K)))
    hits = [len(np.intersect1d(one, truth)) for one, truth in zip(found, exact, strict=True)]
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    what = f"{len(gallery):,} x {gallery.shape[1]}, {built.key}, nprobe {built.nprobe}"
    return [
        {"id": f"{name}/recall", "what": f"recall@10, held-out queries, {what}", "ours": sum(hits) / exact.size},
        {
            "id": f"{name}/speed",
            "what": f"queries/s, {what}",
            "ours": round(QUERIES / median(fast)),
            "peer": round(QUERIES / median(slow)),
            "peer_name": "exact",
            "unit": "queries/s",
            "ratio": round(median(ratios), 1),
            "low": round(min(ratios), 1),
            "high": round(max(ratios), 1),
            "runs": RUNS,
        },
        {"id": f"{name}/memory", "what": f"bytes over those of float32, {what}", "ours": round(memory, 4)},
        {"id": f"{name}/reload", "what": "equal rows after reading it again", "ours": same},
        {
            "id": f"{name}/build",
            "what": "training, filling, tuning and measuring",
            "ours": round(seconds, 1),
            "unit": "s",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", help="run folder or encoder folder")
    parser.add_argument("--data", help="images to make views of")
    parser.add_argument("--vectors", type=Path, help="of an earlier run, normalised: (count + 1,000, D) in a .npy file")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="50,000 vectors, in lists although exact search is quick")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count = 50_000 if arguments.quick else arguments.count
    if arguments.vectors is not None:
        vectors = np.load(arguments.vectors)[: count + QUERIES]
    elif arguments.encoder:
        vectors = normalised(augmented(arguments.encoder, arguments.data, count + QUERIES))
    else:
        vectors = normalised(mixture(count + QUERIES))
    order = np.random.default_rng(1).permutation(len(vectors))
    queries, gallery = vectors[order[:QUERIES]], np.ascontiguousarray(vectors[np.sort(order[QUERIES:])])
    auto = fast_key(count, vectors.shape[1]) if arguments.quick else "auto"
    rows = measure("scale/auto", gallery, queries, auto, mapped=False)
    rows += measure("scale/mapped", gallery, queries, "auto", mapped=True)
    for line in rows:
        beside = f"  {line['ratio']} x exact" if "ratio" in line else ""
        print(f"{line['id']:<22}{line['ours']:>12}  {line['what']}{beside}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
