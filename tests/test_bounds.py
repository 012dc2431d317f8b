"""What files of strangers make a process take: those that are refused, at most 64 MiB more than a small honest one.

Each case runs in a process of its own that has read a small honest file of the kind before. Its peak is reset then, so
that what is measured is what the file made it grow.
"""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_parquet import Long, listed, parquet, repeated, schema, varint

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data.tables import read_table
from ssl_kit.embeddings import Embeddings
from ssl_kit.parts import find_ids, read_rows, read_vectors

MIB = 2**20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ssl_kit.embeddings", "test_bounds"])
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def memory(name):
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measured(pipe, call, honest, path):
    """In the child: reads an honest file, then the other one."""
    call(honest)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it has now
    before, began = memory("VmRSS"), time.process_time()
    try:
        told = "returned", str(call(path))[:100]
    except UserError as error:
        told = "refused", str(error)
    except BaseException as error:
        told = "crashed", repr(error)
    pipe.send((*told, memory("VmHWM") - before, time.process_time() - began))


def grown(call, honest, path):
    """(what a call ended with, in words, bytes that it grew at its peak)."""
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=measured, args=(theirs, call, honest, path))
    child.start()
    theirs.close()
    kind, text, size, seconds = ours.recv() if ours.poll(120) else ("hung", "", 0, 120)
    child.kill()
    child.join()
    print(
        f"{call.__name__}: {Path(path).stat().st_size:,} bytes, {kind}, {size / MIB:.0f} MiB, {seconds:.1f} s: {text}"
    )
    return kind, text, size


def refused(call, honest, path):
    """The line that a call is refused with, in at most 64 MiB."""
    kind, text, size = grown(call, honest, path)
    assert kind == "refused" and size <= 64 * MIB and "\n" not in text, (kind, text[:300], size / MIB)
    return text


# --- lists of images


def words(*rows):
    return [f"{row:08d}.png" for row in rows]


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)


def of_one_path(path):
    path.write_bytes(repeated({"path": b"a.png"}, 10**8, padding=2_300_000))


def of_one_path_and_justified(path):
    path.write_bytes(repeated({"path": b"a.png"}, 9 * 10**6, padding=2_300_000))


def of_one_long_path(path):
    path.write_bytes(repeated({"path": b"a" * 10**6}, 10**5))


def of_long_labels(path):
    write(path, {"path": words(*range(1_000)), "label": pa.DictionaryArray.from_arrays([0] * 1_000, ["a" * 10**6])})


def of_packed_paths(path):
    write(path, {"path": ["a" * 10**5] * 5_000}, compression="zstd", use_dictionary=False)


def of_packed_labels(path):
    columns = {"path": words(*range(5_000)), "label": ["a" * 10**5] * 5_000}
    write(path, columns, compression="zstd", use_dictionary=False)


def of_paths_that_share_their_beginning(path):
    columns = {"path": [f"{'a' * 10**5}{row}" for row in range(3_000)]}
    write(path, columns, compression="zstd", use_dictionary=False, column_encoding={"path": "DELTA_BYTE_ARRAY"})


