"""Every command that README.md and docs/*.md print is run, as printed, in a folder of small images.

What makes it quick is added behind the printed words (two steps of training, small batches), never in place of them.
A block that cannot run here stands behind a comment that says why: `<!-- not run: needs several GPUs -->`.
"""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from fnmatch import fnmatch
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import pydicom
import pytest
from every_method import methods
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from stripes import pattern

from ssl_kit import cli
from ssl_kit.core.options import options
from ssl_kit.methods.method import Method
from ssl_kit.training.optim import Optim
from ssl_kit.verbs import manual
from ssl_kit.views.recipe import ViewRecipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: ([^>]+) -->\n+)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INSTALLS = ("git clone", "python3 -m venv")  # what `make test` did to get here
ELSEWHERE = {"interchange": "test_interchange.py", "reliability": "test_slurm.py"}  # pages that other tests run
FOREIGN = {"--x", "--y", "--quick", "--f12"}  # of embedding-atlas and of the benchmarks
GIVEN = ("runs/DATA", "runs/A", "runs/B", "EMB")  # what a page may take for granted; otherwise it makes them
QUICK = {
    "pretrain": ["--trainer.max_steps=2", "--batch_size=16"],
    "finetune": ["--epochs=1", "--batch_size=16"],
    "views": ["--count=2"],
    "doctor": ["--seconds=0.1"],
}


class Block(NamedTuple):
    language: str
    text: str
    not_run: str | None


def blocks(page):
    found = [Block(language, text, why) for why, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))]
    return [
        block._replace(not_run="installing, which `make test` does")
        if not block.not_run and block.language == "bash" and block.text.startswith(INSTALLS)
        else block._replace(not_run=block.not_run or None)
        for block in found
    ]


