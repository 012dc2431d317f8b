"""`run.json`: what was run, on what, and how it went."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import ssl_kit
from ssl_kit.core.files import read_json, write_json
from ssl_kit.training.monitor import Curves, verdict

FILE = "run.json"
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "faiss-cpu", "numba", "numpy")


class RunRecord:
    """Entries of `run.json`, written whenever one changes; a resumed run keeps those of its first sitting.

    Attributes:
        entries: JSON-able; every key is optional for readers.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Any] = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        started = self.entries.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.update(run=str(folder), name=folder.name, status="starting", command=command(), started=started)

    def update(self, **entries: Any) -> None:
        """Sets entries and writes the file."""
        self.entries |= entries
        write_json(self.folder / FILE, self.entries)

    def progress(self, curves: Curves, dim: int) -> None:
        """Verdict, speed and time from the curves so far."""
        speeds = [row["images_per_second"] for row in curves.history if "images_per_second" in row]
        waiting = [row["waiting_share"] for row in curves.history if "waiting_share" in row]
        self.update(
            verdict=verdict(curves, dim, self.entries.get("chance_loss")),
            epochs=curves.row["epoch"],
            steps=curves.row["step"],
            seconds=curves.row["seconds"],
            images_per_second=float(np.median(speeds)),
            waiting_share=float(np.mean(waiting[1:] or waiting)),  # the first interval waits for the first batch
        )

    def provenance(self) -> dict[str, Any]:
        """What made the encoder, for its folder."""
        keys = ("run", "command", "method", "data", "versions", "started")
        return {key: self.entries[key] for key in keys if key in self.entries}


def command() -> str:
    """The command line of this process, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def versions() -> dict[str, str | None]:
    """Versions of everything that can move a number, and the git commit when run from a checkout."""
    found: dict[str, str | None] = {"ssl_kit": ssl_kit.__version__, "commit": _commit()}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    root = Path(ssl_kit.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except OSError:  # no git here
        return None
    return asked.stdout.strip() or None
