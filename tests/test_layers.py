"""A module imports only from lines above its own, and the core knows no clock, environment or global rng."""

import ast
from pathlib import Path

import pytest

import mulsched

PACKAGE = Path(mulsched.__file__).parent

# From the bottom up. A package stands for its modules, which may import each other.
LAYERS = [
    ["errors"],
    ["types"],
    ["_native"],
    ["_backend"],
    ["_block_keys_py"],
    ["block_keys"],
    ["_prefix_index_py"],
    ["prefix_index"],
    ["load"],
    ["_columns_py"],
    ["indicators"],
    ["scorers"],
    ["policies"],
    ["decision"],
    ["router"],
    ["replay"],
    ["cli"],
    ["__main__", "__init__"],
]
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
# the twins' interface is typed with what stands above them
TYPES_ONLY = {("_columns_py", "prefix_index"), ("indicators", "prefix_index")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path):
    """The layer's name for a file: the module, or the package that it lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source):
    """Names of mulsched's modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"mulsched.{a.name}" for a in node.names] if node.module == "mulsched" else [node.module]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "mulsched" and "." in name:
                yield name.split(".")[1]


def climbs(own, source):
    return [
        other
        for other in imports(source)
        if other != own and HEIGHT[other] >= HEIGHT[own] and (own, other) not in TYPES_ONLY
    ]


def impurities(source):
    """Uses of clocks, the environment and global random state."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module.split(".")[0]]
        found += {"time", "random", "os", "secrets", "uuid"} & set(names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            found += ["np.random"] if (node.value.attr, node.attr) == ("random", "seed") else []
        if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today"):
            found += ["clock"] if isinstance(node.value, ast.Name) and node.value.id == "datetime" else []
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path):
    assert climbs(unit(path), path.read_text()) == []


@pytest.mark.parametrize(
    "path",
    # the backend is chosen by the environment, the number of processes by the machine
    [path for path in MODULES if unit(path) not in ("_backend", "cli")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_but_its_arguments_decides(path):
    assert impurities(path.read_text()) == []


def test_every_module_has_its_layer():
    assert {unit(path) for path in MODULES} <= HEIGHT.keys()


def test_a_climbing_import_would_be_seen():
    assert climbs("load", "from mulsched.router import Router") == ["router"]
    assert climbs("load", "def f():\n    import mulsched.policies.linear") == ["policies"]
    assert climbs("load", "from mulsched import router") == ["router"]
    assert climbs("router", "from mulsched.load import LoadTable") == []


def test_an_impurity_would_be_seen():
    assert impurities("import time") == ["time"]
    assert impurities("from random import choice") == ["random"]
    assert impurities("np.random.seed(1)") == ["np.random"]
    assert impurities("datetime.now()") == ["clock"]
