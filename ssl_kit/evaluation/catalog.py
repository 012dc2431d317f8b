"""The one list of evaluations: by which function each is measured, and in which words it is shown.

Nothing here imports a probe: tables and pages read the words, verbs `resolve` a function when they call it. A new
evaluation is a function as those of `verbs/scoring.py`, and an entry of `EVALUATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from ssl_kit.evaluation.result import Result

ENCODER = "encoder"  # of `Result.features`; the others are its baselines
PRETRAINED = "pretrained:"  # how those of other models begin
AS_IT_CAME = f"{PRETRAINED}as it came"  # of the weights that a run was begun with (`--init`)
ABOVE = "above_"  # metric: top-1 minus that of the features named after it, on the same images, with a paired interval
GAIN = f"{ABOVE}best_baseline"
JUDGED_BY = ("knn", "linear", "finetune", "attentive")  # a method that says nothing else; the first measured leads

_TOP1 = {"top1": ""}


@dataclass(frozen=True)
class Evaluation:
    """What can be measured of features.

    Attributes:
        name: in results.jsonl and `--only`.
        title: of its table on a page.
        note: what it measures, a sentence.
        function: "module:function" of (Task, FeatureSet) to results; "" where a verb of its own measures it.
        default: whether `evaluate` measures it unasked: always, never, or for transformers only.
        row: what its rows on a terminal begin with.
        metrics: of these rows, metric -> words, "" for the one that needs none.
        absent: what a page of a run without it says is lacking; "" to say nothing.
    """

    name: str
    title: str
    note: str
    function: str = ""
    default: Literal["always", "transformers", "never"] = "never"
    row: str = ""
    metrics: Mapping[str, str] = field(default_factory=lambda: _TOP1)
    absent: str = ""


_SCORING = "ssl_kit.verbs.scoring:score_"
_CORRUPTIONS = ("noise", "blur", "brightness", "contrast", "jpeg", "pixelate", "rotation", "crop")
_ENTRIES = (
    Evaluation(
        "knn",
        "kNN",
        "Nearest neighbours by cosine vote on the label; nothing is trained.",
        f"{_SCORING}knn",
        default="always",
        row="kNN",
    ),
    Evaluation(
        "linear",
        "Linear probe",
        "A linear classifier on frozen features; l2 is chosen on a held-out part of train.",
        f"{_SCORING}linear",
        default="always",
        row="linear probe",
        metrics=_TOP1
        | {"balanced_accuracy": "balanced", "macro_f1": "macro-F1", "auroc": "AUROC"}
        | {"average_precision": "average precision", "ece": "calibration error"},
    ),
    Evaluation(
        "crops",
        "Crop to crop",
        "Without labels: is the right half of an image found by its left half, among those of all these images?",
    ),
    Evaluation("finetune", "Fine-tuning", "The whole network trained on the labels."),
    Evaluation(
        "attentive",
        "Attentive probe",
        "Attention pooling and a linear classifier on frozen features.",
        f"{_SCORING}attentive",
        default="transformers",
        row="attentive probe",
    ),
    Evaluation(
        "few_shot",
        "Few-shot",
        "A classifier from a few labelled images per class.",
        f"{_SCORING}few_shot",
        absent="few-shot curve",
    ),
    Evaluation(
        "curve",
        "Curve",
        "kNN and linear probe at fewer dimensions.",
        f"{_SCORING}curve",
        absent="score by dimensions",
    ),
    Evaluation(
        "retrieval",
        "Retrieval",
        "Are the nearest images of the same class?",
        f"{_SCORING}retrieval",
        row="retrieval",
        metrics={"recall_at_1": "recall@1", "recall_at_10": "recall@10", "precision_at_10": "precision@10"}
        | {"r_precision": "R-precision", "map_at_r": "mAP@R"},
    ),
    Evaluation(
        "instances",
        "Instance retrieval",
        "Is one crop of an image found by another?",
        f"{_SCORING}instances",
        row="instance retrieval",
        metrics={"recall_at_1": "recall@1", "recall_at_10": "recall@10", "mean_reciprocal_rank": "reciprocal rank"},
    ),
    Evaluation(
        "robustness",
        "Robustness",
        "The score on corrupted images.",
        f"{_SCORING}robustness",
        row="kNN, k = 20",
        metrics={"clean": "clean", "top1": "all corruptions"} | {name: name for name in _CORRUPTIONS},
        absent="robustness",
    ),
    Evaluation(
        "sgd",
        "Linear probe by SGD",
        "The literature's protocol; the learning rate is chosen on a held-out part of train.",
        f"{_SCORING}sgd",
        row="linear probe by SGD",
    ),
    Evaluation(
        "details",
        "Details",
        "Scores per class; tables are in details/.",
        f"{_SCORING}details",
        metrics={"lowest_recall": "lowest recall of a class"}
        | {f"suspected_{part}": f"suspected label errors, {part}" for part in ("train", "test")},
        absent="confusions, recalls, ROC and the worst mistakes",
    ),
    Evaluation(
        "looks",
        "Looks",
        "What the encoder looks at, as pictures; nothing is scored.",
        f"{_SCORING}looks",
        absent="what the encoder looks at",
    ),
    Evaluation(
        "health",
        "Health, without labels",
        "Effective rank: how many directions the features really use.",
        f"{_SCORING}health",
        default="always",
        metrics={"effective_rank": "effective rank", "lidar": "LiDAR", "alpha": "alpha of the spectrum"}
        | {name: name for name in ("uniformity", "alignment", "hubness")},
    ),
)
EVALUATIONS = {entry.name: entry for entry in _ENTRIES}
ONLY = tuple(entry.name for entry in _ENTRIES if entry.function)  # what `evaluate --only` takes

METRICS = {  # heads of columns, in their order; others follow under their own names
    "top1": "Top-1",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro-F1",
    GAIN: "Above the best baseline",
    "map_at_r": "mAP@R",
    "auroc": "AUROC",
    "ece": "Calibration error",
    "lidar": "LiDAR",
    "effective_rank": "Effective rank",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
    "alpha": "Alpha of the spectrum",
}


def resolve(function: str) -> Callable[..., Any]:
    """The function of an entry: "module:function"."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


def row_name(result: Result) -> str:
    """What a result is called in a table: results of equal names differ in their features only."""
    settings = result.settings
    parts = [EVALUATIONS[result.evaluation].row, settings.get("protocol", "")]
    if "chosen" in settings:
        parts.append("k = chosen" if settings["chosen"] else f"k = {settings['k']}, T = {settings['temperature']}")
    if "shots" in settings:
        parts.append(f"{settings['shots']} per class")
    elif "fraction" in settings:
        parts.append(f"{settings['fraction']:.0%} of the labels")
    if "reduced_by" in settings:
        parts.append(f"{settings['dim']} dims")
    return ", ".join(part for part in parts if part)
