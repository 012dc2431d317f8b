"""How long a user waits for the command line: every --help, a search, and a training until its first step.

    python benchmarks/commands.py [--embeddings EMB --image FILE] [--data FOLDER] [--quick] [--json FILE]

Wall time of whole processes, median of 10 (3 with --quick). `start/pretrain/first_step` ends when the optimiser has
made its first step, with warm caches; before each run of `start/search/cold` the system's cache of files is emptied,
which takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from ssl_kit.verbs.manual import verbs

RUN = [sys.executable, "-P", "-m", "ssl_kit"]  # -P: not the package that the current folder may hold
CACHES = Path("/proc/sys/vm/drop_caches")
# torch must not be there before the command loads it: cli.py asks
UNTIL_FIRST_STEP = """
import os
from ssl_kit import cli
parse = cli._parse
def parsed(*given):
    values = parse(*given)
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(lambda *_: os._exit(0))
    return values
cli._parse = parsed
cli.run()
"""


def timed(arguments: list[str], runs: int, command: list[str] = RUN, cold: bool = False) -> list[float]:
    """Seconds of each of `runs` processes; the command must succeed."""
    seconds = []
    for _ in range(runs):
        if cold:
            os.sync()
            CACHES.write_text("3")
        began = time.perf_counter()
        subprocess.run([*command, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def first_step(data: str, runs: int) -> dict[str, Any]:
    """The row of a training of CIFAR-10's size by a packaged recipe."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["pretrain", data, "-c", "simclr_cifar10_small", "--epochs", "1", "--run", f"{folder}/run"]
        seconds = timed([*options, "--overwrite"], runs, [sys.executable, "-P", "-c", UNTIL_FIRST_STEP])
    return row("start/pretrain/first_step", f"ssl-kit {' '.join(options[:-2])}, to the first step", seconds)


def row(name: str, what: str, seconds: list[float]) -> dict[str, Any]:
    return {
        "id": name,
        "what": what,
        "ours": round(median(seconds), 3),
        "unit": "s",
        "low": round(min(seconds), 3),
        "high": round(max(seconds), 3),
        "runs": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", help="an indexed embeddings folder")
    parser.add_argument("--image", help="a query image")
    parser.add_argument("--data", help="CIFAR-10 as image files")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else 10
    rows = [row("commands/help", "ssl-kit --help", timed(["--help"], runs))]
    rows += [row(f"commands/help/{verb}", f"ssl-kit {verb} --help", timed([verb, "--help"], runs)) for verb in verbs()]
    if arguments.embeddings:
        search = ["search", arguments.embeddings, arguments.image]
        rows.append(row("commands/search", f"ssl-kit search {arguments.embeddings}", timed(search, runs)))
        if os.access(CACHES, os.W_OK):
            cold = timed(search, runs, cold=True)
            rows.append(row("start/search/cold", f"ssl-kit search {arguments.embeddings}, no file in memory", cold))
    if arguments.data:
        rows.append(first_step(arguments.data, runs))
    for line in rows:
        print(f"{line['id']:<28}{line['ours']:>8} s  [{line['low']}, {line['high']}]")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
