"""`ssl-kit search` with folders, ids and many queries; broken files among them; the page of pictures."""

import base64
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_sealed
from ssl_kit.core.locking import lock
from ssl_kit.core.reading import GREY
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data import manifests
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.search import Index, read_file
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs import index as index_verb
from ssl_kit.verbs import search as module
from ssl_kit.verbs.duplicates import duplicates
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index
from ssl_kit.verbs.search import search


@pytest.fixture(scope="module", autouse=True)
def own_key(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.delenv("SSL_KIT_KEY", raising=False)
        yield


@pytest.fixture(scope="module")
def indexed(labelled_folder, tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("search")
    encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)).save(root / "encoder")
    embed(str(encoder), str(labelled_folder), out=str(root / "emb"), precision="float32", layers=4)
    index(str(root / "emb"))
    return root / "emb"


def test_a_search_loads_no_trainer_and_leaves_what_it_loads_to_no_collector(indexed, labelled_folder):
    code = (
        "import gc, sys\nfrom ssl_kit.cli import main\n"
        f"assert main(['search', {str(indexed)!r}, {str(labelled_folder / 'a' / '003.png')!r}]) == 0\n"
        "heavy = {'pytorch_lightning', 'torchmetrics', 'bokeh', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def first(answer):
    return {query["image"]: query["results"][0]["id"] for query in answer["queries"]}


def test_a_folder_is_all_its_images_and_broken_ones_are_named(indexed, labelled_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "BATCH", 7)
    folder = tmp_path / "queries"
    shutil.copytree(labelled_folder / "c", folder / "inner")
    (folder / "inner" / "000.png").write_bytes(b"no image")
    answer = search(str(indexed), [str(folder), str(labelled_folder / "a" / "003.png")], k=2)
    assert len(answer["queries"]) == 40 and answer["skipped"] == [str(folder / "inner" / "000.png")]
    found = first(answer)
    assert found[str(labelled_folder / "a" / "003.png")] == "a/003.png"
    assert all(found[str(folder / "inner" / f"{n:03d}.png")] == f"c/{n:03d}.png" for n in range(1, 40))
    captured = capsys.readouterr()
    assert "1 images could not be decoded" in captured.err and "20 more of 40 queries" in captured.out


def test_one_image_is_a_question_whoever_holds_it(indexed, labelled_folder):
    path, opened = labelled_folder / "a" / "003.png", Index.load(indexed)
    picture = Image.open(path).convert("RGB")
    answers = [opened.search(one, k=3) for one in (path, str(path), [path], picture, np.asarray(picture))]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == 1 and answers[0][0][0].id == "a/003.png"


def test_a_folder_without_an_index_gets_one_first(indexed, labelled_folder, tmp_path, capsys):
    folder = tmp_path / "emb"
    embed(str(indexed.parent / "encoder"), str(labelled_folder), out=str(folder), precision="float32", layers=4)
    image = [str(labelled_folder / "a" / "003.png")]
    answer = search(str(folder), image, k=3)
    assert answer["queries"] == search(str(indexed), image, k=3)["queries"] and (folder / "index.faiss").exists()
    assert "has no index yet: making one" in capsys.readouterr().out
    made = (folder / "index.faiss").stat().st_mtime_ns
    search(str(folder), image, k=3)
    assert (folder / "index.faiss").stat().st_mtime_ns == made


@pytest.mark.parametrize("why", ["no right", "no room", "a user's own", "in use"])
def test_where_no_index_can_be_kept_the_vectors_answer(indexed, labelled_folder, tmp_path, monkeypatch, capsys, why):
    image = [str(labelled_folder / "a" / "003.png"), "b/005.png"]
    wanted = search(str(indexed), image, k=3)["queries"]
    folder = shutil.copytree(indexed, tmp_path / "emb")
    manifest = read_sealed(folder / "manifest.json")
    del manifest["files"]["index.faiss"], manifest["index"]
    write_sealed(folder / "manifest.json", manifest)
    (folder / "index.faiss").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if why == "no right":
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may always
    elif why == "no room":
        monkeypatch.setattr(index_verb, "write_index", full)
    elif why == "a user's own":
        (folder / "index.faiss").write_bytes(b"of a user's own")
        before["index.faiss"] = b"of a user's own"
    capsys.readouterr()
    with lock(folder) if why == "in use" else nullcontext():
        assert search(str(folder), image, k=3)["queries"] == wanted
    said = capsys.readouterr()
    assert "the vectors answer instead" in said.err and ("making one" in said.out) == (why != "no right")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    if why == "no room":  # the manifest names what was to come
        after["manifest.json"] = before["manifest.json"]
    assert {**after, ".lock": b""} == {**before, ".lock": b""}
    monkeypatch.setenv("SSL_KIT_KEY", "no key")
    if why != "no right":
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            search(str(folder), image, k=3)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def pictures(page):
    """What the page shows, decoded: (name, pixels) of queries and of what was found."""
    tags = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="(?:query image|neighbour \d+:) ([^"]+)"', page)
    return [(name, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))) for data, name in tags]


