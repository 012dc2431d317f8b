"""What can be seen to be wrong in a command line before a library is loaded: told in a fifth of a second.

A mistyped option or value, a recipe, a run, embeddings or images that are not there, a folder that may not be written.
What `--method.*`, `--views.*` and `--trainer.*` may be is read from the source of the classes that take them; what only
the libraries can judge is left to them. The checks themselves are those of the verbs (`core/named.py`,
`core/owned.py`), so the words are the same.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ssl_kit.core.errors import UserError, check_numbers
from ssl_kit.core.named import (
    ASKED,
    FUNCTION,
    check_data,
    check_free,
    check_function,
    check_names,
    check_pretrained,
    check_run,
    check_shown,
    default_run,
    find_encoder,
    is_embeddings,
    manifest_of,
)
from ssl_kit.core.options import Class, Option, class_named, dashed, fits, options, parts, underscored, wrong_value
from ssl_kit.core.owned import RUN, check_output, check_place
from ssl_kit.core.process import started
from ssl_kit.core.sealed import Entries
from ssl_kit.verbs.manual import VERBS, WITH_RECIPE

_INSTEAD = {  # options of the trainer that would be ignored or break a promise
    "max_epochs": "--epochs",
    "plugins": "no other",
    "enable_checkpointing": "--checkpoint-minutes",
    "accumulate_grad_batches": "--method.optim.accumulate",
    "gradient_clip_val": "--method.optim.clip",
    "precision": "--precision",
    "accelerator": "CUDA_VISIBLE_DEVICES= in the environment to train on the CPU",
}
_FUNCTION = 3  # place of it in an entry of the catalog


class Typed(NamedTuple):
    """A command line, taken apart: each option's values in their order, and what is none."""

    named: dict[str, list[str]]
    loose: list[str]

    def last(self, name: str) -> str | None:
        """The value that counts."""
        return self.named[name][-1] if name in self.named else None

    def flag(self, name: str) -> bool:
        """Whether an option that is yes or no was given as yes."""
        return self.last(name) in ("", "true")


def look(verb: str, rest: Sequence[str], own: str | None = None) -> str:
    """What a command is going to do, in a line; empty where it is done before that could be read.

    Args:
        verb: its name.
        rest: what was typed after it, without what is common to all verbs.
        own: recipe of the run that is resumed.

    Raises:
        UserError: it cannot be done.
    """
    known = {option.name: option for option in options(VERBS / f"{verb}.py")}
    typed = taken_apart(verb, rest, known)
    if typed is None:
        return verb
    allow = typed.named.get("allow", [])
    recipes = _recipes(verb, [*typed.named.get("config", []), *typed.named.get("c", [])], own, known, allow)
    check_trainer([name.partition(".")[2] for name in typed.named if name.startswith("trainer.")])
    inside = _inside(verb, typed, recipes, known, allow)
    for recipe in recipes:
        for name in inside.keys() & recipe.keys():
            _check_setting(recipe[name], inside[name], name)
    _check_values(typed, {name: option.kind for name, option in known.items()} | _kinds(typed, inside))
    data = next((recipe["data"] for recipe in reversed(recipes) if "data" in recipe), None)
    places = _placed(verb, typed.loose, known, data)
    missing = [name for name, option in known.items() if option.default is None and not option.positional]
    for name in missing:
        if name not in typed.named:
            raise UserError(no_value(verb, name, known))
    _check_code(typed, known, allow)
    if verb == "recipes":
        return ""  # it answers at once
    return _looked(verb, typed, places)


def no_option(name: str, known: Iterable[str]) -> str:
    """What is said of an option that there is none of."""
    near = difflib.get_close_matches(name, known, 1)
    return f"no option is called {dashed(name)}; " + (f"did you mean {dashed(near[0])}?" if near else "see --help-all")


def no_value(verb: str, name: str, known: dict[str, Option]) -> str:
    """What is said where something is lacking that a verb cannot do without."""
    if name == "data" and verb in WITH_RECIPE:
        return "no DATA was given: name a folder of images, a manifest or a built-in set"
    lacking = name.upper() if known[name].positional else dashed(name)
    needed = [option for option in known.values() if option.default is None]
    usual = [one.name.upper() if one.positional else f"{dashed(one.name)} {one.name.upper()}" for one in needed]
    return f"no {lacking} was given: ssl-kit {verb} {' '.join(usual)}"


def check_trainer(names: Iterable[str]) -> None:
    """Raises `UserError` for an option of Lightning's trainer that has no meaning here."""
    for name in names:
        if name in _INSTEAD:
            raise UserError(f"{dashed(f'trainer.{name}')} has no meaning here: use {_INSTEAD[name]}")


