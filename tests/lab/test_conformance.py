"""docs/conformance.md says what was measured, and what was measured is about the suite as it is."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steepest.optimizers import BY_CLOSURE, NAMES
from steepest.testing import CLAUSES, check_optimizer

ROOT = Path(__file__).parents[2]
FAST = {name for name, clause in CLAUSES.items() if not clause.slow}


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "benchmarks" / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conformance = _script()
FOUND: dict[str, Any] = json.loads(conformance.RESULTS.read_text())
ROWS: dict[str, dict[str, Any]] = {row["optimizer"]: row for row in FOUND["optimizers"]}


def test_the_page_says_what_was_measured() -> None:
    text = conformance.PAGE.read_text()
    assert conformance.page(text, FOUND) == text, "run: python benchmarks/conformance.py --tables"


def test_a_changed_figure_changes_the_page() -> None:
    text = conformance.PAGE.read_text()
    for change in ({"kept": 3}, {"broken": {"closure": "why"}}, {"command": "steepest check nothing"}):
        changed = FOUND | {"optimizers": [row | change for row in FOUND["optimizers"]]}
        assert conformance.page(text, changed) != text
    assert conformance.page(text, FOUND | {"date": "2001-01-01"}) != text


def test_every_clause_has_a_verdict() -> None:
    """A clause that is added or renamed asks for new figures."""
    assert FOUND["clauses"] == len(FAST)
    for row in ROWS.values():
        named = {*row["broken"], *row["not_applicable"]}
        assert named <= FAST
        assert row["kept"] == len(FAST) - len(named)
        assert all(row["broken"].values()), "no cross without evidence"


def test_all_of_ours_are_there_and_break_nothing() -> None:
    ours = {name: row for name, row in ROWS.items() if name.startswith("steepest ")}
    assert ours.keys() == {f"steepest {name}" for name in (*NAMES, *BY_CLOSURE, "gauss-newton")}
    assert not any(row["broken"] for row in ours.values())


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("torch AdamW", functools.partial(torch.optim.AdamW, lr=1e-3)),
        ("torch Muon", functools.partial(torch.optim.Muon, lr=1e-3)),
    ],
)
def test_torchs_are_found_so_again(name: str, factory: Any) -> None:
    found = check_optimizer(factory)
    assert {finding.clause.name for finding in found.broken} == ROWS[name]["broken"].keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith(("steepest ", "torch "))])
def test_other_libraries_are_found_so_again(name: str) -> None:
    pytest.importorskip(name.split()[0])
    row = conformance.measure(name, ROWS[name]["command"])
    assert row["broken"].keys() == ROWS[name]["broken"].keys()
