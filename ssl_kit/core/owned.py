"""Whose a file is: what a verb may write over or remove, and where it may write at all.

A verb removes only files that a record or a manifest of ours lists, in a folder whose record says that it is ours, and
never through a link. A folder of results has such a record: `run.json` of a run, `results.json` where an encoder was
only evaluated. It lists every loose file before that is written. Sub-folders with a manifest of their own (checkpoints,
the encoder, features) list theirs themselves. Everything else in the folder stays, and is named.

    check_place   where results may go: not into the images, nor where the images or the home lie inside
    Record        the record of a folder, which claims files before they are written
    Former        the run that `--overwrite` replaces, kept aside until the new one could be resumed
    remove        the files of ours in a folder with a manifest of its own
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ssl_kit.core import files
from ssl_kit.core.console import say
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import MANIFEST, NotOursError, entries, is_inside, listed, read_json, sync, write_json
from ssl_kit.core.locking import LOCK
from ssl_kit.core.sealed import LARGE_JSON, Entries, read_object

RUN, RESULTS = "run.json", "results.json"
GOING_ON = ("starting", "running")  # statuses of a run while its process lives
BROKEN_OFF = "broken off"  # that of one whose process was killed
_ASIDE = "aside.json"
_FORMATS = {RUN: "ssl_kit run 1", RESULTS: "ssl_kit results 1"}
_CHECKPOINT = (MANIFEST, "state.json", "state.safetensors")
_ENCODER = ("encoder.json", "config.json", "model.safetensors")
# Sub-folders with a manifest of their own: where they lie, and the files of one whose manifest lists none
_FOLDERS = (
    ("checkpoints/*", r"step-\d{8,}|best", _CHECKPOINT),
    ("finetuning/*/*", r"step-\d{8,}|best", _CHECKPOINT),
    ("encoder", r"encoder", _ENCODER),
    ("finetuned", r"finetuned", _ENCODER),
    ("scratch", r"scratch", _ENCODER),
    ("features/*", r".*", ()),
    ("embeddings", r"embeddings", ()),
)
_PICTURES = ("views", "reconstruction", "reconstructions", "samples", "interpolations", "traversals")
_DRAWN = ("neighbours", "map", "wrong", "looks", "duplicates")
_DETAILS = ("classes.csv", "confusion.csv", "roc.json", "confidently_wrong.csv", "suspected_train.csv")
# The loose files of a folder whose record, of an earlier version, lists none
_UNLISTED = (
    *("recipe.yaml", "metrics.csv", "skipped.csv", "diagnose.csv", "results.jsonl", "leaks.csv", "report.html"),
    *(f"pictures/{name}.png" for name in _PICTURES),
    *(f"pictures/{name}.json" for name in _DRAWN),
    *(f"details/{name}" for name in (*_DETAILS, "suspected_test.csv")),
    "finetuning/settings.json",
)
# What may lie directly in a folder of results; in a folder without a record none of it is ours
_NAMES = (
    *_FORMATS,
    *dict.fromkeys(name.split("/")[0] for name in _UNLISTED),
    *("checkpoints", "embeddings", "encoder", "features", "finetuned", "scratch", "tensorboard", "wandb"),
)


_HEAD = 4_096  # bytes of a file in which it says who made it
_MARKS = (
    b'<meta name="generator" content="ssl_kit ',  # pages
    b"Software\0ssl_kit",  # pictures; tables say nothing, and may have been worked on
)


def check_place(folder: Path | str, data: object = None, *, removing: bool = False) -> None:
    """Whether results may be written to `folder` at all; nothing is touched.

    Args:
        folder: where results are to go; it need not exist.
        data: the images: a folder, a table of them, or several of these as they were typed; anything else has no place
            on the disk.
        removing: whether files of ours that are there already are to be removed.

    Raises:
        UserError: it is a link or a file; it is, holds or lies in the folder of images; it is or holds the list of
            images, the home or the root; when `removing`, also the working folder or a place where a disk is mounted.
    """
    if isinstance(data, list) and data:
        for one in data:
            check_place(folder, one, removing=removing)
        return
    given, place = Path(folder), Path(folder).resolve()
    if given.is_symlink():
        raise UserError(f"{given} is a link to {place}: name the folder itself, so that it is plain what is written to")
    if given.exists() and not given.is_dir():
        raise UserError(f"{given} is a file: name a folder for the results")
    images = Path(data).resolve() if isinstance(data, str | Path) and Path(data).exists() else None
    if images is not None and images.is_dir() and images in place.parents:
        raise UserError(f"{given} lies in the images, {images}: choose a folder outside, pictures are written there")
    kept = [("the images", images), ("the home", Path.home().resolve()), ("the root", Path(place.anchor))]
    if removing:
        kept += [("the working folder", Path.cwd().resolve()), *(("a mounted disk", disk) for disk in _mounted(place))]
    for what, path in kept:
        if path is not None and (path == place or place in path.parents):
            holds = "is" if path == place else f"holds {path},"
            raise UserError(f"{given} {holds} {what}: choose a folder of its own for the results, such as runs/NAME")


def check_output(path: Path | str, data: object = None) -> None:
    """Whether a page, picture or table may be written under a name that a user gave; nothing is touched.

    Args:
        path: of the file.
        data: the images, whose folder it may not lie in.

    Raises:
        UserError: it is a link or a folder, lies in the images, or is there and does not say that ssl_kit made it.
    """
    path = Path(path)
    images = Path(data).resolve() if isinstance(data, str | Path) and Path(data).is_dir() else None
    if images is not None and images in path.resolve().parents:
        raise UserError(
            f"{path} lies in the images, {images}: choose a place outside, it would be taken for one of them"
        )
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is a {'link' if path.is_symlink() else 'folder or device'}: choose another name")
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if not any(mark in head for mark in _MARKS):
            raise NotOursError(f"{path} is there and was not made by ssl_kit: move it away, or choose another name")


def _mounted(place: Path) -> list[Path]:
    """Where disks are mounted at or below a folder."""
    found = [place] if os.path.ismount(place) else []
    with suppress(OSError):  # not Linux
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4]))
            found += [point] if place in point.parents else []
    return found


def record_of(folder: Path) -> str | None:
    """The record that says that a folder of results is ours: `run.json` or `results.json`; None where none does."""
    for name, known in _FORMATS.items():
        if not os.path.lexists(folder / name):
            continue
        record = read_json(folder / name) if not (folder / name).is_symlink() else None
        made_by = record.get("versions") if isinstance(record, dict) else None
        if isinstance(record, dict) and (
            record.get("format") == known or (isinstance(made_by, dict) and "ssl_kit" in made_by)
        ):
            return name
    return RESULTS if _has_results(folder / "results.jsonl") else None


def _has_results(path: Path) -> bool:
    """Whether a file of results was written by a version that made no record of an evaluation."""
    if not path.is_file() or path.is_symlink() or (path.parent / RESULTS).exists():
        return False
    with open(path, "rb") as file, suppress(ValueError):
        first = json.loads(file.readline(2**20))
        return isinstance(first, dict) and {"evaluation", "features", "made_by"} <= first.keys()
    return False


def check_ours(folder: Path, names: Sequence[str] = _NAMES) -> None:
    """Raises `NotOursError` where a run would meet what others have put there; nothing is touched.

    Args:
        folder: of the run, or of results.
        names: what they would meet.
    """
    for name in _NAMES:
        if (folder / name).is_symlink():
            raise NotOursError(f"{folder / name} is a link: results are not written through it; choose another folder")
    if record_of(folder) is None:
        for name in names:
            if os.path.lexists(folder / name):
                raise NotOursError(f"{folder} holds {name!r} and no record of ssl_kit's: choose another folder")


class Record:
    """The record of a folder of results: what there is to say, and `files`, every loose file of ours in it.

    Inside a `with` block each file is claimed before it is written (core.files), so that what a killed process has left
    is listed too.

    Attributes:
        entries: JSON-able; every key is optional for readers.
        names: of the loose files of ours, below the folder.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.name = folder, name or record_of(folder) or RESULTS
        there = (folder / self.name).is_file()
        self.entries: Entries = read_object(folder / self.name) if there else {}
        known = _listed(folder, self.entries) if there or record_of(folder) else []
        self.names = {self.name, *known}

    def __enter__(self) -> Self:
        files.claims.append(self.claim)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        files.claims.remove(self.claim)

    def claim(self, path: Path) -> None:
        """Lists a file that is about to be written in the folder.

        Raises:
            NotOursError: somebody else's has that name.
        """
        if self.folder.absolute() not in path.absolute().parents:
            return
        name = path.absolute().relative_to(self.folder.absolute())
        if str(name) in self.names or any(part.startswith(".") for part in name.parts):
            return  # hidden: being written
        if os.path.lexists(path):
            raise NotOursError(f"{path} is not ssl_kit's: move it away, or choose another folder")
        self.names.add(str(name))
        self.write()

    def write(self) -> None:
        """Writes the record."""
        write_json(self.folder / self.name, self.entries | {"format": _FORMATS[self.name], "files": sorted(self.names)})


