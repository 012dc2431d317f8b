"""Index: an embeddings folder, ready to be searched with images, vectors or ids.

    found = ssl_kit.Index.load("EMB").search(["a.jpg", pixels], k=12)
    found[0][0].id, found[0][0].score

The index file is a cache: where it is not there, not ours or not whole, the vectors answer, exactly and more slowly.

Imports are kept few: a cold start is most of the time that a search takes.
"""

from __future__ import annotations

import io
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import torch

from ssl_kit.core.console import warn
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, verify_file
from ssl_kit.core.machine import available_cores, available_memory
from ssl_kit.core.named import find_encoder, is_builtin, is_packaged, manifest_of
from ssl_kit.core.reading import GREY, Reading, reading_in
from ssl_kit.core.sealed import Entries, fingerprint
from ssl_kit.data import shards
from ssl_kit.data.decode import decode
from ssl_kit.data.given import images_in, pixels_given
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import escape_path, read_regular, unescape
from ssl_kit.data.opening import builtin_source
from ssl_kit.data.sources import Source, pixels
from ssl_kit.embeddings.exact import normalised
from ssl_kit.embeddings.folder import PART_ROWS, checked, find_ids, part_names, read_rows, read_vectors
from ssl_kit.embeddings.index import SEARCHED_ROWS, Gallery, search_index
from ssl_kit.embeddings.signing import FILE, FaissIndex, find_key, is_ours, read_index, vectors_fingerprint
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.views.host import plain_views

BATCH = 64  # query images decoded and encoded together

_MOST_LAYERS = 10_000
_PATIENCE = 60.0  # seconds that an exact search may take, as its first rows tell
_COPIES = 6  # of a part as float32 that are in memory while the next one is read; measured: 4.3 to 5.2
Image: TypeAlias = str | Path | np.ndarray | torch.Tensor | PIL.Image.Image


class Neighbour(NamedTuple):
    """A found image: its id, its cosine in [-1, 1] and its row in the embeddings folder."""

    id: str
    score: float
    row: int


@dataclass
class Index:
    """An opened index, or the vectors in its place; `load` opens one.

    Attributes:
        folder: of embeddings.
        info: its manifest.
    """

    folder: Path
    info: Entries
    _index: FaissIndex | Gallery
    _encoder_path: str | None = None
    _encoder: Encoder | None = None

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        encoder: str | None = None,
        mapped: bool | None = None,
        trust_index: bool = False,
    ) -> Index:
        """Opens the index of an embeddings folder, if it was signed with our key and is as it was then.

        Otherwise a line says why, and all searches are answered from the vectors: exactly, part by part.

        Args:
            folder: of embeddings, best indexed by `ssl-kit index`.
            encoder: run folder or encoder folder, when it is no longer where the embeddings were made.
            mapped: leave the index on disk and map it into memory; None = as it was made for.
            trust_index: open the index whoever made it, if it has the sha256 of the manifest. FAISS reads it then, and
                a crafted one can do to this process what its maker likes.

        Raises:
            UserError: no such folder; with `trust_index`, no index, or one of other vectors than the folder holds.
            DamagedError: the folder, or with `trust_index` the index, is not what the manifest says.
        """
        folder = Path(folder)
        info = manifest_of(folder)
        layers = info.get("layers")
        checked(info, folder)
        if type(layers) is not int or not 0 < layers < _MOST_LAYERS:
            raise DamagedError(f"{folder / MANIFEST} lacks layers; expected what ssl_kit writes")
        key = find_key() if FILE in info["files"] and not trust_index else None
        opened: FaissIndex | Gallery
        try:
            opened = _opened(folder, info, mapped, key, trust_index)
        except UserError as error:
            if trust_index:
                raise
            warn(f"{error}: the vectors answer instead, exactly; `{_index_command(folder)}` makes an index of your own")
            opened = Gallery(info["rows"], info["dims"], lambda: _unit_vectors(folder, info))
        return cls(folder, info, opened, encoder)

    def __len__(self) -> int:
        return self.info["rows"]

    @property
    def encoder(self) -> Encoder:
        """The encoder that made the embeddings, and no other; loaded when it is first needed."""
        if self._encoder is None:
            self._encoder = load_encoder(self.folder, self.info, self._encoder_path)
        return self._encoder

    def search(self, images: Image | Sequence[Image], k: int = 12) -> list[list[Neighbour]]:
        """The k nearest images of each of `images`, best first.

        Args:
            images: files, pictures, arrays or tensors (H, W, C), (C, H, W) or (H, W), or one of them; (Q, H, W, C) and
                (Q, C, H, W) are Q images.
            k: images to find for each; at most as many as there are.

        Raises:
            UserError: a file that is not there or cannot be decoded, or a shape that may be one image or several.
        """
        if not (listed := images_in(images, self.encoder.channels)):
            return []
        made = [self.encode(self.pixels(listed[start : start + BATCH])) for start in range(0, len(listed), BATCH)]
        return self.search_vectors(np.concatenate(made), k)

    def search_ids(self, ids: Sequence[str], k: int = 12) -> list[list[Neighbour]]:
        """The k nearest images of images of the folder itself, each without itself."""
        rows = self.rows_of(ids)
        vectors = read_rows(self.folder, self.info, np.array(rows), "embedding")
        queries = np.array([vectors[row] for row in rows], dtype=np.float32)
        found = self.search_vectors(queries, k + 1)
        return [[one for one in near if one.row != row][:k] for near, row in zip(found, rows, strict=True)]

    def search_vectors(self, vectors: np.ndarray, k: int = 12) -> list[list[Neighbour]]:
        """The k nearest images of each of (Q, D) features of the same encoder, best first.

        Raises:
            UserError: vectors of another size or without a direction; without an index, an exact search would take
                more than a minute or more memory than there is.
        """
        if k < 1:
            raise UserError(f"-k {k}: wanted at least 1")
        if isinstance(self._index, Gallery):
            _check_memory(self.folder, self.info, len(vectors), k)
        cosines, rows = search_index(self._index, vectors, k)
        ids = read_rows(self.folder, self.info, rows, "id")
        return [
            [
                Neighbour(ids[int(row)], float(score), int(row))
                for score, row in zip(scores, places, strict=True)
                if row >= 0
            ]
            for scores, places in zip(cosines, rows, strict=True)
        ]

    def rows_of(self, ids: Sequence[str]) -> list[int]:
        """The rows of ids of this folder."""
        found = find_ids(self.folder, self.info, ids)
        missing = [name for name in ids if name not in found]
        if missing:
            raise UserError(
                f"{missing[0]!r} is neither a file nor an id of {self.folder}: ids are what a search prints"
            )
        return [found[name] for name in ids]

    def pixels(self, images: Iterable[Image]) -> list[np.ndarray]:
        """(H, W, C) uint8 or uint16 of each image, read as the encoder says, by several threads."""
        reading = self.encoder.reading
        with ThreadPoolExecutor(available_cores(), "decode") as pool:
            return list(pool.map(lambda image: _pixels(image, reading), images))

    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """(Q, D) float32 features of images (H, W, C), as `pixels` gives them, the way the embeddings were made."""
        return encoded(self.encoder, self.info, pixels)