def taken_apart(verb: str, rest: Sequence[str], known: dict[str, Option]) -> Typed | None:
    """The command line; None where `--` makes it another's to read."""
    extra = {"allow", "encoder", *(("config", "c", "print_config") if verb in WITH_RECIPE else ())}
    typed, arguments = Typed({}, []), list(map(underscored, rest))
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if argument == "--":
            return None
        if not re.match(r"--|-c$", argument):
            typed.loose.append(argument)
            continue
        if name.partition(".")[0] not in (*known, *extra):
            raise UserError(no_option(name, known))
        if not equals and name in known and known[name].kind == "bool":
            value = arguments.pop(0) if arguments[:1] in (["true"], ["false"]) else ""
        elif not equals and name != "print_config" and not name.endswith((".help", "+")):
            if not arguments or re.match(r"--[a-z]", arguments[0]):
                raise UserError(f"{dashed(name)}: a value is missing")
            value = arguments.pop(0)
        typed.named.setdefault(name, []).append(value)
    return typed


def _recipes(
    verb: str, names: Sequence[str], own: str | None, known: dict[str, Option], allow: Sequence[str]
) -> list[Entries]:
    """What recipes say, that of a resumed run first."""
    if not names and own is None:
        return []
    from ssl_kit.verbs.recipes import check_class_paths, read_how, read_recipe

    read = [*([read_recipe(own)] if own is not None else []), *map(read_how, names)]
    check_class_paths(read, allow)
    for name, recipe in zip(names, read[-len(names) :], strict=True) if names and verb == "pretrain" else ():
        for key in recipe:
            if key not in known and "." not in str(key):
                near = difflib.get_close_matches(str(key), known, 1)
                raise UserError(f"{name}: no setting is called {key!r}" + (f"; did you mean {near[0]!r}?" * bool(near)))
    return read


def _inside(
    verb: str, typed: Typed, recipes: Sequence[Entries], known: dict[str, Option], allow: Sequence[str]
) -> dict[str, Class]:
    """The classes that take what is typed below an option, as `--views.strength`; one that is not ours is left out."""
    dotted = {name.partition(".")[0] for name in typed.named if "." in name or name == "method"}.union(*recipes)
    dotted &= known.keys()
    if not dotted:
        return {}
    found = {name: class_named(known[name].kind, None, VERBS / f"{verb}.py") for name in dotted}
    if "method" in dotted:
        from ssl_kit.verbs.recipes import SIMCLR, check_class_paths, own_class

        told = [recipe.get("method") for recipe in recipes]
        paths = [one.get("class_path") if isinstance(one, dict) else one for one in told]
        paths += [*typed.named.get("method", []), *typed.named.get("method.class_path", [])]
        path = next((path for path in reversed(paths) if isinstance(path, str)), SIMCLR)
        check_class_paths({"class_path": path} if "{" not in path else None, allow)
        found["method"] = own_class(path) if path.startswith("ssl_kit.") else None
    if "trainer" in dotted and (lightning := find_spec("pytorch_lightning")) and lightning.submodule_search_locations:
        found["trainer"] = Class(Path(lightning.submodule_search_locations[0]) / "trainer/trainer.py", "Trainer")
    return {name: one for name, one in found.items() if one is not None}


def _kinds(typed: Typed, inside: dict[str, Class]) -> dict[str, str]:
    """The types of what is typed below options, where they are known; a class in its place decides for itself."""
    kinds = {}
    for name in typed.named:
        top, *keys = name.removesuffix("+").split(".")
        of, kind, above = inside.get(top), "", top
        for key in keys:
            taken = parts(of) if of else None
            another = above != top and f"{above}.class_path" in typed.named
            if taken is None or another or key in ("class_path", "help"):
                kind = ""
                break
            above += f".{key}"
            if key == "init_args":
                continue
            if key not in taken:
                raise UserError(no_option(above, [f"{above.removesuffix(key)}{one}" for one in taken]))
            kind, of = taken[key]
        if kind and not name.endswith("+"):
            kinds[name] = kind
    return kinds


def _check_setting(value: object, of: Class, name: str) -> None:
    """The names in a recipe's mapping; of a class of others nothing is known."""
    if isinstance(value, dict) and "class_path" in value:
        from ssl_kit.verbs.recipes import own_class

        path, value, name = str(value["class_path"]), value.get("init_args"), f"{name}.init_args"
        of = own_class(path)
    taken = parts(of)
    if not isinstance(value, dict) or taken is None:
        return
    for key, inner in value.items():
        if key not in taken:
            near = difflib.get_close_matches(str(key), taken, 1)
            meant = f"; did you mean {f'{name}.{near[0]}'!r}?" if near else ""
            raise UserError(f"no setting is called {f'{name}.{key}'!r}{meant}")
        if (below := taken[key].of) is not None:
            _check_setting(inner, below, f"{name}.{key}")