def record_in(folder: Path) -> Record:
    """The record of a folder that results are added to, or begun in.

    Raises:
        NotOursError: others have put something there that results would meet.
    """
    check_ours(folder, _UNLISTED)
    return Record(folder)


def _listed(folder: Path, record: Entries) -> list[str]:
    """The loose files that a record lists and that are there.

    Raises:
        DamagedError: it names what lies elsewhere, a link or a folder.
    """
    names = record.get("files", _UNLISTED)
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(map(is_inside, names)):
        raise DamagedError(f"{folder} has a record that names files outside of it; nothing there is touched")
    found = [str(Path(name)) for name in names if os.path.lexists(folder / name)]
    wrong = [name for name in found if _through_link(folder, name) or not (folder / name).is_file()]
    if wrong and "files" in record:
        raise DamagedError(f"{folder} has a record that names {wrong[0]!r}, a link or a folder; nothing is touched")
    return [name for name in found if name not in wrong]


def _through_link(folder: Path, name: str) -> bool:
    return any((folder / one).is_symlink() for one in (Path(name), *Path(name).parents) if one != Path())


def our_files(folder: Path) -> list[str]:
    """Names of all files of ours in a folder of results, by its record and the manifests in it.

    Raises:
        DamagedError: the record names what it may not.
    """
    name = record_of(folder)
    if name is None:
        return []
    record = read_object(folder / name) if (folder / name).is_file() else {}
    found = {*_listed(folder, record), *([name] if record else [])}
    for place, wanted, usual in _FOLDERS:
        for inside in folder.glob(place):
            below = str(inside.relative_to(folder))
            if re.fullmatch(wanted, inside.name) and inside.is_dir() and not _through_link(folder, below):
                found |= {f"{below}/{one}" for one in _manifested(inside, usual)}
    return sorted(found)


