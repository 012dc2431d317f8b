"""numba's cache on disk for one function, in the cache folder of this package; a cache that fails costs time only.

By itself numba looks for a place beside the source file too, and passes on what goes wrong there: a disk that fills up
would end a training, and a file that a power cut has emptied every command from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba import config, njit, types
from numba.core import caching
from numba.extending import intrinsic

from ssl_kit.core.console import warn
from ssl_kit.core.process import prepare


@intrinsic
def pointer(typing_context: object, address: Any) -> Any:
    """An integer address as the void pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: object, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


def cached(function: Callable[..., object]) -> Any:
    """Compiles a function that lets other threads run; where nothing can be kept, says so: each process compiles."""
    made: Any = njit(nogil=True, error_model="numpy")(function)
    prepare()
    config.reload_config()  # numba may have been loaded before
    try:
        made._cache = _Cache(function)
    except RuntimeError:  # numba's word for no place to write to
        _say("no folder for caches can be written to")
    return made


def _say(reason: str) -> None:
    warn(f"views are compiled anew, which takes half a minute: {reason}; XDG_CACHE_HOME names another place")


# before numba 0.62 its name began with an underscore
_LOCATOR: Any = getattr(caching, "UserProvidedCacheLocator", None) or getattr(
    caching, "_UserProvidedCacheLocator", None
)


class _InFolder(caching.CompileResultCacheImpl):
    _locator_classes = [_LOCATOR]  # noqa: RUF012


class _Cache(caching.FunctionCache):
    _impl_class = _InFolder

    def load_overload(self, sig: object, target_context: Any) -> Any:
        """The compiled function, or None when it is not there or damaged."""
        with self._given_up():
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # the bytes of a damaged file may mean anything
                self.flush()
        return None

    def save_overload(self, sig: object, data: object) -> None:
        """Keeps it, if it can be kept."""
        with self._given_up():
            super().save_overload(sig, data)

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.disable()
            _say(f"{error.strerror} in {self.cache_path}")
