"""Recipes: YAML files that say how to pretrain. Finding and reading them; `building.py` makes what they name.

A recipe may name classes of ssl_kit only; another module needs `--allow MODULE`. The check comes before any import, and
a class must be defined in the module that is named: what ssl_kit itself imports (`ssl_kit.verbs.pretrain.os.system`) is
none of its own. Imports nothing heavy: the command line needs this before it knows what to do.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

import ssl_kit
from ssl_kit.core.console import next_command, result
from ssl_kit.core.errors import UserError
from ssl_kit.core.named import FUNCTION, check_function
from ssl_kit.core.options import Class, dashed, wrong_value
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import verb
from ssl_kit.verbs.manual import WITH_RECIPE

_MAX_BYTES = 2**17  # of a recipe; the longest packaged one has 2 kB
_DEEPEST = 30  # lists and mappings inside each other
_MOST_OPEN = 100  # brackets; the scanner looks at all open ones for every word of a line: 1,000 take it a second
_HEAD, _ABOUT = (
    4,
    ("For", "Takes", "Verified", "Unverified"),
)  # lines that say what a recipe is, and what they begin with
SIMCLR = "ssl_kit.methods.simclr.SimCLR"  # the method that no recipe and no option needs to name
_OWN_PATH = re.compile(r"ssl_kit(?:\.\w+)+")
# What says where a run goes and with whom it talks, not how it learns: for the command line only
_PLACES = ("run", "out", "html", "csv", "json", "resume", "overwrite", "allow", "reader", "wandb", "tensorboard")
_TRAINER_PLACES = ("devices", "num_nodes", "strategy", "default_root_dir", "logger", "callbacks", "profiler")
_EITHER = (("epochs", "minutes"),)  # of each pair the one that is named last counts


class _Loader(yaml.SafeLoader):
    """Plain values, without aliases: a few lines of them can stand for gigabytes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Counts how deep it is."""
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"an alias, *{event.anchor}, at {event.start_mark}; write its value out")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} lists and mappings inside each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


@dataclass(frozen=True)
class Settings:
    """What to list.

    Args:
        names: recipes to tell of; all packaged ones by default.

    Examples:
        ssl-kit recipes
        ssl-kit recipes simclr mae
        ssl-kit recipes --json
    """

    names: list[str] | None = None


@verb(Settings)
def recipes(settings: Settings) -> Entries:
    """List the packaged recipes: what each is for, how long it takes, and whether its result was measured.

    Returns:
        `{"recipes": {name: {"for", "takes", "verified", "measured", "file"}}}`; `measured` is the figure, or why none.
    """
    chosen = settings.names if settings.names else sorted(packaged())
    told = {name: about(recipe_file(name)) for name in chosen}
    for name, one in told.items():
        state = "verified" if one["verified"] else "unverified"
        result(f"{name}: {one['for']}")
        result(f"    {one['takes']}; {state}: {one['measured']}")
    next_command(f"ssl-kit pretrain digits -c {shlex.quote(next(iter(told)))} --minutes 1", own=False)
    return {"recipes": told}


def about(path: Path) -> Entries:
    """What the first lines of a recipe say of it; a user's own need not say anything."""
    head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:_HEAD])
    said = {key: found[1] if (found := re.search(rf"^# {key}: (.+)", head, re.MULTILINE)) else "" for key in _ABOUT}
    measured = said["Verified"] or said["Unverified"] or "it does not say"
    return {
        "for": said["For"],
        "takes": said["Takes"],
        "verified": bool(said["Verified"]),
        "measured": measured,
        "file": str(path),
    }


