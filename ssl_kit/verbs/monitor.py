"""What is looked at while a run goes on: features of clean images, and what follows from them."""

from __future__ import annotations

import copy
import itertools
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from ssl_kit.core.console import detail
from ssl_kit.core.files import if_room
from ssl_kit.core.machine import cycles_freed, eager
from ssl_kit.data.labels import spread, stratified
from ssl_kit.data.loader import Batch, ViewLoader
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import Wrapped, settled
from ssl_kit.evaluation.features import Pca, Pixels, centre
from ssl_kit.evaluation.health import alignment, uniformity
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.evaluation.retrieval import TwoCrops, crops_top1
from ssl_kit.methods.method import Method
from ssl_kit.report.page import write_report
from ssl_kit.report.pictures import draw_grid
from ssl_kit.training.checkpoint import Checkpoints
from ssl_kit.training.curves import Curves, Judge, feature_health
from ssl_kit.training.distributed import (
    all_gather_object,
    broadcast,
    same_buffers,
    wait,
    world_size,
)
from ssl_kit.training.verdict import verdict
from ssl_kit.verbs.record import RunRecord
from ssl_kit.verbs.several import Share
from ssl_kit.views.recipe import View, plain

Arrays = list[np.ndarray]  # of one score: features, and labels where it needs them

_MEASURED = 2_048  # images whose rank is followed
_PAIRS = 256  # of them, whose two views are compared, and which settle an untrained encoder's batch norms
_GALLERY = 10_000  # labelled images that vote in the monitor's kNN, at most
_QUERIES = 2_000  # labelled images held out for the monitor's kNN, at most
_CROPPED = 512  # images of which one crop looks for the other, at most; held out where that costs 5 % at most
_PIXEL_SIDE = 32  # of the images that raw pixels are compared on, at most
_PCA_ROWS = 2_048  # of the gallery that PCA of the pixels is fitted on: all of them take 3 s more and give 0.006
_PCA_DIM = 128  # at most, otherwise that of the encoder
_SHOWN = 8  # images in the pictures of a method
_HELD_OUT = 0.05  # of the labelled images, at most
_AGAIN = 120  # seconds between two pages at most: one that is older is told from its own clock (report/page.js)


def hold_out(source: Source) -> tuple[Source, Source | None, Source | None]:
    """(training images, kNN gallery, held-out images), said.

    What is held out is never trained on: labelled images, which kNN asks with; without labels some of many images, on
    which crops are compared, and there is no gallery.
    """
    training, gallery, queries = asked_apart(source)
    if queries is not None and gallery is None:
        detail(f"no labels: {len(queries):,} images are held out of training, to see on them what was learnt")
    elif queries is not None:
        detail(
            f"labels found: kNN is followed on {len(queries):,} images held out of training; labels are used for "
            "nothing else"
        )
    return training, gallery, queries


def asked_apart(source: Source) -> tuple[Source, Source | None, Source | None]:
    """(the other images, kNN gallery among them, held-out images) as `hold_out`; groups stay together."""
    labels = source.labels()
    labelled = labels >= 0
    if len(source.classes) < 2 or labelled.sum() < 100:
        return _unlabelled(source)
    fraction = min(_HELD_OUT, _QUERIES / labelled.sum())
    held = np.zeros(len(source), bool)
    groups = source.groups()
    held[labelled] = stratified(labels[labelled], fraction, groups=None if groups is None else groups[labelled])
    if len(np.unique(labels[held])) < 2:  # a few images of each of many classes, or one class alone has more
        return source, None, None
    rest = np.flatnonzero(labelled & ~held)
    gallery = rest[spread(len(rest), _GALLERY)]
    return source.subset(~_kin(held, groups)), source.subset(gallery), source.subset(held)


def _unlabelled(source: Source) -> tuple[Source, None, Source | None]:
    if len(source) * _HELD_OUT < _CROPPED:
        return source, None, None
    held = np.zeros(len(source), bool)
    held[spread(len(source), _CROPPED)] = True
    rest = source.subset(~_kin(held, source.groups()))
    return (rest, None, source.subset(held)) if len(rest) > len(source) / 2 else (source, None, None)  # else few groups


