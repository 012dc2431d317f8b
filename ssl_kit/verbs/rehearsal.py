"""What a run will need, tried before anything is removed or trained: a step, and the encoder saved and read back."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.weights import SENSELESS
from ssl_kit.methods.method import Method
from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.distributed import by_itself
from ssl_kit.views.recipe import View

if TYPE_CHECKING:
    from ssl_kit.verbs.defaults import ViewSchedule

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
            f"{_first_line(error)}; choose another --image-size, or another --method.encoder.name"
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
