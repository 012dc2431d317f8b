"""The layout is the architecture: imports go down only, and dangerous calls appear nowhere in the package."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import house

PACKAGE = Path(__file__).parent.parent / "ssl_kit"
ALLOWED = {  # design: who may import whom; core is open to all
    "core": set(),
    "views": set(),
    "encoders": set(),
    "training": set(),
    "data": {"views"},
    "methods": {"encoders", "training"},
    "embeddings": {"data", "views", "encoders"},
    "evaluation": {"embeddings", "data", "views", "encoders", "training"},
    "report": {"evaluation.result", "evaluation.catalog"},
    "verbs": {"views", "encoders", "training", "data", "methods", "embeddings", "evaluation", "report"},
    "cli": {"verbs"},
    "api": {"verbs", "embeddings", "encoders", "data", "views", "methods"},
    "estimator": {"api", "embeddings", "data", "encoders"},
    "__main__": {"cli"},
    "__init__": {"verbs"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN = ("eval", "exec", "__import__", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load")
FORBIDDEN += ("yaml.load_all", "os.system", "os.popen", "subprocess.getoutput", "np.fromregex")
IMPORTERS = ("__init__.py", "evaluation/catalog.py", "cli.py")  # of their own names
IMPORTERS += ("verbs/defaults.py",)  # of a class that the parser accepted
IMPORTERS += ("verbs/recipes.py",)  # of a function that the command line names and allows
IMPORTERS += ("core/settings.py",)  # of the verb that a package shares its name with


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = part(path)
    allowed = ALLOWED[own] | {"core", own}
    for name in imported(path):
        if name.startswith("ssl_kit.") and name != "ssl_kit.__version__":
            inner = name.removeprefix("ssl_kit.")
            assert any(inner == up or inner.startswith(up + ".") for up in allowed), f"{own} imports {name}"


def test_no_two_draws_share_a_stream_of_random_numbers():
    found = {}
    for path in FILES:
        for name, numbers in re.findall(r"^(\w*_STREAM[\w, ]*) = ([\d_, ]+)", path.read_text(encoding="utf-8"), re.M):
            for one, number in zip(name.split(","), numbers.split(","), strict=True):
                found.setdefault(int(number), []).append(f"{path.stem}.{one.strip()}")
    assert len(found) > 15 and not {number: names for number, names in found.items() if len(names) > 1}


def test_only_four_files_import_faiss_and_torch_comes_first():
    users = [path for path in FILES if any(name.split(".")[0] == "faiss" for name in imported(path))]
    assert [str(path.relative_to(PACKAGE)) for path in users] == [
        "embeddings/exact.py",
        "embeddings/filling.py",
        "embeddings/index.py",
        "embeddings/signing.py",
    ]
    # before any of them, but in the process of `ssl-kit index`, which has none: tests/embeddings/test_filling.py
    first = (PACKAGE / "embeddings" / "__init__.py").read_text(encoding="utf-8")
    assert "\nif not core.light:\n    import torch" in first
    lights = [path for path in FILES if "core.light =" in path.read_text(encoding="utf-8")]
    assert [path.name for path in lights] == ["cli.py", "filling.py"]


def test_encoders_evaluation_and_core_load_without_lightning():
    for name in ("core", "views", "encoders", "evaluation", "report"):
        for path in (PACKAGE / name).rglob("*.py"):
            if path.name != "finetune.py":  # a training; only its verb imports it
                modules = imported(path)
                assert not any("lightning" in module or module.endswith("finetune") for module in modules), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {name.split(".")[0] for name in imported(path)}
    assert not {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "pty"} & modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in FORBIDDEN, called
            assert not called.startswith(("os.exec", "os.spawn", "torch.hub.", "runpy.")), called
            assert keywords.get("weights_only") != "False" and keywords.get("allow_pickle", "False") == "False"
            assert keywords.get("shell", "False") == "False" and keywords.get("trust_remote_code", "False") == "False"
            assert not called.endswith(("extractall", ".unpack_archive")) or keywords.get("filter") == "'data'"
            if called.endswith("import_module"):  # a path out of a file must never get here
                assert str(path.relative_to(PACKAGE)) in IMPORTERS, path


@pytest.mark.parametrize("kind", house.methods(), ids=lambda kind: kind.__name__)
def test_the_way_to_a_loss_is_short(kind, tmp_path, monkeypatch):
    """What is on the call stack when the loss is asked for, and when the method is built, in a real run of one step."""
    monkeypatch.chdir(tmp_path)
    files = house.way(kind)
    assert any(path.parent.name == "methods" for path in files) and len(files) <= 7, files
    assert sum(map(house.code_lines, files)) <= (1_000 if kind.__name__ in ("SimCLR", "BYOL") else 1_300)


def test_no_two_files_have_one_name_but_a_verb_and_its_subject():
    names = [path.stem for path in FILES if path.name[0] != "_" and path.parent.name != "verbs"]
    assert not {name for name in names if names.count(name) > 1}
