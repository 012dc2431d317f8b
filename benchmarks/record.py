"""Runs a benchmark, keeps its rows with where they came from, and rewrites docs/numbers.md from all that is kept.

The figures of the tables in docs/reliability.md are rewritten too: `survived of tried` of the records faults_*.json.

    python benchmarks/record.py views --quick      # runs benchmarks/views.py --quick --json ..., then rewrites the page
    python benchmarks/record.py cifar10=scores runs/c10    # keeps the rows of scores.py under another name
    python benchmarks/record.py                    # rewrites the page only

It refuses to run a benchmark while files differ from the commit: a figure is of a commit. Records of before that rule
whose commit ends in "-dirty" are marked on the page.

The records are docs/numbers/NAME.json: {"command", "commit", "date", "machine", "rows"}; a row is what design says of
benchmarks (`id, what, ours, peer, peer_name, unit, ratio, low, high, runs`) or any other flat record.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "numbers"
PAGE = ROOT / "docs" / "numbers.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
HEAD = """# Numbers

Made by `python benchmarks/record.py` from `docs/numbers/*.json`; do not edit. Ratios are better-is-larger,
measured side by side in one run (interleaved), median with minimum and maximum. Accuracies are fractions with 95 %
bootstrap intervals.
"""


_NAMES = {"E": "embed", "N3": "verdict"}  # ids of docs/reliability.md whose rows are called otherwise


def machine() -> str:
    """Processor, cores and memory of this machine, in words."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = lines[0] if lines else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {processor}, {memory:.0f} GiB, shared"


def commit_now() -> str:
    """The commit of the checkout.

    Raises:
        SystemExit: files differ from it, tracked ones anywhere or new ones where code and recipes are: a figure could
            not be made again. What this program writes is none of them.
    """
    own = [f":(exclude){path.relative_to(ROOT)}" for path in (RECORDS, PAGE, RELIABILITY)]
    changed = _git("diff", "--name-only", "-z", "HEAD", "--", ".", *own)
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", "ssl_kit", "recipes", "benchmarks")
    files = [name for name in (changed + new).split("\0") if name]
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        sys.exit(
            f"record.py: {', '.join(files[:3])}{more} differ from the commit that a figure is of; commit them first"
        )
    return _git("rev-parse", "--short=12", "HEAD").strip()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tell(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints a benchmark's rows, and writes them to its --json file."""
    for row in rows:
        print(" · ".join(f"{key} {value}" for key, value in row.items()))
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def keep(name: str, command: str, commit: str, rows: list[dict[str, Any]]) -> None:
    """Writes docs/numbers/NAME.json."""
    made = {"command": command, "commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps({**made, "rows": rows}, indent=1) + "\n")


def cell(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def page() -> str:
    """The whole of docs/numbers.md."""
    parts = [HEAD]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        columns = list(dict.fromkeys(key for row in record["rows"] for key in row))
        commit = record["commit"].removesuffix("-dirty")
        mark = "**of an uncommitted tree** after " if commit != record["commit"] else ""
        where = f"{mark}commit {commit}, {record['date']}, {record['machine']}"
        parts.append(f"\n## {path.stem}\n\n`{record['command']}` - {where}\n\n")
        parts.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n")
        for row in record["rows"]:
            parts.append("| " + " | ".join(cell(row.get(column)) for column in columns) + " |\n")
    return "".join(parts)


def reliability(text: str) -> str:
    """docs/reliability.md with the figure of each id in the last column of its tables."""
    records = [*sorted(RECORDS.glob("faults_*.json")), *RECORDS.glob("verdict.json")]
    rows = [row for path in records for row in json.loads(path.read_text())["rows"] if "tried" in row]

    ids = {line.split(" | ")[0].removeprefix("| ") for line in text.split("\n")}

    def filled(line: str) -> str:
        cells = line.split(" | ")
        name = _NAMES.get(cells[0].removeprefix("| "), cells[0].removeprefix("| "))
        others = ids - {name}  # A2/run has a line of its own
        same = [row for row in rows if f"{row['id']}/".startswith(f"{name}/") and row["id"] not in others]
        if len(cells) != 4 or not (same or "`tests/" not in cells[2]) or cells[0] in ("| id", "| R7"):
            return line
        tried, survived = (sum(row[key] for row in same) for key in ("tried", "survived"))
        return " | ".join([*cells[:3], f"{survived:,} of {tried:,} |" if same else "not run in full yet |"])

    return "\n".join(filled(line) if line.startswith("| ") else line for line in text.split("\n"))


def main() -> None:
    if len(sys.argv) > 1:
        name, _, benchmark = sys.argv[1].partition("=")
        benchmark, options = benchmark or name, sys.argv[2:]
        commit = commit_now()  # of the code that runs, before anybody goes on working
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            command = [sys.executable, f"benchmarks/{benchmark}.py", *options, "--json", str(rows)]
            subprocess.run(command, cwd=ROOT, check=True)
            keep(
                name, " ".join(["python", f"benchmarks/{benchmark}.py", *options]), commit, json.loads(rows.read_text())
            )
    PAGE.write_text(page())
    RELIABILITY.write_text(reliability(RELIABILITY.read_text()))


if __name__ == "__main__":
    main()
