"""SOAP: Adam, run in the eigenbasis of Shampoo's two covariances.

Vyas et al., arXiv:2409.11321, Algorithm 3; with ``use_kl_shampoo`` the covariances are those of Lin et al.,
arXiv:2509.03378. Checked against the authors' numbers in tests/reference/test_soap.py.

  G                    [B, m, n]             gradients
  L, R                 [B, m, m], [B, n, n]  covariances of rows and columns, E[G Gᵀ] and E[Gᵀ G]
  Q_L, Q_R             likewise              their eigenvectors, by descending eigenvalue
  exp_avg, exp_avg_sq  [B, m, n]             Adam's moments of the projected gradient Q_Lᵀ G Q_R
  in_basis             [B]                   with KL only: L and R stand in their bases' coordinates

With KL what the state holds as L and R is Q_Lᵀ L Q_L and Q_Rᵀ R Q_R: the covariances are Q_L L Q_Lᵀ and Q_R R Q_Rᵀ.
Their diagonals are the λ that KL whitens by, and the gradient that they take in is the projected one, which Adam needs
as well. `steepest.rules.parts.kl_factors` does this, `steepest.rules.parts.factors` the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.flops import Work, eigh, product, refresh, total, turn, turning
from steepest.linalg.precision import PRECISIONS, fp32_matmul_precision
from steepest.linalg.solvers import SOLVERS, choose, next_basis
from steepest.rule import (
    Errand,
    Refreshing,
    Slots,
    Solved,
    State,
    Step,
    at_least,
    beta,
    betas,
    checked,
    frequency,
    one_of,
)
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.kl_factors import MARK, FactorsInBasis, next_turn
from steepest.rules.parts.moments import adam, corrected_beta
from steepest.rules.parts.scales import clip_rms

NOISE_FLOOR = 1e-2  # "auto": costs nothing in training, and makes first steps reproducible
REFRESHES = ("auto", *SOLVERS)


@dataclass(frozen=True, kw_only=True)
class Soap(Refreshing):
    """Options as `steepest.SOAP` describes them."""

    name: ClassVar[str] = "soap"
    paper: ClassVar[str] = "Vyas et al., arXiv:2409.11321"

    precondition_frequency: int | Callable[[int], int] = frequency(5)
    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    nesterov: bool = False
    adam_warmup_steps: int = at_least(0, 0)
    correct_bias: bool = True
    correct_shampoo_beta_bias: bool | None = None
    fp32_matmul_prec: str = one_of(PRECISIONS, "highest")
    solver: str = one_of(REFRESHES, "auto")
    match_columns: bool = True
    qr_fp32_matmul_prec: str = one_of(PRECISIONS, "high")
    power_iter_steps: int = at_least(1, 1)
    use_adaptive_criteria: bool = False
    adaptive_update_tolerance: float = at_least(0, 1e-7)
    max_update_rms: float = at_least(0, 0.0, "0: no limit")
    use_kl_shampoo: bool = False
    kl_floor: float = checked(1e-4, lambda x: 0 <= x < 1, "in [0, 1); 0 means the absolute eps")
    basis_timing: str = one_of(("before", "after"), "before")
    noise_floor: float | str = checked(
        NOISE_FLOOR, lambda x: x == "auto" or (isinstance(x, int | float) and x >= 0), '"auto" or a number >= 0'
    )
    momentum_floor: bool = True
    precondition_1d: bool = False
    refresh_async: bool = False
    basis_dtype: str = one_of(("float32", "bfloat16"), "float32")
    moment_dtype: str = one_of(("float32", "int8"), "float32")

    def init(self, G: Tensor) -> State:
        moments = {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]
        layout = FactorsInBasis if self.use_kl_shampoo else Factors
        return moments | layout.init(G, self.max_precond_dim, self.precondition_1d)

    def factors(self, state: State, step: Step) -> Factors:
        """The factors in a state, as they were laid out: KL may have been switched on or off since."""
        if MARK in state:
            return FactorsInBasis(state, step.failures, polish=self.basis_dtype != "float32")
        return Factors(state, step.failures)

    def update(self, G: Tensor, state: State, step: Step) -> Tensor | None:
        factors = self.factors(state, step)
        with fp32_matmul_precision(self.fp32_matmul_prec):
            if self.basis_timing == "before":  # the basis knows the gradient that it projects
                self.learn(G, factors, step)
                return self.act(G, factors, step, in_basis=step.stage != "warmup")
            seeding = step.stage == "first" and self.seeds
            D = None if seeding else self.act(G, factors, step, in_basis=step.stage == "steady")
            self.learn(G, factors, step)
            return D

    def learn(self, G: Tensor, factors: Factors, step: Step) -> None:
        """The covariances take the gradient in; where a refresh is due, the bases follow."""
        if factors.trivial:
            return
        beta = self.factor_beta(step.t)
        if self.use_kl_shampoo:
            factors.feed_kl(G, beta, self.eps, self.kl_floor)
        else:
            factors.feed(G, beta)
        if step.refresh is not None and not self.defers(step):
            self.follow(factors, step.refresh, first=step.stage == "first")

    def defers(self, step: Step) -> bool:
        return self.refresh_async and step.refresh is not None and step.stage != "first"

    def finish(self, state: State, step: Step) -> None:
        with fp32_matmul_precision(self.fp32_matmul_prec):
            if step.refresh is not None and not (factors := self.factors(state, step)).trivial:
                self.follow(factors, step.refresh, first=False, solved=step.solved)

    def errands(self, m: int, n: int) -> dict[str, Errand]:
        """Where refreshes follow their step, each factor's: a matrix's two may then be refreshed at the same time."""
        if not self.refresh_async or self.use_adaptive_criteria or not self.match_columns:
            return {}
        state = self.init(torch.empty(1, m, n, device="meta"))
        found: dict[str, Errand] = {}
        for side in ("L", "R"):
            if side in state:
                d = state[side].shape[-1]
                turns = MARK in state  # a factor in its basis tells the turn by itself
                work = (turn if turns else refresh)(d, self.settled_solver, self.power_iter_steps)
                work = work.at(self.qr_fp32_matmul_prec).every(self.last_period)
                found[side] = Errand((side,) if turns else (side, f"Q_{side}"), 3 if turns else 2, d, work)
        return found

    def solve(self, *needs: Tensor) -> Solved:
        """From a factor and its basis the next one; from a factor in its basis the turn."""
        with fp32_matmul_precision(self.qr_fp32_matmul_prec):
            if len(needs) == 2:
                K, Q = needs
                return next_basis(K, Q, self.power_iter_steps, self.solver)
            U, order, K = next_turn(needs[0], self.power_iter_steps, self.solver)
            assert order is not None  # as where second moments follow their columns
            return U, order, K

    def follow(self, factors: Factors, slots: Slots, first: bool, solved: Mapping[str, Solved] | None = None) -> None:
        """The bases of these slots follow their covariances, and Adam's moments follow the bases."""
        with fp32_matmul_precision(self.qr_fp32_matmul_prec):
            if first and self.solver != "qr":
                factors.start(slots, in_float64=self.basis_timing == "before")
            else:
                if self.use_adaptive_criteria and not first:
                    slots, solved = factors.outdated(slots, self.adaptive_update_tolerance), None
                factors.refresh(slots, self.solver, self.power_iter_steps, self.match_columns, solved)

    def act(self, G: Tensor, factors: Factors, step: Step, in_basis: bool) -> Tensor:
        """Adam's direction, taken in the eigenbases and brought back."""
        state, factors = factors.state, factors if in_basis else Factors({})
        guarded = not factors.trivial
        g = factors.project(G if step.penalty is None else G + step.penalty)  # [B, m, n]
        u = adam(
            g,
            state,
            step.t - 1 if self.seeds else step.t,
            self.betas,
            self.eps,
            correct_bias=self.correct_bias,
            nesterov=self.nesterov,
            momentum_floor=self.momentum_floor and guarded,
            noise_floor=self.relative_noise if guarded else 0.0,
        )
        return clip_rms(factors.unproject(u), self.max_update_rms)

    def work(self, m: int, n: int) -> Work:
        """6mn(m+n): feed, project, unproject.

        At a refresh a solver on each side, "auto" as on a CPU, and 4mn(m+n), to turn the momentum. With KL that is
        2mn(m+n), as much again to project once more where the basis comes before the projection, and the factors and
        bases turn as well (`turning`). With one factor the other side's part of all this falls away.
        """
        sides = self.sides(m, n)
        along = total(product(d, m, n) for d in sides)  # 2mn(m+n): one product on each side
        if self.use_kl_shampoo:
            polish = self.basis_dtype != "float32"
            slow = along.at(self.qr_fp32_matmul_prec) + (along if self.basis_timing == "before" else Work())
            slow += total(turning(d, self.settled_solver, self.power_iter_steps, polish) for d in sides)
        else:
            slow = 2 * along
            if self.settled_solver == "eigh" and not self.match_columns:
                slow += total(eigh(d) for d in sides)
            else:
                slow += total(refresh(d, self.settled_solver, self.power_iter_steps) for d in sides)
            if self.use_adaptive_criteria:
                slow += total(product(d, d, d) for d in sides)
            slow = slow.at(self.qr_fp32_matmul_prec)
        return (3 * along + slow.every(self.last_period)).at(self.fp32_matmul_prec)

    @property
    def settled_solver(self) -> str:
        """How bases follow, "auto" as on a CPU."""
        return choose("cpu") if self.solver == "auto" else self.solver

    @property
    def seeds(self) -> bool:
        """Whether a matrix's first gradient only seeds the factors and moves nothing, as the authors run it."""
        return self.basis_timing == "after" and self.adam_warmup_steps == 0

    @property
    def decay_follows(self) -> bool:
        return self.basis_timing == "after"

    @property
    def first_refresh(self) -> int:
        """The update in which the first basis comes: when the warm-up ends, before or after that step."""
        return self.adam_warmup_steps if self.basis_timing == "before" else max(self.adam_warmup_steps - 1, 0)

    @property
    def relative_noise(self) -> float:
        """The noise floor as a number."""
        return NOISE_FLOOR if isinstance(self.noise_floor, str) else self.noise_floor

    def factor_beta(self, t: Tensor) -> float | Tensor:
        """The factors' decay: shampoo_beta, or 1 - (1-b)/(1-b^t), which makes the average unbiased; 0 at t = 1."""
        corrects = self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias
        return corrected_beta(self.shampoo_beta, t) if corrects else self.shampoo_beta


@dataclass(frozen=True, kw_only=True)
class KlSoap(Soap):
    """Stub."""

    name: ClassVar[str] = "kl_soap"
    paper: ClassVar[str] = "Lin et al., arXiv:2509.03378"

    use_kl_shampoo: bool = True
