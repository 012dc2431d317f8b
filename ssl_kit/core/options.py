"""Options as they are typed: the fields of a verb's `Settings`, read from the source, and what is said of them.

Nothing is imported for that: help, and what is told before any library is loaded, are made of it.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """A field of a verb's `Settings`; `default` is None where there is none.

    Attributes:
        kind: its annotation, choices written out.
        group: the comment above it, or above those before it: under which heading the help lists it.
    """

    name: str
    positional: bool
    several: bool
    default: ast.expr | None
    text: str
    kind: str
    group: str


def parsed(path: Path, kind: type[ast.FunctionDef] | type[ast.ClassDef], name: str) -> Any:
    """A function or class of a file, by its name, read without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, kind) and node.name == name)


@functools.cache
def options(path: Path) -> list[Option]:
    """The fields of the `Settings` in the file of a verb."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    texts = _argument_texts(ast.get_docstring(settings) or "")
    found, positional, group, choices = [], True, "", _Choices(tree, path)
    for node in settings.body:
        kind = ast.unparse(choices.visit(node.annotation)) if isinstance(node, ast.AnnAssign) else ""
        if kind and (heading := re.fullmatch(r"    # (.*)", lines[node.lineno - 2])):
            group = heading[1]
        if kind == "KW_ONLY":
            positional = False
        elif isinstance(node, ast.AnnAssign):
            name = ast.unparse(node.target)
            several = kind.startswith("list")
            found.append(Option(name, positional, several, node.value, texts.get(name, ""), kind, group))
    return found


def _homes(tree: ast.Module, path: Path) -> dict[str, Path]:
    """The files of ours that the names in a file come from."""
    package = next((parent for parent in path.absolute().parents if parent.name == "ssl_kit"), path)
    return {
        alias.name: package.parent.joinpath(*node.module.split(".")).with_suffix(".py")
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ssl_kit.")
        for alias in node.names
    }


class _Choices(ast.NodeTransformer):
    """Writes the choices out that an annotation names: `Switch` is `Literal['auto', 'on', 'off']`."""

    def __init__(self, tree: ast.Module, path: Path):
        self.tree, self.homes = tree, _homes(tree, path)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """The choices that a module of ours gives this name, or the name itself."""
        for line in self.tree.body:
            if isinstance(line, ast.Assign) and node.id in map(ast.unparse, line.targets):
                return line.value if ast.unparse(line.value).startswith("Literal[") else node
        home = self.homes.get(node.id)
        if home is None or not home.is_file():
            return node
        return _Choices(ast.parse(home.read_text(encoding="utf-8")), home).visit_Name(node)


class Class(NamedTuple):
    """A class of ours, by its file and name."""

    path: Path
    name: str


class Part(NamedTuple):
    """What a class takes: the annotation with its choices written out, and the class of ours that it names, if any."""

    kind: str
    of: Class | None


@functools.cache
def parts(of: Class) -> dict[str, Part] | None:
    """What a class takes by name, arguments of its constructor or fields; None where the source does not tell."""
    if not of.path.is_file():
        return None
    tree = ast.parse(of.path.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == of.name), None)
    if found is None:
        return None
    made = next((one for one in found.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if made is not None:
        if made.args.kwarg is not None:
            return None
        taken = [(one.arg, one.annotation) for one in [*made.args.args[1:], *made.args.kwonlyargs]]
    elif any("dataclass" in ast.unparse(one) for one in found.decorator_list):
        taken = [(ast.unparse(one.target), one.annotation) for one in found.body if isinstance(one, ast.AnnAssign)]
    else:
        base = class_named(ast.unparse(found.bases[0]) if found.bases else "", tree, of.path)
        return None if base is None else parts(base)
    choices, known = _Choices(tree, of.path), {}
    for name, kind in taken:
        told = "" if kind is None else ast.unparse(kind)
        known[name] = Part(
            "" if kind is None else ast.unparse(choices.visit(kind)),
            class_named(told.removesuffix(" | None"), tree, of.path),
        )
    return known


def class_named(name: str, tree: ast.Module | None, path: Path) -> Class | None:
    """The class of ours that `name` means in a file; None where it means none."""
    tree = tree or ast.parse(path.read_text(encoding="utf-8"))
    home = path if any(isinstance(one, ast.ClassDef) and one.name == name for one in tree.body) else None
    home = home or _homes(tree, path).get(name)
    return None if home is None or not home.is_file() else Class(home, name)


_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}
_WORDS |= {"dict": "a mapping such as {name: value}", "list": "a list such as [1, 2]", "tuple": "a list such as [1, 2]"}


def in_words(kind: str) -> str:
    """What a type is called where a user reads of it: `float | None` is "a number"."""
    kind = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kind).replace("typing.", "")
    try:
        return " or ".join(dict.fromkeys(_told(ast.parse(kind, mode="eval").body)))
    except SyntaxError:
        return kind


def _told(node: ast.expr) -> list[str]:
    """Each of the types that an annotation allows; that it may be left out is not said."""
    if isinstance(node, ast.BinOp):
        return _told(node.left) + _told(node.right)
    inside = node.slice if isinstance(node, ast.Subscript) else node
    every = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
    name = ast.unparse(node.value if isinstance(node, ast.Subscript) else node)
    if name in ("Union", "Optional"):
        return [word for one in every for word in _told(one)]
    if name == "Literal":
        return [str(one.value) for one in every if isinstance(one, ast.Constant)]
    return [] if name in ("None", "NoneType", "null") else [_WORDS.get(name, name)]


def dashed(name: str) -> str:
    """An option as it is typed: `batch_size` is `--batch-size`, and `k` is `-k`."""
    return f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"


def underscored(argument: str) -> str:
    """`--max-bad 0.1` is `--max_bad 0.1`, and `-k 12` is `--k 12`."""
    if re.fullmatch(r"-[a-bd-z]", argument):  # `-k 12` is `--k 12`; -c is a recipe
        return "-" + argument
    match = re.match(r"--[A-Za-z][\w.-]*", argument)
    return match.group().replace("-", "_").replace("__", "--", 1) + argument[match.end() :] if match else argument


def wrong_value(name: str, kind: str, got: object) -> str:
    """What is said of a value that an option cannot have."""
    words = in_words(kind)
    words = f"one of {words.replace(' or ', ', ')}" if words.count(" or ") > 1 else words
    return f"{dashed(name)}: wanted {words}, got {str(got)!r}"


def fits(kind: str, text: str) -> bool:
    """Whether typed text may be a value of a type; True where only the type itself can tell."""
    names = set(re.findall(r"\w+", re.sub(r"Literal\[[^]]*\]", "", kind)))
    if not names <= {"None", "bool", "int", "float", "tuple", "dict"}:
        return True
    if text.lower() in ("null", "true", "false"):
        return ("None" if text.lower() == "null" else "bool") in names
    if text[:1] in ("[", "{"):
        return bool(names & {"tuple", "dict"})
    number = re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?\.?(inf|nan)", text, re.IGNORECASE)
    whole = re.fullmatch(r"[-+]?\d[\d_]*", text)
    choices = _told(ast.parse(kind, mode="eval").body) if "Literal" in kind else []
    return text in choices or bool(("float" in names and number) or ("int" in names and whole))


def _argument_texts(docstring: str) -> dict[str, str]:
    """The `Args:` section of a Google-style docstring: name -> text."""
    section = re.search(r"Args:\n(.*?)(?:\n\n|\n\S|\Z)", docstring, re.DOTALL)
    texts: dict[str, str] = {}
    name = ""
    for line in (section.group(1) if section else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2).rstrip()
        elif name:
            texts[name] += " " + line.strip()
    return texts
