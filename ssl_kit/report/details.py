"""What the page shows of single classes and images: confusion matrix, recalls, the most confidently wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from ssl_kit.evaluation.catalog import EVALUATIONS
from ssl_kit.report.reading import Run
from ssl_kit.report.reading_details import ClassRow, Confusion
from ssl_kit.report.scores import Score

_MATRIX = 40  # classes that a matrix shows readably on 1,100 pixels
_RECALLS = 40
_PAIRS = 8
_WRONG = 24
_STRONGEST = 48  # percent of the full colour: the number on it stays readable in both themes


def confusion_grid(confusion: Confusion) -> dict[str, Any]:
    """The matrix as rows of cells: percent of the row's images, and how strongly a cell is coloured.

    Of more than 40 classes the 40 with the lowest recall are shown, and what they were taken for beyond these is one
    column.
    """
    counts = confusion.counts
    images = counts.sum(axis=1)
    shares = counts / np.maximum(images, 1)[:, None]
    shown = np.arange(len(counts))
    if len(shown) > _MATRIX:
        recall = np.where(images > 0, shares.diagonal(), np.inf)
        shown = np.sort(np.argsort(recall, kind="stable")[:_MATRIX])
    names = [confusion.classes[place] for place in shown]
    rows = []
    for place in shown:
        row = [_cell(shares[place, other], counts[place, other], images[place], place == other) for other in shown]
        rest = counts[place].sum() - counts[place, shown].sum()
        if len(shown) < len(counts):
            row.append(_cell(rest / max(images[place], 1), rest, images[place], False))
        rows.append({"name": confusion.classes[place], "images": int(images[place]), "cells": row})
    return {
        "names": names,
        "others": len(counts) - len(shown),
        "rows": rows,
        "total": int(images.sum()),
        "right": int(counts.trace()),
        "pairs": _pairs(confusion),
    }


def _cell(share: float, count: int, images: int, right: bool) -> dict[str, Any]:
    # errors are small shares: the root makes 4 % visible
    return {
        "text": f"{100 * share:.0f}" if share >= 0.005 else "<1" if count else "",
        "told": f"{count:,} of {images:,}" if count else "",
        "strength": round(_STRONGEST * float(np.sqrt(share))),
        "right": bool(right),
    }


def _pairs(confusion: Confusion) -> list[dict[str, Any]]:
    """The most frequent confusions, by number of images."""
    errors = confusion.counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:_PAIRS]
    rows, columns = np.unravel_index(order, errors.shape)
    images = confusion.counts.sum(axis=1)
    return [
        {
            "label": confusion.classes[row],
            "predicted": confusion.classes[column],
            "count": int(errors[row, column]),
            "images": int(images[row]),
            "share": float(errors[row, column] / images[row]),
        }
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        if errors[row, column]
    ]


def recalls(classes: list[ClassRow]) -> dict[str, Any]:
    """The classes from the lowest recall on, at most 40, those without images left out."""
    present = sorted((row for row in classes if row.num_images), key=lambda row: row.recall)
    rows = [
        {"row": row, "recall": Score(row.recall, row.low, row.high), "precision": _text(row.precision)}
        for row in present[:_RECALLS]
    ]
    return {"rows": rows, "count": len(present), "axis": (0.0, 1.0)}


def _text(fraction: float) -> str:
    return "never predicted" if np.isnan(fraction) else f"{fraction:.3f}"


def wrong_images(wrong: dict[str, Any]) -> list[dict[str, Any]]:
    """The most confidently wrong test images, the most confident first."""
    classes = wrong["classes"]
    rows = zip(
        wrong["images"], wrong["indices"], wrong["labels"], wrong["predicted"], wrong["confidences"], strict=True
    )
    return [
        {
            "image": image,
            "index": index,
            "label": classes[label] if label >= 0 else "unlabelled",
            "predicted": classes[predicted],
            "confidence": f"{confidence:.2f}",
        }
        for image, index, label, predicted, confidence in list(rows)[:_WRONG]
    ]


def missing(run: Run, few_shot: bool, dimensions: bool, robustness: bool) -> tuple[list[str], list[str]]:
    """What was not measured: in words, and as names of `--only`."""
    there = {"few_shot": few_shot, "curve": dimensions, "robustness": robustness, "looks": run.looks is not None}
    there["details"] = bool(run.confusion and run.roc and run.wrong)
    lacking = [entry for entry in EVALUATIONS.values() if entry.absent and not there[entry.name]]
    return [entry.absent for entry in lacking], [entry.name for entry in lacking]
