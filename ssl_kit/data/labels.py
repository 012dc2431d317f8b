"""Labels of images: from folder names or from a column, as positions in a sorted tuple of class names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl_kit.core.random import permutation

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation")
_DIGITS = 1_000  # Python refuses to read numbers of more than 4,300
TABLES = (".csv", ".parquet")  # endings of manifests


def encode(names: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label names (None = unknown) to positions (N,) int64, -1 = unknown, in the sorted class names.

    Names that are all whole numbers sort as numbers, so that class "10" follows "9".
    """
    known = {name for name in names if name is not None}
    numbers = all(len(name) < _DIGITS and name.isascii() and name.removeprefix("-").isdigit() for name in known)
    classes = tuple(sorted(known, key=int) if numbers else sorted(known))
    position: dict[str | None, int] = {name: row for row, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64), classes


def folder_labels(ids: Sequence[str], *, asked: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) and classes from the first folder of each id.

    Unless they are asked for, folders count as classes only if they look like it: every image lies in `class/file`,
    there are at least two folders with two images on average, and none is called train, test or the like.
    """
    names = [name.split("/", 1)[0] if "/" in name else None for name in ids]
    if not asked and not _class_like(ids, names):
        return np.full(len(ids), -1, dtype=np.int64), ()
    return encode(names)


def _class_like(ids: Sequence[str], names: Sequence[str | None]) -> bool:
    folders = set(names)
    if None in folders or len(folders) < 2 or any(name.count("/") != 1 for name in ids):
        return False
    splits = {*TRAIN_NAMES, *TEST_NAMES}
    return not any(str(name).lower() in splits for name in folders) and len(ids) >= 2 * len(folders)


def split_parts(folder: Path) -> tuple[Path, Path] | None:
    """The train and test parts of a folder that has both, else None.

    A part is a sub-folder of one of the names above, or else a manifest of such a name, `train.csv` or `train.parquet`.
    """
    found = []
    for names in (TRAIN_NAMES, TEST_NAMES):
        folders = [path for name in names if (path := folder / name).is_dir()]
        tables = [path for name in names for end in TABLES if (path := folder / f"{name}{end}").is_file()]
        found.append([*folders, *tables])
    return (found[0][0], found[1][0]) if all(found) else None


def stratified(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """(N,) bool: True for a pseudo-random `fraction` of each class, rounded to the nearest, never a whole class."""
    chosen = np.zeros(len(labels), dtype=bool)
    order = permutation(seed, 0, len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = True
    return chosen
