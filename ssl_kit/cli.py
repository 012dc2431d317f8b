"""`ssl-kit VERB ...`: parse, call one verb, print. Nothing imports this file.

A verb is a function in `ssl_kit/verbs/VERB.py`; its `Settings` is the option schema and its docstring the help, which
is read from the source with `ast`, so that `--help` answers without importing torch (4 s with Lightning and timm).

Exit codes: 0 success, 2 a user's mistake (one line on stderr), 1 our own, 128 + signal when stopped by one; an
interrupted command says what it has kept.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ssl_kit import core
from ssl_kit.core.errors import UserError
from ssl_kit.core.options import options, underscored
from ssl_kit.core.process import FULL, imports_set_aside, is_first, lost, prepare, printable, protect, refusal, terminal
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.verbs.manual import VERBS, WITH_RECIPE, overview, plain_types, rewrapped, verb_help, verbs

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def run() -> NoReturn:
    """What the command runs: `main`, then the end of the process with its exit code."""
    protect()
    core.light = sys.argv[1:2] == ["index"]
    if core.light:
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # the usual one keeps what was freed
    code: list[int] = []
    atexit.register(_end_at_once, code)  # the first to be registered is the last to be called
    try:
        code.append(main())
    except SystemExit as stop:
        code.append(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
    except BaseException:
        code.append(1)
        raise
    sys.exit(code[0])


def _end_at_once(code: list[int]) -> None:
    """Ends a process whose group of processes is still there: a run has failed.

    gloo's threads still hold tensors of it, and letting go of one while the interpreter ends would abort the process:
    SIGABRT instead of its exit code (pytorch/pytorch#179291).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        return 2 if _stdout_lost() and "--json" in arguments else code
    except UserError as error:
        if is_first():
            _complain(str(error))
        return 2
    except KeyboardInterrupt as stop:
        if is_first():
            _complain(f"interrupted; {str(stop) or 'nothing was written'}")
        return 130
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        _complain(refused)
        return 2


def _complain(text: str) -> None:
    """One line on stderr, whatever is in the text."""
    line = printable(f"ssl-kit: {text}", sys.stderr).replace("\n", "\\n")
    print(line, file=sys.stderr)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from ssl_kit import __version__

        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in verbs():
        near = difflib.get_close_matches(verb, verbs(), n=1)
        raise UserError(
            f"no command is called {verb!r}; " + (f"did you mean {near[0]!r}? " if near else "") + "see ssl-kit --help"
        )
    if "-h" in rest or "--help" in rest:
        print(verb_help(verb))
        return 0

    from ssl_kit.verbs.early import look

    prepare()
    common, rest = _common(rest)
    rest = _gone_on(rest) if verb == "pretrain" else rest
    doing = look(verb, rest, _own_recipe(rest) if _resumes(rest) else None) if "--help-all" not in common else ""
    if verb == "pretrain":
        from ssl_kit.core.process import processes_asked
        from ssl_kit.verbs.launching import launch

        processes = processes_asked(_devices(rest))
        if processes > 1:
            return launch(arguments, processes)
    from ssl_kit.core.console import configure, say

    as_json, silent = "--json" in common, not is_first()  # of several processes
    quiet, verbose = "--quiet" in common or silent, "--verbose" in common
    configure(to_stderr=as_json or silent, quiet=quiet, verbose=verbose, typed=rest)
    if doing:
        say(doing)  # before the seconds that the libraries take
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # whoever prints, libraries included
        with imports_set_aside():
            module = importlib.import_module(f"ssl_kit.verbs.{verb}")
            values = _parse(verb, module.Settings, rest, "--help-all" in common)
        result = getattr(module, verb)(**values)
    if as_json and not silent:
        # JSON leaves DEL as it is, which a terminal would not show
        print(json.dumps(_finite(result), allow_nan=False).replace("\x7f", "\\u007f"))
    return 0


def _stdout_lost() -> bool:
    """Whether what stdout leads to had no room for all; says so. Who has read enough and hung up has not lost any."""
    stdout = terminal(sys.stdout)
    stdout.flush()
    error = lost(stdout)
    if error is None or error.errno not in FULL:
        return False
    _complain(f"stdout: {error.strerror}; make room where it leads. All else is done")
    return True


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _common(rest: list[str]) -> tuple[set[str], list[str]]:
    """What all verbs take, and the rest."""
    common = {"--json", "--quiet", "--verbose", "--help-all"} & set(rest)
    return common, [argument for argument in rest if argument not in common]


def _parse(verb: str, settings: type, rest: list[str], everything: bool) -> Entries:
    """The fields of the verb's settings, typed by them."""
    from jsonargparse import ArgumentError, ArgumentParser

    from ssl_kit.verbs.recipes import (
        allowed_function,
        check_class_paths,
        data_of,
        last_of_each_pair,
        read_how,
        read_recipe,
        restrict_imports,
        with_network,
        without_places,
    )

    rest = _flags([underscored(argument) for argument in rest], settings)
    rest = _joined(rest, settings)
    rest, allow = _taken(rest, ("--allow",))
    rest, readers = _taken(rest, ("--reader",) if "reader" in settings.__annotations__ else ())
    rest = with_network(*_taken(rest, ("--encoder",)), allow, verb)
    rest, recipes = _taken(rest, ("-c", "--config"))
    own = _own_recipe(rest) if _resumes(rest) else None  # a resumed run needs nothing said again
    restrict_imports(allow)
    parser = ArgumentParser(prog=f"ssl-kit {verb}", exit_on_error=False, allow_abbrev=False)
    if verb in WITH_RECIPE:
        parser.add_argument("-c", "--config", action="config")
    read = [*([without_places(read_recipe(own))] if own is not None else []), *map(read_how, recipes)]
    last_of_each_pair(read, rest)
    method = _method_named(read, rest)
    check_class_paths([*read, {"class_path": method}], allow)
    try:
        _add_arguments(parser, verb, settings, method)
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explained(error, parser, verb)) from error
    if everything:
        print(rewrapped(plain_types(parser.format_help())))
        raise SystemExit(0)
    configs, named = [], None
    for recipe in read:
        named = recipe.pop("data", named)
        taken = recipe
        if verb != "pretrain":  # what the verb does not take (the method, the trainer) is not for it
            taken = {key: value for key, value in recipe.items() if key in settings.__annotations__}
        configs += ["-c", json.dumps(taken)]
    try:
        parsed = parser.parse_args([*configs, *rest])
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_explained(error, parser, verb)) from error
    check_class_paths(parsed.as_dict(), allow)  # options name classes too
    values = parser.instantiate(parsed).as_dict() if verb not in WITH_RECIPE else _instantiated(parser, parsed)
    values.pop("config", None)
    if readers:
        values["reader"] = allowed_function(readers[-1], allow, "reader")
    if "data" in values:
        values["data"] = data_of(values["data"], named)
    return values


