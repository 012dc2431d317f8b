"""Sources of what a Python program holds: arrays, lists of images or paths, data sets of torch and Hugging Face."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

from ssl_kit.core.console import detail, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import fits_in_memory
from ssl_kit.core.reading import ANY, Reading
from ssl_kit.data import ranges
from ssl_kit.data.decode import of_pillow
from ssl_kit.data.labels import encode
from ssl_kit.data.limits import BadImageError, short
from ssl_kit.data.listing import Ids, Skipped, escape_path
from ssl_kit.data.samples import Samples, of_array, pixels_of
from ssl_kit.data.sources import Listed

Labels: TypeAlias = Sequence[object] | np.ndarray


class Items(Protocol):
    """A list of images or a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


def of_arrays(images: np.ndarray, names: Labels | None, reading: Reading, name: str, measure: bool = False) -> Listed:
    """Arrays as a source.

    Args:
        images: (N, H, W), (N, H, W, C) or, where the channels can only be the first, (N, C, H, W); of integers up to 32
            bits or floats.
        names: (N,) a label each, if they are known.
        reading: which channels and values of them are taken.
        name: for messages.
        measure: find the range of the values.

    Raises:
        UserError: other shapes or types, other channels than are wanted, or values without a range.
    """
    if images.ndim not in (3, 4):
        raise UserError(f"{name}: got {images.dtype} of shape {images.shape}; wanted (N, H, W) or (N, H, W, C)")
    if names is not None and (len(names) != len(images) or getattr(names, "ndim", 1) != 1):
        shape = getattr(names, "shape", len(names))
        raise UserError(f"{name}: {len(images):,} images but labels of shape {shape}; wanted one label per image")
    given, images = images.shape, channels_last(images, reading.channels)
    ids = numbers(len(images))
    labels, classes = encode([None] * len(images) if names is None else list(names), name)
    try:
        looked = (_samples(images[row]) for row in ranges.spread(len(images)))
        if measure:
            reading = ranges.of_images(name, looked, reading)
        elif images.dtype != np.uint8 and ANY not in reading.ranges:
            ranges.check_images(name, looked, reading)
        count, height, width = images.shape[:3]
        if count:
            tall = pixels_of(_samples(images.reshape(count * height, width, -1)), reading)
            images = tall.reshape(count, height, width, -1)
    except BadImageError as error:
        odd = images.shape[3] not in (1, 3, 4, reading.channels)
        wanted = f"; wanted (N, H, W, C), or (N, C, H, W) of {reading.channels} channels" if odd else ""
        raise UserError(f"{name} of shape {given}: {error}{wanted}") from error
    return Listed(name, Ids(ids), labels, classes, reading, None, Skipped(len(ids), 0.0), np.arange(len(ids)), images)


def channels_last(images: np.ndarray, channels: int, torch: bool = False) -> np.ndarray:
    """(N, H, W, C) of (N, H, W), (N, H, W, C) or (N, C, H, W): as many as are wanted can be channels, 1 for 3, 3 for 1.

    Where both can be, or neither, the order is numpy's, or that of `torch`; the other one is said.
    """
    if images.ndim != 4:
        return images[..., None] if images.ndim == 3 else images
    usual = (1, 3) if channels in (1, 3) else (channels,)
    first, last = images.shape[1] in usual, images.shape[3] in usual
    leading = torch if first == last else first
    if leading != torch:
        say(f"images of shape {images.shape} are read as {'(N, C, H, W)' if leading else '(N, H, W, C)'}")
    return images.transpose(0, 2, 3, 1) if leading else images


