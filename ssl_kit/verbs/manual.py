"""The help: `ssl-kit --help`, and `ssl-kit VERB --help` from what the verb's file says of its `Settings`.

Which heading an option stands under is the comment above it there. Read from the source: nothing is imported for it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from ssl_kit.core.options import Option, dashed, options, parsed

VERBS = Path(__file__).parent
WITH_RECIPE = ("pretrain", "views", "plan")  # verbs that take -c
_COMMON = (
    ("--json", "print one JSON document on stdout; everything else goes to stderr"),
    ("--quiet", "print results and warnings only"),
    ("--verbose", "print every choice with its reason, too"),
    ("--help", "this text"),
    ("--help-all", "every option with its type, those of the method and the trainer included (slow)"),
)
_RECIPE = (
    "-c RECIPE",
    "a recipe: YAML file or packaged name (ssl-kit recipes); may be repeated, the last and options win",
)
_NETWORK = ("--encoder MODULE:FUNCTION", "a network of your own, to train or that a folder names; with --allow MODULE")
_ALLOW = (
    "--allow MODULE",
    "code of this module may be run: classes of a recipe, functions of options; may be repeated",
)
_ORDER = (
    *("views", "pretrain", "evaluate", "report", "finetune", "embed", "index", "search", "duplicates", "drift"),
    *("export", "pack", "plan", "recipes", "doctor"),
)
_WIDEST = 110  # columns of a line


def verbs() -> list[str]:
    """Files of `verbs/` that define a function of their own name, in the order of use."""
    # not glob, which finds nothing, without a word, where too many files are open
    files = [VERBS / name for name in os.listdir(VERBS) if name.endswith(".py")]
    found = [path.stem for path in files if f"\ndef {path.stem}(" in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def overview() -> str:
    """`ssl-kit --help`."""
    lines = ["usage: ssl-kit VERB ...", "", "Self-supervised pretraining for your own images.", ""]
    lines += _rows((verb, _summary(verb)) for verb in verbs())
    return "\n".join([*lines, "", "ssl-kit VERB --help tells more; ssl-kit --version the version."])


def verb_help(verb: str) -> str:
    """`ssl-kit VERB --help`."""
    found = options(VERBS / f"{verb}.py")
    positional = [option for option in found if option.positional]
    names = [option.name.upper() if option.default is None else f"[{option.name.upper()}]" for option in positional]
    lines = [" ".join(["usage: ssl-kit", verb, *names, "[options]"]), "", *_wrapped(_summary(verb), "")]
    groups: dict[str, list[tuple[str, str]]] = {"": [(option.name.upper(), option.text) for option in positional]}
    for option in found:
        if not option.positional:
            groups.setdefault(option.group, []).append((dashed(option.name), option.text + _usual(option)))
    groups["A recipe, and code of your own"] = _own(verb, {option.name for option in found})
    groups["In every command"] = list(_COMMON)
    for heading, rows in groups.items():
        lines += ["", *([f"{heading}:"] if heading else []), *_rows(rows)] if rows else []
    examples = examples_of(verb)
    return "\n".join([*lines, *(["", "Examples:"] if examples else []), *(f"  {line}" for line in examples)])


def examples_of(verb: str) -> list[str]:
    """The command lines that the file of a verb gives as examples."""
    text = ast.get_docstring(parsed(VERBS / f"{verb}.py", ast.ClassDef, "Settings")) or ""
    return [line.strip() for line in text.partition("Examples:\n")[2].splitlines() if line.strip()]


def _own(verb: str, known: set[str]) -> list[tuple[str, str]]:
    """Rows of what is the user's own: which of them a verb can use."""
    network = verb == "pretrain" or bool(known & {"encoder", "run"})
    code = verb in WITH_RECIPE or network or "reader" in known
    rows = [_RECIPE] * (verb in WITH_RECIPE) + [_NETWORK] * network
    return rows + [_ALLOW] * code


def _usual(option: Option) -> str:
    """The default, where there is one that says something."""
    usual = option.default
    if usual is None or isinstance(usual, ast.Call):
        return ""
    shown = str(usual.value) if isinstance(usual, ast.Constant) else ast.unparse(usual)
    return "" if shown in ("None", "()", "False", "BASELINES") else f" [{shown}]"


def _summary(verb: str) -> str:
    function = parsed(VERBS / f"{verb}.py", ast.FunctionDef, verb)
    return (ast.get_docstring(function) or "").split("\n", 1)[0]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names on the left, their texts beside them, wrapped at the width of the terminal."""
    lines = []
    for name, text in rows:
        beside = name if len(name) <= 21 else ""
        lines += [] if beside else [f"  {name}"]
        lines += _wrapped(f"  {beside:<21} {text}", " " * 24)
    return lines


def _wrapped(text: str, later: str) -> list[str]:
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, max(50, width), subsequent_indent=later, break_on_hyphens=False, break_long_words=False)


def _default_in(said: str) -> str:
    usual = said.rpartition("default:")[2] if "default:" in said else ""
    return f" [{' '.join(usual.split())}]" * (usual.strip() not in ("", "null", "False"))


def plain_types(text: str) -> str:
    """What the parser of all options says of itself, in the words and the spelling of everything else."""
    inside = r"((?:[^()]|\([^()]*\))*)"
    text = re.sub(rf"\s*\((?:required,\s+)?type:\s{inside}\)", lambda found: _default_in(found[1]), text)
    text = re.sub(r"--[a-z][\w.]*", lambda found: found[0].replace("_", "-"), text)
    return re.sub(r"\Ausage: (ssl-kit \w+)\s.*?(\n\n|\Z)", r"usage: \1 [options]\2", text, flags=re.DOTALL)


def rewrapped(text: str) -> str:
    """The same at the width of all other help: argparse knows the terminal, but not what `plain_types` changes."""
    lines: list[str] = []
    for line in text.splitlines():
        if not lines or not re.match(r" {8,}\S", line) or not lines[-1].startswith("  "):
            lines.append(line)
        elif re.search(r"\w-$", lines[-1]):  # a word that was broken at its hyphen
            lines[-1] += line.strip()
        else:
            named = "  " in lines[-1].strip()  # the text beside the name has begun
            lines[-1] += f"{' ' if named else '  '}{line.strip()}"
    made: list[str] = []
    for line in lines:
        entry = re.fullmatch(r"  (\S.*?)  +(\S.*)", line)
        made += _rows([(entry[1], entry[2])]) if entry else _wrapped(line, "  ") or [""]
    return "\n".join(made)
