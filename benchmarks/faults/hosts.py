"""Two hosts: network namespaces with own addresses, two processes each, joined by torchrun. Needs root and `ip`.

    python benchmarks/faults/hosts.py --json hosts.json        # goes on where it was stopped
    python benchmarks/faults/hosts.py --quick --only D8

    D8  gradients of four processes on two hosts against one process on the joined batch: SimCLR, MAE, DINO
    D9  a host cut off from the network in a random step, and where the first process saves nearly all the time and the
        others wait for it: all processes end, on both hosts with a reason, within 60 s of the limit of a collective,
        and the run that is started again ends as the undisturbed one
    D10  a process killed by SIGKILL under --max-restarts: the agents start all anew, the run goes on by itself and ends
        as the undisturbed one

The hosts share their files, as those of a cluster do; the training is that of distributed.py, in four processes.
Sums over four processes are added up in an order that a new start may change: equal is within 1e-5, as there.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from distributed import ENDED, gradient
from harness import Rows, run_warmed, tail
from several import command, difference, write_images

from ssl_kit.core.process import TIMEOUT_SECONDS

HOSTS = {"sslkit-a": "10.77.0.1", "sslkit-b": "10.77.0.2"}  # namespace -> its address
LINK = "uplink"  # the network card in each
EACH = 2  # processes of a host
ROWS = [slice(0, 5), slice(5, 12), slice(12, 13), slice(13, 24)]  # of a batch, unequal
METHODS = ("simclr", "mae", "dino")
SAVED = (0.05, 0.0)  # minutes between two saves: as a run does, and after every step


def ip(*words: str) -> None:
    """A command of iproute2."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Inside, the namespaces exist, with a cable between them."""
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False, stderr=subprocess.DEVNULL)
        ip("netns", "add", host)
    first, second = HOSTS
    ip("-n", first, "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", second)
    for host, address in HOSTS.items():
        ip("-n", host, "addr", "add", f"{address}/24", "dev", LINK)
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "link", "set", LINK, "up")
    try:
        yield
    finally:
        for host in HOSTS:
            ip("netns", "delete", host)


def connected(host: str, up: bool) -> None:
    """Plugs the cable of a host in, or pulls it."""
    ip("-n", host, "link", "set", LINK, "up" if up else "down")


def agents(program: list[str], log: Path, restarts: int = 0) -> dict[str, subprocess.Popen[bytes]]:
    """torchrun on both hosts, for one job; what it and its processes print is appended to `log`-HOST.log."""
    started = {}
    job, port = f"job-{time.monotonic_ns()}", random.randrange(20_000, 30_000)
    for host, address in HOSTS.items():
        line = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(HOSTS))]
        line += ["--nproc-per-node", str(EACH), "--rdzv-backend", "c10d", "--rdzv-id", job, "--max-restarts"]
        line += [str(restarts), "--rdzv-endpoint", f"{next(iter(HOSTS.values()))}:{port}", "--local-addr", address]
        # which host holds the store torchrun finds by names, and hosts of one machine share theirs
        line += ["--rdzv-conf", f"is_host={int(host == next(iter(HOSTS)))}", *program]
        names = {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}
        with open(f"{log}-{host}.log", "ab") as file:
            started[host] = subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, **names})
    return started