def _manifested(folder: Path, usual: Sequence[str]) -> list[str]:
    """The files of ours in a folder with a manifest of its own, by that or, where it cannot be read, by their names."""
    return [
        name
        for name in sorted(listed(folder) or usual)
        if (folder / name).is_file() and not _through_link(folder, name)
    ]


def remove_training(folder: Path) -> None:
    """Removes the states of a former fine-tuning; what else lies in the folder stays."""
    for states in folder.glob("*/*"):
        if re.fullmatch(r"step-\d{8,}|best", states.name) and not _through_link(
            folder, str(states.relative_to(folder))
        ):
            remove(states)


def remove(folder: Path, usual: Sequence[str] = _CHECKPOINT) -> None:
    """Removes the files of ours in a folder with a manifest, that first, and the folder when nothing else is in it.

    Args:
        folder: a checkpoint, embeddings, ...
        usual: names of its files, for a manifest that cannot be read.
    """
    names = _manifested(folder, usual)
    _unlink(folder, sorted(names, key=lambda name: name != MANIFEST))
    with suppress(OSError):
        os.rmdir(folder)


def _unlink(folder: Path, names: Iterable[str]) -> None:
    """Removes files, and the folders below `folder` that are empty then."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        for parent in Path(name).parents[:-1]:
            with suppress(OSError):  # something else is in it
                os.rmdir(folder / parent)


class Former:
    """What `--overwrite` replaces: its files wait in FOLDER/.former until what replaces it can stand for itself.

    What is there after a kill says how far it had come: the first of its files moves first and comes back last, and is
    removed first.

    Args:
        folder: of results or of embeddings.
        ours: given it, the names of the files of ours that are in it.
        first: among them, the one by which the folder is known to be ours.
    """

    def __init__(self, folder: Path, ours: Callable[[Path], Iterable[str]] = our_files, first: str = RUN):
        self.folder, self.ours, self.first = folder, ours, first
        self.place = folder / ".former"

    def __bool__(self) -> bool:
        return (self.place / _ASIDE).is_file()

    def set_aside(self) -> None:
        """Moves the files of ours; others stay, and are named."""
        names = sorted(self.ours(self.folder), key=lambda name: (name != self.first, name))
        if not names:
            return
        # hidden: of a writer that was killed before anything had moved
        if os.path.lexists(self.place) and not all(name.startswith(".") for name in entries(self.place)):
            raise NotOursError(f"{self.place} is not ssl_kit's: move it away, or choose another folder")
        self.place.mkdir(exist_ok=True)
        write_json(self.place / _ASIDE, {"files": names})
        _move(self.folder, self.place, names)
        left = [name for name in entries(self.folder) if not name.startswith((LOCK, f"{self.place.name}/"))]
        if left:
            shown = ", ".join(map(repr, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            say(f"{self.folder}: {shown} {'is' if len(left) == 1 else 'are'} not ssl_kit's, kept")

    def settle(self, replaced: bool) -> None:
        """After a kill, or at the end: what has `replaced` it stands, or else the former is put back."""
        if self and (replaced or not os.path.lexists(self.place / self._names()[0])):
            self.remove()
        elif self:
            self._put_back()

    def remove(self) -> None:
        """Removes it."""
        if self:
            _unlink(self.place, [*self._names(), _ASIDE])
            with suppress(OSError):
                os.rmdir(self.place)

    def _put_back(self) -> None:
        names = self._names()
        aside = [name for name in names if os.path.lexists(self.place / name)]
        new = [name for name in self.ours(self.folder) if name not in names or name in aside]
        _unlink(self.folder, sorted(new, key=lambda name: name == self.first))
        _move(self.place, self.folder, reversed(aside))
        _unlink(self.place, [*names, _ASIDE])  # and the folders that were made for them
        with suppress(OSError):
            os.rmdir(self.place)
        say(f"{self.folder}: what was there before is back, for the new one had not come far enough to replace it")

    def _names(self) -> list[str]:
        """Of its files, the first one first."""
        aside = read_object(self.place / _ASIDE, LARGE_JSON)
        _listed(self.place, {"files": aside.get("files")})
        return list(aside["files"])


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
        sync((target / name).parent)
        _unlink(source, [name])
