"""What a run folder of the tests is filled with, and a parser of the page made from it."""

from __future__ import annotations

import json
from dataclasses import astuple, fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from ssl_kit.core.files import write_csv, write_json
from ssl_kit.evaluation.metrics import ClassScore, class_scores, roc_curves
from ssl_kit.report.pictures import (
    KINDS,
    Look,
    Prototype,
    draw_duplicates,
    draw_looks,
    draw_map,
    draw_neighbours,
    draw_views,
    draw_wrong,
)

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


def more_scores() -> list[dict]:
    """What few_shot, curve and robustness leave."""
    found = []
    for features, gain in (("encoder", 0.2), ("random_init", 0.0), ("pixels", 0.05)):
        for protocol in ("linear probe", "nearest class mean"):
            sizes = [{"shots": shots} for shots in (1, 5, 50)] + [{"fraction": 0.01}]
            found += [
                record("few_shot", features, 0.2 + gain + place / 20, protocol=protocol, draws=5, dim=64, **size)
                for place, size in enumerate(sizes)
            ]
    for features, ways in (("encoder", ("pca", "random")), ("pca", ("pca",))):
        for way in ways:
            found += [
                record(
                    evaluation, features, 0.3 + dim / 200, dim=dim, reduced_by=way, bytes_per_million_images=4e6 * dim
                )
                for dim in (2, 8, 32)
                for evaluation in ("knn", "linear")
            ]
    found += [record("linear", "encoder", 0.75, dim=64), record("linear", "pca", 0.5, dim=64)]
    for features, base in (("encoder", 0.6), ("random_init", 0.3)):
        one = record("robustness", features, base, k=20, temperature=0.07, dim=64)
        for name in ("clean", "noise", "noise_1", "noise_2", "noise_3", "jpeg", "jpeg_1", "jpeg_2", "jpeg_3"):
            one["metrics"] |= {name: base, f"{name}_low": base - 0.01, f"{name}_high": base + 0.01}
        found.append(one)
    details = record("details", "encoder", 0.7)
    details["metrics"] = {"lowest_recall": 0.5, "suspected_train": 0.01, "suspected_test": 0.02}
    return [*found, details]


def write_details(run: Path, classes: tuple[str, ...], images: np.ndarray) -> None:
    """RUN/details and the pictures that evaluate --only details,looks and duplicates leave."""
    rng, classes = np.random.default_rng(1), tuple(name.encode("utf-8", "replace").decode() for name in classes)
    labels = np.arange(60) % len(classes)
    logits = rng.normal(size=(60, len(classes))) + np.eye(len(classes))[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (labels, predicted), 1)
    write_csv(run / "details" / "confusion.csv", ["label", *classes],
              ([name, *row] for name, row in zip(classes, counts, strict=True)))  # fmt: skip
    write_csv(run / "details" / "classes.csv", [field.name for field in fields(ClassScore)],
              map(astuple, class_scores(counts, classes)))  # fmt: skip
    write_json(run / "details" / "roc.json", roc_curves(labels, probabilities).record(classes))
    wrong = np.flatnonzero(predicted != labels)[:8]
    draw_wrong(run / "pictures", [images[row % 40] for row in wrong], wrong, labels[wrong], predicted[wrong],
               probabilities.max(axis=1)[wrong], classes)  # fmt: skip
    numbers = {"low": 0, "high": 0.5, "rows": 4, "columns": 4, "even": 1 / 16, "miss": 0.001}
    notes = [classes[row % len(classes)] for row in range(8)]
    looks = [Look(kind, images[:8], notes if kind in ("image", "neighbour") else [""] * 8, numbers) for kind in KINDS]
    examples = [Prototype(name, images[0], classes[0], images[1], (0.9, 0.4)) for name in classes]
    draw_looks(run / "pictures", looks, examples)
    draw_duplicates(run / "pictures", [["a.jpg", "b.jpg"]], [("c.jpg", 0.7)], lambda name: images[ord(name[0]) % 40],
                    num_images=500, num_groups=3, superfluous=4)  # fmt: skip


def write_run(run: Path, classes: tuple[str, ...] = ("cat", "dog"), info: dict | None = None) -> Path:
    """A run folder with every file the report knows; without classes, those that need no label."""
    rng = np.random.default_rng(0)
    (run / "pictures").mkdir(parents=True)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40) % len(classes) if classes else np.full(40, -1)
    views = [rng.random((4, 3, 8, 8)) for _ in range(2)]
    draw_views(run / "pictures" / "views.png", list(images[:4]), views)
    found = {key: rng.integers(0, 40, (12, 5)) for key in ("pixels", "encoder")}
    draw_neighbours(run / "pictures", np.arange(12), found, lambda i: images[i], labels, classes)
    draw_map(run / "pictures", rng.normal(size=(40, 2)), labels, classes, lambda i: images[i], np.arange(40))
    rows = ["step,epoch,images,seconds,loss,lr,effective_rank,knn_top1"]
    rows += [f"{i},{i / 50},{i * 10},{i},{5 - i / 100},0.1,{10 + i if i % 10 == 0 else ''}," for i in range(1, 101)]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    told = {"name": run.name, "method": "SimCLR", "status": "finished", "chance_loss": 6.2, "epochs": 2,
            "data": {"root": "/data/pets", "images": 500, "skipped": 1}, "seconds": 871.2,
            "verdict": {"state": "learning", "reason": "rank 50"}, "encoder_sha256": SHA}  # fmt: skip
    (run / "run.json").write_text(json.dumps(told | (info or {})))
    (run / "recipe.yaml").write_text("seed: 0\nepochs: 2\n")
    (run / "skipped.csv").write_text("path,reason\nbroken.jpg,0 bytes\n")
    if classes:
        write_results(run, [*scores(), *more_scores()])
        write_details(run, classes, images)
    return run
