"""What a command names on the disk, judged by looking: is it there, is it what it should be, may it be written.

Everything here is told before a library is loaded (`verbs/early.py`), and again by the verbs, in the same words. Light:
neither torch nor NumPy, so that a mistyped name is told in a fifth of a second and not after all imports.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain, product
from pathlib import Path

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, NotOursError, entries, read_manifest, settle
from ssl_kit.core.owned import RUN, check_ours, our_files
from ssl_kit.core.sealed import LARGE_JSON, Entries, read_object

TABLES = (".csv", ".tsv", ".parquet")  # endings of manifests
BASELINES = ("pixels", "pca", "random_init")  # of every score
ASKED = (*BASELINES, "patches", "scratch")  # baselines that may be asked for
TAR = ".tar"  # ending of shards
ADDRESSES = ("s3://", "gs://", "https://", "http://")  # where shards are read
ZIPPED = re.compile(r"\.(t[bgx]z2?|tzst|tar\.\w+)$", re.IGNORECASE)  # endings of tars that are compressed
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_SHARDS = 100_000
BUILTIN = ("digits", "mnist5k", "mnist64")  # sets that need no download
PACKAGED = ("photos32",)  # encoders that come with the package, in `encoders/NAME`
RECORD = "encoder.json"  # the record in a folder of an encoder
FORMAT = "ssl_kit embeddings 1"  # of embeddings, as their manifest names it
PLAN = "plan.json"  # of embeddings that are being made
# what a report reads in the folder of a run, any of which makes it one
SHOWN = ("run.json", "recipe.yaml", "metrics.csv", "results.jsonl", "skipped.csv", "pictures", "details")
# the loose files that a run begins with
_WRITTEN = ("recipe.yaml", "metrics.csv", "skipped.csv", "diagnose.csv", "report.html", "pictures/views.png")
_OWN_ENCODERS = Path(__file__).resolve().parent.parent / "encoders"
FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")


def check_data(name: str) -> None:
    """Raises `UserError` where images cannot be what `name` means: nothing is there, or nothing that is read."""
    path = Path(name)
    if name.startswith("pipe:") or path.is_fifo():
        raise UserError(f"{name}: a pipe cannot be read at any place of it; save it as a .tar file and name that")
    if "://" in name:
        if not name.startswith(ADDRESSES):
            raise UserError(f"{name}: wanted a folder, or shards at {', '.join(ADDRESSES)}")
        expanded(name)
        return
    if ZIPPED.search(path.name):
        raise UserError(f"{name} is compressed and cannot be read at any place of it; unpack it to .tar or a folder")
    if not path.exists() and (shards := expanded(name)) != [name]:
        missing = [one for one in shards if not Path(one).is_file()]
        if missing:
            raise UserError(f"{name}: {len(missing):,} of {len(shards):,} files are not there, first {missing[0]}")
    elif is_builtin(name.partition(":")[0]) and not path.exists():
        if name.partition(":")[2] not in ("", "train", "test"):
            raise UserError(f"{name}: a built-in set has the parts train and test")
    elif path.is_file() and path.suffix.lower() not in (*TABLES, TAR):
        raise UserError(
            f"{path} is a file; wanted a folder, a .csv or .parquet with a column 'path', a .tar, or 'mnist5k'"
        )
    elif not path.exists():
        raise UserError(f"no such folder or file: {path}{_nearest(path)}")


def expanded(name: str) -> list[str]:
    """The names that `shard-{000..012}.tar` stands for, in their order; a name without such a part stands for itself.

    Raises:
        UserError: more than 100,000, or none.
    """
    found = list(_RANGE.finditer(name))
    counts = [int(one[2]) - int(one[1]) + 1 for one in found]
    count = math.prod(max(0, one) for one in counts)
    if not 0 < count <= _MOST_SHARDS:
        raise UserError(f"{name} stands for {count:,} files; wanted 1 to {_MOST_SHARDS:,}")
    texts, choices = _RANGE.sub("\0", name).split("\0"), []
    for first, last in (one.groups() for one in found):
        width = max(len(first), len(last)) if first[0] == "0" and len(first) > 1 else 0  # as shells fill up
        choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
    pieces = [[texts[0]], *chain.from_iterable(zip(choices, ([text] for text in texts[1:]), strict=True))]
    return ["".join(one) for one in product(*pieces)]


def check_shown(folder: Path | str) -> None:
    """Raises `UserError` where there is nothing that a report could show."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: expected the run folder of `ssl-kit pretrain` (runs/NAME)")
    if not any((Path(folder) / name).exists() for name in SHOWN):
        raise UserError(f"{folder} holds no run: expected one of {', '.join(SHOWN)}; is it runs/NAME?")


def check_pretrained(given: str) -> None:
    """Raises `UserError` where the weights that `given` names are not on this disk; timm looks for its own."""
    if given.startswith("timm:") or is_packaged(given):
        return
    if not Path(given).exists():
        raise UserError(f"{given} is not on this disk; wanted timm:NAME, or a run, an encoder or a timm folder")
    if not (Path(given) / "config.json").is_file() and not (Path(given) / "model.safetensors").is_file():
        find_encoder(given)


def find_encoder(path: Path | str) -> Path:
    """The encoder folder meant by a run folder, an encoder folder, or the name of one that comes with the package."""
    if is_packaged(path):
        return _OWN_ENCODERS / path
    path = Path(path)
    for folder in (path, path / "encoder"):
        settle(folder)
        if (folder / RECORD).is_file():
            return folder
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder, an encoder folder, or {', '.join(PACKAGED)}")
    if (path / RUN).is_file():
        raise UserError(
            f"{path} is a run without an encoder yet; let `ssl-kit pretrain ... --run {path} --resume` finish"
        )
    raise UserError(f"{path} holds no {RECORD}; give a run folder or an encoder folder that ssl_kit wrote")


