"""What a user names, as a `Source`.

open_source("photos")             a folder, any nesting
open_source("list.csv")           or .parquet: a column `path`, relative to the file, perhaps `label`, `split`, `group`
open_source("s-{000..012}.tar")   shards, or a folder of them: shards.py; also .parquet with a column of images
open_source(["photos", "scans"])  several folders: ids begin with their names
open_source((images, labels))     (N, H, W) or (N, H, W, C) arrays; lists of files or pictures, data sets: given.py
open_source("mnist64")            built-in, no download, like "mnist5k", "digits"; "mnist64:train": the part to train on
open_labelled("cifar10")          train/ + test/ sub-folders or manifests as given, else a seeded stratified split
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ssl_kit.core.console import detail, progress, say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores, fits_in_memory, in_order
from ssl_kit.core.named import TABLES, check_data, is_builtin
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import ANY, RGB, Reading
from ssl_kit.data import manifests, ranges, shards
from ssl_kit.data.given import joined, of_arrays, of_python
from ssl_kit.data.labels import Part, encode, folder_labels, numbered, part_of, stratified
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import Skipped, folder_of_images, folders_without
from ssl_kit.data.sources import Listed, Source, pixels, sampled

Data: TypeAlias = Any  # what `open_source` takes: a name, or what a Python program holds

_TEST_FRACTION = 0.2  # of a labelled source that has no test folder
_SAMPLE = 256  # files whose headers are read to estimate what all take
_TASK = 4 * 2**20, 256  # bytes and files that are decoded at a time: of 1 ms of work the hand-over shows


def open_source(
    data: Data,
    *,
    limit: int | None = None,
    reading: Reading = RGB,
    measure: bool = False,
    in_memory: Literal["auto"] | bool | Callable[[bool], bool] = "auto",
    max_bad: float = 0.05,
    labelled: bool = False,
    least: int = 2,
    threads: int | None = None,
) -> Source:
    """Opens a folder, a manifest, arrays or a built-in set.

    Args:
        data: see the top of this file.
        limit: use only so many images: a fixed pseudo-random choice, spread over the source, in its order.
        reading: which channels and values of the images are taken.
        measure: find the range of values that deep images use, see ranges.py; it is in the `reading` of the result.
        in_memory: decode everything now; "auto" = when that takes less than a quarter of the available memory; a
            function is asked, given whether it does.
        max_bad: fraction of files in [0, 1] that may be undecodable; 0 is strict: the first one is an error.
        labelled: labels are needed: folders directly below `data` are classes whatever they look like. Otherwise they
            are taken for classes only when every image lies in `class/file` and each class has two images on average.
        least: images that are needed.
        threads: for decoding; None = all cores of this process.

    Raises:
        UserError: nothing there, no images, too few, too many bad ones, or no labels where they are needed.
    """
    if limit is not None and limit < 2:
        raise UserError(f"--limit {limit}: at least 2 images are needed")
    found = _listed(data, reading, measure, max_bad, labelled)
    return _opened(
        found, limit=limit, measure=measure, in_memory=in_memory, labelled=labelled, least=least, threads=threads
    )


def _opened(
    source: Listed,
    *,
    limit: int | None,
    measure: bool,
    in_memory: Literal["auto"] | bool | Callable[[bool], bool],
    labelled: bool,
    threads: int | None,
    least: int = 2,
) -> Listed:
    """A source limited, measured and decoded as it is asked for; says what it has."""
    if limit is not None and limit < len(source):
        source = source.subset(np.sort(permutation(0, 0, len(source))[:limit]))
        source.bad = Skipped(len(source), source.bad.max_bad)
    _enough(source, least)
    if labelled:
        _needs_labels(source)
    if not source.in_memory:
        if measure:
            source = replace(source, reading=ranges.of_source(source))
        elif ANY not in source.reading.ranges:  # what was typed is meant
            ranges.check(source)
        source = _decoded(source, in_memory, threads or available_cores())
        _enough(source, least)
    say(_found(source))
    return source


def open_labelled(
    data: Data,
    *,
    limit: int | None = None,
    reading: Reading = RGB,
    in_memory: Literal["auto"] | bool = "auto",
    max_bad: float = 0.05,
    threads: int | None = None,
) -> tuple[Source, Source]:
    """Opens a labelled source as (train, test); arguments as `open_source`, `limit` is for both parts together.

    A folder with `train/` and `test/`, or `train.csv` and `test.csv` (or `.parquet`), gives those; so does a table with
    a column `split`. Names of parts may be any usual ones in any case (training, testing; val, valid, validation, dev).
    What is called val joins train, or is tested on where nothing is called test. Classes are those of train.
    Everything else is split 80 : 20, stratified, by a fixed seed: the same rows in every run; images of one group
    (a column of a table) stay together. Images without a label are left out.

    Raises:
        UserError: see `open_source`; or test has images of fewer than two classes, so that every score would be 1.
    """
    opened = partial(_opened, measure=False, in_memory=in_memory, labelled=True, threads=threads)
    parts = _parts(data, reading, max_bad)
    if isinstance(parts, Listed):
        whole = opened(parts, limit=limit)
        test = stratified(whole.labels(), _TEST_FRACTION, groups=whole.groups())
        known = whole.labels() >= 0
        return _checked(
            whole.subset(known & ~test, f"{whole.name}:train"), whole.subset(known & test, f"{whole.name}:test")
        )
    shares = (
        [None, None] if limit is None else [max(2, round(limit * len(part) / sum(map(len, parts)))) for part in parts]
    )
    first, second = (opened(part, limit=share) for part, share in zip(parts, shares, strict=True))
    return _checked(*_shared_classes(first, second))


def _parts(data: Data, reading: Reading, max_bad: float) -> tuple[Listed, Listed] | Listed:
    """What a set of several parts is trained and tested on, or the whole where it has none; says what is which."""
    data = _alone(data)
    if isinstance(data, Mapping):
        return _parts_of(data, reading, max_bad)
    if not isinstance(data, str | Path):
        return _listed(data, reading, False, max_bad, True)
    path = Path(data)
    if path.suffix.lower() in TABLES and path.is_file() and not shards.found([str(path)]):
        table = manifests.read_table(path)
        whole = _of_table(path, table, reading, max_bad, True)
        if table.parts is None:
            return whole
        named = [part_of(part) for part in table.parts]
        if odd := sorted({str(part) for part, known in zip(table.parts, named, strict=True) if known is None}):
            raise UserError(
                f"{path}: the column of parts holds {', '.join(map(repr, odd[:5]))}; wanted train, val or test"
            )
        if not {"train"} < set(named):
            raise UserError(f"{path}: the column of parts names {', '.join(sorted(map(str, set(named))))} alone")
        _say_parts(str(data), {part: part for part in named if part is not None})
        test = np.array([part == ("test" if "test" in named else "val") for part in named])
        if whole.grouped is not None:
            both = np.intersect1d(whole.grouped[test], whole.grouped[~test])
            if len(both := both[both >= 0]):
                warn(f"{path}: {len(both):,} groups lie in train and in test: scores will be too good")
        made = whole.subset(~test, f"{data}:train"), whole.subset(test, f"{data}:test")
        for part in made:
            part.bad = Skipped(len(part), max_bad)
        return made
    found = manifests.parts_in(path)
    if not found:
        return _listed(data, reading, False, max_bad, True)
    _say_parts(str(data), {part: ", ".join(one.name for one in paths) for part, paths in found.items()})
    tested = found.pop("test") if "test" in found else found.pop("val")
    first, second = (_together(paths, reading, max_bad) for paths in (found["train"] + found.get("val", []), tested))
    return first, second


def _together(paths: list[Path], reading: Reading, max_bad: float) -> Listed:
    """The places of a part as one source."""
    if shards.found(names := [str(path) for path in paths]):
        return _listed(names, reading, False, max_bad, True)
    return joined([_listed(path, reading, False, max_bad, True) for path in paths], max_bad)


def _parts_of(data: Mapping[str, Data], reading: Reading, max_bad: float) -> tuple[Listed, Listed]:
    """Parts by name, such as those of Hugging Face: val joins train only where it is files, as test does."""
    named = {part_of(name): one for name, one in data.items()}
    if "train" not in named or not {"test", "val"} & set(named):
        raise UserError(f"got the parts {', '.join(map(repr, data))}; wanted train and test")
    tested = named["test" if "test" in named else "val"]
    return _listed(named["train"], reading, False, max_bad, True), _listed(tested, reading, False, max_bad, True)


def _alone(data: Data) -> Data:
    """The one of a list of one name, as the command line gives it; a list of one image file stays a list."""
    if not isinstance(data, list | tuple) or len(data) != 1 or not isinstance(data[0], str | Path):
        return data
    path = Path(data[0])
    return data if path.is_file() and path.suffix.lower() not in TABLES else data[0]


def places(data: Data) -> list[str]:
    """The folders and files that data is read from, as they were named; none of what is in memory."""
    given = data if isinstance(data, list | tuple) else [data]
    named = [str(one) for one in given if isinstance(one, str | Path)]
    return named if len(named) == len(given) else []


def name_of(data: Data) -> str:
    """Data in a word: as it was named, or what kind of thing it is."""
    if named := places(data):
        return " ".join(named) if len(named) < 9 else f"{len(named):,} files"
    return "arrays" if isinstance(data, np.ndarray | tuple | list) else type(data).__name__


def _say_parts(name: str, parts: Mapping[Part, str]) -> None:
    if "val" in parts:
        joins = "joins train" if "test" in parts else "is tested on"
        say(f"{name}: {parts['val']} {joins}, as {'test is there' if 'test' in parts else 'nothing is called test'}")


def _checked(train: Source, test: Source) -> tuple[Source, Source]:
    """Train and test, once test is known to tell classes apart; says which classes it lacks."""
    count = np.bincount(test.labels(), minlength=len(test.classes))
    missing = [name for name, images in zip(test.classes, count, strict=True) if not images]
    if not missing:
        return train, test
    names = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
    if len(missing) > len(test.classes) - 2:
        raise UserError(
            f"{test.name}: no image of {names} is in test, which has {len(test.classes) - len(missing)} class: nothing "
            "could be told apart; wanted two images or more of at least two classes"
        )
    warn(f"{test.name}: no image of {names} is in test: scores are of {len(test.classes) - len(missing)} classes only")
    return train, test


def _listed(data: Data, reading: Reading, measure: bool, max_bad: float, labelled: bool) -> Listed:
    """The source with nothing decoded yet (arrays and built-in sets are in memory as they come)."""
    data = _alone(data)
    if (names := places(data)) and (files := shards.found(names)):
        return shards.source(names, files, reading, max_bad, labelled)
    if isinstance(data, list | tuple) and (folders := places(data)) and all(Path(one).is_dir() for one in folders):
        return joined([_listed(one, reading, False, max_bad, labelled) for one in folders], max_bad)
    if not isinstance(data, str | Path):
        return of_python(data, reading, measure, max_bad)
    text, path = str(data), Path(data)
    check_data(text)
    name, _, part = text.partition(":")
    if is_builtin(name) and not path.exists():
        whole = builtin_source(name, reading)
        test = stratified(whole.labels(), _TEST_FRACTION)  # as `open_labelled` splits them
        return whole.subset(test if part == "test" else ~test, text) if part else whole
    if path.is_file():
        return _of_table(path, manifests.read_table(path), reading, max_bad, labelled)
    ids = folder_of_images(path).ids
    labels, classes = folder_labels(ids, text, asked=labelled)
    if labelled and (empty := folders_without(path, {name.split("/", 1)[0] for name in ids})):
        warn(f"{path}: no images in {', '.join(map(repr, empty[:5]))}; {len(empty)} folders are no classes")
    return Listed(text, ids, labels, classes, reading, path, Skipped(len(ids), max_bad), np.arange(len(ids)))


def _of_table(path: Path, table: manifests.Table, reading: Reading, max_bad: float, labelled: bool) -> Listed:
    if labelled and table.others:
        raise UserError(f"{path} has no labels, {manifests.no_labels(table.others)}")
    labels, classes = encode(table.labels, str(path))
    bad = Skipped(len(table.ids), max_bad)
    rows = np.arange(len(table.ids))
    return Listed(
        str(path),
        table.ids,
        labels,
        classes,
        reading,
        path.parent,
        bad,
        rows,
        grouped=numbered(table.groups, str(path)),
    )


def builtin_source(name: str, reading: Reading = RGB) -> Listed:
    """A whole built-in set, in memory; see `manifests.builtin`."""
    return of_arrays(*manifests.builtin(name), reading, name)


def _decoded(source: Listed, in_memory: Literal["auto"] | bool | Callable[[bool], bool], threads: int) -> Listed:
    """Decodes into memory if asked to, or if it fits."""
    rows = np.sort(sampled(source, _SAMPLE))
    heights, widths = source.sizes(rows).T
    areas = (heights * widths)[heights > 0]
    one = next((image for row in rows if isinstance(image := _tried(source, row), np.ndarray)), np.empty(0, np.uint8))
    mean_bytes = float(np.mean(areas * source.channels * one.itemsize)) if len(areas) else 0.0
    fits, why = fits_in_memory(len(source) * mean_bytes)
    keep = in_memory(fits) if callable(in_memory) else fits if in_memory == "auto" else in_memory
    detail(f"{source.name}: {why}: images are {'decoded once, into RAM' if keep else 'decoded when needed'}")
    if not keep:
        return source
    images, bad = _load(source, threads, mean_bytes)
    for name, reason in zip(source.ids(list(bad)), bad.values(), strict=True):
        source.bad.add(name, reason)
    source.bad.check()
    rows = np.setdiff1d(np.arange(len(source)), list(bad))
    store = None if source.store is None else source.store.at(source.rows)
    return replace(
        source,
        names=source.names.at(source.rows),
        targets=source.labels(),
        grouped=source.groups(),
        images=images,
        rows=rows,
        store=store,
    )


def _load(source: Listed, threads: int, mean_bytes: float) -> tuple[np.ndarray | list[np.ndarray], dict[int, str]]:
    """Pixels of all images, an array where they have one size, else a list; and why those that lack them do, by row."""
    together = int(np.clip(_TASK[0] / max(mean_bytes, 1), 1, _TASK[1]))
    array, others, bad = np.empty((0, 0, 0, 0), np.uint8), dict[int, np.ndarray](), dict[int, str]()

    some = lambda start: [_tried(source, row) for row in range(start, min(start + together, len(source)))]
    starts = range(0, len(source), together)
    with progress(len(source), "decode") as bar, ThreadPoolExecutor(threads, "decode") as pool:
        # a few tasks wait for their turn, so that memory holds the images once
        for start, found in zip(
            starts, in_order(lambda start: pool.submit(some, start), starts, 2 * threads + 1), strict=True
        ):
            for row, image in enumerate(found, start):
                if isinstance(image, BadImageError):
                    bad[row] = str(image)
                    continue
                if not len(array):
                    array = np.empty((len(source), *image.shape), image.dtype)  # pages are taken when written
                if (image.shape, image.dtype) == (array.shape[1:], array.dtype):
                    array[row] = image
                else:
                    others[row] = image
            bar.advance(bar.task_ids[0], len(found))
    return [others.get(row, array[row]) for row in range(len(array))] if others else array, bad


def _tried(source: Source, row: int) -> np.ndarray | BadImageError:
    try:
        return pixels(source, row)
    except BadImageError as error:
        return error


def _shared_classes(train: Source, test: Source) -> tuple[Source, Source]:
    """Both parts with the classes of train, so that one number means one class in both, and without unknown labels."""
    if missing := [name for name in test.classes if name not in train.classes]:
        raise UserError(f"{test.name}: classes {missing[:5]} do not occur in {train.name}; wanted the same classes")
    assert isinstance(test, Listed), "what was opened here"
    place = {name: row for row, name in enumerate(train.classes)}
    table = np.array([*map(place.get, test.classes), -1], dtype=np.int64)  # label -1 stays -1
    test = replace(test, targets=table[test.targets], classes=train.classes)
    return train.subset(train.labels() >= 0), test.subset(test.labels() >= 0)


def _needs_labels(source: Source) -> None:
    if len(source.classes) >= 2:
        return
    got = f"only the class {source.classes[0]!r}" if source.classes else "no labels"
    raise UserError(
        f"{source.name} has {got}; wanted at least two classes: a sub-folder per class ({source.name}/cat/1.jpg,"
        " perhaps below train/ and test/), or a .csv or .parquet with the columns path and label"
    )


def _enough(source: Source, least: int) -> None:
    if len(source) < least:
        bad = f" ({len(source.bad.rows):,} could not be decoded)" if source.bad.rows else ""
        raise UserError(f"{source.name}: {len(source)} image{bad}; at least {least} are needed")


def _found(source: Source) -> str:
    size = " of " + "x".join(map(str, source.stack[0].shape[1:3])) if source.stack is not None else ""
    labels = source.labels()
    per_class = Counter(labels[labels >= 0].tolist()).values()
    told = f", {len(source.classes)} classes of {min(per_class):,}..{max(per_class):,}" if per_class else ""
    unknown = int((labels < 0).sum()) if per_class else 0
    without = f", {unknown:,} without a label" if unknown else ""
    bad = f", {len(source.bad.rows):,} skipped" if source.bad.rows else ""
    return f"{source.name}: {len(source):,} images{size}{told}{without}{bad}"
