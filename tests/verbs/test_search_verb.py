"""`ssl-kit search` with folders, ids and many queries; broken files among them; the page of pictures."""

import json
import shutil

import pytest
import torch

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.verbs import search as module
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index
from ssl_kit.verbs.search import search


@pytest.fixture(scope="module")
def indexed(labelled_folder, tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("search")
    encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)).save(root / "encoder")
    embed(str(encoder), str(labelled_folder), out=str(root / "emb"), precision="float32", layers=4)
    index(str(root / "emb"))
    return root / "emb"


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
