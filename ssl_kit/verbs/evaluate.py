"""`ssl-kit evaluate`: how good are the features, beside their baselines, on labelled images."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_kit.core.console import next_command, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import append_line, lock
from ssl_kit.core.random import permutation
from ssl_kit.data.decode import decode
from ssl_kit.data.sources import Source, open_labelled
from ssl_kit.encoders.encoder import Encoder, find_encoder
from ssl_kit.evaluation.baselines import Pca
from ssl_kit.evaluation.features import BASELINES, FeatureSet, feature_sets, reduced
from ssl_kit.evaluation.health import health, sample_rows, two_views
from ssl_kit.evaluation.linear import linear_probe
from ssl_kit.evaluation.neighbours import CUSTOMARY, knn_rows, normalised, search
from ssl_kit.evaluation.result import Result, paired_difference
from ssl_kit.report.pictures import draw_map, draw_neighbours
from ssl_kit.report.report import write_report

EVALUATIONS = ("knn", "linear", "health")
_NETWORKS = ("encoder", "random_init")  # what label-free health says something about
_QUERIES = 12  # strips in the report
_NEIGHBOURS = 8  # images in a strip
_MAP = 2_000  # images on the map; t-SNE of so many takes seconds
_STREAM_QUERIES = 100_005  # of core/random.py


def evaluate(
    encoder: str,
    labelled: str,
    *,
    out: str | None = None,
    only: tuple[str, ...] | str = EVALUATIONS,
    dims: tuple[int, ...] | str = (),
    baselines: tuple[str, ...] | str = BASELINES,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Score features on labelled images, beside pixels, PCA and the untrained network.

    Everything that can be chosen (k, temperature, l2) is chosen on a part of train; test is read once.

    Args:
        encoder: run folder or encoder folder.
        labelled: folder with train/ and test/, or class folders, a manifest with `label`, or a built-in set.
        out: folder for results; the run's own by default, ENCODER-evaluation for an encoder folder outside a run.
        only: what to measure, of knn, linear and health, separated by commas.
        dims: score kNN also after PCA to these dimensions, separated by commas.
        baselines: what to compare with, of pixels, pca and random_init, separated by commas.
        limit: use only so many images, train and test together, for a first try.
        seed: of the held-out split, the untrained network and the bootstrap.
        batch_size: images per forward pass; changes the speed, not the scores.

    Returns:
        `{"encoder", "out", "results": [a record per score], "report", "seconds"}`.
    """
    started = time.perf_counter()
    wanted = _names(only, EVALUATIONS, "--only")
    sizes = _dims(dims)
    beside = _names(baselines, BASELINES, "--baselines")
    path = find_encoder(encoder)
    folder = _results_folder(path, out)
    loaded = Encoder.load(path).to("cuda" if torch.cuda.is_available() else "cpu")
    train, test = open_labelled(labelled, limit=limit, channels=loaded.channels)
    with lock(folder):
        pictures = _Pictures(folder / "pictures", train, test, seed)
        results: list[Result] = []
        every = feature_sets(
            loaded, train, test, folder / "features", baselines=beside, seed=seed, batch_size=batch_size
        )
        for features in every:
            views = two_views(loaded, test, seed=seed) if features.name == "encoder" and "health" in wanted else None
            results += _scores(features, wanted, sizes, seed, views)
            labels = features.test.labels  # without the rows of files that turned out broken
            pictures.see(features)
            say(f"{features.name}: scored after {time.perf_counter() - started:.0f} s")
        results = _compared(results, labels, seed)
        pictures.draw()
        for result in results:
            append_line(folder / "results.jsonl", result.to_json())
        _print(results)
        report = folder / "report.html"
        write_report([folder], report)
    say(f"results: {folder / 'results.jsonl'}; report: {report}")
    next_command(f"ssl-kit embed {shlex.quote(encoder)} DATA --out EMB")
    return {
        "encoder": str(path),
        "out": str(folder),
        "results": [result.to_json() for result in results],
        "report": str(report),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _names(given: Sequence[str] | str, known: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else tuple(given)
    names = tuple(name for name in names if name and name != "none")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} {','.join(unknown)}: wanted some of {', '.join(known)}, separated by commas")
    return names


def _dims(given: Sequence[int] | str) -> tuple[int, ...]:
    try:
        sizes = (
            tuple(int(text) for text in given.split(",") if text.strip()) if isinstance(given, str) else tuple(given)
        )
    except ValueError as error:
        raise UserError(f"--dims {given}: wanted whole numbers separated by commas, such as 8,32") from error
    if any(size < 1 for size in sizes):
        raise UserError(f"--dims {given}: a dimension is at least 1")
    return tuple(sorted(set(sizes)))


def _results_folder(encoder: Path, out: str | None) -> Path:
    if out is not None:
        return Path(out)
    if encoder.name == "encoder" and (encoder.parent / "run.json").is_file():
        return encoder.parent
    return encoder.resolve().parent / f"{encoder.resolve().name}-evaluation"


def _scores(
    features: FeatureSet, wanted: Sequence[str], dims: Sequence[int], seed: int, views: Sequence[np.ndarray] | None
) -> Iterator[Result]:
    """Every score of one kind of features."""
    name, train, test = features.name, features.train, features.test
    if "knn" in wanted:
        yield from knn_rows(train, test, seed=seed, features=name)
        if name != "pixels":  # PCA of the pixels stands for them at lower dimensions
            for smaller in reduced(features, dims, seed):
                rows = knn_rows(smaller.train, smaller.test, ((None, None), CUSTOMARY[0]), seed=seed, features=name)
                for row in rows:
                    row.settings["reduced_by"] = "pca"
                yield from rows
    if "linear" in wanted:
        yield linear_probe(train, test, seed=seed, features=name)
    if "health" in wanted and name in _NETWORKS:
        yield health(train, views=views, seed=seed, features=name)


def _row(result: Result) -> str:
    """What a score is called in the table; equal names are compared with each other."""
    if result.evaluation != "knn":
        return {"linear": "linear probe"}.get(result.evaluation, result.evaluation)
    settings = result.settings
    way = "chosen" if settings["chosen"] else f"{settings['k']}, T = {settings['temperature']}"
    return f"kNN, k = {way}" + (f", {settings['dim']} dims" if "reduced_by" in settings else "")


def _compared(results: Sequence[Result], labels: np.ndarray, seed: int) -> list[Result]:
    """The encoder's top-1 gets its distance to the best baseline of the same row, with a paired 95 % interval."""
    compared = []
    for result in results:
        others = [other for other in results if other.features != "encoder" and _row(other) == _row(result)]
        if result.features == "encoder" and result.predictions is not None and others:
            best = max(others, key=lambda other: other.metrics["top1"])
            assert best.predictions is not None
            gap, low, high = paired_difference(labels, result.predictions, best.predictions, seed=seed)
            names = ("above_best_baseline", "above_best_baseline_low", "above_best_baseline_high")
            metrics = {**result.metrics, **dict(zip(names, (gap, low, high), strict=True))}
            result = replace(result, metrics=metrics, settings={**result.settings, "best_baseline": best.features})  # noqa: PLW2901
        compared.append(result)
    return compared


def _print(results: Sequence[Result]) -> None:
    """One table: a row per score, a column per kind of features, the distance to the best baseline last."""
    kinds = list(dict.fromkeys(result.features for result in results))
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        for metric, title in _SHOWN[result.evaluation]:
            if metric not in result.metrics:
                continue
            cells = rows.setdefault(f"{_row(result)}{title}" if result.evaluation != "health" else title, {})
            cells[result.features] = _cell(result.metrics, metric)
            if metric == "top1" and "above_best_baseline" in result.metrics:
                gap, low, high = (result.metrics[f"above_best_baseline{end}"] for end in ("", "_low", "_high"))
                cells["gap"] = f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"
    columns = ["on test, 95 % intervals", *(kind.replace("_", " ") for kind in kinds), "above the best baseline"]
    shown = [[name, *(cells.get(kind, "") for kind in [*kinds, "gap"])] for name, cells in rows.items()]
    table("scores", columns, shown)


_SHOWN = {
    "knn": [("top1", "")],
    "linear": [("top1", ""), ("balanced_accuracy", ", balanced"), ("macro_f1", ", macro-F1")],
    "health": [
        ("effective_rank", "effective rank"),
        ("alpha", "alpha of the spectrum"),
        ("uniformity", "uniformity"),
        ("alignment", "alignment"),
    ],
}


def _cell(metrics: dict[str, float], metric: str) -> str:
    value = metrics[metric]
    if f"{metric}_low" not in metrics:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3f} ±{(metrics[f'{metric}_high'] - metrics[f'{metric}_low']) / 2:.3f}"


