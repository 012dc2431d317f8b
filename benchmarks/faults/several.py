"""Several processes of one run for `distributed.py`: started warm, made to fail at a step; what their runs leave."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import fork_warmed
from PIL import Image
from safetensors.numpy import load_file

from ssl_kit import cli
from ssl_kit.data import sources
from ssl_kit.training.distributed import rank
from ssl_kit.training.loop import Loop

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "class_token": False, "global_pool": "avg"}
VIT["fc_norm"] = False


def in_processes(count: int, work: Callable[[], Any], logs: Path, seconds: float = 600.0) -> tuple[list[Any], float]:
    """Runs `work` in `count` processes of one run: exit codes, None of those that had to be killed; and the seconds.

    The log of process r is `logs`/r.log.
    """
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def start(number: int) -> Any:
        names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def named() -> None:
            os.environ.update({name: str(value) for name, value in names.items()} if count > 1 else {})
            work()

        return fork_warmed(named, logs / f"{number}.log")

    began = time.monotonic()
    processes = [start(number) for number in range(count)]
    for process in processes:
        process.join(max(0.0, seconds - (time.monotonic() - began)))
    took = time.monotonic() - began
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, took


def training(
    command: list[str],
    victim: int = -1,
    step: int = 0,
    act: Callable[[], Any] = lambda: None,
    *,
    files: bool = False,
    seen: Path | None = None,
) -> None:
    """One command line; process `victim` acts after a step.

    Args:
        command: of ssl-kit.
        victim: rank.
        step: optimiser step.
        act: what it does.
        files: decode files while training.
        seen: file to which each process appends what each step shows it.
    """
    if files:
        sources.fits_in_memory = lambda needed: (False, "as the benchmark has it")
    end = Loop.on_train_batch_end

    def watched(self: Loop, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if seen is not None:
            with open(seen, "a", encoding="utf-8") as file:
                file.write(json.dumps([trainer.global_step, batch["key"].index.tolist()]) + "\n")
        if rank() == victim and trainer.global_step == step:
            act()
        end(self, trainer, module, outputs, batch, batch_idx)

    Loop.on_train_batch_end = watched  # type: ignore[method-assign]
    raise SystemExit(cli.main(command))


def killing(delay: float) -> Callable[[], None]:
    """Kills this process by SIGKILL some seconds later, wherever it is then."""

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: threading.Thread(target=die, daemon=True).start()


def command(images: Path, run: Path, count: int, *options: str) -> list[str]:
    """`ssl-kit pretrain` with steps of 24 images in `count` processes."""
    args = json.dumps(VIT)
    return [
        *("pretrain", str(images), "--run", str(run), "--method", "ssl_kit.methods.mae.MAE"),
        *("--method.encoder.name", "vit_tiny_patch16_224", "--method.encoder.args", args, "--epochs", "4"),
        *("--method.decoder-width", "16", "--method.decoder-heads", "1", "--method.optim.name", "sgd"),
        *("--method.optim.lr", "2", "--method.optim.warmup-epochs", "0", "--precision", "float32"),
        *("--threads", "1", "--evaluate-every", "2", *options, "--batch-size", str(24 // count)),
    ]


def write_images(folder: Path) -> None:
    """160 images in four classes, smooth noise of 16 px."""
    generator = np.random.default_rng(0)
    for name in "abcd":
        (folder / name).mkdir(parents=True)
        for number in range(40):
            low = generator.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(low).resize((16, 16)).save(folder / name / f"{number:02d}.png")


def weights(run: Path) -> dict[str, np.ndarray]:
    """The exported encoder."""
    return load_file(run / "encoder" / "model.safetensors")


def losses(run: Path) -> dict[str, np.ndarray]:
    """Step -> loss."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return {row["step"]: np.array(float(row["loss"])) for row in csv.DictReader(file) if row["loss"]}


def difference(run: Path, whole: Path, bar: float = 1e-5) -> str | None:
    """How a run's weights and losses differ from those of the undisturbed run, if by more than a relative `bar`."""
    for read in (weights, losses):
        one, other = read(run), read(whole)
        if one.keys() != other.keys():
            return f"other entries: {one.keys() ^ other.keys()}"
        error = max(float(np.abs(one[key] - other[key]).max() / np.abs(other[key]).max()) for key in other)
        if error > bar:
            return f"relative error {error:.1e} against the undisturbed run"
    return None
