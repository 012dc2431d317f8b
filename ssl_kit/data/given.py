"""Sources of what a Python program holds: arrays, lists of images or paths, data sets of torch and Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import Reading
from ssl_kit.data import ranges
from ssl_kit.data.decode import of_pillow
from ssl_kit.data.labels import encode
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import Skipped, escape_path
from ssl_kit.data.samples import Samples, of_array, pixels_of
from ssl_kit.data.sources import Listed


def of_arrays(
    images: np.ndarray, names: np.ndarray | None, reading: Reading, name: str, measure: bool = False
) -> Listed:
    """Arrays as a source.

    Args:
        images: (N, H, W) or (N, H, W, C), of integers up to 32 bits or floats.
        names: (N,) a label each, if they are known.
        reading: which channels and values of them are taken.
        name: for messages.
        measure: find the range of the values.

    Raises:
        UserError: other shapes or types, other channels than are wanted, or values without a range.
    """
    if images.ndim not in (3, 4):
        raise UserError(f"{name}: got {images.dtype} of shape {images.shape}; wanted (N, H, W) or (N, H, W, C)")
    if names is not None and names.shape != (len(images),):
        raise UserError(f"{name}: {len(images):,} images but labels of shape {names.shape}; wanted one label per image")
    images = images[..., None] if images.ndim == 3 else images
    ids = numbers(len(images))
    labels, classes = encode([None] * len(images) if names is None else names.tolist(), name)
    try:
        if measure:
            reading = ranges.of_images(name, (_samples(images[row]) for row in ranges.spread(len(images))), reading)
        count, height, width = images.shape[:3]
        if count:
            tall = pixels_of(_samples(images.reshape(count * height, width, -1)), reading)
            images = tall.reshape(count, height, width, -1)
    except BadImageError as error:
        raise UserError(f"{name}: {error}") from error
    return Listed(name, ids, labels, classes, reading, None, Skipped(len(ids), 0.0), np.arange(len(ids)), images)


def joined(sources: Sequence[Listed], max_bad: float) -> Listed:
    """Sources of files as one; ids of several begin with the name of their folder, and equal labels are one class.

    Raises:
        UserError: folders of one name in several places.
    """
    if len(sources) == 1:
        return sources[0]
    roots = [source.root for source in sources]
    assert all(root is not None for root in roots), "sources of files"
    tables = [root for root in roots if roots.count(root) > 1]
    parents = {root if root in tables else root.parent for root in roots if root is not None}
    if len(parents) > 1:
        raise UserError(f"{', '.join(map(str, roots))}: wanted folders that lie in one folder")
    prefix = lambda root: "" if root is None or root in tables else f"{escape_path(root.name)}/"
    ids = [
        f"{prefix(root)}{name}" for source, root in zip(sources, roots, strict=True) if root for name in source.ids()
    ]
    names = [source.classes[label] if label >= 0 else None for source in sources for label in source.labels().tolist()]
    labels, classes = encode(names, sources[0].name, folders=True)
    name = " ".join(source.name for source in sources)
    bad = Skipped(len(ids), max_bad)
    return Listed(name, ids, labels, classes, sources[0].reading, parents.pop(), bad, np.arange(len(ids)))


def pixels_given(image: object, reading: Reading, name: str) -> np.ndarray:
    """(H, W, C) uint8 or uint16 of one image that a program holds: an array, a picture of Pillow, a tensor.

    Args:
        image: (H, W), (H, W, C) or (C, H, W); of Pillow in any mode.
        reading: which channels and values of it are taken.
        name: for messages.

    Raises:
        UserError: it is no image, or not one of such channels and values.
    """
    try:
        if isinstance(image, Image.Image):
            return of_pillow(image, reading)
        return pixels_of(of_array(np.asarray(image)), reading)
    except BadImageError as error:
        raise UserError(f"{name}: {error}") from error


def _samples(image: np.ndarray) -> Samples:
    """(H, W, C): the last axis holds the channels, however many."""
    plain = of_array(image[:, :, 0])
    return replace(plain, values=image, colours=image.shape[2])


def numbers(count: int) -> list[str]:
    """Ids of images that have no names: their numbers, of equal length."""
    width = len(str(max(count - 1, 0)))
    return [f"{row:0{width}d}" for row in range(count)]
