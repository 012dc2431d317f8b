"""JSON files of strangers: read within bounds, and sealed so that any later change of them is noticed.

A sealed file holds, beside its entries, the sha256 of them. That finds damage; it does not prove who wrote a file:
whoever can rewrite the entries can rewrite the seal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ssl_kit.core.errors import DamagedError

SEAL = "seal"
MAX_JSON = 8 * 2**20  # bytes; larger JSON is refused before it is parsed
LARGE_JSON = 64 * 2**20  # where names of many classes or files may be listed
# Bytes that one list or dict, and one value, take in a file on average, at least: `[[],[],...` fills 20 times its size
_PER_CONTAINER, _PER_VALUE = 80, 20
_DEEPEST = 100

Entries: TypeAlias = dict[str, Any]  # of a JSON file: what it says, by name; who reads a stranger's checks each


def read_json(path: Path | str, limit: int = MAX_JSON) -> Any:
    """Reads JSON of at most `limit` bytes; missing, damaged or oversized files raise `DamagedError` with their path."""
    path = Path(path)
    if not path.is_file():  # a pipe or a device would block
        raise DamagedError(f"{path} is missing")
    try:
        if (size := path.stat().st_size) > limit:
            raise DamagedError(f"{path} has {size:,} bytes; JSON files here stay below {limit:,}")
        data = path.read_bytes()
    except FileNotFoundError as error:  # since then, for its folder is being replaced
        raise DamagedError(f"{path} is missing") from error
    return parse_json(data, path, limit)


def read_object(path: Path | str, limit: int = MAX_JSON) -> Entries:
    """What `read_json` reads, which has to be an object: anything else is a `DamagedError`, too."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def parse_json(data: bytes, path: Path, limit: int = MAX_JSON) -> Any:
    """JSON in UTF-8 of finite numbers; refuses text that would fill far more memory than its own bytes, or nests deep.

    Raises:
        DamagedError: naming `path`.
    """
    containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    if containers > limit // _PER_CONTAINER or values > limit // _PER_VALUE:
        raise DamagedError(f"{path} holds {values:,} values in {containers:,} lists; more than any file here has")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise DamagedError(f"{path} is not JSON: {error}") from error
    if containers > _DEEPEST:
        _check_depth(value, path)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity, 1e999
        raise ValueError(f"{text} is no finite number")
    return value


def _check_depth(value: object, path: Path) -> None:
    """Writing it again, for its seal, recurses where reading does not."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        if not level:
            return
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for container in inside for one in container]
    raise DamagedError(f"{path} has more than {_DEEPEST} lists inside each other; more than any file here has")


def read_sealed(path: Path | str, limit: int = MAX_JSON) -> Entries:
    """The entries of a sealed file.

    Raises:
        DamagedError: it is no sealed file, or was altered since it was written.
    """
    entries = read_json(path, limit)
    if not isinstance(entries, dict) or not isinstance(entries.get(SEAL), str):
        raise DamagedError(f"{path} has no {SEAL!r}; expected what ssl_kit writes")
    wanted = entries.pop(SEAL)
    got = fingerprint(entries)
    if got != wanted:
        raise DamagedError(f"{path} is damaged: its entries have sha256 {got[:12]}..., its seal is {wanted[:12]!r}...")
    return entries


def sealed(entries: Mapping[str, object]) -> Entries:
    """The entries with their seal."""
    return {**entries, SEAL: fingerprint(entries)}


def fingerprint(value: object) -> str:
    """Hex sha256 of what JSON can hold, whatever the order of its keys."""
    plain = json.loads(json.dumps(value))  # keys that are numbers become text, and sort as such
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
