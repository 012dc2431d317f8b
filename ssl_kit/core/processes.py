"""Which of several processes this one is, as `verbs/launching.py` or torchrun says in the environment."""

from __future__ import annotations

import os

LAUNCHER = "SSL_KIT_LAUNCHER"  # the file where those of our own launcher meet; it says itself who has gone
LOST = 75  # exit code of a process that ends because another has: "temporary failure" of sysexits.h
TIMEOUT_SECONDS = 50  # that a process may keep the others waiting in a step; all have ended within a minute


def is_first() -> bool:
    """Whether this is the process that speaks and writes; true where there is only one."""
    return os.environ.get("RANK", "0") == "0"


def started() -> int:
    """How many processes were started together; 1 where there is only this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """How many of them share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
