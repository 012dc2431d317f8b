"""Index files, and the signatures that tell ours from those that strangers hand over.

The key is 32 random bytes. A group shares one: `SSL_KIT_KEY` holds it as 64 hexadecimal digits, or the path of a file
with it. Otherwise it lies in the user's data folder, `$XDG_DATA_HOME/ssl_kit/key` (`~/.local/share/ssl_kit/key`), made
by the first writer; readers never make one. A signature is an HMAC-SHA256 (RFC 2104).

FAISS's reader is not made for strangers' files: crafted ones make it open other files for writing, and read out of
bounds. It gets a file only when we signed it, or when a user says so (`search.py`), and only the very bytes whose
sha256 was compared.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import sync, unreplaced, verify_file
from ssl_kit.core.sealed import Entries, fingerprint
from ssl_kit.embeddings.folder import part_names

FILE = "index.faiss"
VARIABLE = "SSL_KIT_KEY"
_untyped: Any = faiss  # its stubs do not know readers and lists that are made of others
FaissIndex: TypeAlias = faiss.Index
_SIZE = 32  # bytes
_SIGNED = "ssl_kit index 1"  # what a signature is of
# of a manifest: what the vectors are, beside the parts that hold them
_VECTORS = ("rows", "dims", "dtype", "layers", "metric", "normalised", "precision", "encoder_sha256", "preprocessing")
_DIGITS = re.compile(rf"[0-9a-fA-F]{{{2 * _SIZE}}}", re.ASCII)


def find_key() -> bytes | None:
    """The key; None where there is none yet, or no data folder to look into.

    Raises:
        UserError: `SSL_KIT_KEY` is neither digits nor a file; a key file is a link, too long or too short, or others
            may read or write it.
    """
    given = os.environ.get(VARIABLE)
    try:
        if given is None:
            return _read(key_file())
        return bytes.fromhex(given) if _DIGITS.fullmatch(given) else _read(Path(given).expanduser())
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; `~` where there is no home
        if given is None:
            return None
        # not the value: it may be a key with a digit too few
        raise UserError(
            f"{VARIABLE} holds {len(given)} characters that are no key and no file that can be read; wanted "
            f"{2 * _SIZE} hexadecimal digits, or the path of a file with {_SIZE} bytes or those digits"
        ) from error


def make_key() -> bytes:
    """The key; where there is none, one is made. Two processes that make one at once end with the same.

    Raises:
        UserError: as `find_key`.
        OSError: there is nowhere to keep it.
    """
    if (found := find_key()) is not None:
        return found
    path = key_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".key.", dir=path.parent)  # O_EXCL, 0600
    try:
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(_SIZE))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first: its key is the key
            os.link(name, path)
    finally:
        os.unlink(name)
    sync(path.parent)
    return _read(path)


def key_file() -> Path:
    """Where a user's own key lies, or would.

    Raises:
        OSError: the user has no home.
    """
    data = os.environ.get("XDG_DATA_HOME", "")
    folder = data if os.path.isabs(data) else os.path.join(os.path.expanduser("~"), ".local", "share")
    if not os.path.isabs(folder):
        raise FileNotFoundError("there is no home folder to keep a key in")
    return Path(folder) / "ssl_kit" / "key"


def signature(key: bytes, what: str, value: object) -> str:
    """Hex HMAC of a value that JSON can hold; `what` says what is signed, so that it stands for nothing else."""
    return hmac.new(key, f"{what}\0{fingerprint(value)}".encode(), "sha256").hexdigest()


def is_signed(key: bytes, what: str, value: object, by: object) -> bool:
    """Whether `by` is the signature of a value under this key."""
    return isinstance(by, str) and by.isascii() and hmac.compare_digest(by, signature(key, what, value))


def vectors_fingerprint(info: Entries) -> str:
    """Hex sha256 of all that makes an index fit an embeddings folder: its parts, and how the vectors were made.

    Args:
        info: manifest of the folder.
    """
    parts = {name: info["files"][name] for name in part_names(info)}
    return fingerprint([parts, [info.get(name) for name in _VECTORS]])


def _claim(info: Entries) -> list[object]:
    """All that decides what an index is, and is signed: its file, what is said of it, and the vectors it is of."""
    entry = {name: value for name, value in info["index"].items() if name != "signature"}
    return [info["files"][FILE], entry, vectors_fingerprint(info), info["rows"], info["dims"]]


def index_signature(key: bytes, info: Entries) -> str:
    """The signature of the index that a manifest describes; it goes into its entry `index`."""
    return signature(key, _SIGNED, _claim(info))


def is_ours(key: bytes, info: Entries) -> bool:
    """Whether the index that a manifest describes was signed with this key."""
    return is_signed(key, _SIGNED, _claim(info), info["index"].get("signature"))


def _read(path: Path) -> bytes:
    """The key in a file that is its user's alone."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"the key {path} is a link; wanted a file of your own with {_SIZE} bytes") from error
        raise
    with open(handle, "rb") as file:
        found, data = os.fstat(file.fileno()), file.read(4 * _SIZE)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"the key {path} is no file; wanted one with {_SIZE} bytes")
    if os.name == "posix" and found.st_mode & 0o077:
        raise UserError(
            f"others may read or write the key {path} (mode {stat.S_IMODE(found.st_mode):04o}): if nobody has, "
            "`chmod 600` it; otherwise remove it and index again"
        )
    if len(data) == _SIZE:
        return data
    if _DIGITS.fullmatch(text := data.decode("ascii", "replace").strip()):
        return bytes.fromhex(text)
    raise UserError(
        f"the key {path} holds {len(data)} bytes; wanted {_SIZE}, or {2 * _SIZE} hexadecimal digits: remove it and "
        "`ssl-kit index` makes a new one"
    )


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

        kept = getattr(index, "referenced_objects", None)
        if kept and isinstance(kept[0], faiss.HStackInvertedLists):
            _write_stacked(index, kept[0], write)
        else:
            faiss.write_index(index, _untyped.PyCallbackIOWriter(write, _WRITTEN))
    return digest.hexdigest()


