"""An index that several processes fill: trained once, parts are added to copies of it, and their lists become one file.

Each process holds the lists of one shard (a 64th of the vectors) at a time, which then lie in a file; what is searched
and written in the end is a view of these files, mapped (`signing.stack`). So the memory of all is a small part of that
of an index built in one process, and the bytes of the index are the same.

The processes are forked from one that this file starts, and that has neither torch nor a thread yet: what it has
imported they share.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import faiss
import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.parquet import contents
from ssl_kit.core.process import cores
from ssl_kit.core.sealed import Entries
from ssl_kit.embeddings.folder import part_names, read_vectors
from ssl_kit.embeddings.index import SEARCHED_ROWS, Found, Gallery, fill, nearest_of, none
from ssl_kit.embeddings.signing import read_index, stack, write_index

_SHARDS = 64  # at most: their tables of lists are in memory when they are searched and merged
_MOTHER = "from ssl_kit import core; core.light = True; from ssl_kit.embeddings import filling; filling.main()"
_TRAINED, _QUERIES, _FOUND, _TOLD = "trained", "queries.npy", "found.npz", "told"


@dataclass(frozen=True)
class Filling:
    """Processes that fill an index.

    Attributes:
        folder: of embeddings, verified.
        info: its manifest.
        processes: how many add vectors at the same time.
        scratch: an empty folder of our own on a disk with room for the index; needed until the index is written.
    """

    folder: Path
    info: Entries
    processes: int
    scratch: Path

    def room(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        """An array in a file: k-means reads its sample from the disk's cache, which takes no memory from anybody."""
        made = np.memmap(self.scratch / "sample", dtype, "w+", shape=shape)
        return np.asarray(made)  # faiss.contrib.torch_utils, which any library may load, takes no subclass

    def fill(self, index: faiss.Index, query_vectors: np.ndarray) -> tuple[Found, np.ndarray]:
        """As `index.fill` for all vectors of the folder.

        Raises:
            UserError: what a process says that failed, or that it was killed.
        """
        np.save(self.scratch / _QUERIES, query_vectors)
        shards, dims = self._shards(), self.info["dims"]
        job = {
            "folder": str(self.folder.absolute()),
            "scratch": str(self.scratch.absolute()),
            "info": self.info,
            "processes": self.processes,
            "trained": write_index(index, self.scratch / _TRAINED),
            "shards": shards,
        }
        with suppress(OSError, AttributeError):  # only glibc has it; what training took would stay
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        digests = self._run(job)
        read = lambda number: read_index(
            self.scratch / str(number), shards[number][2], dims, mapped=True, digest=digests[number]
        )
        stack(index, list(map(read, range(len(shards)))))
        with np.load(self.scratch / _FOUND) as found:
            return (found["scores"], found["rows"]), found["zero"]

    def _shards(self) -> list[tuple[list[str], int, int]]:
        """Names of parts that are one shard, its first row and its rows."""
        names, found, start = part_names(self.info), [], 0
        size = -(-len(names) // _SHARDS)
        for first in range(0, len(names), size):
            shard = names[first : first + size]
            rows = sum(contents(self.folder / name, ("id",)).columns["id"].rows for name in shard)
            found.append((shard, start, rows))
            start += rows
        return found

    def _run(self, job: Entries) -> list[str]:
        """Has the job done; the sha256 of each shard's file."""
        threads = str(max(1, cores() // self.processes))
        # -P: by itself `python -c` would import from the current folder first
        path = os.pathsep.join(filter(None, sys.path))
        own = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        own |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "ARROW_DEFAULT_MEMORY_POOL": "system"}
        told = self.scratch / _TOLD  # a file: a pipe that nobody reads yet would hold up who writes much
        with open(told, "wb") as errors:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _MOTHER],
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                process_group=0,
            )
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it has ended already, and says why
                child.stdin.write(json.dumps(job).encode() + b"\n")
                child.stdin.flush()  # left open: its end would tell that this process is dead
            said = child.stdout.read()
            if child.wait() != 0:
                failed = told.read_text(errors="replace").strip()
                raise UserError(failed.splitlines()[-1] if failed else "a process that filled the index was killed")
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(child.pid, signal.SIGKILL)
        return json.loads(said)


def main() -> None:
    """What `Filling` starts: reads a job from stdin, has its processes do it, and prints the sha256 of the shards."""
    job = json.loads(sys.stdin.readline())
    faiss.cvar.distance_compute_blas_query_bs = 1_024  # 4 MiB of scores in each process where 16 are usual
    nearest, zero, digests = none(len(np.load(Path(job["scratch"]) / _QUERIES, mmap_mode="r"))), [], []
    try:
        with ProcessPoolExecutor(job["processes"], get_context("fork")) as pool:
            waiting = [pool.submit(_shard, job, number) for number in range(len(job["shards"]))]
            Thread(target=_end_with_parent, daemon=True).start()
            for future in waiting:
                found, empty, digest = future.result()
                nearest = nearest_of(nearest, found, 0, 11)
                zero.append(empty)
                digests.append(digest)
    except BrokenProcessPool:
        sys.exit("a process that filled the index was killed, perhaps for memory: give fewer --processes")
    except (UserError, OSError) as error:
        sys.exit(str(error))
    np.savez(Path(job["scratch"]) / _FOUND, scores=nearest[0], rows=nearest[1], zero=np.concatenate(zero))
    print(json.dumps(digests))


def _end_with_parent() -> None:
    """Ends all of us when the process is gone that asked for the index."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def _shard(job: Entries, number: int) -> tuple[Found, np.ndarray, str]:
    """Writes a shard: the nearest vectors of each query there, the rows without a direction, and its sha256."""
    names, start, rows = job["shards"][number]
    scratch, folder, info = Path(job["scratch"]), Path(job["folder"]), job["info"]
    info = {**info, "files": {name: info["files"][name] for name in names}, "rows": rows}
    index = read_index(scratch / _TRAINED, 0, info["dims"], digest=job["trained"])
    gallery = Gallery(rows, info["dims"], lambda: read_vectors(folder, info, SEARCHED_ROWS))
    (scores, found), zero = fill(index, gallery, np.load(scratch / _QUERIES), start)
    return (scores, found), zero, write_index(index, scratch / str(number))
