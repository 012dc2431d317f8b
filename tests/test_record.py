"""benchmarks/record.py keeps figures of commits only, and says of old ones when they are of none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICK = """
import json, sys
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps([{"id": "quick", "value": 1}]))
open("ran", "a").write("x")
"""
FILES = {
    "benchmarks/quick.py": QUICK,
    "ssl_kit/code.py": "",
    "recipes/one.yaml": "",
    "README.md": "",
    ".gitignore": "ran",
}


def git(folder, *words):
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def record(folder, *words):
    """What `python benchmarks/record.py WORDS` ends with and says."""
    command = [sys.executable, "benchmarks/record.py", *words]
    ended = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True)
    return ended.returncode, ended.stderr


@pytest.fixture
def checkout(tmp_path):
    """A repository of its own with a benchmark that takes no time."""
    for name, text in (FILES | {"docs/reliability.md": "| id |\n"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "benchmarks" / "record.py", tmp_path / "benchmarks")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


def test_a_clean_tree_is_recorded_with_its_commit_again_and_again(checkout):
    for name in ("quick", "other=quick"):  # what the first one wrote is no change of code
        assert record(checkout, name) == (0, "")
    (checkout / "notes.txt").write_text("not of the project")
    assert record(checkout, "third=quick") == (0, "")
    kept = [json.loads(path.read_text()) for path in (checkout / "docs" / "numbers").glob("*.json")]
    commit = git(checkout, "rev-parse", "--short=12", "HEAD").strip()
    assert [one["commit"] for one in kept] == [commit] * 3 and all(one["rows"] for one in kept)
    page = (checkout / "docs" / "numbers.md").read_text()
    assert page.count(f"commit {commit}") == 3 and "uncommitted" not in page


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "changed"),
        ("ssl_kit/code.py", "changed"),
        ("ssl_kit/new.py", "new"),
        ("ssl_kit/deeper/new module.py", "new"),
        ("recipes/new.yaml", "new"),
        ("benchmarks/new.py", "new"),
        ("recipes/one.yaml", None),
    ],
)
def test_a_tree_that_is_no_commit_is_refused_before_anything_runs(checkout, name, text):
    path = checkout / name
    if text is None:
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for staged in (False, True):
        if staged:
            git(checkout, "add", "-A")
        code, said = record(checkout, "quick")
        assert code != 0 and name in said and "commit" in said and len(said.splitlines()) == 1
    assert not (checkout / "ran").exists() and not (checkout / "docs" / "numbers").exists()


def test_pages_are_made_anew_from_any_tree_and_mark_figures_of_none(checkout):
    assert record(checkout, "quick")[0] == 0
    path = checkout / "docs" / "numbers" / "quick.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "commit": "0123456789ab-dirty"}))
    (checkout / "README.md").write_text("changed")
    assert record(checkout) == (0, "")
    page = (checkout / "docs" / "numbers.md").read_text()
    assert "uncommitted tree" in page and "commit 0123456789ab," in page and "-dirty" not in page
    assert (checkout / "ran").read_text() == "x"


def test_every_section_of_our_own_page_says_what_it_is_of():
    page = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    records = [json.loads(path.read_text()) for path in (ROOT / "docs" / "numbers").glob("*.json")]
    assert page.count("uncommitted tree") == sum(one["commit"].endswith("-dirty") for one in records)
    assert "-dirty" not in page
