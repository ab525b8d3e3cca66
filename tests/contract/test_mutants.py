"""The suite is strict enough: for every clause there is an optimizer that breaks it, and the clause notices."""

from __future__ import annotations

from collections.abc import Iterator

import mutants
import mutants_of_closures
import mutants_of_edits
import mutants_of_gradients
import mutants_of_surroundings
import mutants_saving
import pytest
import torch

from steepest.testing import CLAUSES, Verdict, check_clause, check_optimizer
from steepest.testing.subject import Factory, Subject

MODULES = (
    mutants, mutants_saving, mutants_of_gradients, mutants_of_surroundings, mutants_of_edits, mutants_of_closures,
)  # fmt: skip
MUTANTS: dict[str, list[Factory]] = {
    clause: [mutant for module in MODULES for mutant in module.MUTANTS.get(clause, [])]
    for clause in {clause for module in MODULES for clause in module.MUTANTS}
}

HOSTS = [name for name, clause in CLAUSES.items() if clause.number in (16, 17)]


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
@pytest.mark.parametrize("clause", [name for name, clause in CLAUSES.items() if clause.slow])
def test_the_slow_clause_notices(clause: str) -> None:
    for mutant in MUTANTS[clause]:
        assert check_clause(CLAUSES[clause], Subject(mutant)).verdict is Verdict.BROKEN


@pytest.mark.parametrize("clause", HOSTS)
def test_no_other_clause_notices(clause: str) -> None:
    """What hosts do around and between steps can go wrong in one way, and not in the others."""
    for mutant in MUTANTS[clause]:
        report = check_optimizer(mutant, only=HOSTS)
        assert [finding.clause.name for finding in report.broken] == [clause], report


def test_every_clause_has_a_mutant() -> None:
    assert set(MUTANTS) == set(CLAUSES)