def encoded(encoder: Encoder, info: Entries, images: Sequence[np.ndarray]) -> np.ndarray:
    """(Q, D) float32 features of images (H, W, C), as those of the folder with this manifest were made."""
    seen = torch.from_numpy(plain_views(images, encoder.image_size)).to(next(encoder.parameters()).device)
    reduced = info.get("precision") == "bfloat16"
    with torch.inference_mode(), torch.autocast(seen.device.type, dtype=torch.bfloat16, enabled=reduced):
        made = encoder.layers(seen.contiguous(memory_format=torch.channels_last), last=info["layers"])
    return made.float().cpu().numpy()


def has_index(folder: Path) -> bool:
    """Whether a whole embeddings folder was indexed, for the vectors that it holds now or for others."""
    return FILE in manifest_of(folder)["files"]


def _opened(folder: Path, info: Entries, mapped: bool | None, key: bytes | None, trusted: bool) -> FaissIndex:
    """The FAISS index of a folder; a `UserError` says why it is not used."""
    path, entry = folder / FILE, info.get("index")
    if FILE not in info["files"]:
        raise UserError(f"{folder} has no index yet")
    if not isinstance(entry, dict):
        raise DamagedError(f"{folder / MANIFEST} does not say what {FILE} is an index of")
    made_of, now = entry.get("vectors_sha256"), vectors_fingerprint(info)
    if made_of != now:
        raise UserError(
            f"index made of other vectors: {path} of {str(made_of)[:64]!r}, {folder} holds {now} (encoder, layers, "
            "preprocessing, normalisation and metric included)"
        )
    if not trusted:
        if key is None:
            raise UserError(f"there is no key that would tell who made {path}")
        if not is_ours(key, info):
            how = "was not signed with your key" if "signature" in entry else "is not signed"
            raise UserError(f"{path} {how}: anybody may have made it")
    if "bytes" in entry and path.is_file() and path.stat().st_size != entry["bytes"]:
        raise DamagedError(f"{path} is damaged: {path.stat().st_size:,} bytes of {entry['bytes']}")
    mapped = bool(entry.get("mapped", False)) if mapped is None else mapped
    return read_index(path, info["rows"], info["dims"], mapped, digest=str(info["files"][FILE]))


def _index_command(folder: Path) -> str:
    return f"ssl-kit index {shlex.quote(str(folder))}"


