"""What `ssl-kit evaluate` can measure: one entry per name of `--only`, and how its results are shown.

An entry scores one kind of features at a time (`feature_sets` holds one in memory). A new evaluation is a new entry of
`EVALUATIONS`: nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_kit.core.console import warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_memory, size_text
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.attentive import Tokens, attentive_probe, sgd_probe
from ssl_kit.evaluation.features import FeatureSet, reduced
from ssl_kit.evaluation.fewshot import Way, dimension_curve, few_shot
from ssl_kit.evaluation.health import augmented, health
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import CUSTOMARY, knn_rows
from ssl_kit.evaluation.result import Result
from ssl_kit.evaluation.retrieval import instance_retrieval, retrieval
from ssl_kit.evaluation.robustness import CORRUPTIONS, robustness
from ssl_kit.verbs import details
from ssl_kit.verbs import pictures as looks
from ssl_kit.views.recipe import plain

_NETWORKS = ("encoder", "random_init")  # what label-free health says something about


@dataclass(frozen=True)
class Task:
    """What is scored, and the options that can move a score.

    Attributes:
        train: labelled images.
        test: labelled images.
        folder: where files that belong to a score go.
        dims: to which features are also reduced, ascending.
        nested: whether the encoder gives a code, whose first dimensions may stand alone.
        balanced: weigh classes alike in the linear probe.
        seed: of everything drawn.
        batch_size: images per forward pass.
    """

    train: Source
    test: Source
    folder: Path
    dims: tuple[int, ...] = ()
    nested: bool = False
    balanced: bool = False
    seed: int = 0
    batch_size: int = 256


@dataclass(frozen=True)
class Evaluation:
    """An entry of `--only`.

    Attributes:
        score: the results of one kind of features; none where it does not apply to them.
        default: whether it is measured when `--only` is not given: always, never, or for transformers only.
    """

    score: Callable[[Task, FeatureSet], Iterable[Result]]
    default: Literal["always", "transformers", "never"] = "never"


@dataclass(frozen=True)
class Shown:
    """How the results of one kind are shown in the table.

    Attributes:
        name: what such a result is called, from its settings; results of equal names are compared with each other.
        metrics: (metric, what is added to the name) of its rows.
    """

    name: Callable[[dict[str, Any]], str]
    metrics: tuple[tuple[str, str], ...] = (("top1", ""),)


def default_names(encoder: Encoder) -> tuple[str, ...]:
    """What is measured when nothing is asked for."""
    kinds = ("always",) if encoder.is_convolutional else ("always", "transformers")
    return tuple(name for name, entry in EVALUATIONS.items() if entry.default in kinds)


def row_name(result: Result) -> str:
    """What a result is called in the table."""
    return SHOWN[result.evaluation].name(result.settings)


def _knn(task: Task, features: FeatureSet) -> Iterator[Result]:
    name, seed = features.name, task.seed
    yield from knn_rows(features.train, features.test, seed=seed, features=name)
    if name == "pixels":  # PCA of the pixels stands for them at lower dimensions
        return
    for smaller in reduced(features, task.dims, seed):
        rows = knn_rows(smaller.train, smaller.test, ((None, None), CUSTOMARY[0]), seed=seed, features=name)
        for row in rows:
            row.settings["reduced_by"] = "pca"
        yield from rows


def _linear(task: Task, features: FeatureSet) -> Iterator[Result]:
    yield linear_probe(features.train, features.test, balanced=task.balanced, seed=task.seed, features=features.name)


def _sgd(task: Task, features: FeatureSet) -> Iterator[Result]:
    yield sgd_probe(features.train, features.test, seed=task.seed, features=features.name)


def _attentive(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of networks; the tokens of all images are in memory meanwhile."""
    if features.network is None or not isinstance(features.network.module, Encoder):
        return
    network = features.network.module
    module = Tokens(network)
    needed, available = 4.0 * module.dim * (len(task.train) + len(task.test)), available_memory()
    if needed > available / 2:
        told = f"the tokens of all images take {size_text(needed)}, {size_text(available)} of memory are available; "
        told += "use --limit, or leave attentive out of --only"
        if features.name == "encoder":
            raise UserError(told)
        warn(f"{features.name} has no attentive probe: {told}")  # a larger network than the encoder
        return
    view, label = plain(network.image_size), f"tokens, {features.name}"
    parts = [
        embed(module, part, view=view, batch_size=task.batch_size, label=label) for part in (task.train, task.test)
    ]
    yield attentive_probe(*parts, width=module.width, seed=task.seed, features=features.name)


def _health(task: Task, features: FeatureSet) -> Iterator[Result]:
    if features.name not in _NETWORKS or features.network is None:
        return
    views = augmented(features.network, task.test, seed=task.seed) if features.name == "encoder" else None
    yield health(features.train, views=views, seed=task.seed, features=features.name)


def _few_shot(task: Task, features: FeatureSet) -> Iterator[Result]:
    yield from few_shot(features.train, features.test, seed=task.seed, features=features.name)


def _retrieval(task: Task, features: FeatureSet) -> Iterator[Result]:
    yield retrieval(features.test, seed=task.seed, features=features.name)


