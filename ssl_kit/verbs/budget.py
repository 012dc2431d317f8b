"""With `--minutes`: the largest network, and the largest views, that the time pays for.

The ladder is fixed. Images have the side s that they suggest, or s / 2 and s / 4 where that is not under 48 px: smaller
ones would hide what is fine in them. On each stand the method's own network, a narrower one, and that at half of the
resolution. Views grow from half of the side to three quarters of it, which at equal time is worth more than anything
else; the topmost rung has them at full size throughout. The lowest is tried first, then those above, each on throw-away
weights for a few steps, until one promises too little, or a twentieth of the minutes or 20 s are used. Enough are
600,000 images trained on, or 60 epochs where that is less; docs/decisions.md says how that was found. What is typed, or
stands in a recipe, is kept: the ladder has rungs for what is left open only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from ssl_kit.core.console import detail, say
from ssl_kit.core.machine import choose_channels_last, choose_device, choose_precision, choose_threads
from ssl_kit.core.random import Key
from ssl_kit.core.sealed import Entries
from ssl_kit.data.module import views_speed
from ssl_kit.data.sources import Source
from ssl_kit.encoders.vit import unfuse_attention
from ssl_kit.encoders.weights import SENSELESS
from ssl_kit.methods.method import Method
from ssl_kit.training.checkpoint import generators, set_generators
from ssl_kit.training.distributed import broadcast, by_itself, world_size
from ssl_kit.training.duration import PLANNED, Pace
from ssl_kit.verbs.defaults import build_method, default_method, fit_to_data, method_class, view_size
from ssl_kit.views.recipe import View

if TYPE_CHECKING:
    from ssl_kit.verbs.pretrain import Settings

T = TypeVar("T")
_SHARE, _MOST = 0.05, 20.0  # of the time, and seconds: what trying may cost
_IMAGES, _EPOCHS = 600_000, 60  # trained on: the lesser of them is enough
_LONG = 0.25  # hours: what a user wants to know before it begins
_FEW_STEPS = 200  # before, nothing can be told
_DEARER = 6.0  # times the last one, a guess of what the next rung costs
_SMALLER = 0.62  # of the run is made with the smaller views
_LEAST = 48  # pixels of the encoder's images on a lower rung
_LEAST_VIEW = 16  # pixels
_ON_CPU = 32  # images of a step that is tried there: an image takes as long as in a large one
_PASSES = 3  # of a trial, of which the first is not counted
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Rung(NamedTuple):
    """Size of the encoder's images, sides of the views one after the other, and the network; None: not to be chosen."""

    size: tuple[int, int]
    sides: tuple[int, ...] | None
    encoder: tuple[str, Entries] | None

    def applied(self, settings: Settings) -> Settings:
        """The settings with all of it but the views, which need to know the length of the run."""
        if self.encoder is None:
            return replace(settings, image_size=self.size)
        spec = settings.method or default_method()
        arguments = dict(spec.get("init_args") or {})
        own = dict(arguments.get("encoder") or {})
        named = dict(zip(("name", "args"), self.encoder, strict=True))
        own = (
            {**own, "init_args": {**(own.get("init_args") or {}), **named}} if "class_path" in own else {**own, **named}
        )
        return replace(settings, image_size=self.size, method={**spec, "init_args": {**arguments, "encoder": own}})

    def __str__(self) -> str:
        name, args = self.encoder or ("", {})
        width = args.get("embed_dim") or (args.get("channels") or [0])[0]
        network = f"{name}{f' of width {width}' * bool(width)}, " * bool(name)
        views = f", views of {' then '.join(map(str, self.sides))} px" if self.sides else ""
        network = network.replace(",", " at half resolution,", 1) if args.get("stem_stride") == 2 else network
        return f"{network}images of {self.size[0]} x {self.size[1]} px{views}"


