"""Commands as a shell starts them, traced and robbed of their terminal; benchmarks/faults has more of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults"


def rows_of(program, place, *options):
    command = [sys.executable, str(FAULTS / program), "--quick", *options, "--json", str(place / "rows.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip())
    return {row["id"]: row for row in json.loads((place / "rows.json").read_text())}


def test_nothing_is_sent_and_nothing_is_written_elsewhere(tmp_path):
    rows = rows_of("trace.py", tmp_path)
    assert set(rows) == {"trace/embed", "trace/export onnx", "trace/views"}
    for row in rows.values():
        assert row["survived"] == row["tried"] == 1, row
        assert row["files"]["cache"] > 0 and not {"AF_INET", "AF_INET6"} & row["sockets"].keys()


def test_closed_terminals_lose_nothing(tmp_path):
    (row,) = rows_of("terminal.py", tmp_path, "--only", "T1").values()
    assert row["survived"] == row["tried"] > 0, row
