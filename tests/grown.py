"""What a call makes a process grow, measured in a process of its own.

It has read a small honest file of the kind before, and its peak is reset then: what is left is what the other file made
it grow. Whatever takes 6 GiB ends there.
"""

import multiprocessing
import resource
import time
from pathlib import Path

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.data.limits import BadImageError

MIB = 2**20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["ssl_kit.verbs.defaults", "ssl_kit.methods.simclr", "ssl_kit.encoders.weights", "pytest"]
)
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def memory(name):
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measured(pipe, call, honest, path):
    """In the child: reads the honest file, then the other one."""
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 6 * 2**30,) * 2)
    call(honest)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it has now
    before, began = memory("VmRSS"), time.process_time()
    try:
        told = "returned", str(call(path))[:100]
    except (UserError, BadImageError) as error:
        told = "refused", str(error)
    except BaseException as error:
        told = "crashed", repr(error)
    pipe.send((*told, memory("VmHWM") - before, time.process_time() - began))


def grown(call, honest, path):
    """(what a call ended with, in words, bytes that it grew at its peak)."""
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=measured, args=(theirs, call, honest, path))
    child.start()
    theirs.close()
    kind, text, size, seconds = ours.recv() if ours.poll(120) else ("hung", "", 0, 120)
    child.kill()
    child.join()
    print(f"{call.__name__}: {kind}, {size / MIB:.0f} MiB, {seconds:.1f} s: {text}")
    return kind, text, size


def refused(call, honest, path):
    """The line that a call is refused with, in at most 64 MiB."""
    kind, text, size = grown(call, honest, path)
    assert kind == "refused" and size <= 64 * MIB and "\n" not in text, (kind, text[:300], size / MIB)
    return text
