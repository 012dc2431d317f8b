"""Headers of Parquet files: what is told of them is what pyarrow makes of them; lies and damage are one error."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_parquet import Long, parquet, repeated, schema, thrift

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.parquet import batches, contents, types

ROWS = 5_000
TABLE = {
    "path": [f"{row:08d}.png" for row in range(ROWS)],
    "label": [None if row % 7 == 0 else f"class {row % 5}" for row in range(ROWS)],
    "number": list(range(ROWS)),
    "list": [[row, row + 1] for row in range(ROWS)],
}
WRITERS = [
    {},
    {"compression": "none", "use_dictionary": False},
    {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 700},
    {"use_dictionary": ["label"], "column_encoding": {"path": "DELTA_BYTE_ARRAY", "number": "DELTA_BINARY_PACKED"}},
    {"write_statistics": False, "store_schema": False, "data_page_size": 500, "write_page_index": True},
]


@pytest.fixture(params=WRITERS, ids=lambda options: "-".join(options) or "default")
def file(request, tmp_path):
    pq.write_table(pa.table(TABLE), tmp_path / "x.parquet", **request.param)
    return tmp_path / "x.parquet", request.param


def test_headers_tell_what_pyarrow_reads(file):
    path, options = file
    inside, metadata = contents(path, [*TABLE, "more"]), pq.read_metadata(path)
    assert inside.names == list(TABLE) == list(inside.columns) and inside.size == path.stat().st_size
    for place, name in enumerate(TABLE):
        column = inside.columns[name]
        assert column.rows == ROWS * (2 if name == "list" else 1)
        with_headers = sum(
            metadata.row_group(group).column(place).total_uncompressed_size for group in range(metadata.num_row_groups)
        )
        assert 0.5 * with_headers < column.unpacked < with_headers and 0 < column.largest <= column.unpacked
    assert inside.columns["path"].whole != ("column_encoding" in options)
    assert inside.columns["label"].repeats == (options.get("use_dictionary") is not False)


def test_batches_are_the_table(file):
    path, _ = file
    inside = contents(path, ("label", "path"))
    assert types(path, inside) == {"path": pa.string(), "label": pa.string()}
    for rows, text in ((2**14, 2**23), (999, 2**23), (2**14, 5_000)):
        read = pa.Table.from_batches(batches(path, inside, rows, text)).to_pydict()
        assert read == {name: TABLE[name] for name in ("path", "label")}


def test_a_long_word_of_a_dictionary_makes_batches_short(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(repeated({"path": b"a" * 1_000}, 500))
    sizes = [len(batch) for batch in batches(path, contents(path, ["path"]), 100, 10_000)]
    assert sizes == [10] * 50


def test_every_cut_is_told(file):
    path, _ = file
    data = path.read_bytes()
    for cut in (*range(0, len(data), len(data) // 97), len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedError, match="cannot be read as Parquet"):
            contents(path, list(TABLE))


def footer(**changes):
    """A file of one column and one group of rows that says what it should not."""
    said = {1: 6, 2: [0], 3: [b"path"], 4: 0, 5: Long(1), 6: Long(20), 7: Long(20), 9: Long(4)}
    column = {2: Long(4), 3: said | changes.get("column", {})}
    columns = changes.get("columns", [column])
    group = {1: columns, 2: Long(20), 3: Long(1)}
    return {1: 2, 2: changes.get("schema", schema("path")), 3: Long(1), 4: [group], **changes.get("more", {})}


@pytest.mark.parametrize(
    "said",
    [
        footer(column={7: Long(10**6)}),
        footer(column={9: Long(10**9)}),
        footer(columns=[]),
        footer(columns=[{2: Long(4)}]),
        footer(schema=schema("path", "path")),
        footer(schema=[{4: b"schema", 5: 2}, *schema("path")[1:]]),
        footer(schema=[*schema("path"), *schema("more")[1:]]),
        footer(schema=[{4: b"schema", 5: 1}] * 50),
        footer(schema=[{4: b"schema", 5: 1}, {4: b"path", 3: 0}]),  # neither a leaf nor a group
    ],
)
def test_footers_that_contradict_themselves_are_refused(tmp_path, said):
    (tmp_path / "x.parquet").write_bytes(parquet(said, bytes(40)))
    with pytest.raises(DamagedError, match="cannot be read as Parquet"):
        contents(tmp_path / "x.parquet", ["path"])


def test_a_field_that_comes_twice_is_refused(tmp_path):
    """Arrow may take the first one, and then reads other pages than were looked at."""
    good = repeated({"path": b"a.png"}, 3)
    (tmp_path / "x.parquet").write_bytes(good)
    assert contents(tmp_path / "x.parquet", ["path"]).columns["path"].rows == 3
    length = int.from_bytes(good[-8:-4], "little")
    start, data = good[: -8 - length], good[-8 - length : -8]
    again = data[:-1] + b"\x05" + b"\x02" + thrift(9)[1] + b"\0"  # its version once more, by its full number
    (tmp_path / "x.parquet").write_bytes(start + again + len(again).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DamagedError, match="no order"):
        contents(tmp_path / "x.parquet", ["path"])
