"""The verdict on a run in one word, with the reason in words. A function of the curves alone: nothing reads a clock.

    learning     from 200 steps and one epoch on: a score is surely above that of the encoder before the first step
    learns, less than raw pixels know    the same, while the score is surely below raw pixels or PCA of the pixels
    stuck, collapsed                     from 100 steps on: a sign below is wrong; a loss near its chance level, or
                                         fewer directions, counts only where nothing was surely gained
    unknown      everything else, with what is missing

    sign                what it is                                                   measured
    effective_rank      directions that features of clean images span               before the first step, at looks
    embedding_std       their spread on the unit sphere; 0 if all are equal           likewise
    uniformity          Wang & Isola 2020, eq. 5; 0 if all are equal                  likewise
    turned              angle between the encoder's weights now and at the start     likewise, from 0
    grown               length of the encoder's weights, as a multiple of the first     likewise, from 1
    loss                mean over the interval, against its chance level             every logging interval
    active_units        of the code, where a method's loss tells it                  likewise
    explained_variance  of the target by the decoder, where told                     likewise
    views_low .. _std   range and contrast of the views that the method was given    likewise

    score               what it is                                                   measured
    knn_top1            of held-out images, where there are labels                   before the first step, at looks
    knn_pixels, _pca    the same for raw pixels and PCA of them                      before the first step
    crops_top1          of left crops that find the right one of their image         likewise
    crops_pixels        the same for raw pixels                                      before the first step
    crops_pca           likewise for PCA of them                                     before the first step

kNN decides where it was measured and judges the method, otherwise crops do. Everything is compared with what the same
encoder gave before the first step, with batch norms that have seen the images (`encoders.wrapped.settled`), since what
is healthy differs between encoders and images. "Surely" is by 95 % intervals of Wilson 1927 over the images asked:
above or below the start when the two do not touch; below a baseline when the score's interval lies below its value.
Between the two the score is level with the baseline, which does not count against a run. `benchmarks/verdict.py` holds
all this to deliberately broken and to healthy runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_COLLAPSED_RANK = 0.02  # of the dimension; a healthy code is far above, one direction is 1 / dim
_COLLAPSED_STD = 0.02  # of 1 / sqrt(dim), the std of isotropic features
_EXPLAINED = 0.02  # fraction of the target's variance
_TURNED = 2e-3  # radians; 200 healthy steps turn a fresh encoder by 0.1 or more
_GROWN = 10.0  # times; 200 healthy steps, also of Adam, stay below 4
_FEWER = 0.45  # of the directions at the start; 200 healthy steps of what compares images leave 0.54 to 0.9
_LOST = 0.25  # of the directions at the start; 200 healthy steps of MAE leave more than half
_Z = 1.96  # of a 95 % interval
_OUTSIDE = 0.01  # views may leave [0, 1] by rounding
_CONTRAST = 0.1  # of the images' own; the strongest views keep more
_EARLY = 100  # steps: before, warm-up and chance decide
_STEPS = 200  # before, an encoder may differ from its start and have learnt little
_EPOCHS = 1.0  # before, some images were never trained on
_BUCKETS = 1_024  # of a sketch

Row = dict[str, float]
BELOW = "learns, less than raw pixels know"
# score -> its name, and the columns of what it stands beside; the first that was measured decides
_SCORES = {
    "knn_top1": ("kNN", {"knn_pixels": "raw pixels", "knn_pca": "PCA of the pixels"}),
    "crops_top1": ("crop to crop", {"crops_pixels": "raw pixels", "crops_pca": "PCA of the pixels"}),
}
_UNSEEN: Row = {"views_low": 0.0, "views_high": 1.0, "views_std": 1.0}


class Verdict(NamedTuple):
    """`state`: learning, `BELOW`, stuck, collapsed or unknown; `reason`: a clause in words."""

    state: str
    reason: str


def verdict(
    history: Sequence[Row],
    *,
    dim: int,
    chance_loss: float | None = None,
    chance_margin: float = 0.05,
    contrastive: bool = False,
    held_out: int = 2_000,
    cropped: int = 512,
    knn_judges: bool = True,
) -> Verdict:
    """Judges the rows of `metrics.csv`.

    Args:
        history: rows in order; that of step 0, where there is one, holds the untrained encoder's measurement.
        dim: of the features.
        chance_loss: where a collapsed model's loss sits; None if unknown.
        chance_margin: share of it that a loss must have come down by to count as learning.
        contrastive: whether the method holds images apart, so that it must not lose most directions, nor kNN.
        held_out: labelled images that `knn_top1` is measured on, where it is: how much of it is chance.
        cropped: images that `crops_top1` is measured on, likewise.
        knn_judges: whether kNN is what the method is judged by; otherwise crops are, and kNN never counts against it.
    """
    measured = [row for row in history if "effective_rank" in row and row["step"] > 0]
    logged = [row for row in history if "loss" in row]
    if not measured or not logged:
        return Verdict("unknown", "nothing was measured yet")
    start = next((row for row in history if "effective_rank" in row and row["step"] == 0), {})
    now, losses = measured[-1], [row["loss"] for row in logged]
    wrong = (
        _wrong_input(next((row for row in reversed(logged) if "views_low" in row), _UNSEEN), now)
        or _collapsed(now, start, dim)
        or _not_moving(now)
        or _unused_code(logged[-1])
        or _lost(now, start, dim)
    )
    counts = {"knn_top1": held_out, "crops_top1": cropped}
    order = [name for name in (_SCORES if knn_judges else reversed(_SCORES)) if name in now and name in start]
    risen = [name for name in order if _risen(now, start, name, counts[name])]
    if wrong is None and not risen:
        wrong = _at_chance(losses[-1], chance_loss, chance_margin)
    if wrong is None and contrastive and not (risen and risen[0] == order[0]):
        wrong = _worse_than_random(now, start, dim, held_out)
    if wrong is not None and now["step"] < _EARLY:
        return Verdict("unknown", f"{now['step']:,.0f} steps are too few to tell; so far {wrong.reason}")
    return wrong or _gained(now, start, order, _signs(now, losses[-1], dim, chance_loss), counts, knn_judges)


def _gained(now: Row, start: Row, order: list[str], signs: str, counts: dict[str, int], knn_judges: bool) -> Verdict:
    """Of a run without a bad sign: has its score risen, and above what pixels give?"""
    if short := too_short(now["step"], now["epoch"]):
        return Verdict("unknown", f"{short}; {signs}")
    if not order:
        return Verdict("unknown", f"no score was measured that could show it; {signs}")
    score = order[0]
    (name, baselines), value, untrained = _SCORES[score], now[score], start[score]
    low, high = _interval(value, counts[score])
    if not _risen(now, start, score, counts[score]):
        return Verdict(
            "unknown", f"{name}, {value:.3f}, is not surely above that at the start ({untrained:.3f}); {signs}"
        )
    told = f"{signs}, {name} {value:.3f} against {untrained:.3f} at the start"
    if not (beside := {column: start[column] for column in baselines if column in start}):
        return Verdict("learning", told)
    best = max(beside, key=lambda column: beside[column])
    place = "above" if low > beside[best] else "below" if high < beside[best] else "level with"
    told += f", {place} {baselines[best]} ({beside[best]:.3f})"
    if score == "crops_top1" and place != "below":
        told += "; what it knows of classes only labels tell"  # of 22 runs so called 5 were above pixels (corpus.json)
    below = place == "below" and (knn_judges or score != "knn_top1")
    return Verdict(BELOW if below else "learning", told)


def _risen(now: Row, before: Row, score: str, count: int) -> bool:
    """Not paired: which images were right is not kept."""
    return _interval(now[score], count)[0] > _interval(before[score], count)[1]


def too_short(steps: float, epochs: float) -> str:
    """Why so much training cannot be called learning yet, in words; empty when it can."""
    if steps < _STEPS:
        return f"{steps:,.0f} steps are too few to tell, {_STEPS} are needed"
    if epochs < _EPOCHS:
        return f"not every image was trained on yet, {epochs:.2f} epochs were made"
    return ""


def _interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` images, by Wilson 1927 (doi:10.1080/01621459.1927.10502953)."""
    count = max(1, count)
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * (share * (1 - share) / count + _Z**2 / (4 * count**2)) ** 0.5 / (1 + _Z**2 / count)
    return centre - half, centre + half


