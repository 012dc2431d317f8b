"""Settings: what a verb can be told, one frozen dataclass for each.

Its fields are the options of the command line and the arguments of the function, its docstring is their help; recipes
and run records are made of it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_type_hints

from ssl_kit.core.errors import check_numbers

S = TypeVar("S")
R = TypeVar("R")


def verb(settings: type[S]) -> Callable[[Callable[[S], R]], Callable[..., R]]:
    """Makes the function of a verb: it is called with the fields of `settings`, and its body is given the record.

    Numbers out of their range are a `UserError` before anything else.
    """

    def decorate(body: Callable[[S], R]) -> Callable[..., R]:
        @functools.wraps(body)
        def call(*given: Any, **named: Any) -> R:
            record = settings(*given, **named)
            check_numbers(vars(record))
            return body(record)

        returned = get_type_hints(body)["return"]
        signature = inspect.signature(settings).replace(return_annotation=returned)
        vars(call).update(__signature__=signature)
        call.__annotations__ = {**get_type_hints(settings), "return": returned}
        call.__doc__ = f"{body.__doc__}\n\n{inspect.getdoc(settings)}"
        del call.__wrapped__  # a reader of signatures would look there
        return call

    return decorate


def typed(command: str, settings: object, *names: str) -> str:
    """A command with those of the options `names` that are not at their default, as one would type them."""
    return " ".join([command, *_typed(settings, names)])


def _typed(settings: object, names: tuple[str, ...], prefix: str = "--") -> Iterator[str]:
    for one in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, one.name)
        if one.name not in names or value == one.default:
            continue
        if is_dataclass(value):
            yield from _typed(value, tuple(inner.name for inner in fields(value)), f"{prefix}{one.name}.")
        else:
            text = str(list(value) if isinstance(value, tuple) else value)
            yield f"{prefix}{one.name}".replace("_", "-") + ("" if value is True else f" {shlex.quote(text)}")


class VerbPackage(ModuleType):
    """A package that shares its name with a verb: called, it is that verb."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Calls the verb."""
        return getattr(import_module("ssl_kit.api"), self.__name__.rpartition(".")[2])(*given, **named)


class Option(NamedTuple):
    """A field of a verb's `Settings`; `default` is None where there is none."""

    name: str
    positional: bool
    several: bool
    default: ast.expr | None
    text: str


def parsed(path: Path, kind: type[ast.FunctionDef] | type[ast.ClassDef], name: str) -> Any:
    """A function or class of a file, by its name, read without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, kind) and node.name == name)


def options(path: Path) -> list[Option]:
    """The fields of the `Settings` in the file of a verb."""
    settings = parsed(path, ast.ClassDef, "Settings")
    texts = _argument_texts(ast.get_docstring(settings) or "")
    found, positional = [], True
    for node in settings.body:
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        if kind == "KW_ONLY":
            positional = False
        elif kind:
            name = ast.unparse(node.target)
            found.append(Option(name, positional, kind.startswith("list"), node.value, texts.get(name, "")))
    return found


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
