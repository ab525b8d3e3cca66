"""Kronecker factors that are kept in the coordinates of their own eigenbases, ``Q_Lᵀ L Q_L`` and ``Q_Rᵀ R Q_R``.

They take in the projected gradient, which SOAP needs anyway. Their diagonals are their Rayleigh quotients, so what
KL-Shampoo whitens by costs nothing, and how far they are from diagonal is how much a refresh would turn. A refresh
then has one product more to make on each side: the factor turns with the basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import by_columns, eigenbasis_error
from steepest.linalg.phases import phase
from steepest.linalg.solvers import choose
from steepest.linalg.symmetric import accumulate_gram
from steepest.linalg.turning import Turn, decomposed, turn, turned
from steepest.linalg.whitening import root_mean_square, whitening_weights
from steepest.rule import Slots, Solved, State
from steepest.rules.parts import kronecker
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.kronecker import INTO, Sides

MARK = "in_basis"
"""A slot of the state whose presence says that ``L`` and ``R`` are what they are here, and not the covariances."""

Turns = list[Turn | None]
"""``[left, right]``; None where there is no factor."""


class FactorsInBasis(Factors):
    """Factors of a stack in their bases' coordinates; ``L`` and ``R`` of the ``state`` are those.

    Args:
        state: as in `Factors`.
        failures: likewise.
        polish: whether bases are made orthogonal anew at each refresh; they need it if they are stored in few digits.

    Example:
        >>> state = FactorsInBasis.init(torch.empty(1, 2, 2), max_precond_dim=2) | {"exp_avg_sq": torch.zeros(1, 2, 2)}
        >>> factors = FactorsInBasis(state)
        >>> factors.feed(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), beta=0.0)
        >>> factors.refresh(slice(None), solver="eigh")
        >>> factors.L.round(decimals=4)
        tensor([[[9., 0.],
                 [0., 1.]]])
        >>> factors.covariances()[0].round(decimals=4)
        tensor([[[5., 4.],
                 [4., 5.]]])
    """

    def __init__(self, state: State, failures: Tensor | None = None, polish: bool = False) -> None:
        super().__init__(state, failures)
        self.polish = polish
        self._seen: tuple[Tensor, Tensor] | None = None  # the last gradient, and what it is in the bases
        self._stale: Slots | None = None  # of the latter, what is in bases that have turned since

    @staticmethod
    def init(G: Tensor, max_precond_dim: int, precondition_1d: bool = False, bases: bool = True) -> State:
        """As `Factors.init`, and the mark."""
        state = Factors.init(G, max_precond_dim, precondition_1d, bases)
        return state | {MARK: G.new_ones(len(G))} if state else state

    def covariances(self) -> list[Tensor | None]:
        """``Q_L L Q_Lᵀ [B, m, m]`` and ``Q_R R Q_Rᵀ [B, n, n]``: the factors in the gradients' coordinates."""
        sides = zip((self.L, self.R), self.bases, strict=True)
        return [None if K is None or Q is None else Q @ K @ Q.mT for K, Q in sides]

    @phase("feed")
    def feed(self, G: Tensor, beta: float | Tensor) -> None:
        """Shampoo's feed, of the projected gradient P: ``L ← β L + (1-β) P Pᵀ``, ``R ← β R + (1-β) Pᵀ P``."""
        kronecker.update_kronecker_factors([self.L, self.R], self.project(G), beta)

    @phase("feed")
    def feed_kl(self, G: Tensor, beta: float | Tensor, eps: float, relative_floor: float) -> None:
        """KL-Shampoo's feed: ``L ← β L + (1-β) P diag(1/λ_R) Pᵀ / n`` with λ_R the diagonal of R, and R likewise."""
        P, factors = self.project(G), (self.L, self.R)
        quotients = [None if K is None else K.diagonal(dim1=-2, dim2=-1).clone() for K in factors]  # far apart in K
        looks = attempts.at_hand(G) and not torch.compiler.is_compiling()
        fed = looks and all(min(λ.amax(dim=-1).tolist()) > 0 for λ in quotients if λ is not None)
        rms = None if fed else root_mean_square(G)  # it only stands in for factors that are zero
        weights = [None if λ is None else whitening_weights(λ, rms, eps, -1.0, relative_floor) for λ in quotients]
        for K, X, other in zip(factors, (P, P.mT), reversed(weights), strict=True):
            if K is not None:
                accumulate_gram(K, X, beta, scale=1 / X.shape[-1], weights=other)

    @phase("project")
    def project(self, G: Tensor) -> Tensor:
        """``Q_Lᵀ G Q_R``, computed once for a gradient, and again only where bases have turned since."""
        if self._seen is None or self._seen[0] is not G:
            self._seen, self._stale = (G, kronecker.precondition(G, self.bases, INTO)), None
        P = self._seen[1]
        if self._stale is not None:
            bases = [None if Q is None else Q[self._stale] for Q in self.bases]
            P[self._stale] = kronecker.precondition(G[self._stale], bases, INTO)
            self._stale = None
        return P

    @phase("refresh")
    def start(self, slots: Slots, in_float64: bool = False) -> None:
        """The first bases of these slots, by full decomposition; see `Factors.start`."""
        part = self._part(slots)
        self._follow(slots, part, [None if K is None else decomposed(K, in_float64) for K in _factors(part)])

    @phase("refresh")
    def refresh(
        self,
        slots: Slots,
        solver: str = "qr",
        power_iter_steps: int = 1,
        match_columns: bool = True,
        solved: Mapping[str, Solved] | None = None,
    ) -> None:
        """The bases of these slots follow their factors, and with them turns what is in their coordinates.

        See `Factors.refresh`; "qr", "cholesky", ... are here `steepest.linalg.turning.turn`'s.
        """
        part = self._part(slots)
        known = [Turn(*solved[side]) if solved and side in solved else None for side in ("L", "R")]
        self._follow(slots, part, turns(_factors(part), solver, power_iter_steps, match_columns, known))

    def _follow(self, slots: Slots, part: State, sides: Turns) -> None:
        """Bases, factors and momentum turn; second moments are reordered. Where a turn is NaN, nothing moves."""
        orders = [None if side is None else side.order for side in sides]
        rotations = [None if side is None else side.U for side in sides]
        new = {"exp_avg_sq": kronecker.reorder(part["exp_avg_sq"], orders)}
        if "exp_avg" in part:
            new["exp_avg"] = kronecker.precondition(part["exp_avg"], rotations, INTO)
        for name, side in zip("LR", sides, strict=True):
            if side is not None:
                new[name], new[f"Q_{name}"] = side.K, turned(part[f"Q_{name}"], side.U, self.polish)
        self._put(slots, part, new, kronecker.failures(rotations, part["exp_avg_sq"]))
        self._stale = None if self._seen is None else slots

    def _met(self, part: State, tolerance: float) -> Tensor:
        errors = [eigenbasis_error(K, None) for K in _factors(part) if K is not None]
        return (torch.stack(errors) <= tolerance).all(dim=0)


