"""The first minutes of a new user: commands and minutes to the first picture, the first score and the first search.

    python benchmarks/first_minutes.py data/photos --json first.json
    python benchmarks/first_minutes.py data/photos data/cifar10 --minutes 5    # a train/ and test/ pair is scored too

Everything runs as a user would type it, in an empty folder, with nothing but the options named in the rows. The clock
starts with the first command. The first picture is `report.html`, when it has the views of images in it: it is looked
for every 0.2 s. The first score of images without labels is the verdict (effective rank, loss against chance); of a
folder with train/ and test/, the table of `evaluate`. Network access is not needed; installing is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PICTURE = b"data:image/"


class Clock:
    """Commands of one user; `elapsed` since the first one, in minutes."""

    def __init__(self, folder: Path):
        self.folder, self.commands, self.began = folder, 0, time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def elapsed(self) -> float:
        return (time.perf_counter() - self.began) / 60

    def run(self, *words: str) -> None:
        """One command, as `ssl-kit WORDS`."""
        self.commands += 1
        print(f"$ ssl-kit {shlex.join(words)}", flush=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-m", "ssl_kit", *words], cwd=self.folder, check=True, env=environment)

    def note(self, name: str, what: str) -> None:
        """A row for what is there now."""
        self.rows.append({"id": name, "what": what, "commands": self.commands, "minutes": round(self.elapsed(), 2)})
        print(self.rows[-1], flush=True)

    def watch(self, page: Path, name: str) -> threading.Thread:
        """Notes the moment at which a page has a picture."""

        def look() -> None:
            while not (page.is_file() and PICTURE in page.read_bytes()):
                time.sleep(0.2)
            self.note(name, "report.html with images and their views")

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        return thread


def first_minutes(data: Path, minutes: float, folder: Path) -> list[dict[str, Any]]:
    """The rows of one folder of images."""
    labelled = (data / "train").is_dir()
    images, name = (data / "train" if labelled else data), f"first/{data.name}"
    (folder / "images").symlink_to(images.resolve())
    query = next(path for path in sorted((folder / "images").rglob("*")) if path.is_file())
    clock = Clock(folder)
    looking = clock.watch(folder / "runs" / "images" / "report.html", f"{name}/picture")
    clock.run("pretrain", "images", "--minutes", f"{minutes:g}")
    looking.join(timeout=10)
    verdict = json.loads((folder / "runs" / "images" / "run.json").read_text())["verdict"]
    clock.note(f"{name}/verdict", f"verdict after {minutes:g} minutes of training: {verdict['state']}")
    clock.run("embed", "runs/images", "images", "--out", "emb")
    clock.run("search", "emb", str(query.relative_to(folder)), "--html", "found.html")
    clock.note(f"{name}/search", "found.html with the 12 nearest images")
    if labelled:
        (folder / "labelled").symlink_to(data.resolve())
        clock.run("evaluate", "runs/images", "labelled")
        clock.note(f"{name}/score", "kNN and linear probe beside pixels, PCA and the network untrained")
    return clock.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for data in arguments.data:
        with tempfile.TemporaryDirectory() as folder:
            rows += first_minutes(data, arguments.minutes, Path(folder))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
