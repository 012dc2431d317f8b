"""Sources: images as stored, with stable ids and, where known, labels. A source knows nothing of augmentation.

open_source("photos")             a folder, any nesting
open_source("list.csv")           or .parquet: a column `path`, relative to the file, and perhaps `label`
open_source((images, labels))     (N, H, W) or (N, H, W, C) uint8 or uint16 arrays
open_source("digits"), "mnist5k"  built-in, no download; "mnist5k:train" is the part that evaluation trains on
open_labelled("cifar10")          train/ + test/ sub-folders or manifests as given, else a seeded stratified split
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from ssl_kit.core.console import say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores
from ssl_kit.core.random import permutation
from ssl_kit.data.decode import BadImageError, image_size
from ssl_kit.data.listing import Skipped, folder_of_images, folders_without, read_regular, unescape
from ssl_kit.data.loading import Images, estimate_bytes, fits_in_memory, load_images
from ssl_kit.data.tables import TABLES, builtin, encode, folder_labels, is_builtin, read_table, split_parts, stratified

Data: TypeAlias = str | Path | np.ndarray | tuple[np.ndarray, np.ndarray]

_TEST_FRACTION = 0.2  # of a labelled source that has no test folder


@dataclass
class Source:
    """Images, their ids and labels; row i of each belongs to image i.

    Attributes:
        name: what it was opened from.
        ids: paths relative to `root` (see listing.py), unique and stable.
        labels: (N,) int64 positions in `classes`, -1 = unknown.
        classes: names, sorted; empty when nothing is labelled.
        channels: 3 (RGB) or 1 (grey); built from arrays, as many as they have.
        images: (N, H, W, C) uint8, or a list of (H_i, W_i, C), or None = decoded when needed.
        root: the folder that ids are relative to; None when the images never were files.
        bad: files that could not be decoded so far; shared by the subsets of a source.
    """

    name: str
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    channels: int
    images: Images | None
    root: Path | None
    bad: Skipped = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(id, reason) of every file that could not be decoded so far."""
        return self.bad.rows

    def id(self, row: int) -> str:
        """The id of image `row`."""
        return self.ids[row]

    def read(self, row: int) -> bytes:
        """The file of image `row` as it is on disk; a PNG of the pixels when there is no file.

        Raises:
            BadImageError: the file has gone, cannot be read, or is no regular file any more.
        """
        if self.root is not None:
            return _read_file(self.root, self.ids[row])
        assert self.images is not None, "a source without files has its images in memory"
        return _png(self.images[row])

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of image `row`, upright; from the file's header (`BadImageError`) if it is not in memory."""
        if self.images is not None:
            return self.images[row].shape[0], self.images[row].shape[1]
        return image_size(self.read(row))

    def skip(self, row: int, reason: str) -> None:
        """Notes that image `row` could not be decoded; raises `UserError` when there are too many of them."""
        self.bad.add(self.ids[row], reason)
        self.bad.check()

    def subset(self, rows: np.ndarray) -> Source:
        """The images at positions `rows` (int64, or a boolean mask), in that order; bad files are counted together."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        images = self.images
        if images is not None:
            images = images[rows] if isinstance(images, np.ndarray) else [images[row] for row in rows]
        return replace(self, ids=[self.ids[row] for row in rows], labels=self.labels[rows], images=images)


def open_source(
    data: Data,
    *,
    limit: int | None = None,
    channels: int = 3,
    in_memory: Literal["auto"] | bool | Callable[[bool], bool] = "auto",
    max_bad: float = 0.05,
    labelled: bool = False,
    threads: int | None = None,
) -> Source:
    """Opens a folder, a manifest, arrays or a built-in set.

    Args:
        data: see the top of this file.
        limit: use only so many images: a fixed pseudo-random choice, spread over the source, in its order.
        channels: 3 = RGB, 1 = grey.
        in_memory: decode everything now; "auto" = when that takes less than a quarter of the available memory; a
            function is asked, given whether it does.
        max_bad: fraction of files in [0, 1] that may be undecodable; 0 is strict: the first one is an error.
        labelled: labels are needed: folders directly below `data` are classes whatever they look like. Otherwise they
            are taken for classes only when every image lies in `class/file` and each class has two images on average.
        threads: for decoding; None = all cores of this process.

    Raises:
        UserError: nothing there, no images, too few, too many bad ones, or no labels where they are needed.
    """
    if channels not in (1, 3) and not isinstance(data, np.ndarray | tuple):
        raise UserError(f"channels {channels}: files are decoded to 3 (RGB) or 1 (grey); other numbers need arrays")
    if limit is not None and limit < 2:
        raise UserError(f"--limit {limit}: at least 2 images are needed")
    source = _listed(data, channels, max_bad, labelled)
    if limit is not None and limit < len(source):
        source = source.subset(np.sort(permutation(0, 0, len(source))[:limit]))
        source.bad = Skipped(len(source), max_bad)
    _at_least_two(source)
    if labelled:
        _needs_labels(source)
    if source.images is None:
        source = _decoded(source, in_memory, threads or available_cores())
    say(_found(source))
    return source


def open_labelled(
    data: Data,
    *,
    limit: int | None = None,
    channels: int = 3,
    in_memory: Literal["auto"] | bool = "auto",
    max_bad: float = 0.05,
    threads: int | None = None,
) -> tuple[Source, Source]:
    """Opens a labelled source as (train, test); arguments as `open_source`, `limit` is for both parts together.

    A folder with `train/` and `test/` (or `val/`, `valid/`, `validation/`) gives those, with the class names of both;
    so does one with `train.csv` and `test.csv` (or `.parquet`), whose paths are relative to the folder.
    Everything else is split 80 : 20, stratified, by a fixed seed: the same rows in every run. Images without a label
    are left out.
    """
    pair = split_parts(Path(data)) if isinstance(data, str | Path) else None
    if pair is None:
        whole = open_source(
            data, limit=limit, channels=channels, in_memory=in_memory, max_bad=max_bad, labelled=True, threads=threads
        )
        test = stratified(whole.labels, _TEST_FRACTION)
        train = ~test & (whole.labels >= 0)
        return _part(whole, train, "train"), _part(whole, test & (whole.labels >= 0), "test")
    sizes = [_count(part) for part in pair] if limit is not None else [0, 0]
    shares = [max(2, round(limit * size / sum(sizes))) if limit is not None else None for size in sizes]
    one, two = (
        open_source(
            part, limit=share, channels=channels, in_memory=in_memory, max_bad=max_bad, labelled=True, threads=threads
        )
        for part, share in zip(pair, shares, strict=True)
    )
    return _shared_classes(one, two)


def _count(part: Path) -> int:
    """Images that a folder or a manifest lists."""
    return len(read_table(part)[0] if part.is_file() else folder_of_images(part).ids)


def _listed(data: Data, channels: int, max_bad: float, labelled: bool) -> Source:
    """The source with nothing decoded yet (arrays and built-in sets are in memory as they come)."""
    if isinstance(data, np.ndarray):
        return _from_arrays(data, None, channels, "arrays")
    if isinstance(data, tuple):
        return _from_arrays(data[0], np.asarray(data[1]), channels, "arrays")
    text, path = str(data), Path(data)
    if "://" in text:
        raise UserError(f"{text}: addresses are not read yet; wanted a folder, a .csv or .parquet, or 'mnist5k'")
    if path.suffix == ".tar" or ".tar." in path.name or ("{" in text and ".." in text and not path.exists()):
        raise UserError(f"{text}: tar shards are not read yet; unpack them into a folder, or list the files in a .csv")
    name, _, part = text.partition(":")
    if is_builtin(name) and not path.exists():
        whole = builtin_source(name, channels)
        return _part(whole, _rows_of(whole, part), part) if part else whole
    if path.suffix.lower() in TABLES and path.is_file():
        ids, names = read_table(path)
        labels, classes = encode(names)
        return Source(text, ids, labels, classes, channels, None, path.parent, Skipped(len(ids), max_bad))
    if path.is_file():
        raise UserError(f"{path} is a file; wanted a folder, a .csv or .parquet with a column 'path', or 'mnist5k'")
    ids = folder_of_images(path).ids
    labels, classes = folder_labels(ids, asked=labelled)
    if labelled and (empty := folders_without(path, classes)):
        warn(f"{path}: no images in {', '.join(map(repr, empty[:5]))}; {len(empty)} folders are no classes")
    return Source(text, ids, labels, classes, channels, None, path, Skipped(len(ids), max_bad))


def builtin_source(name: str, channels: int) -> Source:
    """A whole built-in set, in memory; see `tables.builtin`."""
    return _from_arrays(*builtin(name), channels, name)


def _rows_of(whole: Source, part: str) -> np.ndarray:
    """(N,) bool: the rows of `train` or `test` as `open_labelled` splits them."""
    if part not in ("train", "test"):
        raise UserError(f"{whole.name}:{part}: a built-in set has the parts train and test")
    test = stratified(whole.labels, _TEST_FRACTION)
    return test if part == "test" else ~test


def _decoded(source: Source, in_memory: Literal["auto"] | bool | Callable[[bool], bool], threads: int) -> Source:
    """Decodes into memory if asked to, or if it fits."""
    assert source.root is not None
    root, ids = source.root, source.ids
    read = lambda row: _read_file(root, ids[row])
    needed = estimate_bytes(len(source), read, source.channels)
    fits, why = fits_in_memory(needed)
    keep = in_memory(fits) if callable(in_memory) else fits if in_memory == "auto" else in_memory
    say(f"{source.name}: {why}: images are {'decoded once, into RAM' if keep else 'decoded when needed'}")
    if not keep:
        return source
    images, rows, bad = load_images(
        len(source), read, source.channels, threads=threads, mean_bytes=needed / len(source), label="decode"
    )
    for row, reason in bad:
        source.bad.add(ids[row], reason)
    source.bad.check()
    source = replace(source, ids=[ids[row] for row in rows], labels=source.labels[rows], images=images)
    _at_least_two(source)
    return source


def _from_arrays(images: np.ndarray, names: np.ndarray | None, channels: int, name: str) -> Source:
    if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"{name}: got {images.dtype} of shape {images.shape}; wanted uint8 or uint16, (N, H, W) or (N, H, W, C)"
        )
    if names is not None and names.shape != (len(images),):
        raise UserError(f"{name}: {len(images):,} images but labels of shape {names.shape}; wanted one label per image")
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype == np.uint16:
        images = ((images.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if images.shape[-1] == 1 and channels == 3:
        images = np.repeat(images, 3, axis=-1)
    elif images.shape[-1] == 3 and channels == 1:
        luma = images @ np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 in 16 bits, as Pillow computes it
        images = ((luma + 32768) >> 16).astype(np.uint8)[..., None]
    elif images.shape[-1] != channels:
        raise UserError(f"{name}: images of {images.shape[-1]} channels; wanted {channels} (or 1 or 3)")
    labels, classes = encode([None] * len(images) if names is None else [str(value) for value in names])
    width = len(str(max(len(images) - 1, 0)))
    ids = [f"{row:0{width}d}" for row in range(len(images))]
    return Source(name, ids, labels, classes, channels, images, None, Skipped(len(images), 0.0))


def _shared_classes(train: Source, test: Source) -> tuple[Source, Source]:
    """Both parts with the classes of train, so that one number means one class in both, and without unknown labels."""
    if missing := [name for name in test.classes if name not in train.classes]:
        raise UserError(f"{test.name}: classes {missing[:5]} do not occur in {train.name}; wanted the same classes")
    where = {name: row for row, name in enumerate(train.classes)}
    table = np.array([*(where[name] for name in test.classes), -1], dtype=np.int64)  # label -1 stays -1
    test = replace(test, labels=table[test.labels], classes=train.classes)
    return _part(train, train.labels >= 0, None), _part(test, test.labels >= 0, None)


def _part(whole: Source, rows: np.ndarray, name: str | None) -> Source:
    if rows.all():
        return whole  # no copy of the pixels
    return replace(whole.subset(rows), name=f"{whole.name}:{name}" if name else whole.name)


def _needs_labels(source: Source) -> None:
    if len(source.classes) >= 2:
        return
    got = f"only the class {source.classes[0]!r}" if source.classes else "no labels"
    raise UserError(
        f"{source.name} has {got}; wanted at least two classes: a sub-folder per class ({source.name}/cat/1.jpg,"
        " perhaps below train/ and test/), or a .csv or .parquet with the columns path and label"
    )


def _at_least_two(source: Source) -> None:
    if len(source) < 2:
        bad = f" ({len(source.skipped):,} could not be decoded)" if source.skipped else ""
        raise UserError(f"{source.name}: {len(source)} image{bad}; at least 2 are needed")


def _found(source: Source) -> str:
    size = " of " + "x".join(map(str, source.images.shape[1:3])) if isinstance(source.images, np.ndarray) else ""
    per_class = Counter(source.labels[source.labels >= 0].tolist()).values()
    labels = f", {len(source.classes)} classes of {min(per_class):,}..{max(per_class):,}" if per_class else ""
    unknown = int((source.labels < 0).sum()) if per_class else 0
    without = f", {unknown:,} without a label" if unknown else ""
    bad = f", {len(source.skipped):,} skipped" if source.skipped else ""
    return f"{source.name}: {len(source):,} images{size}{labels}{without}{bad}"


def _read_file(root: Path, name: str) -> bytes:
    try:
        return read_regular(os.path.join(os.fsencode(root), unescape(name)))
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    except ValueError as error:  # a name with a NUL, out of a table
        raise BadImageError(str(error)) from error


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(data, "PNG")
    return data.getvalue()
