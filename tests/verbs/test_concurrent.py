"""Who reads embeddings or searches them while they are replaced sees the old ones or the new ones, never a mixture."""

import threading

import numpy as np
import pytest
import torch

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.embeddings import embeddings
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.search import Index
from ssl_kit.encoders import Encoder
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import index

ROUNDS = 6


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Two of them, as unlike as random weights are."""
    place = tmp_path_factory.mktemp("encoders")
    for number in range(2):
        torch.manual_seed(number)
        Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16)).save(place / f"{number}")
    return [str(place / "0"), str(place / "1")]


def write(encoder, images, folder):
    embed(encoder, str(images), out=str(folder), limit=60, precision="float32", overwrite=folder.exists())
    index(str(folder), key="Flat")


def answer(folder):
    """What a search finds for three images of the folder."""
    opened = Index.load(folder)
    with_ids = Embeddings.load(folder).ids[:3]
    return [[(one.id, round(one.score, 4)) for one in found] for found in opened.search_ids(with_ids, 5)]


def test_a_search_answers_from_the_old_folder_or_from_the_new_one(encoders, labelled_folder, tmp_path):
    wanted = []
    for number, encoder in enumerate(encoders):
        write(encoder, labelled_folder, tmp_path / f"{number}")
        wanted.append(answer(tmp_path / f"{number}"))
    assert wanted[0] != wanted[1]
    folder, done = tmp_path / "both", threading.Event()
    write(encoders[0], labelled_folder, folder)

    def replace():
        for number in range(ROUNDS):
            write(encoders[(number + 1) % 2], labelled_folder, folder)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    found, refused = [], 0
    while not done.is_set():
        try:
            found.append(answer(folder))
        except UserError:  # being replaced: no manifest, no index, or a part that the manifest does not name
            refused += 1
    writer.join()
    found.append(answer(folder))
    assert all(one in wanted for one in found) and found[-1] == wanted[0]
    assert len(found) > 1 and refused > 0


def vectors(value):
    return Embeddings(np.full((4, 3), value, np.float32), np.full(4, -1), (), list("abcd"))


def test_embeddings_that_are_replaced_while_they_are_read_are_not_mixed(tmp_path, monkeypatch):
    vectors(1.0).save(tmp_path / "folder")
    read = embeddings.read_part

    def replaced(path, *args):
        if len(replacing) < 1:
            replacing.append(path)
            vectors(2.0).save(tmp_path / "folder")
        return read(path, *args)

    replacing = []
    monkeypatch.setattr(embeddings, "read_part", replaced)
    with pytest.raises(DamagedError, match="was replaced while it was read"):
        Embeddings.load(tmp_path / "folder")
    assert (Embeddings.load(tmp_path / "folder").vectors == 2).all()
