"""What a recipe leaves open, chosen from the images and the machine; every choice is said with its reason."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ssl_kit.core.console import say
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import (
    Choice,
    choose_channels_last,
    choose_compile,
    choose_device,
    choose_precision,
    choose_tf32,
    choose_threads,
    compile_blocks,
    use_tf32,
)
from ssl_kit.core.processes import on_this_machine
from ssl_kit.data.batches import ViewLoader
from ssl_kit.data.decode import BadImageError
from ssl_kit.data.loading import available_memory, size_text
from ssl_kit.data.module import ImageData
from ssl_kit.data.sources import Source
from ssl_kit.encoders.stored import check_sizes
from ssl_kit.encoders.vit import unfuse_attention
from ssl_kit.methods.method import Method
from ssl_kit.training.distributed import world_size
from ssl_kit.training.horizon import Horizon
from ssl_kit.views.recipe import View, ViewRecipe, plain

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
    sides = [min(source.size(int(row))) for row in rows if _readable(source, int(row))]
    if not sides:
        raise UserError(f"{source.name}: none of {len(rows)} sampled images can be read; see --max-bad")
    side = int(np.median(sides))
    multiple = 8 if side <= 128 else 32
    most = _LARGEST_ON_CPU if choose_device().value == "cpu" else _LARGEST_DEFAULT
    fitting = max(8, round(side / multiple) * multiple)
    why = f"from the images, which have {side}" if fitting <= most else f"of the images' {side}, for this machine"
    side = min(most, fitting)
    say(f"image size: {side} px ({why}; --image_size changes it)")
    return side, side


def _readable(source: Source, row: int) -> bool:
    try:
        source.size(row)
    except BadImageError as error:
        source.skip(row, str(error))
        return False
    return True


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


def view_schedule(
    views: ViewRecipe, size: tuple[int, int], grow: dict[int, int] | None, learner: Method
) -> dict[int, tuple[View, ...]]:
    """First epoch -> the views of the epochs from there on."""
    build = lambda side: views.build(side, learner.encoder.channels, learner.num_views)
    for side in (grow or {}).values():
        check_sizes((side, side), learner.encoder.channels)
    if grow and learner.encoder.fixed_size:
        raise UserError(f"--grow: {learner.encoder.name} takes images of {size[0]} x {size[1]} only; leave --grow out")
    return {0: build(size)} | {int(epoch): build((side, side)) for epoch, side in (grow or {}).items()}


def fit_to_data(settings: dict[str, Any], count: int, processes: int = 1) -> None:
    """Chooses the batch size and the length of the run where they are left open, and says so.

    Args:
        settings: of the run.
        count: images that are trained on.
        processes: that share a step.
    """
    count //= processes
    if settings["batch_size"] is None:
        # a small set seen in a handful of large batches would hardly move the weights
        fitting = 2 ** int(math.log2(max(2.0, count / _FEWEST_STEPS)))
        settings["batch_size"] = min(_BATCH, fitting, count)
        say(f"batch size: {settings['batch_size']} ({count:,} images; --batch_size changes it)")
    if settings["epochs"] is None and settings["minutes"] is None:
        steps_per_epoch = -(-count // (settings["contrastive_batch"] or settings["batch_size"]))
        settings["epochs"] = max(_EPOCHS, math.ceil(_STEPS / steps_per_epoch))
        say(
            f"epochs: {settings['epochs']:,} ({settings['epochs'] * steps_per_epoch:,} steps; --epochs or --minutes "
            "changes it)"
        )


class Fitted(NamedTuple):
    """Lightning's accelerator name and one of float32, bfloat16, float16."""

    device: str
    precision: str


def _check_memory(learner: Method, kinds: dict[int, tuple[View, ...]], images: int, device: str) -> None:
    """Raises `UserError` for a step that cannot fit: what its views take at least, and the first layer on a CPU."""
    precision = 2 if device == "cpu" else 0  # an accelerator has a memory of its own
    needed = images * max(
        sum(learner.encoder.least_bytes(view.size, precision) for view in views) for views in kinds.values()
    )
    free = available_memory()
    if needed * on_this_machine() > free:
        raise UserError(
            f"a step of {images:,} images takes more than {size_text(needed)}, and {size_text(free)} are free; choose "
            "a smaller --batch_size or --image_size"
        )


def fit_to_machine(
    learner: Method,
    training: Source,
    kinds: dict[int, tuple[View, ...]],
    settings: dict[str, Any],
    images_per_step: int,
) -> tuple[ImageData, Horizon, Fitted]:
    """Chooses what the options leave open, says each choice with its reason, and plans the run."""
    device = choose_device()
    precision = choose_precision(settings["precision"], device.value)
    views_on, reason = settings["views_on"], "asked for"
    if views_on == "auto":
        # the device executor needs stored images of one size, and is slower than the host's on a CPU
        suits = device.value != "cpu" and isinstance(training.images, np.ndarray)
        views_on = "device" if suits else "host"
        reason = "an accelerator and images of one size" if suits else "no accelerator, or images not in memory as one"
    elif views_on == "device" and not isinstance(training.images, np.ndarray):
        raise UserError("--views_on device needs images of one size that fit into memory; use --views_on host")
    channels_last = choose_channels_last(learner.encoder.model, device.value)
    if channels_last.value:
        learner.to(memory_format=torch.channels_last)
    say(f"device: {device.value} ({device.reason})")
    say(f"precision: {precision.value} ({precision.reason})")
    say(f"memory format: {'channels_last' if channels_last.value else 'contiguous'} ({channels_last.reason})")
    if device.value == "cpu" and precision.value == "bfloat16" and unfuse_attention(learner):
        say("attention: plain products (torch's fused kernel is slow backwards in bfloat16 on a CPU)")
    say(f"views on: {views_on} ({reason})")
    threads = settings["threads"] or choose_threads(device.value).value
    loader = ImageData(
        training,
        kinds,
        batch_size=settings["batch_size"],
        contrastive_batch=settings["contrastive_batch"],
        seed=settings["seed"],
        threads=threads,
        views_on=views_on,
        channels_last=channels_last.value,
        world_size=world_size(),
        images_per_step=images_per_step,
    )
    if views_on == "host":
        _check_memory(learner, kinds, settings["batch_size"], device.value)
    horizon = Horizon(settings["epochs"], settings["minutes"], loader.steps_per_epoch / learner.optim.accumulate)
    tf32 = choose_tf32(settings["tf32"], device.value)
    use_tf32(tf32.value)
    say(f"tf32: {'on' if tf32.value else 'off'} ({tf32.reason})")
    blocks = choose_compile(settings["compile"], device.value, None if settings["minutes"] else horizon.total)
    if settings["diagnose"]:
        blocks = Choice(False, "diagnose watches every ReLU")
    if blocks.value:
        compile_blocks(learner.encoder.model)
    say(f"torch.compile: {'on' if blocks.value else 'off'} ({blocks.reason})")
    loader.total_steps = horizon.total
    return loader, horizon, Fitted(device.value, precision.value)
