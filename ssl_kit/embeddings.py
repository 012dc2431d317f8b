"""Embeddings: feature vectors with ids and labels, in memory and on disk. An image is embedded once; probes read this.

The folder:
    part-00000.parquet ...   65,536 rows each, in source order: id (string), label (string or null),
                             embedding (fixed_size_list<float32 or float16>[D])
    skipped.csv              files that could not be decoded: path, reason
    manifest.json            what made it, and the sha256 of every file; written last

An id is the path below the source's root, bytes that are not UTF-8 percent-escaped (see data/listing.py), so it
goes through Parquet, JSON and CSV and back to the very bytes of the file's name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import ssl_kit
from ssl_kit.core.console import progress
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, DamagedError, atomic_folder, read_manifest
from ssl_kit.core.machine import choose_precision
from ssl_kit.data.batches import ViewLoader
from ssl_kit.data.listing import escape_path
from ssl_kit.data.skipped import write_skipped
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.views.recipe import View, plain

FORMAT = "ssl_kit embeddings 1"
PART_ROWS = 65_536
SKIPPED = "skipped.csv"

Storage = Literal["float32", "float16"]
Precision = Literal["auto", "float32", "bfloat16"]

_PART = re.compile(r"part-\d{5,}\.parquet")
_MAX_DIMS = 2**20  # a stranger's manifest may not ask for more


@dataclass
class Embeddings:
    """Feature vectors; row i of everything belongs to the same image.

    Attributes:
        vectors: (N, D) float32.
        labels: (N,) int64 positions in `classes`, -1 = unknown.
        classes: class names.
        ids: paths below the source's root, unique.
        info: what `manifest.json` says: rows, dims, layers, dtype (stored), metric, normalised, precision, encoder (its
            folder), encoder_sha256, source (its name), source_root, preprocessing, made_by. Paths are escaped like ids.
        skipped: (id, reason) of the images that are missing because they could not be decoded.
    """

    vectors: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    ids: list[str]
    info: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        assert self.vectors.ndim == 2 and len(self.vectors) == len(self.labels) == len(self.ids), "one row per image"

    def __len__(self) -> int:
        return len(self.vectors)

    def normalised(self) -> Embeddings:
        """The same with rows of Euclidean length 1 (a zero row stays zero): inner product = cosine."""
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        vectors = self.vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return dataclasses.replace(self, vectors=vectors, info={**self.info, "normalised": True})

    def save(self, folder: Path | str, dtype: Storage = "float32") -> Path:
        """Writes the folder atomically; an existing one is replaced whole, with its index.

        Args:
            folder: where to.
            dtype: how vectors are stored; float16 halves the bytes and keeps 3 digits.
        """
        if dtype == "float16" and (largest := float(np.abs(self.vectors).max(initial=0))) > float(
            np.finfo(np.float16).max
        ):
            raise UserError(f"features reach {largest:.3g}, float16 ends at 65,504: use --dtype float32 or --normalise")
        folder = Path(folder)
        self.info = {
            "metric": "cosine",
            "normalised": False,
            **self.info,
            "format": FORMAT,
            "rows": len(self),
            "dims": int(self.vectors.shape[1]),
            "dtype": dtype,
            "classes": list(self.classes),
            "skipped": len(self.skipped),
        }
        self.info.pop("files", None)
        with atomic_folder(folder, self.info) as temporary:
            for part, start in enumerate(range(0, max(len(self), 1), PART_ROWS)):
                _write_part(temporary / f"part-{part:05d}.parquet", self._table(start, start + PART_ROWS, dtype))
            write_skipped(temporary / SKIPPED, self.skipped)
        return folder

    def _table(self, start: int, stop: int, dtype: Storage) -> pa.Table:
        rows = slice(start, stop)
        flat = np.ascontiguousarray(self.vectors[rows], dtype=dtype).reshape(-1)
        names = np.array([*self.classes, None], dtype=object)[self.labels[rows]]  # label -1 takes the last, None
        columns = {
            "id": pa.array(self.ids[rows], pa.string()),
            "label": pa.array(names, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(flat), self.vectors.shape[1]),
        }
        return pa.table(columns)

    @classmethod
    def load(cls, folder: Path | str, verify: bool = True) -> Embeddings:
        """Reads an embeddings folder.

        Args:
            folder: that `save` wrote.
            verify: compare the sha256 of every file with the manifest (about 1 s per GB).

        Raises:
            DamagedError: no manifest, or a file that is missing, altered, or not what the manifest says.
        """
        folder = Path(folder)
        info = read_manifest(folder, verify=verify)
        rows, dims, dtype, classes = _checked(info, folder)
        position = {name: row for row, name in enumerate(classes)}
        vectors, labels = np.empty((rows, dims), dtype=np.float32), np.full(rows, -1, dtype=np.int64)
        ids: list[str] = []
        for name in sorted(name for name in info["files"] if _PART.fullmatch(name)):
            table = _read_part(folder / name, dims, dtype)
            part = slice(len(ids), len(ids) + len(table))
            if part.stop > rows:
                raise DamagedError(f"{folder / MANIFEST} says {rows:,} rows; the parts hold more")
            vectors[part] = _matrix(table["embedding"], dims)
            labels[part] = [position.get(name, -2) if name is not None else -1 for name in table["label"].to_pylist()]
            ids += table["id"].to_pylist()
        if len(ids) != rows or (labels == -2).any():
            raise DamagedError(f"{folder / MANIFEST} says {rows:,} rows and {len(classes)} classes; the parts disagree")
        return cls(vectors, labels, tuple(classes), ids, info)


def embed(
    encoder: nn.Module,
    source: Source,
    *,
    layers: int = 1,
    view: View | None = None,
    batch_size: int = 256,
    precision: Precision = "auto",
    label: str = "embedding",
    threads: int | None = None,
) -> Embeddings:
    """Features of every image of a source, in its order. The encoder is left as it was: nothing trains.

    Args:
        encoder: (B, C, h, w) float in [0, 1] -> (B, D), on any device; an `Encoder`, or any module if `view` is given.
        source: the images; those that cannot be decoded are left out and listed in `skipped`.
        layers: concatenate the outputs of so many last stages or blocks.
        view: what the encoder sees of an image; default: all of it, resized and centre-cropped to its size.
        batch_size: images per forward pass; the features do not depend on it beyond rounding.
        precision: of the products; "auto" = bfloat16 where the hardware is fast at it, at a cosine above 0.9999.
        label: of the progress bar.
        threads: for decoding and resizing; None = all cores of this process.

    Raises:
        UserError: too many images cannot be decoded, or the encoder gives NaN or infinite features.
    """
    if view is None:
        assert isinstance(encoder, Encoder), "only an Encoder states its image size; give a view"
        view = plain(encoder.image_size)
    plan = [np.arange(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    precision = _chosen(precision, device)
    vectors, present = np.empty((0, 0), dtype=np.float32), np.zeros(len(source), dtype=bool)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with _evaluating(encoder), torch.inference_mode(), autocast, progress(len(source), label) as bar:
        for number, batch in enumerate(ViewLoader(source, plan, (view,), threads=threads, bad="drop")):
            rows = batch["key"].index.numpy()
            if len(rows):
                features = _features(encoder, batch["views"][0].to(device, non_blocking=True), layers)
                if not vectors.size:
                    vectors = np.empty((len(source), features.shape[1]), dtype=np.float32)
                vectors[rows], present[rows] = features, True
                _finite(features, rows, source)
            bar.advance(bar.task_ids[0], len(plan[number]))
    if not present.any():
        raise UserError(f"{source.name}: none of {len(source):,} images could be decoded; see --max-bad")
    kept = np.flatnonzero(present)
    if len(kept) < len(source):
        vectors = vectors[kept]
    info = _info(encoder, source, view, layers, precision)
    ids = [source.ids[row] for row in kept]
    return Embeddings(vectors, source.labels[kept], source.classes, ids, info, list(source.skipped))


def _features(encoder: nn.Module, images: Tensor, layers: int) -> np.ndarray:
    """(B, D) float32 on the host."""
    images = images.contiguous(memory_format=torch.channels_last)  # convolutions follow their input: 2x on CPUs
    if layers == 1:
        return encoder(images).float().cpu().numpy()
    assert isinstance(encoder, Encoder), "only an Encoder has layers"
    return encoder.layers(images, last=layers).float().cpu().numpy()


def _chosen(precision: Precision, device: torch.device) -> Precision:
    """The precision that "auto" stands for: bfloat16 where the hardware multiplies it, else float32.

    Measured on CIFAR-10 test images, bfloat16 against float32 features: cosine at least 0.99995 for a trained and
    0.99999 for an untrained ResNet-18 of width 16, 0.99998 for ResNet-50, 0.99995 for ViT-Tiny; effective rank within
    0.5 %; 2 to 3 times the speed of the ResNets on a CPU with avx512_bf16. The manifest says which was used.
    """
    return "bfloat16" if choose_precision(precision, device.type).value == "bfloat16" else "float32"


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode it had: frozen parts of a model stay frozen."""
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(features: np.ndarray, rows: np.ndarray, source: Source) -> None:
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        first = source.ids[rows[int(np.argmax(bad))]]
        raise UserError(f"the encoder gives NaN or infinite features for {first!r}: its weights have diverged")


