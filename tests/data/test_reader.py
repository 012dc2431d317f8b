"""A reader of one's own: behind --allow, through the same pixels as an array, never because a file names it."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from stripes import make

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import GREY, reading_in
from ssl_kit.data.given import of_arrays
from ssl_kit.data.opening import open_source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs.recipes import read_how

QUICK = [
    "--channels",
    "1",
    "--trainer.max_steps=2",
    "--batch_size=8",
    "--method.encoder.args",
    "{channels: [8, 8, 8, 8]}",
]
MODULE = """
import numpy as np

def read(data, name):
    if b"bad" in data:
        raise KeyError("no pixels in " + name)
    return np.frombuffer(data, "<i2").reshape(12, 14)
"""


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """32 files of a kind that nobody else reads, of 12 x 14 values from -1000 to 1000, in a table; and their reader."""
    values = np.random.default_rng(0).integers(-1000, 1001, (32, 12, 14)).astype("<i2")
    for number, one in enumerate(values):
        (tmp_path / f"{number:02d}.raw").write_bytes(one.tobytes())
    labels = ["a" if number % 2 else "b" for number in range(32)]
    table = pandas.DataFrame({"path": [f"{number:02d}.raw" for number in range(32)], "label": labels})
    table.to_csv(tmp_path / "list.csv", index=False)
    (tmp_path / "rawscans.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield values
    sys.modules.pop("rawscans", None)


def read(data, name):
    return np.frombuffer(data, "<i2").reshape(12, 14)


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_it_returns_is_read_like_an_array(scans, in_memory):
    wanted = of_arrays(scans, None, GREY, "arrays", measure=True)
    source = open_source("list.csv", reading=GREY.by(read), measure=True, in_memory=in_memory)
    assert dict(source.reading.ranges) == dict(wanted.reading.ranges) and source.reading.reader.endswith(":read")
    found = source.read(slice(None))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted.images, strict=True))
    assert source.sizes([0, 5]).tolist() == [[12, 14]] * 2 and source.content(3) == scans[3].tobytes()


def test_a_file_that_it_cannot_read_is_a_bad_one(scans):
    Path("07.raw").write_bytes(b"bad")
    names = []
    own = lambda data, name: names.append(name) or (read(data, name) if data != b"bad" else 1 / 0)
    source = open_source("list.csv", reading=GREY.by(own), in_memory=True)
    assert len(source) == 31 and source.bad.rows == [("07.raw", source.bad.rows[0][1])]
    assert "ZeroDivisionError" in source.bad.rows[0][1] and "03.raw" in names
    with pytest.raises(UserError, match="wanted integers of up to 32 bits or floats"):
        open_source("list.csv", reading=GREY.by(lambda data, name: "words"), in_memory=True)


def test_every_verb_takes_it_and_the_encoder_notes_its_name(scans, capsys):
    allowed = ["--reader", "rawscans:read", "--allow", "rawscans"]
    assert cli.main(["pretrain", "list.csv", "--run", "run", *QUICK, *allowed]) == 0
    encoder = Encoder.load("run/encoder")
    assert encoder.reading.reader == "rawscans:read" and encoder.reading.function is None
    assert "reader" not in Path("run/recipe.yaml").read_text()
    again = "--reader rawscans:read --allow rawscans\n"
    assert capsys.readouterr().out.endswith(f"next: ssl-kit evaluate run list.csv {again}")
    assert cli.main(["evaluate", "run", "list.csv", "--only", "knn", "--baselines", "none", *allowed]) == 0
    assert capsys.readouterr().out.endswith(f"next: ssl-kit search run 00.raw --html neighbours.html {again}")
    assert cli.main(["embed", "run", "list.csv", "--out", "EMB", *allowed]) == 0
    assert capsys.readouterr().out.endswith(f"next: ssl-kit search EMB 00.raw -k 12 {again}")
    assert cli.main(["search", "EMB", "03.raw"]) == 2
    said = capsys.readouterr()
    assert "give --reader rawscans:read" in said.out + said.err and "next:" not in said.out
    assert cli.main(["search", "EMB", "03.raw", "-k", "1", "--json", *allowed]) == 0
    answer = json.loads(capsys.readouterr().out)["queries"][0]
    assert answer["results"][0]["id"] == "03.raw" and answer["results"][0]["score"] > 0.999


def test_a_run_is_resumed_with_the_reader_that_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "images", [f"{number:02d}.png" for number in range(16)])
    negative = lambda data, name: 255 - np.asarray(Image.open(io.BytesIO(data)))
    method = {"class_path": "ssl_kit.methods.simclr.SimCLR"}
    method["init_args"] = {"encoder": {"init_args": {"name": "resnet18_small", "args": {"channels": [8, 8, 8, 8]}}}}
    options = {"run": "run", "batch_size": 8, "trainer": {"max_steps": 2}, "method": method}
    ssl_kit.pretrain("images", reader=negative, **options)
    with pytest.raises(UserError, match=r"the images were read by .*lambda.*give --reader as then"):
        ssl_kit.pretrain("images", resume=True, **options)
    ssl_kit.pretrain("images", resume=True, reader=negative, **options)


def test_it_is_imported_only_where_the_command_line_allows_it(scans, capsys):
    for allow in ([], ["--allow", "other"], ["--allow", "raw"]):
        assert cli.main(["embed", "run", "list.csv", "--out", "EMB", "--reader", "rawscans:read", *allow]) == 2
        assert "if you trust rawscans, add --allow rawscans" in capsys.readouterr().err
    assert cli.main(["embed", "run", "list.csv", "--out", "EMB", "--reader", "os.system", "--allow", "os"]) == 2
    assert "wanted module:function" in capsys.readouterr().err and "rawscans" not in sys.modules
    assert (
        cli.main(["pretrain", "list.csv", "--run", "run", *QUICK, "--reader", "rawscans:x", "--allow", "rawscans"]) == 2
    )
    assert "has no attribute 'x'" in capsys.readouterr().err
    Path("r.yaml").write_text("reader: rawscans:read\n")
    with pytest.raises(UserError, match="leave reader out, give --reader"):
        read_how("r.yaml")
    with pytest.raises(UserError, match="give the function itself"):
        ssl_kit.pretrain("list.csv", reader="rawscans:read", run="other", channels=1)


def test_a_folder_cannot_make_it_run(scans, capsys):
    sys.modules.pop("rawscans", None)
    reading = reading_in({"channels": 1, "reader": "rawscans:read"})
    assert reading.reader == "rawscans:read" and reading.function is None and "rawscans" not in sys.modules
    assert reading.by(None).reader == ""
    assert "give --reader rawscans:read" in capsys.readouterr().out
    for wrong in ("rawscans", "a:b\n", 3, "x" * 200 + ":y", "os:system()"):
        with pytest.raises(ValueError, match="wanted module:function"):
            reading_in({"channels": 1, "reader": wrong})