def _kin(held: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """(N,) bool: what is held out, and all that is of a group with it, also without a label."""
    return held if groups is None else held | (np.isin(groups, groups[held]) & (groups >= 0))


def kept(folder: Path) -> str:
    """What a run that was broken off has left, and how to go on."""
    if not (folder / "run.json").is_file():
        return "nothing was trained yet"
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    state = f"step {int(steps[-1].removeprefix('step-')):,} is kept" if steps else "nothing was trained yet"
    return f"{state}; go on with: ssl-kit pretrain --run {shlex.quote(str(folder))} --resume"


class Measure:
    """Features of fixed images: rank, spread, and whether crops of images find each other; kNN where there are labels.

    The first look gives the last two for raw pixels too. It is at a copy of the untrained encoder where one was kept.

    Several processes share the images, each of them once; the scores do not depend on how many they are. All must call
    it.

    Args:
        training: images that are trained on.
        gallery: labelled images that vote, if any.
        queries: images held out of training, if any; labelled where there is a gallery.
        view: of clean images.
        pair: the run's own views, for the alignment where there are two.
        encoder: the `Encoder` (or `Wrapped`) of the method that is looked at; the trained one by default.

    Attributes:
        held_out: images that kNN is measured on.
        cropped: images whose crops look for each other.
        crops_of: which images these are, in words.
        embedded: images that each look embeds, crops included.
    """

    def __init__(
        self,
        training: Source,
        gallery: Source | None,
        queries: Source | None,
        view: View,
        pair: Sequence[View] = (),
        encoder: Callable[[Any], Any] = lambda method: method.encoder,
    ):
        images = training.subset(spread(len(training), _MEASURED))
        self.images, self.view, self.encoder = Share(images), view, encoder
        apart = queries is not None and len(queries) >= _CROPPED
        asked = queries if apart and queries is not None else training
        cropped = asked.subset(spread(len(asked), _CROPPED))
        self.held_out, self.cropped = 0, len(cropped)
        self.crops_of = f"{'held-out' if apart else 'training'} images"
        self.scores: list[Neighbours | Crops] = [Crops(cropped)]
        if gallery is not None and queries is not None:
            self.held_out = len(queries)
            self.scores.append(Neighbours(gallery, queries))
        self.embedded = len(images) + 2 * self.cropped + self.held_out + (0 if gallery is None else len(gallery))
        few = images.subset(np.arange(min(_PAIRS, len(images))))
        rows = [np.arange(len(few))]
        self._untrained: Encoder | None = None
        self._few = lambda: next(iter(ViewLoader(few, rows, (view,))))["views"][0]
        self._contrast = float(self._few().std())
        self._two_views = next(iter(ViewLoader(few, rows, pair)))["views"] if len(pair) == 2 else []

    def keep(self, encoder: Encoder) -> None:
        """Copies the untrained encoder, which the next look is at: it comes after the first step."""
        self._untrained = copy.deepcopy(encoder)

    def __call__(self, method: pl.LightningModule) -> dict[str, float]:
        """The scores of the encoder as it is now, or of the untrained one that was kept."""
        kept, self._untrained = self._untrained, None
        encoder = self.encoder(method) if kept is None else kept.to(method.device)
        same_buffers(encoder)
        with eager(), settled(encoder, self._few):
            vectors, _ = self.images.embedded(encoder, self.view, "rank")
            found = [score.embedded(encoder, self.view) for score in self.scores]
            pixels = self._pixels() if kept is not None or method.global_step == 0 else []
            return broadcast(lambda: self._scores(encoder, vectors, found, pixels))

    def _pixels(self) -> list[Arrays]:
        """Raw pixels in the place of features."""
        shrink = min(1.0, _PIXEL_SIDE / max(self.view.size))
        height, width = (max(1, round(shrink * side)) for side in self.view.size)
        pixels = Pixels((height, width), self.images.source.channels)
        return [score.embedded(pixels, plain(pixels.image_size)) for score in self.scores]

    def _scores(
        self, encoder: Encoder | Wrapped, vectors: np.ndarray, found: list[Arrays], pixels: list[Arrays]
    ) -> dict[str, float]:
        scores = feature_health(vectors) | {"uniformity": uniformity(vectors), "images_std": self._contrast}
        if self._two_views:
            scores["alignment"] = alignment(*(_features(encoder, views) for views in self._two_views))
        for score, features in zip(self.scores, found, strict=True):
            scores |= score.of(features)
        for score, features in zip(self.scores, pixels, strict=bool(pixels)):
            scores |= score.of_pixels(features, encoder.dim)
        return scores


def judge_of(learner: Method, measure: Measure, record: RunRecord) -> Judge:
    """The verdict on the rows so far of a run of `learner` that `measure` looks at; its chance level is in `record`."""
    return lambda rows: verdict(
        rows,
        dim=learner.encoder.dim,
        chance_loss=record.entries.get("chance_loss"),
        chance_margin=learner.chance_margin,
        contrastive=learner.compares_images,
        held_out=measure.held_out,
        cropped=measure.cropped,
        knn_judges=learner.judged_by[0] == "knn",
    )


class Neighbours:
    """kNN of held-out images among labelled ones."""

    def __init__(self, gallery: Source, queries: Source):
        self.shares = Share(gallery), Share(queries)

    def embedded(self, network: Encoder | Wrapped | Pixels, view: View) -> Arrays:
        """Features and labels of the gallery, then of the queries; all processes must ask."""
        gallery, queries = self.shares
        return [*gallery.embedded(network, view, "kNN gallery"), *queries.embedded(network, view, "kNN queries")]

    def of(self, found: Arrays) -> dict[str, float]:
        """Top-1 of the encoder."""
        return {"knn_top1": knn_accuracy(*found)}

    def of_pixels(self, found: Arrays, dim: int) -> dict[str, float]:
        """Top-1 of raw pixels and of their PCA, at the encoder's dimension where that is at most 128."""
        gallery, labels, queries, asked = found
        centre(gallery, queries)
        pca = Pca.of(gallery[spread(len(gallery), _PCA_ROWS)], min(dim, _PCA_DIM))
        reduced = knn_accuracy(pca.apply(gallery), labels, pca.apply(queries), asked)
        return {"knn_pixels": knn_accuracy(*found), "knn_pca": reduced}


class Crops:
    """Whether the left crop of an image finds its right one among those of all images; needs no label.

    The two share half of each. Without that a digit's left says nothing of its right (SimCLR: 0.008 among 512, with it
    0.19; untrained 0.01); with three quarters an untrained ViT finds two thirds.
    """

    def __init__(self, images: Source):
        self.share = Share(images)

    def embedded(self, network: Encoder | Wrapped | Pixels, view: View) -> Arrays:
        """Features of both crops, each of the network's size, in one array; all processes must ask."""
        crops = TwoCrops(network)
        return [self.share.embedded(crops, plain(crops.size), "crops")[0]]

    def of(self, found: Arrays) -> dict[str, float]:
        """Top-1 of the encoder."""
        return {"crops_top1": crops_top1(*found)}

    def of_pixels(self, found: Arrays, dim: int) -> dict[str, float]:
        """Top-1 of raw pixels and of their PCA, fitted on these crops, at the encoder's dimension up to 128."""
        crops = np.concatenate(np.split(found[0], 2, axis=1))
        reduced = Pca.of(crops, min(dim, _PCA_DIM)).apply(crops)
        sides = np.concatenate(np.split(reduced, 2), axis=1)
        return {"crops_pixels": crops_top1(*found), "crops_pca": crops_top1(sides)}


def _features(encoder: Encoder | Wrapped, images: Tensor) -> np.ndarray:
    """(N, D) of a few views, (N, C, h, w)."""
    mode, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    with torch.inference_mode():
        features = encoder(images.to(device)).cpu().numpy()
    encoder.train(mode)
    return features


class Show:
    """Draws what a method shows of itself (reconstructions, samples, ...) from a few fixed images of the run.

    Args:
        folder: of the PNGs, RUN/pictures.
        training: images that are trained on.
        views: that the method takes of each.
        seed: of the run.
    """

    def __init__(self, folder: Path, training: Source, views: Sequence[View], seed: int):
        self.folder, self.training, self.views, self.seed = folder, training, views, seed
        self._batch: Batch | None = None

    def __call__(self, method: Method) -> None:
        """Draws them as the method is now; the method's mode stays as it was."""
        if type(method).pictures is Method.pictures:
            return
        if self._batch is None:
            rows = spread(len(self.training), _SHOWN)
            self._batch = next(iter(ViewLoader(self.training, [rows], self.views, seed=self.seed)))
        views = [view.to(method.device) for view in self._batch["views"]]
        mode = method.training
        method.eval()
        with torch.no_grad(), eager():
            pictures = method.pictures(views, self._batch["key"])
        method.train(mode)
        for name, picture in pictures.items():
            draw_grid(self.folder / f"{name}.png", picture.grid.float().cpu().numpy(), picture.columns, picture.caption)


class Monitor:
    """What is looked at between steps: bad files; and after each measurement run.json, pictures, report, best state.

    The report is also written every two minutes, which costs half a percent: who looks at it sees that the run goes on.

    Bad files that any process has met count for all: each knows the whole list, and all stop when it is too long. A
    process's own are counted at once, those of the others every `interval` steps.

    Args:
        record: of the run.
        curves: whose measurements are acted on.
        checkpoints: that keep the best state by kNN.
        show: draws the method's pictures.
        source: whose images are trained on.
        interval: optimiser steps between exchanges of bad files.
    """

    def __init__(
        self,
        record: RunRecord,
        curves: Curves,
        checkpoints: Checkpoints,
        show: Show,
        source: Source,
        interval: int = 20,
    ):
        self.record, self.curves, self.checkpoints, self.show = record, curves, checkpoints, show
        self.source, self.interval = source, interval
        self.best = -1.0
        self._seen, self._written = 0, time.monotonic()
        self._told = {name for name, _ in source.bad.rows}  # before training all meet the same

    def start(self) -> None:
        """Rows of an earlier sitting were looked at then."""
        self._seen = len(self.curves.history)

    def after_step(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        """Exchanges bad files, where files are decoded during training; acts when there is a new measurement."""
        if not self.source.in_memory and trainer.global_step % self.interval == 0:
            self.exchange()
        self._look(trainer, method)
        if trainer.is_global_zero and time.monotonic() - self._written > _AGAIN:
            with if_room(self.record.folder), cycles_freed():
                self._write()

    def at_end(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        """The last bad files, for skipped.csv; the last measurement is made when training ends."""
        self.exchange()
        self._look(trainer, method)

    def exchange(self) -> None:
        """Tells all processes of the bad files of each."""
        if world_size() == 1:
            return
        bad = self.source.bad
        new = [row for row in bad.rows if row[0] not in self._told]
        for name, reason in itertools.chain(*all_gather_object(new)):
            bad.add(name, reason)
            self._told.add(name)
        bad.check()

    def _look(self, trainer: pl.Trainer, method: pl.LightningModule) -> None:
        if len(self.curves.history) == self._seen or not self.curves.history:
            return
        self._seen = len(self.curves.history)
        row = self.curves.history[-1]
        if "effective_rank" not in row or row["step"] == 0:
            return
        with if_room(self.record.folder), cycles_freed():
            self.record.progress(self.curves)
            if trainer.is_global_zero:
                assert isinstance(method, Method)
                self.show(method)
                self._write()
        wait()
        if row.get("knn_top1", -1.0) > self.best:
            self.best = row["knn_top1"]
            self.checkpoints.save_best(trainer)

    def _write(self) -> None:
        write_report([self.record.folder], self.record.folder / "report.html")
        self._written = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        """The best kNN so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continues with it."""
        self.best = state_dict["best"]
