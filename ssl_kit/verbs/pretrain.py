"""`ssl-kit pretrain`: unlabelled images in, a run folder out. Read `pretrain` from top to bottom for the whole way."""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl

from ssl_kit.core.console import detail, if_interrupted, result, say, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import Precision, Switch, keep_memory, lightning_precision
from ssl_kit.core.named import agent, default_run
from ssl_kit.core.owned import check_place
from ssl_kit.core.process import Signals
from ssl_kit.core.reading import Function, reading_of
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb
from ssl_kit.data.fingerprint import fingerprint
from ssl_kit.data.labels import spread
from ssl_kit.data.listing import write_skipped
from ssl_kit.data.module import ImageData
from ssl_kit.data.opening import name_of, open_source, places
from ssl_kit.data.sources import Source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.pretrained import freeze, initialise
from ssl_kit.methods.method import Method
from ssl_kit.report.page import write_report
from ssl_kit.training.checkpoint import Checkpoints, newest
from ssl_kit.training.chunked import Chunkable, no_chunks
from ssl_kit.training.curves import Bar, Curves
from ssl_kit.training.distributed import all_gather_object, broadcast, rank, wait, world_size
from ssl_kit.training.duration import Duration
from ssl_kit.training.guard import Diagnose, Guard
from ssl_kit.training.joining import joined
from ssl_kit.training.loop import Loop, trainer_of
from ssl_kit.training.optim import EMA
from ssl_kit.verbs.budget import fit_to_time
from ssl_kit.verbs.defaults import (
    Fitted,
    build_method,
    channel_statistics,
    check_resumable,
    fit_to_machine,
    resolved_recipe,
    save_recipe,
    schedule_views,
    view_size,
)
from ssl_kit.verbs.early import check_trainer
from ssl_kit.verbs.monitor import Measure, Monitor, Show, hold_out, judge_of, kept
from ssl_kit.verbs.pictures import draw_first
from ssl_kit.verbs.record import RunRecord, loggers, opened, versions
from ssl_kit.verbs.rehearsal import rehearse
from ssl_kit.verbs.seen import first_image, say_next, see
from ssl_kit.verbs.several import (
    Processes,
    all_fit,
    check_images,
    check_processes,
    clean_features,
    held,
    images_per_step,
)
from ssl_kit.views.recipe import ViewRecipe, plain

_FIRST = 8  # images in the first picture


