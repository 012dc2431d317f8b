"""A recipe names classes of ssl_kit, each in the module that defines it; nothing else is imported, no bomb unfolds."""

import sys

import pytest

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.verbs.recipes import check_class_paths, packaged, read_recipe

SIMCLR = "ssl_kit.methods.simclr.SimCLR"
FOREIGN = (
    *("os.system", "subprocess.Popen", "builtins.exec", "torch.hub.load", "canary_module.Method"),
    *("ssl_kit.verbs.pretrain.os.system", "ssl_kit.core.files.shutil.rmtree", "ssl_kit.embeddings.embeddings.np.load"),
    *(
        "ssl_kit.methods.method.Encoder",
        "ssl_kit.nowhere.Method",
        "ssl_kit.methods.simclr",
        "ssl_kit..x",
        "ssl_kit.methods",
    ),
)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module of a stranger's in Python's reach; the file that importing it leaves."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "canary_module.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Method: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "canary"


def write(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", FOREIGN)
def test_a_path_is_refused_wherever_it_stands(canary, path):
    spec = {"class_path": path}
    nested = {"method": {"class_path": SIMCLR, "init_args": {"encoder": spec}}}
    for value in (spec, nested, {"trainer": {"callbacks": [spec]}}, [spec]):
        with pytest.raises(UserError, match=r"outside ssl_kit|defines no class"):
            check_class_paths(value)
    assert "canary_module" not in sys.modules and not canary.exists()


@pytest.mark.parametrize("path", ["canary_module.Method", "ssl_kit.verbs.pretrain.os.system"])
def test_the_command_line_refuses_before_anything_is_imported(canary, tmp_path, path, capsys):
    recipes = [
        f"method: {path}",
        f"method: {{class_path: {path}}}",
        f"trainer: {{callbacks: [{{class_path: {path}}}]}}",
    ]
    ways = [["-c", write(tmp_path, text)] for text in recipes[:1]] + [["--method", path]]
    for text in recipes:
        assert cli.main(["pretrain", "digits", "--run", str(tmp_path / "run"), "-c", write(tmp_path, text)]) == 2
    for way in ways:
        assert cli.main(["pretrain", "digits", "--run", str(tmp_path / "run"), *way]) == 2
    assert "canary_module" not in sys.modules and not canary.exists() and not (tmp_path / "run").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_own_classes_and_allowed_modules_pass():
    check_class_paths({"method": {"class_path": SIMCLR, "init_args": {"encoder": {"class_path": "Encoder"}}}})
    check_class_paths({"class_path": "mine.method.Mine"}, ["mine.method"])
    check_class_paths(["ssl_kit.encoders.encoder.Encoder", "ssl_kit", "a word", None, 5])
    with pytest.raises(UserError, match=r"add --allow mine\.other"):
        check_class_paths({"class_path": "mine.other.Mine"}, ["mine.method"])
    with pytest.raises(UserError, match="outside"):
        check_class_paths({"class_path": "mine.methods.Mine"}, ["mine.method"])
    for recipe in packaged():
        check_class_paths(read_recipe(recipe))


LEVELS = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("\n".join(["x0: &x0 [1]", *LEVELS]), "alias"),
        ("a: &a {b: 1}\nc: {<<: *a}", "alias"),
        ("{a: " * 90 + "1" + "}" * 90, "inside each other"),
        ("[" * 200, "open at once"),
        ("a: " + "x" * 2**20, "bytes"),
        ("epochs: " + "9" * 5_000, "not YAML"),
        ("epochs: 2020-99-99", "not YAML"),
        ("method: !!python/object/apply:os.system [true]", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("[1, 2]", "a list; a recipe is a mapping"),
    ],
)
def test_recipes_that_are_none_or_bombs(tmp_path, text, why):
    with pytest.raises(UserError, match=why):
        read_recipe(write(tmp_path, text))


def test_what_is_no_utf8(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"epochs: \xff")
    with pytest.raises(UserError, match="not YAML"):
        read_recipe(str(tmp_path / "recipe.yaml"))