@pytest.mark.parametrize(("data", "side", "channels"), [("mnist5k", 28, 1), ("digits", 8, 3)])
def test_pages_show_the_images_of_built_in_sets(tmp_path, monkeypatch, data, side, channels):
    monkeypatch.setattr(manifests, "builtin", lru_cache(manifests.builtin))  # parsing MNIST takes 3 s
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16), channels).save(tmp_path / "encoder")
    embed(str(encoder), f"{data}:train", out=str(tmp_path / "emb"), precision="float32", limit=120)
    held = open_source(f"{data}:test", reading=GREY)
    Image.fromarray(held.read([7])[0][:, :, 0]).save(tmp_path / "query.png")
    found = search(str(tmp_path / "emb"), [str(tmp_path / "query.png")], k=5, html=str(tmp_path / "search.html"))
    groups = duplicates(str(tmp_path / "emb"), outliers=4, threshold=0.9, html=str(tmp_path / "duplicates.html"))
    ids = [one["id"] for one in found["queries"][0]["results"]]
    assert not set(ids) & set(held.ids())  # the query is not among them
    whole = open_source(data, reading=GREY)
    images = {name: image[..., 0] for name, image in zip(whole.ids(), whole.read(slice(None)), strict=True)}
    shown = pictures((tmp_path / "search.html").read_text())
    assert [name for name, _ in shown[1:]] == ids
    far = [one["id"] for one in groups["outliers"]]
    shown_far = pictures((tmp_path / "duplicates.html").read_text())
    assert [name for name, _ in shown_far if name in images][-4:] == far
    for name, pixels in [*shown, *shown_far]:
        if name in images:
            assert pixels.shape == (side, side) and np.abs(pixels - images[name].astype(float)).mean() < 12, name
    assert np.abs(shown[0][1] - held.read([7])[0][:, :, 0].astype(float)).mean() < 12
    for page in ("search.html", "duplicates.html"):
        assert "not readable" not in (tmp_path / page).read_text()


def test_a_manifest_that_names_no_root_opens_no_file(tmp_path):
    (tmp_path / "0007").write_bytes(b"x")
    assert read_file({"source": "digits", "source_root": None}, "0007")[1:4] == b"PNG"
    watching, opened = [True], []
    sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "open" and watching[0] else None)
    path = str(tmp_path / "0007")
    for source in (str(tmp_path), path, "arrays", "", None, 7, ["digits"], "digits/../x", "Digits", "digits "):
        for name in ("0007", path):
            assert read_file({"source": source, "source_root": None}, name) is None
            assert read_file({"source": source}, name) is None
    for name in ("1797", "7", "-001", "00007", "../0007", path, "", "9" * 5_000):
        for source in ("digits", "digits:train", f"digits:{tmp_path}"):
            assert read_file({"source": source, "source_root": None}, name) is None
    for root in (7, ["x"], {"a": 1}, False):
        assert read_file({"source": "digits", "source_root": root}, "0007") is None
    watching[0] = False
    assert not opened


def test_ids_and_files_together_on_one_page(indexed, labelled_folder, tmp_path):
    page = tmp_path / "page.html"
    answer = search(str(indexed), ["b/005.png", str(labelled_folder / "b" / "005.png")], k=3, html=str(page))
    by_file, by_id = answer["queries"]
    assert by_id["image"] == "b/005.png" and by_file["results"][0]["id"] == "b/005.png"
    assert [one["id"] for one in by_id["results"]][:2] == [one["id"] for one in by_file["results"]][1:]
    text = page.read_text()
    assert text.count("<img ") == 8 and "http" not in text.replace("http-equiv", "")