@dataclass(frozen=True)
class Settings:
    """How to train, and where.

    Args:
        data: folders (searched recursively), a .csv or .parquet manifest with a `path` column, shards, a built-in set.
        method: the method and its settings, {class_path, init_args}; SimCLR by default.
        views: what may happen to an image; see `ssl-kit views` for a picture of it.
        run: folder to write, by default runs/DATA.
        resume: continue the run in that folder at its very step.
        overwrite: replace an existing run in that folder, once the new one could be resumed; only its own files go.
        init: start from an encoder: timm:NAME (weights on disk) or a run or encoder folder.
        freeze: with --init: the stem and so many of the encoder's lowest blocks stay as they came.
        limit: use only so many images, for a first try.
        image_size: side of a view in pixels, or height and width; chosen from the images by default.
        grow: sides of the training views from an epoch on, as {0: 16, 10: 24}; the encoder and its evaluation keep
            --image-size. Small views cost a fraction of the time and teach nearly as much; convolutional encoders only.
        channels: 3 for colour, 1 for grey, as many as a TIFF or array has bands, or names of bands: red,nir.
        range: values of images of more than 8 bits that become 0 and 1: LOW,HIGH, a pair for each channel with spaces
            between, full for the ends of their depth; auto measures them where they fill under a quarter of it.
        reader: module:function of your own that reads the files, behind --allow MODULE: (bytes, id) -> array.
        epochs: passes over the images; by default 100, more where that is under 2,000 steps.
        minutes: instead, from the command on; image size, views and network that are left open are chosen to fit.
        batch_size: images per process and step; by default 256, fewer where that leaves under 8 steps an epoch.
        contrastive_batch: images per process that one step compares, in chunks of --batch-size: the gradient of the
            large batch in the memory of the small one, for a third more time.
        seed: of everything random.
        precision: auto, float32, bfloat16 or float16.
        evaluate_every: epochs between looks at the features (rank; kNN when there are labels), at least; by default
            they come early, at the end, and between as often as 2 % of the training pays for.
        checkpoint_minutes: minutes between checkpoints.
        when_full: the disk being full when a checkpoint is due: say so and go on, or stop.
        max_bad: fraction of files that may be undecodable before the run stops.
        threads: for decoding and views of a process; all its cores by default, half of them while the CPU trains.
        views_on: where views are made; auto is the accelerator if there is one, else the host.
        ema: average the encoder's weights with this decay a step, such as 0.99; the average is measured and exported.
        ema_cosine: let the decay grow to 1 over the run.
        compile: the encoder's blocks by torch.compile; auto is on a GPU when the run is long enough.
        activation_checkpointing: of a transformer's blocks keep the inputs only, and compute the rest again backwards:
            a third more time, a fraction of the memory.
        tf32: for float32 products on GPUs that have it.
        diagnose: write gradient norms per layer and fractions of dead units to diagnose.csv.
        wandb: log to Weights & Biases too, offline when no key is set.
        tensorboard: write TensorBoard events to the run folder too (extra `tensorboard`).
        trainer: any arguments of Lightning's Trainer; `--trainer.devices 2` trains in two processes.

    Examples:
        ssl-kit pretrain photos
        ssl-kit pretrain photos -c mae --minutes 30
        ssl-kit pretrain photos --run runs/photos --resume
    """

    data: list[str] | str
    _: KW_ONLY
    # What to read
    limit: int | None = None
    channels: int | str = 3
    range: str = "auto"
    reader: Function | None = None
    max_bad: float = 0.05
    # How to train
    method: Entries | None = None
    views: ViewRecipe = ViewRecipe()  # noqa: RUF009 (frozen)
    init: str | None = None
    freeze: int | None = None
    image_size: int | tuple[int, int] | None = None
    grow: dict[int, int] | None = None
    batch_size: int | None = None
    contrastive_batch: int | None = None
    ema: float | None = None
    ema_cosine: bool = False
    seed: int = 0
    # How long
    epochs: float | None = None
    minutes: float | None = None
    evaluate_every: float | None = None
    # Where it goes
    run: str | None = None
    resume: bool = False
    overwrite: bool = False
    checkpoint_minutes: float = 10.0
    when_full: Literal["continue", "stop"] = "continue"
    diagnose: bool = False
    wandb: bool = False
    tensorboard: bool = False
    # The machine
    precision: Precision = "auto"
    threads: int | None = None
    views_on: Literal["auto", "host", "device"] = "auto"
    compile: Switch = "auto"
    tf32: Switch = "auto"
    activation_checkpointing: bool = False
    trainer: Entries | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a view, once it is chosen."""
        assert isinstance(self.image_size, tuple), "chosen from the images"
        return self.image_size

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run or default_run(name_of(self.data)))


@verb(Settings)
def pretrain(settings: Settings) -> Entries:
    """Train an encoder on images without labels; writes a run folder.

    Returns:
        What `run.json` holds: run, encoder, verdict, timings, versions.
    """
    began, settings, folder = time.perf_counter(), _checked(settings), settings.folder
    check_place(folder, places(settings.data), removing=settings.overwrite)
    with (
        joined(),
        held(folder),
        if_interrupted(lambda: kept(folder)),
        Signals() as signals,
        opened(folder, settings.resume, settings.overwrite) as record,
    ):
        reused = keep_memory()
        detail(f"freed memory: {'kept (page faults cost 10 % of a step)' if reused else 'given back (not glibc)'}")
        pl.seed_everything(settings.seed, verbose=False)
        reading, measured = reading_of(settings.channels, settings.range)
        source = open_source(
            settings.data,
            limit=settings.limit,
            reading=reading.by(settings.reader),
            measure=measured,
            in_memory=all_fit,
            max_bad=settings.max_bad,
            threads=settings.threads,
        )
        check_images(source)
        training, gallery, queries = hold_out(source)
        settings, pace = fit_to_time(settings, training, began)
        settings, learner = _method(settings, source)
        view_schedule = schedule_views(settings.views, settings.size, settings.grow, learner)
        if settings.resume and rank() == 0:
            check_resumable(folder, resolved_recipe(settings, learner), source, world_size())
        settings, together = images_per_step(settings, folder)
        loader, duration, fitted = fit_to_machine(learner, training, view_schedule, settings, together, pace)
        settings = replace(settings, **fitted.decided)

        agents = sorted({one for one in all_gather_object(agent()) if one})
        if rank() == 0:
            if not settings.resume:
                smallest = len(training) // loader.steps_per_epoch  # step
                rehearse(learner, view_schedule, settings.seed, min(2, smallest))  # the last that may be refused
                record.former.set_aside()  # there is one where `overwrite` says so, or it was killed as it began
            _begin(record, settings, source, learner, duration.total, agents)
            first, drawn = spread(len(source), _FIRST), folder / "pictures" / "views.png"
            draw_first(drawn, source, first, view_schedule[0], settings.seed)
            write_report([folder], folder / "report.html")
        measure = Measure(training, gallery, queries, plain(settings.size), view_schedule[0])
        show = Show(folder / "pictures", training, view_schedule[0], settings.seed)
        encoder = _train(learner, loader, duration, fitted, measure, show, record, settings, signals)

        signals.patient = True  # all is learnt: what is left takes seconds
        if rank() == 0:
            write_skipped(folder / "skipped.csv", source.bad.rows)
            encoder.save(folder / "encoder", record.provenance())
            record.update(seen=see(settings.folder, encoder, training, queries, settings.seed, record.entries))
            record.update(status="finished", encoder_sha256=encoder.sha256)
            write_report([folder], folder / "report.html")
        record.entries = broadcast(lambda: record.entries)
    result(f"verdict: {record.entries['verdict']['state']} - {record.entries['verdict']['reason']}")
    say_next(record.entries)
    return record.entries


def _method(settings: Settings, source: Source) -> tuple[Settings, Method]:
    """The method with its encoder, made for these images; the settings with what follows from both."""
    size = view_size(settings.image_size, source)
    mean, std = channel_statistics(source, size)
    learner = build_method(settings.method, image_size=size, channels=source.channels, mean=mean, std=std)
    learner.encoder.reading = source.reading
    if settings.contrastive_batch is not None and not isinstance(learner, Chunkable):
        raise UserError(no_chunks(type(learner).__name__))
    if learner.uses_labels:
        say(f"labels are used: {type(learner).__name__} learns from them, where images have one")
    if learner.remark:
        warn(learner.remark)
    if settings.init is not None:
        found = initialise(learner.encoder, settings.init)
        learner.after_init()
        say(f"initialised from {settings.init}: {found:.1%} of the weights matched")
    if settings.freeze is not None:
        share = freeze(learner.encoder, settings.freeze)
        say(f"frozen: the stem and {settings.freeze} blocks, {share:.1%} of the weights")
    views = settings.views.fitted(learner.preset, size, source.channels)
    return replace(settings, image_size=size, views=views), learner


def _train(
    learner: Method,
    loader: ImageData,
    duration: Duration,
    fitted: Fitted,
    measure: Measure,
    show: Show,
    record: RunRecord,
    settings: Settings,
    signals: Signals,
) -> Encoder:
    """Runs Lightning over the steps of the run; returns the encoder to be kept, the trained or the averaged one.

    Raises:
        SystemExit: stopped by a signal, with the conventional code, after the state was saved.
    """
    folder = record.folder
    ema = None if settings.ema is None else EMA(settings.ema, cosine=settings.ema_cosine)
    if ema is not None:
        measure.encoder = lambda method: ema.encoder(method.encoder)
    judge = judge_of(learner, measure, record)
    path, every = folder / "metrics.csv", settings.evaluate_every
    curves = Curves(path, measure=measure, judge=judge, measure_every=every, measured=measure.embedded)
    checkpoints = Checkpoints(
        folder / "checkpoints", settings.checkpoint_minutes, signals, settings.when_full, saved=record.former.remove
    )
    loop = Loop(
        Guard(learner.optim.clip, folder / "checkpoints"),
        checkpoints,
        ema=ema,
        duration=duration,
        curves=curves,
        bar=Bar(curves),
        monitor=Monitor(record, curves, checkpoints, show, loader.source),
        diagnose=Diagnose(folder / "diagnose.csv") if settings.diagnose else None,
        compiled=fitted.compiled,
        embedded=clean_features(loader.source, fitted.device),
        seed=settings.seed,
    )
    duration.tell = lambda changes: record.update(steps_fitted=changes)
    trainer = _trainer(learner, duration, fitted, loop, settings)
    record.update(
        status="running",
        device=str(trainer.strategy.root_device),
        world_size=trainer.world_size,
        images_per_step=loader.images_per_step,
        crops={"images": measure.cropped, "of": measure.crops_of},
        chance_loss=learner.chance_loss(loader.images_per_step),
    )
    begun = broadcast(lambda: str(newest(folder / "checkpoints") or "")) if settings.resume else ""
    if not begun:
        measure.keep(learner.encoder)
    with record.written_by_others("tensorboard", "wandb"):
        trainer.fit(learner, datamodule=loader, ckpt_path=begun or None)
    if checkpoints.stopped is not None:
        result(f"stopped; {kept(folder)}")
        wait()  # the first one has said all
        raise SystemExit(128 + checkpoints.stopped)
    curves.recall()
    record.progress(curves)
    record.peak()
    duration.say_again()
    return measure.encoder(learner)


def _trainer(learner: Method, duration: Duration, fitted: Fitted, loop: Loop, settings: Settings) -> pl.Trainer:
    """Lightning's, with what the user asks of it beside."""
    options = dict(settings.trainer or {})
    several = Processes.arguments(options) if world_size() > 1 else {}
    extra = loggers(settings.wandb, settings.tensorboard, settings.folder) if rank() == 0 else []
    return trainer_of(
        loop,
        learner,
        accelerator=fitted.device,
        precision=lightning_precision(fitted.precision),
        max_steps=options.pop("max_steps", duration.max_steps),
        folder=settings.folder,
        accumulate_grad_batches=learner.optim.accumulate,
        **{"logger": extra, **options, **several},
    )


