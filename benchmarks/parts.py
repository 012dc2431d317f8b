"""An index that several processes fill, beside that of one: recall, memory of all, bytes; and a mapped search.

    python benchmarks/parts.py [--count 3000000] [--processes 3] [--quick] [--json FILE]

Vectors are a mixture of 1,000 Gaussians in 64 dimensions of decaying variances. Memory is the anonymous memory
(Pss_Anon) of `ssl-kit index` and all that it starts, looked at ten times a second. Recall is that of 1,000 vectors more
of the mixture, against exact search.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record

DIM, QUERIES, K = 64, 1_000, 10
SEARCH = """
import json, sys, time
import numpy as np
from ssl_kit import Index
index = Index.load(sys.argv[1])
began = time.perf_counter()
found = [[near.row for near in one] for one in index.search_vectors(np.load(sys.argv[2]), 10)]
print(json.dumps({"rows": found, "seconds": time.perf_counter() - began}))
"""


def mixture(count: int, seed: int) -> np.ndarray:
    """(count, DIM) float32; the clusters are the same for every seed."""
    random, scales = np.random.default_rng(seed), (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)
    centres = np.random.default_rng(0).standard_normal((1_000, DIM), dtype=np.float32)
    noise = random.standard_normal((count, DIM), dtype=np.float32)
    return (centres[random.integers(0, 1_000, count)] + 0.7 * noise) * scales


def embeddings(folder: Path, count: int) -> None:
    """A folder of the mixture, as `ssl-kit embed` would leave it."""
    from ssl_kit.embeddings.embeddings import Embeddings

    info = {"layers": 1, "preprocessing": {}, "encoder_sha256": "0" * 64, "precision": "float32"}
    ids = [f"{row:08d}.png" for row in range(count)]
    Embeddings(mixture(count, 1), np.full(count, -1), (), ids, info).save(folder)


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def anonymous(pid: int) -> int:
    """Bytes of a process that are of no file; what several share is divided among them."""
    try:
        told = re.search(r"Pss_Anon:\s+(\d+)", Path("/proc", str(pid), "smaps_rollup").read_text())
    except OSError:
        return 0
    return 1024 * int(told[1]) if told else 0


def run(*command: str) -> tuple[dict[str, Any], float, float]:
    """What a command prints as JSON, its seconds and its peak of memory in MiB."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen([sys.executable, *command], stdout=said)
        while child.poll() is None:
            peak = max(peak, sum(map(anonymous, family(child.pid))))
            time.sleep(0.1)
        if child.returncode:
            sys.exit(child.returncode)
        said.seek(0)
        return json.loads(said.read()), time.perf_counter() - began, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3_000_000)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="200,000 vectors")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    count = 200_000 if arguments.quick else arguments.count
    from ssl_kit.embeddings.exact import normalised, search

    with tempfile.TemporaryDirectory() as place:
        folder, asked = Path(place) / "EMB", Path(place) / "queries.npy"
        embeddings(folder, count)
        queries = mixture(QUERIES, 2)
        np.save(asked, queries)
        exact = search(normalised(mixture(count, 1)), normalised(queries), K)[1]
        peaks, recalls, files, rows = [], [], [], []
        for processes in (1, arguments.processes):
            word = f"{processes} process" + "es" * (processes > 1)
            index = ("-m", "ssl_kit", "index", str(folder), "--mapped", "--processes", str(processes), "--json")
            entry, seconds, peak = run(*index)
            found, _, held = run("-c", SEARCH, str(folder), str(asked))
            hits = [len(np.intersect1d(one, truth)) for one, truth in zip(found["rows"], exact, strict=True)]
            peaks.append(peak)
            recalls.append(sum(hits) / exact.size)
            files.append((folder / "index.faiss").read_bytes())
            what = f"{count:,} x {DIM}, {entry['key']}, nprobe {entry['nprobe']}, {word}"
            rows += [
                {"id": f"parts/{processes}/recall", "what": f"recall@10, {what}", "ours": round(recalls[-1], 4)},
                {"id": f"parts/{processes}/memory", "what": f"peak, {what}", "ours": round(peak, 1), "unit": "MiB"},
                {"id": f"parts/{processes}/seconds", "what": what, "ours": round(seconds, 1), "unit": "s"},
                {
                    "id": f"parts/{processes}/search",
                    "what": f"peak of a process that loads torch and asks {QUERIES:,} queries, mapped",
                    "ours": round(held, 1),
                    "unit": "MiB",
                },
            ]
        rows += [
            {"id": "parts/memory", "what": "peak of several processes over that of one", "ours": peaks[1] / peaks[0]},
            {"id": "parts/recall", "what": "recall of several less that of one", "ours": recalls[1] - recalls[0]},
            {"id": "parts/bytes", "what": "the same file", "ours": files[0] == files[1]},
        ]
    record.tell(rows, arguments.json)


if __name__ == "__main__":
    main()
