"""Sphinx: `make docs`. MyST pages, furo, the API from docstrings; warnings are errors and no page fetches anything."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

import ssl_kit  # noqa: E402

project = "ssl_kit"
version = release = ssl_kit.__version__
html_title = f"ssl_kit {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "measured", "mathml"]
exclude_patterns = ["_build", "examples", "extensions"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False
html_static_path: list[str] = []

default_role = "code"  # docstrings are written with single backticks, see `setup`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures say less than the docstrings, which state shapes and units
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# names outside of ssl_kit cannot be looked up without the network; those inside must exist
nitpick_ignore_regex = [("py:.*", r"(?!ssl_kit\.).*")]

_CODE = re.compile(r"(?<![`:])`([^`\n]+)`(?!`)")


def _double_backticks(app, what, name, thing, options, lines):
    """Single backticks of docstrings to double ones, before napoleon takes a colon inside for the end of a type."""
    lines[:] = [_CODE.sub(r"``\1``", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _double_backticks, priority=100)