def ended(started: dict[str, subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes of the agents; None of those that had to be killed."""
    limit = time.monotonic() + seconds
    for agent in started.values():
        try:
            agent.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    codes = [agent.poll() for agent in started.values()]
    for agent in started.values():
        for child in children(agent.pid):
            os.kill(child, signal.SIGKILL)
        agent.kill()
        agent.wait()
    return codes


def children(agent: int) -> list[int]:
    """The processes that an agent has started and that live."""
    path = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def running(process: int) -> bool:
    """Whether it lives, and is not only waiting for its agent to notice its end."""
    stat = Path(f"/proc/{process}/stat")
    with suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Bench:
    """The trials, in a folder that they share."""

    def __init__(self, folder: Path, rows: Rows, quick: bool):
        self.folder, self.rows, self.quick, self.log = folder, rows, quick, folder / "log"
        self.images = folder / "images"
        if not self.images.exists():
            write_images(self.images)

    def run(self, only: list[str]) -> None:
        """Everything, or the rows in `only`."""
        for name in ("D8", "D9", "D10"):
            if not only or name in only:
                getattr(self, name)()

    def D8(self) -> None:
        def trial(number: int, generator: random.Random) -> str | None:
            name, one, several = METHODS[number], self.folder / "one.npy", self.folder / "several.npy"
            several.unlink(missing_ok=True)
            run_warmed(lambda: gradient(name, "float32", [slice(0, 24)], one), self.folder / "one.log")
            codes = ended(agents([__file__, "--gradient", name, "--folder", str(self.folder)], self.log), 300)
            if codes != [0, 0]:
                return f"exit codes {codes}: {self.told()[-300:]}"
            wanted, got = np.load(one), np.load(several)
            error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            return None if error <= 1e-5 else f"{name}: relative error {error:.1e}, above 1e-5"

        self.rows.run("D8", "gradients of two hosts, unequal parts", len(METHODS), trial)

    def D9(self) -> None:
        def trial(number: int, generator: random.Random) -> str | None:
            run, host = self.folder / "cut", list(HOSTS)[number % 2]
            started = self.in_a_step(run, generator, minutes=SAVED[number // 2 % 2])
            processes = [child for agent in started.values() for child in children(agent.pid)]
            connected(host, up=False)
            pulled = time.monotonic()
            limit = TIMEOUT_SECONDS + ENDED
            while (alive := [one for one in processes if running(one)]) and time.monotonic() < pulled + 2 * limit:
                time.sleep(0.1)
            took = time.monotonic() - pulled
            ended(started, 5)  # the agent that has lost torchrun's store asks for it for minutes yet
            connected(host, up=True)
            if alive or took > limit:
                return f"{host} cut off: {len(alive)} of {len(processes)} processes run after {took:.0f} s"
            silent = [one for one in HOSTS if "ssl-kit: process" not in self.told(one)]
            if silent:
                return f"{host} cut off: no reason was given on {silent[0]}"
            again = ["-m", "ssl_kit", "--", "pretrain", "--run", str(run), "--resume"]
            codes = ended(agents(again, self.log), 300)
            return self.differs(run) if codes == [0, 0] else f"resumed: exit codes {codes}: {self.told()[-300:]}"

        self.rows.run("D9", "a host cut off, the job started again", 2 if self.quick else 8, trial)

    def D10(self) -> None:
        def trial(number: int, generator: random.Random) -> str | None:
            run, host = self.folder / "anew", list(HOSTS)[number % 2]
            started = self.in_a_step(run, generator, restarts=2)
            victims = children(started[host].pid)
            os.kill(generator.choice(victims), signal.SIGKILL)
            codes = ended(started, 300)
            if codes != [0, 0]:
                return f"exit codes {codes}: {self.told()[-300:]}"
            return self.differs(run) if "resumed at step" in self.told() else "it did not go on"

        self.rows.run("D10", "a process killed under --max-restarts", 2 if self.quick else 4, trial)

    def in_a_step(
        self, run: Path, generator: random.Random, restarts: int = 0, minutes: float = SAVED[0]
    ) -> dict[str, subprocess.Popen[bytes]]:
        """Starts the training; comes back some seconds after its first step, starts anew where it ended by then."""
        for moment in (4 * generator.random(), 1.0, 0.5, 0.0):
            self.emptied(run.name)
            started = agents(["-m", "ssl_kit", "--", *self.training(run, minutes)], self.log, restarts)
            saved = (run / "checkpoints").glob  # a first step is over: from then on collectives have the short limit
            while not any(saved("step-*")) and all(agent.poll() is None for agent in started.values()):
                time.sleep(0.01)
            time.sleep(moment)
            if all(agent.poll() is None and children(agent.pid) for agent in started.values()):
                return started
            ended(started, 0)
        raise RuntimeError(f"no training could be caught: {self.told()[-300:]}")

    def training(self, run: Path, minutes: float = SAVED[0]) -> list[str]:
        options = ("--epochs", "12", "--evaluate-every", "6", "--checkpoint-minutes", str(minutes))
        return command(self.images, run, len(HOSTS) * EACH, *options)

    def emptied(self, name: str) -> None:
        for host in HOSTS:
            Path(f"{self.log}-{host}.log").unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def told(self, *hosts: str) -> str:
        return "".join(Path(f"{self.log}-{host}.log").read_text(errors="replace") for host in hosts or HOSTS)

    def differs(self, run: Path) -> str | None:
        """How the run differs from the undisturbed one on two hosts, if it does."""
        whole = self.folder / "whole"
        if not (whole / "encoder").exists():
            codes = ended(agents(["-m", "ssl_kit", "--", *self.training(whole)], self.folder / "whole"), 300)
            assert codes == [0, 0], tail(Path(f"{self.folder / 'whole'}-sslkit-a.log"))
        return difference(run, whole)


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two trials of each row")
    parser.add_argument("--only", default="", help="rows, such as D8,D10")
    parser.add_argument("--json", type=Path, help="file of rows; one that is there is gone on with")
    parser.add_argument("--folder", type=Path, help="scratch folder; a temporary one by default")
    parser.add_argument("--gradient", help=argparse.SUPPRESS)  # what torchrun starts
    arguments = parser.parse_args()
    if arguments.gradient:
        return gradient(arguments.gradient, "float32", ROWS, arguments.folder / "several.npy")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hosts-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with two_hosts():
            Bench(folder, Rows(arguments.json), arguments.quick).run([one for one in arguments.only.split(",") if one])
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