def of_many_numbered_paths(path):
    options = {"compression": "zstd", "use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    write(path, {"path": words(*range(10**6))}, **options)


def of_a_footer_that_promises_columns(path):
    path.write_bytes(parquet({1: 2, 2: schema("path"), 3: Long(1), 4: [{1: listed(10**6), 2: Long(1), 3: Long(1)}]}))


def of_a_footer_that_promises_a_schema(path):
    path.write_bytes(parquet({1: 2, 2: listed(10**6), 3: Long(1), 4: []}))


def of_a_footer_of_nothing(path):
    path.write_bytes(parquet({1: 2, 2: schema("path"), 3: Long(0), 4: [], 5: listed(10**6, bytes(10**6))}))


def of_many_columns(path):
    path.write_bytes(parquet({1: 2, 2: schema("path", *map(str, range(10**5))), 3: Long(0), 4: []}))


def of_one_page_for_all(path):
    path.write_bytes(repeated({"path": b"a.png"}, 10**5, groups=1_000))


def of_nested_paths(path):
    write(path, {"path": [[{"a": "x" * 100}] * 1_000] * 300}, compression="zstd")


TABLES = [
    (of_one_path, "100,000,000 rows"),
    (of_one_path_and_justified, "rows 1 and 2 have the path 'a.png'"),
    (of_one_long_path, "more than 4,096 characters"),
    (of_long_labels, "more than 4,096 characters"),
    (of_packed_paths, "wanted a list of images"),
    (of_packed_labels, "wanted a list of images"),
    (of_paths_that_share_their_beginning, "more than 4,096 characters"),
    (of_many_numbered_paths, "1,000,000 rows"),
    (of_a_footer_that_promises_columns, "cannot be read as Parquet"),
    (of_a_footer_that_promises_a_schema, "cannot be read as Parquet"),
    (of_a_footer_of_nothing, "cannot be read as Parquet"),
    (of_many_columns, "cannot be read as Parquet"),
    (of_one_page_for_all, "cannot be read as Parquet"),
    (of_nested_paths, "holds 'list"),
]


@pytest.mark.parametrize(("make", "told"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_parquet_lists(tmp_path, make, told):
    write(tmp_path / "honest.parquet", {"path": words(1, 2), "label": ["a", "b"]})
    make(tmp_path / "list.parquet")
    assert told in refused(read_table, tmp_path / "honest.parquet", tmp_path / "list.parquet")


def rows_of_two_bytes(path):
    path.write_text("path,label\n" + ",\n" * 3_000_000)


def one_path_for_ever(path):
    path.write_text("path\n" + "a\n" * 3_000_000)


def one_line(path):
    with open(path, "wb") as file:
        file.write(b"path\n")
        file.truncate(300_000_000)


def one_row_of_many_lines(path):
    path.write_text("path\n" + '"' + 'a\n","' * 5_000_000)


def a_header_of_columns(path):
    path.write_text("path," + "label," * 5_000_000)


LISTS = [
    (rows_of_two_bytes, "an empty 'path'"),
    (one_path_for_ever, "rows 1 and 2 have the path 'a'"),
    (one_line, "a row of more than 1,048,576 characters"),
    (one_row_of_many_lines, "a row of more than 1,048,576 characters"),
    (a_header_of_columns, "a row of more than 1,048,576 characters"),
]


@pytest.mark.parametrize(("make", "told"), LISTS, ids=lambda value: getattr(value, "__name__", ""))
def test_csv_lists(tmp_path, make, told):
    (tmp_path / "honest.csv").write_text("path,label\na.png,a\nb.png,b\n")
    make(tmp_path / "list.csv")
    assert told in refused(read_table, tmp_path / "honest.csv", tmp_path / "list.csv")


DELTA = {"use_dictionary": ["label"], "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
DENSE = {"compression": "zstd", "compression_level": 19, "row_group_size": 100_000}


@pytest.mark.parametrize("options", [{}, DENSE, DELTA, {"use_dictionary": False, "data_page_version": "2.0"}])
def test_honest_lists_are_read_whatever_wrote_them(tmp_path, options):
    rows, path = range(300_000), tmp_path / "list.parquet"
    write(path, {"path": words(*rows), "label": [f"class {row % 1_000}" for row in rows]}, **options)
    ids, names = read_table(path)
    assert ids == words(*rows) and names[-1] == "class 999" and len(set(map(id, names))) == 1_000


# --- parts of embeddings


def folder_of(place, rows=64, dims=4):
    vectors = np.ones((rows, dims), np.float32)
    labels, ids = np.zeros(rows, np.int64), [f"{row}.png" for row in range(rows)]
    return Embeddings(vectors, labels, ("a",), ids, {}).save(place)


def rewrite(folder, manifest=None, **columns):
    """The folder as a stranger would rewrite it: all hashes are right. Options of the writer begin with `_`."""
    options = {name[1:]: columns.pop(name) for name in [*columns] if name.startswith("_")}
    part = folder / "part-00000.parquet"
    table = pq.read_table(part) if columns.keys() < {"id", "label", "embedding"} else pa.table(columns)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, part, **options)
    resealed(folder, manifest)


def resealed(folder, manifest=None):
    entries = read_sealed(folder / "manifest.json") | (manifest or {})
    entries["files"] = {name: sha256(folder / name) for name in entries["files"]}
    write_sealed(folder / "manifest.json", entries)


def ids_of_gigabytes(folder):
    ids = pa.array([f"{row}" + "a" * 3_000_000 for row in range(64)])
    rewrite(folder, id=ids, _compression="zstd", _use_dictionary=False)
    part = folder / "part-00000.parquet"  # its footer lies about it
    said = varint(pq.read_metadata(part).row_group(0).total_byte_size << 1)
    part.write_bytes(part.read_bytes().replace(said, varint(2 << 7 * (len(said) - 1))))
    resealed(folder)


def labels_of_gigabytes(folder):
    rewrite(folder, label=pa.DictionaryArray.from_arrays([0] * 64, ["a" * 3_000_000]).cast(pa.string()))


def ids_that_share_their_beginning(folder):
    ids = pa.array([f"{'a' * 3_000_000}{row}" for row in range(64)])
    options = {"_use_dictionary": False, "_column_encoding": {"id": "DELTA_BYTE_ARRAY"}, "_compression": "zstd"}
    rewrite(folder, id=ids, **options)


def vectors_out_of_a_dictionary(folder):
    rows, dims = 65_536, 512
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(rows * dims, np.float32)), dims)
    ids = pa.array([str(row) for row in range(rows)])
    rewrite(folder, {"dims": dims, "rows": 1}, id=ids, label=pa.array([None] * rows, pa.string()), embedding=vectors)


def a_footer_of_columns(folder):
    of_a_footer_that_promises_columns(folder / "part-00000.parquet")
    resealed(folder)


def all_vectors(folder):
    return sum(map(len, read_vectors(folder, read_sealed(folder / "manifest.json"))))


def all_ids(folder):
    return len(find_ids(folder, read_sealed(folder / "manifest.json"), ["63.png", "nothing"]))


def one_id(folder):
    return read_rows(folder, read_sealed(folder / "manifest.json"), np.array([0]), "id")


def one_vector(folder):
    return read_rows(folder, read_sealed(folder / "manifest.json"), np.array([0]), "embedding")


PARTS = {
    ids_of_gigabytes: (all_vectors, all_ids, one_id),
    labels_of_gigabytes: (all_vectors,),
    ids_that_share_their_beginning: (all_vectors, all_ids, one_id),
    vectors_out_of_a_dictionary: (all_vectors, one_vector),
    a_footer_of_columns: (all_ids, one_id, one_vector),
}


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_parts_of_embeddings(tmp_path, make):
    honest, folder = folder_of(tmp_path / "honest"), folder_of(tmp_path / "EMB")
    make(folder)
    for read in PARTS[make]:
        assert "part-00000.parquet" in refused(read, honest, folder)
