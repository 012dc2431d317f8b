"""The command line: fast help, one line per mistake, what wins over what, nothing imported that was not allowed."""

import contextlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.options import options, underscored
from ssl_kit.verbs import early, manual
from ssl_kit.verbs.pretrain import Settings


def mistake(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("ssl-kit: ") and "\n" not in text
    return text


def test_help_of_everything_comes_without_torch():
    code = (
        "import sys\nfrom ssl_kit.cli import main\nfrom ssl_kit.verbs.manual import verbs\n"
        "assert main(['--help']) == 0\n"
        "for verb in verbs(): assert main([verb, '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'timm', 'jsonargparse', 'faiss'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert main(['recipes']) == 0 and not {'torch', 'numpy', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in (
        "pretrain",
        "evaluate",
        "--batch-size",
        "--image-size",
        "-c RECIPE",
        "usage: ssl-kit search EMB IMAGES",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("verb", manual.verbs())
def test_every_option_has_a_help_text_and_a_heading(verb):
    found = options(manual.VERBS / f"{verb}.py")
    assert all(option.text and (option.positional or option.group) for option in found)
    assert len({option.group for option in found}) <= 6
    assert len(manual.examples_of(verb)) >= 2


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize("verb", manual.verbs())
def test_help_fits_the_terminal_and_spells_options_one_way(verb, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = manual.verb_help(verb)
    helped, _, examples = text.partition("\nExamples:\n")
    assert max(map(len, helped.splitlines())) <= columns and len(examples.splitlines()) >= 2
    assert not re.search(r"(?<![\w-])--?[a-z][\w.-]*_|typing|Literal|<class|Union|NoneType", text)


def test_examples_name_options_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for verb in manual.verbs():
        for line in manual.examples_of(verb):
            assert line.startswith(f"ssl-kit {verb}")
            with contextlib.suppress(UserError):  # of what is not there
                early.look(verb, shlex.split(line)[2:])
            known = {option.name: option for option in options(manual.VERBS / f"{verb}.py")}
            rest = [word for word in shlex.split(line)[2:] if word not in ("--json", "--quiet")]
            assert early.taken_apart(verb, rest, known) is not None


def test_options_are_spelt_one_way():
    """With dashes, wherever they are read: in the code, on the pages, in the recipes."""
    root = Path(cli.__file__).parent.parent
    pages = [root / "README.md", root / "CHANGELOG.md", *root.glob("docs/*.md"), *root.glob("recipes/*.yaml")]
    found = []
    for path in [*pages, *root.glob("ssl_kit/**/*.py")]:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9.]*_[\w.]*", path.read_text(encoding="utf-8")):
            found.append((path.name, option))
    assert found == [("cli.py", "--method.class_path"), ("options.py", "--max_bad")]


def test_all_options_are_told_in_the_same_words_and_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help-all"])
    text = capsys.readouterr().out
    assert "--views.flip-x" in text and "--trainer.max-steps" in text and max(map(len, text.splitlines())) == 80
    assert not re.search(r"(?<![\w-])--[a-z][\w.-]*_|typing|Literal|<class|Union|NoneType", text)


def test_unknown_words_name_the_nearest(capsys):
    assert "did you mean 'pretrain'" in mistake(capsys, "pretrian", "x")
    assert "no recipe file or packaged recipe" in mistake(capsys, "pretrain", "x", "-c", "nothing")
    assert "did you mean --epochs?" in mistake(capsys, "pretrain", "x", "--epoch", "3")
    assert "--epochs: wanted a number, got 'many'" in mistake(capsys, "pretrain", "x", "--epochs", "many")
    assert "no DATA was given" in mistake(capsys, "pretrain")


def test_mistakes_about_data_are_one_line(capsys, tmp_path):
    assert "nowhere" in mistake(capsys, "pretrain", str(tmp_path / "nowhere"), "--run", str(tmp_path / "r1"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    assert ".txt" in mistake(capsys, "pretrain", str(tmp_path / "texts"), "--run", str(tmp_path / "r2"))
    assert "a.tar" in mistake(capsys, "pretrain", "a.tar", "--run", str(tmp_path / "r3"))


def test_fewer_images_than_a_batch(capsys, labelled_folder, tmp_path):
    text = mistake(capsys, "pretrain", str(labelled_folder), "--run", str(tmp_path / "r"), "--batch-size", "1000")
    assert "fewer than one step of 1000" in text


def test_recipes_and_options_win_in_order(tmp_path, labelled_folder):
    (tmp_path / "a.yaml").write_text("epochs: 3\nbatch_size: 8\nseed: 1\ndata: elsewhere\n")
    (tmp_path / "b.yaml").write_text("epochs: 4\nviews: {strength: 0.5}\n")

    rest = ["--seed", "9", "-c", str(tmp_path / "a.yaml"), str(labelled_folder), "-c", str(tmp_path / "b.yaml")]
    values = cli._parse("pretrain", Settings, [*rest, "--method.temperature", "0.4", "--resume"], False)
    assert (values["epochs"], values["batch_size"], values["seed"]) == (4, 8, 9)
    assert values["data"] == str(labelled_folder) and values["resume"] is True
    assert values["views"].strength == 0.5 and values["method"]["init_args"]["temperature"] == 0.4
    assert values["trainer"] == {}
    assert cli._parse("pretrain", Settings, ["-c", str(tmp_path / "a.yaml")], False)["data"] == "elsewhere"


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "builtins.exec", "torch.hub.load", "stranger.Method"]
)
def test_a_recipe_cannot_name_foreign_classes(capsys, tmp_path, path):
    (tmp_path / "r.yaml").write_text(f"method:\n  class_path: {path}\n")
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Method: pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        mistake(capsys, "pretrain", "x", "-c", str(tmp_path / "r.yaml"))
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "canary").exists() and "stranger" not in sys.modules


def test_an_allowed_module_may_be_named(tmp_path, labelled_folder, capsys, monkeypatch):
    (tmp_path / "my_method.py").write_text(
        "from ssl_kit.methods.simclr import SimCLR\nclass Mine(SimCLR):\n    '''The same.'''\n"
    )
    (tmp_path / "r.yaml").write_text(
        "method:\n  class_path: my_method.Mine\n  init_args:\n    encoder: {args: {channels: [8, 8, 8, 8]}}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--run", str(tmp_path / "run"), "--batch-size", "16", "--trainer.max_steps", "1", "--json"]
    assert (
        cli.main(["pretrain", str(labelled_folder), "-c", str(tmp_path / "r.yaml"), "--allow", "my_method", *options])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["method"] == "Mine"


def test_json_is_the_only_thing_on_stdout(labelled_folder, tmp_path, capsys):
    assert cli.main(["views", str(labelled_folder), "--out", str(tmp_path / "v.png"), "--count", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["out"] == str(tmp_path / "v.png")
    assert "next: ssl-kit pretrain" in captured.err


def test_dashes_underscores_and_bare_flags():
    assert underscored("--max-bad") == "--max_bad"
    assert underscored("--views.local-size=3-4") == "--views.local_size=3-4"
    assert underscored("-k") == "--k" and underscored("my-data") == "my-data" and underscored("-c") == "-c"


@pytest.mark.parametrize("options", [["-c", "mae"], ["--method", "ssl_kit.methods.mae.MAE"]])
def test_a_method_brings_its_own_defaults(options):
    arguments = ["images", *options, "--method.mask_ratio", "0.5"]
    method = cli._parse("pretrain", Settings, arguments, everything=False)["method"]
    assert method["class_path"] == "ssl_kit.methods.mae.MAE" and method["init_args"]["mask_ratio"] == 0.5
    assert method["init_args"]["optim"]["name"] == "adamw" and "temperature" not in method["init_args"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("temperature", "0", "temperature 0.0: wanted more than 0"),
        ("optim.lr", "0", "got lr 0.0"),
        ("projection", "[8, 0]", "projection [8, 0]: wanted"),
    ],
)
def test_what_a_constructor_says_of_a_value_is_told(capsys, tmp_path, labelled_folder, option, value, words):
    run = ["--run", str(tmp_path / "run")]
    said = mistake(capsys, "pretrain", str(labelled_folder), *run, f"--method.{option}", value)
    assert words in said and "Namespace" not in said and len(said) < 200


ENDING = """
import atexit, sys, torch
from ssl_kit import cli
class Late:
    def __del__(self):
        print("the interpreter ended")
late = Late()
def main():
    atexit.register(print, "hooks were called")
    if joined:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if leave in ways:
        sys.exit(*ways[leave])
    return 2
ways = {"with a number": (75,), "without": (), "with a word": ("told",)}
joined, leave = "joined" in sys.argv, sys.argv[2]
cli.main = main
cli.run()
"""


@pytest.mark.parametrize(("joined", "words"), [("joined", 1), ("alone", 2)])
@pytest.mark.parametrize(
    ("leave", "code"), [("with a number", 75), ("without", 0), ("with a word", 1), ("it returns", 2)]
)
def test_a_failed_run_of_several_processes_ends_before_the_interpreter_does(joined, words, leave, code):
    done = subprocess.run([sys.executable, "-c", ENDING, joined, leave], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.splitlines() == ["hooks were called", "the interpreter ended"][:words]


def command(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "ssl_kit", *words], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("words", [["-h"], ["pretrain", "-h"], ["--version"], ["pretrian"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_mistake(words, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*words, stdout=writer, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (2 if words == ["pretrian"] else 0) and error.count("\n") == (words == ["pretrian"])


NASTY = "a\x1b[31mb\x07c\nd"
SHOWN = r"a\x1b[31mb\x07c\nd"


@pytest.mark.parametrize(
    "words",
    [
        [NASTY],
        ["pretrain", NASTY],
        ["pretrain", "x", "-c", NASTY],
        ["search", NASTY, "x"],
        ["views", "x", f"--{NASTY}", "1"],
        ["doctor", "--seconds", NASTY],
        ["report", NASTY],
        ["export", NASTY, "--out", NASTY],
    ],
)
def test_no_error_line_steers_the_terminal(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert SHOWN[:-3] in mistake(capsys, *words)  # some tell the first line of a word only


def test_what_is_interrupted_says_it_in_one_line(capsys, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt(NASTY)

    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == f"ssl-kit: interrupted; {SHOWN}\n"


# what a verb does -> what the line says of it
REFUSED = {
    "to a full disk": (lambda folder: Path("/dev/full").write_text("x"), "No space left on device; make room"),
    "below a file": (lambda folder: (folder / "file" / "x").write_text("x"), "file/x: Not a directory; choose another"),
    "a name too long": (lambda folder: (folder / (NASTY * 40)).mkdir(), "File name too long; choose another path"),
    "what has gone": (lambda folder: os.chdir(folder / NASTY), f"{SHOWN}: No such file or directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_machine_refuses_is_one_line(capsys, tmp_path, monkeypatch, what):
    do, words = REFUSED[what]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", lambda **_: do(tmp_path))
    assert words in mistake(capsys, "doctor")


def test_too_many_open_files_while_importing_are_one_line():
    """With six open, three of them the streams, Python starts; the first library does not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))
    program = "import os, sys\nfrom ssl_kit.cli import run\nheld = [os.open('/dev/null', 0) for _ in range(3)]\n"
    program += "sys.argv = ['ssl-kit', 'doctor']\nrun()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Too many open files; allow this process more" in done.stderr


def test_a_mistake_of_ours_is_told_as_such(monkeypatch):
    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", lambda **_: {}["x"])
    with pytest.raises(KeyError):
        cli.main(["doctor"])


DOCUMENT = "from ssl_kit import cli\ncli._run = lambda _: print('x' * 10) or 0\ncli.run()"


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--json"], 2)])
def test_results_that_find_no_room_are_missed(words, code):
    """People's text may go; the document that a program waits for may not."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", DOCUMENT, "doctor", *words], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == code
    assert (
        done.stderr.decode() == "ssl-kit: stdout: No space left on device; make room where it leads. All else is done\n"
    )


def test_the_document_is_json_whatever_is_in_a_name(capsys, monkeypatch):
    monkeypatch.setattr("ssl_kit.verbs.doctor.doctor", lambda **_: {"a": NASTY + "\x7f\x9b"})
    assert cli.main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": NASTY + "\x7f\x9b"} and out.strip().isprintable()
