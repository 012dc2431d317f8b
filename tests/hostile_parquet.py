"""Parquet files that no writer makes: a few bytes that stand for gigabytes, headers that lie."""

import struct

BYTE_ARRAY, UTF8, PLAIN, RLE_DICTIONARY = 6, 0, 0, 8


class Raw(bytes):
    """Bytes of a Thrift list as they are to be written."""


class Long(int):
    """A whole number of 64 bits."""


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def listed(count, data=b""):
    """A list that says it has `count` structures."""
    return Raw(b"\xfc" + varint(count) + data)


def thrift(value):
    """(type, bytes) of a value in Thrift's compact protocol; a dict is a structure."""
    match value:
        case Raw():
            return 9, value
        case Long():
            return 6, varint(value << 1)
        case int():
            return 5, varint(value << 1)
        case bytes():
            return 8, varint(len(value)) + value
        case list():
            items = [thrift(item) for item in value]
            kind = items[0][0] if items else 12
            return 9, bytes([0xF0 | kind]) + varint(len(items)) + b"".join(data for _, data in items)
        case dict():
            out, last = b"", 0
            for number, inner in sorted(value.items()):
                kind, data = thrift(inner)
                out, last = out + bytes([number - last << 4 | kind]) + data, number
            return 12, out + b"\0"
    raise TypeError(value)


def parquet(footer, body=b""):
    """A file of a footer (FileMetaData) and what lies before it."""
    data = thrift(footer)[1]
    return b"PAR1" + body + data + struct.pack("<I", len(data)) + b"PAR1"


def schema(*names):
    """Required text columns."""
    return [{4: b"schema", 5: len(names)}, *({1: BYTE_ARRAY, 3: 0, 4: name.encode(), 6: UTF8} for name in names)]


def repeated(columns, rows, padding=0, groups=1):
    """A file of text columns in which one value stands in every row: {name: value}; all groups have the same pages."""
    body, pieces = bytes(padding), []
    for name, value in columns.items():
        word, run = struct.pack("<I", len(value)) + value, b"\x01" + varint(rows << 1) + b"\0"
        dictionary = page(word, {1: 2, 7: {1: 1, 2: PLAIN}})
        data = page(run, {1: 0, 5: {1: rows, 2: RLE_DICTIONARY, 3: 3, 4: 3}})  # bits of an index, times, index
        start, length = 4 + len(body), len(dictionary) + len(data)
        said = {1: BYTE_ARRAY, 2: [PLAIN, RLE_DICTIONARY], 3: [name.encode()], 4: 0, 5: Long(rows), 6: Long(length)}
        said |= {7: Long(length), 9: Long(start + len(dictionary)), 11: Long(start)}
        pieces.append({2: Long(start), 3: said})
        body += dictionary + data
    group = {1: pieces, 2: Long(len(body)), 3: Long(rows)}
    return parquet({1: 2, 2: schema(*columns), 3: Long(rows * groups), 4: [group] * groups}, body)


def page(data, header):
    """One that is not packed."""
    return thrift(header | {2: len(data), 3: len(data)})[1] + data
