"""`ssl-kit pretrain`: unlabelled images in, a run folder out. Read `pretrain` from top to bottom for the whole way."""

from __future__ import annotations

import logging
import netrc
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from ssl_kit.core.console import next_command, say
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import lock
from ssl_kit.core.machine import (
    Precision,
    available_cores,
    choose_device,
    choose_precision,
    keep_memory,
    lightning_precision,
)
from ssl_kit.data.batches import ViewLoader
from ssl_kit.data.decode import BadImageError
from ssl_kit.data.module import ImageData
from ssl_kit.data.skipped import write_skipped
from ssl_kit.data.sources import Source, open_source
from ssl_kit.encoders.encoder import initialise
from ssl_kit.methods.method import Method
from ssl_kit.report.pictures import draw_views
from ssl_kit.report.report import write_report
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, newest
from ssl_kit.training.horizon import Horizon
from ssl_kit.training.monitor import Bar, Curves
from ssl_kit.verbs.building import build_method, check_resumable, resolved_recipe, save_recipe
from ssl_kit.verbs.following import Measure, Refresh, hold_out
from ssl_kit.verbs.record import RunRecord, versions
from ssl_kit.views.recipe import View, ViewRecipe, plain

_MEASURED = 2_048  # images whose features the monitor looks at
_LARGEST_DEFAULT = 224  # pixels: the default view of larger images
_SHOWN = 8  # images in the picture of the views


