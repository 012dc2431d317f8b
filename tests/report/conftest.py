"""A small run folder as training and evaluation leave it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fabricated import write_run


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """make_run(name, classes=..., info=...): a run folder with every file the report knows."""
    return lambda name="run", **options: write_run(tmp_path / name, **options)
