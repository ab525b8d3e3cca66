"""Work is counted by running a rule on the meta device, and agrees with closed forms and with steps on a CPU."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch

from steepest.linalg import solvers
from steepest.linalg.orthonormal import EXTRA_ROWS, OVERSAMPLING
from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule import Refreshing, Rule, Step, whole
from steepest.rule.work import Part, Work, counted, work
from steepest.rules import RULES
from steepest.rules.muon import Muon
from steepest.schedules import StepSchedule

PERIOD = 3
EVERY = {"precondition_frequency": PERIOD}
SETTLED = EVERY | {"settle": 0}
SOAP = EVERY | {"fp32_matmul_prec": "medium", "qr_fp32_matmul_prec": "high"}  # unlike each other and the default
ADAPTIVE = {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.0}  # every basis is found to be outdated
SHAPES = [(24, 40), (40, 24), (24, 100), (32, 32)]

# Closed forms of FLOPs by kind or precision, of each step and of a refresh beside it. `along` is one product with each
# factor, `cubes` the sum of d³. By Golub and Van Loan, Householder's QR of d × d takes 4d³/3 for R and as much for Q
# (section 5.2), Cholesky's decomposition d³/3 (4.2), d triangular solves d³ (3.1), eigenvectors 9d³ (8.3), and a
# singular value decomposition 6s²l + 20s³ (8.6).
Forms = tuple[dict[str, float], dict[str, float]]


def soap(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"medium": 3 * along}, {"high": 2 * along + 2 * cubes, "qr": 8 / 3 * cubes}


def soap_first_order(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    slow = {"high": 2 * along + 6 * cubes, "highest": 2 * cubes, "cholesky": 4 / 3 * cubes}
    return {"medium": 3 * along}, slow


def soap_cholesky_twice(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    slow = {"high": 2 * along + 4 * cubes, "highest": 4 * cubes, "cholesky": 8 / 3 * cubes}
    return {"medium": 3 * along}, slow


def soap_eigh_adaptive(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"medium": 3 * along}, {"high": 2 * along + 4 * cubes, "eigh": 9 * cubes}


def soap_one_sided(m: int, n: int) -> Forms:
    sides = [d for d in (m, n) if d <= 32]
    along, cubes = sum(2 * d * m * n for d in sides), sum(d**3 for d in sides)
    return {"medium": 3 * along}, {"high": 2 * along + 2 * cubes, "qr": 8 / 3 * cubes}


def kl_soap(m: int, n: int) -> Forms:
    """The momentum turns once, the gradient is projected once more, and each factor and basis turns by a product."""
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"medium": 3 * along}, {"high": along, "medium": along, "highest": 4 * cubes, "qr": 8 / 3 * cubes}


def kl_soap_async(m: int, n: int) -> Forms:
    """A basis that turns after the step needs no second projection."""
    steady, slow = kl_soap(m, n)
    return steady, slow | {"medium": 0}


def moso(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    return {"highest": 6 * s * s * l, "high": 4 * s * s * l + 2 * s**3, "qr": 8 / 3 * s**3}, {}


def shampoo(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"highest": 4 * along}, {"highest": 4 * cubes, "qr": 8 / 3 * cubes}


def kl_shampoo(m: int, n: int) -> Forms:
    steady, slow = shampoo(m, n)
    return {"highest": steady["highest"] + 2 * m * n * min(m, n)}, slow


def inverse_root(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"highest": 2 * along}, {"highest": 2 * cubes, "eigh": 9 * cubes}


def newton_schulz(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    return {"bfloat16": 20 * s * s * l + 10 * s**3}, {}


def newton_schulz_float16(m: int, n: int) -> Forms:
    """With two Gram matrices where one side is three times the other."""
    s, l = sorted((m, n))
    return {"bfloat16": 8 * s * s * l + 28 * s**3 if l >= 3 * s else 20 * s * s * l + 10 * s**3}, {}


def newton_schulz_float32(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    return {"highest": 4 * s * s * l + 34 * s**3 if l >= 2 * s else 20 * s * s * l + 10 * s**3}, {}


def exact(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    return {"highest": 2 * s * s * l, "svd": 6 * s * s * l + 20 * s**3}, {}


def dion2(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    return newton_schulz_float16(s // 4, l)


def dion(m: int, n: int) -> Forms:
    s, l = sorted((m, n))
    r = s // 2
    return {"highest": 8 * s * l * r, "qr": 2 * (2 * l * r * r - 2 / 3 * r**3)}, {}


def dion_rcqr(m: int, n: int) -> Forms:
    """A sketch of k rows, the triangle of its QR decomposition, a Gram matrix, and two triangular solves."""
    s, l = sorted((m, n))
    r = s // 4
    k = int(OVERSAMPLING * r + 0.99) + EXTRA_ROWS
    products = 8 * s * l * r + 2 * k * l * r + 2 * l * r * r
    return {"highest": products, "qr": 2 * k * r * r - 2 / 3 * r**3, "cholesky": r**3 / 3 + 2 * l * r * r}, {}


def kfac(m: int, n: int) -> Forms:
    """Without what the statistics take, which are captured in the layers."""
    return {"highest": 2 * m * n * (m + n)}, {"cholesky": m**3 + n**3}


def ekfac(m: int, n: int) -> Forms:
    along, cubes = 2 * m * n * (m + n), m**3 + n**3
    return {"highest": 2 * along}, {"highest": 4 * cubes, "qr": 8 / 3 * cubes}


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "soap": ("soap", SOAP, soap),
    "soap, first order": ("soap", SOAP | {"solver": "first_order"}, soap_first_order),
    "soap, cholesky": ("soap", SOAP | {"solver": "cholesky", "power_iter_steps": 2}, soap_cholesky_twice),
    "soap, eigh": ("soap", SOAP | {"solver": "eigh"} | ADAPTIVE, soap_eigh_adaptive),
    "soap, one-sided": ("soap", SOAP | {"max_precond_dim": 32}, soap_one_sided),
    "soap, async": ("soap", SOAP | {"refresh_async": True}, soap),
    "kl-soap": ("kl_soap", SOAP, kl_soap),
    "kl-soap, async": ("kl_soap", SOAP | {"refresh_async": True}, kl_soap_async),
    "moso": ("moso", {}, moso),
    "shampoo": ("shampoo", EVERY, shampoo),
    "kl-shampoo": ("kl_shampoo", EVERY, kl_shampoo),
    "inverse_root": ("inverse_root", EVERY, inverse_root),
    "kfac": ("kfac", SETTLED, kfac),
    "kfac, eigen": ("kfac", SETTLED | {"form": "eigen"}, ekfac),
    "ekfac": ("ekfac", SETTLED, ekfac),
    "muon": ("muon", {"ns_dtype": "bfloat16"}, newton_schulz),
    "muon, auto": ("muon", {}, newton_schulz_float16),
    "muon, float16": ("muon", {"ns_dtype": "float16"}, newton_schulz_float16),
    "muon, float32": ("muon", {"ns_dtype": "float32"}, newton_schulz_float32),
    "muon, exact": ("muon", {"ns": "exact"}, exact),
    "normuon": ("normuon", {"ns_dtype": "bfloat16"}, newton_schulz),
    "adamuon": ("adamuon", {"ns_dtype": "bfloat16"}, newton_schulz),
    "dion": ("dion", {"orthonormalize": "qr", "rank_fraction": 0.5}, dion),
    "dion, rcqr": ("dion", {}, dion_rcqr),
    "dion2": ("dion2", {}, dion2),
}


def by_name(found: Work) -> dict[str, float]:
    """FLOPs by precision, and of decompositions by kind."""
    names: Counter[str] = Counter()
    for part, flops in found.parts.items():
        names[part.precision or part.kind] += flops
    return dict(names)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_work_is_the_closed_form(case, shape):
    name, options, forms = CASES[case]
    found, (steady, slow) = work(RULES[name](**options), *shape), forms(*shape)
    both = {key: steady.get(key, 0) + slow.get(key, 0) for key in (steady | slow)}
    assert by_name(found.always()) == pytest.approx({key: flops for key, flops in steady.items() if flops})
    assert by_name(found.now()) == pytest.approx({key: flops for key, flops in both.items() if flops})
    assert found.total == pytest.approx(sum(steady.values()) + sum(slow.values()) / PERIOD)


def test_every_matrix_rule_is_tried():
    assert {of for of, _, _ in CASES.values()} == {name for name, rule in RULES.items() if issubclass(rule, Rule)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_cpu_takes_as_many(case, monkeypatch):
    """The matrix is small, so its symmetric products are whole on a CPU, too."""
    monkeypatch.setattr(solvers, "TRUSTED", 0.0)  # Cholesky-QR takes one pass, as on a basis that has settled
    name, options, _ = CASES[case]
    if RULES[name].defaults().get("ns") == options.get("ns", "keller"):
        options = options | {"ns_dtype": "float32"}  # in which a CPU orthogonalizes small matrices anyway
    rule, generator = RULES[name](**options), torch.Generator().manual_seed(0)
    state = rule.init(torch.empty(1, 24, 40))

    def take(clock: int) -> None:
        G = torch.randn(1, 24, 40, generator=generator)
        slots = slice(0, 1) if rule.due(clock, 0) else None
        step = Step(torch.full((1, 1, 1), clock + 1.0), rule.stage(clock), slots)
        D = rule.update(G, state, step)
        if D is not None:
            whole(D)
        if rule.defers(step):
            rule.finish(state, step)

    for clock in range(PERIOD):
        take(clock)
    expected = work(rule, 24, 40)
    assert by_name(counted(take, PERIOD)) == pytest.approx(by_name(expected.now()))
    assert by_name(counted(take, PERIOD + 1)) == pytest.approx(by_name(expected.always()))


def test_a_product_more_counts():
    class Wasteful(Muon):
        def update(self, G, state, step):
            return super().update(G, state, step) + 0 * (G @ G.mT @ G)

    options = {"ns_dtype": "bfloat16"}
    more = work(Wasteful(**options), 8, 12).total - work(Muon(**options), 8, 12).total
    assert more == 2 * 2 * 8 * 8 * 12


def test_results_are_cached_and_options_need_not_be_hashable():
    once = work(RULES["soap"](), 8, 12)
    assert work(RULES["soap"](), 8, 12) is once
    assert work(RULES["soap"](betas=[0.9, 0.95]), 8, 12) == once


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, lambda: torch.device("meta"), lambda: fp32_matmul_precision("medium"), torch.enable_grad],
)
def test_the_caller_neither_disturbs_nor_is_disturbed(around):
    def settings() -> list[object]:
        return [
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision(),
            torch.get_default_device(), torch.get_default_dtype(), torch.get_rng_state().tolist(),
        ]  # fmt: skip

    options = EVERY | {"betas": [0.9, 0.95]}  # a list, so nothing is cached
    expected = work(RULES["soap"](**options), 8, 12)
    with around():
        before = settings()
        assert work(RULES["soap"](**options), 8, 12) == expected
        assert settings() == before


def test_a_schedule_counts_as_it_is_in_the_end():
    for name in (name for name, rule in RULES.items() if issubclass(rule, Refreshing)):
        late, fixed, often = (
            work(RULES[name](precondition_frequency=every), 8, 12).total
            for every in (StepSchedule({0: 1, 500: 7}), 7, 1)
        )
        assert late == fixed < often


def test_vectors_cost_nothing_unless_they_have_a_factor():
    assert work(RULES["soap"](), 1, 12).total == 0
    assert work(RULES["soap"](precondition_1d=True), 1, 12).total > 0


def test_sums_are_the_same_in_any_order():
    parts = [(Part("product", d), 0.1 * d**3) for d in (3, 700, 5, 60)]
    assert len({Work(dict(order)).total for order in permutations(parts)}) == 1


def test_sizes_are_those_by_which_speed_is_judged():
    def size(function, *shapes) -> int:
        (part,) = counted(function, *(torch.empty(shape, device="meta") for shape in shapes)).parts
        return part.size

    assert size(torch.mm, (4, 8), (8, 2)) == 4
    assert size(torch.linalg.qr, (30, 5)) == 5
    assert size(torch.linalg.eigh, (7, 7)) == 7