def fit_to_time(settings: Settings, training: Source, began: float) -> tuple[Settings, Pace | None]:
    """Batch, length, network and views where they are left open; with `minutes`, as large as those pay for.

    Args:
        settings: of the run. A resumed run keeps what it has chosen.
        training: images that are trained on.
        began: when the command did, by time.perf_counter().

    Returns:
        The settings, what was chosen as if typed; what the steps will cost, for `Duration`.
    """
    open_ended = settings.epochs is None and settings.minutes is None
    settings, count = fit_to_data(settings, len(training), world_size()), len(training) // world_size()  # of a process
    images = settings.contrastive_batch or settings.batch_size
    assert images is not None, "fit_to_data has chosen it"
    if settings.resume or not (open_ended or settings.minutes):
        return settings, None
    if open_ended:
        _say_length(settings, training, images)
        return settings, None
    minutes = settings.minutes or 0.0
    spent = lambda: min(30 * minutes, time.perf_counter() - began)  # seconds, as `Duration` counts them
    steps_per_epoch = -(-count // images)
    rungs = _ladder(settings, view_size(settings.image_size, training))

    climb = lambda: (*_climb(settings, training, rungs, 60 * minutes - spent(), images, count), spent())
    number, sides, seconds, gone = broadcast(lambda: _alone(climb))
    left = 60 * minutes - gone
    settings, pace = _planned(rungs[number].applied(settings), tuple(sides), seconds, images, steps_per_epoch, left)
    steps = pace.steps(PLANNED * left)
    rung = rungs[number]._replace(sides=tuple(sides) or None)
    detail(f"{minutes:g} minutes: {rung}: {steps:,} steps, {steps / steps_per_epoch:.1f} epochs")
    if steps < _FEW_STEPS:
        say(f"{steps:,} steps are too few to learn from: give more --minutes, or a smaller --image-size")
    return settings, pace._replace(spent=gone)


def _say_length(settings: Settings, training: Source, images: int) -> None:
    """How long a run of so many epochs takes here, and how to have a shorter one."""
    size = view_size(settings.image_size, training)
    seconds = broadcast(lambda: step_cost(replace(settings, image_size=size), training, images))
    hours = seconds * len(training) * (settings.epochs or 0) / world_size() / 3600
    told = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.0f} minutes"
    tell = say if hours > _LONG else detail
    tell(f"this takes about {told} here; with --minutes 10, or another time, network and views are chosen to fit it")


def step_cost(settings: Settings, training: Source, images: int) -> float:
    """Seconds an image of a training step of `images` takes here, views included; tried on throw-away weights."""
    return max(_alone(lambda: _cost(settings, training, None, images))[1])


def _planned(
    settings: Settings, sides: tuple[int, ...], seconds: list[float], images: int, steps_per_epoch: int, left: float
) -> tuple[Settings, Pace]:
    """The settings with the epochs from which views have which side; what a step costs from which step on."""
    costs = [images * cost for cost in seconds]
    if sides and not settings.grow:
        steps = PLANNED * left / (_SMALLER * costs[0] + (1 - _SMALLER) * costs[-1])
        epoch = round(_SMALLER * steps / steps_per_epoch)
        first = 0 if epoch else -1  # under two epochs views do not grow
        settings = replace(settings, grow={0: sides[first]} | ({epoch: sides[1]} if epoch and len(sides) > 1 else {}))
        costs = costs if epoch else costs[-1:]
    begins = [epoch * steps_per_epoch for epoch in _sides(settings.grow or {}, settings.size)]
    costs = costs if len(costs) == len(begins) else [max(costs)] * len(begins)  # a network of one size will be refused
    return settings, Pace(dict(zip(begins, costs, strict=True)))


def _sides(grow: dict[int, int], size: tuple[int, int]) -> dict[int, int]:
    """First epoch -> side of the views, in order; until the first that is named they have the size of the images."""
    return dict(sorted(({0: size[0]} | grow).items()))


def _alone(tried: Callable[[], T]) -> T:
    """What a trial gives that the other processes do not make, and that leaves no trace in the random numbers."""
    state = generators()
    try:
        with by_itself():
            return tried()
    finally:
        set_generators(state)