def _info(encoder: nn.Module, source: Source, view: View, layers: int, precision: str) -> dict[str, Any]:
    preprocessing = encoder.preprocessing() if isinstance(encoder, Encoder) else {"image_size": list(view.size)}
    return {
        "layers": layers,
        "metric": "cosine",
        "normalised": False,
        "precision": precision,
        "encoder": None,  # its folder; who loaded it knows
        "encoder_sha256": encoder.sha256 if isinstance(encoder, Encoder) else None,
        "source": escape_path(source.name),
        "source_root": escape_path(source.root.resolve()) if source.root is not None else None,
        "preprocessing": preprocessing,
        "made_by": {"ssl_kit": ssl_kit.__version__, "torch": torch.__version__},
    }


def _write_part(path: Path, table: pa.Table) -> None:
    # Vectors neither repeat nor compress: plain pages write and read three times as fast as the defaults
    compression = {"id": "zstd", "label": "zstd", "embedding.list.element": "none"}
    pq.write_table(table, path, compression=compression, use_dictionary=["label"], write_statistics=False)


def _read_part(path: Path, dims: int, dtype: str) -> pa.Table:
    """A part's three columns, after its header was compared with what the manifest promises."""
    wanted = pa.list_(pa.float32() if dtype == "float32" else pa.float16(), dims)
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            if schema.names != ["id", "label", "embedding"] or schema.field("embedding").type != wanted:
                raise DamagedError(f"{path} has {schema.names}; wanted id, label, embedding of {dims} {dtype}")
            if rows > PART_ROWS:
                raise DamagedError(f"{path} has {rows:,} rows; parts have at most {PART_ROWS:,}")
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path} cannot be read as Parquet: {error}") from error
    if table["id"].null_count or table["id"].type != pa.string() or table["label"].type not in (pa.string(), pa.null()):
        raise DamagedError(f"{path} has ids or labels that are no strings")
    return table


