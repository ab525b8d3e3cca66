"""Imports only go down: every module of the package stands on a floor, and imports from lower ones or its own kind."""

import ast
from pathlib import Path

import pytest

import steepest

ROOT = Path(steepest.__file__).parent
FLOORS = [
    {"linalg", "kernels", "phases"},
    {"rule", "kronecker", "moments", "factors", "factors_in_basis", "scales", "schedules", "rounding", "storage"},
    {"rules", "views", "stacks", "options", "graphs"},
    {"exchange", "capture"},
    {"apply", "checkpoint", "consolidation", "elementwise", "optimizer", "stepping", "undo"},
    {"optimizers", "routing", "recipes"},
    {"probes", "testing", "lab"},
    {"cli"},
]


def place(module: str) -> int:
    part = module.split(".")[1]
    found = [floor for floor, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{module} stands on no floor: say in FLOORS where it belongs"
    return found[0]


def modules() -> dict[str, Path]:
    files = {".".join(("steepest", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that are imported when this one is (not those under TYPE_CHECKING or in functions)."""
    found = set()
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in known} or {node.module}
        pending += list(ast.iter_child_nodes(node))
    return {module for module in found if module.split(".")[0] == "steepest" and module != "steepest"}


@pytest.mark.parametrize("name", sorted(set(modules()) - {"steepest"}))
def test_imports_only_go_down(name):
    known = set(modules())
    for other in imports(name, modules()[name], known):
        assert place(other) <= place(name), f"{name} (floor {place(name)}) imports {other} (floor {place(other)})"


def test_no_circles():
    known = modules()
    graph = {name: imports(name, path, set(known)) & set(known) for name, path in known.items() if name != "steepest"}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_test_sees_an_import_that_goes_up(tmp_path):
    bad = tmp_path / "kronecker.py"
    bad.write_text("from steepest.optimizer import Optimizer\n")
    assert imports("steepest.kronecker", bad, set(modules())) == {"steepest.optimizer"}
    assert place("steepest.optimizer") > place("steepest.kronecker")
