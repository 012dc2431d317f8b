"""The scores of evaluated runs as rows, with how long pretraining took.

python benchmarks/scores.py RUN [RUN ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from record import tell


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One row per top-1 score in RUN/results.jsonl, the latest of each kind; first the run itself."""
    facts = json.loads((run / "run.json").read_text())
    rows: list[dict[str, Any]] = [
        {
            "id": f"{run.name}/pretrain",
            "what": facts["command"],
            "value": round(facts["seconds"] / 60, 2),
            "unit": "minutes",
            "images_per_second": facts["images_per_second"],
            "waiting_share": round(facts["waiting_share"], 4),
            "epochs": facts["epochs"],
            "seed": facts["seed"],
        }
    ]
    latest: dict[str, dict[str, Any]] = {}
    for line in (run / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        settings, metrics = result["settings"], result["metrics"]
        if "top1" not in metrics:
            continue
        way = [f"k={settings['k']}, T={settings['temperature']}"] if "k" in settings else []
        way += [f"chosen={settings['chosen']}"] if "chosen" in settings else []
        way += [f"l2={settings['l2']:g}"] if isinstance(settings.get("l2"), float) else []
        way += [f"{settings['fraction']:.0%} of the labels"] if "fraction" in settings else []
        way += [f"{settings['dim']} dims by {settings['reduced_by']}"] if "reduced_by" in settings else []
        name = f"{run.name}/{result['evaluation']}/{result['features']}"
        row = {"id": name, "what": ", ".join(way), "value": round(metrics["top1"], 4), "unit": "top-1"}
        row |= {"low": round(metrics["top1_low"], 4), "high": round(metrics["top1_high"], 4)}
        if "above_best_baseline" in metrics:
            gap = [round(metrics[f"above_best_baseline{end}"], 4) for end in ("", "_low", "_high")]
            row["above_best_baseline"] = f"{gap[0]} [{gap[1]}, {gap[2]}] ({settings['best_baseline']})"
        latest[f"{name} {row['what']}"] = row
    return rows + list(latest.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for run in arguments.runs for row in rows_of(run)]
    tell(rows, arguments.json)


if __name__ == "__main__":
    main()
