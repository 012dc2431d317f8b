"""NaN and infinity change nothing and are found at once; extreme temperatures; what watching costs.

    python benchmarks/faults/nonfinite.py --json nonfinite.json        # goes on where it was stopped
    python benchmarks/faults/nonfinite.py --quick --only N1

    N1  NaN or infinity in the pixels, an activation, the loss, a gradient, a running statistic, the averaged weights:
        the step is held back and counted, weights, optimiser, statistics and average are what they were, to the bit
    N1/three  three such steps in a row end the run with an error; the newest checkpoint is of a good step
    N2  NT-Xent at temperatures from 1e-3 to 10, of float32, bfloat16 and float16 projections, zero vectors among them,
        against float64 on the same numbers
    N4  the share of a step that the guard and the curves take (ResNet-18 of width 16 at 32 px, batch 256)

N3, false and missed alarms, is benchmarks/verdict.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from harness import Rows, fork_warmed, run_warmed, tail, timed
from PIL import Image
from torch import Tensor, nn
from trainings import SETTINGS, SUBJECTS, write_images

from ssl_kit.core.errors import UserError
from ssl_kit.methods import simclr
from ssl_kit.methods.simclr import nt_xent
from ssl_kit.training.checkpoint import SafeCheckpointIO, newest
from ssl_kit.training.curves import Curves
from ssl_kit.training.guard import Guard
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import EMA
from ssl_kit.verbs.pretrain import pretrain

STEPS = 12
PLACES = ("pixels", "activation", "loss", "gradient", "statistic", "average", "weight")
VALUES = (float("nan"), float("inf"), float("-inf"))
METHODS = ("simclr", "mae", "vae", "accumulated")
OPTIMISERS = ("sgd", "adamw", "lars")


class Spoil(pl.Callback):
    """Puts a value somewhere in some steps, and looks whether they changed anything. Comes last of all callbacks.

    Attributes:
        wrong: what was not as it should be.
    """

    def __init__(self, place: str, value: float, steps: tuple[int, ...]):
        self.place, self.value, self.steps = place, value, steps
        self.wrong: list[str] = []
        self.spoiling = False
        self.held = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loop = next(one for one in trainer.callbacks if isinstance(one, Loop))
        assert loop.ema is not None
        self.guard, self.ema = loop.guard, loop.ema
        layer = next(one for one in pl_module.encoder.modules() if isinstance(one, nn.Conv2d | nn.Linear))
        layer.register_forward_hook(self._activation)
        loss, move = pl_module.loss, self.ema.move
        pl_module.loss = lambda views, key: self._loss(loss(views, key))

        def spoilt_before(encoder: nn.Module, *rest: Any) -> Tensor:
            if self.spoiling and self.place == "weight":
                _set(next(encoder.parameters()), self.value)
            return move(encoder, *rest)

        self.ema.move = spoilt_before  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.spoiling = trainer.global_step in self.steps
        if not self.spoiling:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = self._state(trainer, pl_module)
        if self.place == "pixels":
            batch["views"][0][0, 0, 0, 0] = self.value
        if self.place == "statistic":
            next(one for name, one in pl_module.named_buffers() if "running_var" in name)[0] = self.value
        if self.place == "average":  # found in the step that follows the one that moved it
            _set(next(self.ema.encoder(pl_module.encoder).parameters()), self.value)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.spoiling and self.place == "gradient":
            _set(next(one.grad for one in pl_module.parameters() if one.grad is not None), self.value)

    def _activation(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not self.spoiling or self.place != "activation" or not torch.is_grad_enabled():
            return None
        spoilt = output.clone()
        spoilt[0, 0] = self.value  # everywhere: one patch of an MAE may be hidden, and would reach nothing
        return spoilt

    def _loss(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**losses, "loss": losses["loss"] * self.value} if self.spoiling and self.place == "loss" else losses

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, out: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self.spoiling:
            return
        after = self._state(trainer, pl_module)
        changed = [name for name, value in self.before.items() if not torch.equal(value, after[name])]
        found = bool(self.guard.held)
        if self.place in ("average", "weight"):  # the step was good until then: the next one is held back
            found = bool(self.guard.spoilt)
            weights = [f"average/{name}" for name, _ in self.ema.encoder(pl_module.encoder).named_parameters()]
            changed = [name for name in changed if name in weights] if self.place == "weight" else []
        self.held += found
        if changed:
            self.wrong.append(f"step {trainer.global_step}: {changed[0]} and {len(changed) - 1} more changed")
        if not found:
            self.wrong.append(f"step {trainer.global_step}: it was not found")

    def _state(self, trainer: pl.Trainer, module: Any) -> dict[str, Tensor]:
        """Everything that a step changes, copied."""
        state = {f"module/{name}": value for name, value in module.state_dict().items()}
        for number, weight in enumerate(module.parameters()):
            for name, value in trainer.optimizers[0].state.get(weight, {}).items():  # `[]` would add a frozen weight
                state[f"optimiser/{number}/{name}"] = value
        averaged = self.ema.encoder(module.encoder).state_dict()
        state |= {f"average/{name}": value for name, value in averaged.items()}
        return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def _set(tensor: Tensor, value: float) -> None:
    """The first number of a tensor."""
    tensor[(0,) * tensor.ndim] = value


def train(data: Path, run: Path, name: str, optimiser: str, spoil: Spoil) -> None:
    """`pretrain` of a few steps in which `spoil` acts."""
    method, options = SUBJECTS[name]
    chosen = {**method["init_args"].get("optim", {}), "name": optimiser, "lr": 0.01 if optimiser == "adamw" else 0.5}
    method = {**method, "init_args": {**method["init_args"], "optim": chosen}}
    settings = {**SETTINGS, **options, "ema": 0.9, "trainer": {"max_steps": STEPS, "callbacks": [spoil]}}
    pretrain(str(data), method=method, run=str(run), **settings)


class Trials:
    """The trials of N1; work is done in children."""

    def __init__(self, place: Path):
        self.place, self.log, self.data = place, place / "log.txt", place / "images"
        write_images(self.data)

    def one(self, number: int, generator: random.Random) -> str | None:
        """One spoilt step."""
        combinations = [(place, value) for value in VALUES for place in PLACES]
        place, value = combinations[number % len(combinations)]
        name = METHODS[number // len(combinations) % len(METHODS)]
        if place == "statistic" and name == "mae":
            return None  # it has none
        optimiser, step = OPTIMISERS[number % len(OPTIMISERS)], generator.randrange(1, STEPS - 2)

        def work() -> None:
            spoil = Spoil(place, value, (step,))
            try:
                train(self.data, self._fresh(), name, optimiser, spoil)
            except UserError as error:  # a spoilt weight or average ends the run, which has nothing to go on with
                if place not in ("average", "weight"):
                    raise
                print(error)
            if spoil.wrong or not spoil.held:
                print("\n" + "; ".join(spoil.wrong or ["nothing happened"]))
                sys.exit(3)

        return self._done(work, f"{value} in {place}, {name}, {optimiser}, step {step}")

    def three(self, number: int, generator: random.Random) -> str | None:
        """Three spoilt steps in a row."""
        place, step = ("pixels", "activation", "loss", "gradient")[number % 4], generator.randrange(3, STEPS - 4)

        def work() -> None:
            run = self._fresh()
            try:
                train(self.data, run, "simclr", "sgd", Spoil(place, float("nan"), tuple(range(step, step + 3))))
            except UserError as error:
                assert "3 steps in a row" in str(error) and f"first at step {step}" in str(error), error
                path = newest(run / "checkpoints")
                if path is not None:
                    state = SafeCheckpointIO().load_checkpoint(path)
                    assert state["global_step"] <= step, path
                    assert all(value.isfinite().all() for value in state["state_dict"].values()), path
                return
            sys.exit(3)

        return self._done(work, f"three in {place} from step {step}")

    def _fresh(self) -> Path:
        run = self.place / "run"
        shutil.rmtree(run, ignore_errors=True)
        return run

    def _done(self, work: Callable[[], None], what: str) -> str | None:
        process = fork_warmed(work, self.log)
        process.join()
        return f"{what}: ended with {process.exitcode}: {tail(self.log, 1)}" if process.exitcode else None


def temperatures(told: Path) -> None:
    """N2: writes {dtype: [combinations, finite ones, largest relative errors of value and gradient]}."""
    found: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = found[str(dtype).removeprefix("torch.")] = [0, 0, 0.0, 0.0]
        for temperature in np.geomspace(1e-3, 10, 17):
            for seed, (pairs, zeros, small, decoupled) in enumerate(
                (pairs, zeros, small, decoupled)
                for pairs in (2, 8, 64)
                for zeros in (0, 1)
                for small in (0, 512)
                for decoupled in (False, True)
            ):
                simclr._SMALL = small  # type: ignore[misc]
                generator = torch.Generator().manual_seed(seed)
                z = torch.randn(2 * pairs, 16, generator=generator).to(dtype)
                z[: 2 * zeros] = 0
                errors = _errors(z, float(temperature), decoupled)
                row[0] += 1
                row[1] += bool(np.isfinite(errors).all())
                row[2], row[3] = max(row[2], errors[0]), max(row[3], errors[1])
    told.write_text(json.dumps(found))


def _errors(z: Tensor, temperature: float, decoupled: bool) -> tuple[float, float]:
    """Relative errors of the loss, and of its gradient in norm; nan where something is not finite."""
    low, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, wanted = (nt_xent(one, temperature, decoupled=decoupled) for one in (low, exact))
    loss.backward()
    wanted.backward()
    assert low.grad is not None and exact.grad is not None
    if not (loss.isfinite() and low.grad.isfinite().all()):
        return float("nan"), float("nan")
    value = abs(loss.item() - wanted.item()) / max(abs(wanted.item()), 1e-30) if wanted else abs(loss.item())
    length = exact.grad.norm().clamp_min(torch.finfo(z.dtype).smallest_normal)
    return value, float((low.grad.double() - exact.grad).norm() / length)


def cost(place: Path, steps: int) -> dict[str, Any]:
    """N4: seconds spent in each part of a step, over the seconds of a step."""
    told, log = place / "cost.json", place / "log.txt"
    method = {**SUBJECTS["simclr"][0]}
    encoder = {"name": "resnet18_small", "args": {"channels": [16, 32, 64, 128]}}
    method["init_args"] = {**method["init_args"], "encoder": encoder}
    images = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), np.uint8)

    def child() -> None:
        spent: Counter[str] = Counter()
        ends: list[float] = []
        parts: tuple[tuple[type, tuple[str, ...]], ...] = (
            (Guard, ("before_step", "see", "decide")),
            (EMA, ("move",)),
            (Curves, ("measure_untrained", "collect", "after_step")),
        )
        for kind, names in parts:
            for name in names:
                note = lambda seconds, kind=kind: spent.update({kind.__name__: seconds})
                setattr(kind, name, timed(getattr(kind, name), note))
        (place / "larger").mkdir()
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(place / "larger" / f"{number}.png")

        class End(pl.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                ends.append(time.perf_counter())
                if len(ends) == 4:  # the first measurement, and what is made once, are over
                    spent.clear()

        options = {"image_size": 32, "batch_size": 256, "epochs": 1000, "evaluate_every": 1e6, "ema": 0.99}
        trainer = {"max_steps": 4 + steps, "callbacks": [End()]}
        pretrain(str(place / "larger"), method=method, run=str(place / "cost"), trainer=trainer, **options)
        told.write_text(json.dumps({"step": median(np.diff(ends[3:])), **{k: v / steps for k, v in spent.items()}}))

    run_warmed(child, log)
    seconds = json.loads(told.read_text())
    share = (seconds["Guard"] + seconds["Curves"]) / seconds["step"]
    return {
        "id": "N4",
        "what": "share of a step spent by guard and curves",
        "tried": 1,
        "survived": int(share <= 0.01),
        "share": round(share, 5),
        **{f"{name}_ms".lower(): round(1e3 * value, 3) for name, value in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="N1,N2,N4", help="some of the ids")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: a few trials of each")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it holds")
    arguments = parser.parse_args()
    only, quick, rows = arguments.only.split(","), arguments.quick, Rows(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if "N1" in only:
            trials, full = Trials(place), len(PLACES) * len(VALUES) * len(METHODS)
            rows.run("N1", "NaN or infinity in one step", 3 if quick else full, trials.one)
            rows.run("N1/three", "NaN in three steps in a row", 1 if quick else 20, trials.three)
        if "N2" in only:
            run_warmed(lambda: temperatures(place / "told.json"), place / "log.txt")
            for name, (tried, finite, value, gradient) in json.loads((place / "told.json").read_text()).items():
                bar = 1e-5 if name == "float32" else 1e-2
                row = {"id": f"N2/{name}", "what": f"NT-Xent of {name}, T 1e-3 to 10, against float64", "tried": tried}
                row |= {"survived": finite if value <= bar else 0, "value_error": value, "gradient_error": gradient}
                rows.add(row)
        if "N4" in only:
            rows.add(cost(place, 4 if quick else 40))
        print(json.dumps([row for row in rows.rows if row["id"][:2] in ("N2", "N4")], indent=1))


if __name__ == "__main__":
    main()
