"""The suite is strict enough: for every clause there is an optimizer that breaks it, and the clause notices."""

from __future__ import annotations

from collections.abc import Iterator

import mutants
import mutants_of_gradients
import mutants_saving
import pytest
import torch

from steepest.testing import CLAUSES, Verdict, check_clause
from steepest.testing.subject import Factory, Subject

MODULES = (mutants, mutants_saving, mutants_of_gradients)
MUTANTS: dict[str, list[Factory]] = {
    clause: [mutant for module in MODULES for mutant in module.MUTANTS.get(clause, [])]
    for clause in {clause for module in MODULES for clause in module.MUTANTS}
}


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("clause", [name for name, clause in CLAUSES.items() if not clause.slow])
def test_the_clause_notices(clause: str) -> None:
    for mutant in MUTANTS[clause]:
        finding = check_clause(CLAUSES[clause], Subject(mutant))
        assert finding.verdict is Verdict.BROKEN, mutant
        assert "expected" in finding.why
        assert "saw" in finding.why


@pytest.mark.slow
def test_the_slow_clause_notices() -> None:
    for mutant in MUTANTS["compiled_step"]:
        assert check_clause(CLAUSES["compiled_step"], Subject(mutant)).verdict is Verdict.BROKEN


def test_every_clause_has_a_mutant() -> None:
    assert set(MUTANTS) == set(CLAUSES)