def _unit_vectors(folder: Path, info: Entries) -> Iterator[np.ndarray]:
    """The directions of the vectors of a folder, (rows, D) float32; one part is in memory, and verified.

    Who takes a block searches it before taking the next: the time between is that of the search.

    Raises:
        UserError: after the first block, when at this pace all would take longer than a minute.
    """
    began, paced = time.perf_counter(), False
    for vectors, name in zip(read_vectors(folder, info), part_names(info), strict=True):
        verify_file(folder, name, info["files"][name])
        read = time.perf_counter()
        for start in range(0, len(vectors), SEARCHED_ROWS):
            block = normalised(vectors[start : start + SEARCHED_ROWS])
            yield block
            if not paced:
                pace = (read - began) / len(vectors) + (time.perf_counter() - read) / len(block)  # seconds per row
                if pace * info["rows"] > _PATIENCE:
                    raise _too_much(folder, info, f"take about {pace * info['rows'] / 60:,.1f} minutes")
                paced = True


def _check_memory(folder: Path, info: Entries, queries: int, k: int) -> None:
    """Raises `UserError` when an exact search needs more memory than is available."""
    answers = 4 * 12 * queries * min(k, info["rows"])  # scores and rows of what was found, as they are sorted
    needed, there = _COPIES * 4 * info["dims"] * min(info["rows"], PART_ROWS) + answers, available_memory()
    if needed > there:
        raise _too_much(folder, info, f"need {needed / 2**20:,.0f} MiB of memory, of {there / 2**20:,.0f}")


def _too_much(folder: Path, info: Entries, what: str) -> UserError:
    return UserError(
        f"{folder}: without its index, an exact search of {info['rows']:,} vectors of {info['dims']} would {what}: run "
        f"`{_index_command(folder)}`, or search with --trust-index if you know who made the index"
    )


def load_encoder(folder: Path, info: Entries, given: str | None = None) -> Encoder:
    """The encoder that made the embeddings in `folder`, and no other.

    Args:
        folder: of embeddings.
        info: its manifest.
        given: run folder or encoder folder; None = where the manifest says.

    Raises:
        UserError: it is not there, or another one is.
    """
    named = os.fsdecode(unescape(str(info.get("encoder"))))
    if given is None and not (Path(named).exists() or is_packaged(named)):
        raise UserError(f"the encoder of {folder} is not at {named}: say where it is with --encoder RUN")
    path = find_encoder(named if given is None else given)
    loaded = Encoder.load(path)
    if loaded.sha256 != info.get("encoder_sha256"):
        raise UserError(
            f"index made by another encoder: {folder} by sha256 {info.get('encoder_sha256')}, {path} has "
            f"{loaded.sha256}; give the right one with --encoder, or run embed and index again"
        )
    if (own := fingerprint(loaded.preprocessing())) != (made := fingerprint(info.get("preprocessing"))):
        raise UserError(
            f"index made with other preprocessing: {folder} by sha256 {made}, {path} has {own} (image size, channels, "
            "mean, std); give the right one with --encoder, or run embed and index again"
        )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _pixels(image: Image, reading: Reading) -> np.ndarray:
    """(H, W, C) uint8 or uint16."""
    if not isinstance(image, str | Path):
        return pixels_given(image, reading, "the image")
    path = Path(image)
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: give image files")
    try:
        return decode(read_regular(os.fsencode(path)), reading, name=escape_path(path)).image
    except (BadImageError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {error}; give an image file") from error


def picture(info: Entries, name: str, size: tuple[int, int] | None) -> np.ndarray | None:
    """The image behind an id, read as for its embedding, at `size` pixels or more if it has them; None = with all.

    None when it is not there any more, or never was a file below its root.
    """
    try:
        data = read_file(info, name)
        return None if data is None else decode(data, reading_in(info.get("preprocessing")), smallest=size).image
    except (BadImageError, ValueError):
        return None


def read_file(info: Entries, name: str) -> bytes | None:
    """The file behind an id, of a built-in set a PNG; None when it is not there any more, or never was a file below its
    root, or in the shards that this names."""
    root, path = info.get("source_root"), unescape(name)  # escapes can hide dots and slashes
    if root is None:
        source = _builtin(info.get("source"))
        return _png(source, name) if source is not None else None
    if not isinstance(root, str) or path.startswith(b"/") or b".." in path.split(b"/"):
        return None
    try:
        return read_regular(os.path.join(unescape(root), path))
    except (OSError, ValueError):  # a NUL is no OSError
        return shards.image(os.fsdecode(unescape(root)), name)


def _png(source: Source, name: str) -> bytes | None:
    ids = source.ids()
    if name not in ids:
        return None
    image, data = pixels(source, ids.index(name)), io.BytesIO()
    PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(data, "PNG")
    return data.getvalue()


def _builtin(named: object) -> Source | None:
    """The built-in set that a manifest names, whole: parts of it keep its ids."""
    name = named.partition(":")[0] if isinstance(named, str) else ""
    try:
        return _builtin_kept(name) if is_builtin(name) else None
    except UserError:  # the package with its images is missing
        return None


@lru_cache(maxsize=2)
def _builtin_kept(name: str) -> Source:
    return builtin_source(name, GREY)
