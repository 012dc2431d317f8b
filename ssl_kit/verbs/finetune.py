"""`ssl-kit finetune`: the encoder trained further on labels, beside the same network trained from scratch."""

from __future__ import annotations

import json
import math
import secrets
import shlex
import time
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from ssl_kit.core.console import if_interrupted, next_command, result, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import append_line, write_json
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import (
    Precision,
    available_cores,
    choose_channels_last,
    choose_device,
    choose_precision,
    keep_memory,
    lightning_precision,
)
from ssl_kit.core.named import RECORD, RUN, find_encoder, results_folder
from ssl_kit.core.owned import check_place, record_in, remove_training
from ssl_kit.core.process import Signals
from ssl_kit.core.random import permutation
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.core.settings import verb
from ssl_kit.data.module import ImageData
from ssl_kit.data.opening import open_labelled, places
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.features import fingerprint
from ssl_kit.evaluation.finetune import BestEpoch, FineTune, check_lora, merge_lora, probabilities
from ssl_kit.evaluation.metrics import probability_metrics
from ssl_kit.evaluation.result import Result, classification_metrics, holdout, paired_difference, versions
from ssl_kit.report.page import write_report
from ssl_kit.training.checkpoint import Checkpoints, newest
from ssl_kit.training.curves import read_curves
from ssl_kit.training.guard import Guard
from ssl_kit.training.loop import Loop, trainer_of
from ssl_kit.training.optim import Optim
from ssl_kit.verbs.record import settle
from ssl_kit.views.recipe import ViewRecipe

_HELD_OUT = 0.1  # of the labelled training images: the epoch is chosen on them
_LOOKS = 30  # at the held-out images, at most
_STREAM = 100_011  # of core/random.py
_EPOCHS = 30  # by default
_FEWEST_STEPS = 500  # with few labels an epoch is a handful of steps: there are more epochs then
_BATCH = 32, 256  # least and most of it where the images are counted: the fewest steps come first
_LAYER_DECAY = 0.75  # of transformers (Bao et al. 2021, arXiv:2106.08254)
_VIEWS = 2  # of an image, that a run of an earlier version is taken to have seen
_BEGUN = "settings.json"  # beside the checkpoints
_TRAINING = "training"  # there and in the results: what tells one training from another
_FREE = ("resume", "threads", "checkpoint_minutes", "scratch")  # settings that do not decide what is learnt


@dataclass(frozen=True)
class Settings:
    """How to train on labels, and where.

    Args:
        encoder: run folder, encoder folder, or photos32, which comes with the package.
        labelled: folder with train/ and test/ or train.csv and test.csv, class folders, a manifest with `label`, or a
            built-in set.
        out: folder for results; the run's own by default. The classifier goes to OUT/finetuned, a timm folder.
        fraction: of the labelled training images of each class to use, such as 0.01.
        epochs: passes over the images; by default 30, or as many as make 500 steps.
        batch_size: images per step, at most.
        lr: peak learning rate of AdamW for 256 images a step.
        weight_decay: of matrices and filters.
        layer_decay: factor on the rate from one layer to the one below it; by default 0.75 for transformers and 1 for
            networks that convolve; from scratch all layers learn alike.
        warmup_epochs: of linear warm-up.
        mixup: alpha of MixUp, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        smoothing: of the labels.
        lora: rank of low-rank adapters of a ViT's attention (extra `lora`), 0 for none. Only they and the classifier
            are trained, and they are merged into the saved weights; from scratch everything is trained all the same.
        patience: stop after so many looks at the held-out images without a better score; there are at most 30 looks.
        views: what may happen to a training image.
        scratch: train the same network from random weights too.
        limit: use only so many images, train and test together, for a first try.
        seed: of everything random.
        precision: auto, float32, bfloat16 or float16.
        threads: for decoding and views.
        checkpoint_minutes: minutes between checkpoints.
        resume: go on with a training that was stopped, with the same settings; without it, training starts anew.

    Examples:
        ssl-kit finetune runs/photos labelled
        ssl-kit finetune runs/photos labelled --fraction 0.1 --out runs/tenth
    """

    encoder: str
    labelled: str
    _: KW_ONLY
    # What to read
    fraction: float = 1.0
    limit: int | None = None
    # How to train
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    lora: int = 0
    views: ViewRecipe = ViewRecipe(preset="mae", scale=(0.35, 1.0))  # noqa: RUF009 (frozen)
    scratch: bool = True
    batch_size: int = 256
    seed: int = 0
    # How long
    epochs: int | None = None
    warmup_epochs: float = 2.0
    patience: int | None = None
    # Where it goes
    out: str | None = None
    resume: bool = False
    checkpoint_minutes: float = 10.0
    # The machine
    precision: Precision = "auto"
    threads: int | None = None


