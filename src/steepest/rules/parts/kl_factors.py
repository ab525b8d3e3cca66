"""Kronecker factors that are kept in the coordinates of their own eigenbases, ``Q_Lᵀ L Q_L`` and ``Q_Rᵀ R Q_R``.

They take in the projected gradient, which SOAP needs anyway. Their diagonals are their Rayleigh quotients, so the
eigenvalues that KL-Shampoo whitens by cost nothing, and the entries off the diagonal tell how far a refresh would turn
the basis. A refresh then has one product more to make on each side, because the factor turns with its basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import eigenbasis_error
from steepest.linalg.solvers import choose, reordered
from steepest.linalg.symmetric import accumulate_gram
from steepest.linalg.turning import Turn, decomposed, onto, turn, turned
from steepest.linalg.whitening import root_mean_square, whitening_weights
from steepest.rule import Slots, State
from steepest.rules.parts.factors import SIDES, Factors, into

MARK = "in_basis"
"""An entry of the state, ``[B]``, whose presence says that ``L`` and ``R`` stand in their bases' coordinates."""


class KLFactors(Factors):
    """Factors of a stack in their bases' coordinates, with KL-Shampoo's way to take in a gradient.

    Args:
        state: as in `Factors`.
        failures: likewise.
        polish: whether bases are made orthogonal anew at each refresh, as bases that are stored in few digits need.

    Example:
        >>> G = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> state = KLFactors.marked({"exp_avg_sq": torch.zeros_like(G)} | Factors.init(G, max_precond_dim=2))
        >>> factors = KLFactors(state)
        >>> factors.accumulate(factors.project(G), beta=0.0)
        >>> factors.refresh(slice(None), solver="eigh")
        >>> state["L"].round(decimals=4)
        tensor([[[9., 0.],
                 [0., 1.]]])
        >>> factors.covariance("L").round(decimals=4)
        tensor([[[5., 4.],
                 [4., 5.]]])
    """

    def __init__(self, state: State, failures: Tensor | None = None, polish: bool = False) -> None:
        super().__init__(state, failures)
        self.polish = polish
        self._seen: tuple[Tensor, Tensor] | None = None  # the last gradient, and what it is in the bases
        self._stale: Slots | None = None  # the part of the latter that is in bases which have turned since

    @staticmethod
    def marked(state: State) -> State:
        """A fresh state with the entry that says in which coordinates its factors stand."""
        sides = [state[side] for side, _ in SIDES if side in state]
        return state | {MARK: sides[0].new_ones(len(sides[0]))} if sides else state

    def covariance(self, side: str) -> Tensor:
        """``Q K Qᵀ [B, d, d]``: the factor of a side in the gradients' coordinates."""
        K, Q = self.state[side], self.state[f"Q_{side}"]
        return Q @ K @ Q.mT

    def accumulate_whitened(self, G: Tensor, beta: float | Tensor, eps: float, relative_floor: float) -> None:
        """Take in the projected gradient P: ``L ← β L + (1-β) P diag(1/λ_R) Pᵀ / n`` with λ_R = diag(R), R likewise.

        See `steepest.linalg.whitening.whitening_weights` for the two floors under λ.
        """
        P = self.gradient = self.project(G)
        λ = {side: self.state[side].diagonal(dim1=-2, dim2=-1).clone() for side, _ in SIDES if side in self.state}
        looks = attempts.at_hand(G) and not torch.compiler.is_compiling()
        fed = looks and all(min(x.amax(dim=-1).tolist()) > 0 for x in λ.values())
        rms = None if fed else root_mean_square(G)  # it only stands in for factors that are zero
        weights = {side: whitening_weights(x, rms, eps, -1.0, relative_floor) for side, x in λ.items()}  # [B, d]
        for side, X, other in (("L", P, "R"), ("R", P.mT, "L")):
            if side in λ:
                accumulate_gram(self.state[side], X, beta, scale=1 / X.shape[-1], weights=weights.get(other))

    def project(self, G: Tensor) -> Tensor:
        """``Q_Lᵀ G Q_R``, computed once for a gradient, and again only where bases have turned since."""
        Q_L, Q_R = self.state.get("Q_L"), self.state.get("Q_R")
        if self._seen is None or self._seen[0] is not G:
            self._seen, self._stale = (G, into(G, Q_L, Q_R)), None
        P, stale = self._seen[1], self._stale
        if stale is not None:
            P[stale] = into(G[stale], None if Q_L is None else Q_L[stale], None if Q_R is None else Q_R[stale])
            self._stale = None
        return P

    def start(self, slots: Slots, in_float64: bool = False, gradients: int = 1) -> None:
        """Compute the first bases of these slots by decompositions; see `Factors.start`."""
        bases = self.first_bases(slots, in_float64, gradients)
        self._turn_by(slots, {side: onto(U, self.state[side][slots]) for side, U in bases.items()})

    def refresh(self, slots: Slots, solver: str = "auto", steps: int = 1, match_columns: bool = True) -> None:
        """Let the bases of these slots follow their factors, which turn along; see `Factors.refresh`."""
        turns: dict[str, Turn] = {}
        for side, _ in SIDES:
            if side in self.state:
                K = self.state[side][slots]
                if solver == "eigh" and not match_columns:
                    turns[side] = decomposed(K)
                else:
                    turns[side] = turn(K, choose(K.device.type) if solver == "auto" else solver, steps)
        self._turn_by(slots, turns)

    def _turn_by(self, slots: Slots, turns: dict[str, Turn]) -> None:
        """Turn bases, factors and momentum; reorder second moments."""
        if not turns:
            return
        new: State = {name: self.state[name][slots] for name in ("exp_avg", "exp_avg_sq") if name in self.state}
        if "exp_avg" in new:
            new["exp_avg"] = into(new["exp_avg"], *(turns[side].U if side in turns else None for side, _ in SIDES))
        for side, dim in SIDES:
            if side in turns:
                U, order, new[side] = turns[side]
                new["exp_avg_sq"] = reordered(new["exp_avg_sq"], order, dim)
                new[f"Q_{side}"] = turned(self.state[f"Q_{side}"][slots], U, self.polish)
        self._put(slots, new, [one.U for one in turns.values()])
        self._stale = None if self._seen is None else slots

    def _error(self, side: str, slots: Slots) -> Tensor:
        return eigenbasis_error(self.state[side][slots], None)
