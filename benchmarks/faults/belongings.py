"""Nothing of a user's is ever gone: every writing verb, into every kind of place, in every spelling.

python benchmarks/faults/belongings.py --json belongings.json        # goes on where it was stopped
python benchmarks/faults/belongings.py --quick

A8  one command line: a verb, a place (free, empty, foreign, a run, embeddings or an export of ours with files of the
    user in it, the images, inside or around them, the working folder, the home), spelled plainly, with slashes,
    through `..` or a link, with and without `--overwrite` or `--resume`, or named by a recipe. Afterwards every file
    and link of the user is where it was, with its bytes, and the verb has ended with 0 or with 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Rows, fork_warmed, tail
from PIL import Image

from ssl_kit import cli
from ssl_kit.verbs import manual

TINY = ["--epochs", "1", "--batch-size", "6", "--image-size", "16", "--seed", "3"]
TINY += ["--method.encoder.name", "resnet18_small", "--method.encoder.args", '{"channels": [4, 4, 4, 4]}']
TINY += ["--method.projection", "[8, 8]", "--precision", "float32"]
# What a user may have lying about under the very names that verbs write
NAMES = (
    *("run.json", "recipe.yaml", "metrics.csv", "report.html", "results.jsonl", "skipped.csv", "leaks.csv", ".lock"),
    *("checkpoints/step-00000002/state.json", "checkpoints/step-by-step.txt", "encoder/config.json", "plan.json"),
    *("encoder/notes.txt", "pictures/holiday.png", "pictures/views.png", "features/a/part-00000.parquet"),
    *("part-00000.parquet", "part-00000.json", "index.faiss", "index.html", "manifest.json", "model.onnx", "views.png"),
    *("finetuned/model.safetensors", "finetuning/settings.json", "notes.txt", "deep/er/notes.txt", ".former/notes.txt"),
    *("tensorboard/events", "wandb/debug.log", "details/classes.csv", ".notes.tmp", "pairs.csv", "README.md"),
)


class Sandbox:
    """A home, a working folder and a folder of images, in a folder of its own; and what of it is the user's."""

    def __init__(self, root: Path, templates: Path, random: random.Random):
        self.root, self.random = root, random
        self.home, self.work = root / "home", root / "home" / "work"
        self.images = self.work / "photos"
        shutil.copytree(templates / "photos", self.images)
        for name in ("run", "older", "emb", "export"):
            shutil.copytree(templates / name, self.work / name, symlinks=True)
        ours = {path for name in ("run", "older", "emb", "export") for path in (self.work / name).rglob("*")}
        for folder in (self.home, self.work, self.images, self.work / "foreign", self.work / "above"):
            self.scatter(folder, 4)
        for name in ("run", "older", "emb", "export"):
            self.scatter(self.work / name, 5)
        shutil.copytree(templates / "photos", self.work / "above" / "photos")
        (self.work / "empty").mkdir()
        (self.work / "link").symlink_to(random.choice(("run", "photos", "foreign", "emb")))
        (self.work / "link.html").symlink_to("foreign/index.html")
        (self.work / "run" / "photos").symlink_to(self.images)
        self.mine = {path: self.content(path) for path in root.rglob("*") if path not in ours and not self.folder(path)}

    def scatter(self, folder: Path, count: int) -> None:
        for name in self.random.sample(NAMES, count):
            path = folder / name
            if not os.path.lexists(path) and not any(parent.is_file() for parent in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"mine {self.random.random()}")

    @staticmethod
    def folder(path: Path) -> bool:
        return path.is_dir() and not path.is_symlink()

    @staticmethod
    def content(path: Path) -> bytes | str:
        return os.readlink(path) if path.is_symlink() else path.read_bytes()

    def missing(self) -> list[str]:
        return [
            str(path.relative_to(self.root))
            for path, content in self.mine.items()
            if not os.path.lexists(path) or self.folder(path) or self.content(path) != content
        ]


def spelled(path: str, sandbox: Sandbox) -> str:
    """One of the ways to write a path below the working folder."""
    absolute = str(sandbox.work / path)
    ways = [path, path + "/", path + "//", f"./{path}", f"photos/../{path}", absolute, absolute + "/", f"{absolute}/."]
    return sandbox.random.choice(ways)


