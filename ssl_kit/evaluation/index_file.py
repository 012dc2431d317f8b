"""FAISS index files: written, and read from strangers.

A file is read only after its sha256 was compared with its manifest. That finds damage. A stranger can rewrite both:
then FAISS's own checks and limits stand between the file and this process, and here what they leave open. Files that
make FAISS open other files are refused, as are kinds of indexes that `build_index` is not used for, parts that do not
fit each other (FAISS 1.15.1 reads past the end of fast-scan codes and of queries then), and numbers with which a search
would allocate senselessly much. It is no proof: where an index matters and its origin is in doubt, `ssl-kit index`
makes it anew from the vectors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before faiss, always: two OpenMP runtimes, and this order is the one that works

import faiss  # isort: skip

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.files import unreplaced

_LEAST_LOOPS = 65_536  # that a file may ask of FAISS: more than an honest one needs beside a loop per vector
_MOST_CANDIDATES = 1_000  # per result, of a refinement; `build_index` sets 4 to 64
_MOST_SEARCHED = 2**16  # candidates of a graph search; FAISS sets 16
# What comes before exact vectors: kind, d, n, two of `_FILLING`, trained, metric, n * d
_EXACT = struct.Struct("<4siqqqBiQ")
_FILLING = 2**20
_ST_PQ = 0  # faiss.IndexPQ.ST_PQ
_KINDS = (
    *("IndexFlat", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ", "IndexPQFastScan"),
    *("IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ", "IndexPreTransform", "IndexRefine", "IndexRefineFlat"),
    *("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ", "IndexIVFPQFastScan"),
)


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index file; the caller makes it atomic."""
    faiss.write_index(index, str(path))


def read_index(path: Path, count: int, dim: int, mapped: bool = False) -> faiss.Index:
    """Reads an index file whose sha256 has been verified, and checks that it is what its manifest says.

    FAISS is held to what an honest file can ask for: no vector is larger than the file, nothing is repeated more often
    than there are vectors.

    Args:
        path: of the file.
        count: vectors that it must hold.
        dim: of each.
        mapped: leave the codes on disk and map them into memory: lists of scalar or byte product codes, and exact
            indexes. The file must stay there; several processes share its pages.

    Raises:
        DamagedError: FAISS cannot read it, its parts do not fit each other, or it does not hold `count` vectors of
            `dim` by inner product.
    """
    try:
        with unreplaced(path.parent):
            _names_no_file(path)
            faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
            faiss.set_deserialization_loop_limit(max(count, dim, _LEAST_LOOPS))
            index = _mapped(path, count, dim) if mapped else faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise DamagedError(f"{path} cannot be read: {str(error).strip().splitlines()[-1]}") from error
    if (index.ntotal, index.d) != (count, dim) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DamagedError(f"{path} holds {index.ntotal:,} vectors of {index.d}; its manifest says {count:,} of {dim}")
    for wrong in _wrong(index):
        raise DamagedError(f"{path} makes no sense: {wrong}")
    return index