def _instances(task: Task, features: FeatureSet) -> Iterator[Result]:
    if features.network is not None:
        yield instance_retrieval(features.network, task.test, seed=task.seed, features=features.name)


def _curve(task: Task, features: FeatureSet) -> Iterator[Result]:
    if features.name == "pixels":  # PCA of the pixels stands for them
        return
    ways: tuple[Way, ...] = ("pca", "random") if features.name == "encoder" else ("pca",)
    if features.name == "encoder" and task.nested:
        ways = ("cut", *ways)
    yield from dimension_curve(features, dims=task.dims, ways=ways, balanced=task.balanced, seed=task.seed)


def _robustness(task: Task, features: FeatureSet) -> Iterator[Result]:
    if features.network is not None:
        yield robustness(features.train, task.test, features.network, seed=task.seed, features=features.name)


def _details(task: Task, features: FeatureSet) -> Iterator[Result]:
    """Of the encoder: classes, confusions, ROC, confident mistakes and suspected label errors, as files."""
    if features.name != "encoder":
        return
    train, test = features.train, features.test
    probe = linear_probe(train, test, balanced=task.balanced, seed=task.seed, keep_probabilities=True)
    scores = details.write_classes(task.folder / "details", test, probe)
    details.write_mistakes(task.folder, task.test, test, probe)
    metrics = {"lowest_recall": min(score.recall for score in scores if score.num_images)}
    for name, part in (("train", train), ("test", test)):
        metrics[f"suspected_{name}"] = details.write_suspects(task.folder / "details" / f"suspected_{name}.csv", part)
    yield Result("details", features.name, metrics, probe.settings, probe.made_by, probe.seconds)


def _looks(task: Task, features: FeatureSet) -> Iterable[Result]:
    """Of the encoder: what it looks at, as pictures; nothing is scored."""
    network = features.network
    if features.name == "encoder" and network is not None and isinstance(network.module, Encoder):
        looks.draw(task.folder / "pictures", network.module, features, task.train, task.test, task.seed)
    return ()


def _knn_name(settings: dict[str, Any]) -> str:
    way = "chosen" if settings["chosen"] else f"{settings['k']}, T = {settings['temperature']}"
    return f"kNN, k = {way}{_dims(settings)}"


def _dims(settings: dict[str, Any]) -> str:
    return f", {settings['dim']} dims" if "reduced_by" in settings else ""


def _few_shot_name(settings: dict[str, Any]) -> str:
    size = f"{settings['shots']} per class" if "shots" in settings else f"{settings['fraction']:.0%} of the labels"
    return f"{settings['protocol']}, {size}"


EVALUATIONS: dict[str, Evaluation] = {
    "knn": Evaluation(_knn, "always"),
    "linear": Evaluation(_linear, "always"),
    "attentive": Evaluation(_attentive, "transformers"),
    "health": Evaluation(_health, "always"),
    "sgd": Evaluation(_sgd),
    "few_shot": Evaluation(_few_shot),
    "retrieval": Evaluation(_retrieval),
    "instances": Evaluation(_instances),
    "curve": Evaluation(_curve),
    "robustness": Evaluation(_robustness),
    "details": Evaluation(_details),
    "looks": Evaluation(_looks),
}

SHOWN: dict[str, Shown] = {
    "knn": Shown(_knn_name),
    "linear": Shown(
        lambda settings: f"linear probe{_dims(settings)}",
        (
            ("top1", ""),
            ("balanced_accuracy", ", balanced"),
            ("macro_f1", ", macro-F1"),
            ("auroc", ", AUROC"),
            ("average_precision", ", average precision"),
            ("ece", ", calibration error"),
        ),
    ),
    "attentive": Shown(lambda settings: "attentive probe"),
    "sgd": Shown(lambda settings: "linear probe by SGD"),
    "few_shot": Shown(_few_shot_name),
    "retrieval": Shown(
        lambda settings: "retrieval",
        (
            ("recall_at_1", ", recall@1"),
            ("recall_at_10", ", recall@10"),
            ("precision_at_10", ", precision@10"),
            ("r_precision", ", R-precision"),
            ("map_at_r", ", mAP@R"),
        ),
    ),
    "instances": Shown(
        lambda settings: "crop to crop",
        (("recall_at_1", ", recall@1"), ("recall_at_10", ", recall@10"), ("mean_reciprocal_rank", ", reciprocal rank")),
    ),
    "robustness": Shown(
        lambda settings: "kNN, k = 20, ",
        (("clean", "clean"), ("top1", "all corruptions"), *((name, name) for name in CORRUPTIONS)),
    ),
    "details": Shown(
        lambda settings: "",
        (
            ("lowest_recall", "lowest recall of a class"),
            ("suspected_train", "suspected label errors, train"),
            ("suspected_test", "suspected label errors, test"),
        ),
    ),
    "health": Shown(
        lambda settings: "",
        (
            ("effective_rank", "effective rank"),
            ("lidar", "LiDAR"),
            ("alpha", "alpha of the spectrum"),
            ("uniformity", "uniformity"),
            ("alignment", "alignment"),
            ("hubness", "hubness"),
        ),
    ),
}
