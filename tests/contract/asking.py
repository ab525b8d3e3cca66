"""Which clauses are asked of all optimizers in every run of the tests, and which of a few; the long tests ask all."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

BY_ENGINE = {
    *("parameter_forms", "replaced_parameters", "schedulers", "scaler", "skipped_by_scaler"),
    *("resume_deepcopy", "resume_pickle", "resume_untrained", "resume_by_name", "resume_frozen"),
    *("resume_distributed", "resume_flattened"),
    *("copied_state", "replaced_state", "cleared_state", "reordered_parameters", "moved_parameter", "foreign_entries"),
}
"""Clauses that the engine keeps for all rules in the same way. They take half of the time of all."""


def asked(pairs: Collection[tuple[str, str]], representatives: Collection[str]) -> list[Any]:
    """Return pairs of an optimizer and a clause; those that a representative answers for the others are marked slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(*pair, marks=slow if pair[1] in BY_ENGINE and pair[0] not in representatives else ())
        for pair in pairs
    ]
