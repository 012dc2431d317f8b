"""What a recipe names, built and written back; what it leaves open, chosen from images and machine, with its reason."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning import Trainer

from ssl_kit.core.console import detail, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file, read_json
from ssl_kit.core.machine import (
    Choice,
    available_memory,
    choose_channels_last,
    choose_compile,
    choose_device,
    choose_precision,
    choose_tf32,
    choose_threads,
    compile_blocks,
    size_text,
    use_gpu,
    use_tf32,
)
from ssl_kit.core.options import dashed
from ssl_kit.core.process import on_this_machine
from ssl_kit.core.sealed import Entries
from ssl_kit.data.fingerprint import difference
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.module import ImageData, views_speed
from ssl_kit.data.sources import Source
from ssl_kit.encoders.vit import checkpoint_activations, unfuse_attention
from ssl_kit.encoders.weights import SENSELESS, check_sizes
from ssl_kit.methods.method import Method
from ssl_kit.training.distributed import broadcast, world_size
from ssl_kit.training.duration import Duration, Pace
from ssl_kit.verbs.recipes import SIMCLR, brief, read_recipe, without_places
from ssl_kit.views.recipe import View, ViewRecipe, plain

if TYPE_CHECKING:
    from ssl_kit.verbs.pretrain import Settings

Place = Literal["host", "device"]
_PLACES: tuple[Place, ...] = ("host", "device")
ViewSchedule = dict[int, tuple[View, ...]]  # first epoch -> the views from there on

_MEASURED = 2_048  # images whose statistics stand for all
_LARGEST_DEFAULT, _LARGEST_ON_CPU = 224, 128  # pixels: the default view of larger images
_VIEW_BYTES = 2**28  # of views that are measured together
_BATCH, _FEWEST_STEPS = 256, 8  # default images a step, and fewest steps of an epoch
_EPOCHS, _STEPS = 100, 2_000  # default length: so many epochs, at least so many steps


def view_size(image_size: int | tuple[int, int] | None, source: Source) -> tuple[int, int]:
    """(height, width) of a view: as asked, else the median shorter side of the images, a multiple of 8.

    At most 224, or 128 without an accelerator, where a step of 224 takes three times as long. Above 128 a multiple of
    32, so that patches of 16 and the strides of large networks divide it.
    """
    if image_size is not None:
        asked = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_sizes(asked, source.channels)
        return asked
    rows = np.linspace(0, len(source) - 1, min(256, len(source))).astype(np.int64)
    sizes = source.sizes(rows)
    sides = sizes.min(axis=1)[sizes[:, 0] > 0]
    if not len(sides):
        raise UserError(f"{source.name}: none of {len(rows)} sampled images can be read; see --max-bad")
    side = int(np.median(sides))
    multiple = 8 if side <= 128 else 32
    most = _LARGEST_ON_CPU if choose_device().value == "cpu" else _LARGEST_DEFAULT
    fitting = max(8, round(side / multiple) * multiple)
    why = f"from the images, which have {side}" if fitting <= most else f"of the images' {side}, for this machine"
    side = min(most, fitting)
    detail(f"image size: {side} px ({why}; --image-size changes it)")
    return side, side


def channel_statistics(source: Source, size: tuple[int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of up to 2,048 training images at `size`, in [0, 1]."""
    rows = np.linspace(0, len(source) - 1, min(_MEASURED, len(source))).astype(np.int64)
    together = min(256, max(1, _VIEW_BYTES // (4 * source.channels * math.prod(size))))
    loader = ViewLoader(source, np.array_split(rows, max(1, len(rows) // together)), (plain(size),))
    count, total, squares = 0, np.zeros(source.channels), np.zeros(source.channels)
    for batch in loader:
        pixels = batch["views"][0].double()
        count += pixels.numel() // source.channels
        total += pixels.sum(dim=(0, 2, 3)).numpy()
        squares += pixels.square().sum(dim=(0, 2, 3)).numpy()
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # constant images must not divide by zero
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def schedule_views(
    views: ViewRecipe, size: tuple[int, int], grow: dict[int, int] | None, learner: Method
) -> ViewSchedule:
    """First epoch -> the views of the epochs from there on."""
    build = lambda side: views.build(side, learner.encoder.channels, learner.num_views)
    for side in (grow or {}).values():
        check_sizes((side, side), learner.encoder.channels)
    if grow and learner.encoder.fixed_size:
        raise UserError(f"--grow: {learner.encoder.name} takes images of {size[0]} x {size[1]} only; leave --grow out")
    return {0: build(size)} | {int(epoch): build((side, side)) for epoch, side in (grow or {}).items()}


def fit_to_data(settings: Settings, count: int, processes: int = 1) -> Settings:
    """Chooses the batch size and the length of the run where they are left open, and says so.

    Args:
        settings: of the run.
        count: images that are trained on.
        processes: that share a step.
    """
    count //= processes
    batch_size, epochs = settings.batch_size, settings.epochs
    if batch_size is None:
        # a small set seen in a handful of large batches would hardly move the weights
        fitting = 2 ** int(math.log2(max(2.0, count / _FEWEST_STEPS)))
        batch_size = min(_BATCH, fitting, count)
        detail(f"batch size: {batch_size} ({count:,} images; --batch-size changes it)")
    if epochs is None and settings.minutes is None:
        steps_per_epoch = -(-count // (settings.contrastive_batch or batch_size))
        epochs = max(_EPOCHS, math.ceil(_STEPS / steps_per_epoch))
        detail(f"epochs: {epochs:,} ({epochs * steps_per_epoch:,} steps; --epochs or --minutes changes it)")
    return replace(settings, batch_size=batch_size, epochs=epochs)


class Fitted(NamedTuple):
    """Lightning's accelerator name, one of float32, bfloat16, float16, whether code is compiled, and settings that were
    decided by trying: they go into the recipe as if typed.
    """

    device: str
    precision: str
    compiled: bool
    decided: Entries


def _check_memory(learner: Method, view_schedule: ViewSchedule, images: int, device: str) -> None:
    """Raises `UserError` for a step that cannot fit: what its views take at least, and the first layer on a CPU."""
    precision = 2 if device == "cpu" else 0  # an accelerator has a memory of its own
    needed = images * max(
        sum(learner.encoder.least_bytes(view.size, precision) for view in views) for views in view_schedule.values()
    )
    free = available_memory()
    if needed * on_this_machine() > free:
        raise UserError(
            f"a step of {images:,} images takes more than {size_text(needed)}, and {size_text(free)} are free; choose "
            "a smaller --batch-size or --image-size"
        )


def _say_groups(learner: Method, training: Source) -> None:
    if training.groups() is None:
        return
    name = type(learner).__name__
    if learner.takes_groups:
        say(f"groups: in all views but the first {name} sees another image of the group, which is no negative")
    else:
        say(f"groups: not used by {name}, which learns from each image alone; hold-outs are of whole groups")


def fit_to_machine(
    learner: Method,
    training: Source,
    view_schedule: ViewSchedule,
    settings: Settings,
    images_per_step: int,
    pace: Pace | None = None,
) -> tuple[ImageData, Duration, Fitted]:
    """Chooses what the options leave open, says each choice with its reason, and plans the run."""
    assert settings.batch_size is not None, "fit_to_data has chosen it"
    device, trainer = choose_device(), settings.trainer or {}
    if device.value == "cuda":
        use_gpu(trainer.get("devices"), bool(trainer.get("deterministic")))
    precision = choose_precision(settings.precision, device.value)
    views_on = _place_of_views(settings, training, view_schedule[0], device.value)
    channels_last = choose_channels_last(learner.encoder.model, device.value)
    if channels_last.value:
        learner.to(memory_format=torch.channels_last)
    detail(f"device: {device.value} ({device.reason})")
    detail(f"precision: {precision.value} ({precision.reason})")
    detail(f"memory format: {'channels_last' if channels_last.value else 'contiguous'} ({channels_last.reason})")
    if device.value == "cpu" and precision.value == "bfloat16" and unfuse_attention(learner):
        detail("attention: plain products (torch's fused kernel is slow backwards in bfloat16 on a CPU)")
    if settings.activation_checkpointing:
        checkpoint_activations(learner.encoder)
    detail(f"views on: {views_on.value} ({views_on.reason})")
    loader = ImageData(
        training,
        view_schedule,
        batch_size=settings.batch_size,
        contrastive_batch=settings.contrastive_batch,
        seed=settings.seed,
        threads=settings.threads or choose_threads(device.value).value,
        views_on=views_on.value,
        channels_last=channels_last.value,
        world_size=world_size(),
        images_per_step=images_per_step,
        paired=learner.takes_groups,
    )
    _say_groups(learner, training)
    if views_on.value == "host":
        _check_memory(learner, view_schedule, settings.batch_size, device.value)
    duration = Duration(settings.epochs, settings.minutes, loader.steps_per_epoch / learner.optim.accumulate, pace)
    tf32 = choose_tf32(settings.tf32, device.value)
    use_tf32(tf32.value)
    detail(f"tf32: {'on' if tf32.value else 'off'} ({tf32.reason})")
    code = Choice(False, "diagnose watches every ReLU")
    if not settings.diagnose:
        steps = None if settings.minutes else duration.total
        code = choose_compile(settings.compile, device.value, steps, settings.minutes)
    if code.value:
        compile_blocks(learner.encoder.model)
        loader.expect_compiled()
    detail(f"torch.compile: {'on' if code.value else 'off'} ({code.reason})")
    loader.total_steps = duration.total
    decided: Entries = {}
    if device.value != "cpu":  # there the clock had no say
        decided = {"views_on": views_on.value, "compile": "on" if code.value else "off"}
    return loader, duration, Fitted(device.value, precision.value, code.value, decided)


def _place_of_views(settings: Settings, training: Source, views: tuple[View, ...], device: str) -> Choice[Place]:
    """Where views are made: the device makes those of stored images; otherwise the first process tries both."""
    if settings.views_on != "auto":
        return Choice(settings.views_on, "asked for")
    if device == "cpu":
        return Choice("host", "no accelerator")
    if training.stack is not None:
        return Choice("device", "an accelerator, and images of one size")
    threads = settings.threads or choose_threads(device).value
    speeds = broadcast(lambda: [views_speed(training, views, threads, device, place) for place in _PLACES])
    told = ", ".join(f"{place} {speed:,.0f}" for place, speed in zip(_PLACES, speeds, strict=True))
    return Choice(_PLACES[int(np.argmax(speeds))], f"tried: {told} images/s; --views-on decides otherwise")


_ENCODER = "ssl_kit.encoders.encoder.Encoder"
# what makes a step what it is: a resumed run keeps it
_FIXED = (
    "method",
    "views",
    "grow",
    "image_size",
    "channels",
    "range",
    "limit",
    "freeze",
    "batch_size",
    "contrastive_batch",
    "seed",
)
_WORDS = (str, int, float, bool, type(None))  # what a recipe is written in
_FROM_IMAGES = ("image_size", "channels", "mean", "std")  # encoder arguments that come from the images


def add_recipe_arguments(parser: ArgumentParser, method: str | None, trainer: bool = True) -> None:
    """Adds what a recipe holds beside the verb's own options: the method and the trainer, typed by their classes.

    `method` is the class path that recipes and options name, if any: defaults must be that class's own, because the
    parser keeps what has the same name in another class (SimCLR's learning rate is none for MAE).
    """
    parser.add_subclass_arguments(Method, "method", required=False)
    parser.set_defaults({"method": default_method(method or SIMCLR)})
    if trainer:
        parser.add_class_arguments(Trainer, "trainer", instantiate=False)


def default_method(class_path: str = SIMCLR) -> Entries:
    """A method, SimCLR if no other is named, with everything chosen from the images."""
    return {"class_path": class_path, "init_args": {"encoder": {"class_path": _ENCODER}}}


def build_method(
    spec: Entries | None,
    *,
    image_size: tuple[int, int],
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Method:
    """Checks {class_path, init_args} against the class's signature and builds the method.

    Raises:
        UserError: an unknown class or argument, or a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Method, "method", required=True)
    wanted = {**(spec or default_method())}
    wanted["init_args"] = {"encoder": {"class_path": _ENCODER}, **(wanted.get("init_args") or {})}
    try:
        parsed = parser.parse_object({"method": wanted})
        encoder = parsed.method.init_args.encoder
        if "init_args" not in encoder:
            encoder.init_args = Namespace()
        if encoder.init_args.get("name", "auto") == "auto":
            name, args = method_class(parsed.method.class_path).default_encoder(image_size)
            encoder.init_args.name = name
            encoder.init_args.args = {**args, **(encoder.init_args.get("args") or {})}
        measured = dict(zip(_FROM_IMAGES, (image_size, channels, mean, std), strict=True))
        for key, value in measured.items():
            encoder.init_args[key] = value
        return parser.instantiate(parsed).method
    except (ArgumentError, *SENSELESS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"method: {brief(error)}") from error


def method_class(path: str) -> type[Method]:
    """The class of a path that the parser has accepted: in ssl_kit, or in a module of `--allow`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def resolved_recipe(settings: Settings, method: Method) -> Entries:
    """All settings of a run as one recipe: how it learns, neither where it goes nor what is measured on the images.

    Callbacks and loggers given from Python as objects cannot be written down: a repeated run must be given them again.
    """
    recipe = without_places({key: _plain(value) for key, value in vars(settings).items() if value is not None})
    if _holds_objects(recipe.get("data")):
        del recipe["data"]  # it must be given again
    if "trainer" in recipe:
        recipe["trainer"] = {key: value for key, value in recipe["trainer"].items() if not _holds_objects(value)}
    spec = recipe.setdefault("method", default_method())
    arguments = spec.setdefault("init_args", {})
    encoder = arguments.get("encoder", {})
    encoder_args = {**encoder.get("init_args", {key: value for key, value in encoder.items() if key != "class_path"})}
    for key in _FROM_IMAGES:
        encoder_args.pop(key, None)
    built = {key: value for key, value in method.encoder.args.items() if key != "num_classes"}  # the method sets it
    arguments["encoder"] = {**encoder_args, "name": method.encoder.name, "args": built}
    return recipe


def save_recipe(path: Path, recipe: Entries) -> None:
    """Writes a resolved recipe: `ssl-kit pretrain -c recipe.yaml` repeats the run."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def check_resumable(folder: Path, recipe: Entries, source: Source, processes: int) -> None:
    """Raises `UserError` when a run would go on with other settings or images than it was begun with.

    The batch size may be another where so many `processes` make the same step of it.
    """
    record = read_json(folder / "run.json")
    data, images = record.get("data", {}), len(source)
    if (had := data.get("images", images)) != images:
        raise UserError(f"--resume: the run was begun on {had:,} images, {source.name} has {images:,} now")
    if (began := data.get("reader", "")) != source.reading.reader:
        raise UserError(f"--resume: the images were read by {began or 'no reader of your own'}; give --reader as then")
    if "read" not in data:
        say("the images are compared by their number alone: the run was begun by an earlier version")
    elif (changed := difference(data, source, record.get("seed", recipe["seed"]))) is not None:
        raise UserError(
            f"--resume: {source.name} has changed since the run was begun: {changed}; --overwrite starts anew"
        )
    begun = read_recipe(str(folder / "recipe.yaml"))
    now = yaml.safe_load(yaml.safe_dump(recipe))
    step = "contrastive_batch" if now.get("contrastive_batch") else "batch_size"
    for key in _FIXED:
        same_step = key == step and record.get("images_per_step") == now[step] * processes
        if begun.get(key) != now.get(key) and not same_step:
            raise UserError(
                f"--resume: {key} was {begun.get(key)} and is {now.get(key)} now; "
                f"leave the recipe and {dashed(key)} out to go on with the run's own, or start anew with --overwrite"
            )


def _plain(value: Any) -> Any:
    """Settings as YAML knows them."""
    if hasattr(value, "__dataclass_fields__"):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _holds_objects(value: Any) -> bool:
    """Whether settings hold what YAML has no word for."""
    if isinstance(value, dict):
        return any(map(_holds_objects, value.values()))
    return any(map(_holds_objects, value)) if isinstance(value, list) else not isinstance(value, _WORDS)