def _wrong_input(logged: Row, now: Row) -> Verdict | None:
    low, high = logged["views_low"], logged["views_high"]
    if low < -_OUTSIDE or high > 1 + _OUTSIDE:
        return Verdict("stuck", f"the views hold values from {low:.3g} to {high:.3g}; wanted [0, 1]")
    contrast, usual = logged["views_std"], now.get("images_std", 0.0)
    if contrast < _CONTRAST * usual:
        return Verdict(
            "stuck", f"the views' contrast is {contrast:.2g}, that of the images {usual:.2g}; check the pixels' range"
        )
    return None


def _collapsed(now: Row, start: Row, dim: int) -> Verdict | None:
    rank, least = now["effective_rank"], max(1.5, _COLLAPSED_RANK * dim)
    if "effective_rank" in start:  # some encoders span few directions before they have learnt anything
        least = min(least, max(1.05, 0.5 * start["effective_rank"]))
    if rank < least:
        return Verdict("collapsed", f"the features span {rank:.1f} of {dim} dimensions")
    spread = now.get("embedding_std", 1.0) * dim**0.5
    if spread < _COLLAPSED_STD:
        return Verdict("collapsed", f"all images have nearly the same features: their spread is {spread:.2g} of 1")
    return None


def _unused_code(logged: Row) -> Verdict | None:
    active, explained = logged.get("active_units", 1.0), logged.get("explained_variance", 1.0)
    if active == 0:
        return Verdict("collapsed", "no number of the code depends on the image: the decoder does without it")
    if explained < _EXPLAINED:
        return Verdict("stuck", f"the decoder explains {explained:.1%} of the images' variance")
    return None


