"""Shards that lie elsewhere: on a web server here, on an S3 server here where moto is installed (moto_server)."""

import http.server
import shutil
import threading
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from stripes import make, png
from test_shards import batches, tar

from ssl_kit.core.errors import UserError
from ssl_kit.data import remote, shards
from ssl_kit.data.opening import open_source
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.embeddings.search import read_file
from ssl_kit.verbs.pack import pack


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """packed/ in 9 shards, and two tars of somebody else that share no names."""
    root = tmp_path_factory.mktemp("far")
    images = make(root / "images", [f"{label}/{number:02d}.png" for label in "ab" for number in range(40)])
    pack(str(images), str(root / "packed"), keep=True, shard_size="20kB")
    for number in range(2):
        tar(root / f"x-{number}.tar", [(f"{number}{row}.png", png(10 * number + row)) for row in range(9)])
    return root


@pytest.fixture
def web(folder):
    """The address of a web server that has the folder, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=str(folder))

        def log_message(self, *given):
            asked.append((self.command, self.path))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bucket(folder):
    """The address of the folder on an S3 server, with %s in the place of a name, and the server."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not installed: pip install 'moto[server]'")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "faults")
        with import_module("harness").s3_server(program) as (server, options, put):
            put("photos", None)
            for path in (*folder.glob("*.tar"), *(folder / "packed").glob("*.*")):
                put(f"photos/{path.relative_to(folder)}", path.read_bytes())
            yield f"s3://photos/%s?{options}", server


def test_shards_of_a_web_server(folder, web, monkeypatch):
    address, asked = web
    source = open_source(f"{address}/x-{{0..1}}.tar", in_memory=False)
    here = open_source(str(folder / "x-{0..1}.tar"), in_memory=False)
    assert source.ids() == here.ids() and source.read(slice(None)) == here.read(slice(None))
    gets = len([path for command, path in asked if command == "GET" and "x-" in path])
    again = open_source(f"{address}/x-{{0..1}}.tar", in_memory=False)
    monkeypatch.setattr(shards, "walk", None)  # what the walk found is kept, and so are the copies
    assert again.read([3]) == here.read([3])
    assert len([path for command, path in asked if command == "GET" and "x-" in path]) == gets
    with pytest.raises(UserError, match=r"1 of its files are not there, first x-2.tar"):
        open_source(f"{address}/x-{{0..2}}.tar")


def test_a_bucket_is_the_same_source(folder, bucket, tmp_path, monkeypatch):
    address, _ = bucket
    here = open_source(folder / "packed", in_memory=False)
    source = open_source(address % "packed", in_memory=False)
    copies = lambda: [path for path in (tmp_path / "cache").rglob("*.tar")]
    assert source.ids() == here.ids() and np.array_equal(source.labels(), here.labels())
    assert source.classes == here.classes and source.blocks.held == remote.HELD
    plan = TrainingPlan(len(here), 64, 3, blocks=source.blocks)
    rows = next(plan.batches()).rows
    assert source.read(rows) == here.read(rows)
    assert copies()
    info = {"source_root": str(source.root)}
    assert read_file(info, here.ids()[5]) == here.content(5)
    limit = 3 * max(path.stat().st_size for path in copies())
    monkeypatch.setenv("SSL_KIT_SHARD_CACHE", str(limit))
    shutil.rmtree(tmp_path / "cache")
    small = open_source(address % "packed", in_memory=False)
    for one, other in zip(batches(small, 2), batches(source, 2), strict=True):
        assert torch.equal(one["key"].index, other["key"].index) and all(map(torch.equal, one["views"], other["views"]))
    assert 0 < sum(path.stat().st_size for path in copies()) <= limit
    with pytest.raises(UserError, match=r"no \.tar is there"):
        open_source(address % "nothing")


def test_a_store_that_is_gone_is_one_clear_error(folder, bucket):
    address, server = bucket
    source = open_source(address % "packed", in_memory=False, max_bad=0.9)
    server.kill()
    server.wait()
    with pytest.raises(UserError, match=r"cannot be read: .* Check address, connection and credentials"):
        source.read(slice(None))
    assert not source.bad.rows


def test_nobody_else_says_what_is_fetched(tmp_path):
    """A folder of a stranger that looks like one of copies."""
    place = tmp_path / "remote-1" / "x"
    place.mkdir(parents=True)
    (place / "address.json").write_text('{"address": "http://127.0.0.1:1", "files": {"0.tar": [9, 0]}}')
    tar(place / "1.tar", [(f"{row}.png", png(row)) for row in range(3)])
    assert not remote.is_far(place / "0.tar") and open_source(place).ids() == ["0.png", "1.png", "2.png"]
