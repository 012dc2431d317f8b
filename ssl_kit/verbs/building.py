"""What a recipe names, built: the method with its encoder, typed by their signatures; and written back, resolved."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning import Trainer

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import atomic_file, read_json
from ssl_kit.encoders.stored import SENSELESS
from ssl_kit.methods.method import Method
from ssl_kit.verbs.recipes import brief, read_recipe, without_places

SIMCLR = "ssl_kit.methods.simclr.SimCLR"
_ENCODER = "ssl_kit.encoders.encoder.Encoder"
# what makes a step what it is: a resumed run keeps it
_FIXED = ("method", "views", "grow", "image_size", "channels", "limit", "batch_size", "contrastive_batch", "seed")
_WORDS = (str, int, float, bool, type(None))  # what a recipe is written in
_MEASURED = ("image_size", "channels", "mean", "std")  # encoder arguments that come from the images


def add_recipe_arguments(parser: ArgumentParser, method: str | None) -> None:
    """Adds what a recipe holds beside the verb's own options: the method and the trainer, typed by their classes.

    `method` is the class path that recipes and options name, if any: defaults must be that class's own, because the
    parser keeps what has the same name in another class (SimCLR's learning rate is none for MAE).
    """
    parser.add_subclass_arguments(Method, "method", required=False)
    parser.set_defaults({"method": default_method(method or SIMCLR)})
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)


def default_method(class_path: str = SIMCLR) -> dict[str, Any]:
    """A method, SimCLR if no other is named, with everything chosen from the images."""
    return {"class_path": class_path, "init_args": {"encoder": {"class_path": _ENCODER}}}


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
        if encoder.init_args.get("name", "auto") == "auto":
            name, args = _class(parsed.method.class_path).default_encoder(image_size)
            encoder.init_args.name = name
            encoder.init_args.args = {**args, **(encoder.init_args.get("args") or {})}
        measured = dict(zip(_MEASURED, (image_size, channels, mean, std), strict=True))
        for key, value in measured.items():
            encoder.init_args[key] = value
        return parser.instantiate(parsed).method
    except (ArgumentError, *SENSELESS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"method: {brief(error)}") from error


def _class(path: str) -> type[Method]:
    """The class of a path that the parser has accepted: in ssl_kit, or in a module of `--allow`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def resolved_recipe(settings: dict[str, Any], method: Method) -> dict[str, Any]:
    """All settings of a run as one recipe: how it learns, neither where it goes nor what is measured on the images.

    Callbacks and loggers given from Python as objects cannot be written down: a repeated run must be given them again.
    """
    recipe = without_places({key: _plain(value) for key, value in settings.items() if value is not None})
    if "trainer" in recipe:
        recipe["trainer"] = {key: value for key, value in recipe["trainer"].items() if not _holds_objects(value)}
    spec = recipe.setdefault("method", default_method())
    arguments = spec.setdefault("init_args", {})
    encoder = arguments.get("encoder", {})
    encoder_args = {**encoder.get("init_args", {key: value for key, value in encoder.items() if key != "class_path"})}
    for key in _MEASURED:
        encoder_args.pop(key, None)
    built = {key: value for key, value in method.encoder.args.items() if key != "num_classes"}  # the method sets it
    arguments["encoder"] = {**encoder_args, "name": method.encoder.name, "args": built}
    return recipe


def save_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Writes a resolved recipe: `ssl-kit pretrain -c recipe.yaml` repeats the run."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def check_resumable(folder: Path, recipe: dict[str, Any], images: int, processes: int) -> None:
    """Raises `UserError` when a run would go on with other settings or images than it was begun with.

    The batch size may be another where so many `processes` make the same step of it.
    """
    record = read_json(folder / "run.json")
    had = record.get("data", {}).get("images", images)
    if had != images:
        raise UserError(f"--resume: the run was begun on {had:,} images, {recipe['data']} has {images:,} now")
    begun = read_recipe(str(folder / "recipe.yaml"))
    now = yaml.safe_load(yaml.safe_dump(recipe))
    step = "contrastive_batch" if now.get("contrastive_batch") else "batch_size"
    for key in _FIXED:
        same_step = key == step and record.get("images_per_step") == now[step] * processes
        if begun.get(key) != now.get(key) and not same_step:
            raise UserError(
                f"--resume: {key} was {begun.get(key)} and is {now.get(key)} now; "
                f"leave the recipe and {key} out to go on with the run's own, or start anew with --overwrite"
            )


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


def _holds_objects(value: Any) -> bool:
    """Whether settings hold what YAML has no word for."""
    if isinstance(value, dict):
        return any(map(_holds_objects, value.values()))
    return any(map(_holds_objects, value)) if isinstance(value, list) else not isinstance(value, _WORDS)


def quiet_lightning() -> None:
    """Its advice is about choices that are made, and said, here."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*lr_scheduler.step.*",
        ".*weights_only.*",
    ):
        warnings.filterwarnings("ignore", message=message)
