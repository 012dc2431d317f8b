"""`ssl-kit plan` beside the trainings it foretells: three methods, two sizes of views, one process and two.

    python benchmarks/plan.py data/cifar10/train [--seconds 60] [--methods simclr,mae,vae] [--json FILE]

Each training is planned first, from a trial of seconds on this machine, then made: as many images as should take
--seconds, by default options otherwise. `ratio` is the time that training took over the foretold one, wanted are 0.75
to 1.25: looks at the features, reports and the first batch are part of it, which a short run has as many of as a
long one; `pace` is the same of its steps alone. Two processes share this machine's cores (`--per-machine 2`).
Starting, decoding and the last report are not part of either. No figure of a plan comes from a run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import tell

SIZES, PROCESSES = (32, 64), (1, 2)
FAR = 0.25  # from 1, of a ratio
_ALL = 50_000  # images at most; more are more epochs
Row = dict[str, Any]


def said(*words: str) -> Row:
    """What a command says as JSON."""
    command = [sys.executable, "-m", "ssl_kit", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def trial(method: str, size: int, processes: int, data: str, seconds: float) -> Row:
    """One training, planned and made."""
    how = ["-c", method, "--image-size", str(size)]
    together = ["--processes", str(processes), "--per-machine", str(processes)]
    planned = said("plan", data, *how, *together, "--images", str(_ALL), "--epochs", "1")
    wanted = round(planned["images_per_second"] * seconds)
    images, epochs = min(wanted, _ALL), max(1.0, wanted / _ALL)
    place = tempfile.mkdtemp(prefix="plan-")
    try:
        made = [*how, "--limit", str(images), "--epochs", f"{epochs:.3f}", "--run", f"{place}/run"]
        if processes > 1:
            made += ["--trainer.devices", str(processes)]
        run = said("pretrain", data, *made)
    finally:
        shutil.rmtree(place)
    foretold = images * epochs / planned["images_per_second"]
    row: Row = {"id": f"plan/{method}/{size}px/{processes}", "what": "seconds of training", "foretold": round(foretold)}
    row |= {"made": round(run["seconds"]), "ratio": round(run["seconds"] / foretold, 3), "images": images}
    pace = planned["images_per_second"] / run["images_per_second"]
    return row | {"pace": round(pace, 3), "met": abs(row["ratio"] - 1) <= FAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="some thousand images")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--methods", default="simclr,mae,vae")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    trials = itertools.product(arguments.methods.split(","), SIZES, PROCESSES)
    tell([trial(*one, arguments.data, arguments.seconds) for one in trials], arguments.json)


if __name__ == "__main__":
    main()
