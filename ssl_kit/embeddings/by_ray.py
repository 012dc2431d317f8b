"""Parts of an embeddings folder made by workers of Ray: `ssl-kit embed ... --engine ray`. Only this file imports Ray.

A part is written with its record before Ray hears of it, so nothing passes through Ray but numbers: a worker that is
killed costs the part it was at, which Ray gives to another one, and a job that is started again makes what is missing.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import ModuleType

import numpy as np

from ssl_kit.core.errors import UserError
from ssl_kit.core.machine import available_cores

_TRIES = 3  # of a part after the first, should its worker die

Start = Callable[[int], Callable[[int], None]]  # threads -> what makes a part, by its number


class _Worker:
    """A process of Ray's: it opens encoder and images once, and makes one part after the other."""

    def __init__(self, start: Start, threads: int):
        self.make = start(threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for number in batch["item"]:
            self.make(int(number))
        return batch


def by_ray(start: Start, numbers: Sequence[int]) -> Iterator[int]:
    """Has parts made by as many workers as the cluster has GPUs, or else cores; gives their numbers as they are done.

    The cluster is the one at `RAY_ADDRESS`, or begins and ends here, for those who have its token: this process alone.
    All its machines see the encoder, the images and the folder under the same names.

    Args:
        start: called once in each worker, with its number of threads.
        numbers: of the parts.

    Raises:
        UserError: Ray is not installed; what a worker says that cannot go on; a part whose workers die.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_COLOR_PREFIX": "0"}
    if "RAY_ADDRESS" not in os.environ:  # Ray listens at the machine's own address, and runs what it is sent
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--engine ray needs the package {error.name}: pip install 'ssl-kit[ray]'") from error
    with ExitStack() as stack:
        _join(ray, stack)
        there = ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        workers = min(len(numbers), gpus or cores)
        each = max(1, cores // workers)
        parts = ray.data.from_items(list(numbers), override_num_blocks=len(numbers))
        with warnings.catch_warnings(action="ignore"):  # Ray 2.60 has no other way yet to end with a part that kills
            made = parts.map_batches(
                _Worker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                fn_constructor_args=(start, each),
                num_cpus=each,
                num_gpus=1 if gpus else 0,
                ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": _TRIES},
            )
        try:
            yield from (int(row["item"]) for row in made.iter_rows())
        except ray.exceptions.RayError as error:
            raise UserError(_reason(error)) from error


def _join(ray: ModuleType, stack: ExitStack) -> None:
    """Joins the cluster at `RAY_ADDRESS`, or begins one of this machine's cores, until the stack ends."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        # Ray's logs and sockets go with it; the names of sockets have room for 107 characters
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        own = {"num_cpus": available_cores(), "object_store_memory": 2**27, "include_dashboard": False}
        ray.init("local", _temp_dir=place, **own, **quiet)
    stack.callback(ray.shutdown)


def _reason(error: BaseException) -> str:
    """What a worker said that is a user's to mend, which Ray passes on as text; or why there is no worker any more."""
    lines = str(error).strip().splitlines()
    said = [line.partition(": ")[2] for line in lines if line.startswith("ssl_kit.core.errors.")]
    return said[-1] if said else f"Ray cannot go on: {lines[-1]}; what is finished is kept, the same command goes on"
