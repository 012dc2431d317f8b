"""The layout is the architecture: imports go down only, and dangerous calls appear nowhere in the package."""

import ast
from pathlib import Path

import pytest

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
    "report": {"evaluation.result"},
    "verbs": {
        "core",
        "views",
        "encoders",
        "training",
        "data",
        "methods",
        "embeddings",
        "evaluation",
        "report",
        "verbs",
    },
    "cli": {"verbs"},
    "__main__": {"cli"},
    "__init__": {"verbs"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


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


def test_only_neighbours_imports_faiss_and_torch_comes_first():
    users = [path for path in FILES if any(name.split(".")[0] == "faiss" for name in imported(path))]
    assert [str(path.relative_to(PACKAGE)) for path in users] == ["evaluation/neighbours.py"]
    names = list(imported(users[0]))
    assert names.index("torch") < names.index("faiss")


def test_encoders_evaluation_and_core_load_without_lightning():
    for name in ("core", "views", "encoders", "evaluation", "report"):
        for path in (PACKAGE / name).rglob("*.py"):
            assert not any("lightning" in module for module in imported(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unpickles_or_evaluates(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & {name.split(".")[0] for name in imported(path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "torch.load", "yaml.load", "torch.hub.load", "os.system"), called
            assert keywords.get("weights_only") != "False" and keywords.get("allow_pickle") != "True"
            assert not called.endswith("extractall") or keywords.get("filter") == "'data'"


def test_a_reader_finds_the_loss_in_five_files_and_a_thousand_lines():
    way = ("verbs/pretrain.py", "methods/simclr.py", "methods/method.py", "training/optim.py")
    lines = sum(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in way)
    recipe = PACKAGE.parent / "recipes" / "simclr_cifar10_small.yaml"
    assert lines + len(recipe.read_text().splitlines()) <= 1000