def commands(text):
    """The lines of a bash block as lists of words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Images under all the names that the pages use, and what `GIVEN` lists."""
    folder = tmp_path_factory.mktemp("template")
    many, few = ("DATA", "photos", "data/cifar10/train"), ("LABELLED", "labelled", "data/cifar10/test")
    for name in (*many, *few):
        for label, kind in enumerate(("beach", "cat", "dog", "forest")):
            (folder / name / kind).mkdir(parents=True)
            for number in range(30 if name in many else 15):
                Image.fromarray(pattern(label, number)).save(folder / name / kind / f"{number:03d}.jpg", quality=95)
    shutil.copy(folder / "DATA" / "cat" / "003.jpg", folder / "image.jpg")
    (folder / "ct").mkdir()
    for number in range(32):
        (folder / "ct" / f"{number:02d}.dcm").write_bytes(slice_of_ct(number))
    for example in (ROOT / "docs" / "examples").iterdir():
        if example.is_file():
            shutil.copy(example, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        smaller(patch)
        run(["ssl-kit", "pretrain", "DATA", "--run", "given/runs/DATA"])
        for name in ("A", "B"):
            shutil.copytree("given/runs/DATA", f"given/runs/{name}")
        run(["ssl-kit", "embed", "given/runs/DATA", "DATA", "--out", "given/EMB"])
        run(["ssl-kit", "index", "given/EMB"])
    return folder


def slice_of_ct(number):
    """A DICOM file of 16 x 16 values of 12 bits, 1,024 more than Hounsfield units."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = (
        pydicom.uid.ExplicitVRLittleEndian,
        pydicom.uid.CTImageStorage,
    )
    meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}"
    told = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    told.Rows = told.Columns = 16
    told.SamplesPerPixel, told.PhotometricInterpretation = 1, "MONOCHROME2"
    told.BitsAllocated, told.BitsStored, told.HighBit, told.PixelRepresentation = 16, 12, 11, 0
    told.RescaleSlope, told.RescaleIntercept = 1, -1024
    told.PixelData = (8 * pattern(number % 4, number)[:, :, 0].astype("<u2")).tobytes()
    data = io.BytesIO()
    told.save_as(data, enforce_file_format=True)
    return data.getvalue()


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """A copy of the template that is the current folder; everything at smoke size."""
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    smaller(monkeypatch)
    yield tmp_path / "world"
    for name in ("barlow", "test_barlow", "hounsfield"):
        sys.modules.pop(name, None)


def smaller(patch):
    """The network that a recipe leaves open, fine-tuning and the search of hyper-parameters at smoke size."""
    patch.setattr(Method, "default_encoder", lambda *size: ("resnet18_small", {"channels": [8, 8, 8, 8]}))
    patch.setattr("ssl_kit.verbs.finetune._FEWEST_STEPS", 2)
    patch.setenv("TRIALS", "2")
    patch.setenv("EPOCHS", "0.05")
    patch.setenv("LOOP_EPOCHS", "1")
    patch.setenv("LOOP_BATCH", "32")


def run(words):
    """One command line, in this process."""
    environment = {}
    while "=" in words[0] and words[0].partition("=")[0].isupper():
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    out = nullcontext()
    if ">" in words:
        out = redirect_stdout(open(words[words.index(">") + 1], "w"))  # noqa: SIM115
        words = words[: words.index(">")]
    with pytest.MonkeyPatch.context() as patch, out:
        for name, value in environment.items():
            patch.setenv(name, value)
        if words[0] == "ssl-kit":
            if "PYTHONPATH" in environment:
                patch.syspath_prepend(environment["PYTHONPATH"])
            quick = [*QUICK.get(words[1], []), *(["--trainer.max_steps=4"] if "--resume" in words else [])]
            quick += ["--limit=200"] if any(word.startswith(("mnist5k", "mnist64")) for word in words) else []
            quick += ["--contrastive_batch=32"] if "--contrastive-batch" in words else []
            quick += ["--baselines=none"] if any("robustness" in word for word in words) else []
            assert cli.main([*words[1:], *quick]) == 0, words
        elif words[:3] == ["python", "-m", "pytest"]:
            patch.syspath_prepend(".")
            tests = vars(import_module(Path(words[3]).stem))
            for test in [test for name, test in tests.items() if name.startswith("test_")]:
                test()
        elif words[0] == "python":
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        else:
            pytest.fail(f"{shlex.join(words)}: not a command of ours; put <!-- not run: WHY --> before its block")


def give(words):
    """Copies what the words name and the page has not made."""
    for name in GIVEN:
        named = [word for word, before in zip(words, ["", *words], strict=False) if before != "--out"]
        if not os.path.exists(name) and any(word == name or word.startswith(name + "/") for word in named):
            shutil.copytree(f"given/{name}", name)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem not in ELSEWHERE], ids=lambda page: page.stem
)
def test_what_a_page_prints_runs(page, world):
    names = {"image": Image.open("image.jpg")}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "bash":
            for words in commands(block.text):
                if words[1] != "pretrain":
                    give(words)
                run(words)
        else:
            give(re.findall(r'"(?:local-dir:)?([^"]+)"', block.text))
            exec(compile(block.text, f"{page.name}, python block", "exec"), names)


def test_few_blocks_are_exempt_and_say_why():
    for page, test in ELSEWHERE.items():
        assert f"{page}.md" in (ROOT / "tests" / test).read_text(encoding="utf-8")
    every = [(page.name, block) for page in PAGES if page.stem not in ELSEWHERE for block in blocks(page)]
    exempt = [f"{name}: {block.not_run}" for name, block in every if block.not_run]
    print(f"{len(exempt)} of {len(every)} blocks are not run:", *exempt, sep="\n  ")
    assert len(every) > 20 and len(exempt) <= len(every) / 4
    assert all(len(line.split()) >= 4 for line in exempt)


def known_options():
    """Every option of every verb; those of views, methods and the optimiser with their prefix."""
    found = {"--json", "--quiet", "--verbose", "--help", "--help-all", "--allow", "-c", "-k"}
    for verb in manual.verbs():
        found |= {f"--{option.name}" for option in options(ROOT / "ssl_kit" / "verbs" / f"{verb}.py")}
    found |= {f"--views.{field.name}" for field in fields(ViewRecipe)}
    found |= {f"--method.{name}" for kind in methods() for name in signature(kind).parameters}
    found.add("--method.off_diagonal")  # of docs/examples/barlow.py
    found |= {f"--method.optim.{field.name}" for field in fields(Optim)}
    return found | {f"--method.encoder.{name}" for name in ("name", "args")}


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "decisions"], ids=lambda page: page.stem)
def test_options_named_in_a_sentence_exist(page):
    known = known_options()
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        if span.startswith(("make ", "pip ", "python ", "git ", "torchrun ")):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span):
            name = "--" + option[2:].replace("-", "_")
            own = name in known or option in known | FOREIGN or name.startswith("--trainer.")
            assert own, f"{page.name}: `{span}` names {option}, which no command takes"
        if span.startswith("ssl-kit ") and not span.startswith(("ssl-kit --", "ssl-kit VERB")):
            assert span.split()[1] in manual.verbs(), f"{page.name}: `{span}`"


def test_the_pages_of_figures_are_what_the_records_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    record = import_module("record")
    assert record.PAGE.read_text(encoding="utf-8") == record.page()  # else: python benchmarks/record.py
    pledges = record.RELIABILITY.read_text(encoding="utf-8")
    assert pledges == record.reliability(pledges)
    forged = re.sub(r"[\d,]+ of [\d,]+ \|", "1 of 2 |", pledges)
    assert forged != pledges == record.reliability(forged)


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "examples" / "from_python.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["score"] > 0.7 and names["run"].report._repr_html_()


TABLE = re.compile(r"^```\{measured\} (\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```{measured}" in page.read_text()], ids=lambda page: page.stem
)
def test_tables_of_numbers_name_their_rows_and_columns(page):
    """What `make docs` would refuse, which needs Sphinx."""
    for record, text in TABLE.findall(page.read_text(encoding="utf-8")):
        asked = dict(re.findall(r"^:([\w-]+): *(.*)$", text, re.MULTILINE))
        assert {"ids", "columns"} <= asked.keys(), record
        rows = json.loads((ROOT / "docs" / "numbers" / f"{record}.json").read_text())["rows"]
        patterns = [one.strip() for one in asked["ids"].split(",")]
        found = [row for row in rows if any(fnmatch(row["id"], one) for one in patterns)]
        for column in asked["columns"].split(","):
            assert any(column.strip().partition("=")[0] in row for row in found), (record, column)