def _mapped(path: Path, count: int, dim: int) -> faiss.Index:
    """FAISS maps lists by one flag and exact vectors by another, which does not know lists.

    By the second one FAISS 1.15.1 reads past the end of a file that is too short: every byte before the vectors is
    known, and is compared before.
    """
    with open(path, "rb") as file:
        head = file.read(_EXACT.size)
    if head[:4] not in (b"IxFI", b"IxF2"):
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    metric = faiss.METRIC_INNER_PRODUCT
    wanted = _EXACT.pack(b"IxFI", dim, count, _FILLING, _FILLING, True, metric, count * dim)
    if head != wanted or path.stat().st_size != _EXACT.size + 4 * count * dim:
        raise DamagedError(f"{path} is no exact index to be mapped; its manifest says {count:,} vectors of {dim}")
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _names_no_file(path: Path) -> None:
    """Raises `DamagedError` when an index file would make FAISS open another file for reading and writing.

    Lists that lie in a file of their own begin with the word "ilod", the number of lists and the size of a code, 8
    bytes each; real ones fit into 5 and 3, so that codes are not taken for it by chance.
    """
    if not path.stat().st_size:
        raise DamagedError(f"{path} is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = data.find(b"ilod")
        while place >= 0:
            if data[place + 9 : place + 12] == bytes(3) and data[place + 15 : place + 20] == bytes(5):
                raise DamagedError(f"{path} keeps its lists in another file; refused")
            place = data.find(b"ilod", place + 1)


def _wrong(index: Any) -> Iterator[str]:  # faiss's stubs lack half of its attributes
    """What is wrong with an index or a part of it, in words."""
    if type(index).__name__ not in _KINDS:
        yield f"an index of type {type(index).__name__} is not read here; see docs/retrieval.md"
    if isinstance(index, faiss.IndexPreTransform):
        yield from _wrong_transform(index)
    elif isinstance(index, faiss.IndexRefine):
        if not (math.isfinite(index.k_factor) and 1 <= index.k_factor <= _MOST_CANDIDATES):
            yield f"{index.k_factor} candidates per result; wanted 1 to {_MOST_CANDIDATES:,}"
        yield from _wrong_part(index.base_index, index.d, index.ntotal, index.metric_type)
        yield from _wrong_part(index.refine_index, index.d, index.ntotal, index.metric_type)
    elif isinstance(index, faiss.IndexIVF):
        yield from _wrong_lists(index)
    elif isinstance(index, faiss.IndexHNSW):
        if not 1 <= index.hnsw.efSearch <= _MOST_SEARCHED:
            yield f"{index.hnsw.efSearch} candidates of a graph search; wanted 1 to {_MOST_SEARCHED:,}"
        yield from _wrong_part(index.storage, index.d, index.ntotal, index.metric_type)
    elif isinstance(index, faiss.IndexFastScan):
        yield from _wrong_blocks(index)
    elif isinstance(index, faiss.IndexPQ):
        yield from _wrong_way(index)


def _wrong_blocks(index: Any) -> Iterator[str]:
    blocks = -(-index.ntotal // index.bbs) * index.bbs
    if index.ntotal2 != blocks or index.codes.size() != blocks * index.M2 // 2:
        yield f"codes of {index.ntotal2:,} vectors in {index.codes.size():,} bytes for {index.ntotal:,} vectors"


def _wrong_way(index: Any) -> Iterator[str]:
    if index.search_type != _ST_PQ:
        yield f"a way of searching, {index.search_type}, that needs tables of its own"


def _wrong_part(part: Any, dim: int, count: int, metric: int) -> Iterator[str]:
    """An index inside another: it must hold as many vectors of the same size, compared the same way."""
    inner = faiss.downcast_index(part)
    if inner is None:
        yield "a part is missing"
        return
    if (inner.d, inner.ntotal, inner.metric_type) != (dim, count, metric):
        yield f"a part of it holds {inner.ntotal:,} vectors of {inner.d}; wanted {count:,} of {dim}"
    yield from _wrong(inner)


def _wrong_transform(index: Any) -> Iterator[str]:
    dim = index.d
    for place in range(index.chain.size()):
        step = faiss.downcast_VectorTransform(index.chain.at(place))
        if step.d_in != dim:
            yield f"a transformation of {step.d_in} numbers where there are {dim}"
        dim = step.d_out
    yield from _wrong_part(index.index, dim, index.ntotal, index.metric_type)


def _wrong_lists(index: Any) -> Iterator[str]:
    if not 1 <= index.nprobe <= max(1, index.nlist):
        yield f"{index.nprobe} of {index.nlist} lists are to be visited"
    if index.invlists is None or index.invlists.nlist != index.nlist:
        yield "the lists are missing"
    elif index.invlists.compute_ntotal() != index.ntotal:
        yield f"the lists hold {index.invlists.compute_ntotal():,} vectors, not {index.ntotal:,}"
    quantizer = faiss.downcast_index(index.quantizer)
    metric = quantizer.metric_type if quantizer is not None else index.metric_type  # lists may be chosen by another
    yield from _wrong_part(index.quantizer, index.d, index.nlist, metric)
