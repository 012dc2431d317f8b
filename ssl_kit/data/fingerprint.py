"""Whether two sources hold the same images: names in order, byte sizes, and what 64 of them hold. Dates say nothing."""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import TypedDict

import numpy as np

from ssl_kit.data.sources import Source, sampled

_READ = 64  # images whose bytes are read
_MARKS = 2**16  # bytes, one for each image or for as many in a row, that tell where the first difference is
_LISTED = 2**14  # images whose names and sizes are held at a time
_STREAM = 910


class Fingerprint(TypedDict):
    """What `run.json` keeps of the images.

    `fingerprint`: sha256 of names and sizes. `marks`: base64 of a byte for each image, or for each of 65,536 groups.
    `read`: the sha256 of some images by name.
    """

    fingerprint: str
    marks: str
    read: dict[str, str]


def fingerprint(source: Source, seed: int) -> Fingerprint:
    """That of a source; the seed draws the images that are read."""
    whole, marks = hashlib.sha256(), bytearray(min(len(source), _MARKS))
    for start in range(0, len(source), _LISTED):
        rows = slice(start, min(start + _LISTED, len(source)))
        names = source.ids(rows)
        for row, (name, length) in enumerate(zip(names, source.lengths(rows).tolist(), strict=True), start):
            line = f"{name}\0{length}\n".encode()
            whole.update(line)
            place = row * len(marks) // len(source)
            marks[place] = (31 * marks[place] + zlib.crc32(line)) & 0xFF
    drawn = np.sort(sampled(source, _READ, seed, _STREAM))
    read = {
        name: hashlib.sha256(source.content(row)).hexdigest()
        for row, name in zip(drawn, source.ids(drawn), strict=True)
    }
    return {"fingerprint": whole.hexdigest(), "marks": base64.b64encode(marks).decode(), "read": read}


def difference(had: Fingerprint, source: Source, seed: int) -> str | None:
    """The first image that is another one than it was, in words; None where there is none."""
    has = fingerprint(source, seed)
    if has["fingerprint"] != had["fingerprint"]:
        return _first(had, has, source)
    changed = next((name for name, digest in has["read"].items() if had["read"].get(name) != digest), None)
    return None if changed is None else f"{changed!r} is another picture of the same size"


def _first(had: Fingerprint, has: Fingerprint, source: Source) -> str:
    before, now = (np.frombuffer(base64.b64decode(one["marks"]), np.uint8) for one in (had, has))
    if len(before) != len(now):
        return "their number is another"
    places = np.flatnonzero(before != now)
    if not len(places):
        return "a name or size is another"  # by chance no mark is
    first, last = (-(-place * len(source) // len(now)) for place in (int(places[0]), int(places[0]) + 1))
    names = source.ids([first, max(first, last - 1)])
    where = repr(names[0]) if last - first <= 1 else f"one of {names[0]!r} to {names[1]!r}"
    return f"{where} has another name or size than the image that was there"
