"""`ssl-kit report`: run folders in, one page out."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ssl_kit.core.console import next_command, result
from ssl_kit.core.errors import UserError
from ssl_kit.core.owned import BROKEN_OFF
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb


@dataclass(frozen=True)
class Settings:
    """Which runs to show, and where.

    Args:
        runs: one or more run folders.
        out: the HTML file to write; without it RUN/report.html of one run, compare.html of several.

    Examples:
        ssl-kit report runs/photos
        ssl-kit report runs/one runs/two --out compare.html
    """

    runs: list[str]
    _: KW_ONLY
    # Where it goes
    out: str | None = None


@verb(Settings)
def report(settings: Settings) -> Entries:
    """Writes one self-contained HTML page about a run, or about several side by side.

    The page reads only what the run folders hold and loads nothing: it opens offline, in light and dark.

    Returns:
        `{"report": path, "bytes": size, "runs": [{"name", "status", "state", "verdict", "scores", "next"}]}`: how far
        it is, the verdict of run.json, its state alone and as a line, how the scores compare in words, empty without
        any, and the next command.

    Raises:
        UserError: no run, or a folder that is no run; `compare.html` is somebody else's.
    """
    from ssl_kit.report.page import write_report

    folders = [settings.runs] if isinstance(settings.runs, str | Path) else list(settings.runs)
    if not folders:
        raise UserError("got no run folder: give one or more, as in `ssl-kit report runs/NAME`")
    if settings.out is not None and Path(settings.out).is_dir():
        raise UserError(f"--out {settings.out} is a folder: give the name of the HTML file")
    usual = Path(folders[0]) / "report.html" if len(folders) == 1 else Path("compare.html")
    target = usual if settings.out is None else Path(settings.out)
    written = write_report(folders, target)
    for run in written["runs"]:
        if run["status"].startswith(BROKEN_OFF):
            result(f"{run['name']}: {run['status']}; go on with: {run['next']}")
        result(f"{run['name']}: {run['verdict']}")
        if run["scores"]:
            result(f"{run['name']}: {run['scores']}")
    result(f"wrote {target} ({written['bytes'] / 1e6:.1f} MB)")
    next_command(f"open {target.resolve().as_uri()}", own=False)
    return written
