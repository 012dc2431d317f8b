"""A small run folder as training and evaluation leave it, and a parser of the page made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ssl_kit.report.pictures import draw_map, draw_neighbours, draw_views

HOSTILE = "<script>alert(1)</script>"
SHA = "ab" * 32


class Page(HTMLParser):
    """What a browser would find: ids, tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.tags, self.scripts, self.text = html, [], [], ""
        self._inside: list[str] = []
        self.feed(html)
        self.close()
        self.ids = {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data + " "
        elif self._inside[-1] == "script":
            self.scripts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def record(evaluation: str, features: str, value: float, width: float = 0.01, **settings) -> dict:
    metrics = {"top1": value, "top1_low": value - width, "top1_high": value + width}
    made_by = {"encoder_sha256": SHA, "train": "train", "test": "test"}
    return {"evaluation": evaluation, "features": features, "metrics": metrics, "settings": settings,
            "made_by": made_by, "seconds": 1.0}  # fmt: skip


def write_results(run: Path, records: list[dict]) -> None:
    (run / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def scores(encoder: float = 0.71) -> list[dict]:
    return [
        record("knn", "encoder", encoder, k=20, temperature=0.07, chosen=True, dim=64),
        record("knn", "pixels", 0.38, k=5, temperature=0.07, chosen=True, dim=3072),
        record("knn", "random_init", 0.36, k=5, temperature=0.07, chosen=True, dim=64),
    ]


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """make_run(name, classes=..., info=...): a run folder with every file the report knows."""

    def make(name: str = "run", classes: tuple[str, ...] = ("cat", "dog"), info: dict | None = None) -> Path:
        rng = np.random.default_rng(0)
        run = tmp_path / name
        (run / "pictures").mkdir(parents=True)
        images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(40) % len(classes)
        views = [rng.random((4, 3, 8, 8)) for _ in range(2)]
        draw_views(run / "pictures" / "views.png", list(images[:4]), views)
        found = {key: rng.integers(0, 40, (12, 5)) for key in ("pixels", "encoder")}
        draw_neighbours(run / "pictures", np.arange(12), found, lambda i: images[i], labels, classes)
        draw_map(run / "pictures", rng.normal(size=(40, 2)), labels, classes, lambda i: images[i], np.arange(40))
        rows = ["step,epoch,images,seconds,loss,lr,effective_rank,knn_top1"]
        rows += [f"{i},{i / 50},{i * 10},{i},{5 - i / 100},0.1,{10 + i if i % 10 == 0 else ''}," for i in range(1, 101)]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
        told = {"name": name, "method": "SimCLR", "status": "finished", "chance_loss": 6.2, "epochs": 2,
                "data": {"root": "/data/pets", "images": 500, "skipped": 1}, "seconds": 871.2,
                "verdict": {"state": "learning", "reason": "rank 50"}, "encoder_sha256": SHA}  # fmt: skip
        (run / "run.json").write_text(json.dumps(told | (info or {})))
        (run / "recipe.yaml").write_text("seed: 0\nepochs: 2\n")
        (run / "skipped.csv").write_text("path,reason\nbroken.jpg,0 bytes\n")
        write_results(run, scores())
        return run

    return make
