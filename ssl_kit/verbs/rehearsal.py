"""What is tried before step 1: a step, the encoder saved and read back, where views are made; and compiling."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Choice
from ssl_kit.core.random import Key
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.module import ImageData
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.weights import SENSELESS
from ssl_kit.methods.method import Method
from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.chunked import buffers_kept
from ssl_kit.training.distributed import broadcast, by_itself
from ssl_kit.views.batch import made_on_device
from ssl_kit.views.device import DeviceViews
from ssl_kit.views.recipe import View

if TYPE_CHECKING:
    from ssl_kit.verbs.defaults import ViewSchedule

Place = Literal["host", "device"]
_PLACES: tuple[Place, ...] = ("host", "device")
_TRIED, _TOGETHER = 512, 64  # images that views are tried on, and of them in a batch
_MOST = 1e-3  # difference of a feature after saving and loading, as a share of the largest


def rehearse(learner: Method, view_schedule: ViewSchedule, seed: int, images: int = 2) -> None:
    """One forward and backward pass at the smallest and at the largest view, and a round trip of the encoder.

    On a copy, of noise; the generators are where they were afterwards. Under 0.5 s for a ResNet-18 on two cores.

    Args:
        learner: the method, on the CPU.
        view_schedule: first epoch -> the views from there on.
        seed: of the run.
        images: of its smallest step, two at most: one has no negatives, and may have no statistics.

    Raises:
        UserError: the network cannot take the views, or cannot be saved and loaded.
    """
    state = generators()
    try:
        with by_itself():
            trial = copy.deepcopy(learner).train()
            area = lambda views: math.prod(views[0].size)
            by_area = sorted(view_schedule.values(), key=area)
            for views in {views[0].size: views for views in (by_area[0], by_area[-1])}.values():
                _step(trial, views, seed, images)
            _round_trip(trial.encoder)
    finally:
        set_generators(state)


def _step(trial: Method, views: tuple[View, ...], seed: int, count: int) -> None:
    channels, (height, width) = trial.encoder.channels, views[0].size
    # pixels as stored: some likelihoods take no others
    images = [torch.randint(0, 256, (count, channels, *view.size)) / 255 for view in views]
    try:
        labels = [torch.full((count,), -1)] if trial.uses_labels else []
        trial.loss(images, Key(seed, 0, torch.arange(count)), *labels)["loss"].backward()
        trial.after_step(0.0)
    except UserError:
        raise
    except SENSELESS as error:
        raise UserError(
            f"{type(trial).__name__} with {trial.encoder.name} cannot train on views of {height} x {width} pixels: "
            f"{_first_line(error)}; choose another --image_size, or another --method.encoder.name"
        ) from error
    trial.zero_grad(set_to_none=True)


def _round_trip(encoder: Encoder) -> None:
    encoder.eval()
    images = torch.rand(1, encoder.channels, *encoder.image_size)
    with tempfile.TemporaryDirectory(prefix="ssl_kit-") as place, torch.inference_mode():
        try:
            wanted = encoder(images)
            got = Encoder.load(encoder.save(Path(place) / "encoder"))(images)
        except SENSELESS as error:  # UserError among them: what is wrong with a folder that was just written is ours
            raise UserError(
                f"{encoder.name} could not be kept after training: {_first_line(error)}; choose another "
                "--method.encoder.name"
            ) from error
    difference, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= _MOST * largest:
        raise UserError(
            f"{encoder.name} gives other features after it is saved and loaded: they differ by up to {difference:.3g} "
            f"(largest feature {largest:.3g}); choose another --method.encoder.name"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def choose_place(
    wanted: Literal["auto", "host", "device"], training: Source, views: tuple[View, ...], threads: int, device: str
) -> Choice[Place]:
    """Where views are made: the device makes those of stored images; otherwise the first process tries both."""
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cpu":
        return Choice("host", "no accelerator")
    if training.stack is not None:
        return Choice("device", "an accelerator, and images of one size")
    speeds = broadcast(lambda: [_speed(training, views, threads, device, place) for place in _PLACES])
    told = ", ".join(f"{place} {speed:,.0f}" for place, speed in zip(_PLACES, speeds, strict=True))
    return Choice(_PLACES[int(np.argmax(speeds))], f"tried: {told} images/s; --views_on decides otherwise")


def _speed(training: Source, views: tuple[View, ...], threads: int, device: str, place: Place) -> float:
    """Images per second of a few batches, after one that is not counted."""
    count = min(len(training), _TRIED)
    plan = np.array_split(np.arange(count), max(2, count // _TOGETHER))
    make, done, began = DeviceViews(), 0, 0.0
    for batch in ViewLoader(training, plan, views, threads=threads, on_device=place == "device"):
        made = batch["views"]
        if place == "device":
            made = made_on_device(made, batch["params"], views, cropped=batch["cropped"], make=make, device=device)
        made[-1].to(device).sum().item()  # waits for it
        done += len(batch["label"]) if began else 0
        began = began or time.perf_counter()
    return done / (time.perf_counter() - began)


def compile_ahead(data: ImageData, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
    """Forward and backward passes of all shapes that training will have, so that step 1 is a step like the others.

    Nothing is kept of them but the code. Steps in chunks are compiled as they come.
    """
    assert isinstance(learner, Method)
    if data.chunk is not None:
        return
    began, state = time.perf_counter(), generators()
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    with by_itself(), buffers_kept(learner):
        for batch in data.trial(learner.device):
            labels = [batch["label"]] if learner.uses_labels else []
            with trainer.precision_plugin.forward_context():  # views are made outside it
                loss = learner.loss(batch["views"], batch["key"], *labels)["loss"]
            torch.autograd.grad(loss, weights, allow_unused=True)  # not .grad: data-parallel training waits for those
    set_generators(state)
    sizes = " and ".join(str(size) for size in sorted(data.plan.sizes))
    say(f"compiled for steps of {sizes} images in {time.perf_counter() - began:.0f} s")
