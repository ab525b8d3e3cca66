"""The Fisher matrix of a layer by its two Kronecker factors: how statistics enter, and how it is divided by in a basis.

The state of a stack ``[B, m, n]`` holds ``A [B, n, n]`` and ``B [B, m, m]``, and in eigenbases ``Q_A``, ``Q_B`` and
``S [B, m, n]``, the Fisher matrix' diagonal in these. A side that the state does not hold is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import conjugate, eigenvectors
from steepest.linalg.solvers import SOLVERS, choose
from steepest.rule import Slots, State, Statistics, Step
from steepest.rules.parts.factors import into
from steepest.rules.parts.moments import corrected_beta

SIDES = (("B", -2), ("A", -1))
"""Each factor's name in the state, and the dimension of a gradient ``[B, m, n]`` that it belongs to."""


def take_in(state: State, new: Statistics | None, beta: float, failures: Tensor | None) -> None:
    """Take statistics, if there are new ones, into the averages, in place. Those that aren't finite count as failures.

    ``statistics [B]`` of the state counts what came in, so that averages are unbiased from the first on.
    """
    if new is None:
        return
    found = {name: x for name, x in (("A", new.A), ("B", new.B), ("S", new.S)) if x is not None and name in state}
    looked_at = {"A": new.A, "B": new.B} | found
    good = torch.stack([attempts.succeeded(x) for x in looked_at.values()]).all(dim=0)  # [b]
    state["statistics"][new.slots] += good
    if failures is not None:
        failures[new.slots] += ~good
    weight = 1 - corrected_beta(beta, state["statistics"][new.slots].view(-1, 1, 1))
    for name, x in found.items():
        if isinstance(new.slots, slice) and _all(good):
            state[name][new.slots].lerp_(x, weight)
        else:
            put(state[name], new.slots, state[name][new.slots].lerp(x, weight), good)


def put(x: Tensor, slots: Slots, new: Tensor, good: Tensor) -> None:
    """Write ``new [b, ., .]`` to these slots of ``x [B, ., .]``, in place, where ``good [b]``."""
    x[slots] = new if _all(good) else torch.where(good.view(-1, 1, 1), new, x[slots])


def _all(good: Tensor) -> bool:
    """Whether all are True, as far as the host can tell without waiting for a device."""
    return attempts.at_hand(good) and bool(good.all())


def update_eigenbases(state: State, slots: Slots, step: Step, solver: str) -> None:
    """Let the bases of these slots follow their factors; ``S`` starts again from the products of their eigenvalues."""
    λ = {side: state["S"].new_ones(1, 1) for side, _ in SIDES}
    for side, _ in SIDES:
        if side in state:
            K, Q = state[side][slots], state[f"Q_{side}"][slots]
            if step.stage == "first":
                new = eigenvectors(K)
            else:
                new, _ = SOLVERS[choose(K.device.type) if solver == "auto" else solver](K, Q, 1)
            state[f"Q_{side}"][slots] = Q = step.found(new, Q, slots)
            λ[side] = conjugate(K, Q, diag=True).clamp(min=0)  # [b, d]
    state["S"][slots] = λ["B"].unsqueeze(-1) * λ["A"].unsqueeze(-2)


def divided(M: Tensor, state: State, damping: float, form: str) -> Tensor:
    """``Q_B [(Q_Bᵀ M Q_A) / (S + damping)] Q_Aᵀ`` for ``M [B, m, n]``, with damping of one of these forms.

    "absolute": d itself. "relative": d · mean S. "factored": √d (mean of the row + mean of the column) + d · mean S,
    which for S = λ_B λ_Aᵀ is the product (λ_B + √d mean λ_B)(λ_A + √d mean λ_A)ᵀ that damped factors have.
    """
    Q_B, Q_A, S = state.get("Q_B"), state.get("Q_A"), state["S"]
    floor = damping if form == "absolute" else damping * S.mean(dim=(-2, -1), keepdim=True)
    if form == "factored":
        floor = floor + damping**0.5 * (S.mean(dim=-1, keepdim=True) + S.mean(dim=-2, keepdim=True))
    u = into(M, Q_B, Q_A) / (S + (floor + torch.finfo(S.dtype).tiny))  # the sum in brackets has few entries
    return into(u, None if Q_B is None else Q_B.mT, None if Q_A is None else Q_A.mT)
