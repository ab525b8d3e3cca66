"""The memory of L-BFGS: steps, the changes of the gradient over them, and the direction that follows from both.

    sⱼ = θⱼ₊₁ - θⱼ,  yⱼ = gⱼ₊₁ - gⱼ         for the last k steps, as rows of S and Y, the oldest first
    R = triu(S Yᵀ),  D = diag(S Yᵀ),  γ = sᵀy / yᵀy of the newest

    α = R⁻¹ S g                             the first loop of the recursion, from the newest pair to the oldest
    r = γ (g - Yᵀ α)
    ω = R⁻ᵀ (D α - Y r)                     the second loop, from the oldest to the newest
    H g = r + Sᵀ ω

Nocedal and Wright, Numerical Optimization, 2nd edition, Algorithm 7.4, with its two loops as substitutions in a
triangular matrix: four products with S and Y instead of four vector operations for each pair. R is that of the compact
representation (Byrd, Nocedal and Schnabel, Math. Program. 63 (1994) 129), which needs Y Yᵀ, too.

  S  [h, P]  steps      Y  [h, P]  gradient_changes      S Yᵀ  [h, h]  curvature

They are ring buffers: the pair of number j stands in row j mod h.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.surroundings import without_autocast

POSITIVE = 1e-10
"""The least cosine between step and change of the gradient that makes a pair."""


VECTORS = ("steps", "gradient_changes", "last_step", "last_gradient")
"""The entries of the state that have a column for each entry of the parameters."""


def shapes(size: int, length: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the state's entries, for ``size`` pairs of vectors of this length."""
    vectors = {"steps": (size, length), "gradient_changes": (size, length), "curvature": (size, size)}
    last = {"last_step": (length,), "last_gradient": (length,)}  # a step whose gradient is still to come
    return {**vectors, **last, "pairs": (), "step": ()}


def forget(state: dict[str, Any]) -> None:
    """Take all pairs out, so that the next direction is the steepest descent."""
    state["pairs"].zero_()


@without_autocast
def remember(state: dict[str, Any], s: Tensor, y: Tensor) -> None:
    """Take in a pair of vectors ``[P]``, if sᵀy > 1e-10 ‖s‖ ‖y‖; when the memory is full, the oldest goes."""
    sy, s_norm, y_norm = torch.stack([s.dot(y), s.norm(), y.norm()]).tolist()
    if not POSITIVE * s_norm * y_norm < sy < math.inf:
        return
    number = int(state["pairs"])
    size = len(state["steps"])
    slot, filled = number % size, min(number + 1, size)
    state["steps"][slot] = s
    state["gradient_changes"][slot] = y
    state["curvature"][:filled, slot] = state["steps"][:filled] @ y
    state["pairs"] += 1


@without_autocast
def direction(state: dict[str, Any], g: Tensor) -> Tensor:
    """Return the direction -H g ``[P]``, which is -g without a pair."""
    number, size = int(state["pairs"]), len(state["steps"])
    if not number:
        return -g
    k, newest, oldest = min(number, size), (number - 1) % size, number % size if number > size else 0
    S, Y = state["steps"][:k], state["gradient_changes"][:k]  # [k, P]
    SY = state["curvature"][:k, :k].roll((-oldest, -oldest), (0, 1))  # [k, k]; above the diagonal it is R
    D = SY.diagonal()[:, None]  # [k, 1]
    gamma = D[-1] / Y[newest].dot(Y[newest])
    alpha = torch.linalg.solve_triangular(SY, (S @ g).roll(-oldest)[:, None], upper=True)  # [k, 1]
    r = gamma * (g - alpha[:, 0].roll(oldest) @ Y)  # [P]
    right = D * alpha - (Y @ r).roll(-oldest)[:, None]
    omega = torch.linalg.solve_triangular(SY.mT, right, upper=False)  # [k, 1]
    d: Tensor = -(r + omega[:, 0].roll(oldest) @ S)
    return d
