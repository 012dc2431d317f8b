"""Settings: what a verb can be told, one frozen dataclass for each.

Its fields are the options of the command line and the arguments of the function, its docstring is their help; recipes
and run records are made of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

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