def command(sandbox: Sandbox) -> list[str]:
    """A command line of a verb that writes."""
    choose = sandbox.random.choice
    folder = lambda: spelled(choose(PLACES), sandbox)
    data = lambda: spelled(choose(("photos", "photos", "above/photos", ".", "link")), sandbox)
    replacing = lambda: choose(([], ["--overwrite"], ["--overwrite"]))
    verbs: dict[str, Callable[[], list[str]]] = {
        "pretrain": lambda: [
            "pretrain",
            data(),
            "--run",
            folder(),
            *choose(([], ["--overwrite"], ["--resume"])),
            *TINY,
        ],
        "recipe": lambda: ["pretrain", data(), "-c", recipe(sandbox, folder()), *TINY],
        "evaluate": lambda: [
            "evaluate",
            choose(("run", "older", "run/encoder")),
            data(),
            *choose(([], ["--out", folder()])),
        ],
        "embed": lambda: ["embed", "run", data(), "--out", folder(), *replacing()],
        "index": lambda: ["index", choose(("emb", "emb", folder()))],
        "search": lambda: ["search", "emb", "photos/a/0.png", "--html", page(sandbox)],
        "duplicates": lambda: [
            "duplicates",
            "emb",
            "--threshold",
            "0.9",
            "--html",
            page(sandbox),
            "--csv",
            page(sandbox),
        ],
        "export": lambda: ["export", "run", "--out", folder(), *replacing()],
        "report": lambda: ["report", choose(("run", "older", folder())), *choose(([], ["--out", page(sandbox)]))],
        "views": lambda: ["views", data(), "--out", page(sandbox), "--image-size", "16"],
    }
    weights = [4, 2, 2, 4, 1, 1, 1, 3, 2, 2]
    return verbs[sandbox.random.choices([*verbs], weights)[0]]()


PLACES = (
    *("run", "run", "run", "older", "emb", "export", "new", "new/deep", "empty", "foreign", "above", "link"),
    *("photos", "photos/a", "photos/new", ".", "..", "link/new"),
)


def page(sandbox: Sandbox) -> str:
    """Where a page, picture or table is to go."""
    names = ("new.html", "foreign/index.html", "foreign/report.html", "run/report.html", "link.html", "photos/a/0.png")
    return spelled(
        sandbox.random.choice((*names, "photos/new.png", "run/pictures/holiday.png", "empty", "views.png")), sandbox
    )


def recipe(sandbox: Sandbox, folder: str) -> str:
    """A recipe that says where."""
    says = sandbox.random.choice(
        ({"run": folder, "overwrite": True}, {"run": folder}, {"overwrite": True}, {"out": folder})
    )
    path = sandbox.root / "recipe.yaml"
    path.write_text(json.dumps(says))
    return str(path)


def templates(root: Path) -> None:
    """A folder of images, and a run, embeddings and an export of ours."""
    for label in range(2):
        (root / "photos" / "ab"[label]).mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(12 * label + number).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / "photos" / "ab"[label] / f"{number}.png")
    os.chdir(root)
    for line in (
        ["pretrain", "photos", "--run", "run", *TINY],
        ["embed", "run", "photos", "--out", "emb"],
        ["export", "run", "--out", "export"],
    ):
        if cli.main(line):
            raise SystemExit(1)
    shutil.copytree("run", "older")
    record = json.loads(Path("older/run.json").read_text())
    Path("older/run.json").write_text(
        json.dumps({key: record[key] for key in record if key not in ("files", "format")})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 of 200 cases")
    parser.add_argument("--only", default="A8", help="for the sake of the others")
    parser.add_argument("--json", type=Path, help="file of the rows; one that is there is gone on with")
    arguments = parser.parse_args()
    for verb in manual.verbs():  # a child begins with everything imported
        importlib.import_module(f"ssl_kit.verbs.{verb}")
    rows = Rows(arguments.json.resolve() if arguments.json else None)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        log = root / "log"
        child = fork_warmed(lambda: templates(root / "templates"), log)
        child.join()
        if child.exitcode:
            raise SystemExit(tail(log, 30))

        def trial(number: int, generator: random.Random) -> str | None:
            sandbox = Sandbox(root / f"{number}", root / "templates", generator)
            line = command(sandbox)

            def work() -> None:
                os.environ["HOME"] = str(sandbox.home)
                os.environ["XDG_DATA_HOME"] = str(root / "keys")
                os.chdir(sandbox.work)
                sys.exit(cli.main(line))

            (trial_log := root / f"log-{number}").touch()
            child = fork_warmed(work, trial_log)
            child.join()
            gone = sandbox.missing()
            shown = f"ssl-kit {' '.join(line)}"
            shutil.rmtree(sandbox.root)
            if gone:
                return f"{shown}: {', '.join(gone)} gone or changed"
            if child.exitcode not in (0, 2):
                return f"{shown}: ended with {child.exitcode}: {tail(trial_log, 3)}"
            ended[child.exitcode] += 1
            return None

        ended = {0: 0, 2: 0}
        rows.run("A8", "one command, nothing of the user's is gone", 5 if arguments.quick else 200, trial)
        print(f"carried out {ended[0]}, refused {ended[2]}")
    if any(row["survived"] < row["tried"] for row in rows.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