def turns(
    factors: Sides,
    solver: str,
    power_iter_steps: int = 1,
    match_columns: bool = True,
    known: Sequence[Turn | None] = (None, None),
) -> Turns:
    """The turn of each side that has a factor, ``[..., d, d]`` in its basis' coordinates; "auto": see `choose`.

    Without ``match_columns`` a full decomposition leaves second moments by rank; see `kronecker.refresh_eigenbases`.

    A turn that is ``known`` is taken as it is.

    >>> left, right = turns([torch.diag(torch.tensor([1.0, 4.0])), None], "eigh")
    >>> left.order, right
    (tensor([1, 0]), None)
    """
    if solver == "eigh" and not match_columns:
        return [None if K is None else decomposed(K) for K in factors]
    found = [
        None if K is None else given or next_turn(K, steps=power_iter_steps, solver=solver)
        for K, given in zip(factors, known, strict=True)
    ]
    return [None if side is None else side._replace(U=by_columns(side.U)) for side in found]


def next_turn(K: Tensor, steps: int = 1, solver: str = "auto") -> Turn:
    """The turn of one side, ``[..., d, d]``."""
    return turn(K, choose(K.device.type) if solver == "auto" else solver, steps)


def _factors(part: State) -> list[Tensor | None]:
    return [part.get("L"), part.get("R")]