def joined(sources: Sequence[Listed], max_bad: float) -> Listed:
    """Sources of files as one; ids of several begin with the name of their folder, and equal labels are one class.

    Raises:
        UserError: two folders of one name.
    """
    if len(sources) == 1:
        return sources[0]
    roots = [source.root for source in sources if source.root is not None]
    assert len(roots) == len(sources), "sources of files"
    together = len(set(roots)) == 1  # tables in one folder
    prefixes = ["" if together else f"{escape_path(root.name)}/" for root in roots]
    if not together and len(set(prefixes)) < len(roots):
        twice = Counter(prefixes).most_common(1)[0][0]
        raise UserError(f"{', '.join(map(str, roots))}: two of them are called {twice[:-1]!r}; wanted different names")
    parents = {root.parent for root in roots}
    folders = None if together or len(parents) == 1 else {escape_path(root.name): root for root in roots}
    root = roots[0] if together else Path(os.path.commonpath([root.resolve() for root in roots]))
    root = parents.pop() if not together and folders is None else root
    ids = [f"{prefix}{name}" for source, prefix in zip(sources, prefixes, strict=True) for name in source.ids()]
    names = [source.classes[label] if label >= 0 else None for source in sources for label in source.labels().tolist()]
    labels, classes = encode(names, sources[0].name, folders=True)
    name = " ".join(source.name for source in sources)
    bad, rows = Skipped(len(ids), max_bad), np.arange(len(ids))
    groups = _groups_of_all(sources)
    return Listed(name, Ids(ids), labels, classes, sources[0].reading, root, bad, rows, None, folders, groups)


def _groups_of_all(sources: Sequence[Listed]) -> np.ndarray | None:
    """(N,) int64 groups of the images of several sources, none of which lies in two; None where none has any."""
    found, first = list[np.ndarray](), 0
    for source in sources:
        groups = source.groups()
        groups = np.full(len(source), -1, np.int64) if groups is None else groups
        found.append(np.where(groups >= 0, groups + first, -1))
        first += int(groups.max(initial=-1)) + 1
    return np.concatenate(found) if first else None


def of_python(data: Any, reading: Reading, measure: bool, max_bad: float) -> Listed:
    """What a Python program holds as a source.

    Args:
        data: images as an array, a tensor (N, C, H, W), or a list of files, arrays or pictures of Pillow; a pair of
            these and of labels; a map-style data set of torch (items are images or pairs) or of Hugging Face.
        reading: which channels and values of them are taken.
        measure: find the range of the values; of what is in memory only.
        max_bad: fraction of files in [0, 1] that may be undecodable.

    Raises:
        UserError: nothing of these, or images of other shapes, channels or values than are wanted.
    """
    images, labels = _pair(data)
    if hasattr(images, "iloc") and images.ndim == 1:  # a column of a table
        images = images.tolist()
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(images):,} images but {len(labels):,} labels; wanted one label per image")
    if _is_tensor(images):
        images = as_array(images)
        images = channels_last(images, reading.channels, torch=True)
    if isinstance(images, np.ndarray):
        return of_arrays(images, labels, reading, "arrays", measure)
    if isinstance(images, list | tuple) and images and all(isinstance(one, str | Path) for one in images):
        return _of_files(list(map(Path, images)), labels, reading, max_bad)
    if isinstance(images, Mapping) or hasattr(images, "iloc"):
        columns = f" of the columns {list(images)[:9]}" if hasattr(images, "iloc") else ""
        raise UserError(
            f"got a {type(images).__name__}{columns}; wanted images, a .csv or .parquet with a column of paths, or "
            "(paths, labels), such as (table['path'], table['label'])"
        )
    if not hasattr(images, "__getitem__") or not hasattr(images, "__len__"):
        raise UserError(
            f"got {type(images).__name__}; wanted a folder, a table, arrays, a list or a data set with a length"
        )
    return _of_items(images, labels, reading, measure)


def _is_tensor(value: object) -> bool:
    return hasattr(value, "permute") and hasattr(value, "detach")


def as_array(value: Any) -> np.ndarray:
    """An array; of a tensor its values, wherever they lie, those of half precision as float32."""
    if not _is_tensor(value):
        return np.asarray(value)
    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.is_floating_point() and value.dtype.itemsize == 2 else value).numpy()
    return array


