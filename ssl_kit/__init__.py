"""Self-supervised pretraining for images: a folder in; an encoder, an honest verdict and a searchable index out.

The verbs of the command line are functions here: `ssl_kit.pretrain(...)`, `ssl_kit.evaluate(...)`, ..., and
`ssl_kit.Index.load("EMB").search(images, k=12)` searches an indexed embeddings folder. They are imported when first
used, so that importing this package does no work. `ssl_kit.views` and `ssl_kit.report` are packages too; called, they
are the verbs.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
_VERBS = (
    *("doctor", "drift", "duplicates", "embed", "evaluate", "export", "finetune"),
    *("index", "pack", "plan", "pretrain", "search"),
)
_HOMES = {
    **dict.fromkeys((*_VERBS, "load_run", "Run"), "ssl_kit.api"),
    "Index": "ssl_kit.embeddings.search",
    "SSLTransformer": "ssl_kit.estimator",
    **dict.fromkeys(("Monitor", "ViewLoader"), "ssl_kit.verbs.loops"),
    "Views": "ssl_kit.views.batch",
}
__all__ = sorted([*_HOMES, "report", "views"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in ("report", "views"):
        return import_module(f"ssl_kit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_kit' has no attribute {name!r}; it has {', '.join(__all__)}")
    import_module("ssl_kit.core.process").prepare()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
