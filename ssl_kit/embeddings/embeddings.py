"""Embeddings: feature vectors with ids and labels, in memory and on disk. An image is embedded once; probes read this.

The folder:
    part-00000.parquet ...   65,536 images each, in source order: id (string), label (string or null),
                             embedding (fixed_size_list<float32 or float16>[D]); images that could not be decoded are
                             left out
    skipped.csv              files that could not be decoded: path, reason
    manifest.json            what made it, and the sha256 of every file; written last

An id is the path below the source's root, bytes that are not UTF-8 percent-escaped (see data/listing.py), so it
goes through Parquet, JSON and CSV and back to the very bytes of the file's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import DTypeLike
from rich.progress import Progress
from torch import Tensor, nn

import ssl_kit
from ssl_kit.core.console import progress
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, atomic_folder
from ssl_kit.core.machine import choose_precision, full_float32
from ssl_kit.core.named import FORMAT, manifest_of
from ssl_kit.core.sealed import Entries
from ssl_kit.data.listing import escape_path, write_skipped
from ssl_kit.data.loader import Batch, Planned, ViewLoader
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.folder import (
    PART_ROWS,
    Storage,
    check_range,
    checked,
    matrix,
    part_name,
    part_names,
    read_part,
    write_part,
)
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.wrapped import in_eval_mode
from ssl_kit.views.device import apply_device
from ssl_kit.views.recipe import View, plain

SKIPPED = "skipped.csv"

_LAST = np.empty(0, np.int64), torch.empty(0, 0), None  # after the last batch

Precision = Literal["auto", "float32", "bfloat16"]


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
        groups: (N,) int64 as of a source, None where none is known; not saved.
    """

    vectors: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    ids: list[str]
    info: Entries = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list, repr=False)
    groups: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert self.vectors.ndim == 2 and len(self.vectors) == len(self.labels) == len(self.ids), "one row per image"

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def of(cls, vectors: np.ndarray, labels: np.ndarray | None = None, classes: Sequence[str] = ()) -> Embeddings:
        """Embeddings of arrays at hand: what the functions of `ssl_kit.evaluation` take.

        Args:
            vectors: (N, D) of any real type.
            labels: (N,) integers from 0 on, the same for train and test, -1 = unknown; None = all unknown.
            classes: their names; by default the numbers.

        Raises:
            UserError: the shapes do not fit, or labels are no such integers.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        given = np.full(len(vectors), -1) if labels is None else np.asarray(labels)
        if vectors.ndim != 2 or given.shape != vectors.shape[:1]:
            raise UserError(f"vectors {vectors.shape} and labels {given.shape}: wanted (N, D) and (N,)")
        whole = given.astype(np.int64) if given.dtype.kind in "iu" else np.full(len(given), -2)
        if (whole < -1).any():
            raise UserError(f"labels of type {given.dtype}: wanted integers from 0 on, or -1 where one is unknown")
        largest = int(whole.max(initial=-1))
        names = tuple(classes) or tuple(map(str, range(largest + 1)))
        if largest >= len(names):
            raise UserError(f"label {largest} of {len(names)} classes: wanted a name for each")
        return cls(vectors, whole, names, [str(row) for row in range(len(vectors))])

    def normalised(self) -> Embeddings:
        """The same with rows of Euclidean length 1 (a zero row stays zero): inner product = cosine."""
        vectors = self.vectors / np.linalg.norm(self.vectors, axis=1, keepdims=True).clip(np.finfo(np.float32).tiny)
        return dataclasses.replace(self, vectors=vectors, info={**self.info, "normalised": True})

    def save(self, folder: Path | str, dtype: Storage = "float32") -> Path:
        """Writes the folder atomically; an existing one is replaced whole, with its index.

        Args:
            folder: where to.
            dtype: how vectors are stored; float16 halves the bytes and keeps 3 digits.
        """
        check_range(self.vectors, dtype)
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
        for name in ("files", "plan", "index", "pending"):  # of the folder that these were read from
            self.info.pop(name, None)
        with atomic_folder(folder, self.info) as temporary:
            for part, rows in enumerate(part_slices(len(self))):
                part_ids = self.ids[rows]
                write_part(
                    temporary / part_name(part), self.vectors[rows], self.labels[rows], self.classes, part_ids, dtype
                )
            write_skipped(temporary / SKIPPED, self.skipped)
        return folder

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """The vectors (N, D)."""
        return np.array(self.vectors, dtype=dtype, copy=bool(copy)) if copy else np.asarray(self.vectors, dtype=dtype)

    @classmethod
    def load(cls, folder: Path | str, verify: bool = True) -> Embeddings:
        """Reads an embeddings folder.

        Args:
            folder: that `save` wrote.
            verify: compare the sha256 of every file with the manifest (about 1 s per GB).

        Raises:
            DamagedError: no manifest, or a file that is missing, altered, or not what the manifest says.
        """
        info = manifest_of(folder := Path(folder), verify)
        rows, dims, dtype, classes = checked(info, folder)
        position = {name: row for row, name in enumerate(classes)}
        vectors, labels = np.empty((rows, dims), dtype=np.float32), np.full(rows, -1, dtype=np.int64)
        ids: list[str] = []
        for name in part_names(info):
            table = read_part(folder / name, dims, dtype)
            part = slice(len(ids), len(ids) + len(table))
            if part.stop > rows:
                raise DamagedError(f"{folder / MANIFEST} says {rows:,} rows; the parts hold more")
            vectors[part] = matrix(table, dims, folder / name)
            labels[part] = [position.get(name, -2) if name is not None else -1 for name in table["label"].to_pylist()]
            ids += table["id"].to_pylist()
        if len(ids) != rows or (labels == -2).any():
            raise DamagedError(f"{folder / MANIFEST} says {rows:,} rows and {len(classes)} classes; the parts disagree")
        if not {name: info["files"][name] for name in part_names(info)}.items() <= manifest_of(folder)["files"].items():
            raise DamagedError(f"{folder} was replaced while it was read: read it again")
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
    view = view or whole(encoder)
    plan = [rows for part in part_slices(len(source)) for rows in batches_of(part, batch_size)]
    precision = chosen_precision(precision, encoder)
    with progress(len(source), label) as bar:
        vectors, kept = gathered(
            encoder, source, plan, bar, layers=layers, view=view, precision=precision, threads=threads
        )
    if not len(kept):
        raise UserError(f"{source.name}: none of {len(source):,} images could be decoded; see --max-bad")
    info = describe(encoder, source, view, layers, precision)
    bad = list(source.bad.rows)
    return Embeddings(vectors, source.labels(kept), source.classes, source.ids(kept), info, bad, source.groups(kept))


def features(
    encoder: nn.Module,
    source: Source,
    plan: Iterable[np.ndarray],
    *,
    layers: int = 1,
    view: View,
    precision: Precision,
    threads: int | None = None,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Features batch after batch: rows (B,) int64 and features (B, D) float32; nothing of a batch is kept here.

    To an accelerator images of one size that are in memory go as they are stored, and plain views are made there.

    Args:
        encoder: see `embed`; in evaluation mode until the iterator ends or is closed.
        source: the images.
        plan: positions in `source` of each batch. Images that cannot be decoded are left out of their batch; of one
            without any other, rows are (0,) and features (0, 0).
        layers: see `embed`.
        view: what the encoder sees of an image.
        precision: of the products, float32 or bfloat16.
        threads: for decoding and resizing; None = all cores of this process.

    Raises:
        UserError: too many images cannot be decoded, or the encoder gives NaN or infinite features.
    """
    device = _device(encoder)
    there = device.type != "cpu" and source.stack is not None and view == plain(view.size)
    loader = ViewLoader(source, lambda: (Planned(0, rows) for rows in plan), (view,), threads=threads, on_device=there)

    def started(batch: Batch) -> tuple[np.ndarray, Tensor, torch.cuda.Event | None]:
        """Rows, their features, and when these are there."""
        rows = batch["key"].index.numpy()
        if not len(rows):
            return rows, torch.empty(0, 0), None
        images = _plain_views(batch, view.size, device) if there else tensor_to(batch["views"][0], device)
        return rows, *_to_host(_forward(encoder, images, layers, precision))

    with in_eval_mode(encoder):
        # a batch is given when the next one is on its way: the device need not wait for who takes it
        for (rows, made, done), _ in pairwise(chain(map(started, loader), [_LAST])):
            if done is not None:
                done.synchronize()
            _finite(made.numpy(), rows, source)
            yield rows, made.numpy()