def is_one_image(value: object, channels: int) -> bool | None:
    """Whether what a program gives for images of so many channels is a single one; None where its shape leaves it open.

    One is a name, a picture, (H, W), (H, W, C) or (C, H, W); of (N, H, W) one may only be sure where N can be no C.
    """
    shape = tuple[int, ...](getattr(value, "shape", ()) if isinstance(value, np.ndarray) or _is_tensor(value) else ())
    if len(shape) not in (2, 3):
        return isinstance(value, str | Path | Image.Image)
    usual = (1, 3, 4, channels)
    first, last = len(shape) == 3 and shape[0] in usual, len(shape) == 2 or shape[2] in usual
    if first != last:
        return True if last or shape[0] == 1 or channels > 1 else None
    return False if not first and channels in (1, 3) else None


def images_in(given: Any, channels: int) -> list[Any]:
    """One image or several as a list of images, for an encoder of so many channels.

    Raises:
        UserError: an array whose shape may be one or several.
    """
    one = is_one_image(given, channels)
    if one is None:
        raise UserError(
            f"got an array of shape {tuple(given.shape)}, which may be one image or several; wanted one as (H, W), "
            f"(H, W, C) or (C, H, W) of {channels} channels, several as a list of these"
        )
    return [given] if one else list(given)


def _pair(data: Any) -> tuple[Any, Labels | None]:
    """Images, and their labels where a pair of both is given: one each, flat, in a column or one-hot.

    Raises:
        UserError: labels of another form.
    """
    if not isinstance(data, tuple | list) or len(data) != 2 or isinstance(data[0], str | Path | Image.Image):
        return data, None
    images, labels = data
    if isinstance(labels, list | tuple):
        plain = [one.item() if getattr(one, "ndim", None) == 0 else one for one in labels]
        if all(isinstance(one, str | bytes | int | float | type(None)) for one in plain):
            return images, plain
        rows = all(isinstance(one, list | tuple) or getattr(one, "ndim", None) == 1 for one in labels)
        if not rows or len({len(one) for one in labels}) != 1:
            return data, None
        labels = np.array([as_array(one) for one in labels])
    shape, table = tuple(getattr(labels, "shape", ())), hasattr(labels, "iloc")
    if len(shape) not in (1, 2) or (len(shape) == 2 and getattr(images, "ndim", 4) == 2):  # two grey images
        return data, None
    return images, (labels if table else as_array(labels)) if len(shape) == 1 else _one_each(labels, table)


def _one_each(labels: Any, table: bool) -> Labels:
    """The labels (N,) of a column (N, 1) or of one-hot rows (N, K); of a table by the names of its columns.

    Raises:
        UserError: they are neither.
    """
    values, names = as_array(labels), list(labels) if table else list(range(labels.shape[1]))
    if len(names) == 1:
        return values[:, 0]
    if values.dtype.kind in "biuf" and np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all():
        return [names[place] for place in values.argmax(axis=1)]
    columns = f" and columns {names[:9]}" if table else ""
    raise UserError(
        f"got labels of shape {values.shape}{columns}; wanted one per image: (images, labels) with labels of shape "
        f"({len(values)},), or one-hot"
    )


def _of_files(paths: list[Path], labels: Labels | None, reading: Reading, max_bad: float) -> Listed:
    """Files by their names, which are relative to the working folder."""
    ids = [escape_path(path) for path in paths]
    if len(set(ids)) < len(ids):
        raise UserError(f"{Counter(ids).most_common(1)[0][0]!r} is listed more than once; wanted each file once")
    targets, classes = encode([None] * len(ids) if labels is None else list(labels), "files")
    return Listed(
        "files", Ids(ids), targets, classes, reading, Path.cwd(), Skipped(len(ids), max_bad), np.arange(len(ids))
    )


