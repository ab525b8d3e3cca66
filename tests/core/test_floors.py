"""Folders are floors: imports only go down, and never in a circle, for type checkers neither."""

import ast
from functools import cache
from pathlib import Path

import pytest

import steepest

ROOT = Path(steepest.__file__).parent
FLOORS = [
    {"kernels", "linalg"},
    {"rule", "schedules", "view"},
    {"curvature", "rules", "stack"},
    {"exchange"},
    {"engine", "newton"},
    {"adopting", "clipping", "functional", "optimizers", "recipes", "routing"},
    {"integrations", "lab", "testing"},
    {"__main__", "cli"},
]


def modules() -> dict[str, Path]:
    files = {".".join(("steepest", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in it that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or {node.module}
    return found & (known - {"steepest"})


def floor(module: str) -> int:
    (found,) = [number for number, folders in enumerate(FLOORS) if module.split(".")[1] in folders]
    return found


@cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) for name, path in known.items() if name != "steepest"}


@pytest.mark.parametrize("name", sorted(set(modules()) - {"steepest"}))
def test_imports_only_go_down(name):
    assert {other for other in graph()[name] if floor(other) > floor(name)} == set()


def test_no_circles():
    below = graph()
    while below:
        leaves = {name for name, imported in below.items() if not imported & below.keys() - {name}}
        assert leaves, f"in a circle, or above one: {sorted(below)}"
        below = {name: imported for name, imported in below.items() if name not in leaves}


def test_an_import_that_goes_up_is_seen(tmp_path):
    bad = tmp_path / "linalg.py"
    bad.write_text("if TYPE_CHECKING:\n    from steepest.engine.optimizer import Optimizer\n")
    assert imports(bad, set(modules())) == {"steepest.engine.optimizer"}
    assert floor("steepest.engine.optimizer") > floor("steepest.linalg.polar")