def evaluations() -> list[str]:
    """What `evaluate --only` takes: the entries of the catalog that name a function, read from its source."""
    tree = ast.parse((VERBS.parent / "evaluation" / "catalog.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Evaluation"]
    measured = [
        one for one in calls if len(one.args) > _FUNCTION or any(word.arg == "function" for word in one.keywords)
    ]
    return [str(one.args[0].value) for one in measured if isinstance(one.args[0], ast.Constant)]


def _check_values(typed: Typed, kinds: dict[str, str]) -> None:
    for name, values in typed.named.items():
        kind = kinds.get(name, "")
        for value in values if kind not in ("", "bool") else filter(None, values if kind else ()):
            if not fits(kind, value):
                raise UserError(wrong_value(name, kind, value))
            if "float" in kind and re.fullmatch(r"-?[\d.]+", value):
                check_numbers({name: float(value)})
            elif "int" in kind and re.fullmatch(r"-?\d+", value):
                check_numbers({name: int(value)})


def _placed(verb: str, loose: Sequence[str], known: dict[str, Option], data: object) -> dict[str, list[str]]:
    """What was typed for each positional; of those that take several one has what the others leave."""
    fields = [option for option in known.values() if option.positional]
    left, found = list(loose), dict[str, list[str]]()
    for place, option in enumerate(fields):
        after = sum(one.default is None for one in fields[place + 1 :])
        count = max(1, len(left) - after) if option.several else 1
        found[option.name], left = left[:count], left[count:]
        if not found[option.name] and option.name == "data" and verb in WITH_RECIPE and data is not None:
            found["data"] = list(map(str, data)) if isinstance(data, list) else [str(data)]
        if not found[option.name] and option.default is None:
            raise UserError(no_value(verb, option.name, known))
    if left:
        usual = " ".join(option.name.upper() for option in fields)
        raise UserError(f"{left[0]!r} is one too many: ssl-kit {verb} {usual}".rstrip())
    return found


def _check_code(typed: Typed, known: dict[str, Option], allow: Sequence[str]) -> None:
    """Code of the user's own: it is named as such, and allowed. It is not imported yet."""
    for value in typed.named.get("reader", []):
        check_function(value, allow, "reader")
    for value in typed.named.get("encoder", []):
        if not Path(value).exists() and ("encoder" not in known or FUNCTION.fullmatch(value)):
            check_function(value, allow, "encoder")


def _looked(verb: str, typed: Typed, places: dict[str, list[str]]) -> str:
    """The line of what is going to be done, once all that is named is there, and may be written."""
    for name in ("data", "labelled"):
        for one in places.get(name, []):
            check_data(one)
    if (init := typed.last("init")) is not None:
        check_pretrained(init)
    if verb == "pretrain":
        return _looked_at_run(typed, places["data"])
    for encoder in [*places.get("encoder", []), *(places["run"] if verb == "export" else [])]:
        find_encoder(encoder)
    elsewhere = typed.last("encoder") if "encoder" not in places else None
    if elsewhere is not None and not FUNCTION.fullmatch(elsewhere):
        find_encoder(elsewhere)
    for folder in map(Path, [one for name in ("emb", "other", "old", "new") for one in places.get(name, [])]):
        if verb != "search" or not (folder / RUN).is_file():  # of a run it makes the embeddings
            manifest_of(folder)
    for run in places.get("runs", []):
        check_shown(run)
    if typed.last("engine") == "ray" and find_spec("ray") is None:
        raise UserError("--engine ray needs the package ray: pip install 'ssl-kit[ray]'")
    for name in _several(typed, "baseline"):
        check_pretrained(name)
    check_names(_several(typed, "baselines"), ASKED, "--baselines")
    if "only" in typed.named:
        check_names(_several(typed, "only"), evaluations(), "--only")
    if (images := typed.last("images") if verb != "plan" else None) is not None:  # there a number
        check_data(images)
    for name in ("csv", "html"):
        for path in typed.named.get(name, []) if verb in ("duplicates", "drift") else ():
            check_output(path)
    out = next(iter(places.pop("out", [])), None) or typed.last("out")
    if out is not None:
        read = places.get("data") or places.get("labelled") or ([] if images is None else [images])
        _check_out(verb, out, read, typed)
    named = " ".join(one for several in places.values() for one in several)
    return " ".join(filter(None, (verb, named, f"-> {out}" if out else "")))


def _several(typed: Typed, name: str) -> list[str]:
    """The names that an option was given, separated by commas; in brackets they are left to the parser."""
    given = [value for value in typed.named.get(name, []) if value[:1] not in ("[", "{")]
    names = [one.strip() for value in given for one in value.split(",")]
    return [one for one in names if one not in ("", "none", "null")]


def _looked_at_run(typed: Typed, data: list[str]) -> str:
    run = typed.last("run")
    folder = Path(run) if run is not None else default_run(" ".join(data))
    resume, overwrite = typed.flag("resume"), typed.flag("overwrite")
    check_place(folder, data, removing=overwrite)
    # of several the first looks, once all have met: another may have begun the run; a former one is put back before
    if started() == 1 and not (folder / ".former").exists():
        check_run(folder, resume, overwrite)
    return f"pretrain {' '.join(data)} -> {folder}; report: {folder / 'report.html'}"


def _check_out(verb: str, out: str, images: list[str], typed: Typed) -> None:
    """Whether a verb may write to the place that it was given."""
    overwrite = typed.flag("overwrite")
    if verb == "views":
        for place in (*images, None):
            check_output(out, place)
    elif verb == "report":
        if Path(out).is_dir():
            raise UserError(f"--out {out} is a folder: give the name of the HTML file")
    else:
        check_place(out, images, removing=overwrite and verb in ("embed", "export"))
        if verb in ("embed", "export") and not overwrite and not (verb == "embed" and is_embeddings(Path(out))):
            check_free(Path(out))
