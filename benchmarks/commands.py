"""How long a user waits for the command line: every --help, and a search from a cold start.

    python benchmarks/commands.py [--embeddings EMB --image FILE] [--quick] [--json FILE]

Wall time of whole processes, median of 10 (3 with --quick).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from ssl_kit.cli import _verbs

RUN = [str(Path(sys.executable).parent / "ssl-kit")]


def timed(arguments: list[str], runs: int) -> list[float]:
    """Seconds of each of `runs` processes; the command must succeed."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([*RUN, *arguments], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return seconds


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
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else 10
    rows = [row("commands/help", "ssl-kit --help", timed(["--help"], runs))]
    rows += [row(f"commands/help/{verb}", f"ssl-kit {verb} --help", timed([verb, "--help"], runs)) for verb in _verbs()]
    if arguments.embeddings:
        search = ["search", arguments.embeddings, arguments.image]
        rows.append(row("commands/search", f"ssl-kit search {arguments.embeddings} (cold start)", timed(search, runs)))
    for line in rows:
        print(f"{line['id']:<28}{line['ours']:>8} s  [{line['low']}, {line['high']}]")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
