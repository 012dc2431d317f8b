"""Ray, Milvus and LanceDB as they are: `make engines`. Rows equal to the plain command's whatever is killed; recall."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_kit.embeddings import embeddings
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, search

for engine in ("ray", "pymilvus", "lancedb"):
    pytest.importorskip(engine)
PAGE = Path(__file__).parent.parent.parent / "docs" / "interchange.md"
QUERIES = 1_000
# the command with parts of 1,000 images; what is defined here goes to the workers
COMMAND = """
import os, sys
from ssl_kit import cli
from ssl_kit.embeddings import embeddings
from ssl_kit.verbs import embed as verb

embeddings.PART_ROWS = 1_000

def worker(settings, place, threads):
    from ssl_kit.embeddings import embeddings
    from ssl_kit.verbs.embed import _worker

    embeddings.PART_ROWS = 1_000
    make = _worker(settings, place, threads)
    return lambda number: os.kill(os.getpid(), 9) if number == KILLS else make(number)

KILLS = {}
verb._worker = worker
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def images_10_000(tmp_path_factory):
    """10,000 images of 16 px, three of them broken."""
    folder, random = tmp_path_factory.mktemp("many") / "images", np.random.default_rng(0)
    folder.mkdir()
    for number, pixels in enumerate(random.integers(0, 256, (10_000, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")
    for number in (7, 5_000, 9_999):
        (folder / f"{number:05d}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def embed(encoder, images_10_000):
    """Starts `ssl-kit embed` with parts of 1,000 images; a worker that begins part `kills` is killed."""

    def start(out, *options, kills=None):
        words = ["embed", str(encoder), str(images_10_000), "--out", str(out), "--precision", "float32", *options]
        program = [sys.executable, "-c", COMMAND.replace("{}", str(kills)), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)

    return start


def ended(child):
    _, said = child.communicate(timeout=900)
    return child.returncode, said


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", "manifest.json")}


def workers():
    """Of Ray, by their process ids."""
    names = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"ray::MapWorker" in path.read_bytes()]
    return [int(path.parent.name) for path in names]


def wait_for(what):
    until = time.monotonic() + 600
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_rows_by_ray_are_those_of_the_plain_command_whatever_is_killed(embed, tmp_path):
    assert ended(embed(tmp_path / "plain"))[0] == 0
    child = embed(tmp_path / "ray", "--engine", "ray")
    wait_for(lambda: list((tmp_path / "ray").glob("part-*.json")))
    child.kill()
    child.communicate()
    wait_for(lambda: not workers())  # Ray ends with who began it
    made = len(list((tmp_path / "ray").glob("part-*.json")))
    assert 0 < made < 10 and not (tmp_path / "ray" / "manifest.json").exists()
    child = embed(tmp_path / "ray", "--engine", "ray")
    wait_for(lambda: len(list((tmp_path / "ray").glob("part-*.json"))) > made)
    os.kill(workers()[0], signal.SIGKILL)
    code, said = ended(child)
    assert code == 0, said
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
    assert len(Embeddings.load(tmp_path / "ray")) == 9_997


def test_a_part_that_kills_its_workers_ends_the_command_in_words(embed, tmp_path):
    code, said = ended(embed(tmp_path / "ray", "--engine", "ray", kills=3))
    assert code == 2 and "Ray cannot go on" in said and "the same command goes on" in said, said
    assert len(list((tmp_path / "ray").glob("part-*.json"))) > 1


def test_what_a_worker_refuses_is_said_as_here(embed, tmp_path):
    code, said = ended(embed(tmp_path / "ray", "--engine", "ray", "--max-bad", "0"))
    assert code == 2 and said.splitlines()[-1].startswith("ssl-kit: ") and "--max-bad" in said.splitlines()[-1], said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder EMB of 20,000 vectors in three parts, 1,000 vectors more, and their ten nearest ids."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((200, 64))
    count = 20_000 + QUERIES
    vectors = centres[random.integers(0, 200, count)] + 0.7 * random.standard_normal((count, 64))
    vectors = (vectors / np.sqrt(np.arange(1, 65))).astype(np.float32)
    queries, vectors = vectors[20_000:], vectors[:20_000]
    folder, ids = tmp_path_factory.mktemp("pages"), [f"{row:05d}.png" for row in range(20_000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "PART_ROWS", 8_000)
        Embeddings(vectors, np.arange(20_000) % 3 - 1, ("cat", "dog"), ids).save(folder / "EMB")
    exact = search(normalised(vectors), normalised(queries), 10)[1]
    return folder, queries, [{ids[row] for row in near} for near in exact]


def on_the_page(section, number, place):
    text = PAGE.read_text(encoding="utf-8").split(f"# {section}\n")[1].split("\n## ")[0]
    (place / "block.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number], encoding="utf-8")
    return runpy.run_path(str(place / "block.py"))


def recall(found, exact):
    return np.mean([len(near & set(one)) / 10 for one, near in zip(found, exact, strict=True)])


def test_lancedb(mixture, monkeypatch):
    folder, queries, exact = mixture
    monkeypatch.chdir(folder)
    on_the_page("LanceDB", 0, folder)
    find = on_the_page("LanceDB", 1, folder)["search"]
    assert recall([find(query, 10) for query in queries], exact) >= 0.95


def test_milvus(mixture, monkeypatch):
    folder, queries, exact = mixture
    monkeypatch.chdir(folder)
    found = on_the_page("Milvus", 0, folder)["search"](queries.tolist(), 10)
    assert recall(found, exact) >= 0.95
