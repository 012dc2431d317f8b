"""An embeddings folder read by other tools as it stands: the same ids, labels and vectors, in the same order.

The Python of docs/interchange.md runs here.
"""

import os
import re
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ssl_kit.embeddings.embeddings as module
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.verbs.index import index

PAGE = Path(__file__).parent.parent / "docs" / "interchange.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interchange") / "EMB"
    vectors = np.random.default_rng(0).standard_normal((23, 6)).astype(np.float32)
    vectors *= np.linspace(0.2, 5, 23, dtype=np.float32)[:, None]  # so that only the cosine gives its order
    ids = [f"{row:02d}/é%FF😀.png" for row in range(23)]
    before = module.PART_ROWS
    module.PART_ROWS = 10
    try:
        made = Embeddings(vectors, np.arange(23) % 3 - 1, ("cat", "dög"), ids, {"source_root": "/root%FF"})
        made.save(folder)
        made.save(folder.with_name("EMB16"), "float16")
    finally:
        module.PART_ROWS = before
    index(str(folder))
    return folder, made


def same(made, ids, labels, vectors):
    assert list(ids) == made.ids
    assert [label if isinstance(label, str) else None for label in labels] == [
        made.classes[label] if label >= 0 else None for label in made.labels
    ]
    assert np.array_equal(np.stack([np.asarray(vector, dtype=np.float32) for vector in vectors]), made.vectors)


def test_duckdb(saved):
    duckdb = pytest.importorskip("duckdb")
    folder, made = saved
    rows = duckdb.sql(f"select id, label, embedding from read_parquet('{folder}/part-*.parquet')").fetchall()
    same(made, *zip(*rows, strict=True))
    kind = duckdb.sql(f"select typeof(embedding) from read_parquet('{folder}/part-*.parquet') limit 1").fetchall()[0][0]
    assert kind in ("FLOAT[6]", "FLOAT[]")
    nearest = duckdb.sql(
        f"with e as (select id, embedding::float[6] as v from read_parquet('{folder}/part-*.parquet')) "
        "select b.id from e a, e b where a.id = $id order by array_cosine_similarity(a.v, b.v) desc limit 3",
        params={"id": made.ids[7]},
    ).fetchall()
    units = made.normalised().vectors
    assert [row[0] for row in nearest] == [made.ids[row] for row in np.argsort(-(units @ units[7]))[:3]]


def test_pandas(saved):
    pandas = pytest.importorskip("pandas")
    folder, made = saved
    table = pandas.concat(map(pandas.read_parquet, sorted(folder.glob("part-*.parquet"))))
    same(made, table["id"], table["label"], table["embedding"])


def test_polars(saved):
    polars = pytest.importorskip("polars")
    folder, made = saved
    table = polars.read_parquet(folder / "part-*.parquet")
    assert table.schema["embedding"] == polars.Array(polars.Float32, 6)
    same(made, table["id"], table["label"], table["embedding"].to_list())
    assert np.array_equal(table["embedding"].to_numpy(), made.vectors)


@pytest.mark.parametrize("tool", ["duckdb", "polars", "pandas", "lancedb"])
def test_half_floats(saved, tool, tmp_path):
    library = pytest.importorskip(tool)
    folder = saved[0].with_name("EMB16")
    parts = sorted(folder.glob("part-*.parquet"))
    if tool == "duckdb":
        rows = library.sql(f"select embedding from read_parquet('{folder}/part-*.parquet')").fetchall()
        vectors = np.array([row[0] for row in rows], dtype=np.float32)
    elif tool == "polars":
        vectors = library.read_parquet(folder / "part-*.parquet")["embedding"].to_numpy().astype(np.float32)
    elif tool == "lancedb":
        table = library.connect(tmp_path).create_table(
            "images", pq.ParquetDataset([str(part) for part in parts]).read()
        )
        vectors = np.array(table.to_arrow()["embedding"].to_pylist(), dtype=np.float32)
        nearest = table.search(vectors[7], vector_column_name="embedding").distance_type("cosine").limit(1).to_list()
        assert nearest[0]["id"] == saved[1].ids[7]
    else:
        table = library.concat(map(library.read_parquet, parts))
        vectors = np.stack(table["embedding"]).astype(np.float32)
    assert np.array_equal(vectors, saved[1].vectors.astype(np.float16).astype(np.float32))


@pytest.fixture
def on_the_page(saved, tmp_path, monkeypatch):
    """(section, number) -> what is defined after running a Python block of docs/interchange.md beside a folder EMB."""
    (tmp_path / "EMB").symlink_to(saved[0])
    monkeypatch.chdir(tmp_path)

    def run(section, number=0):
        text = PAGE.read_text(encoding="utf-8").split(f"# {section}\n")[1].split("\n## ")[0]
        Path("block.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number], encoding="utf-8")
        return runpy.run_path("block.py")

    return run


def three_nearest(made, row):
    units = made.normalised().vectors
    return [made.ids[row] for row in np.argsort(-(units @ units[row]))[:3]]


def test_the_page_names_the_file_of_an_id(saved, on_the_page):
    path = on_the_page("Embeddings in other tools")["path"]
    assert path(saved[1].ids[7]) == os.fsencode("/root") + b"\xff/07/\xc3\xa9\xff\xf0\x9f\x98\x80.png"


@pytest.mark.parametrize(
    ("section", "number", "tool"),
    [
        ("numpy and PyTorch", 0, "torch"),
        ("numpy and PyTorch", 1, "torch"),
        ("DuckDB", 0, "duckdb"),
        ("pandas", 0, "pandas"),
        ("polars", 0, "polars"),
    ],
)
def test_the_page_reads_what_was_saved(saved, on_the_page, section, number, tool):
    pytest.importorskip(tool)
    found = on_the_page(section, number)
    same(saved[1], found["ids"], found["labels"], found["vectors"])
    if "tensor" in found:
        assert np.array_equal(found["tensor"].numpy(), saved[1].vectors)
    if tool == "duckdb":
        assert [row[0] for row in found["nearest"]] == three_nearest(saved[1], 7)


def test_the_page_finds_ids_by_rows_of_the_index(saved, on_the_page):
    found, made = on_the_page("FAISS"), saved[1]
    cosines = made.normalised().vectors @ found["query"][0]
    assert found["nearest"] == [made.ids[row] for row in np.argsort(-cosines)[:3]]


def test_the_page_searches_in_lancedb(saved, on_the_page):
    pytest.importorskip("lancedb")
    found, made = on_the_page("LanceDB"), saved[1]
    assert [row["id"] for row in found["nearest"]] == three_nearest(made, 7)
    table = found["table"].to_arrow()
    same(made, table["id"].to_pylist(), table["label"].to_pylist(), table["embedding"].to_pylist())
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 6)


def test_the_page_makes_lists_for_older_milvus(saved, on_the_page):
    on_the_page("Milvus", 2)
    tables = [pq.read_table(path) for path in sorted(Path("lists").glob("*"))]
    assert [len(table) for table in tables] == [10, 10, 3]
    assert all(pa.types.is_list(table.schema.field("embedding").type) for table in tables)
    vectors = [vector for table in tables for vector in table["embedding"].to_pylist()]
    assert np.array_equal(np.array(vectors, dtype=np.float32), saved[1].vectors)
