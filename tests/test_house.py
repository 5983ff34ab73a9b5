"""The house rules that a reader relies on: one direction of imports, small files, Linen in two packages only."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports from its own storey and from those below it.
STOREYS = (
    ("errors", "fields", "config", "arguments", "validation", "cli", "disk", "edge", "huge_pages"),
    ("ops",),
    ("models",),
    ("parallel",),
    ("tasks", "data"),
    ("train", "telemetry", "hf"),
    ("serve", "rl", "federated", "search"),
    ("__main__",),
)
STOREY = {name: level for level, names in enumerate(STOREYS) for name in names}
NO_INPUT_OUTPUT = {"optax", "grain", "orbax", "tensorstore"}  # models and ops say what is computed, nothing else
DISTRIBUTION = {
    "PIL": "pillow",
    "ai_edge_litert": "ai-edge-litert",
    "fhir": "fhir.resources",
    "hdfs_native": "hdfs-native",
    "iree": "iree-base-runtime",
    "orbax": "orbax-checkpoint",
}
ELSEWHERE = {  # run in the Python of an environment of its own
    f"r1jax.serve.{name}_worker" for name in ("device", "litert", "iree")
}


def python_files() -> list[Path]:
    """Python files of the project, without virtual environments and build folders."""
    tops = ("r1jax", "configs", "tests", "benchmarks")
    return sorted([*ROOT.glob("*.py"), *(path for top in tops for path in (ROOT / top).rglob("*.py"))])


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; relative imports are made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Imports of one module of r1jax that the house forbids."""
    room = module.split(".")[1] if "." in module else ""
    found = []
    for name in imports(ast.parse(source), module):
        top, *rest = name.split(".")
        if top == "r1jax" and rest and rest[0] in STOREY and STOREY[rest[0]] > STOREY.get(room, -1):
            found.append(f"{module} imports {name}, which is above it")
        if room in ("models", "ops") and top in NO_INPUT_OUTPUT:
            found.append(f"{module} imports {name}")
        if room not in ("models", "ops") and name.startswith("flax.linen"):
            found.append(f"{module} imports {name}")
    return found


def modules() -> dict[str, Path]:
    """Modules of r1jax by dotted name."""
    named = {}
    for path in (ROOT / "r1jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def test_imports_go_one_way():
    found = [line for module, path in modules().items() for line in violations(module, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("r1jax.ops.rope", "from r1jax.models import decoder"),
        ("r1jax.models.moe", "def f():\n    import r1jax.train.step"),
        ("r1jax.data.source", "from ..train import loop"),
        ("r1jax.models.moe", "import optax"),
        ("r1jax.ops.losses", "from orbax import checkpoint"),
        ("r1jax.train.step", "from flax import linen as nn"),
        ("r1jax.train.step", "import flax.linen"),
    ],
)
def test_forbidden_imports_are_seen(module, source):
    assert len(violations(module, source)) == 1


def test_allowed_imports_are_not_reported():
    source = "import optax\nfrom flax import traverse_util\nfrom r1jax.data import source\nfrom . import state"
    assert violations("r1jax.train.step", source) == []


def test_the_engine_knows_no_task():
    for module, path in modules().items():
        if module.startswith("r1jax.train"):
            names = [name for name in imports(ast.parse(path.read_text("utf-8")), module) if ".tasks." in name]
            assert all(name.startswith("r1jax.tasks.task.") for name in names), (module, names)


def test_every_room_has_its_storey():
    rooms = {module.split(".")[1] for module in modules() if "." in module}
    assert rooms <= set(STOREY), f"give {sorted(rooms - set(STOREY))} a place in STOREYS"


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"] + extras}
    for module, path in modules().items():
        if module in ELSEWHERE:
            continue
        for name in imports(ast.parse(path.read_text("utf-8")), module):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "r1jax":
                assert DISTRIBUTION.get(top, top).lower() in declared, f"{module} imports {top}"


def test_what_runs_on_a_device_needs_numpy_and_a_run_time_alone():
    own = sys.stdlib_module_names | {"numpy", "ai_edge_litert", "iree"}
    edge = {module: path for module, path in modules().items() if module.startswith("r1jax.edge")}
    assert len(edge) > 1
    for module, path in edge.items():
        for name in imports(ast.parse(path.read_text("utf-8")), module):
            assert name.startswith("r1jax.edge") or name.split(".")[0] in own, (module, name)


def test_files_are_small():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in python_files()}
    assert [f"{path}: {lines}" for path, lines in lengths.items() if lines > 600] == []


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_scripts_fit_a_screen_or_two(script):
    assert len((ROOT / script).read_text("utf-8").splitlines()) <= 120


def test_no_drawer_for_odds_and_ends():
    assert [path for path in python_files() if path.name in ("utils.py", "util.py", "helpers.py", "misc.py")] == []


def test_no_postponed_work():
    marks = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    assert [path for path in python_files() if marks.search(path.read_text("utf-8"))] == []