def folders() -> list[Path]:
    """Where packaged recipes are: inside the installed package, or at the top of a checkout."""
    package = Path(ssl_kit.__file__).parent
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def packaged() -> dict[str, Path]:
    """Name -> file of the recipes that come with ssl_kit."""
    return {path.stem: path for folder in folders() for path in sorted(folder.glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe, by path or by the bare name of a packaged one.

    Raises:
        UserError: there is no such recipe (nearest names).
    """
    path = Path(name) if Path(name).is_file() else packaged().get(name)
    if path is None:
        near = difflib.get_close_matches(name, packaged(), n=3, cutoff=0.4) or sorted(packaged())
        raise UserError(f"no recipe file or packaged recipe is called {name!r}; nearest: {', '.join(near)}")
    return path


def read_recipe(name: str) -> Entries:
    """The contents of a recipe, by path or by the bare name of a packaged one.

    Raises:
        UserError: there is no such recipe (nearest names), or the file is not a mapping in YAML of at most 128 KiB.
    """
    path = recipe_file(name)
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {_MAX_BYTES:,}")
    try:
        recipe = _plain_values(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, no such date, a number of 5,000 digits
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds a {type(recipe).__name__}; a recipe is a mapping such as {{epochs: 10}}")
    return recipe


def places_in(recipe: Entries) -> list[str]:
    """The entries of a recipe that say where, as options; those that ask for nothing (false, null) do not count.

    A run's own recipe of an earlier version names them all.
    """
    trainer = recipe.get("trainer")
    inside = {f"trainer.{key}": value for key, value in trainer.items()} if isinstance(trainer, dict) else {}
    known = (*_PLACES, *(f"trainer.{key}" for key in _TRAINER_PLACES))
    written = {str(key).replace("-", "_"): value for key, value in {**recipe, **inside}.items()}
    return [name for name in known if written.get(name) not in (None, False, [], {}, "auto")]


def without_places(recipe: Entries) -> Entries:
    """A recipe without its entries that say where."""
    kept = {key: value for key, value in recipe.items() if str(key).replace("-", "_") not in _PLACES}
    if isinstance(kept.get("trainer"), dict):
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in _TRAINER_PLACES}
    return kept


def read_how(name: str) -> Entries:
    """A recipe given by `-c`: it says how to train, the command line says where.

    Raises:
        UserError: as `read_recipe`; or it names a folder, a logger, processes or what may be overwritten.
    """
    recipe = read_recipe(name)
    if places := places_in(recipe):
        raise UserError(
            f"{name}: a recipe says how to train, not where: leave {places[0]} out, give {dashed(places[0])}"
        )
    return without_places(recipe)


def last_of_each_pair(recipes: Sequence[Entries], typed: Sequence[str]) -> None:
    """Strikes from recipes, given in order, what a later one or an option replaces under another name."""
    named = {argument.removeprefix("--").partition("=")[0] for argument in typed if argument.startswith("--")}
    for pair in _EITHER:
        replaced = bool(named & set(pair))
        for recipe in reversed(recipes):
            told = [key for key in pair if recipe.get(key) is not None]
            for key in told if replaced else ():
                del recipe[key]
            replaced |= bool(told)


def _plain_values(text: str) -> object:
    opened = 0
    for bracket in re.findall(r"[][{}]", text):
        opened = max(0, opened + (1 if bracket in "[{" else -1))
        if opened > _MOST_OPEN:
            raise yaml.YAMLError(f"more than {_MOST_OPEN} brackets are open at once")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def check_class_paths(value: object, allow: Sequence[str] = ()) -> None:
    """Raises `UserError` when a recipe, or an argument, names a class that it may not name. Nothing is imported.

    Args:
        value: contents of a recipe, or anything in it.
        allow: modules beside ssl_kit whose classes may be named.
    """
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            path = one.get("class_path")
            if isinstance(path, str):
                _check_class_path(path, allow)
            pending += [item for key, item in one.items() if key != "class_path"]
        elif isinstance(one, list | tuple):
            pending += one
        elif isinstance(one, str) and _OWN_PATH.fullmatch(one):
            _check_class_path(one, allow)


def _check_class_path(path: str, allow: Sequence[str]) -> None:
    module, _, name = path.rpartition(".")
    if not module or any(path.startswith(allowed + ".") for allowed in allow):
        return  # a bare name means a class of the wanted kind that is imported already
    if not path.startswith("ssl_kit."):
        raise UserError(f"{path} is outside ssl_kit; if you trust {module}, add --allow {module}")
    file = own_class(path).path
    tree = ast.parse(file.read_text(encoding="utf-8")) if _OWN_PATH.fullmatch(path) and file.is_file() else None
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef)] if tree else []
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f"did you mean {module}.{near[0]}?" if near else "see docs/methods.md for those there are"
        raise UserError(f"{path}: {module} defines no class {name!r}; {meant}")


def own_class(path: str) -> Class:
    """Where the source of a class of ours is, or would be."""
    module, _, name = path.rpartition(".")
    return Class(Path(ssl_kit.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py"), name)


def allowed_function(name: str, allow: Sequence[str], option: str) -> Callable[..., object]:
    """The function of "module:function", which the command line names and allows; never what a file names.

    Raises:
        UserError: it is no such name, of a module that is not allowed, or not there. Nothing was imported before that.
    """
    check_function(name, allow, option)
    module, _, function = name.partition(":")
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--{option} {name}: {error}; the module must be installed, or on PYTHONPATH") from error
    from ssl_kit.core.console import name_own

    name_own(f"--{option} {name} --allow {module}")
    return found


def data_of(given: list[str] | str | None, named: list[str] | str | None) -> list[str] | str:
    """The positional DATA wins over a recipe's, and says so."""
    if isinstance(given, list):
        given = given[0] if len(given) == 1 else given or None
    if given is None and named is None:
        raise UserError("no DATA was given: name a folder of images, a manifest or a built-in set")
    if given is not None and named is not None and given != named:
        from ssl_kit.core.console import say

        say(f"data: {given} (the recipe's {named} is not used)")
    return given if given is not None else named if isinstance(named, list) else str(named)


def with_network(rest: list[str], given: list[str], allow: Sequence[str], verb: str) -> list[str]:
    """The options of a command line in which `--encoder module:function` names a network of one's own.

    It is made known by the name of its class, which is what an encoder folder says of it; `pretrain` trains it. Any
    other value of `--encoder` stays an option of the verb.
    """
    for value in given:
        if Path(value).exists() or not FUNCTION.fullmatch(value):
            rest = [*rest, f"--encoder={value}"]
            continue
        from ssl_kit.encoders.network import register

        name = register(cast(Any, allowed_function(value, allow, "encoder")))
        rest = [*rest, f"--method.encoder.name={name}"] if verb in WITH_RECIPE else rest
    return rest


def restrict_imports(allow: Sequence[str] = ()) -> None:
    """From now on recipes and options name classes of ssl_kit and of the modules in `allow` only."""
    from jsonargparse import set_parsing_settings

    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["ssl_kit", *allow])


def brief(error: Exception) -> str:
    """The telling part of an argument parser's message, which repeats itself over many lines: which key, what, got.

    What a constructor of ours said of a value is told as it is.
    """
    said: BaseException | None = error
    while said is not None:
        if isinstance(said, UserError):
            return str(said)
        said = said.__cause__ or said.__context__
    text = str(error)
    keys = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    if denied := re.search(r"Importing '([^']+)' is not allowed", text):
        module = denied[1].rpartition(".")[0]
        return f"{dashed(keys)}: {denied[1]} is outside ssl_kit; if you trust that module, add --allow {module}"
    unions = [found for found in re.findall(r"Subtypes: \[(.+)\]", text) if "ssl_kit." not in found]
    expected = [
        found
        for found in re.findall(r"Expected an? ([^\n]+?)(?:\. Got value: .*)?(?=\n|$)", text)
        if "NoneType" not in found
    ]
    given = [found for found in re.findall(r"(?:Given|Got) value: ([^\n]+)", text) if "NestedArg(" not in found]
    if "Unable to load config" in text:
        expected, given = ["dict"], re.findall(r"Unable to load config '([^']*)'", text)
    if keys and given and (unions or expected):
        return wrong_value(keys, f"Union[{unions[-1]}]" if unions else expected[0], given[0].strip("'"))
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    telling = [
        line for line in lines if "is not accepted" in line or "not a valid" in line.lower() or "unrecognized" in line
    ]
    return (f"{dashed(keys)}: " if keys else "") + (telling or lines or [type(error).__name__])[0]
