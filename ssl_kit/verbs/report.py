"""`ssl-kit report`: run folders in, one page out."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ssl_kit.core.console import next_command, result
from ssl_kit.core.errors import UserError
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb


@dataclass(frozen=True)
class Settings:
    """Which runs to show, and where.

    Args:
        runs: one or more run folders.
        out: the HTML file to write; one run without it writes RUN/report.html, several need it.
    """

    runs: list[str]
    _: KW_ONLY
    out: str | None = None


@verb(Settings)
def report(settings: Settings) -> Entries:
    """Writes one self-contained HTML page about a run, or about several side by side.

    The page reads only what the run folders hold and loads nothing: it opens offline, in light and dark.

    Returns:
        `{"report": path, "bytes": size, "runs": [{"name", "state", "verdict", "scores"}]}`: the verdict of run.json,
        its state alone and as a line, and how the scores compare in words, empty without any.

    Raises:
        UserError: no run, a folder that is no run, or several runs without `out`.
    """
    from ssl_kit.report.page import write_report

    folders = [settings.runs] if isinstance(settings.runs, str | Path) else list(settings.runs)
    if not folders:
        raise UserError("got no run folder: give one or more, as in `ssl-kit report runs/NAME`")
    if settings.out is None and len(folders) > 1:
        raise UserError(f"got {len(folders)} run folders and no --out: say where to write, as in --out compare.html")
    if settings.out is not None and Path(settings.out).is_dir():
        raise UserError(f"--out {settings.out} is a folder: give the name of the HTML file")
    target = Path(settings.out) if settings.out is not None else Path(folders[0]) / "report.html"
    written = write_report(folders, target)
    for run in written["runs"]:
        result(f"{run['name']}: {run['verdict']}")
        if run["scores"]:
            result(f"{run['name']}: {run['scores']}")
    result(f"wrote {target} ({written['bytes'] / 1e6:.1f} MB)")
    next_command(f"open {target.resolve().as_uri()}", own=False)
    return written