def _checked(settings: Settings) -> Settings:
    """The settings, with the trainer's options in order.

    Raises:
        UserError: a number is out of range, or an option of the trainer is not to be given.
    """
    if any(epoch < 0 or side < 1 for epoch, side in (settings.grow or {}).items()):
        raise UserError(f"--grow {settings.grow}: wanted epochs from 0 and sides of at least 1 pixel")
    options = dict(settings.trainer or {})
    check_trainer(options)
    check_processes(options)
    return replace(settings, trainer=options or None)


def _begin(
    record: RunRecord, settings: Settings, source: Source, learner: Method, steps: int, agents: list[str]
) -> None:
    facts = {
        "root": name_of(settings.data),
        "images": len(source),
        "num_views": learner.num_views,
        "skipped": len(source.bad.rows),
        "classes": len(source.classes),
        "image": first_image(source),
        "reader": source.reading.reader,
        **fingerprint(source, settings.seed),
    }
    record.begin(
        method=type(learner).__name__,
        judged_by=list(learner.judged_by),
        shows=learner.shows,
        uses_labels=learner.uses_labels,
        encoder=learner.encoder.name,
        init=settings.init,
        dim=learner.encoder.dim,
        data=facts,
        seed=settings.seed,
        versions=versions(),
        agents=agents,
        verdict={"state": "unknown", "reason": "nothing was measured yet"},
    )
    save_recipe(settings.folder / "recipe.yaml", resolved_recipe(settings, learner))
    length = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.epochs:g} epochs"
    side, network = " x ".join(map(str, dict.fromkeys(settings.size))), learner.encoder
    side = " then ".join(map(str, settings.grow.values())) if settings.grow else side
    say(
        f"{type(learner).__name__} trains {network.name} ({network.dim:,} features): views of {side} px, "
        f"{settings.batch_size:,} images a step, {steps:,} steps in {length}"
    )
