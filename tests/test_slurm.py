"""The SLURM script of docs/reliability.md, run with stand-ins for srun and scontrol, resubmits itself until the end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ssl_kit import cli

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
TINY = [
    *("--batch-size", "16", "--epochs", "20", "--image-size", "16", "--method.projection", "[16, 8]"),
    *("--method.encoder.args", "{channels: [8, 8, 8, 8]}", "--evaluate-every", "20"),
]
SRUN = """#!/bin/bash
# runs its arguments, and warns them once, in the first job, that the time is up
"$@" &
if [ ! -e warned ]; then
  until [ -s "$RUN/metrics.csv" ] || ! kill -0 $!; do sleep 0.05; done
  touch warned
  kill -USR1 $!
fi
wait $!
"""
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
"""


def test_the_job_of_the_page_goes_on_until_the_run_is_finished(labelled_folder, tmp_path):
    script = re.search(r"### SLURM.*?```bash\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    run, place = tmp_path / "run", tmp_path / "job"
    script = script.replace("DATA=/data/images", f"DATA={labelled_folder}")
    script = script.replace("RUN=/scratch/runs/images", f"export RUN={run}")
    script = script.replace('"$DATA" --run "$RUN"', f'"$DATA" --run "$RUN" {" ".join(map(repr, TINY))}')
    place.mkdir()
    stand_ins = {"srun": SRUN, "scontrol": SCONTROL}
    stand_ins["ssl-kit"] = f'#!/bin/bash\nexec {sys.executable} -m ssl_kit "$@"\n'
    for name, text in {**stand_ins, "job.sh": script}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    codes = []
    while not codes or codes[-1] == 138:
        job = subprocess.run(
            [place / "job.sh"], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        codes.append(job.returncode)
    assert codes == [138, 0], job.stderr
    assert (place / "requeued").read_text() == "requeue 77\n"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(tmp_path / "undisturbed"), *TINY]) == 0
    shas = [json.loads((one / "run.json").read_text())["encoder_sha256"] for one in (run, tmp_path / "undisturbed")]
    assert shas[0] == shas[1]