def results_folder(encoder: Path, out: str | None) -> Path:
    """Where results of an encoder folder go: as asked, else its run, else a folder beside it."""
    if out is not None:
        return Path(out)
    if encoder.parent == _OWN_ENCODERS:
        return Path(f"{encoder.name}-evaluation")
    if encoder.name == "encoder" and (encoder.parent / "run.json").is_file():
        return encoder.parent.resolve() if encoder.parent.is_symlink() else encoder.parent
    return encoder.resolve().parent / f"{encoder.resolve().name}-evaluation"


def manifest_of(folder: Path, verify: bool = False) -> Entries:
    """The manifest of an embeddings folder; `verify` as for `read_manifest`.

    Raises:
        UserError: a run, an encoder, images, or nothing is there.
        DamagedError: see `read_manifest`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give an embeddings folder, as `ssl-kit embed ... --out EMB` writes it")
    try:
        return read_manifest(folder, verify=verify, limit=LARGE_JSON)
    except DamagedError as error:
        if (folder / MANIFEST).exists() or any(folder.glob("part-*")):
            raise
        encoder = (folder / RUN).is_file() or (folder / RECORD).is_file()
        what = "a run or an encoder, no embeddings" if encoder else f"no embeddings folder, it has no {MANIFEST}"
        command = ["ssl-kit", "embed", *((str(folder), "DATA") if encoder else ("RUN", str(folder))), "--out", "EMB"]
        raise DamagedError(f"{folder} is {what}: embed first: {shlex.join(command)}") from error


def is_embeddings(folder: Path) -> bool:
    """Whether a folder holds embeddings, finished or begun."""
    if not folder.is_dir():
        return False
    try:
        if (folder / MANIFEST).is_file():
            # a damaged one may still be overwritten
            return read_object(folder / MANIFEST, LARGE_JSON).get("format") == FORMAT
        return (folder / PLAN).is_file() and "images_sha256" in read_object(folder / PLAN)
    except DamagedError:
        return False


def is_free(folder: Path) -> bool:
    """Whether nothing is there, or only what is hidden: a lock, or what was killed before it wrote anything."""
    return not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()))


def check_free(folder: Path) -> None:
    """Raises `UserError` where something is in a folder that is to be written anew."""
    if not is_free(folder):
        raise UserError(f"{folder} exists: choose another --out, or replace it with --overwrite")


def check_function(name: str, allow: Sequence[str], option: str) -> None:
    """Raises `UserError` for what is no "module:function", or one of a module that is not allowed."""
    module = name.partition(":")[0]
    if not FUNCTION.fullmatch(name):
        raise UserError(f"--{option} {name!r}: wanted module:function")
    if not any(f"{module}.".startswith(f"{allowed}.") for allowed in allow):
        raise UserError(f"--{option} {name} is code that would be run; if you trust {module}, add --allow {module}")


def check_names(names: Iterable[str], known: Sequence[str], option: str) -> None:
    """Raises `UserError` for names that are none of those that an option knows."""
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{option} {','.join(unknown)}: {meant}wanted some of {', '.join(known)}, separated by commas")


def is_packaged(name: Path | str) -> bool:
    """Whether `name` is an encoder that comes with the package; a folder of that name goes before it."""
    return str(name) in PACKAGED and not Path(name).exists()


def is_builtin(name: str) -> bool:
    """Whether `name` is a set that needs no download."""
    return name in BUILTIN


def _nearest(path: Path) -> str:
    """What exists of a path that does not: its nearest parent and the most similar name there."""
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = os.listdir(missing.parent)
    except OSError:
        names = []
    close = difflib.get_close_matches(missing.name, names, 1)
    similar = f"; did you mean {missing.parent / close[0]}?" if close else ""
    return f" ({missing.parent} exists, but has no {missing.name!r}{similar})"


def default_run(data: str) -> Path:
    """Where a run goes that was given no place."""
    return Path("runs", Path(data.split(maxsplit=1)[0] if data.split() else "").name or "run")


def agent() -> str | None:
    """Which agent of torchrun has started this process, on which machine; None where none has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number, since = os.getppid(), ""
    with suppress(OSError):  # in a container each agent may have the same number
        since = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {number} {since}".rstrip()


def restarted(folder: Path) -> bool:
    """Whether torchrun has started the processes of this very job anew (--max-restarts): its run then goes on.

    An agent starts its processes anew without ending itself, and the record of a run names the agents of all machines
    that began it. How often torchrun says it has is no help: on several machines each agent counts its own losses.
    """
    own = agent()
    if own is None or not (folder / RUN).is_file():
        return False
    begun = read_object(folder / RUN).get("agents")
    return isinstance(begun, list) and own in begun


def check_run(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises `UserError` for what may not be in the folder of a run, or must be; nothing is touched."""
    check_ours(folder)
    exists = (folder / RUN).is_file() and (folder / "recipe.yaml").is_file()  # else it was killed as it began
    if resume and overwrite:
        raise UserError("got --resume and --overwrite; give one of them")
    if exists and not (resume or overwrite):
        raise UserError(f"{folder} holds a run already; go on with --resume, or start anew with --overwrite")
    if resume and not exists:
        raise UserError(f"--resume: {folder} holds no run; check --run, or leave --resume out to start one")
    ours = our_files(folder)
    for name in () if resume else entries(folder):
        if name in _WRITTEN and name not in ours:
            raise NotOursError(f"{folder / name} is not ssl_kit's: move it away, or choose another --run")