def gathered(
    encoder: nn.Module,
    source: Source,
    plan: Sequence[np.ndarray],
    bar: Progress,
    *,
    layers: int = 1,
    view: View,
    precision: Precision,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`features` of a plan in one array: (R, D) float32, and the R positions of the images that could be decoded."""
    vectors, kept, count = np.empty((0, 0), dtype=np.float32), [np.empty(0, dtype=np.int64)], 0
    made = features(encoder, source, plan, layers=layers, view=view, precision=precision, threads=threads)
    with closing(made):
        for planned, (rows, batch) in zip(plan, made, strict=True):
            if not vectors.size and len(rows):
                vectors = np.empty((sum(map(len, plan)), batch.shape[1]), dtype=np.float32)
            if len(rows):
                vectors[count : count + len(rows)] = batch
                kept.append(rows)
                count += len(rows)
            bar.advance(bar.task_ids[0], len(planned))
    return vectors[:count], np.concatenate(kept)


def forward(encoder: nn.Module, images: Tensor, layers: int, precision: Precision) -> np.ndarray:
    """(B, C, h, w) in [0, 1] to (B, D) float32 on the host; the encoder is in evaluation mode."""
    return _forward(encoder, tensor_to(images, _device(encoder)), layers, precision).cpu().numpy()


def _forward(encoder: nn.Module, images: Tensor, layers: int, precision: Precision) -> Tensor:
    """(B, D) float32 on the encoder's device, where the images are."""
    images = images.contiguous(memory_format=torch.channels_last)  # convolutions follow their input: 2x on CPUs
    autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with torch.inference_mode(), autocast:
        if layers == 1:
            return encoder(images).float()
        assert isinstance(encoder, Encoder), "only an Encoder has layers"
        return encoder.layers(images, last=layers).float()


def tensor_to(images: Tensor, device: torch.device) -> Tensor:
    """The same on the device; from the host to a GPU through pinned memory, so that the host goes on meanwhile."""
    pinned = device.type == "cuda" and images.device.type == "cpu"
    return images.pin_memory().to(device, non_blocking=True) if pinned else images.to(device)


def _plain_views(batch: Batch, size: tuple[int, int], device: torch.device) -> Tensor:
    """Plain views (B, C, h, w) in [0, 1], made on the device of what a loader with `on_device` gives.

    Args:
        batch: pixels as stored, (B, C, H, W) uint8 or uint16, and the parameters of the views.
        size: (h, w).
        device: to which the pixels go as they are.
    """
    stored, params = tensor_to(batch["views"][0], device), batch["params"][0]
    if stored.shape[2:] == size:  # nothing is cut and nothing resized
        return stored.to(torch.float32) / torch.iinfo(stored.dtype).max
    with full_float32():
        return apply_device(stored, tensor_to(params, device), size)


def _to_host(made: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The same on the host; from a GPU it is there only once the event has come."""
    if made.device.type != "cuda":
        return made.cpu(), None
    copied, done = made.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(made.device))
    return copied, done


def whole(encoder: nn.Module) -> View:
    """All of an image, resized and centre-cropped to the encoder's size."""
    assert isinstance(encoder, Encoder), "only an Encoder states its image size; give a view"
    return plain(encoder.image_size)


def _device(encoder: nn.Module) -> torch.device:
    return next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))