@verb(Settings)
def finetune(settings: Settings) -> Entries:
    """Train an encoder end to end on labels; scores it beside the same network from scratch.

    The epoch is chosen on a tenth of the training images, which are not trained on; test is read once.

    Returns:
        `{"encoder", "out", "finetuned", "results": [a record per network], "seconds"}`.
    """
    started = time.perf_counter()
    choose_precision(settings.precision, choose_device().value)  # refused before anything is removed
    path, seed = find_encoder(settings.encoder), settings.seed
    folder, loaded = results_folder(path, settings.out), Encoder.load(path)
    check_place(folder, places(settings.labelled))
    if settings.lora:
        check_lora(loaded)
    train, test = open_labelled(settings.labelled, limit=settings.limit, reading=loaded.reading)
    train = _share(train, settings.fraction, seed)
    fitted, held = holdout(train.labels(), _HELD_OUT, seed, train.groups())
    parts = train.subset(fitted), train.subset(held)
    settings = _with_layer_decay(_long_enough(settings, len(fitted)), loaded)
    say(f"fine-tuning on {len(fitted):,} images, the epoch chosen on {len(held):,} others, tested on {len(test):,}")
    keep_memory()
    results = []
    made = {"encoder_sha256": loaded.sha256, "train": train.name, "test": test.name}
    kept = f"the states saved in {folder / 'finetuning'} are kept; go on with --resume"
    with lock(folder), record_in(folder) as record, if_interrupted(lambda: kept), Signals() as signals:
        how = {key: value for key, value in asdict(settings).items() if key not in ("encoder", "labelled", "out")}
        training = _begin(folder / "finetuning", {**how, **made, "images": len(train)}, settings.resume)
        for name in ("encoder", "random_init") if settings.scratch else ("encoder",):
            network = Encoder.load(path)
            network = network if name == "encoder" else network.fresh(seed)
            began = time.perf_counter()
            place = folder / "finetuning" / name
            scores = _train(network, parts, len(train.classes), place, name, settings, signals)
            found, labels = probabilities(network, test, "test")
            predicted = found.argmax(axis=1)
            metrics = classification_metrics(labels, predicted, len(train.classes), seed=seed)
            metrics |= probability_metrics(labels, found, seed=seed)
            used = {key: value for key, value in how.items() if key not in ("views", "resume", "threads")}
            sizes = {"num_train": len(fitted), "num_held_out": len(held), "num_test": len(test)}
            used |= {"held_out_top1": scores, **sizes}
            seconds = time.perf_counter() - began
            made_by = {**made, "versions": versions(), _TRAINING: training}
            results.append(Result("finetune", name, metrics, used, made_by, seconds, predicted, found.max(axis=1)))
            if name == "encoder":
                network.save(folder / "finetuned", {"encoder": str(path), "classes": list(train.classes), **made})
        results = _compared(results, labels, seed)
        _record(folder / "results.jsonl", results, training)
        settle(record)
        write_report([folder], folder / "report.html")
    _print(results)
    next_command(f"ssl-kit report {shlex.quote(str(folder))}", own=False)
    return {
        "encoder": str(path),
        "out": str(folder),
        "finetuned": str(folder / "finetuned"),
        "results": [one.to_json() for one in results],
        "seconds": round(time.perf_counter() - started, 3),
    }


