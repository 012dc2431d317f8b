"""Views of a whole batch: on a device, and as somebody else's program holds it, `Views("simclr")(images)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores
from ssl_kit.views.device import apply_device
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import Preset, View, ViewRecipe
from ssl_kit.views.sample import sample


def recipe_of(recipe: ViewRecipe | Preset) -> ViewRecipe:
    """A recipe, or the name of a preset as one."""
    return ViewRecipe(preset=recipe) if isinstance(recipe, str) else recipe


def made_on_device(
    stored: Sequence[Tensor],
    params: Sequence[Tensor],
    views: Sequence[View],
    *,
    cropped: bool = False,
    make: Callable[..., Tensor] = apply_device,
    store: Tensor | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """The views of a batch, on the device where its tensors are.

    Args:
        stored: pixels (B, C, H, W), uint8 or uint16: one tensor for all views, or the first view's and the others', or
            one for each; with `store` its rows (B,).
        params: (B, COLUMNS) of each view.
        views: what they are of.
        cropped: see `apply_device`.
        make: `apply_device`, or what does the same.
        store: (M, H, W, C) uint8 or uint16.
        device: where the tensors are brought first.
    """
    if device is not None:
        stored, params = ([one.to(device, non_blocking=True) for one in tensors] for tensors in (stored, params))
    made = []
    for number, (param, view) in enumerate(zip(params, views, strict=True)):
        images = stored[min(number, len(stored) - 1)]
        if store is not None:
            whole = store.view(torch.int16) if store.dtype == torch.uint16 else store  # torch cannot index uint16
            images = whole.index_select(0, images).view(store.dtype).permute(0, 3, 1, 2)
        made.append(make(images, param, view.size, cropped=cropped))
    return made


class Views:
    """Makes the views of images that are together in one tensor, where they are: on a CPU by threads, else batched.

    What is made is a pure function of (seed, epoch, index), the same on every device to rounding.

    Args:
        recipe: what may happen to an image, or the name of a preset; jitter and blur of images below 96 px are chosen
            as in a run.
        size: (height, width) of a view in pixels, or its side; None = that of the images.
        count: views of each image, 1 to 10; 2 for SimCLR and BYOL, 8 for DINO, 1 for MAE.
        seed: of everything random.
        threads: on a CPU; None = all cores of this process.

    Attributes:
        seen: images so far, which number those that no index is given for; set it to go on after a stop.
    """

    def __init__(
        self,
        recipe: ViewRecipe | Preset = "simclr",
        *,
        size: int | tuple[int, int] | None = None,
        count: int = 2,
        seed: int = 0,
        threads: int | None = None,
    ):
        self.recipe, self.count, self.seed = recipe_of(recipe), count, seed
        self.size = (size, size) if isinstance(size, int) else size
        self.threads = threads or available_cores()
        self.seen = 0
        self._built = functools.cache(self._build)  # what is chosen is said once

    def __call__(self, images: Tensor, *, index: Tensor | np.ndarray | None = None, epoch: int = 0) -> list[Tensor]:
        """The views of some images.

        Args:
            images: (N, C, H, W) uint8 or uint16, on any device.
            index: (N,) the number of each image, from 0; by default they are counted from call to call.
            epoch: in which they are seen.

        Returns:
            `count` tensors (N, C, h, w) float32 in [0, 1], on the device of `images`.

        Raises:
            UserError: another shape or type, or operations that mean nothing for so many channels.
        """
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.uint16):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"images are {got}; wanted uint8 or uint16 (images, channels, height, width)")
        count, channels, height, width = images.shape
        if index is None:
            index = np.arange(self.seen, self.seen + count)
            self.seen += count
        rows = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        if rows.shape != (count,):
            raise UserError(f"index has shape {rows.shape}; wanted a number for each of {count} images")
        views = self._built(self.size or (height, width), channels)
        sides = np.full(count, height), np.full(count, width)
        params = [sample(view, self.seed, epoch, rows, which, *sides) for which, view in enumerate(views)]
        if images.device.type != "cpu":
            return [apply_device(images, param, view.size) for param, view in zip(params, views, strict=True)]
        stored = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
        return [
            torch.from_numpy(apply_host(stored, param, view.size, threads=self.threads))
            for param, view in zip(params, views, strict=True)
        ]

    def _build(self, size: tuple[int, int], channels: int) -> tuple[View, ...]:
        preset: Preset = self.recipe.preset or "simclr"
        return self.recipe.fitted(preset, size, channels).build(size, channels, self.count)
