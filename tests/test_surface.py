"""What users type and import is frozen: a change to it is a reviewed line of tests/golden/surface.txt.

PYTHONPATH=. python tests/test_surface.py     # writes that file anew
"""

import ast
import difflib
import importlib
import inspect
from pathlib import Path

from benchmarks.house import methods
from ssl_kit.core.options import dashed, options
from ssl_kit.verbs import manual

FILE = Path(__file__).parent / "golden" / "surface.txt"


def surface() -> str:
    """Verbs with their options and defaults, methods with their arguments, and the names of the packages."""
    lines = ["# verbs"]
    for verb in manual.verbs():
        for option in options(Path("ssl_kit/verbs") / f"{verb}.py"):
            name = option.name.upper() if option.positional else dashed(option.name)
            lines.append(f"{verb} {name}" + ("" if option.default is None else f" = {ast.unparse(option.default)}"))
    lines.append("# methods")
    for kind in methods():
        for name, argument in inspect.signature(kind).parameters.items():
            usual = "" if argument.default is argument.empty or name == "optim" else f" = {argument.default!r}"
            lines.append(f"{kind.__name__} {name}{usual}")
    lines.append("# names")
    for package in ("ssl_kit", "ssl_kit.encoders", "ssl_kit.evaluation"):
        lines += [f"{package}.{name}" for name in sorted(importlib.import_module(package).__all__)]
    lines.append("# recipes")
    lines += sorted(path.stem for path in Path("recipes").glob("*.yaml"))
    return "\n".join(lines) + "\n"


def test_the_surface_is_as_it_was_reviewed(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    frozen = FILE.read_text(encoding="utf-8")
    changes = "\n".join(difflib.unified_diff(frozen.splitlines(), surface().splitlines(), "frozen", "now", n=0))
    assert not changes, f"{changes}\nif that is meant: PYTHONPATH=. python tests/test_surface.py"


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
