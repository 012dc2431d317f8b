"""Reading files that may come from a stranger: sizes are capped before parsing, what is odd becomes an exception.

`attempt` turns every exception that damaged content can cause into one sentence, so that a file that is cut short or
altered costs its own section and not the report.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_kit.core.files import DamagedError, read_json

MAX_TEXT = 64 * 2**20  # bytes read of a CSV file or of results.jsonl
MAX_COUNT = 2**53  # of images; larger numbers are no counts, and overflow int64
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def attempt(folder: Path, name: str, reader: Callable[[Path], Any], default: Any, problems: list[str]) -> Any:
    """What `reader` makes of a file, `default` where it is missing or damaged; damage is noted in `problems`."""
    path = folder / name
    if not path.is_file():
        return default
    try:
        return reader(path)
    except (DamagedError, ValueError, TypeError, KeyError, IndexError, OSError, csv.Error, OverflowError) as error:
        problems.append(f"{name} could not be read: {error}")
        return default


def number(value: Any) -> float | None:
    """`value` as a finite float, otherwise None; a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def share(value: Any) -> float:
    """A number in [0, 1], up to rounding; anything else is a ValueError."""
    found = number(value)
    if found is None or not -1e-6 <= found <= 1 + 1e-6:
        raise ValueError(f"{str(value)[:40]!r} is no fraction in [0, 1]")
    return min(max(found, 0.0), 1.0)


def cell(text: Any) -> float:
    """A cell of a CSV file, NaN where it holds no finite number: the last line may be half written."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def count(value: Any) -> int:
    """A number of images: a whole number from 0 on; anything else is a ValueError."""
    found = int(value)
    if not 0 <= found < MAX_COUNT:
        raise ValueError(f"{str(value)[:40]} is no number of images")
    return found


def text(path: Path, limit: int = MAX_TEXT) -> str:
    """At most `limit` bytes of a file as UTF-8; what is none becomes a replacement character."""
    with open(path, "rb") as file:
        return file.read(limit).decode("utf-8", errors="replace")


def csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not empty, its header among them."""
    return [row for row in csv.reader(io.StringIO(text(path), newline="")) if row]


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def thumbnails(images: Any) -> list[str]:
    """A list of base64 strings, so that nothing of a file can become markup, script or an address."""
    if not isinstance(images, list) or not all(isinstance(one, str) and _BASE64.fullmatch(one) for one in images):
        raise ValueError("`images` must be a list of base64 strings")
    return images
