"""This process: its number among several, requests to stop it, its surroundings and its output. Light: no torch here.

Requests to stop: SIGTERM (schedulers, containers), SIGINT (Ctrl-C), SIGUSR1 (a scheduler's warning before the end),
SIGHUP (the terminal was closed, the connection is lost; not under nohup).

Nothing is ever saved inside a handler. Until `patient` is set there is nothing to save: the first signal ends the block
right where it is, as Ctrl-C does. From then on it is only noted in `received`, and whoever works inside stops where the
work can go on later. A second Ctrl-C always means now.

The surroundings are the folders that libraries write to, what they would send, and what the machine refuses; they are
set before the libraries are loaded, and needed when those cannot be.

Output may go away, and no file name steers the terminal behind it. A pipe whose reader has gone, a terminal that was
closed, a full disk behind `> log`: what is printed then is lost, and nothing else. This is done below all who print, at
the descriptor. `protect` is the first thing the command line does:

    print, tracebacks, warnings, libraries   control characters are shown as escapes; for them there is no terminal
    core/console.py, and nobody else         the terminal itself, with colours and bars
"""

from __future__ import annotations

import errno
import gc
import io
import os
import re
import select
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING

from ssl_kit.core.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LAUNCHER = "SSL_KIT_LAUNCHER"  # the file where those of our own launcher meet; it says itself who has gone
LOST = 75  # exit code of a process that ends because another has: "temporary failure" of sysexits.h
TIMEOUT_SECONDS = 50  # that a process may keep the others waiting in a step; all have ended within a minute


def is_first() -> bool:
    """Whether this is the process that speaks and writes; true where there is only one."""
    return os.environ.get("RANK", "0") == "0"


def started() -> int:
    """How many processes were started together; 1 where there is only this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """How many of them share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def processes_asked(devices: object) -> int:
    """How many processes `--trainer.devices` asks this one to start: 1 in a process that was started as one of several.

    Args:
        devices: a number, or a list of the GPUs to use, also as text.

    Raises:
        UserError: anything else.
    """
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return 1
    numbers = [int(part) for part in str(devices).strip("[] ").split(",") if part.strip().isdigit()]
    if isinstance(devices, list) or str(devices).startswith("["):
        if numbers:
            return len(numbers)
    elif len(numbers) == 1 and numbers[0] > 0:
        return numbers[0]
    raise UserError(f"--trainer.devices {devices}: wanted how many processes to start, such as 2, or GPUs as [0,1]")


