"""The files of `ssl-kit evaluate --only details`: what the linear probe says of single classes and images."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path

import numpy as np

from ssl_kit.core.files import write_csv, write_json
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.evaluation.metrics import ClassScore, class_scores, confidently_wrong, roc_curves, suspected_errors
from ssl_kit.evaluation.result import Result, confusion_matrix
from ssl_kit.report.pictures import draw_wrong
from ssl_kit.verbs.pictures import image_of

_DRAWN = 24  # mistakes with a picture


def write_classes(folder: Path, test: Embeddings, probe: Result) -> list[ClassScore]:
    """Writes confusion.csv, classes.csv and roc.json of a probe that kept its probabilities.

    Args:
        folder: RUN/details.
        test: labelled; rows without a label are left out, as the probe does.
        probe: of these rows.
    """
    labels, classes = test.labels[test.labels >= 0], test.classes
    assert probe.predictions is not None and probe.probabilities is not None
    confusion = confusion_matrix(labels, probe.predictions, len(classes))
    scores = class_scores(confusion, classes)
    write_csv(folder / "classes.csv", [field.name for field in fields(ClassScore)], map(astuple, scores))
    rows = ([name, *row] for name, row in zip(classes, confusion, strict=True))
    write_csv(folder / "confusion.csv", ["label", *classes], rows)
    curves = roc_curves(labels, probe.probabilities)
    if len(curves.classes):
        write_json(folder / "roc.json", curves.record(classes))
    return scores


def write_mistakes(folder: Path, source: Source, test: Embeddings, probe: Result) -> None:
    """Writes details/confidently_wrong.csv, and the worst of them with their images as pictures/wrong.json.

    Args:
        folder: RUN.
        source: where the images are.
        test: their features, with ids.
        probe: of the labelled ones among them.
    """
    assert probe.predictions is not None and probe.confidences is not None
    known, classes = np.flatnonzero(test.labels >= 0), test.classes
    wrong = confidently_wrong(test.labels[known], probe.predictions, probe.confidences)
    rows, predicted, confidences = known[wrong], probe.predictions[wrong], probe.confidences[wrong]
    mistakes = (
        (test.ids[row], classes[test.labels[row]], classes[other], f"{confidence:.4f}")
        for row, other, confidence in zip(rows, predicted, confidences, strict=True)
    )
    header = ["id", "label", "predicted", "confidence"]
    write_csv(folder / "details" / "confidently_wrong.csv", header, mistakes)
    place = {name: position for position, name in enumerate(source.ids())}
    places = np.array([place[test.ids[row]] for row in rows[:_DRAWN]], dtype=np.int64)
    draw_wrong(
        folder / "pictures",
        [image_of(source, row) for row in places],
        places,
        test.labels[rows[:_DRAWN]],
        predicted[:_DRAWN],
        confidences[:_DRAWN],
        classes,
    )


def write_suspects(path: Path, part: Embeddings) -> float:
    """Writes the labelled images whose neighbours disagree with their label; the share of them."""
    known, classes = np.flatnonzero(part.labels >= 0), part.classes
    rows, suggested, margins = suspected_errors(part.vectors[known], part.labels[known], len(classes))
    suspects = (
        (part.ids[row], classes[part.labels[row]], classes[other], f"{margin:.4f}")
        for row, other, margin in zip(known[rows], suggested, margins, strict=True)
    )
    write_csv(path, ["id", "label", "neighbours_say", "margin"], suspects)
    return len(rows) / len(known)
