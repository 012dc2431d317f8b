"""Recipes: YAML files that say how to pretrain. Finding and reading them; `building.py` makes what they name.

A recipe may name classes of ssl_kit only; another module needs `--allow MODULE`. The check comes before any import.
Imports nothing heavy: the command line needs this before it knows what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings

import ssl_kit
from ssl_kit.core.errors import UserError


def folders() -> list[Path]:
    """Where packaged recipes are: inside the installed package, or at the top of a checkout."""
    package = Path(ssl_kit.__file__).parent
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def packaged() -> dict[str, Path]:
    """Name -> file of the recipes that come with ssl_kit."""
    return {path.stem: path for folder in folders() for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name: str) -> dict[str, Any]:
    """The contents of a recipe, by path or by the bare name of a packaged one.

    Raises:
        UserError: there is no such recipe (nearest names), or the file is not a mapping in YAML.
    """
    path = Path(name) if Path(name).is_file() else packaged().get(name)
    if path is None:
        near = difflib.get_close_matches(name, packaged(), n=3, cutoff=0.4) or sorted(packaged())
        raise UserError(f"no recipe file or packaged recipe is called {name!r}; nearest: {', '.join(near)}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds a {type(recipe).__name__}; a recipe is a mapping such as {{epochs: 10}}")
    return recipe


def restrict_imports(allow: Sequence[str] = ()) -> None:
    """From now on recipes and options name classes of ssl_kit and of the modules in `allow` only."""
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["ssl_kit", *allow])


def brief(error: Exception) -> str:
    """The telling part of an argument parser's message, which repeats itself over many lines: which key, what, got."""
    text = str(error)
    keys = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    denied = re.search(r"Importing '([^']+)' is not allowed", text)
    if denied:
        module = denied.group(1).rpartition(".")[0]
        return f"--{keys}: {denied.group(1)} is outside ssl_kit; if you trust that module, add --allow {module}"
    telling = [line for line in lines if "is not accepted" in line or "not a valid" in line.lower()]
    telling = telling or [line for line in lines if "Expected a" in line] or lines or [type(error).__name__]
    given = re.search(r"Given value: ([^\n]+)", text)
    got = f"; got {given.group(1)}" if given and "NestedArg" not in given.group(1) else ""
    return (f"--{keys}: " if keys else "") + telling[0] + (got if "Got value" not in telling[0] else "")
