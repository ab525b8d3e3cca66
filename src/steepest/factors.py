"""The Kronecker factors in a stack's state: what SOAP, Shampoo and their relatives share.

`Factors` binds the functions of `steepest.kronecker` to the tensors ``L, R, Q_L, Q_R`` of a rule's state. A side that
is not there is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steepest import kronecker
from steepest.kronecker import INTO, OUT_OF
from steepest.linalg.eigenbasis import conjugate, eigenvectors
from steepest.linalg.whitening import Projections
from steepest.phases import phase
from steepest.rule import Slots, Solved, State


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
        self._seen: Projections | None = None
        self._stale: Slots | None = None  # of what was seen, what is in bases that have turned since
        self._turned: Slots | None = None  # whose quotients are to be measured

    @staticmethod
    def init(
        G: Tensor, max_precond_dim: int, precondition_1d: bool = False, bases: bool = True, quotients: bool = False
    ) -> State:
        """Zero factors and identity bases for a stack like ``G [B, m, n]``; zero ``quotients`` too, if they are kept.

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
                if quotients:
                    state[f"lambda_{side}"] = G.new_zeros(B, d)
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
    def quotients(self) -> list[Tensor | None] | None:
        """``[B, m]`` and ``[B, n]``: the factors' Rayleigh quotients in the bases, if the state keeps them."""
        kept: list[Tensor | None] = [self.state.get("lambda_L"), self.state.get("lambda_R")]
        return kept if any(λ is not None for λ in kept) else None

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

        Where the state keeps the quotients it shares its products with `project`, for which it then comes cheap.
        """
        quotients = self.quotients
        kronecker.update_kronecker_factors_kl_shampoo(
            [self.L, self.R],
            G,
            beta,
            self.bases,
            eps,
            relative_floor=relative_floor,
            quotient_list=quotients,
            projections=None if quotients is None else self._look(G),
        )

    @phase("project")
    def project(self, G: Tensor) -> Tensor:
        """``Q_Lᵀ G Q_R``; of the gradient that the factors were fed with, only what has turned since."""
        if self.quotients is None:
            return kronecker.precondition(G, self.bases, INTO)
        projected, stale = self._look(G).whole, self._stale
        if stale is not None:
            bases = [None if Q is None else Q[stale] for Q in self.bases]
            projected[stale] = kronecker.precondition(G[stale], bases, INTO)
            self._stale = None
        return projected

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
        use_eigh: bool = False,
        power_iter_steps: int = 1,
        match_columns: bool = True,
        solver: str = "qr",
        solved: Mapping[str, Solved] | None = None,
    ) -> None:
        """The bases of these slots follow their factors; ``exp_avg`` turns along, ``exp_avg_sq`` is reordered.

        By full decompositions, or else by a ``solver`` of `steepest.linalg.solvers`; see `kronecker.get_eigenbasis_qr`.
        What is ``solved``, by side, is only taken in.
        """
        solved = solved or {}
        part = self._part(slots)
        bases, reordered = kronecker.refresh_eigenbases(
            [part.get("L"), part.get("R")],
            [part.get("Q_L"), part.get("Q_R")],
            part["exp_avg_sq"],
            use_eigh,
            power_iter_steps,
            match_columns,
            solver,
            [solved.get("L"), solved.get("R")],
        )
        self._turn(slots, part, bases, reordered)

    @phase("refresh")
    def measure(self, slots: Slots | None = None) -> None:
        """Quotients that are kept, anew of these slots, or where bases have turned."""
        turned = self._turned if slots is None else slots
        for side in ("L", "R"):
            if turned is not None and f"lambda_{side}" in self.state:
                K, Q = self.state[side][turned], self.state[f"Q_{side}"][turned]
                self.state[f"lambda_{side}"][turned] = conjugate(K, Q, diag=True)
        self._turned = None

    @phase("refresh")
    def outdated(self, slots: Slots, tolerance: float) -> Tensor:
        """Those of the slots whose bases no longer diagonalize their factors within ``tolerance``, as indices."""
        part = self._part(slots)
        met = kronecker.eigenbases_met([part.get("L"), part.get("R")], [part.get("Q_L"), part.get("Q_R")], tolerance)
        everything = torch.arange(len(next(iter(self.state.values()))), device=met.device)
        return everything[slots][~met]

    def _part(self, slots: Slots) -> State:
        return {name: tensor[slots] for name, tensor in self.state.items()}

    def _turn(self, slots: Slots, part: State, bases: list[Tensor | None], exp_avg_sq: Tensor) -> None:
        """Put new bases in place of old ones, and the moments with them; where a new one is NaN, nothing moves."""
        new = {name: Q for name, Q in zip(("Q_L", "Q_R"), bases, strict=True) if Q is not None}
        new["exp_avg_sq"] = exp_avg_sq
        if "exp_avg" in part:
            raw = kronecker.precondition(part["exp_avg"], [part.get("Q_L"), part.get("Q_R")], OUT_OF)
            new["exp_avg"] = kronecker.precondition(raw, bases, INTO)
        failures = kronecker.failures(bases, exp_avg_sq)  # [b]
        found = (failures == 0).view(-1, 1, 1)
        for name, x in new.items():
            self.state[name][slots] = torch.where(found, x, part[name])
        if self.failures is not None:
            self.failures[slots] += failures
        self._turned = slots
        self._stale = None if self._seen is None else slots

    def _look(self, G: Tensor) -> Projections:
        """The gradient's projections; the last one's are kept."""
        if self._seen is None or self._seen.x is not G:
            self._seen, self._stale = Projections(G, self.bases), None
        return self._seen
