"""`Rule.work` says what a step computes, by kind and precision: counted while steps are taken."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from steepest.linalg import polar, solvers
from steepest.linalg.flops import Part, Work, eigh, product, qr, total
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
    "soap, kl, every step": ("soap", {"precondition_frequency": 1, "use_kl_shampoo": True}),
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


class Counted(TorchDispatchMode):
    """FLOPs by kind, those of products by precision: torch's own counts, and Golub and Van Loan's where it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in PRODUCTS:
            coarse = out.dtype == torch.bfloat16
            name = "bfloat16" if coarse else torch.get_float32_matmul_precision()
            self.flops[name] += PRODUCTS[packet](*args, **(kwargs or {}), out_val=out)
        elif packet.__name__ in COUNTS:
            kind, count = COUNTS[packet.__name__]
            *batch, m, n = args[0].shape
            self.flops[kind] += torch.Size(batch).numel() * count(m, n, args)
        return out


def reflections(m, n, args):
    return 2 * m * n**2 - 2 / 3 * n**3


COUNTS = {
    "geqrf": ("qr", reflections),
    "linalg_householder_product": ("qr", reflections),
    "linalg_qr": ("qr", lambda m, n, args: reflections(m, n, args) * (1 if args[1:] == ("r",) else 2)),
    "_linalg_eigh": ("eigh", lambda m, n, args: 9 * n**3),
    "_linalg_svd": ("svd", lambda m, n, args: 6 * min(m, n) ** 2 * max(m, n) + 20 * min(m, n) ** 3),
    "linalg_cholesky_ex": ("cholesky", lambda m, n, args: n**3 / 3),
    "linalg_solve_triangular": ("cholesky", lambda m, n, args: n**2 * args[1].shape[-2]),
}
PRODUCTS = flop_registry | {
    torch.ops.aten.baddbmm_: lambda _, a, b, out_val, **__: 2 * a.numel() * b.shape[-1]  # torch leaves it out
}


def counted(rule: Rule, m: int, n: int) -> list[dict[str, float]]:
    """FLOPs of each step of a period, of one matrix; of the first of them with a refresh."""
    generator = torch.Generator().manual_seed(0)
    state = rule.init(torch.empty(2, m, n))

    def step(clock: int) -> dict[str, float]:
        G = torch.randn(2, m, n, generator=generator)
        slots = slice(0, 2) if rule.due(clock, 0) else None
        with Counted() as seen:
            D = rule.update(G, state, Step(torch.full((2, 1, 1), clock + 1.0), rule.stage(clock), slots))
            if D is not None:
                whole(D)
        return {name: flops / 2 for name, flops in seen.flops.items()}

    for clock in range(PERIOD):  # the first step is special
        step(clock)
    return [step(clock) for clock in range(PERIOD, 2 * PERIOD)]


def by_name(work: Work) -> dict[str, float]:
    """FLOPs of a rule's work, as `Counted` has them."""
    found: Counter[str] = Counter()
    for part, flops in work.parts.items():
        found[(part.precision or "highest") if part.kind == "product" else part.kind] += flops
    return {name: flops for name, flops in found.items() if flops}


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Newton-Schulz as it runs on accelerators; and one pass of Cholesky-QR, as where pivots are large."""
    monkeypatch.setattr(polar, "working_dtype", lambda G, table: torch.bfloat16)
    monkeypatch.setattr(solvers, "TRUSTED", 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_product_and_decomposition_is_in_it(name, shape):
    of, options = VARIANTS[name]
    if "fp32_matmul_prec" in RULES[of].defaults():  # unlike the other one's default, and unlike what is in force
        options = options | {"fp32_matmul_prec": "medium"}
    rule = RULES[of](**options)
    work, steps = rule.work(*shape), counted(rule, *shape)
    mean = {key: sum(step.get(key, 0.0) for step in steps) / PERIOD for step in steps for key in step}
    assert by_name(work) == pytest.approx(mean, rel=1e-9)
    assert by_name(work.now()) == pytest.approx(steps[0], rel=1e-9)
    assert by_name(work.always()) == pytest.approx(steps[1], rel=1e-9)
    assert rule.flops(*shape) == work.total == pytest.approx(sum(mean.values()), rel=1e-9)


def test_work_adds_up_and_scales():
    one, other = product(2, 2, 2), qr(4, 2)
    assert (one + one).parts == (2 * one).parts == (one * 2).parts == {Part("product", 2): 32.0}
    assert (one + other).total == one.total + other.total
    assert Work().total == total([]).total == 0
    assert total([one, other, one]).parts == (2 * one + other).parts


def test_sums_are_the_same_in_any_order():
    parts = [product(d, d, d) * 0.1 for d in (3, 700, 5, 60)]
    assert len({total(order).total for order in permutations(parts)}) == 1


def test_a_precision_stays_once_it_is_given():
    work = (product(2, 2, 2) + product(3, 3, 3).at("highest") + qr(2, 2)).at("high")
    assert [(part.kind, part.precision) for part in work.parts] == [
        ("product", "high"), ("product", "highest"), ("qr", "")
    ]  # fmt: skip


def test_what_is_done_seldom():
    often, seldom = product(2, 2, 2), eigh(2)
    work = often + seldom.every(3).every(2)
    assert work.total == pytest.approx(16 + 72 / 6)
    assert work.always().parts == often.parts
    assert work.now().parts == pytest.approx((often + seldom).parts)


def test_sizes_are_those_by_which_speed_is_judged():
    sizes = [next(iter(work.parts)).size for work in (product(4, 8, 2), qr(30, 5), eigh(7))]
    assert sizes == [4, 5, 7]


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
