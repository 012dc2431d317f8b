"""Self-supervised pretraining for images: a folder in; an encoder, an honest verdict and a searchable index out.

The verbs of the command line are functions here: `ssl_kit.pretrain(...)`, `ssl_kit.evaluate(...)`, ..., and
`ssl_kit.Index.load("EMB").search(images, k=12)` searches an indexed embeddings folder. They are imported when first
used, so that importing this package does no work. (`ssl_kit.views` and `ssl_kit.report` are packages; those two verbs
are `ssl_kit.verbs.views.views` and `ssl_kit.verbs.report.report`.)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Index", "doctor", "duplicates", "embed", "evaluate", "export", "finetune", "index", "pretrain", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ssl_kit' has no attribute {name!r}")
    import_module("ssl_kit.core.process").prepare()
    home = "ssl_kit.embeddings.search" if name == "Index" else f"ssl_kit.verbs.{name}"
    return getattr(import_module(home), name)
