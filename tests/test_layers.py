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
    ["openai_prompt"],
    ["_prefix_index_py"],
    ["prefix_index"],
    ["load"],
    ["in_flight"],
    ["_columns_py"],
    ["indicators"],
    ["lower_tiers"],
    ["scorers"],
    ["failure_condition"],
    ["_failure_py"],
    ["_failure_paper"],
    ["failure"],
    ["policies"],
    ["decision"],
    ["record"],
    ["router"],
    ["lifecycle"],
    ["tokenizer"],
    ["prompt_routing"],
    ["chat_template"],
    ["prompt_reader"],
    ["testing"],
    ["events"],
    ["adapters"],
    ["gateway"],
    ["replay"],
    ["mock_engine"],
    ["commands"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
# the stub says which interface the native index has
TYPES_ONLY = {("_native", "prefix_index")}
MODULES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyi", ".pyx"))
PURE = [path for path in MODULES if path.suffix == ".py"]

# what numpy.random offers besides its global generator
SEEDED = {"BitGenerator", "Generator", "PCG64", "Philox", "SeedSequence", "default_rng"}
IMPURE = {"time", "random", "os", "secrets", "uuid"}
CLOCKS = {"now", "today", "utcnow"}


def unit(path):
    """The layer's name for a file: the module, or the package that it lies in."""
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


def source_of(path):
    """What ast can read of a file: all of it, or the imports of a Cython module."""
    lines = path.read_text().splitlines()
    if path.suffix == ".pyx":
        lines = [
            line.strip() for line in lines if line.strip().startswith(("from mulsched", "import mulsched"))
        ]
    return "\n".join(lines)


def imports(source):
    """Names of mulsched's modules that a source imports, anywhere in it; ``__init__`` for the whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"mulsched.{a.name}" for a in node.names] if node.module == "mulsched" else [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "mulsched":
                module = rest.partition(".")[0]
                yield module if module in HEIGHT else "__init__"


def climbs(own, source):
    return [
        other
        for other in imports(source)
        if other != own and HEIGHT[other] >= HEIGHT[own] and (own, other) not in TYPES_ONLY
    ]


def impurities(source):
    """Uses of clocks, the environment and random state that no argument seeds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += {alias.name.partition(".")[0] for alias in node.names} & IMPURE
        elif isinstance(node, ast.ImportFrom):
            found += {node.module.partition(".")[0]} & IMPURE
            if node.module == "numpy.random":
                found += [f"np.random.{alias.name}" for alias in node.names if alias.name not in SEEDED]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("np.random", "numpy.random") and node.attr not in SEEDED:
                found.append(f"np.random.{node.attr}")
            if owner.split(".")[-1] in ("datetime", "date") and node.attr in CLOCKS:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node)
            if called.endswith(("default_rng()", "SeedSequence()")):
                found.append(called)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path):
    assert climbs(unit(path), source_of(path)) == []


@pytest.mark.parametrize(
    "path",
    # the backend is chosen by the environment, the number of processes by the machine, a salt by chance;
    # the hosts of adapters tell them no time
    [path for path in PURE if unit(path) not in ("_backend", "commands", "adapters")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_but_its_arguments_decides(path):
    assert impurities(source_of(path)) == []


def test_every_module_has_its_layer():
    assert {unit(path) for path in MODULES} <= HEIGHT.keys()


@pytest.mark.parametrize(
    ("own", "source", "expected"),
    [
        ("load", "from mulsched.router import Router", ["router"]),
        ("load", "def f():\n    import mulsched.policies.linear", ["policies"]),
        ("load", "from mulsched import router", ["router"]),
        ("load", "if TYPE_CHECKING:\n    from mulsched.router import Router", ["router"]),
        ("load", "import mulsched", ["__init__"]),
        ("load", "from mulsched import Router", ["__init__"]),
        ("router", "from mulsched.load import LoadTable", []),
        ("router", "import numpy", []),
    ],
)
def test_a_climbing_import_is_seen(own, source, expected):
    assert climbs(own, source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", ["time"]),
        ("import os.path", ["os"]),
        ("from random import choice", ["random"]),
        ("np.random.seed(1)", ["np.random.seed"]),
        ("np.random.choice(3)", ["np.random.choice"]),
        ("from numpy.random import rand", ["np.random.rand"]),
        ("np.random.default_rng()", ["np.random.default_rng()"]),
        ("np.random.default_rng(seed)", []),
        ("rng.choice(3)", []),
        ("datetime.now()", ["datetime.now"]),
        ("datetime.datetime.utcnow()", ["datetime.datetime.utcnow"]),
        ("now", []),
    ],
)
def test_an_impurity_is_seen(source, expected):
    assert impurities(source) == expected
