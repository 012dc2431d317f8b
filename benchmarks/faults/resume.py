"""A run that is killed or stopped, and resumed, ends as the undisturbed run does: bit for bit, on the CPU.

    python benchmarks/faults/resume.py --json resume.json        # goes on where it was stopped
    python benchmarks/faults/resume.py --quick --only R1,R6

What is run and compared is told in trainings.py.

    R1  SimCLR, killed by SIGKILL at a random moment of its whole life
    R2  the same with accumulated gradients, gradient caching, BYOL, DINO, MAE, VAE, averages, and fine-tuning
    R3  SIGTERM, SIGINT and SIGUSR1 at moments spread over the whole life: exit code, status, and the same comparison
    R4  resumed with other numbers of threads: the same images in every step of two epochs
    R6  killed at exact places: last batch of an epoch, during a measurement, step 0, after the last step
    R8  what saving costs, in time and in bytes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
from harness import Rows, fork_warmed, kill_at, run_warmed, timed
from PIL import Image
from trainings import SETTINGS, STEPS, STEPS_PER_EPOCH, SUBJECTS, Work, look_often, progress, simclr, wrap

from ssl_kit import cli
from ssl_kit.core.files import read_json
from ssl_kit.core.process import Signals
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO
from ssl_kit.training.loop import Loop
from ssl_kit.verbs import monitor
from ssl_kit.verbs import pretrain as pretraining


class Trials:
    """The trials of the rows; `where` counts what was going on when a run was ended."""

    def __init__(self, work: Work):
        self.work = work
        self.where: dict[str, int] = {}

    def note(self, run: Path) -> None:
        """Counts where a run was ended."""
        step = progress(run)
        last = int(self.work.wanted["simclr"]["last"].removeprefix("step-"))
        place = "before a state was saved" if step < 0 else "after the last step" if step == last else "between"
        self.where[place] = self.where.get(place, 0) + 1

    def killed(self, name: str) -> Callable[[int, random.Random], str | None]:
        """SIGKILL at a moment drawn from the whole life; every third run is killed again while it goes on."""

        def trial(number: int, generator: random.Random) -> str | None:
            run = self.work.place / f"{name}-{number}"
            shutil.rmtree(run, ignore_errors=True)
            for _ in range(2 if number % 3 == 2 else 1):
                process = fork_warmed(self.work.run(name, run), self.work.log)
                kill_at(process, generator.random() * self.work.seconds[name])
                self.note(run)
            return self.work.finish(name, run)

        return trial

    def stopped(self, which: signal.Signals, count: int) -> Callable[[int, random.Random], str | None]:
        """A signal at moments spread evenly over the life of the command; it must end by its code, and say so."""

        def trial(number: int, generator: random.Random) -> str | None:
            run = self.work.place / f"{which.name}-{number}"
            shutil.rmtree(run, ignore_errors=True)
            process = fork_warmed(self.command(run), self.work.log)
            kill_at(process, (number + generator.random()) / count * self.command_seconds, which)
            self.note(run)
            wrong = _ending(process.exitcode, which, run)
            return wrong or self.work.finish("simclr", run, self.command(run))

        if not hasattr(self, "command_seconds"):
            run_warmed(self.command(self.work.place / "command-0"), self.work.log)
            self.command_seconds = run_warmed(self.command(self.work.place / "command"), self.work.log)
        return trial

    def command(self, run: Path) -> Callable[[], None]:
        """`ssl-kit pretrain` with the settings of the SimCLR run, or --resume; exits with 99 if a handler saves."""
        method = SUBJECTS["simclr"][0]["init_args"]
        options = [str(self.work.data), "--run", str(run), "--method.encoder", json.dumps(method["encoder"])]
        options += ["--method.projection", json.dumps(method["projection"])]
        options += [part for key, value in method["optim"].items() for part in (f"--method.optim.{key}", str(value))]
        options += [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]

        def work() -> None:
            look_often()
            _refuse_handlers()
            begun = (run / "recipe.yaml").exists()
            sys.exit(cli.main(["pretrain", "--run", str(run), "--resume"] if begun else ["pretrain", *options]))

        return work

    def other_threads(self, number: int, generator: random.Random) -> str | None:
        """1, then 4, then 2 threads, ended by SIGKILL in between: which images were in which step."""
        run, epochs = self.work.place / f"threads-{number}", 2
        shutil.rmtree(run, ignore_errors=True)
        seen, wanted = self.work.place / f"seen-{number}", self.work.place / "seen"
        if not wanted.exists():
            straight = self.work.run("simclr", self.work.place / "straight", _writing_ids(wanted), epochs=epochs)
            run_warmed(straight, self.work.log)
        for threads in (1, 4, 2):
            work = self.work.run("simclr", run, _writing_ids(seen), epochs=epochs, threads=threads)
            process = fork_warmed(work, self.work.log)
            if threads == 2:
                process.join()
            else:
                kill_at(process, (0.3 + 0.4 * generator.random()) * self.work.seconds["simclr"])
        streams = [_stream(path) for path in (seen, wanted)]
        if isinstance(streams[0], str):
            return streams[0]
        same = streams[0] == streams[1] and len(streams[1]) == epochs * STEPS_PER_EPOCH
        return None if same else "other images in a step"

    def at_places(self, number: int, generator: random.Random) -> str | None:
        """Ended at an exact place of the run, then resumed."""
        name, place = list(PLACES.items())[number]
        run = self.work.place / f"place-{number}"
        shutil.rmtree(run, ignore_errors=True)
        process = fork_warmed(self.work.run("simclr", run, place, pages="report" in name), self.work.log)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return f"{name}: it was not killed there"
        wrong = self.work.finish("simclr", run)
        return f"{name}: {wrong}" if wrong else None


def _ending(code: int | None, which: signal.Signals, run: Path) -> str | None:
    """Whether a run ended as it should when it got a signal."""
    if not (run / "run.json").exists():
        return None if code else "no run, and exit code 0"
    wanted = {0: "finished", 128 + which: "interrupted"}
    status = read_json(run / "run.json")["status"]
    if code == -which and status == "finished":  # it had ended, and Python was on its way out
        return None
    return None if code in wanted and wanted[code] == status else f"exit code {code} and status {status}"


def _refuse_handlers() -> None:
    """Exit code 99 when a state is saved while a signal handler runs."""
    save = SafeCheckpointIO.save_checkpoint

    def checked(self: SafeCheckpointIO, *arguments: Any, **options: Any) -> None:
        if any(frame.name == Signals._note.__name__ for frame in traceback.extract_stack()):
            os._exit(99)
        save(self, *arguments, **options)

    SafeCheckpointIO.save_checkpoint = checked  # type: ignore[method-assign]


def _writing_ids(path: Path) -> Callable[[], None]:
    """Appends the images of every step to `path`."""

    def before() -> None:
        def write(trainer: pl.Trainer, batch: Any) -> None:
            with open(path, "a") as file:
                file.write(json.dumps([trainer.global_step, batch["key"].epoch, batch["key"].index.tolist()]) + "\n")

        wrap(Loop, "on_train_batch_end", lambda _, trainer, module, out, batch, number: write(trainer, batch))

    return before


def _stream(path: Path) -> dict[int, Any] | str:
    """{step: its images}, or what is wrong: a step that was made twice with other images, or a step left out."""
    steps: dict[int, Any] = {}
    for line in path.read_text().splitlines():
        step, *images = json.loads(line)
        if steps.setdefault(step, images) != images:
            return f"step {step} was made again with other images"
    return steps if sorted(steps) == list(range(1, len(steps) + 1)) else "a step is missing"


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing(*_: Any) -> None:
    pass


def _in(owner: Any, name: str, after: bool = False, step: int | None = None, call: int = 1) -> Callable[[], None]:
    """Kills the process before or after a call of a function, of parts of the loop only at that optimiser step."""
    calls = [0]

    def maybe(*arguments: Any) -> None:
        trainer = next((argument for argument in arguments if isinstance(argument, pl.Trainer)), None)
        if step is None or (trainer is not None and trainer.global_step == step):
            calls[0] += 1
            if calls[0] == call:
                _kill()

    return lambda: wrap(owner, name, _nothing if after else maybe, maybe if after else _nothing)


PLACES: dict[str, Callable[[], None]] = {
    "before the first step": _in(Loop, "on_train_batch_start", step=0),
    "during the first measurement": _in(monitor, "knn_accuracy"),
    "during the second measurement": _in(monitor, "knn_accuracy", call=2),
    "during the last measurement": _in(monitor, "knn_accuracy", call=5),
    "after the first step": _in(Checkpoints, "after_step", step=1),
    "last batch of epoch 1, before it may be saved": _in(Checkpoints, "after_step", step=10),
    "last batch of epoch 1, after that": _in(Checkpoints, "after_step", after=True, step=10),
    "last batch of epoch 3": _in(Checkpoints, "after_step", step=30),
    "first batch of epoch 2": _in(Checkpoints, "after_step", step=11),
    "the last step": _in(Checkpoints, "after_step", step=STEPS),
    "after the last step, before its state is saved": _in(Checkpoints, "at_end"),
    "after the last state was saved": _in(Checkpoints, "at_end", after=True),
    "before the encoder is written": _in(Encoder, "save"),
    "after the encoder was written": _in(Encoder, "save", after=True),
    "while the last report is written": _in(pretraining, "write_report", call=2),
}


def cost(work: Work, steps: int) -> dict[str, Any]:
    """R8: seconds in the checkpoint's hook and in a save, and bytes, of a ResNet-18 of width 16 at 32 px, batch 256."""
    run, told = work.place / "cost", work.place / "cost.json"
    times: dict[str, list[float]] = {"hook": [], "save": [], "step": []}

    def before() -> None:
        Checkpoints.after_step = timed(Checkpoints.after_step, times["hook"].append)  # type: ignore[method-assign]
        SafeCheckpointIO.save_checkpoint = timed(SafeCheckpointIO.save_checkpoint, times["save"].append)  # type: ignore[method-assign]
        wrap(Loop, "on_train_batch_start", lambda *_: times["step"].append(time.perf_counter()))

    method = simclr({"name": "resnet18_small", "args": {"channels": [16, 32, 64, 128]}})
    images = np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), np.uint8)

    def child() -> None:
        before()
        folder = work.place / "larger"
        folder.mkdir()
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(folder / f"{number}.png")
        trainer = {"max_steps": steps}
        pretraining.pretrain(
            str(folder), method=method, run=str(run), image_size=32, batch_size=256, epochs=1000, trainer=trainer
        )
        told.write_text(
            json.dumps({key: median(values if key != "step" else np.diff(values)) for key, values in times.items()})
        )

    run_warmed(child, work.log)
    seconds = json.loads(told.read_text())
    folder = sorted(run.rglob("step-*"))[-1]
    state = SafeCheckpointIO().load_checkpoint(folder)
    optimiser = [value for one in state["optimizer_states"][0]["state"].values() for value in one.values()]
    needed = sum(value.nbytes for value in (*state["state_dict"].values(), *optimiser))
    written = sum(file.stat().st_size for file in folder.iterdir())
    share = seconds["hook"] / seconds["step"] + seconds["save"] / 600
    return {
        "id": "R8",
        "what": "cost of saving: share of a step's time with a save every 10 minutes; bytes beside model and optimiser",
        "tried": 2,
        "survived": int(share <= 0.01) + int(written - needed <= 2**20),
        "share": round(share, 6),
        "hook_us": round(1e6 * seconds["hook"], 2),
        "save_ms": round(1e3 * seconds["save"], 1),
        "step_ms": round(1e3 * seconds["step"], 1),
        "extra_bytes": written - needed,
        "bytes": written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="R1,R2,R3,R4,R6,R8", help="some of the ids")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: a few trials of each")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it holds")
    arguments = parser.parse_args()
    only, quick = arguments.only.split(","), arguments.quick
    rows = Rows(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        work.undisturbed("simclr")
        trials = Trials(work)
        if "R1" in only:
            rows.run("R1", "SimCLR killed at a random moment", 1 if quick else 50, trials.killed("simclr"))
        for name in (*SUBJECTS, "finetune") if "R2" in only else ():
            if name != "simclr":
                work.undisturbed(name)
                rows.run(f"R2/{name}", f"{name} killed at a random moment", 1 if quick else 20, trials.killed(name))
        for which, full in ((signal.SIGTERM, 40), (signal.SIGINT, 20), (signal.SIGUSR1, 20)) if "R3" in only else ():
            count = 2 if quick else full
            rows.run(f"R3/{which.name}", f"{which.name} over the whole life", count, trials.stopped(which, count))
        if "R4" in only:
            rows.run("R4", "images of 2 epochs with 1, 4, 2 threads", 1 if quick else 20, trials.other_threads)
        if "R6" in only:
            rows.run("R6", "killed at exact places", 2 if quick else len(PLACES), trials.at_places)
        if "R8" in only:
            rows.add(cost(work, 6 if quick else 20))
        print("ended", trials.where)


if __name__ == "__main__":
    main()
