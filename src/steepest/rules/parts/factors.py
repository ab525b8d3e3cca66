"""Kronecker factors of a stack: the covariances of rows and columns, and the eigenbases in which SOAP and Shampoo work.

For gradients ``G [B, m, n]`` the state holds ``L ≈ E[G Gᵀ] [B, m, m]`` and ``R ≈ E[Gᵀ G] [B, n, n]``, and their
eigenvectors ``Q_L`` and ``Q_R``. A side that the state does not hold is the identity.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import eigenbasis_error, eigenvectors, is_thin
from steepest.linalg.singular import shared_eigenvectors
from steepest.linalg.solvers import SOLVERS, choose, reordered
from steepest.linalg.symmetric import accumulate_gram
from steepest.rule import Slots, State

F = TypeVar("F", bound="Factors")

SIDES = (("L", -2), ("R", -1))
"""Each side's name in the state, and the dimension of ``G`` that it is a covariance of."""

SLOW = 2048
"""The number of rows from which a first decomposition takes seconds on one thread of a CPU; see docs/first-steps.md."""


class Factors:
    """Covariances and eigenbases of a stack, read from its ``state`` and changed there in place.

    Args:
        state: the stack's.
        failures: ``[B]``, counts decompositions that failed; see `steepest.rule.Step`.

    Example:
        >>> state = Factors.init(torch.empty(1, 2, 3), max_precond_dim=2)
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'L': (1, 2, 2), 'Q_L': (1, 2, 2)}
        >>> factors = Factors(state)
        >>> factors.accumulate(torch.tensor([[[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]]), beta=0.0)
        >>> state["L"]
        tensor([[[1., 0.],
                 [0., 4.]]])
    """

    def __init__(self, state: State, failures: Tensor | None = None) -> None:
        self.state = state
        self.failures = failures
        self.gradient: Tensor | None = None  # the last that the covariances took in, [B, m, n]

    @staticmethod
    def init(G: Tensor, max_precond_dim: int, precondition_1d: bool = False) -> State:
        """Zero covariances and identity bases for a stack like ``G [B, m, n]``.

        A side longer than ``max_precond_dim`` gets none; nor does either side of a vector (m or n is 1), unless
        ``precondition_1d``, and then its long side does.
        """
        wanted = precondition_1d or min(G.shape[1:]) > 1
        state: State = {}
        for side, dim in SIDES:
            d = G.shape[dim]
            if wanted and 1 < d <= max_precond_dim:
                state[side] = G.new_zeros(len(G), d, d)
                # Columns contiguous, as LAPACK returns them: taking a new basis in is then a plain copy.
                state[f"Q_{side}"] = G.new_zeros(len(G), d, d).mT
                state[f"Q_{side}"].diagonal(dim1=-2, dim2=-1).fill_(1)
        return state

    @property
    def identity(self) -> bool:
        """Whether both sides are the identity."""
        return "L" not in self.state and "R" not in self.state

    def accumulate(self, G: Tensor, beta: float | Tensor) -> None:
        """Take a gradient into the covariances: ``L ← β L + (1-β) G Gᵀ``, ``R ← β R + (1-β) Gᵀ G``."""
        self.gradient = G
        if "L" in self.state:
            accumulate_gram(self.state["L"], G, beta)
        if "R" in self.state:
            accumulate_gram(self.state["R"], G.mT, beta)

    def project(self, G: Tensor) -> Tensor:
        """``Q_Lᵀ G Q_R``."""
        state = self.state
        G = torch.bmm(state["Q_L"].mT, G) if "Q_L" in state else G
        return torch.bmm(G, state["Q_R"]) if "Q_R" in state else G

    def unproject(self, u: Tensor) -> Tensor:
        """``Q_L u Q_Rᵀ``."""
        state = self.state
        u = torch.bmm(state["Q_L"], u) if "Q_L" in state else u
        return torch.bmm(u, state["Q_R"].mT) if "Q_R" in state else u

    def start(self, slots: Slots, in_float64: bool = False, gradients: int = 1) -> None:
        """Put the bases that `first_bases` computes in place; ``exp_avg`` turns into them.

        Second moments have no order to follow yet, and stay.
        """
        part = {name: x[slots] for name, x in self.state.items()}
        self._turn(slots, part, self.first_bases(slots, in_float64, gradients))

    def first_bases(self, slots: Slots, in_float64: bool = True, gradients: int = 1) -> dict[str, Tensor]:
        """Compute the first bases of these slots by decompositions, by side.

        They are computed in float64 where they are to project the very gradient that they come from: off the diagonal,
        their rounding is then all that Adam sees. ``gradients``, the number of those that the covariances hold, limits
        the rank of the longer side. A single one gives both bases at once, on a CPU: to see that the covariances hold
        nothing else, an accelerator's host would have to wait.
        """
        K = {side: self.state[side][slots] for side, _ in SIDES if side in self.state}
        alone = in_float64 and gradients == 1 and len(K) == 2
        if alone and self.gradient is not None and answers(self.gradient):
            announce(min(K.values(), key=lambda side: side.shape[-1]))
            return dict(zip(K, shared_eigenvectors(self.gradient[slots], *K.values()), strict=True))
        bases = {}
        for side, dim in SIDES:
            if side in K:
                rank = None if self.gradient is None else gradients * self.gradient.shape[-3 - dim]
                announce(K[side], rank)
                bases[side] = eigenvectors(K[side], in_float64, rank)
        return bases

    def refresh(self, slots: Slots, solver: str = "auto", steps: int = 1, match_columns: bool = True) -> None:
        """Let the bases of these slots follow their covariances; ``exp_avg`` turns, ``exp_avg_sq`` is reordered.

        Args:
            slots: the matrices that are due.
            solver: one of `steepest.linalg.solvers.SOLVERS`, or "auto".
            steps: iterations of the solver.
            match_columns: False leaves second moments by rank after a full decomposition: where two eigenvalues have
                crossed, each direction then goes on with the other's.
        """
        part = {name: x[slots] for name, x in self.state.items()}
        solver = choose(part["exp_avg_sq"].device.type) if solver == "auto" else solver
        bases: dict[str, Tensor] = {}
        for side, dim in SIDES:
            if side in part and solver == "eigh" and not match_columns:
                bases[side] = eigenvectors(part[side])
            elif side in part:
                bases[side], order = SOLVERS[solver](part[side], part[f"Q_{side}"], steps)
                part["exp_avg_sq"] = reordered(part["exp_avg_sq"], order, dim)
        self._turn(slots, part, bases)

    def outdated(self, slots: Slots, tolerance: float) -> Slots:
        """The indices of those slots whose bases no longer diagonalize their covariances within ``tolerance``."""
        if self.identity:
            return slots
        errors = [self._error(side, slots) for side, _ in SIDES if side in self.state]
        met = (torch.stack(errors) <= tolerance).all(dim=0)
        return torch.arange(len(self.state["exp_avg_sq"]), device=met.device)[slots][~met]

    def _error(self, side: str, slots: Slots) -> Tensor:
        return eigenbasis_error(self.state[side][slots], self.state[f"Q_{side}"][slots])

    def _turn(self, slots: Slots, part: State, bases: dict[str, Tensor]) -> None:
        """Put new bases in place of old ones, and both moments with them."""
        if not bases:
            return
        new = {"exp_avg_sq": part["exp_avg_sq"]}
        if "exp_avg" in part:
            new["exp_avg"] = into(Factors(part).unproject(part["exp_avg"]), bases.get("L"), bases.get("R"))
        for side, Q in bases.items():
            new[f"Q_{side}"] = Q
        self._put(slots, new, list(bases.values()))

    def _put(self, slots: Slots, new: State, solved: list[Tensor]) -> None:
        """Take in the new state of these slots; a matrix for which something ``solved`` is NaN keeps the old one."""
        sums = torch.stack([x.sum(dim=(-2, -1)) for x in solved])  # [sides, b]
        failed = (~sums.isfinite()).sum(dim=0)  # [b]
        if attempts.at_hand(failed) and not failed.any():
            for name, x in new.items():
                self.state[name][slots] = x
            return
        found = (failed == 0).view(-1, 1, 1)
        for name, x in new.items():
            self.state[name][slots] = torch.where(found, x, self.state[name][slots])
        if self.failures is not None:
            self.failures[slots] += failed


def answers(G: Tensor) -> bool:
    """Whether the host may ask for values of ``G``, or counts FLOPs on the meta device, where there are none."""
    return G.device.type in ("cpu", "meta")


def announce(K: Tensor, rank: int | None = None) -> None:
    """Say so, once, if the first decompositions of ``K [b, d, d]``, whose rank may be known, will take seconds."""
    thin = rank is not None and is_thin(K, rank)
    if attempts.at_hand(K) and len(K) * K.shape[-1] ** 3 >= SLOW**3 and not thin:
        warnings.warn(
            "the first eigenbases of large matrices take seconds or minutes on a CPU: max_precond_dim leaves out long "
            'sides, block_size cuts them into shorter ones, and with solver="qr" SOAP begins at the identity instead',
            stacklevel=1,  # the same place for all of them, which Python shows once
        )


def into(x: Tensor, Q_L: Tensor | None, Q_R: Tensor | None) -> Tensor:
    """``Q_Lᵀ x Q_R`` for ``x [B, m, n]``; None is the identity."""
    x = x if Q_L is None else torch.bmm(Q_L.mT, x)
    return x if Q_R is None else torch.bmm(x, Q_R)
