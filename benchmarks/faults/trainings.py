"""Tiny trainings that are killed, stopped and resumed, and what two of them must share to be the same run.

160 generated images of 16 px, 40 steps; rows of metrics.csv every 5 steps, measurements every 10, a state saved every
twentieth of a second. What is compared: all rows but for their times, the exported encoder, and the last training
state: every tensor (weights, optimiser, averaged weights, generators, what the curves have collected), every counter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import fork_warmed, run_warmed, tail
from PIL import Image

from ssl_kit.core.files import MANIFEST, read_json
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.training import curves
from ssl_kit.training.curves import Curves
from ssl_kit.verbs import finetune as finetuning
from ssl_kit.verbs import monitor
from ssl_kit.verbs import pretrain as pretraining
from ssl_kit.views.recipe import ViewRecipe, plain

CLASSES, EACH, SIDE = 4, 40, 16
STEPS, STEPS_PER_EPOCH = 40, 10  # 152 images are trained on, 8 held out for the kNN
TIMES = ("seconds", "images_per_second", "waiting_share")  # columns and entries that no two runs share

SMALL = {"name": "resnet18_small", "args": {"channels": [16, 16, 16, 16]}}
VIT = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}}
SGD = {"name": "sgd", "lr": 0.5, "warmup_epochs": 1.0}


def _method(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"ssl_kit.methods.{name.lower()}.{name}", "init_args": arguments}


def simclr(encoder: dict[str, Any] = SMALL, **optim: Any) -> dict[str, Any]:
    return _method("SimCLR", encoder=encoder, projection=[16, 8], optim={**SGD, **optim})


# name -> (method, further options of pretrain)
SUBJECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simclr": (simclr(), {}),
    "accumulated": (simclr(accumulate=2), {"epochs": 8}),
    "cached": (simclr(), {"batch_size": 8, "contrastive_batch": 16}),
    "mae": (_method("MAE", encoder={**VIT, "args": {**VIT["args"], "drop_path_rate": 0.2}}), {}),
    "byol": (_method("BYOL", encoder=SMALL, projection=[16, 8], prediction=[16, 8], optim=SGD), {}),
    "dino": (_method("DINO", encoder=SMALL, small_crops=2, prototypes=16, hidden=[16, 8]), {}),
    "vae": (_method("VAE", encoder=SMALL, dim=8, decoder_width=8), {}),
    "ema": (simclr({**VIT, "args": {**VIT["args"], "proj_drop_rate": 0.1}}), {"ema": 0.9, "ema_cosine": True}),
}


def write_images(folder: Path) -> None:
    """Stripes whose direction is the class, with random phase and colours: CLASSES folders of EACH PNG files."""
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(EACH):
            generator = np.random.default_rng(1000 * label + number)
            y, x = np.mgrid[:SIDE, :SIDE] / SIDE
            turn = np.pi * label / CLASSES
            wave = 0.5 + 0.5 * np.sin(12 * (x * np.cos(turn) + y * np.sin(turn)) + 6 * generator.random())
            colours = generator.random((2, 3))
            pixels = 255 * (wave[..., None] * colours[0] + (1 - wave[..., None]) * colours[1])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{number:02d}.png")


SETTINGS: dict[str, Any] = {
    "image_size": SIDE,
    "batch_size": 16,
    "epochs": STEPS / STEPS_PER_EPOCH,
    "checkpoint_minutes": 0.05 / 60,
    "threads": 1,
    "evaluate_every": 1,
}


class Work:
    """The undisturbed runs, and the work of children: every run goes on where an earlier one was ended.

    Attributes:
        wanted: {name: outcome of the undisturbed run}.
        seconds: {name: that it took}.
    """

    def __init__(self, place: Path):
        self.place, self.log, self.data = place, place / "log.txt", place / "images"
        self.wanted: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        write_images(self.data)
        load_kernels(self.data)
        run_warmed(lambda: Encoder(SMALL["name"], SMALL["args"], (SIDE, SIDE)).save(place / "encoder"), self.log)

    def run(
        self, name: str, run: Path, before: Callable[[], None] = lambda: None, pages: bool = False, **options: Any
    ) -> Callable[[], None]:
        """The work of a child; `before` may change things there first. Reports, half of the time, only with `pages`."""

        def work() -> None:
            look_often(pages)
            before()
            if name == "finetune":
                finetuning._FEWEST_STEPS = STEPS  # type: ignore[misc]
                settings = {"batch_size": 16, "epochs": 4, "mixup": 0.2, "scratch": False, "resume": True}
                finetuning.finetune(
                    str(self.place / "encoder"), str(self.data), out=str(run), checkpoint_minutes=0.05 / 60, **settings
                )
                return
            method, own = SUBJECTS[name]
            resume = (run / "recipe.yaml").exists()  # without it, it was killed before it began
            settings = {**SETTINGS, **own, **options}
            pretraining.pretrain(str(self.data), method=method, run=str(run), resume=resume, **settings)

        return work

    def undisturbed(self, name: str) -> None:
        """Makes what the trials of a subject are compared with."""
        if name not in self.wanted:
            self.seconds[name] = run_warmed(self.run(name, self.place / name), self.log)
            self.wanted[name] = outcome(self.place / name)

    def finish(self, name: str, run: Path, work: Callable[[], None] | None = None) -> str | None:
        """Resumes a run to its end; what differs from the undisturbed one, or None. Removes the run."""
        process = fork_warmed(work or self.run(name, run), self.log)
        process.join()
        if process.exitcode:
            return f"resumed, it ended with {process.exitcode}: {tail(self.log, 2)}"
        wrong = difference(outcome(run), self.wanted[name])
        if wrong is None:
            shutil.rmtree(run)
        return wrong


def load_kernels(data: Path) -> None:
    """Loads the compiled view kernels into this process, so that children have them."""
    source, size = open_source(str(data)), (SIDE, SIDE)
    for views in (ViewRecipe().build(size, 3, 2), (plain(size),)):
        list(ViewLoader(source, [np.arange(4)], views, threads=1))


def look_often(pages: bool = False) -> None:
    """Rows every 5 steps and measurements every 10, so that kills fall into and between them; reports or none."""
    curves._MEASURE_STEPS = 10  # type: ignore[misc]
    Curves.__init__.__kwdefaults__["interval"] = 5
    for module in () if pages else (pretraining, monitor, finetuning):
        module.write_report = lambda runs, path: None  # type: ignore[attr-defined]


def outcome(run: Path) -> dict[str, Any]:
    """What two runs must share to be the same run."""
    last = sorted(run.rglob("step-*"))[-1]
    rest = _timeless(read_json(last / "state.json"))
    weights = read_json(last / MANIFEST)["files"]["state.safetensors"]
    found = {"last": last.name, "weights": weights, "rest": rest}
    if (run / "results.jsonl").exists():
        (line,) = (run / "results.jsonl").read_text().splitlines()
        encoder = read_json(run / "finetuned" / "encoder.json")["sha256"]
        return {**found, "scores": json.loads(line)["metrics"], "encoder": encoder}
    record = read_json(run / "run.json")
    rows = [_timeless(row) for row in curves.read_curves(run / "metrics.csv")]
    return {**found, "rows": rows, "encoder": record["encoder_sha256"], "status": record["status"]}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def difference(got: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In words; None when there is none."""
    wrong = list(_places(got, wanted))
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return f"{', '.join(wrong[:5])}{more} differ from the undisturbed run" if wrong else None


def _places(got: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """Where two nested values differ."""
    if isinstance(got, dict) and isinstance(wanted, dict) and got.keys() == wanted.keys():
        for key in wanted:
            yield from _places(got[key], wanted[key], f"{place}/{key}")
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            yield from _places(one, other, f"{place}/{number}")
    elif got != wanted:
        yield f"{place or '/'}: {str(got)[:40]} instead of {str(wanted)[:40]}"


def progress(run: Path) -> int:
    """The newest saved step, -1 when none was."""
    steps = sorted(run.rglob("step-*"))
    return int(steps[-1].name.removeprefix("step-")) if steps else -1


def wrap(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None] = lambda *_: None) -> None:
    """Calls `before` and `after` around a function, with its arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        result = original(*arguments, **options)
        after(*arguments)
        return result

    setattr(owner, name, wrapped)
