"""What is looked at while a run goes on: features of clean images, and what follows from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl

from ssl_kit.core.console import say
from ssl_kit.data.labels import stratified
from ssl_kit.data.sources import Source
from ssl_kit.embeddings import embed
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.methods.method import Method
from ssl_kit.report.report import write_report
from ssl_kit.training.checkpoint import Checkpoints
from ssl_kit.training.monitor import Curves, feature_health
from ssl_kit.verbs.record import RunRecord
from ssl_kit.views.recipe import View

_MEASURED = 2_048  # images whose rank is followed
_GALLERY = 10_000  # labelled images that vote in the monitor's kNN, at most
_QUERIES = 2_000  # labelled images held out for the monitor's kNN, at most
_HELD_OUT = 0.05  # of the labelled images, at most


def hold_out(source: Source) -> tuple[Source, Source | None, Source | None]:
    """(training images, kNN gallery, kNN queries); the queries are labelled images that are never trained on."""
    labelled = source.labels >= 0
    if len(source.classes) < 2 or labelled.sum() < 100:
        return source, None, None
    fraction = min(_HELD_OUT, _QUERIES / labelled.sum())
    held = np.zeros(len(source), bool)
    held[labelled] = stratified(source.labels[labelled], fraction)
    if held.sum() < 2:  # a few images of each of many classes
        return source, None, None
    rest = np.flatnonzero(labelled & ~held)
    gallery = rest[np.linspace(0, len(rest) - 1, min(_GALLERY, len(rest))).astype(np.int64)]
    say(
        f"labels found: kNN is followed on {held.sum():,} images held out of training; labels are used for nothing else"
    )
    return source.subset(~held), source.subset(gallery), source.subset(held)


class Measure:
    """Features of fixed clean images: rank and spread always, kNN of held-out images when there are labels."""

    def __init__(self, training: Source, gallery: Source | None, queries: Source | None, view: View):
        self.images = training.subset(np.linspace(0, len(training) - 1, min(_MEASURED, len(training))).astype(np.int64))
        self.gallery, self.queries, self.view = gallery, queries, view

    def __call__(self, method: pl.LightningModule) -> dict[str, float]:
        """The scores of the encoder as it is now."""
        assert isinstance(method, Method)
        encoder = method.encoder
        scores = feature_health(embed(encoder, self.images, view=self.view, label="rank").vectors)
        if self.gallery is not None and self.queries is not None:
            known = embed(encoder, self.gallery, view=self.view, label="kNN gallery")
            asked = embed(encoder, self.queries, view=self.view, label="kNN queries")
            scores["knn_top1"] = float(knn_accuracy(known.vectors, known.labels, asked.vectors, asked.labels))
        return scores


class Refresh(pl.Callback):
    """After each measurement: run.json, the report, and the best checkpoint by kNN."""

    def __init__(self, record: RunRecord, curves: Curves, checkpoints: Checkpoints):
        self.record, self.curves, self.checkpoints = record, curves, checkpoints
        self.best = -1.0
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rows of an earlier sitting were looked at then."""
        self._seen = len(self.curves.history)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts when the curves have a new measurement."""
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last measurement is made when training ends."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(self.curves.history) == self._seen or not self.curves.history:
            return
        self._seen = len(self.curves.history)
        row = self.curves.history[-1]
        if "effective_rank" not in row:
            return
        assert isinstance(pl_module, Method)
        self.record.progress(self.curves, pl_module.encoder.dim)
        write_report([self.record.folder], self.record.folder / "report.html")
        if row.get("knn_top1", -1.0) > self.best:
            self.best = row["knn_top1"]
            self.checkpoints.save_best(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best kNN so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with it."""
        self.best = state_dict["best"]