def chosen_precision(precision: Precision, encoder: nn.Module) -> Precision:
    """The precision that "auto" stands for: bfloat16 where the encoder's device multiplies it, else float32.

    Measured on CIFAR-10 test images, bfloat16 against float32 features: cosine at least 0.99995 for a trained and
    0.99999 for an untrained ResNet-18 of width 16, 0.99998 for ResNet-50, 0.99995 for ViT-Tiny; effective rank within
    0.5 %; 2 to 3 times the speed of the ResNets on a CPU with avx512_bf16. The manifest says which was used.
    """
    return "bfloat16" if choose_precision(precision, _device(encoder).type).value == "bfloat16" else "float32"


def _finite(features: np.ndarray, rows: np.ndarray, source: Source) -> None:
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        first = source.ids(rows[bad][:1])[0]
        raise UserError(f"the encoder gives NaN or infinite features for {first!r}: its weights have diverged")


def describe(encoder: nn.Module, source: Source, view: View, layers: int, precision: str) -> Entries:
    """What a manifest says of how features were made."""
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


def part_slices(count: int) -> list[slice]:
    """The blocks of `PART_ROWS` images that `count` images are stored in: fixed, so that parts can be made apart."""
    return [slice(start, min(start + PART_ROWS, count)) for start in range(0, max(count, 1), PART_ROWS)]


def batches_of(part: slice, batch_size: int) -> list[np.ndarray]:
    """The positions of a part in batches, which never cross its border: its bytes do not depend on other parts."""
    return [np.arange(start, min(start + batch_size, part.stop)) for start in range(part.start, part.stop, batch_size)]
