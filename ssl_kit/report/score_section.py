"""The section of scores: tables, charts and grids of one run, tables alone of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl_kit.evaluation.catalog import EVALUATIONS
from ssl_kit.report import details
from ssl_kit.report.charts import Chart
from ssl_kit.report.reading import Run
from ssl_kit.report.score_charts import dimension_charts, few_shot_charts, roc_chart, storage
from ssl_kit.report.scores import Table, score_tables
from ssl_kit.report.series import Grid, Robustness, dimension_lines, few_shot_grid, robustness_of

_DRAWN = ("few_shot", "robustness", "details")  # of one run: not as tables, but as what follows


@dataclass(frozen=True)
class Scores:
    """What the template shows; of several runs only `tables` is filled.

    Attributes:
        dimension_rows: (dimensions, storage of a million vectors, top-1 per line of the charts).
        confusion: of `details.confusion_grid`.
        recalls: of `details.recalls`.
        wrong: of `details.wrong_images`.
        suspected: shares of suspected label errors, in words.
        missing: what was not measured, in words.
        lacking: the same as names of `--only`.
    """

    tables: list[Table]
    few_shot: list[Chart] = field(default_factory=list)
    few_shot_grid: Grid | None = None
    dimensions: list[Chart] = field(default_factory=list)
    dimension_grids: list[tuple[str, Grid]] = field(default_factory=list)
    robustness: Robustness | None = None
    roc: Chart | None = None
    confusion: dict[str, Any] | None = None
    recalls: dict[str, Any] | None = None
    wrong: list[dict[str, Any]] = field(default_factory=list)
    suspected: str = ""
    missing: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    @property
    def charts(self) -> list[Chart]:
        """Every bokeh chart of the section."""
        return [*self.few_shot, *self.dimensions, *([self.roc] if self.roc else [])]


def score_section(alone: Run | None, runs: Sequence[Run]) -> Scores:
    """The section of one run (`alone`), or of several."""
    if alone is None:
        return Scores(score_tables(runs))
    few_shot, dimensions, robustness = few_shot_charts(alone), dimension_charts(alone), robustness_of(alone)
    missing, lacking = details.missing(alone, bool(few_shot), bool(dimensions), robustness is not None)
    return Scores(
        score_tables(runs, without=_DRAWN),
        few_shot,
        few_shot_grid(alone),
        dimensions,
        _dimension_grids(alone),
        robustness,
        roc_chart(alone.roc) if alone.roc and alone.roc.classes else None,
        details.confusion_grid(alone.confusion) if alone.confusion else None,
        details.recalls(alone.classes) if alone.classes else None,
        details.wrong_images(alone.wrong) if alone.wrong else [],
        _suspected(alone),
        missing,
        lacking,
    )


def _dimension_grids(run: Run) -> list[tuple[str, Grid]]:
    """The dimension curves in numbers, by evaluation: a row per number of dimensions with its storage."""
    grids = []
    for evaluation, lines in dimension_lines(run).items():
        dims = sorted({dim for line in lines for dim in line.points})
        rows = [(f"{dim:,} ({storage(dim)})", [line.points.get(dim) for line in lines]) for dim in dims]
        grids.append((EVALUATIONS[evaluation].title, Grid([line.name for line in lines], rows)))
    return grids


def _suspected(run: Run) -> str:
    """Label errors that neighbours suspect, in words; empty where nothing looked for them."""
    found = [one["metrics"] for one in run.results if one["evaluation"] == "details"]
    shares = [(part, found[-1].get(f"suspected_{part}")) for part in ("train", "test")] if found else []
    told = [f"{100 * share:.1f} % of {part}" for part, share in shares if isinstance(share, int | float)]
    return f"Neighbours disagree with the label of {' and '.join(told)}: see details/suspected_*.csv." if told else ""