def most_processes() -> int:
    """How many processes this machine has room for: one for each GPU that may be used, or else for each core."""
    present = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        present = present[: len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])]
    return len(present) or cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_files(needed: int) -> None:
    """Lets this process and those it starts have so many files open: gloo hangs or aborts when it may not."""
    import resource  # not on Windows

    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if allowed == unlimited or allowed >= needed:
        return
    if most != unlimited and most < needed:
        raise UserError(
            f"{most} files may be open at once, several processes need {needed}: allow them, as by ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


_HEEDED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def heeded() -> list[signal.Signals]:
    """Those that this system has, without a SIGHUP that nohup has put off."""
    numbers = [getattr(signal, name) for name in _HEEDED if hasattr(signal, name)]
    return [one for one in numbers if one.name != "SIGHUP" or signal.getsignal(one) != signal.SIG_IGN]


class Signals:
    """Heeds them inside a `with` block; outside the main thread, where they cannot be had, it does nothing.

    Attributes:
        received: number of the first signal, or None.
        patient: only note it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False
        self._former: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Signals:
        for number in heeded():
            try:
                self._former[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there heeds signals
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives them back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def take(self) -> None:
        """Takes them again inside the block, from somebody who has taken them meanwhile."""
        for number in self._former:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not again:
            self.received = number
        if number == signal.SIGINT and (again or not self.patient):
            raise KeyboardInterrupt
        if not self.patient and not again:
            raise SystemExit(128 + number)


# variables that name a folder for what a library keeps between two processes; weights are only read, and stay
_CACHES = {
    "NUMBA_CACHE_DIR": "numba",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
_NOTHING_SENT = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

_ADVICE = {
    errno.EMFILE: "allow this process more open files, such as ulimit -n 4096",
    errno.ENFILE: "the whole machine has too many files open: end other programs",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "files may not grow so large there: see ulimit -f",
    errno.EROFS: "choose a path on another file system",
    errno.EIO: "the disk or the network behind it fails: see the messages of the system",
    errno.ESTALE: "the network drive has lost it: mount it again",
    errno.ENOMEM: "free some memory",
}
_PLACE = "choose another path, or mend that one"  # what helps against all others
_TOLD_BY_TEXT = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_OURS = (errno.EBADF, errno.EFAULT, errno.ENOTTY, errno.ESPIPE, errno.ECHILD)  # only a mistake in a program has these
_TEMPORARY = re.compile(r"(^|/)\.([^/]+)\.[a-z0-9_]{8}\.(?:tmp|old)\b")  # as `core/files.py` has them


def prepare() -> None:
    """Points libraries that write caches at one folder, and keeps others from sending; what the user has set wins.

    Call it before they are loaded.
    """
    folder = cache_folder()
    names = {name: str(folder / inside) for name, inside in _CACHES.items()} if folder is not None else {}
    for name, value in {**names, **_NOTHING_SENT}.items():
        os.environ.setdefault(name, value)
    if folder is not None and not os.path.isabs(os.path.expanduser("~")):  # some cannot even be loaded without a home
        os.environ["HOME"] = str(folder)


@contextmanager
def imports_set_aside() -> Iterator[None]:
    """Keeps the collector from what is imported inside, which stays: looking through it takes 2 of 5 s of a `search`.

    Where torch is there already the process is not ours alone, and what it holds may become garbage: no change.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/ssl_kit`, by default below `~/.cache`; one in TMP where that cannot be written, or None.

    Only a folder that nobody else can write to: numba runs what lies there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    usual = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "ssl_kit")
    if usual.is_absolute() and _is_own(usual):
        return usual
    try:
        instead = Path(tempfile.gettempdir(), f"ssl_kit-{os.getuid() if hasattr(os, 'getuid') else 'cache'}")
    except FileNotFoundError:  # no folder for temporary files
        return None
    return instead if _is_own(instead) and not instead.is_symlink() else None


def _is_own(folder: Path) -> bool:
    """Whether it is there, or can be made, for this user to write to and for no other."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH)
    return mine and os.access(folder, os.W_OK | os.X_OK)


def refusal(error: BaseException) -> str | None:
    """One line when an error, or what a library has made of it, is the machine's: the path, what it is, what to do.

    Returns:
        None for a mistake of a program.
    """
    current: BaseException | None = error
    meant = True  # the error itself or its cause; what was being handled meanwhile may have been harmless
    while current is not None:
        number = _number(current, meant)
        if number is not None:
            return f"{_said(current) or os.strerror(number)}; {_ADVICE.get(number, _PLACE)}"
        meant = meant and current.__cause__ is not None
        current = current.__cause__ or current.__context__
    return None


def _said(error: BaseException) -> str:
    """What an error says, its paths first; of a file under its temporary name the name that it was to get."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error).strip()
    named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    paths = [_TEMPORARY.sub(r"\1\2", name) for name in named]
    return ": ".join([*([" and ".join(paths)] if paths else []), str(error.strerror)])


def _number(error: BaseException, meant: bool) -> int | None:
    """The system's number of an error that is the machine's, by itself or in its text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is not None:
        return number if number in _ADVICE or (meant and number not in _OURS) else None
    told = (*_ADVICE, *(_TOLD_BY_TEXT if meant else ()))
    text = str(error).lower()
    return next((number for number in told if os.strerror(number).lower() in text), None)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a file
# what would move the cursor, ring, recolour the terminal or turn the direction of text, in names of files above all
_STEERING = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _STEERING if code not in (9, 10)}


def printable(text: str, stream: IO[str] | None) -> str:
    """The text as `stream` can take it: control characters, and what its encoding lacks, as backslash escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.translate(_ESCAPES).encode(encoding, "backslashreplace").decode(encoding)


def protect() -> None:
    """Makes sure of both streams, for the rest of the process."""
    for descriptor in range(3):  # closed ones would be given to the next file, and libraries would print into that
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, _Plain(lasting(stream)))


def terminal(stream: IO[str]) -> IO[str]:
    """What lies behind a stream that `protect` or a progress bar has covered; it may be a terminal."""
    while (behind := getattr(stream, "rich_proxied_file", None) or getattr(stream, "behind", None)) is not None:
        stream = behind
    return lasting(stream)


def lasting(stream: IO[str]) -> IO[str]:
    """A stream to the same place that outlives it; the stream itself where it is no file (in a notebook, a test)."""
    buffer = getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Lasting(stream.fileno())
    return io.TextIOWrapper(
        raw if isinstance(buffer, io.FileIO) else io.BufferedWriter(raw),  # python -u: no buffer
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost(stream: object) -> OSError | None:
    """Why the last of what was printed did not get through; None when all did."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.error if isinstance(raw, _Lasting) else None


class _Lasting(io.FileIO):
    """Writes to a descriptor, which stays open; drops what does not get through.

    Attributes:
        error: why something was dropped.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        """All of it, whatever comes; bytes."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written: int | None = super().write(left)
                if written is None:  # somebody has made it non-blocking, and it is full
                    waiting = select.poll()
                    waiting.register(self.fileno(), select.POLLOUT)
                    waiting.poll()
                left = left[written or 0 :]
        except OSError as error:
            self.error = error
            if error.errno not in FULL:  # gone for good, also for libraries that print by themselves
                with suppress(OSError):
                    self._leave()
        return size

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Plain:
    """A stream for all who print, as its name says: no terminal, no control characters."""

    def __init__(self, behind: IO[str]):
        self.behind = behind

    def write(self, text: str) -> int:
        """Writes it with escapes."""
        self.behind.write(printable(text, self.behind))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes them with escapes."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """So that nobody sends colours, which would be shown as escapes."""
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self.behind, name)
