"""The verdict on a run: `learning`, `stuck` or `collapsed`, with the reason in words. A function of the curves alone.

    sign                what it is                                                   measured
    effective_rank      directions that features of clean images span               before the first step and with kNN
    embedding_std       their spread on the unit sphere; 0 if all are equal           likewise
    uniformity          Wang & Isola 2020, eq. 5; 0 if all are equal                  likewise
    turned              angle between the encoder's weights now and at the start     likewise, from 0
    grown               length of the encoder's weights, as a multiple of the first     likewise, from 1
    knn_top1            of held-out images, where there are labels                   likewise
    loss                mean over the interval, against its chance level             every logging interval
    active_units        of the code, where a method's loss tells it                  likewise
    explained_variance  of the target by the decoder, where told                     likewise
    views_low .. _std   range and contrast of the views that the method was given    likewise

Everything is compared with what the same encoder gave before the first step, since what is healthy differs between
encoders and images. `benchmarks/verdict.py` holds it to deliberately broken and to healthy runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_COLLAPSED_RANK = 0.02  # of the dimension; a healthy code is far above, one direction is 1 / dim
_COLLAPSED_STD = 0.02  # of 1 / sqrt(dim), the std of isotropic features
_LEARNED = 0.05  # of the way from chance to 0 that a loss must have come to count as learning
_EXPLAINED = 0.02  # fraction of the target's variance
_TURNED = 2e-3  # radians; 200 healthy steps turn a fresh encoder by 0.1 or more
_GROWN = 10.0  # times; 200 healthy steps, also of Adam, stay below 4
_FEWER = 0.8  # of the directions at the start
_LOST = 0.25  # of the directions at the start; 200 healthy steps of MAE leave more than half
_NOISE = 2.0  # standard errors of kNN
_OUTSIDE = 0.01  # views may leave [0, 1] by rounding
_CONTRAST = 0.1  # of the images' own; the strongest views keep more
_EARLY = 100  # steps: before, warm-up and chance decide
_BUCKETS = 1_024  # of a sketch

Row = dict[str, float]
_UNSEEN: Row = {"views_low": 0.0, "views_high": 1.0, "views_std": 1.0}


class Verdict(NamedTuple):
    """`state`: learning, stuck, collapsed or unknown; `reason`: a clause in words."""

    state: str
    reason: str


def verdict(
    history: Sequence[Row],
    *,
    dim: int,
    chance_loss: float | None = None,
    contrastive: bool = False,
    held_out: int = 2_000,
) -> Verdict:
    """Judges the rows of `metrics.csv`.

    Args:
        history: rows in order; that of step 0, where there is one, holds the untrained encoder's measurement.
        dim: of the features.
        chance_loss: where a collapsed model's loss sits; None if unknown.
        contrastive: whether the method holds images apart and their views together, so that rank and kNN must beat
            those of random weights.
        held_out: labelled images that `knn_top1` is measured on, where it is: how much of its change is chance.
    """
    measured = [row for row in history if "effective_rank" in row and row["step"] > 0]
    logged = [row for row in history if "loss" in row]
    if not measured or not logged:
        return Verdict("unknown", "nothing was measured yet")
    start = next((row for row in history if "effective_rank" in row and row["step"] == 0), {})
    now, losses = measured[-1], [row["loss"] for row in logged]
    certain = _wrong_input(next((row for row in reversed(logged) if "views_low" in row), _UNSEEN), now) or _collapsed(
        now, start, dim
    )
    suspected = (
        _not_moving(now)
        or _unused_code(logged[-1])
        or _at_chance(losses, chance_loss)
        or _lost(now, start, dim)
        or (_worse_than_random(now, start, dim, held_out) if contrastive else None)
    )
    if certain is None and suspected is not None and now["step"] < _EARLY:
        return Verdict("unknown", f"{now['step']:.0f} steps are too few to tell; so far {suspected.reason}")
    return certain or suspected or Verdict("learning", _good_signs(now, start, losses[-1], dim, chance_loss))


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


def _at_chance(losses: Sequence[float], chance_loss: float | None) -> Verdict | None:
    loss = losses[-1]
    if chance_loss is not None and loss > chance_loss - _LEARNED * abs(chance_loss):
        return Verdict("stuck", f"the loss, {loss:.3f}, is where a model that sees nothing sits ({chance_loss:.3f})")
    return None


def _lost(now: Row, start: Row, dim: int) -> Verdict | None:
    rank, before = now["effective_rank"], start.get("effective_rank", 0.0)
    if rank < _LOST * before:
        return Verdict("collapsed", f"the features span {rank:.1f} of {dim} dimensions, {before:.1f} at the start")
    return None


def _worse_than_random(now: Row, start: Row, dim: int, held_out: int) -> Verdict | None:
    """What contrastive codes gain first: directions (three times as many in 200 steps) and neighbours."""
    rank, before = now["effective_rank"], start.get("effective_rank", 0.0)
    if rank < _FEWER * before:
        reason = f"the features span {rank:.1f} of {dim} dimensions, fewer than the {before:.1f} at the start"
        return Verdict("collapsed", reason)
    neighbours, untrained = now.get("knn_top1", 1.0), start.get("knn_top1", 0.0)
    noise = _NOISE * (untrained * (1 - untrained) / max(1, held_out)) ** 0.5
    if neighbours < untrained - noise:
        return Verdict("stuck", f"kNN, {neighbours:.3f}, is below that at the start ({untrained:.3f})")
    if rank < before and neighbours < untrained + noise:
        return Verdict(
            "stuck",
            f"neither directions ({rank:.1f}, {before:.1f} at the start) nor kNN ({neighbours:.3f}, {untrained:.3f} at "
            "the start) have gained",
        )
    return None


def _good_signs(now: Row, start: Row, loss: float, dim: int, chance_loss: float | None) -> str:
    signs = [f"effective rank {now['effective_rank']:.1f} of {dim}"]
    if chance_loss is not None:
        signs.append(f"loss {loss:.3f} against {chance_loss:.3f} at chance")
    if "knn_top1" in now and "knn_top1" in start:
        signs.append(f"kNN {now['knn_top1']:.3f} against {start['knn_top1']:.3f} at the start")
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