def from_scratch(encoder: Path, train: Source, folder: Path, seed: int) -> Encoder:
    """The encoder's network with random weights, trained on the labels instead; its features, without the classifier.

    It sees as many images as the encoder's pretraining did, each view of one counted: about the same time. It is kept
    in FOLDER/scratch, and made again only for another encoder, other images or another seed.

    Args:
        encoder: folder, of a run.
        train: labelled images; the epoch is chosen on a tenth of them, as in `finetune`.
        folder: for results.
        seed: of the weights and everything else random.

    Raises:
        UserError: the encoder is of no run, so that nothing says for how long it was trained.
    """
    run, rows = encoder.parent / RUN, read_curves(encoder.parent / "metrics.csv")
    if not (run.is_file() and rows):
        raise UserError(f"--baselines scratch: {encoder} is of no run, and nothing says for how long it was trained")
    loaded = Encoder.load(encoder)
    images = int(rows[-1]["images"]) * int(read_object(run).get("data", {}).get("num_views", _VIEWS))
    of = {"pretrained": loaded.sha256, "train": fingerprint(train), "images": images, "seed": seed}
    made = folder / "scratch"
    if (made / RECORD).is_file() and read_object(made / RECORD).get("provenance") == of:
        return Encoder.load(made)
    fitted, held = holdout(train.labels(), _HELD_OUT, seed, train.groups())
    batch_size = int(np.clip(images // _FEWEST_STEPS, *_BATCH))
    epochs = max(1, round(images / len(fitted)))
    settings = Settings(str(encoder), train.name, epochs=epochs, batch_size=batch_size, seed=seed)
    say(f"scratch: the same network is trained on the labels, {epochs:,} epochs of {len(fitted):,} images")
    network, place = loaded.fresh(seed), folder / "finetuning" / "scratch"
    with lock(folder), record_in(folder), Signals() as signals:
        parts = train.subset(fitted), train.subset(held)
        _train(network, parts, len(train.classes), place, "scratch", settings, signals)
        network.set_code(0)
        network.save(made, of)
    return network


def _begin(folder: Path, settings: Entries, resume: bool) -> str:
    """Keeps beside the checkpoints what they were made with: a resumed training must agree, another one starts anew.

    Returns:
        What tells this training from others; a resumed one has that of its beginning.

    Raises:
        UserError: what is to be resumed was begun otherwise.
    """
    now = json.loads(json.dumps({key: value for key, value in settings.items() if key not in _FREE}))
    if resume and (folder / _BEGUN).exists():
        begun = read_object(folder / _BEGUN)
        differs = [f"{key} was {begun.get(key)} and is {now[key]} now" for key in now if begun.get(key) != now[key]]
        if differs:
            raise UserError(f"--resume: {'; '.join(differs)}: give the same again, or start anew without --resume")
        return str(begun.get(_TRAINING, ""))
    remove_training(folder)  # the newest state there would be another training's
    training = secrets.token_hex(8)
    write_json(folder / _BEGUN, {**now, _TRAINING: training})
    return training


def _record(path: Path, results: list[Result], training: str) -> None:
    """Appends the results that are not there: this training may have been killed after it wrote them."""
    told = set()
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off, within a character perhaps
            record = json.loads(line)
            if record["made_by"][_TRAINING] == training:
                told.add(record["features"])
    for one in results:
        if one.features not in told:
            append_line(path, one.to_json())


def _long_enough(settings: Settings, images: int) -> Settings:
    """The settings with epochs, where they are left open, for the fewest steps that teach anything; says so."""
    if settings.epochs is not None:
        return settings
    steps = math.ceil(images / settings.batch_size)  # an epoch
    epochs = max(_EPOCHS, math.ceil(_FEWEST_STEPS / steps))
    if epochs > _EPOCHS:
        say(
            f"epochs: {epochs:,}, for {_EPOCHS * steps:,} steps of {_EPOCHS} epochs are fewer than the {_FEWEST_STEPS} "
            "that a fine-tuning takes"
        )
    return replace(settings, epochs=epochs, warmup_epochs=settings.warmup_epochs * epochs / _EPOCHS)


def _with_layer_decay(settings: Settings, encoder: Encoder) -> Settings:
    """The settings with what the encoder's kind takes: with lower layers held back, a CNN learns less."""
    if settings.layer_decay is not None:
        return settings
    return replace(settings, layer_decay=1.0 if encoder.is_convolutional else _LAYER_DECAY)


def _share(train: Source, fraction: float, seed: int) -> Source:
    """A seeded `fraction` of each class, at least two images of each that has them."""
    if fraction == 1:
        return train
    order, kept = permutation(seed, 0, len(train), _STREAM), []
    labels = train.labels()
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        kept.append(rows[: max(2, round(fraction * len(rows)))])
    return train.subset(np.sort(np.concatenate(kept)))


def _train(
    network: Encoder,
    parts: tuple[Source, Source],
    num_classes: int,
    folder: Path,
    name: str,
    settings: Settings,
    signals: Signals,
) -> list[float]:
    """Trains the network in place, to its best epoch; the scores of the held-out images at every look."""
    training, held_out = parts
    assert settings.epochs is not None, "_long_enough has chosen it"
    pl.seed_everything(settings.seed, verbose=False)
    device = choose_device()
    batch_size = min(settings.batch_size, len(training))
    steps_per_epoch = -(-len(training) // batch_size)
    optim = Optim(
        name="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.999),
        warmup_epochs=settings.warmup_epochs,
        layer_decay=settings.layer_decay if name == "encoder" else None,
        clip=1.0,
    )
    mixing = {"mixup": settings.mixup, "cutmix": settings.cutmix, "smoothing": settings.smoothing}
    lora = settings.lora if name == "encoder" else 0  # adapters of random weights would be no network from scratch
    learner = FineTune(network, num_classes, optim, **mixing, lora=lora).train()
    channels_last = choose_channels_last(network.model, device.value).value
    if channels_last:
        learner.to(memory_format=torch.channels_last)
    view = settings.views.build(network.image_size, network.channels, 1)
    threads = settings.threads or max(1, available_cores() // (2 if device.value == "cpu" else 1))
    data = ImageData(
        training, {0: view}, batch_size=batch_size, seed=settings.seed, threads=threads, channels_last=channels_last
    )
    best = BestEpoch(held_out, max(1, settings.epochs // _LOOKS), settings.patience)
    guard = Guard(optim.clip, folder)
    checkpoints = Checkpoints(folder, settings.checkpoint_minutes, signals)
    precision = lightning_precision(choose_precision(settings.precision, device.value).value)
    trainer = trainer_of(
        Loop(guard, checkpoints),
        learner,
        accelerator=device.value,
        precision=precision,
        max_steps=settings.epochs * steps_per_epoch,
        folder=folder,
        first=[best],
    )
    found = newest(folder) if settings.resume else None
    trainer.fit(learner, datamodule=data, ckpt_path=str(found) if found is not None else None)
    if checkpoints.stopped is not None:
        further = "go on with --resume" if name != "scratch" else "the same command trains it anew"
        result(f"stopped at step {trainer.global_step:,} of {name}; {further}")
        raise SystemExit(128 + checkpoints.stopped)
    guard.look(trainer.global_step)
    best.restore(network)
    if lora:
        merge_lora(network)
    network.eval()
    say(f"{name}: best of {len(best.scores)} looks at held-out images {max(best.scores):.3f}")
    return best.scores


def _compared(results: list[Result], labels: np.ndarray, seed: int) -> list[Result]:
    """The encoder's top-1 gets its distance to the network from scratch, with a paired 95 % interval."""
    if len(results) < 2:
        return results
    ours, other = results
    assert ours.predictions is not None and other.predictions is not None
    gap = paired_difference(labels, ours.predictions, other.predictions, seed=seed)
    metrics = {**ours.metrics, **dict(zip(_GAP, gap, strict=True))}
    return [replace(ours, metrics=metrics, settings={**ours.settings, "best_baseline": "random_init"}), other]


def _print(results: list[Result]) -> None:
    rows = []
    for one in results:
        name = {"encoder": "pretrained", "random_init": "from scratch"}[one.features]
        metrics = one.metrics
        cells = [
            f"{metrics[key]:.3f} [{metrics[key + '_low']:.3f}, {metrics[key + '_high']:.3f}]" if key in metrics else ""
            for key in _SHOWN  # no AUROC where all test images are of one class
        ]
        gap = [f"{metrics[key]:+.3f}" for key in _GAP if key in metrics]
        rows.append((name, *cells, f"{gap[0]} [{gap[1]}, {gap[2]}]" if gap else ""))
    columns = ("fine-tuned on labels", *(key.replace("_", " ") for key in _SHOWN), "above from scratch")
    table("fine-tuning, on test, 95 % intervals", columns, rows)


_SHOWN = ("top1", "balanced_accuracy", "macro_f1", "auroc")
_GAP = ("above_best_baseline", "above_best_baseline_low", "above_best_baseline_high")
