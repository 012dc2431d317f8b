"""Settings: what a verb can be told, one frozen dataclass for each.

Its fields are the options of the command line and the arguments of the function, its docstring is their help; recipes
and run records are made of it.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from ssl_kit.core.errors import check_numbers

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

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


def typed(command: str, settings: DataclassInstance, *names: str) -> str:
    """A command with those of the options `names` that are not at their default, as one would type them."""
    return " ".join([command, *_typed(settings, names)])


def _typed(settings: DataclassInstance, names: tuple[str, ...], prefix: str = "--") -> Iterator[str]:
    for one in fields(settings):
        value = getattr(settings, one.name)
        if one.name not in names or value == one.default:
            continue
        if is_dataclass(value) and not isinstance(value, type):
            yield from _typed(value, tuple(inner.name for inner in fields(value)), f"{prefix}{one.name}.")
        else:
            text = str(list(value) if isinstance(value, tuple) else value)
            yield f"{prefix}{one.name}".replace("_", "-") + ("" if value is True else f" {shlex.quote(text)}")


class VerbPackage(ModuleType):
    """A package that shares its name with a verb: called, it is that verb."""

    def __call__(self, *given: object, **named: object) -> object:
        """Calls the verb."""
        return getattr(import_module("ssl_kit.api"), self.__name__.rpartition(".")[2])(*given, **named)