def pretrain(
    data: str,
    *,
    method: dict[str, Any] | None = None,
    views: ViewRecipe = ViewRecipe(),  # noqa: B008 (frozen)
    run: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    init: str | None = None,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    grow: dict[int, int] | None = None,
    channels: int = 3,
    epochs: float | None = None,
    minutes: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    precision: Precision = "auto",
    evaluate_every: float = 1.0,
    checkpoint_minutes: float = 10.0,
    max_bad: float = 0.05,
    threads: int | None = None,
    views_on: Literal["auto", "host", "device"] = "auto",
    wandb: bool = False,
    tensorboard: bool = False,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train an encoder on images without labels; writes a run folder.

    Args:
        data: folder (searched recursively), .csv or .parquet manifest with a `path` column, or a built-in set.
        method: the method and its settings, {class_path, init_args}; SimCLR by default.
        views: what may happen to an image; see `ssl-kit views` for a picture of it.
        run: folder to write, by default runs/DATA.
        resume: continue the run in that folder at its very step.
        overwrite: delete an existing run in that folder first.
        init: start from an encoder: timm:NAME (weights on disk) or a run or encoder folder.
        limit: use only so many images, for a first try.
        image_size: side of a view in pixels, or height and width; chosen from the images by default.
        grow: sides of the training views from an epoch on, as {0: 16, 10: 24}; the encoder and its evaluation keep
            image_size. Small views cost a fraction of the time and teach nearly as much; convolutional encoders only.
        channels: 3 for colour, 1 for grey.
        epochs: passes over the images; 100 by default.
        minutes: train for so long instead; the schedule is fitted to the measured speed.
        batch_size: images per process and step.
        seed: of everything random.
        precision: auto, float32, bfloat16 or float16.
        evaluate_every: epochs between looks at the features (rank; kNN when there are labels), at least.
        checkpoint_minutes: minutes between checkpoints.
        max_bad: fraction of files that may be undecodable before the run stops.
        threads: for decoding and views; all cores by default, half of them while the CPU trains.
        views_on: where views are made; auto is the accelerator if there is one, else the host.
        wandb: log to Weights & Biases too, offline when no key is set.
        tensorboard: write TensorBoard events to the run folder too (extra `tensorboard`).
        trainer: any arguments of Lightning's Trainer.

    Returns:
        What `run.json` holds: run, encoder, verdict, timings, versions.
    """
    settings = {key: value for key, value in locals().items() if key not in ("run", "resume", "overwrite")}
    folder = Path(run or f"runs/{Path(data).name or 'run'}")
    _check_options(settings)
    with lock(folder):
        _check_folder(folder, resume, overwrite)
        keep_memory()
        pl.seed_everything(seed, verbose=False)
        source = open_source(data, limit=limit, channels=channels, max_bad=max_bad, threads=threads)
        size = _view_size(image_size, source)
        settings["image_size"] = list(size)
        mean, std = channel_statistics(source, size)
        learner = build_method(method, image_size=size, channels=channels, mean=mean, std=std)
        if init is not None:
            matched = initialise(learner.encoder, init)
            say(f"initialised from {init}: {matched.fraction:.1%} of the weights matched")
        kinds = _view_schedule(views, size, grow, learner)
        training, gallery, queries = hold_out(source)
        loader, horizon, fitted = _fit_to_machine(learner, training, kinds, settings)

        recipe = resolved_recipe(settings, learner)
        if resume:
            check_resumable(folder, recipe, len(source))
        if overwrite:
            _clear(folder)
        save_recipe(folder / "recipe.yaml", recipe)
        record = _record(folder, data, source, learner, seed)
        _draw(folder / "pictures" / "views.png", source, kinds[0], seed)
        write_report([folder], folder / "report.html")
        say(f"report: {folder / 'report.html'}")
        measure = Measure(training, gallery, queries, plain(size))
        _train(learner, loader, horizon, fitted, measure, record, settings, resume)

        write_skipped(folder / "skipped.csv", source.skipped)
        learner.encoder.save(folder / "encoder", record.provenance())
        record.update(status="finished", encoder_sha256=learner.encoder.sha256)
        write_report([folder], folder / "report.html")
    say(f"verdict: {record.entries['verdict']['state']} - {record.entries['verdict']['reason']}")
    next_command(f"ssl-kit evaluate {shlex.quote(str(folder))} {shlex.quote(data) if source.classes else 'LABELLED'}")
    return record.entries


def _train(
    learner: Method,
    loader: ImageData,
    horizon: Horizon,
    fitted: _Fitted,
    measure: Measure,
    record: RunRecord,
    settings: dict[str, Any],
    resume: bool,
) -> None:
    """Runs Lightning over the steps of the run.

    Raises:
        SystemExit: stopped by a signal, with the conventional code, after the state was saved.
    """
    folder, options = record.folder, dict(settings["trainer"] or {})
    checkpoints = Checkpoints(folder / "checkpoints", settings["checkpoint_minutes"])
    stopped = lambda: checkpoints.signal is not None
    curves = Curves(
        folder / "metrics.csv", measure=measure, measure_every=settings["evaluate_every"], interrupted=stopped
    )
    callbacks = [horizon, curves, Bar(curves, lambda: horizon.total), Refresh(record, curves, checkpoints), checkpoints]
    arguments = {
        "accelerator": fitted.device,
        "devices": 1,
        "precision": lightning_precision(fitted.precision),
        "max_epochs": -1,  # one endless stream of steps: see ImageData
        "max_steps": horizon.max_steps,
        "logger": _loggers(settings["wandb"], settings["tensorboard"], folder),
        "plugins": [SafeCheckpointIO()],
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": [*callbacks, *(options.pop("callbacks", None) or [])],
        "default_root_dir": str(folder),
        **options,
    }
    _quiet_lightning()
    trainer = pl.Trainer(**arguments)
    chance = learner.chance_loss(settings["batch_size"] * trainer.world_size)
    device_name = str(trainer.strategy.root_device)
    record.update(status="running", device=device_name, world_size=trainer.world_size, chance_loss=chance)
    path = newest(folder / "checkpoints") if resume else None
    try:
        trainer.fit(learner, datamodule=loader, ckpt_path=str(path) if path is not None else None)
    except UserError:
        record.update(status="failed")
        raise
    if stopped():
        record.update(status="interrupted")
        say(f"stopped at step {trainer.global_step:,}; go on with: ssl-kit pretrain --run {folder} --resume")
        assert checkpoints.signal is not None
        raise SystemExit(128 + checkpoints.signal)
    curves.recall()
    record.progress(curves, learner.encoder.dim)


class _Fitted(NamedTuple):
    device: str
    precision: str


def _fit_to_machine(
    learner: Method, training: Source, kinds: dict[int, tuple[View, ...]], settings: dict[str, Any]
) -> tuple[ImageData, Horizon, _Fitted]:
    """Chooses what the options leave open, says each choice with its reason, and plans the run."""
    device = choose_device()
    precision = choose_precision(settings["precision"], device.value)
    views_on, reason = settings["views_on"], "asked for"
    if views_on == "auto":
        # the device executor needs stored images of one size, and is slower than the host's on a CPU
        suits = device.value != "cpu" and isinstance(training.images, np.ndarray)
        views_on = "device" if suits else "host"
        reason = "an accelerator and images of one size" if suits else "no accelerator, or images not in memory as one"
    elif views_on == "device" and not isinstance(training.images, np.ndarray):
        raise UserError("--views_on device needs images of one size that fit into memory; use --views_on host")
    channels_last = learner.encoder.is_convolutional
    if channels_last:
        learner.to(memory_format=torch.channels_last)
    say(f"device: {device.value} ({device.reason})")
    say(f"precision: {precision.value} ({precision.reason})")
    say(f"memory format: {'channels_last (it convolves)' if channels_last else 'contiguous (it does not convolve)'}")
    say(f"views on: {views_on} ({reason})")
    threads = settings["threads"] or max(1, available_cores() // (2 if device.value == "cpu" else 1))
    loader = ImageData(
        training,
        kinds,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        threads=threads,
        views_on=views_on,
        channels_last=channels_last,
    )
    accumulated = (settings["trainer"] or {}).get("accumulate_grad_batches") or 1
    horizon = Horizon(settings["epochs"], settings["minutes"], loader.steps_per_epoch / accumulated)
    loader.total_steps = horizon.total
    return loader, horizon, _Fitted(device.value, precision.value)


def channel_statistics(source: Source, size: tuple[int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of up to 2,048 training images at `size`, in [0, 1]."""
    rows = np.linspace(0, len(source) - 1, min(_MEASURED, len(source))).astype(np.int64)
    loader = ViewLoader(source, np.array_split(rows, max(1, len(rows) // 256)), (plain(size),))
    count, total, squares = 0, np.zeros(source.channels), np.zeros(source.channels)
    for batch in loader:
        pixels = batch["views"][0].double()
        count += pixels.numel() // source.channels
        total += pixels.sum(dim=(0, 2, 3)).numpy()
        squares += pixels.square().sum(dim=(0, 2, 3)).numpy()
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # constant images must not divide by zero
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    exists = (folder / "run.json").exists()
    if resume and overwrite:
        raise UserError("got --resume and --overwrite; give one of them")
    if exists and not (resume or overwrite):
        raise UserError(f"{folder} holds a run already; go on with --resume, or start anew with --overwrite")
    if resume and not exists:
        raise UserError(f"--resume: {folder} holds no run; check --run, or leave --resume out to start one")


def _clear(folder: Path) -> None:
    """Deletes a former run; its lock, which is held, stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _check_options(settings: dict[str, Any]) -> None:
    """Raises `UserError` for numbers out of range and trainer options that would be ignored or break a promise."""
    for name in ("batch_size", "threads", "limit", "channels", "image_size"):
        value = settings[name]
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} {value}: wanted at least 1")
    if any(epoch < 0 or side < 1 for epoch, side in (settings["grow"] or {}).items()):
        raise UserError(f"--grow {settings['grow']}: wanted epochs from 0 and sides of at least 1 pixel")
    options = settings["trainer"] or {}
    instead = {"max_epochs": "--epochs", "plugins": "no other", "enable_checkpointing": "--checkpoint_minutes"}
    for name in [name for name in options if name in instead]:
        raise UserError(f"--trainer.{name} has no meaning here: use {instead[name]}")
    if options.get("devices", 1) not in (1, "1") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes are not supported yet: leave --trainer.devices out and start one process")


def _view_size(image_size: int | tuple[int, int] | None, source: Source) -> tuple[int, int]:
    """(height, width) of a view: as asked, else the median shorter side of the images, at most 224, a multiple of 8."""
    if isinstance(image_size, int):
        return image_size, image_size
    if image_size is not None:
        return image_size
    rows = np.linspace(0, len(source) - 1, min(256, len(source))).astype(np.int64)
    sides = [min(source.size(int(row))) for row in rows if _readable(source, int(row))]
    if not sides:
        raise UserError(f"{source.name}: none of {len(rows)} sampled images can be read; see --max-bad")
    side = int(np.median(sides))
    side = min(_LARGEST_DEFAULT, max(8, round(side / 8) * 8))
    say(f"image size: {side} px (from the images; --image_size changes it)")
    return side, side


def _readable(source: Source, row: int) -> bool:
    try:
        source.size(row)
    except BadImageError as error:
        source.skip(row, str(error))
        return False
    return True


def _view_schedule(
    views: ViewRecipe, size: tuple[int, int], grow: dict[int, int] | None, learner: Method
) -> dict[int, tuple[View, ...]]:
    """First epoch -> the views of the epochs from there on."""
    build = lambda side: views.build(side, learner.encoder.channels, learner.num_views)
    if grow and learner.encoder.fixed_size:
        raise UserError(f"--grow: {learner.encoder.name} takes images of {size[0]} x {size[1]} only; leave --grow out")
    return {0: build(size)} | {int(epoch): build((side, side)) for epoch, side in (grow or {}).items()}


def _record(folder: Path, data: str, source: Source, learner: Method, seed: int) -> RunRecord:
    record = RunRecord(folder)
    facts = {"root": data, "images": len(source), "skipped": len(source.skipped), "classes": len(source.classes)}
    record.update(
        method=type(learner).__name__,
        encoder=learner.encoder.name,
        dim=learner.encoder.dim,
        data=facts,
        seed=seed,
        versions=versions(),
        verdict={"state": "unknown", "reason": "nothing was measured yet"},
    )
    return record


def _draw(path: Path, source: Source, kinds: tuple[View, ...], seed: int) -> None:
    """The first picture, before the first step: a few images and their views."""
    rows = np.linspace(0, len(source) - 1, min(_SHOWN, len(source))).astype(np.int64)
    loader = ViewLoader(source, [rows], kinds, seed=seed)
    batch = next(iter(loader))
    kept = batch["key"].index.numpy()
    originals = next(iter(ViewLoader(source, [kept], (plain(kinds[0].size),))))["views"][0].numpy()
    stored = [(image.transpose(1, 2, 0) * 255).round().astype(np.uint8) for image in originals]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_views(path, stored, [view.numpy() for view in batch["views"]])


def _quiet_lightning() -> None:
    """Its advice is about choices that are made, and said, here."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*lr_scheduler.step.*",
        ".*weights_only.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _loggers(wandb: bool, tensorboard: bool, folder: Path) -> list[Any]:
    """The opt-in loggers beside `metrics.csv`."""
    loggers: list[Any] = []
    if wandb:
        from pytorch_lightning.loggers import WandbLogger

        offline = not _has_wandb_key()
        say(f"wandb: {'offline, no key is set (`wandb sync` uploads later)' if offline else 'online'}")
        loggers.append(WandbLogger(project="ssl_kit", name=folder.name, save_dir=str(folder), offline=offline))
    if tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    return loggers


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