def _method_named(recipes: list[Entries], rest: list[str]) -> str | None:
    """The class path of the method that recipes and options name last."""
    methods = [recipe.get("method") for recipe in recipes]
    paths = [method.get("class_path") if isinstance(method, dict) else method for method in methods]
    paths += _taken(rest, ("--method", "--method.class_path"))[1]
    return next((path for path in reversed(paths) if isinstance(path, str) and "{" not in path), None)


def _add_arguments(parser: ArgumentParser, verb: str, settings: type, method: str | None) -> None:
    add = functools.partial(parser.add_class_arguments, settings, as_group=False, as_positional=False)
    if verb not in WITH_RECIPE:
        positional = [option for option in options(VERBS / f"{verb}.py") if option.positional]
        for option in positional:
            count = (
                ("+" if option.default is None else "*") if option.several else None if option.default is None else "?"
            )
            parser.add_argument(option.name, type=str, nargs=count)
        add(skip={option.name for option in positional} | {"reader"})
        return
    from ssl_kit.verbs.defaults import add_recipe_arguments

    several = next(option.several for option in options(VERBS / f"{verb}.py") if option.name == "data")
    parser.add_argument("data", nargs="*" if several else "?", default=None, help="folder, manifest or built-in set")
    add(skip={"data", "method", "trainer", "reader"})
    add_recipe_arguments(parser, method, trainer="trainer" in settings.__annotations__)


def _instantiated(parser: ArgumentParser, parsed: Namespace) -> Entries:
    """Records (views) as objects; the method and the trainer as settings, of which only those that were changed."""
    if "method" not in parsed:
        return parser.instantiate(parsed).as_dict()
    method = parsed.pop("method").as_dict()
    trainer = parsed.pop("trainer", None)
    values = {
        key: value for key, value in parser.instantiate(parsed).as_dict().items() if key not in ("method", "trainer")
    }
    values["method"] = method
    if trainer is not None:
        usual = parser.get_defaults().trainer.as_dict()
        values["trainer"] = {key: value for key, value in trainer.as_dict().items() if value != usual[key]}
    return values


