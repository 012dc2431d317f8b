"""Fills the page templates that lie beside this file: autoescape is always on, and the page may load nothing.

The Content-Security-Policy of `base.html` is what keeps "no request leaves the page" true even for a run folder of a
stranger: nothing is fetched, only scripts with this page's nonce run, images are data URIs.
"""

from __future__ import annotations

import secrets
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from ssl_kit import __version__
from ssl_kit.core.files import atomic_file
from ssl_kit.core.owned import check_output


def render(template: str, /, **context: Any) -> str:
    """The HTML of a template of this folder; every string of `context` is escaped unless it is `Markup`."""
    folder = files("ssl_kit.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(nonce=secrets.token_urlsafe(16), version=__version__, **context)


def write_page(path: Path | str, page: str) -> None:
    """Writes a page atomically; what UTF-8 cannot hold (a stray surrogate of a file name) becomes `?`."""
    check_output(path)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
