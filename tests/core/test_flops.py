"""`Rule.flops` says what a step computes: counted while steps are taken, decompositions with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from steepest.linalg import polar, solvers
from steepest.rule import Refreshing, Rule, Step, whole
from steepest.rules import RULES
from steepest.schedules import StepSchedule

PERIOD = 3
EVERY = {"precondition_frequency": PERIOD}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "soap": ("soap", EVERY),
    "soap in two iterations": ("soap", EVERY | {"power_iter_steps": 2}),
    "soap, full decompositions": ("soap", EVERY | {"refresh": "eigh"}),
    "soap, cholesky": ("soap", EVERY | {"refresh": "cholesky", "power_iter_steps": 2}),
    "soap, first order": ("soap", EVERY | {"refresh": "first_order"}),
    "soap, columns not matched": ("soap", EVERY | {"refresh": "eigh", "match_columns": False}),
    "soap, kl": ("soap", EVERY | {"use_kl_shampoo": True}),
    "soap, kl, every step": ("soap", {"use_kl_shampoo": True}),
    "soap, kl, after": ("soap", EVERY | {"use_kl_shampoo": True, "basis_timing": "after"}),
    "soap, adaptive": ("soap", EVERY | {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.0}),
    "soap, one-sided": ("soap", EVERY | {"max_precond_dim": 24}),
    "soap, one-sided, kl": ("soap", EVERY | {"max_precond_dim": 24, "use_kl_shampoo": True}),
    "soap, no side": ("soap", EVERY | {"max_precond_dim": 0}),
    "moso": ("moso", {}),
    "moso, rmsprop": ("moso", {"inner": "rmsprop", "power_iter_steps": 2}),
    "shampoo": ("shampoo", EVERY),
    "shampoo, full decompositions": ("shampoo", EVERY | {"refresh": "eigh"}),
    "shampoo, kl": ("shampoo", EVERY | {"use_kl_shampoo": True}),
    "shampoo, one-sided, kl": ("shampoo", EVERY | {"max_precond_dim": 24, "use_kl_shampoo": True}),
    "inverse_root": ("inverse_root", EVERY),
    "muon": ("muon", {}),
    "muon, float32": ("muon", {"ns_dtype": "float32"}),
    "muon, ten steps, float32": ("muon", {"ns": "deepseekv4", "ns_dtype": "float32"}),
    "muon, cubic, float32": ("muon", {"ns": "cubic5", "ns_dtype": "float32"}),
    "muon, cubic": ("muon", {"ns": "cubic5"}),
    "muon, ten steps": ("muon", {"ns": "deepseekv4"}),
    "muon, exact": ("muon", {"ns": "exact"}),
    "normuon": ("normuon", {}),
    "adamuon": ("adamuon", {}),
    "dion": ("dion", {}),
    "dion, qr": ("dion", {"orthonormalize": "qr", "rank_fraction": 0.5}),
    "dion2": ("dion2", {}),
    "dion2, float32": ("dion2", {"ns_dtype": "float32"}),
}
SHAPES = [(24, 24), (40, 24), (24, 100)]


class Decompositions(TorchDispatchMode):
    """FLOPs of what torch doesn't count, by Golub and Van Loan."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in COUNTS:
            *batch, m, n = args[0].shape
            self.flops += torch.Size(batch).numel() * COUNTS[name](m, n, args)
        return func(*args, **(kwargs or {}))


def reflections(m, n, args):
    return 2 * m * n**2 - 2 / 3 * n**3


COUNTS = {
    "geqrf": reflections,
    "linalg_householder_product": reflections,
    "linalg_qr": lambda m, n, args: reflections(m, n, args) * (1 if args[1:] == ("r",) else 2),
    "_linalg_eigh": lambda m, n, args: 9 * n**3,
    "_linalg_svd": lambda m, n, args: 6 * min(m, n) ** 2 * max(m, n) + 20 * min(m, n) ** 3,
    "linalg_cholesky_ex": lambda m, n, args: n**3 / 3,
    "linalg_solve_triangular": lambda m, n, args: n**2 * args[1].shape[-2],
}


def counted(rule: Rule, m: int, n: int) -> float:
    """FLOPs of a step of one matrix, on the average of a period."""
    generator = torch.Generator().manual_seed(0)
    state = rule.init(torch.empty(2, m, n))

    def step(clock: int) -> None:
        G = torch.randn(2, m, n, generator=generator)
        slots = slice(0, 2) if rule.due(clock, 0) else None
        D = rule.update(G, state, Step(torch.full((2, 1, 1), clock + 1.0), rule.stage(clock), slots))
        if D is not None:
            whole(D)

    for clock in range(PERIOD):  # the first step is special
        step(clock)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a.numel() * b[-1]}  # torch leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as products, Decompositions() as others:
        for clock in range(PERIOD, 2 * PERIOD):
            step(clock)
    return (products.get_total_flops() + others.flops) / (2 * PERIOD)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Newton-Schulz as it runs on accelerators; and one pass of Cholesky-QR, as where pivots are large."""
    monkeypatch.setattr(polar, "working_dtype", lambda G, table: torch.bfloat16)
    monkeypatch.setattr(solvers, "TRUSTED", 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_product_and_decomposition_is_in_it(name, shape):
    of, options = VARIANTS[name]
    rule = RULES[of](**options)
    assert rule.flops(*shape) == pytest.approx(counted(rule, *shape), rel=1e-9)


def test_every_matrix_rule_is_tried():
    assert {of for of, _ in VARIANTS.values()} == {name for name, rule in RULES.items() if issubclass(rule, Rule)}


def test_newton_schulz_is_what_the_documentation_says():
    assert RULES["muon"]().flops(100, 300) == 20 * 100**2 * 300 + 10 * 100**3


def test_a_schedule_counts_as_it_is_in_the_end():
    for name in (name for name, rule in RULES.items() if issubclass(rule, Refreshing)):
        late, fixed = (
            RULES[name](precondition_frequency=every).flops(8, 12) for every in (StepSchedule({0: 1, 500: 7}), 7)
        )
        assert late == fixed != RULES[name](precondition_frequency=1).flops(8, 12)


def test_vectors_cost_nothing_unless_they_have_a_factor():
    assert RULES["soap"]().flops(1, 12) == 0
    assert RULES["soap"](precondition_1d=True).flops(1, 12) > 0
