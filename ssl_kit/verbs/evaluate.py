"""`ssl-kit evaluate`: how good are the features, beside their baselines, on labelled images."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ssl_kit.core.console import detail, if_interrupted, next_command, result, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import append_line, write_csv
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import full_float32
from ssl_kit.core.named import ASKED, BASELINES, check_names, find_encoder, results_folder
from ssl_kit.core.owned import RUN, check_place, record_in
from ssl_kit.core.reading import Function, Reading
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.core.settings import verb
from ssl_kit.data.opening import open_labelled, places
from ssl_kit.data.sources import Source
from ssl_kit.embeddings.exact import solver
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.pretrained import load_pretrained
from ssl_kit.encoders.wrapped import Wrapped, in_eval_mode
from ssl_kit.evaluation.catalog import AS_IT_CAME, EVALUATIONS, ONLY, resolve
from ssl_kit.evaluation.duplicates import Leaks, find_leaks
from ssl_kit.evaluation.features import feature_sets, pretrained_names
from ssl_kit.evaluation.result import Result
from ssl_kit.report.head import next_step, verdict
from ssl_kit.report.page import write_report
from ssl_kit.report.read import read_run
from ssl_kit.verbs.pictures import Pictures
from ssl_kit.verbs.record import settle
from ssl_kit.verbs.scoring import (
    Scored,
    Task,
    compared,
    default_names,
    in_words,
    print_curve,
    print_gaps,
    print_scores,
    print_spread,
    spread,
)

_SHOWN_LEAKS = 5  # pairs named on the terminal; leaks.csv has all


@dataclass(frozen=True)
class Settings:
    """What to score, and where to.

    Args:
        encoder: run folder or encoder folder; several, of different seeds, give mean, spread and paired differences.
            From Python any module too, (B, C, H, W) float in [0, 1] to (B, dim), of 3 channels unless its attribute
            `channels` says so; it sees images at its `image_size`, where it has that, else at a size chosen from them.
        labelled: folder with train/ and test/ or train.csv and test.csv, class folders, a manifest with `label`, or a
            built-in set.
        out: folder for results; the run's own by default, ENCODER-evaluation for an encoder folder outside a run,
            runs/CLASS-evaluation for a module.
        only: what to measure, of knn, linear, attentive, health, sgd (the literature's linear probe), few_shot,
            retrieval, instances (one crop of an image by another), curve (by dimensions), robustness (to 8
            corruptions), details (classes, mistakes, ROC, suspected label errors), looks (pictures of what the encoder
            looks at), separated by commas; by default knn, linear and health, for transformers attentive too.
        dims: score kNN also after PCA to these dimensions, separated by commas; with curve, its dimensions.
        layers: concatenate the outputs of so many last stages or blocks.
        balanced: weigh classes alike in the linear probe, and choose its l2 by balanced accuracy.
        baselines: what to compare with, of pixels, pca, random_init, patches (k-means of small patches, no network: the
            strongest of them) and scratch (the same network trained on the labels, on as many images as the run was),
            separated by commas; by default the first three.
        baseline: compare with a pretrained model too, with its own image size, mean and standard deviation: timm:NAME
            (weights in timm's cache on this disk; nothing is downloaded), or a run, encoder or timm folder. May be
            repeated. What a run was begun with (--init) stands beside it unasked, as it came.
        leaks: count near-duplicates of test images among the training images.
        drop_leaks: leave such test images out of every score.
        limit: use only so many images, train and test together, for a first try.
        reader: module:function of your own that reads the files, behind --allow MODULE: (bytes, id) -> array.
        max_bad: fraction of the images that may be undecodable, in [0, 1]; 0 is strict: the first one is an error.
        seed: of the held-out split, the untrained network and the bootstrap.
        batch_size: images per forward pass; changes the speed, not the scores.

    Examples:
        ssl-kit evaluate runs/photos labelled
        ssl-kit evaluate runs/photos labelled --only knn,linear --baseline timm:resnet18.a1_in1k
    """

    encoder: list[str] | str | nn.Module
    labelled: str
    _: KW_ONLY
    # What to read
    limit: int | None = None
    reader: Function | None = None
    max_bad: float = 0.05
    leaks: bool = True
    drop_leaks: bool = False
    # What to measure
    only: tuple[str, ...] | str | None = None
    dims: tuple[int, ...] | str = ()
    layers: int = 1
    balanced: bool = False
    seed: int = 0
    # What to compare with
    baselines: tuple[str, ...] | str = BASELINES
    baseline: tuple[str, ...] | str = ()
    # Where it goes
    out: str | None = None
    # The machine
    batch_size: int = 256


@verb(Settings)
def evaluate(settings: Settings) -> Entries:
    """Score features on labelled images, beside pixels, PCA and the untrained network.

    Everything that can be chosen (k, temperature, l2) is chosen on a part of train; test is read once.

    Returns:
        `{"encoder", "out", "results": [a record per score], "leaks", "report", "seconds"}`; of several encoders
        `{"runs": [one of these per encoder], "spread": [a record per score], "seconds"}`.
    """
    started = time.perf_counter()
    asked = [*map(_asked, settings.encoder if isinstance(settings.encoder, list | tuple) else [settings.encoder])]
    options = _Options(
        settings.labelled,
        None if settings.only is None else _names(settings.only, ONLY, "--only"),
        _dims(settings.dims),
        settings.layers,
        settings.balanced,
        _names(settings.baselines, ASKED, "--baselines"),
        _pretrained(settings.baseline),
        settings.leaks,
        settings.drop_leaks,
        settings.limit,
        settings.max_bad,
        settings.seed,
        settings.batch_size,
        settings.reader,
    )
    folders = _folders([one.path for one in asked], settings.out)
    for folder in folders:
        check_place(folder, places(settings.labelled))
    opened = _Opened(options)
    done, records = [], []
    for one, folder in zip(asked, folders, strict=True):
        scored, record = _one(one, folder, opened, options)
        done.append(scored)
        records.append(record)
    next_command(_next(asked[0], folders[0], settings.labelled))
    if len(done) == 1:
        return records[0]
    rows = spread(done, settings.seed)
    print_spread(rows, [scored.name for scored in done])
    return {"runs": records, "spread": rows, "seconds": round(time.perf_counter() - started, 3)}


def _next(asked: _Asked, folder: Path, labelled: Any) -> str:
    """What the report names for a run; for any other encoder, its embeddings of these images, to search in."""
    if asked.module is None and (folder / RUN).is_file():
        return next_step(run := read_run(folder), verdict(run)).command
    if not isinstance(labelled, str):  # what a program holds no command can name
        return shlex.join(["ssl-kit", "report", str(folder)])
    return shlex.join(["ssl-kit", "embed", asked.name, labelled, "--out", str(folder / "embeddings")])


class _Asked(NamedTuple):
    """What is to be scored: the encoder folder at `path`, or a module."""

    name: str
    path: Path
    module: nn.Module | None = None

    def loaded(self, opened: _Opened) -> Encoder | Wrapped:
        """It, in the place where it computes; of a module the size is chosen from the images."""
        if self.module is None:
            return Encoder.load(self.path).to(opened.device)
        channels, size = getattr(self.module, "channels", 3), getattr(self.module, "image_size", None)
        if size is None:
            from ssl_kit.verbs.defaults import (
                view_size,
            )  # with Lightning and all methods, which nothing else here needs

            size = view_size(None, opened.parts(Reading(channels))[0])
        return Wrapped(self.module, (size, size) if isinstance(size, int) else tuple(size), channels)


def _asked(encoder: str | nn.Module) -> _Asked:
    if isinstance(encoder, nn.Module):
        name = type(encoder).__name__
        return _Asked(name, Path("runs") / name, encoder)
    return _Asked(encoder, find_encoder(encoder))


@dataclass(frozen=True)
class _Options:
    """The options of `evaluate`, read and checked."""

    labelled: str
    only: tuple[str, ...] | None
    dims: tuple[int, ...]
    layers: int
    balanced: bool
    baselines: tuple[str, ...]
    pretrained: dict[str, str]  # name of the features -> what was typed
    leaks: bool
    drop_leaks: bool
    limit: int | None
    max_bad: float
    seed: int
    batch_size: int
    reader: Function | None


class _Opened:
    """The labelled images, opened and checked for leaks once for all encoders that read them alike.

    Attributes:
        device: where all of `evaluate` computes.
    """

    def __init__(self, options: _Options):
        self.options, self.device = options, solver()
        self._parts: dict[str, tuple[Source, Source, Leaks | None]] = {}

    def parts(self, reading: Reading) -> tuple[Source, Source, Leaks | None]:
        """Train, test (without leaks, if that is asked for) and the leaks between them."""
        options, key = self.options, str(reading)
        if key not in self._parts:
            reading = reading.by(options.reader)
            train, test = open_labelled(options.labelled, limit=options.limit, reading=reading, max_bad=options.max_bad)
            found = find_leaks(train, test, device=self.device) if options.leaks or options.drop_leaks else None
            if found is not None:
                _say_leaks(found, options.drop_leaks)
            if found is not None and options.drop_leaks:
                test = _without(test, found)
            self._parts[key] = train, test, found
        return self._parts[key]


def _one(asked: _Asked, folder: Path, opened: _Opened, options: _Options) -> tuple[Scored, Entries]:
    """Scores one encoder: features one kind after the other, then what they have in common."""
    started, seed, device = time.perf_counter(), options.seed, opened.device
    loaded = asked.loaded(opened)
    if options.layers != 1 and isinstance(loaded, Wrapped):
        raise UserError(f"layers {options.layers}: a module of your own has no known stages or blocks; leave it out")
    wanted = options.only or default_names(loaded)
    train, test, leaks = opened.parts(loaded.reading)
    beside = {name: one.to(device) for name, one in _beside(asked, loaded.channels, train, folder, options).items()}
    nested = isinstance(loaded, Encoder) and bool(loaded.args["num_classes"]) and options.layers == 1
    task = Task(train, test, folder, options.dims, nested, options.balanced, seed, options.batch_size, device)
    results: list[Result] = []
    kept = f"features made so far are kept in {folder / 'features'}, scores are not; the same command goes on"
    with full_float32(), lock(folder), record_in(folder) as entries, if_interrupted(lambda: kept), in_eval_mode(loaded):
        pictures = Pictures(folder / "pictures", train, test, seed)
        every = feature_sets(
            loaded,
            train,
            test,
            folder / "features",
            baselines=options.baselines,
            pretrained=beside,
            layers=options.layers,
            seed=seed,
            batch_size=options.batch_size,
            device=device,
        )
        for features in every:
            for evaluation in wanted:
                results += resolve(EVALUATIONS[evaluation].function)(task, features)
            labels = features.test.labels  # without the rows of files that turned out broken
            pictures.see(features)
            say(f"{features.name}: scored after {time.perf_counter() - started:.0f} s")
        seen = np.unique(labels[labels >= 0])
        of = f"{len(seen)} of {len(test.classes)}" if len(seen) < len(test.classes) else ""
        results = [_noted(one, options, leaks, of) for one in compared(results, labels, seed)]
        pictures.draw()
        for one in results:
            append_line(folder / "results.jsonl", one.to_json())
        if leaks is not None:
            pairs = zip(leaks.test_ids, leaks.train_ids, map(float, leaks.correlations), strict=True)
            write_csv(folder / "leaks.csv", ["test", "train", "correlation"], pairs)
        print_scores(results)
        print_gaps(results)
        print_curve(results)
        settle(entries)
        write_report([folder], report := folder / "report.html")
    detail(f"results: {folder / 'results.jsonl'}")
    result("; ".join(filter(None, (in_words(results), f"report: {report}"))))
    record = {
        "encoder": str(asked.path) if asked.module is None else asked.name,
        "out": str(folder),
        "results": [one.to_json() for one in results],
        "leaks": None if leaks is None else {"count": len(leaks.test_ids), "of": leaks.num_test},
        "report": str(report),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Scored(asked.name, results, labels), record


def _beside(asked: _Asked, channels: int, train: Source, folder: Path, options: _Options) -> dict[str, Encoder]:
    """The encoders that are scored beside this one, by name."""
    made = {name: load_pretrained(given, channels) for name, given in options.pretrained.items()}
    made |= _start(asked, channels, options)
    if "scratch" in options.baselines:
        from ssl_kit.verbs.finetune import from_scratch  # with Lightning, which nothing else here needs

        made["scratch"] = from_scratch(asked.path, train, folder, options.seed)
    return made


def _start(asked: _Asked, channels: int, options: _Options) -> dict[str, Encoder]:
    """What the run was begun with (`--init`), if it is on this disk still: says what training has added to it."""
    record = asked.path.parent / "run.json"
    if asked.module is not None or not record.is_file():
        return {}
    init = read_object(record).get("init")
    if not isinstance(init, str) or init in options.pretrained.values():
        return {}
    try:
        return {AS_IT_CAME: load_pretrained(init, channels)}
    except UserError as error:
        say(f"as it came: what the run was begun with is not scored beside it ({error})")
        return {}


def _noted(result: Result, options: _Options, leaks: Leaks | None, of: str) -> Result:
    """The result with what moved it from outside its evaluation."""
    settings = dict(result.settings)
    if options.layers != 1 and result.features in ("encoder", "random_init"):
        settings["layers"] = options.layers
    if of:
        settings["test_classes"] = of
    if leaks is not None:
        settings |= {"leaks": len(leaks.test_ids), "leaks_dropped": options.drop_leaks}
    return replace(result, settings=settings)


def _names(given: Sequence[str] | str, known: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(str(name).strip() for name in _listed(given))
    names = tuple(name for name in names if name and name != "none")
    check_names(names, known, option)
    return names


def _listed(given: Any) -> list[Any]:
    """What may be several, as a list; None and False are none."""
    if given is None or given is False:
        return []
    return given.split(",") if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]


def _pretrained(given: Sequence[str] | str) -> dict[str, str]:
    """Name of the features -> what was typed, each once."""
    models = list(dict.fromkeys(one.strip() for one in _listed(given) if one.strip()))
    return dict(zip(pretrained_names(models), models, strict=True))


def _dims(given: Sequence[int] | str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(one) for one in _listed(given) if str(one).strip())
    except ValueError as error:
        raise UserError(f"--dims {given}: wanted whole numbers separated by commas, such as 8,32") from error
    if any(size < 1 for size in sizes):
        raise UserError(f"--dims {given}: a dimension is at least 1")
    return tuple(sorted(set(sizes)))


def _folders(paths: Sequence[Path], out: str | None) -> list[Path]:
    """A folder for results per encoder; below `out`, if given, when there are several."""
    if out is None or len(paths) == 1:
        return [results_folder(path, out) for path in paths]
    return [Path(out) / f"{number}-{results_folder(path, None).name}" for number, path in enumerate(paths)]


def _say_leaks(leaks: Leaks, dropped: bool) -> None:
    count = len(leaks.test_ids)
    told = (
        f"near-duplicates: {count:,} of {leaks.num_test:,} test images ({count / leaks.num_test:.1%}) have one in train"
    )
    if not count:
        say(told)
        return
    say(f"{told}; they are {'left out' if dropped else 'scored like the others (--drop-leaks leaves them out)'}")
    pairs = zip(leaks.test_ids[:_SHOWN_LEAKS], leaks.train_ids, leaks.correlations, strict=False)
    say("  " + "; ".join(f"{test} = {train} ({correlation:.3f})" for test, train, correlation in pairs))


def _without(test: Source, leaks: Leaks) -> Source:
    """The test images that have no near-duplicate in train, under a name of their own."""
    leaked = set(leaks.test_ids)
    kept = np.array([name not in leaked for name in test.ids()])
    if not kept.any():
        raise UserError(f"{test.name}: every test image has a near-duplicate in train; nothing is left to score")
    return test.subset(kept, f"{test.name} without near-duplicates")