def _ladder(settings: Settings, size: tuple[int, int]) -> list[Rung]:
    """The rungs for what is left open, from the cheapest to the dearest."""
    spec = settings.method or default_method()
    kind = method_class(spec["class_path"])
    encoder = (spec.get("init_args") or {}).get("encoder") or {}
    encoder = encoder.get("init_args") or {} if "class_path" in encoder else encoder
    free = encoder.get("name", "auto") == "auto" and not encoder.get("args") and settings.init is None
    smaller = [(side // 8 * 8, side // 8 * 8) for side in (size[0] // 4, size[0] // 2) if side >= _LEAST]
    sizes = [*(smaller if settings.image_size is None and settings.init is None else ()), size]
    rungs: list[Rung] = []
    for one in sizes:
        for narrow in (2, 1, 0) if free else (0,):
            network = (kind.smaller_encoder(one, narrow) if narrow else kind.default_encoder(one)) if free else None
            rung = Rung(one, tuple(_sides(settings.grow, one).values()) if settings.grow else _growing(one), network)
            rungs += [rung] if rung not in rungs else []
    return [*rungs, rungs[-1]._replace(sides=None)] if rungs[-1].sides and not settings.grow else rungs


def _growing(size: tuple[int, int]) -> tuple[int, ...] | None:
    """Sides of the smaller views, multiples of 8: half, then three quarters."""
    sides = sorted({max(_LEAST_VIEW, side // 8 * 8) for side in (size[0] // 2, size[0] * 3 // 4)})
    return tuple(sides) if size[0] == size[1] and sides[-1] < size[0] else None


def _climb(
    settings: Settings, training: Source, rungs: list[Rung], left: float, images: int, count: int
) -> tuple[int, list[int], list[float]]:
    """(number of the rung that is taken, sides of its views if they are smaller, seconds an image of each)."""
    began, last = time.perf_counter(), 0.0  # seconds of the passes tried last, without what is loaded and compiled once
    enough = min(_IMAGES, _EPOCHS * count)
    found: tuple[int, list[int], list[float]] | None = None
    for number, rung in enumerate(rungs):
        if found is not None and time.perf_counter() - began + _DEARER * last > min(_MOST, _SHARE * left):
            break
        sides, seconds = _cost(rung.applied(settings), training, rung.sides, images)
        last = _PASSES * sum(seconds) * (min(images, _ON_CPU) if choose_device().value == "cpu" else images)
        promised = PLANNED * left / (_SMALLER * seconds[0] + (1 - _SMALLER) * seconds[-1])
        if found is not None and promised < enough:
            break
        found = number, list(sides or ()), seconds
    assert found is not None, "there is a rung at least"
    return found


def _cost(
    settings: Settings, training: Source, sides: tuple[int, ...] | None, images: int
) -> tuple[tuple[int, ...] | None, list[float]]:
    """Sides of the views, none where the method takes no smaller ones, and seconds an image of a step with each."""
    device, grey = choose_device().value, (0.5,) * training.channels
    learner = build_method(settings.method, image_size=settings.size, channels=training.channels, mean=grey, std=grey)
    precision = choose_precision(settings.precision, device).value
    if device == "cpu" and precision == "bfloat16":
        unfuse_attention(learner)
    learner.to(device)
    if choose_channels_last(learner.encoder.model, device).value:
        learner.to(memory_format=torch.channels_last)
    count = min(images, _ON_CPU) if device == "cpu" else images
    learner.prepare(lambda network, most: torch.randn(most or count, network.dim))  # made once: no cost of a step
    recipe = replace(settings.views, preset=settings.views.preset or learner.preset)
    build = lambda side: recipe.build((side, side), training.channels, learner.num_views)
    whole = recipe.build(settings.size, training.channels, learner.num_views)
    threads = settings.threads or choose_threads(device).value
    made = 1 / views_speed(training, whole, threads, device, "host" if device == "cpu" else "device")
    sides = None if learner.encoder.fixed_size else sides
    try:
        schedule = [build(side) for side in sides] if sides else [whole]
        steps = [_step_seconds(learner, views, count, precision, device) / count for views in schedule]
    except SENSELESS:
        if not sides or settings.grow:
            return sides, [1.0] * len(sides or (0,))  # the rehearsal says why it cannot train
        return _cost(settings, training, None, images)
    # both want the cores of a CPU; beside an accelerator they wait for each other only
    return sides, [step + made if device == "cpu" else max(step, made) for step in steps]


def _step_seconds(learner: Method, views: tuple[View, ...], count: int, precision: str, device: str) -> float:
    """Of one forward and backward pass of `count` images, the faster of two after one that is not counted."""
    pixels = [
        torch.randint(0, 256, (count, learner.encoder.channels, *view.size), device=device) / 255 for view in views
    ]
    labels = [torch.full((count,), -1, device=device)] if learner.uses_labels else []
    index, times = torch.arange(count), []
    for _ in range(_PASSES):
        began = time.perf_counter()
        with torch.autocast(device, _DTYPES[precision], enabled=precision != "float32"):
            loss = learner.loss(pixels, Key(0, 0, index), *labels)["loss"]
        loss.backward()
        loss.item()  # waits for the device
        learner.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return min(times[1:])