def _matrix(column: pa.ChunkedArray, dims: int) -> np.ndarray:
    """(rows, dims) of a fixed_size_list column without nulls."""
    flat = column.combine_chunks().flatten()
    if column.null_count or flat.null_count:
        raise DamagedError("an embeddings part has rows without a vector")
    return flat.to_numpy(zero_copy_only=False).reshape(-1, dims)


def _checked(info: dict[str, Any], folder: Path) -> tuple[int, int, str, list[str]]:
    """rows, dims, dtype and classes of a manifest, each of the right type and range."""
    rows, dims, dtype, classes = (info.get(name) for name in ("rows", "dims", "dtype", "classes"))
    right = (
        info.get("format") == FORMAT
        and isinstance(rows, int)
        and isinstance(dims, int)
        and 0 < dims <= _MAX_DIMS
        and 0 <= rows <= PART_ROWS * len(info["files"])
        and dtype in ("float32", "float16")
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
    )
    if not right:
        got = {name: info.get(name) for name in ("format", "rows", "dims", "dtype")}
        raise DamagedError(f"{folder / MANIFEST} is not of an embeddings folder ({FORMAT}): {got}")
    assert isinstance(rows, int) and isinstance(dims, int) and isinstance(dtype, str) and isinstance(classes, list)
    return rows, dims, dtype, classes