class _Items(Sequence[np.ndarray]):
    """Pixels of a data set, read when they are asked for, one at a time: data sets are rarely made for threads."""

    def __init__(self, items: Items, picked: tuple[str, str | None] | None, reading: Reading, name: str):
        self.items, self.picked, self.reading, self.name = items, picked, reading, name
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[override]
        return pixels_given(self.both(int(row))[0], self.reading, f"{self.name}, image {row}")

    def both(self, row: int) -> tuple[object, object]:
        """Image and label of an item."""
        try:
            with self._lock:
                item = self.items[row]
            if self.picked is not None:
                image, label = self.picked
                return item[image], item[label] if label is not None else None
        except Exception as error:  # whatever somebody's data set raises, it is of this item
            raise UserError(f"{self.name}, image {row}: {type(error).__name__}: {short(error)}") from error
        if isinstance(item, tuple | list) and len(item) >= 1 and not np.isscalar(item[0]):
            return item[0], item[1] if len(item) > 1 else None
        return item, None

    def samples(self, row: int) -> Samples | None:
        """Of an image in memory; None for pictures of 8 bits."""
        image = self.both(row)[0]
        if isinstance(image, Image.Image) and not (image.mode in ("F", "I") or image.mode.startswith("I;16")):
            return None
        try:
            return of_array(as_array(image))
        except (BadImageError, OSError) as error:
            raise UserError(f"{self.name}, image {row}: {error}") from error


def _of_items(items: Items, labels: Labels | None, reading: Reading, measure: bool) -> Listed:
    """A list of images, or a data set; in memory where it fits."""
    name = type(items).__name__ if not isinstance(items, list | tuple) else "images"
    if not len(items):
        raise UserError(f"{name} is empty; wanted at least 2 images")
    lazy = _Items(items, _picked(items), reading, name)
    some = (lazy.samples(int(row)) for row in ranges.spread(len(items)))
    looked = (one for one in some if one is not None)
    try:
        if measure:
            lazy.reading = reading = ranges.of_images(name, looked, reading)
        elif lazy.samples(0) is not None and ANY not in reading.ranges:
            ranges.check_images(name, looked, reading)
    except BadImageError as error:
        raise UserError(f"{name}: {error}") from error
    first = lazy[0]
    fits, why = fits_in_memory(first.nbytes * len(items))
    detail(f"{name}: {why}: images are {'read once, into RAM' if fits else 'read when needed'}")
    images: list[np.ndarray] | np.ndarray | _Items = lazy
    found = list[object]()
    if fits or labels is None:
        images = images if not fits else []
        for row in range(len(items)):
            image, label = lazy.both(row)
            found.append(label)
            if isinstance(images, list):
                images.append(pixels_given(image, reading, f"{name}, image {row}"))
    if isinstance(images, list) and len({(one.shape, one.dtype) for one in images}) == 1:
        images = np.stack(images)
    targets, classes = encode(list(labels) if labels is not None else _named(items, lazy.picked, found), name)
    count = np.arange(len(items))
    return Listed(
        name, Ids(numbers(len(items))), targets, classes, reading, None, Skipped(len(items), 0.0), count, images
    )


def _picked(items: Items) -> tuple[str, str | None] | None:
    """The columns of images and labels of a data set of Hugging Face; None for others."""
    columns = getattr(items, "column_names", None)
    if not isinstance(columns, list):
        return None
    image = next((name for name in ("image", "img", "pixel_values", "picture") if name in columns), None)
    if image is None:
        raise UserError(f"{type(items).__name__} has the columns {columns[:9]}; wanted a column 'image'")
    return image, next((name for name in ("label", "labels", "fine_label", "target", "class") if name in columns), None)


def _named(items: Items, picked: tuple[str, str | None] | None, labels: list[object]) -> list[object]:
    """Labels by the names that the data set has for them: torchvision's `classes`, Hugging Face's `ClassLabel`."""
    names = getattr(items, "classes", None)
    if picked is not None and picked[1] is not None:
        names = getattr(getattr(items, "features", {}).get(picked[1]), "names", None)
    if not isinstance(names, list | tuple):
        return labels
    name_of = {**dict(enumerate(names)), -1: None}
    return [name_of.get(int(label), label) if isinstance(label, int | np.integer) else label for label in labels]


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
        return pixels_of(of_array(as_array(image)), reading)
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
