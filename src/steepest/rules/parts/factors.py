"""The Kronecker factors in a stack's state: what SOAP, Shampoo and their relatives share.

`Factors` binds the functions of `steepest.rules.parts.kronecker` to the tensors ``L, R, Q_L, Q_R`` of a rule's
state. A side that is not there is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.phases import phase
from steepest.rule import Slots, Solved, State
from steepest.rules.parts import kronecker
from steepest.rules.parts.kronecker import INTO, OUT_OF


class Factors:
    """Factors and bases of a stack, living in its ``state``.

    Args:
        state: the stack's; what is found here is changed in place.
        failures: ``[B]``, counts the decompositions that failed; see `steepest.rule.Step`.

    Example:
        >>> state = Factors.init(torch.empty(1, 2, 3), max_precond_dim=2)
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'L': (1, 2, 2), 'Q_L': (1, 2, 2)}
        >>> G = torch.tensor([[[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> factors = Factors(state)
        >>> factors.feed(G, beta=0.0)
        >>> factors.L
        tensor([[[1., 0.],
                 [0., 4.]]])
    """

    def __init__(self, state: State, failures: Tensor | None = None) -> None:
        self.state = state
        self.failures = failures

    @staticmethod
    def init(G: Tensor, max_precond_dim: int, precondition_1d: bool = False, bases: bool = True) -> State:
        """Zero factors and identity bases for a stack like ``G [B, m, n]``.

        A side larger than ``max_precond_dim`` gets none; nor does either side of a vector (m or n is 1), unless
        ``precondition_1d``, and then its long side does.
        """
        B, m, n = G.shape
        wanted = precondition_1d if min(m, n) == 1 else True
        state: State = {}
        for side, d in (("L", m), ("R", n)):
            if wanted and 1 < d <= max_precond_dim:
                state[side] = G.new_zeros(B, d, d)
                if bases:
                    # Columns contiguous, as LAPACK returns them: taking a new basis in is then a plain copy.
                    state[f"Q_{side}"] = G.new_zeros(B, d, d).mT
                    state[f"Q_{side}"].diagonal(dim1=-2, dim2=-1).fill_(1)
        return state

    @property
    def L(self) -> Tensor | None:
        """``[B, m, m]``, the rows' covariance."""
        return self.state.get("L")

    @property
    def R(self) -> Tensor | None:
        """``[B, n, n]``, the columns' covariance."""
        return self.state.get("R")

    @property
    def bases(self) -> list[Tensor | None]:
        """``[Q_L, Q_R]``."""
        return [self.state.get("Q_L"), self.state.get("Q_R")]

    @property
    def trivial(self) -> bool:
        """Whether both sides are the identity."""
        return self.L is None and self.R is None

    @phase("feed")
    def feed(self, G: Tensor, beta: float | Tensor) -> None:
        """Shampoo's feed: ``L ← β L + (1-β) G Gᵀ``, ``R ← β R + (1-β) Gᵀ G``."""
        kronecker.update_kronecker_factors([self.L, self.R], G, beta)

    @phase("feed")
    def feed_kl(self, G: Tensor, beta: float | Tensor, eps: float, relative_floor: float) -> None:
        """KL-Shampoo's feed: each side sees the gradient whitened by the other.

        ``lambda_L`` and ``lambda_R`` in the state, where it keeps the factors' Rayleigh quotients, take it in as well.
        """
        kept = [self.state.get("lambda_L"), self.state.get("lambda_R")]
        kronecker.update_kronecker_factors_kl_shampoo(
            [self.L, self.R],
            G,
            beta,
            self.bases,
            eps,
            relative_floor=relative_floor,
            quotient_list=None if all(λ is None for λ in kept) else kept,
        )

    @phase("project")
    def project(self, G: Tensor) -> Tensor:
        """``Q_Lᵀ G Q_R``."""
        return kronecker.precondition(G, self.bases, INTO)

    @phase("project")
    def unproject(self, u: Tensor) -> Tensor:
        """``Q_L u Q_Rᵀ``."""
        return kronecker.precondition(u, self.bases, OUT_OF)

    @phase("refresh")
    def start(self, slots: Slots, in_float64: bool = False) -> None:
        """The first bases of these slots, by full decomposition; ``exp_avg`` turns into them.

        In float64 where the bases are to project the very gradient that they were made from: off the diagonal, their
        rounding is then all that Adam sees. Second moments gathered before have no order to follow, and stay.
        """
        part = self._part(slots)
        bases = [None if K is None else eigenvectors(K, in_float64) for K in (part.get("L"), part.get("R"))]
        self._turn(slots, part, bases, part["exp_avg_sq"])

    @phase("refresh")
    def refresh(
        self,
        slots: Slots,
        solver: str = "qr",
        power_iter_steps: int = 1,
        match_columns: bool = True,
        solved: Mapping[str, Solved] | None = None,
    ) -> None:
        """The bases of these slots follow their factors; ``exp_avg`` turns along, ``exp_avg_sq`` is reordered.

        By a ``solver`` of `steepest.linalg.solvers`; see `kronecker.refresh_eigenbases`. What is ``solved``, by side,
        is only taken in.
        """
        solved = solved or {}
        part = self._part(slots)
        bases, reordered = kronecker.refresh_eigenbases(
            [part.get("L"), part.get("R")],
            [part.get("Q_L"), part.get("Q_R")],
            part["exp_avg_sq"],
            power_iter_steps=power_iter_steps,
            match_columns=match_columns,
            solver=solver,
            solved=[solved.get("L"), solved.get("R")],
        )
        self._turn(slots, part, bases, reordered)

    @phase("refresh")
    def outdated(self, slots: Slots, tolerance: float) -> Tensor:
        """Those of the slots whose bases no longer diagonalize their factors within ``tolerance``, as indices."""
        met = self._met(self._part(slots), tolerance)
        everything = torch.arange(len(next(iter(self.state.values()))), device=met.device)
        return everything[slots][~met]

    def _met(self, part: State, tolerance: float) -> Tensor:
        return kronecker.eigenbases_met([part.get("L"), part.get("R")], [part.get("Q_L"), part.get("Q_R")], tolerance)

    def _part(self, slots: Slots) -> State:
        return {name: tensor[slots] for name, tensor in self.state.items()}

    def _turn(self, slots: Slots, part: State, bases: list[Tensor | None], exp_avg_sq: Tensor) -> None:
        """Put new bases in place of old ones, and the moments with them; where a new one is NaN, nothing moves."""
        new = {name: Q for name, Q in zip(("Q_L", "Q_R"), bases, strict=True) if Q is not None}
        new["exp_avg_sq"] = exp_avg_sq
        if "exp_avg" in part:
            raw = kronecker.precondition(part["exp_avg"], [part.get("Q_L"), part.get("Q_R")], OUT_OF)
            new["exp_avg"] = kronecker.precondition(raw, bases, INTO)
        self._put(slots, part, new, kronecker.failures(bases, exp_avg_sq))

    def _put(self, slots: Slots, part: State, new: State, failures: Tensor) -> None:
        """The new state of these slots; where a decomposition failed, ``[b]``, the old one stays."""
        found = (failures == 0).view(-1, 1, 1)
        sure = attempts.at_hand(found) and bool(found.all())
        for name, x in new.items():
            self.state[name][slots] = x if sure else torch.where(found, x, part[name])
        if self.failures is not None:
            self.failures[slots] += failures
