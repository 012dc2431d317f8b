"""An index filled by several processes: the bytes that one process writes, without torch; a killed process is told."""

import json
import subprocess
import sys

import faiss.contrib.torch_utils  # noqa: F401  as any library may: faiss then takes no subclass of arrays
import numpy as np
import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.embeddings import embeddings, filling
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.verbs.index import index

ROWS, PART = 5_000, 600  # nine parts
MEASURED = ("ms_per_query", "signature", "mapped")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A mixture of 40 clusters in 16 dimensions; two vectors have no direction."""
    monkeypatch.setattr(embeddings, "PART_ROWS", PART)
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, 16))
    vectors = (centres[random.integers(0, 40, ROWS)] + 0.3 * random.standard_normal((ROWS, 16))).astype(np.float32)
    vectors[[77, 4_321]] = 0
    Embeddings(vectors, np.full(ROWS, -1), (), [f"{row}.png" for row in range(ROWS)]).save(tmp_path / "EMB")
    return tmp_path / "EMB"


def made(folder):
    entry = json.loads((folder / "manifest.json").read_text())["index"]
    return (folder / "index.faiss").read_bytes(), {name: entry[name] for name in entry if name not in MEASURED}


# lists full of rows; a rotation before them; more lists than are ever filled, which FAISS writes otherwise
@pytest.mark.parametrize("key", ["IVF16,SQ8", "PCA8,IVF16,PQ4x4", "IVF512,SQ8"])
def test_several_processes_write_what_one_writes(folder, key, capsys):
    index(str(folder), key=key)
    one = made(folder)
    assert "2 vectors are zero" in capsys.readouterr().err
    index(str(folder), key=key, processes=2)
    assert made(folder) == one and "2 vectors are zero" in capsys.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["index"]["mapped"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".index")]


def test_the_command_has_no_torch(folder):
    code = (
        "import sys\nfrom ssl_kit import cli\n"
        f"sys.argv = ['ssl-kit', 'index', {str(folder)!r}, '--key', 'IVF16,SQ8', '--processes', '2', '--json']\n"
        "try:\n    cli.run()\nfinally:\n    assert 'faiss' in sys.modules and 'torch' not in sys.modules\n"
    )
    (folder.parent / "faiss.py").write_text("raise SystemExit('of a stranger, in the current folder')")
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == ROWS


@pytest.mark.parametrize("key", ["Flat", "IVF16,PQ8x4,Refine(Flat)", "HNSW8"])
def test_other_indexes_are_refused(folder, key):
    with pytest.raises(UserError, match="several processes make lists of plain codes, such as IVF4096,SQ8"):
        index(str(folder), key=key, processes=2)


def test_a_killed_process_is_told_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(filling, "_MOTHER", MOTHER.format("os.kill(os.getpid(), 9)"))
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="was killed, perhaps for memory: give fewer --processes"):
        index(str(folder), key="IVF16,SQ8", processes=2)
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == before


def test_processes_end_with_who_asked_for_them(folder, monkeypatch):
    job = {"scratch": str(folder), "processes": 2, "shards": [[]] * 3}
    np.save(folder / "queries.npy", np.zeros((3, 16), np.float32))
    program = [sys.executable, "-c", MOTHER.format("(print('begun', file=sys.stderr, flush=True), time.sleep(600))")]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    child.stdin.write(json.dumps(job).encode() + b"\n")
    child.stdin.flush()
    assert child.stderr.read(5) == b"begun"
    child.stdin.close()
    child.stderr.read()  # to its end: that of all who could write to it
    assert child.wait() == -9


MOTHER = """
import os, sys, time
from ssl_kit import core
core.light = True
from ssl_kit.embeddings import filling
def shard(job, number):
    {}
filling._shard = shard
filling.main()
"""
