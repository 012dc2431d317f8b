"""Recipes: YAML files that say how to pretrain. Finding packaged ones, building what they name, writing them back.

A recipe may name classes of ssl_kit only; another module needs `--allow MODULE`. The check comes before any import.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings
from pytorch_lightning import Trainer

import ssl_kit
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file
from ssl_kit.methods.method import Method

SIMCLR = "ssl_kit.methods.simclr.SimCLR"
_ENCODER = "ssl_kit.encoders.encoder.Encoder"
_MEASURED = ("image_size", "channels", "mean", "std")  # encoder arguments that come from the images


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


def add_recipe_arguments(parser: ArgumentParser) -> None:
    """Adds what a recipe holds beside the verb's own options: the method and the trainer, typed by their classes."""
    parser.add_subclass_arguments(Method, "method", required=False)
    parser.set_defaults({"method": default_method()})
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)


def default_method() -> dict[str, Any]:
    """SimCLR with everything chosen from the images."""
    return {"class_path": SIMCLR, "init_args": {"encoder": {"class_path": _ENCODER}}}


def build_method(
    spec: dict[str, Any] | None,
    *,
    image_size: tuple[int, int],
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Method:
    """Checks {class_path, init_args} against the class's signature and builds the method.

    Raises:
        UserError: an unknown class or argument, or a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Method, "method", required=True)
    wanted = {**(spec or default_method())}
    wanted["init_args"] = {"encoder": {"class_path": _ENCODER}, **(wanted.get("init_args") or {})}
    try:
        parsed = parser.parse_object({"method": wanted})
        encoder = parsed.method.init_args.encoder
        if "init_args" not in encoder:
            encoder.init_args = Namespace()
        measured = dict(zip(_MEASURED, (image_size, channels, mean, std), strict=True))
        for key, value in measured.items():
            encoder.init_args[key] = value
        return parser.instantiate(parsed).method
    except (ArgumentError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"method: {brief(error)}") from error


def save_recipe(path: Path, settings: dict[str, Any], method: Method) -> None:
    """Writes the resolved recipe: `ssl-kit pretrain -c recipe.yaml` repeats the run."""
    recipe = {key: _plain(value) for key, value in settings.items() if value is not None}
    spec = recipe.setdefault("method", default_method())
    arguments = spec.setdefault("init_args", {})
    encoder = arguments.get("encoder", {})
    encoder_args = {**encoder.get("init_args", {key: value for key, value in encoder.items() if key != "class_path"})}
    for key in _MEASURED:
        encoder_args.pop(key, None)
    arguments["encoder"] = {**encoder_args, "name": method.encoder.name}
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def brief(error: Exception) -> str:
    """The telling line of an argument parser's message, which repeats itself over many."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    telling = [
        line for line in lines if "is not accepted" in line or "not a valid" in line.lower() or "Expected" in line
    ]
    named = [line for line in telling if "is not accepted" in line] or telling or lines
    return named[0] if named else type(error).__name__


def _plain(value: Any) -> Any:
    """Settings as YAML knows them."""
    if hasattr(value, "__dataclass_fields__"):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
