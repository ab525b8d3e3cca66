"""How Kronecker factors are, and the bases or roots that were computed of them."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.engine.diagnostics.readings import Readings
from steepest.engine.roster import Roster
from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule import State
from steepest.stack.stack import Stack, to_device

SIDES = ("L", "R", "A", "B")
"""The names of Kronecker factors in states."""
COLUMNS = 256
"""Columns of a basis that a drift is computed from: with all of a longer one, a call would cost as much as a step."""
ITERATIONS = 20
"""Products by which a largest eigenvalue is estimated where there is no basis."""


def note_factors(readings: Readings, stack: Stack, roster: Roster) -> None:
    """Note how the Kronecker factors of a stack are, slot by slot, under (what, stack); NaN: no gradient yet."""
    with fp32_matmul_precision("highest"):
        for side in SIDES:
            if side in stack.state:
                roots = [getattr(roster.rules[segment.group], "root", 1) for segment in stack.segments]
                slots = [root for root, s in zip(roots, stack.segments, strict=True) for _ in range(s.start, s.stop)]
                for what, x in factor_health(stack.state, side, to_device(slots, stack.device)).items():
                    readings.note((what, stack), x)
    readings.note(("failed_decompositions", stack), stack.failures)


def factor_health(state: State, side: str, root: int | Tensor = 1) -> dict[str, Tensor]:
    """Return numbers ``[B]`` about one side's factors ``K [B, d, d]``, with one matrix product at most.

    ``P`` in the state, where there is no basis, is a root's inverse: ``P ≈ K^(-1/root)``, with a
    root for each matrix.

    >>> state = {"L": torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), "Q_L": torch.eye(2)[None]}
    >>> {name: round(x.item(), 3) for name, x in factor_health(state, "L").items()}
    {'effective_rank': 0.8, 'condition_number': 1.0, 'basis_drift': 0.447}
    """
    K, Q, P = state[side], state.get(f"Q_{side}"), state.get(f"P_{side}")
    norm = torch.linalg.vector_norm(K, dim=(-2, -1), dtype=torch.float64)  # [B]
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=torch.float64)
    found = {"effective_rank": (trace / norm).square() / K.shape[-1]}
    if Q is not None:
        weights, whole = torch.ones((), dtype=torch.float64, device=K.device), norm.square()
        if f"lambda_{side}" in state:
            λ = state[f"lambda_{side}"].double()  # [B, d]
        elif "in_basis" in state:  # KL-SOAP's factors stand in their bases' coordinates
            λ = K.diagonal(dim1=-2, dim2=-1).double()
        else:
            Q = Q.to(K.dtype)
            if Q.shape[-1] > COLUMNS:
                Q, weights = _some_columns(Q)
            KQ = K @ Q  # [B, d, c]
            λ = (Q * KQ).sum(dim=-2, dtype=torch.float64)
            whole = (weights * torch.linalg.vector_norm(KQ, dim=-2, dtype=torch.float64).square()).sum(dim=-1)
        top = λ.amax(dim=-1)
        found["condition_number"] = top / torch.maximum(λ.amin(dim=-1), torch.finfo(K.dtype).eps * top)
        found["basis_drift"] = (1 - (weights * λ.square()).sum(dim=-1) / whole).clamp(min=0).sqrt()
    elif P is not None:
        found["condition_number"] = (_largest(K) * _largest(P) ** root).clamp(min=1.0)
    return found


def _some_columns(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return `COLUMNS` columns of bases ``Q [B, d, d]``, and for how many each stands: the first, and evenly others.

    Columns are ordered by descending eigenvalue, so the first are most of the factor, and the last has the smallest.
    """
    d, half = Q.shape[-1], COLUMNS // 2
    others = [half + (d - half - 1) * i // (half - 1) for i in range(half)]
    weights = torch.ones(COLUMNS, dtype=torch.float64, device=Q.device)
    weights[half:] = (d - half) / half
    return Q.index_select(-1, to_device([*range(half), *others], Q.device)), weights


def _largest(K: Tensor) -> Tensor:
    """Return about the largest eigenvalue of ``K [B, d, d]``, symmetric, from its row with the largest diagonal."""
    start = K.diagonal(dim1=-2, dim2=-1).argmax(dim=-1).view(-1, 1, 1).expand(-1, 1, K.shape[-1])
    x = K.gather(-2, start).mT  # [B, d, 1]
    for _ in range(ITERATIONS):
        norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True, dtype=torch.float64)
        x = K @ (x / norm.clamp(min=1e-300)).to(K.dtype)
    largest: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64)
    return largest
