"""Labels and splits as people write them: what is a class, what is unknown, which part an image belongs to.

A label is a text without spaces around it, in Unicode's composed form (NFC): `cat ` and `cat` are one class. Classes
are sorted, and a label is its position among them; -1 is unknown.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from ssl_kit.core.console import say
from ssl_kit.core.random import permutation

Part: TypeAlias = Literal["train", "val", "test"]

_UNKNOWN = ("", "NaN", "nan", "None", "null", "<NA>")  # as pandas, numpy, Python and R's readers write what is missing
_PARTS: dict[str, Part] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PARTS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
_DIGITS = 1_000  # Python refuses to read numbers of more than 4,300
_SHOWN = 3  # spellings that a line lists


def part_of(name: object) -> Part | None:
    """The part that a folder's or file's name or a cell names, in any case; None for any other word."""
    return _PARTS.get(str(name).strip().lower())


def text_of(value: object) -> str | None:
    """A cell as a text: nulls and NaN are None, whole floats (integers with gaps, as pandas has them) are integers."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def encode(names: Sequence[object], what: str, *, folders: bool = False) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label names to positions (N,) int64, -1 = unknown, in the sorted class names.

    Unknown are None, NaN, empty cells, `NaN`, `nan`, `None` and `null`, and -1 where all others are whole numbers from
    0 on. Names that are all whole numbers sort as numbers, so that class "10" follows "9". What was taken for unknown
    or joined is said.

    Args:
        names: of any type.
        what: they are of, for messages.
        folders: they are names of folders, which none leaves out.
    """
    texts = [text_of(name) for name in names]
    counts = Counter(text for text in texts if text is not None)
    clean = {text: unicodedata.normalize("NFC", text).strip() for text in counts}
    if all(_is_whole_float(text) for text in clean.values() if text not in _UNKNOWN):  # 1.0, as CSV files have it
        clean = {text: one.partition(".")[0] for text, one in clean.items()}
    unknown = set() if folders else {text for text, one in clean.items() if one in _UNKNOWN}
    others = {one for text, one in clean.items() if text not in unknown}
    if not folders and "-1" in others and all(map(_is_whole, others - {"-1"})):
        unknown |= {text for text, one in clean.items() if one == "-1"}
    _say(counts, clean, unknown, what)
    known = {one for text, one in clean.items() if text not in unknown}
    numbers = all(_is_whole(name.removeprefix("-")) for name in known)
    classes = tuple(sorted(known, key=int) if numbers else sorted(known))
    place = {name: row for row, name in enumerate(classes)}
    position: dict[str | None, int] = {text: place[one] for text, one in clean.items() if text not in unknown}
    return np.array([position.get(text, -1) for text in texts], dtype=np.int64), classes


def _say(counts: Counter[str], clean: dict[str, str], unknown: set[str], what: str) -> None:
    spelled = [f"{text!r} {counts[text]:,} times" for text in sorted(unknown) if clean[text]]
    if spelled:
        say(f"{what}: no label is what {', '.join(spelled[:_SHOWN])} stands for")
    spellings: dict[str, list[str]] = {}
    for text in sorted(set(clean) - unknown):
        spellings.setdefault(clean[text], []).append(text)
    joined = [f"{', '.join(map(ascii, found))}" for found in spellings.values() if len(found) > 1]
    if joined:
        more = f" and {len(joined) - _SHOWN:,} more" if len(joined) > _SHOWN else ""
        say(f"{what}: one class each, for spaces and forms of Unicode make none: {'; '.join(joined[:_SHOWN])}{more}")


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < _DIGITS


def _is_whole_float(text: str) -> bool:
    whole, point, rest = text.removeprefix("-").partition(".")
    return _is_whole(whole) and bool(point) and _is_whole(rest) and not rest.strip("0")


def folder_labels(ids: Sequence[str], what: str, *, asked: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) and classes from the first folder of each id.

    Unless they are asked for, folders count as classes only if they look like it: every image lies in `class/file`,
    there are at least two folders with two images on average, and none is called train, test or the like.
    """
    names = [name.split("/", 1)[0] if "/" in name else None for name in ids]
    if not asked and not _class_like(ids, names):
        return np.full(len(ids), -1, dtype=np.int64), ()
    return encode(names, what, folders=True)


def _class_like(ids: Sequence[str], names: Sequence[str | None]) -> bool:
    folders = set(names)
    if None in folders or len(folders) < 2 or any(name.count("/") != 1 for name in ids):
        return False
    return not any(map(part_of, folders)) and len(ids) >= 2 * len(folders)


def spread(count: int, most: int) -> np.ndarray:
    """(min(count, most),) int64 positions, evenly spread over 0 .. count - 1."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def stratified(labels: np.ndarray, fraction: float, seed: int = 0, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) bool: True for a pseudo-random `fraction` of each class, rounded to the nearest, never a whole class.

    Args:
        labels: (N,) int64.
        fraction: in [0, 1].
        seed: of the choice.
        groups: (N,) int64, -1 alone: images of one group come together, which counts for the class of its first one.
            Groups, not images, are then counted.
    """
    if groups is not None and (groups >= 0).any():
        first, member = grouped(groups)
        return stratified(labels[first], fraction, seed)[member]
    chosen = np.zeros(len(labels), dtype=bool)
    order = permutation(seed, 0, len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        chosen[rows[: min(round(fraction * len(rows)), len(rows) - 1)]] = True
    return chosen


def numbered(groups: list[str | None] | None, path: str) -> np.ndarray | None:
    """(N,) int64 numbers of named groups, -1 alone; says what they are."""
    if groups is None:
        return None
    number = {name: place for place, name in enumerate(dict.fromkeys(name for name in groups if name is not None))}
    grouped = np.array([-1 if name is None else number[name] for name in groups], np.int64)
    alone = f", {(grouped < 0).sum():,} stand alone" if (grouped < 0).any() else ""
    say(f"{path}: the column 'group' holds {len(number):,} groups of {(grouped >= 0).sum():,} images{alone}")
    return grouped


def grouped(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of groups (N,), -1 alone: the first image (G,) of each, and the place (N,) of every image's group among them."""
    own = np.where(groups >= 0, groups, groups.max(initial=-1) + 1 + np.arange(len(groups)))
    _, first, member = np.unique(own, return_index=True, return_inverse=True)
    return first, member