def _not_moving(now: Row) -> Verdict | None:
    turned = now.get("turned", 1.0)
    if turned < _TURNED:
        return Verdict("stuck", f"the encoder's weights are where they were (turned by {turned:.1g} radians)")
    grown = now.get("grown", 1.0)
    if grown > _GROWN:  # a normalised net does not see it, but further steps hardly turn weights so long
        return Verdict("stuck", f"the encoder's weights have grown {grown:.0f}-fold: the learning rate is far too high")
    return None


def _at_chance(loss: float, chance_loss: float | None, margin: float) -> Verdict | None:
    if chance_loss is not None and loss > chance_loss - margin * abs(chance_loss):
        return Verdict("stuck", f"the loss, {loss:.3f}, is where a model that sees nothing sits ({chance_loss:.3f})")
    return None


def _lost(now: Row, start: Row, dim: int) -> Verdict | None:
    rank, before = now["effective_rank"], start.get("effective_rank", 0.0)
    if rank < _LOST * before:
        return Verdict("collapsed", f"the features span {rank:.1f} of {dim} dimensions, {before:.1f} at the start")
    return None


def _worse_than_random(now: Row, start: Row, dim: int, held_out: int) -> Verdict | None:
    """What compares images keeps directions apart, half and more of those that the untrained encoder has."""
    rank, before = now["effective_rank"], start.get("effective_rank", 0.0)
    if rank < _FEWER * before:
        reason = f"the features span {rank:.1f} of {dim} dimensions, far fewer than the {before:.1f} at the start"
        return Verdict("collapsed", reason)
    if "knn_top1" in now and "knn_top1" in start and _risen(start, now, "knn_top1", held_out):
        return Verdict("stuck", f"kNN, {now['knn_top1']:.3f}, is below that at the start ({start['knn_top1']:.3f})")
    return None


def _signs(now: Row, loss: float, dim: int, chance_loss: float | None) -> str:
    signs = [f"effective rank {now['effective_rank']:.1f} of {dim}"]
    if chance_loss is not None:
        signs.append(f"loss {loss:.3f} against {chance_loss:.3f} at chance")
    return ", ".join(signs)


def sketch(weights: Iterable[Tensor]) -> Tensor:
    """(1024,) float64: a fixed random linear map of all matrices and filters, whose lengths and angles it keeps.

    A count sketch (Charikar et al. 2002, doi:10.1007/3-540-45465-9_59) with fixed signs: errors of lengths are about
    1 / sqrt(1024). It stands in for a copy of the first weights in every checkpoint.
    """
    total = torch.zeros(_BUCKETS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        if weight.ndim >= 2:
            values = weight.detach().to("cpu", torch.float64).reshape(-1)
            signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8) * 2 - 1
            padded = torch.nn.functional.pad(values * signs, (0, -len(values) % _BUCKETS))
            total += padded.reshape(-1, _BUCKETS).sum(0)
    return total


def angle(first: Tensor, second: Tensor) -> float:
    """Radians between two vectors, exact also where it is tiny; 0 when either is zero (Kahan's formula)."""
    one, other = first.norm() * second, second.norm() * first
    return float(2 * torch.atan2((one - other).norm(), (one + other).norm()))
