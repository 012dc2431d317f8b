"""The quick versions of the fault benchmarks: every case ends as it must; docs/reliability.md has the full figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "benchmarks" / "faults"


@pytest.mark.parametrize(
    ("program", "only", "ids"),
    [
        ("inputs.py", "F1,F3,F11", {"F1", "F3", "F11"}),
        ("hostile.py", "S1,X1,folders,S4", {"S1/checkpoints", "S1/encoders", "X1", "folders", "S4"}),
        ("resume.py", "R1,R6", {"R1", "R6"}),
        ("writes.py", "A1,A2,A4,A6,A7", {"A1", "A2", "A4", "A6", "A7"}),
        ("belongings.py", "A8", {"A8"}),
        ("nonfinite.py", "N1,N2", {"N1", "N1/three", "N2/float32", "N2/bfloat16", "N2/float16"}),
    ],
)
def test_quick_faults_are_all_survived(tmp_path, program, only, ids):
    command = [sys.executable, str(FAULTS / program), "--quick", "--only", only, "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    rows = {row["id"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == ids
    for row in rows.values():
        assert row["survived"] == row["tried"] > 0, row
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]