def stack(index: faiss.Index, shards: Sequence[faiss.Index]) -> None:
    """Makes an index that is trained and empty show the lists of others, one after the other, where they are.

    It can be searched and written then. `faiss.contrib.ondisk.merge_ondisk` would copy them to a file that the index
    names by its path: two files, of which one opens the other.

    Args:
        index: one that `can_be_stacked`.
        shards: copies of it, filled with rows that they know by their numbers in the whole; kept as long as `index` is.
    """
    lists, parts = faiss.extract_index_ivf(index), _untyped.InvertedListsPtrVector()
    for shard in shards:
        mapped = _untyped.downcast_InvertedLists(faiss.extract_index_ivf(shard).invlists)
        mapped.prefetch_nthread = 0  # else each query starts 32 threads for each shard
        parts.push_back(mapped)
    whole = faiss.HStackInvertedLists(parts.size(), parts.data())
    lists.replace_invlists(whole, False)
    index.ntotal = lists.ntotal = sum(shard.ntotal for shard in shards)
    index.referenced_objects = [whole, *shards]  # type: ignore[attr-defined]  # FAISS's own name for what must live as long


def can_be_stacked(index: faiss.Index) -> bool:
    """Whether the file of an index, which is empty yet, ends with its lists, and these hold plain codes."""
    lists = faiss.try_extract_index_ivf(index)
    return lists is not None and faiss.serialize_index(index).tobytes().endswith(_no_lists(lists))


def _no_lists(lists: faiss.IndexIVF) -> bytes:
    """How FAISS writes lists that are empty."""
    return b"ilar" + struct.pack("<QQ", lists.nlist, lists.code_size) + b"sprs" + struct.pack("<Q", 0)


def _write_stacked(index: faiss.Index, whole: faiss.InvertedLists, write: Callable[[bytes], None]) -> None:
    """What FAISS would write of the same index with the lists in memory: of a stack it writes none.

    Only one list is in memory at a time.
    """
    lists, empty = faiss.extract_index_ivf(index), faiss.ArrayInvertedLists(whole.nlist, whole.code_size)
    lists.replace_invlists(empty, False)
    data, none = faiss.serialize_index(index).tobytes(), _no_lists(lists)
    lists.replace_invlists(whole, False)
    assert data.endswith(none), "can_be_stacked"
    write(data[: -len(none)] + none[:20])
    sizes = np.array([whole.list_size(number) for number in range(lists.nlist)], "<u8")
    filled = np.flatnonzero(sizes)
    if len(filled) > lists.nlist // 2:
        write(b"full" + struct.pack("<Q", lists.nlist) + sizes.tobytes())
    else:
        pairs = np.stack((filled, sizes[filled]), 1).astype("<u8")
        write(b"sprs" + struct.pack("<Q", pairs.size) + pairs.tobytes())
    for number in filled:
        ids, codes = get_invlist(whole, int(number))
        write(codes.tobytes() + ids.tobytes())


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
            index = _mapped(path, digest) if mapped else _read_index(path, size, digest)
    except (RuntimeError, MemoryError) as error:
        raise DamagedError(f"{path} cannot be read: {(str(error).strip() or 'memory').splitlines()[-1]}") from error
    if (index.ntotal, index.d) != (count, dim) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DamagedError(f"{path} holds {index.ntotal:,} vectors of {index.d}; its manifest says {count:,} of {dim}")
    return index


def _read_index(path: Path, size: int, digest: str | None) -> faiss.Index:
    """Hashes and parses one copy in memory: nobody can change the file in between.

    The table that is skipped is of Euclidean distances; where it is larger than the file, FAISS refuses the file.
    """
    reader = faiss.VectorIOReader()
    reader.data.resize(size)
    data = faiss.rev_swig_ptr(reader.data.data(), size).data if size else bytearray()
    with open(path, "rb") as file:
        whole = file.readinto(data) == size and not file.read(1)
    got = hashlib.sha256(data).hexdigest()
    if not whole or digest not in (None, got):
        raise DamagedError(f"{path} is damaged: sha256 {got[:12]}..., its manifest says {str(digest)[:12]}...")
    return faiss.read_index(reader, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)


def _mapped(path: Path, digest: str | None) -> faiss.Index:
    """Hashes the file, then maps it. What that leaves open: whoever may write to the file can change it afterwards, as
    long as it is mapped (docs/retrieval.md).

    FAISS maps lists by one flag and exact vectors by another, which does not know lists.
    """
    if digest is not None:
        verify_file(path.parent, path.name, digest)
    with open(path, "rb") as file:
        exact = file.read(4) in (b"IxFI", b"IxF2")
    flag = faiss.IO_FLAG_MMAP_IFC if exact else faiss.IO_FLAG_MMAP
    return faiss.read_index(str(path), flag | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
