"""Thousands of damaged files through every reader of ssl_kit; `hostile.py` runs this and writes the rows.

Each trial is a pure function of its number. Two questions are asked of a damaged file: is it found when the manifest
still says what the file was (it must be: no silent load), and what happens when a stranger rewrote the manifest too, so
that all hashes are right (then the reader itself must end in an answer or in a declared error: never a crash of the
process, another exception, a hang, or a file written anywhere).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import faiss
import hostile_indexes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hostile_indexes import DIM, ROWS, IndexTrials
from isolated import told
from mutate import damaged, damaged_text

from ssl_kit.core.files import MANIFEST, json_text, sha256
from ssl_kit.core.sealed import SEAL, fingerprint, read_json, read_sealed, sealed
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.folder import find_ids, read_rows, read_vectors
from ssl_kit.encoders.encoder import CONFIG, RECORD, WEIGHTS, Encoder
from ssl_kit.training.checkpoint import SafeCheckpointIO, newest
from ssl_kit.verbs.recipes import check_class_paths, read_recipe

_OURS = ("indexed", "emb", "emb16", "encoder", "step-00000003", "recipe", "table")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def prepare(place: Path) -> None:
    """Writes the honest files that are damaged: embeddings, an index of each key, an encoder, a checkpoint, lists."""
    faiss.omp_set_num_threads(1)
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((12, DIM))
    vectors = (centres[draw.integers(0, 12, ROWS)] + 0.4 * draw.standard_normal((ROWS, DIM))).astype(np.float32)
    ids = [f"{row % 7}/{row:04d} é%FF.png" for row in range(ROWS)]
    info = {"layers": 1, "encoder_sha256": "0" * 64, "encoder": "/nowhere", "source_root": "/nowhere"}
    info |= {"precision": "float32", "preprocessing": {"image_size": [16, 16]}}
    embeddings = Embeddings(vectors, np.arange(ROWS) % 3 - 1, ("cat", "dog"), ids, info)
    embeddings.save(place / "emb")
    embeddings.save(place / "emb16", "float16")
    (place / "indexes").mkdir(exist_ok=True)
    hostile_indexes.prepare(place / "indexes", vectors)
    torch.manual_seed(0)
    encoder = Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16))
    encoder.save(place / "encoder", {"data": "photos"})
    state = {"global_step": 3, "state_dict": dict(encoder.state_dict()), "numbers": {0: {"lr": 0.1}, 1: (1, None)}}
    paths = pa.array([f"{row}.png" for row in range(20)])
    pq.write_table(pa.table({"path": paths, "label": [row % 3 for row in range(20)]}), place / "list.parquet")
    SafeCheckpointIO().save_checkpoint(state | {"generator": np.arange(9, dtype=np.uint32)}, place / "step-00000003")


class Trials:
    """The trials of one child, in a scratch folder of its own.

    Every method takes a number and says in one line what happened: "refused", "answered" or "unchanged" are right;
    everything else is a fault.
    """

    def __init__(self, place: Path):
        self.place = place
        self.indexes: IndexTrials | None = None
        self.vectors = Embeddings.load(place / "emb").vectors
        self.scratch, self.away = (Path(tempfile.mkdtemp("", prefix, place)) for prefix in ("scratch-", "away-"))
        os.chdir(self.away)
        self.recipes = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]

    def copy(self, name: str) -> Path:
        """A fresh copy of an honest folder."""
        target = self.scratch / name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(self.place / name, target)

    def elsewhere(self) -> str | None:
        """What was written outside the folders of the trials: into the working directory, or beside them."""
        found = [*self.away.iterdir(), *(path for path in self.scratch.iterdir() if path.name not in _OURS)]
        return f"wrote {found[0]}" if found else None

    def index(self, number: int) -> str:
        """X1: an index that is not what we signed."""
        if self.indexes is None:
            self.copy("emb").rename(self.scratch / "indexed")
            self.indexes = IndexTrials(self.place / "indexes", self.scratch / "indexed", self.vectors)
        told_of = self.indexes.trial(number)
        return told_of if (wrote := self.elsewhere()) is None else wrote

    # --- encoder and embeddings folders, all hashes left as they were, or set right

    def folder(self, number: int) -> str:
        """One damaged file of an encoder or embeddings folder; every second time with all hashes set right."""
        draw = random.Random(f"folder/{number}")
        name = ("encoder", "emb", "encoder", "emb16")[number % 4]
        folder = self.copy(name)
        file = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        self._damage(file, draw)
        rewritten = (number // 4) % 2 == 1
        if rewritten:
            self.mend(folder)
        load = (lambda: self._encoder(folder)) if name == "encoder" else (lambda: self._embeddings(folder))
        wanted = None if rewritten else load_honest(self.place / name)
        kind, text = told(load)
        if kind == "returned" and wanted is not None:
            return "unchanged" if text == wanted else f"silent load: {name}/{file.name}"
        return self._result(kind, text, f"{name}/{file.name}")

    def _result(self, kind: str, text: str, what: str) -> str:
        if wrote := self.elsewhere():
            return f"{what}: {wrote}"
        return f"crashed: {what}: {text}" if kind == "crashed" else {"returned": "answered"}.get(kind, kind)

    def _damage(self, file: Path, draw: random.Random) -> None:
        data = file.read_bytes()
        change = damaged_text if file.suffix in (".json", ".csv", ".yaml") else damaged
        file.write_bytes(change(data, draw))

    def mend(self, folder: Path) -> None:
        """Sets hashes and seals right where the JSON can still be read: what a stranger would do."""
        for name in (RECORD, MANIFEST):
            path = folder / name
            if not path.exists() or told(lambda path=path: read_json(path))[0] != "returned":
                continue
            entries = read_json(path)
            if not isinstance(entries, dict):
                continue
            entries.pop(SEAL, None)
            if name == RECORD:
                entries |= {"sha256": sha256(folder / WEIGHTS), "config_sha256": sha256(folder / CONFIG)}
            elif isinstance(entries.get("files"), dict):
                there = {file: sha256(folder / file) for file in entries["files"] if (folder / file).is_file()}
                entries["files"] |= there
            write_quickly(path, entries)

    def _encoder(self, folder: Path) -> str:
        return digest_of(folder, Encoder.load(folder))

    def _embeddings(self, folder: Path) -> str:
        loaded = Embeddings.load(folder)
        for _ in read_vectors(folder, loaded.info):
            pass
        read_rows(folder, loaded.info, np.array([0, len(loaded) - 1, -1]), "id")
        find_ids(folder, loaded.info, ["0/0000 é%FF.png", "nothing"])
        return digest_of(folder, loaded)

    # --- S4: every reader in turn

    def any(self, number: int) -> str:
        """One of the readers, by the number; hashes are set right."""
        readers = (
            self.checkpoint,
            self.folder_mended,
            self.parquet,
            self.recipe,
            self.table,
            self.index,
            self.manifest,
        )
        return readers[number % len(readers)](number)

    def folder_mended(self, number: int) -> str:
        """An encoder or embeddings folder."""
        return self.folder(8 * number + 4 + number % 4)

    def checkpoint(self, number: int) -> str:
        """A checkpoint: tensors, JSON or manifest."""
        draw = random.Random(f"checkpoint/{number}")
        folder = self.copy("step-00000003")
        file = draw.choice(sorted(folder.iterdir()))
        self._damage(file, draw)
        self.mend(folder)

        def load() -> int:
            newest(self.scratch)
            return len(SafeCheckpointIO().load_checkpoint(folder))

        result = self._result(*told(load), f"checkpoint/{file.name}")
        shutil.rmtree(folder)
        return result

    def parquet(self, number: int) -> str:
        """A part of an embeddings folder."""
        draw = random.Random(f"parquet/{number}")
        folder = self.copy(("emb", "emb16")[number % 2])
        part = folder / "part-00000.parquet"
        part.write_bytes(damaged(part.read_bytes(), draw))
        self.mend(folder)
        return self._result(*told(lambda: self._embeddings(folder)), "parquet")

    def manifest(self, number: int) -> str:
        """The manifest of an embeddings folder, its seal set right."""
        draw = random.Random(f"manifest/{number}")
        folder = self.copy("emb")
        self._damage(folder / MANIFEST, draw)
        self.mend(folder)
        return self._result(*told(lambda: self._embeddings(folder)), "manifest")

    def recipe(self, number: int) -> str:
        """A recipe, as far as everything that is done before anything is imported."""
        draw = random.Random(f"recipe/{number}")
        folder = self.scratch / "recipe"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_bytes(damaged_text(draw.choice(self.recipes), draw, self.recipes))
        kind, text = told(lambda: check_class_paths(read_recipe(str(folder / "recipe.yaml"))))
        return self._result(kind, text, "recipe")

    def table(self, number: int) -> str:
        """A .csv or .parquet list of images."""
        draw = random.Random(f"table/{number}")
        folder = self.scratch / "table"
        folder.mkdir(exist_ok=True)
        if number % 2:
            file, change = folder / "list.csv", damaged_text
            data = b"path,label\n" + b"".join(b"%d.png,%d\n" % (row, row % 3) for row in range(20))
        else:
            file, change = folder / "list.parquet", damaged
            data = (self.place / "list.parquet").read_bytes()
        file.write_bytes(change(data, draw))
        kind, text = told(lambda: len(open_source(str(file), in_memory=False)))
        result = self._result(kind, text, file.name)
        file.unlink()
        return result


def digest_of(folder: Path, loaded: Encoder | Embeddings) -> str:
    """What was loaded, as one hash: equal means that nothing of it was lost or altered."""
    if isinstance(loaded, Encoder):
        tensors = {name: tensor.double().sum().item() for name, tensor in loaded.state_dict().items()}
        record = read_sealed(folder / RECORD)
        return fingerprint([tensors, loaded.preprocessing(), loaded.args, loaded.sha256, record])
    sums = loaded.vectors.astype(np.float64).sum(axis=0).tolist()
    return fingerprint([sums, loaded.ids, loaded.labels.tolist(), loaded.classes, loaded.info])


def load_honest(folder: Path) -> str:
    """The hash of what an honest folder holds."""
    loaded = Encoder.load(folder) if (folder / RECORD).exists() else Embeddings.load(folder)
    return digest_of(folder, loaded)


def write_quickly(path: Path, entries: dict) -> None:
    """`write_sealed` without waiting for the disk."""
    path.write_text(json_text(sealed(entries)))
