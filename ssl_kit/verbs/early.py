"""What can be seen to be wrong in a command line before a library is loaded: told in a fifth of a second.

A mistyped option or value, a recipe, a run, embeddings or images that are not there, a folder that may not be written.
What only the libraries can judge is left to them (`--method.*`, `--views.*`, `--trainer.*`, what lies in the images).
The checks themselves are those of the verbs (`core/named.py`, `core/owned.py`), so the words are the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_kit.core.errors import UserError, check_numbers
from ssl_kit.core.named import (
    FUNCTION,
    check_data,
    check_free,
    check_function,
    check_pretrained,
    check_run,
    check_shown,
    default_run,
    find_encoder,
    is_embeddings,
    manifest_of,
)
from ssl_kit.core.options import Option, dashed, fits, options, underscored, wrong_value
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
    _check_values(typed, known)
    check_trainer([name.partition(".")[2] for name in typed.named if name.startswith("trainer.")])
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


def _check_values(typed: Typed, known: dict[str, Option]) -> None:
    for name, values in typed.named.items():
        kind = known[name].kind if name in known else ""
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
    if verb == "pretrain":
        return _looked_at_run(typed, places["data"])
    for encoder in [*places.get("encoder", []), *(places["run"] if verb == "export" else [])]:
        find_encoder(encoder)
    elsewhere = typed.last("encoder") if "encoder" not in places else None
    if elsewhere is not None and not FUNCTION.fullmatch(elsewhere):
        find_encoder(elsewhere)
    for folder in map(Path, [*places.get("emb", []), *places.get("other", [])]):
        if verb != "search" or not (folder / RUN).is_file():  # of a run it makes the embeddings
            manifest_of(folder)
    for run in places.get("runs", []):
        check_shown(run)
    for names in typed.named.get("baseline", []):
        for name in filter(None, map(str.strip, names.split(","))):
            check_pretrained(name)
    if (images := typed.last("images")) is not None:
        check_data(images)
    for name in ("csv", "html"):
        for path in typed.named.get(name, []) if verb == "duplicates" else ():
            check_output(path)
    out = typed.last("out")
    if out is not None:
        read = places.get("data") or places.get("labelled") or ([] if images is None else [images])
        _check_out(verb, out, read, typed)
    named = " ".join(one for several in places.values() for one in several)
    return " ".join(filter(None, (verb, named, f"-> {out}" if out else "")))


def _looked_at_run(typed: Typed, data: list[str]) -> str:
    run = typed.last("run")
    folder = Path(run) if run is not None else default_run(" ".join(data))
    resume, overwrite = typed.flag("resume"), typed.flag("overwrite")
    check_place(folder, data, removing=overwrite)
    # of several the first looks, once all have met: another may have begun the run; a former one is put back before
    if started() == 1 and not (folder / ".former").exists():
        check_run(folder, resume, overwrite)
    if (init := typed.last("init")) is not None:
        check_pretrained(init)
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
