"""FAISS index files: written, and read again.

FAISS's reader is not made for strangers' files: crafted ones make it open other files for writing, and read out of
bounds. It gets a file only when we signed it, or when a user says so (`searching.py`), and only the very bytes whose
sha256 was compared.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch  # noqa: F401  before faiss, always: two OpenMP runtimes, and this order is the one that works

import faiss  # isort: skip

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.files import unreplaced, verify_file

_WRITTEN = 2**20  # bytes at once
_LEAST_LOOPS = 65_536  # that a file may ask of FAISS: more than an honest one needs beside a loop per vector


def write_index(index: faiss.Index, path: Path) -> str:
    """Writes an index file; the caller makes it atomic.

    Returns:
        The hex sha256 of what was written, which need not be what somebody else finds there later.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        faiss.write_index(index, faiss.PyCallbackIOWriter(write, _WRITTEN))  # type: ignore[attr-defined]
    return digest.hexdigest()


def read_index(path: Path, count: int, dim: int, mapped: bool = False, *, digest: str | None = None) -> faiss.Index:
    """Reads an index file, and checks that it is what its manifest says.

    Args:
        path: of the file.
        count: vectors that it must hold.
        dim: of each.
        mapped: leave the codes on disk and map them into memory: lists of scalar or byte product codes, and exact
            indexes. The file must stay there; several processes share its pages.
        digest: hex sha256 that the file must have; None for a file that this process has just written.

    Raises:
        DamagedError: another sha256, FAISS cannot read it, or it does not hold `count` vectors of `dim` by inner
            product.
    """
    if not path.is_file():  # a pipe would block
        raise DamagedError(f"{path} is missing, though its manifest names it")
    try:
        with unreplaced(path.parent):
            size = path.stat().st_size
            faiss.set_deserialization_vector_byte_limit(size)  # no vector is larger than the file
            faiss.set_deserialization_loop_limit(max(count, dim, _LEAST_LOOPS))
            index = _mapped(path, digest) if mapped else _read(path, size, digest)
    except (RuntimeError, MemoryError) as error:
        raise DamagedError(f"{path} cannot be read: {(str(error).strip() or 'memory').splitlines()[-1]}") from error
    if (index.ntotal, index.d) != (count, dim) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DamagedError(f"{path} holds {index.ntotal:,} vectors of {index.d}; its manifest says {count:,} of {dim}")
    return index


def _read(path: Path, size: int, digest: str | None) -> faiss.Index:
    """Hashes and parses one copy in memory: nobody can change the file in between."""
    reader = faiss.VectorIOReader()
    reader.data.resize(size)
    data = faiss.rev_swig_ptr(reader.data.data(), size).data if size else bytearray()
    with open(path, "rb") as file:
        whole = file.readinto(data) == size and not file.read(1)
    got = hashlib.sha256(data).hexdigest()
    if not whole or digest not in (None, got):
        raise DamagedError(f"{path} is damaged: sha256 {got[:12]}..., its manifest says {str(digest)[:12]}...")
    return faiss.read_index(reader)


def _mapped(path: Path, digest: str | None) -> faiss.Index:
    """Hashes the file, then maps it. What that leaves open: whoever may write to the file can change it afterwards, as
    long as it is mapped (docs/retrieval.md).

    FAISS maps lists by one flag and exact vectors by another, which does not know lists.
    """
    if digest is not None:
        verify_file(path.parent, path.name, digest)
    with open(path, "rb") as file:
        exact = file.read(4) in (b"IxFI", b"IxF2")
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if exact else faiss.IO_FLAG_MMAP)