def _flags(rest: list[str], settings: type) -> list[str]:
    """`--resume` alone means `--resume=true`, for options that are yes or no."""
    flags = {f"--{name}" for name, kind in settings.__annotations__.items() if kind == "bool"}
    following = [*rest, "--"][1:]
    return [
        f"{argument}=true" if argument in flags and after not in ("true", "false") else argument
        for argument, after in zip(rest, following, strict=True)
    ]


def _devices(rest: list[str]) -> object:
    """What is typed as `--trainer.devices`; of a run that is resumed as many processes as it had, 1 by default."""
    from ssl_kit.core.owned import RUN
    from ssl_kit.core.process import most_processes

    typed = _taken(rest, ("--trainer.devices",))[1]
    own = _own_recipe(rest) if _resumes(rest) else None
    if typed or own is None:
        return [1, *typed][-1]
    begun = read_object(Path(own).parent / RUN).get("world_size")
    return min(begun, most_processes()) if isinstance(begun, int) and begun > 0 else 1


def _joined(rest: list[str], settings: type) -> list[str]:
    """`--only knn --only linear` means `--only=knn,linear`, for options that take several: the last alone would win."""
    for name, kind in settings.__annotations__.items():
        kept, values = _taken(rest, (f"--{name}",)) if str(kind).startswith("tuple[") else (rest, [])
        if len(values) > 1:
            rest = [*kept, f"--{name}={','.join(values)}"]
    return rest


def _gone_on(rest: list[str]) -> list[str]:
    """With `--resume` where torchrun has started this job anew."""
    from ssl_kit.core.named import restarted

    run = _taken(rest, ("--run",))[1]
    if not run or not restarted(Path(run[-1])):
        return rest
    return [*(one for one in rest if one not in ("--overwrite", "--overwrite=true")), "--resume"]


def _resumes(rest: list[str]) -> bool:
    return bool({"--resume", "--resume=true"} & set(rest))


def _own_recipe(rest: list[str]) -> str | None:
    """RUN/recipe.yaml of `--run RUN`, if it exists."""
    given = [argument.partition("=")[2] or after for argument, after in zip(rest, [*rest, ""][1:], strict=True)]
    runs = [value for argument, value in zip(rest, given, strict=True) if argument.partition("=")[0] == "--run"]
    path = Path(runs[-1]) / "recipe.yaml" if runs else None
    return str(path) if path is not None and path.is_file() else None


def _taken(rest: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Splits off the values of a repeatable option, given as `-c NAME` or `--config=NAME`."""
    kept, values = [], []
    arguments = iter(rest)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in names:
            values.append(value if equals else next(arguments, ""))
        else:
            kept.append(argument)
    return kept, values


def _explained(error: Exception, parser: ArgumentParser, verb: str) -> str:
    """What the parser complains of, in the words that a complaint has everywhere (`verbs/early.py`)."""
    from ssl_kit.verbs.early import no_option, no_value
    from ssl_kit.verbs.recipes import brief

    message = brief(error)
    if lacking := re.search(r"arguments are required: (\w+)", message):
        return no_value(verb, lacking[1], {option.name: option for option in options(VERBS / f"{verb}.py")})
    unknown = re.search(r"(?:Option|Key) '([\w.]+)' is not|[Uu]nrecognized arguments: --([\w.]+)", message)
    if unknown is None:
        return message
    inside = re.match(r"--([\w.-]+): ", message)  # "--method: Option 'temprature' is not accepted"
    name = ".".join([*([inside[1].replace("-", "_")] if inside else []), unknown[1] or unknown[2]])
    return no_option(name, [*_names(parser)])


def _names(parser: ArgumentParser) -> Iterator[str]:
    """Every option, those of the method among them."""
    from inspect import signature

    yield from (string[2:] for string in parser._option_string_actions if string.startswith("--"))
    usual = parser.get_defaults()
    if "method" in usual:
        module, _, name = usual.method.class_path.rpartition(".")
        for argument in signature(getattr(importlib.import_module(module), name)).parameters.values():
            yield f"method.{argument.name}"
            fields = getattr(type(argument.default), "__dataclass_fields__", {})
            yield from (f"method.{argument.name}.{field}" for field in fields)