class _Pictures:
    """Collects what the pictures need while each kind of features is in memory.

    Images are numbered through: test first, then train, so that a query's neighbours can be images of train.
    """

    def __init__(self, folder: Path, train: Source, test: Source, seed: int):
        self.folder, self.train, self.test, self.seed = folder, train, test, seed
        self.queries = _spread(test.labels, _QUERIES, seed)
        self.found: dict[str, np.ndarray] = {}
        self.positions: np.ndarray | None = None
        self.projection = ""

    def see(self, features: FeatureSet) -> None:
        """Notes neighbours of the encoder and the pixels, and the encoder's map."""
        if features.name not in ("encoder", "pixels"):
            return
        # rows of the features are those of the sources unless a file could not be decoded
        row = {name: position for position, name in enumerate(features.test.ids)}
        self.queries = np.array([query for query in self.queries if self.test.ids[query] in row])
        asked = features.test.vectors[[row[self.test.ids[query]] for query in self.queries]]
        ids = search(normalised(features.train.vectors), normalised(asked), _NEIGHBOURS)[1]
        place = {name: position for position, name in enumerate(self.train.ids)}
        self.found[features.name] = len(self.test) + np.vectorize(lambda one: place[features.train.ids[one]])(ids)
        if features.name == "encoder":
            rows = sample_rows(np.arange(len(features.test)), _MAP, self.seed)
            self.shown = np.array([self.test.ids.index(features.test.ids[one]) for one in rows])
            self.positions, self.projection = _flattened(features.test.vectors[rows], self.seed)

    def draw(self) -> None:
        """Writes the neighbours and the map for the report."""
        labels = np.concatenate((self.test.labels, self.train.labels))
        if self.found and len(self.queries):
            draw_neighbours(self.folder, self.queries, self.found, self._thumbnail, labels, self.test.classes)
        if self.positions is not None:
            draw_map(
                self.folder,
                self.positions,
                labels[self.shown],
                self.test.classes,
                self._thumbnail,
                self.shown,
                self.projection,
            )

    def _thumbnail(self, index: int) -> np.ndarray:
        source, row = (self.test, index) if index < len(self.test) else (self.train, index - len(self.test))
        if source.images is not None:
            return source.images[row]
        return decode(source.read(row), source.channels, smallest=(64, 64)).image


def _spread(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` positions, from every class in turn."""
    order = permutation(seed, 0, len(labels), _STREAM_QUERIES)
    turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before it
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turn[members] = np.arange(len(members))
    return order[np.lexsort((labels[order], turn[order]))][:count]


def _flattened(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """(N, 2) for the map, and how it was made: t-SNE of 50 principal components, PCA when there are few images."""
    pca = Pca.of(vectors, 50, seed)
    if len(vectors) < 100:
        return _padded(pca.apply(vectors, 2)), f"PCA of {len(vectors):,} test images"
    from sklearn.manifold import TSNE

    tsne: Callable[[np.ndarray], np.ndarray] = TSNE(init="pca", max_iter=500, random_state=seed).fit_transform
    return tsne(pca.apply(vectors)), f"t-SNE of {len(vectors):,} test images"


def _padded(positions: np.ndarray) -> np.ndarray:
    return np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))
