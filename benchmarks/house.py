"""The package as a house: how many rooms, how large, how far from a recipe to the loss. It prints, it does not fail.

    python benchmarks/house.py [--since COMMIT] [--json FILE]     # or: make house

Code lines are neither blank, comment nor docstring. With --since, lines are also told relative to that commit. The way
to the loss is what has to be read to follow a step: the files of ours on the call stack when the loss is asked for, and
on the stack when the method is built, in a real run of one step of each method.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssl_kit"
SMALL, LONG = 120, 60  # lines: a file that has one reader; a function
VIT = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank, comment nor docstring."""
    text = path.read_text(encoding="utf-8")
    told = {line for node in ast.walk(ast.parse(text)) for line in _docstring(node)}
    between = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in between:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - told)


def _docstring(node: ast.AST) -> range:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if not documented or ast.get_docstring(node, clean=False) is None:  # type: ignore[arg-type]
        return range(0)
    first = node.body[0]  # type: ignore[attr-defined]
    return range(first.lineno, first.end_lineno + 1)


def rooms(package: Path) -> list[Path]:
    """The files of a package, without `__init__` and `__main__`."""
    return sorted(path for path in package.rglob("*.py") if not path.name.startswith("__"))


def importers(package: Path) -> dict[str, set[str]]:
    """Module -> the modules that import it."""
    names = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in rooms(package)}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inside = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = [node.module, *(f"{node.module}.{one}" for one in inside)]
            for one in set(inside) & found.keys() - {name}:
                found[one].add(name)
    return found


def long_functions(package: Path) -> list[str]:
    """Functions of more than 60 lines, docstring aside."""
    found = []
    for path in rooms(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1 - len(_docstring(node))  # type: ignore[operator]
                if lines > LONG:
                    found.append(f"{path.relative_to(package)}:{node.name} {lines}")
    return found


def methods() -> list[type]:
    """The classes that `ssl_kit/methods/` defines."""
    from ssl_kit.methods.method import Method

    found = []
    for module in pkgutil.iter_modules([str(PACKAGE / "methods")]):
        for _, kind in inspect.getmembers(importlib.import_module(f"ssl_kit.methods.{module.name}"), inspect.isclass):
            if issubclass(kind, Method) and kind is not Method and kind.__module__.endswith(module.name):
                found.append(kind)
    return found


def way(kind: type) -> list[Path]:
    """The files of ours that lead to a method's loss, in the order in which they are met."""
    from ssl_kit.verbs.pretrain import pretrain

    own: Any = kind
    codes = {own.__init__.__code__, own.loss.__code__}
    seen: dict[Path, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            stack = [Path(one.f_code.co_filename) for one, _ in traceback.walk_stack(frame)]
            seen.update(dict.fromkeys(path for path in reversed(stack) if PACKAGE in path.parents))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        _images(Path(folder) / "images")
        spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": {"encoder": _encoder(own)}}
        options: dict[str, Any] = {"image_size": 16, "batch_size": 8, "epochs": 1, "threads": 1}
        sys.setprofile(note)
        try:
            pretrain(str(Path(folder) / "images"), run=str(Path(folder) / "run"), method=spec, **options)
        finally:
            sys.setprofile(None)
    return list(seen)


def _encoder(kind: Any) -> dict[str, Any]:
    name, args = kind.default_encoder((16, 16))
    args = {**args, **VIT} if name.startswith("vit") else {"channels": [8, 8, 8, 8]}
    return {"class_path": "ssl_kit.encoders.encoder.Encoder", "init_args": {"name": name, "args": args}}


def _images(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def before(commit: str, place: Path) -> Path:
    """The tree of a commit, laid out in `place`."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
        tree.extractall(place, filter="data")
    return place


def counted(root: Path) -> dict[str, Any]:
    """What can be counted in a tree without running it."""
    package = root / "ssl_kit"
    files, texts = rooms(package), [path.read_text(encoding="utf-8") for path in rooms(package)]
    readers = importers(package)
    alone = sorted(
        str(path.relative_to(package))
        for path in files
        if len(path.read_text(encoding="utf-8").splitlines()) < SMALL
        and path.parent.name not in ("verbs", "methods")
        and len(readers[".".join(path.relative_to(root).with_suffix("").parts)]) == 1
    )
    sizes = {str(path.relative_to(package)): len(text.splitlines()) for path, text in zip(files, texts, strict=True)}
    largest = max(sizes, key=sizes.__getitem__)
    lines = lambda folder: sum(code_lines(path) for path in (root / folder).rglob("*.py"))
    return {
        "package files": len(files),
        "code lines": sum(map(code_lines, files)),
        "files with one importer under 120 lines": alone,
        "functions over 60 lines": long_functions(package),
        "largest file": f"{largest} {sizes[largest]}",
        "the word Any": sum(len(re.findall(r"\bAny\b", text)) for text in texts),
        "type: ignore": sum(text.count("# type: ignore") for text in texts),
        "locals()": sum(text.count("locals()") for text in texts),
        "code lines of tests": lines("tests"),
        "code lines of benchmarks": lines("benchmarks"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", help="a commit to compare with")
    parser.add_argument("--json", type=Path, help="write what is printed to this file")
    arguments = parser.parse_args()
    now = counted(ROOT)
    then: dict[str, Any] = {}
    if arguments.since:
        with tempfile.TemporaryDirectory() as folder:
            then = counted(before(arguments.since, Path(folder)))
    rows = []
    for name, value in now.items():
        told = f"{len(value)}: {', '.join(value)}" if isinstance(value, list) else value
        row = {"id": name, "now": told}
        if name in then:
            former = then[name]
            row["before"] = len(former) if isinstance(former, list) else former
            if isinstance(value, int) and former:
                row["ratio"] = round(value / former, 3)
        rows.append(row)
    for kind in methods():
        files = way(kind)
        lines = sum(map(code_lines, files))
        rows.append({"id": f"way to the loss of {kind.__name__}", "now": f"{len(files)} files, {lines} code lines"})
        rows[-1]["files"] = ", ".join(str(path.relative_to(PACKAGE)) for path in files)
    for row in rows:
        print(" · ".join(str(value) if key == "id" else f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
