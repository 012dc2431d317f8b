"""Damaged copies of files: bits, fields, blocks, words; drawn from a generator, so that every copy can be made again.

Random bits alone hardly reach the interesting places of a binary format. Here numbers that look like counts or offsets
(small integers of 4 and 8 bytes) are replaced by the numbers that break readers, and parts of other files are grafted
on; JSON and YAML are changed word by word.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence

INTEGERS = (0, 1, 2, 3, 7, 8, 255, 256, 4095, 65_535, 65_536, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"), 1e300)
WORDS = (
    *("0", "-1", "1e999", "NaN", "null", "true", "[]", "{}", '""', "9" * 25, "9" * 5_000, "[" * 2_000, '"\\u0000"'),
    *('"../../x"', '"/dev/zero"', '"hf-hub:a/b"', '"os.system"', "!!python/object/apply:os.system [true]", "&a [*a]"),
    *("1.5", "1048577", "- ", ": ", "#", '"ssl_kit.verbs.pretrain.os.system"', '"\ud7ff"', "0x10", "1_000", "~", "\t"),
)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[A-Za-z_][\w.]*|[^\s\w]')


def damaged(data: bytes, draw: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """A copy with one to three damages, different from the original."""
    while True:
        made = data
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            made = draw.choice(_DAMAGES)(made, draw, others)
        if made != data:
            return made


def damaged_text(data: bytes, draw: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """The same for JSON and YAML: words are replaced, removed, repeated or exchanged; now and then bytes are."""
    if draw.random() < 0.25:
        return damaged(data, draw, others)
    while True:
        made = data
        for _ in range(draw.choice((1, 1, 2, 3))):
            made = _word(made, draw)
        if made != data:
            return made


def _word(data: bytes, draw: random.Random) -> bytes:
    tokens = list(_TOKEN.finditer(data))
    if not tokens:
        return data + b"["
    one, other = sorted((draw.choice(tokens), draw.choice(tokens)), key=lambda token: token.start())
    kind = draw.randrange(5)
    if kind <= 1:
        return data[: one.start()] + draw.choice(WORDS).encode() + data[one.end() :]
    if kind == 2:
        return data[: one.start()] + data[one.end() :]
    if kind == 3:
        return data[: one.end()] + other.group() + data[one.end() :]
    if one.end() > other.start():
        return data
    between = data[one.end() : other.start()]
    return data[: one.start()] + other.group() + between + one.group() + data[other.end() :]


def _bits(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        if made:
            made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    return bytes(made)


def _bytes(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    made = bytearray(data)
    for _ in range(draw.choice((1, 4, 16))):
        if made:
            made[_place(made, draw)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(made)


def _integer(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """One number that looks like a count is replaced."""
    size = draw.choice((4, 8))
    for _ in range(64):  # places are drawn until one holds a small number
        place = _place(data, draw)
        value = int.from_bytes(data[place : place + size], "little")
        if value < 2**24 and place + size <= len(data):
            near = value + draw.choice((-1, 1, 2, -value))
            wanted = near if draw.random() < 0.3 else draw.choice(INTEGERS)
            return data[:place] + (wanted % 2 ** (8 * size)).to_bytes(size, "little") + data[place + size :]
    return data


def _float(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    place, value = _place(data, draw), draw.choice(FLOATS)
    made = struct.pack("<d", value) if draw.random() < 0.3 or abs(value) == 1e300 else struct.pack("<f", value)
    return data[:place] + made + data[place + len(made) :]


def _block(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """A stretch is removed, repeated, zeroed, or moved; or the file is cut or grows."""
    start, length = _place(data, draw), draw.choice((1, 4, 8, 16, 64, 1_000))
    stretch, rest = data[start : start + length], data[start + length :]
    return draw.choice(
        (
            data[:start] + rest,
            data[:start] + stretch + stretch + rest,
            data[:start] + bytes(len(stretch)) + rest,
            data[:start] + b"\xff" * len(stretch) + rest,
            rest + data[:start] + stretch,
            data[:start],
            data + bytes(draw.randrange(1, 100)),
        )
    )


def _graft(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """The end of another file after the beginning of this one, or a stretch of it in the place of one."""
    if not others:
        return _block(data, draw, others)
    other = draw.choice(others)
    start, place, length = _place(data, draw), _place(other, draw), draw.choice((4, 8, 40, 400, len(other)))
    if draw.random() < 0.5:
        return data[:start] + other[place:]
    return data[:start] + other[place : place + length] + data[start + length :]


def _place(data: bytes | bytearray, draw: random.Random) -> int:
    """An offset; half of them in the first 256 bytes or the last 64, where headers and footers are."""
    last = max(len(data) - 1, 0)
    kind = draw.random()
    if kind < 0.4:
        return draw.randint(0, min(255, last))
    return draw.randint(max(0, last - 64), last) if kind < 0.5 else draw.randint(0, last)


_DAMAGES = (_bits, _bytes, _integer, _integer, _integer, _float, _block, _graft)