def test_mistakes(indexed, tmp_path):
    with pytest.raises(UserError, match="neither a file nor an id"):
        search(str(indexed), ["b/999.png"])
    with pytest.raises(UserError, match="not there"):
        search(str(indexed), [str(tmp_path / "b.png")])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 1 images could be decoded"):
        search(str(indexed), [str(tmp_path / "folder")])


def test_the_command_line_prints_one_document(indexed, capsys):
    assert cli.main(["search", str(indexed), "a/000.png", "a/001.png", "-k", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [len(query["results"]) for query in answer["queries"]] == [2, 2]


def test_the_next_command_asks_the_same(indexed, labelled_folder, tmp_path, capsys):
    moved, run = str(tmp_path / "moved"), str(indexed.parent / "encoder")
    shutil.copytree(indexed, moved)
    options = ["-k", "3", "--encoder", run, "--trust-index"]
    assert cli.main(["search", moved, str(labelled_folder / "a" / "003.png"), *options]) == 0
    again = f"{labelled_folder}/a/003.png --encoder {run} --trust-index --k 3"
    wanted = f"next: ssl-kit search {moved} {again} --html neighbours.html"
    assert capsys.readouterr().out.splitlines()[-1] == wanted
    page = str(tmp_path / "my page.html")
    assert cli.main(["search", moved, "a/003.png", "--html", page]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: open '{page}'"
    assert cli.main(["duplicates", moved, "--threshold", "0.999", "--outliers", "2"]) == 0
    wanted = f"duplicates {moved} --threshold 0.999 --outliers 2 --html duplicates.html --csv duplicates.csv"
    assert capsys.readouterr().out.splitlines()[-1] == f"next: ssl-kit {wanted}"


@pytest.mark.parametrize("ask", [lambda name: search(name, ["a.png"]), index, duplicates, Index.load])
def test_what_holds_no_embeddings_is_told_how_to_make_them(ask, indexed, labelled_folder, tmp_path):
    run, photos = tmp_path / "my run", tmp_path / "photos"
    shutil.copytree(indexed.parent / "encoder", run / "encoder")
    (run / "run.json").write_text("{}")
    shutil.copytree(labelled_folder / "a", photos)
    for folder in (run, run / "encoder"):
        with pytest.raises(UserError, match=f"embed first: ssl-kit embed '{folder}' DATA --out EMB"):
            ask(str(folder))
    with pytest.raises(UserError, match=rf"no manifest\.json: embed first: ssl-kit embed RUN {photos} --out EMB"):
        ask(str(photos))
    with pytest.raises(UserError, match="is no folder: give an embeddings folder"):
        ask(str(tmp_path / "nothing"))
    assert not [*photos.glob(".*")] and not [*run.glob(".*")]


def test_a_run_is_embedded_once_and_again_when_its_encoder_is_another(labelled_folder, tmp_path, capsys, monkeypatch):
    photos, run = tmp_path / "my photos", tmp_path / "my run"
    shutil.copytree(labelled_folder / "a", photos)
    sha = Encoder.load(Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)).save(run / "encoder")).sha256
    (run / "run.json").write_text(json.dumps({"encoder_sha256": sha}))
    (run / "recipe.yaml").write_text(f"data: {photos}\nlimit: 30\n")
    made, embedded = module.embed, []
    monkeypatch.setattr(module, "embed", lambda *given, **named: embedded.append(named) or made(*given, **named))
    command = ["search", str(run), str(photos / "003.png"), "-k", "3"]
    for _ in range(2):
        assert cli.main(command) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if line.startswith("next:")] == said[-1:]
        assert said[-1].startswith(f"next: ssl-kit search '{run}/embeddings' '{photos / '003.png'}'")
    assert len(embedded) == 1 and len(Index.load(run / "embeddings")) == 30
    torch.manual_seed(1)
    other = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)).save(tmp_path / "other")
    shutil.copytree(other, run / "encoder", dirs_exist_ok=True)
    (run / "run.json").write_text(json.dumps({"encoder_sha256": (sha256 := Encoder.load(other).sha256)}))
    assert cli.main(command) == 0
    assert len(embedded) == 2 and Index.load(run / "embeddings").info["encoder_sha256"] == sha256
