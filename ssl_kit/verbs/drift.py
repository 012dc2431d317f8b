"""`ssl-kit drift`: do new images still look like those that an encoder was made for?"""

from __future__ import annotations

import shlex
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from ssl_kit.core.console import next_command, result, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import write_csv
from ssl_kit.core.owned import check_output
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import typed, verb
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, search, solver
from ssl_kit.embeddings.folder import check_comparable
from ssl_kit.embeddings.search import picture
from ssl_kit.evaluation.drift import shift, unfamiliarity

_FEWEST = 20  # images of a set, for the tests
_ALIKE = 6  # old images beside each new one on the page of pictures
_PIXELS = (160, 160)


@dataclass(frozen=True)
class Settings:
    """Which images to compare with which.

    Args:
        old: embeddings folder of images as they were, such as those of the training.
        new: another one, of new images by the same encoder.
        level: of the p-value, below which the images count as drifted, in (0, 1).
        unfamiliar: how many of the new images that are farthest from all old ones are listed.
        csv: file to write one line per new image to: how far it is, and the share of old images that are as far.
        html: file to write the most unfamiliar new images to, each beside the old ones that are nearest.
        seed: of the samples and permutations.

    Examples:
        ssl-kit drift EMB_OLD EMB_NEW
        ssl-kit drift EMB_OLD EMB_NEW --html drift.html --csv drift.csv
    """

    old: str
    new: str
    _: KW_ONLY
    # What to find
    level: float = 0.01
    unfamiliar: int = 12
    seed: int = 0
    # Where it goes
    csv: str | None = None
    html: str | None = None


@verb(Settings)
def drift(settings: Settings) -> Entries:
    """Test whether new images are of the same kind as old ones, and show those that are most unfamiliar.

    Two tests of the features, of at most 2,000 images of each: the maximum mean discrepancy, and a classifier that
    tries to tell old from new. p is of both together.

    Returns:
        `{"drifted": p < level, "p", "mmd", "mmd_p", "auroc", "auroc_p", "old", "new", "images", "unfamiliar", ...}`.
    """
    for name in filter(None, (settings.csv, settings.html)):
        check_output(name)
    old, new = Embeddings.load(settings.old), Embeddings.load(settings.new)
    check_comparable(old, new, settings.old, settings.new)
    for part, name in ((old, settings.old), (new, settings.new)):
        if len(part) < _FEWEST:
            raise UserError(f"{name} holds {len(part)} vectors; at least {_FEWEST} are wanted")
    found, device = shift(old.vectors, new.vectors, seed=settings.seed), solver()
    far, share = unfamiliarity(old.vectors, new.vectors, device)
    order = np.lexsort((np.arange(len(far)), -far))[: settings.unfamiliar]
    drifted = found.p < settings.level
    listed = [{"id": new.ids[row], "distance": _cut(far[row]), "share": _cut(share[row])} for row in order.tolist()]
    strange = float((share <= settings.level).mean())
    record: Entries = {"drifted": drifted, **{name: _cut(value) for name, value in found._asdict().items()}}
    record |= {"level": settings.level, "old": settings.old, "new": settings.new, "seed": settings.seed}
    record |= {"images": [len(old), len(new)], "strange": _cut(strange), "unfamiliar": listed}
    _tell(record)
    if settings.csv is not None:
        rows = ([new.ids[row], _cut(far[row]), _cut(share[row])] for row in range(len(new)))
        write_csv(Path(settings.csv), ("id", "distance", "share"), rows)
        say(f"table: {settings.csv}")
    if settings.html is not None:
        _draw(Path(settings.html), old, new, order, device)
        say(f"pictures: {settings.html}")
    again = typed(shlex.join(["ssl-kit", "drift", settings.old, settings.new]), settings, "level", "unfamiliar", "seed")
    shown = f"open {shlex.quote(settings.html)}" if settings.html else f"{again} --html drift.html --csv drift.csv"
    next_command(shown, own=not settings.html)
    return record | {"csv": settings.csv, "html": settings.html}


def _cut(value: float) -> float:
    return float(f"{value:.4g}")


def _tell(record: Entries) -> None:
    rows = [
        ["maximum mean discrepancy", f"{record['mmd']:.4g}", f"{record['mmd_p']:.3g}"],
        ["a classifier of old and new, AUROC", f"{record['auroc']:.3f}", f"{record['auroc_p']:.3g}"],
    ]
    table(f"{record['images'][0]:,} old images and {record['images'][1]:,} new ones", ["test", "value", "p"], rows)
    rows = [[one["id"], f"{one['distance']:.3f}", f"{one['share']:.1%}"] for one in record["unfamiliar"][:5]]
    if rows:
        table("farthest from all old images", ["id", "1 - mean cosine", "old images as far"], rows)
    usual = f"{1 - record['level']:.0%} of those are from each other"
    few = f"{record['strange']:.1%} of the new images are farther from the old ones than {usual}"
    differ = "the new images differ from the old ones" if record["drifted"] else "no drift is seen"
    below = f"{'below' if record['drifted'] else 'not below'} {record['level']:g}"
    result(f"{differ}: p = {record['p']:.3g}, {below}; {few}")


def _draw(path: Path, old: Embeddings, new: Embeddings, order: np.ndarray, device: str) -> None:
    """A strip per unfamiliar image: it, and the old ones that are nearest."""
    from ssl_kit.report.page import strip_html

    cosines, rows = search(normalised(old.vectors), normalised(new.vectors[order]), _ALIKE, device=device)
    asked = [(new.ids[row], picture(new.info, new.ids[row], _PIXELS)) for row in order.tolist()]
    shown = [
        [(old.ids[row], score, picture(old.info, old.ids[row], _PIXELS)) for row, score in zip(*pair, strict=True)]
        for pair in zip(rows.tolist(), cosines.tolist(), strict=True)
    ]
    note = "Of each new image the old ones that are nearest, by cosine similarity."
    strip_html(path, "New images that are unlike all old ones", asked, shown, note=note)
