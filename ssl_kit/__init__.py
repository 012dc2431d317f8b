"""Self-supervised pretraining for images: a folder in; an encoder, an honest verdict and a searchable index out.

The verbs of the command line are functions here: `ssl_kit.pretrain(...)`, `ssl_kit.evaluate(...)`, ... They are
imported when first used, so that importing this package does no work. (`ssl_kit.views` and `ssl_kit.report` are
packages; those two verbs are `ssl_kit.verbs.views.views` and `ssl_kit.verbs.report.report`.)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["embed", "evaluate", "index", "pretrain", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ssl_kit' has no attribute {name!r}")
    return getattr(import_module(f"ssl_kit.verbs.{name}"), name)
