"""Recipes and options that name what must not run: S3 of `hostile.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

import ssl_kit.verbs.pretrain  # noqa: F401  all that it needs is imported before anything is tried
from ssl_kit import cli

OWN = "canary_module"  # a module of the stranger's own, in reach of Python: importing it leaves a file
FOREIGN = (
    *(
        "os.system",
        "subprocess.Popen",
        "builtins.exec",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "pickle.loads",
    ),
    *(f"{OWN}.Method", "importlib.import_module", "timm.create_model", "pytorch_lightning.Trainer", "shutil.rmtree"),
)
# what ssl_kit's own modules have imported
REEXPORTED = (
    *("ssl_kit.verbs.pretrain.os.system", "ssl_kit.verbs.pretrain.shutil.rmtree", "ssl_kit.core.files.shutil.rmtree"),
    *(
        "ssl_kit.verbs.defaults.importlib.import_module",
        "ssl_kit.embeddings.embeddings.np.load",
        "ssl_kit.verbs.pretrain.Trainer",
    ),
    *("ssl_kit.encoders.encoder.timm.create_model", "ssl_kit.verbs.pretrain.pl.Trainer", "ssl_kit.core.files.tempfile"),
    *("ssl_kit.methods.method.Encoder", "ssl_kit.verbs.pretrain.Path", "ssl_kit..os.system", "ssl_kit.../x.y"),
)
_ENCODER = {"class_path": "ssl_kit.encoders.encoder.Encoder"}


class Attempt(NamedTuple):
    """Arguments of `ssl-kit pretrain DATA` and how they are called in a report."""

    name: str
    arguments: list[str]


def attempts(place: Path) -> Iterator[Attempt]:
    """Every path in every place of a recipe and of the command line where one may stand, and recipes that are bombs."""
    for path in (*FOREIGN, *REEXPORTED):
        method = {"class_path": "ssl_kit.methods.simclr.SimCLR"}
        spec = {"class_path": path, "init_args": {"command": "true"}}
        recipes = {
            "method": {"method": spec},
            "method in one word": {"method": path},
            "encoder": {"method": method | {"init_args": {"encoder": spec}}},
            "optimiser": {"method": method | {"init_args": {"encoder": _ENCODER, "optim": spec}}},
            "callbacks": {"trainer": {"callbacks": [spec]}},
            "logger": {"trainer": {"logger": spec}},
            "views": {"views": spec},
        }
        for where, recipe in recipes.items():
            file = place / f"{len(list(place.iterdir()))}.yaml"
            file.write_text(yaml.safe_dump(recipe))
            yield Attempt(f"{path}: {where}", ["-c", str(file)])
        yield Attempt(f"{path}: --method", ["--method", path])
        yield Attempt(f"{path}: --method.encoder", ["--method.encoder", path])
        yield Attempt(f"{path}: --trainer.callbacks", [f"--trainer.callbacks={json.dumps([spec])}"])
    canary = place.parent / "canary"
    deep, level = "{a: " * 300 + "1" + "}" * 300, "&a{0} [{1}]"
    bomb = ["x0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    bomb += [f"x{n}: {level.format(n, ', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 12)]
    merges = ["m0: &m0 {a: 1, b: 2}"] + [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40)]
    for name, text in {
        "a Python object": f'method: !!python/object/apply:os.system ["touch {canary}"]',
        "a Python name": "method: !!python/name:os.system",
        "a Python module": f"method: !!python/module:{OWN}",
        "aliases of aliases": "\n".join(bomb),
        "merges of merges": "\n".join(merges),
        "nests": deep,
        "nests in lists": "[" * 50_000,
        "2 MB": "a: " + "x" * 2_000_000,
        "a number of 5,000 digits": "epochs: " + "9" * 5_000,
        "no such date": "epochs: 2020-99-99",
        "no UTF-8": "epochs: \udcff",
        "two documents": "epochs: 1\n---\nepochs: 2",
    }.items():
        file = place / f"{len(list(place.iterdir()))}.yaml"
        file.write_text(text, errors="surrogateescape")
        yield Attempt(f"recipe: {name}", ["-c", str(file)])


def own_module(place: Path) -> Path:
    """Puts the stranger's module in Python's reach; the file that importing it leaves."""
    canary = place / "canary"
    (place / "modules").mkdir()
    (place / "modules" / f"{OWN}.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Method: ...\n")
    sys.path.append(str(place / "modules"))
    return canary


def tried(attempt: Attempt, data: Path, run: Path) -> str:
    """ "refused" when the command line ends with 2 and nothing foreign came into the process, else what happened."""
    before = set(sys.modules)
    code = cli.main(["pretrain", str(data), "--run", str(run), "--limit", "4", "--epochs", "1", *attempt.arguments])
    new = sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
    foreign = [
        name
        for name in new
        if name not in ("ssl_kit", "jsonargparse", "typeshed_client", "docstring_parser", "attr", "attrs")
    ]
    if OWN in sys.modules or code != 2 or (run / "run.json").exists():
        return f"{attempt.name}: ended with {code}, {new}"
    return f"{attempt.name}: imported {foreign}" if foreign else "refused"
