"""With guards the first update is a polar factor, rounding does not change it, and no early update is too long."""

import math
from dataclasses import replace

import pytest
import torch

import steepest
from steepest.rule.work import first_work, work
from steepest.rules.kl_shampoo import KLShampoo
from steepest.rules.kl_soap import KLSoap
from steepest.rules.shampoo import Shampoo
from steepest.rules.soap import Soap

BARE = {"noise_floor": 0.0, "momentum_floor": False}
SHAPES = [(4, 5), (5, 4), (16, 24), (64, 64), (64, 256), (256, 64), (256, 256)]
LARGE = [(64, 1024), (256, 1024)]


def gradients(shape, count=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def updates(grads, **options):
    """The updates, lr being 1 and decay 0."""
    W = torch.nn.Parameter(torch.zeros_like(grads[0]))
    opt = steepest.SOAP([W], lr=1.0, weight_decay=0.0, precondition_frequency=1, **options)
    moved = []
    for G in grads:
        before = W.detach().clone()
        W.grad = G
        opt.step()
        moved.append(before - W.detach())
    return moved


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_the_first_update_is_the_polar_factor(shape):
    (G,) = gradients(shape)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    assert relative(updates([G])[0], (U @ Vh).float()) < 0.10


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_rounding_does_not_choose_the_first_update(shape):
    G, noise = gradients(shape, 2)
    assert relative(updates([G * (1 + 1e-6 * noise)])[0], updates([G])[0]) < 1e-4


@pytest.mark.parametrize("shape", [(4, 5), (7, 3), (16, 24), (33, 64), (64, 256), (256, 64), (64, 1024)])
def test_no_early_update_is_longer_than_lr(shape):
    for D in updates(gradients(shape, 20)):
        assert D.square().mean().sqrt() <= 1.0
        assert D.isfinite().all()


def test_without_guards_none_of_this_holds():
    """Off the diagonal the first projected gradient is rounding errors, which Adam turns into full-size steps."""
    shape = (64, 256)
    grads = gradients(shape, 20)
    U, _, Vh = torch.linalg.svd(grads[0].double(), full_matrices=False)
    bare = updates(grads, **BARE)
    assert relative(bare[0], (U @ Vh).float()) > 1.0
    (noise,) = gradients(shape, seed=4)
    assert relative(updates([grads[0] * (1 + 1e-6 * noise)], **BARE)[0], bare[0]) > 0.5
    assert max(D.square().mean().sqrt() for D in bare) > 2.0


@pytest.mark.parametrize(
    ("guard", "holds"),
    [({"momentum_floor": False}, "reproducible"), ({"noise_floor": 0.0}, "bounded")],
)
def test_what_each_guard_is_for(guard, holds):
    """The noise floor makes first steps reproducible; the momentum floor bounds them."""
    grads = gradients((64, 256), 20)
    (noise,) = gradients((64, 256), seed=4)
    moved = updates(grads, **guard)
    if holds == "reproducible":
        assert relative(updates([grads[0] * (1 + 1e-6 * noise)], **guard)[0], moved[0]) < 0.1
    else:
        assert max(D.square().mean().sqrt() for D in moved) <= 1.0


@pytest.mark.parametrize("shape", [(64, 64), (64, 256)])
def test_rounding_does_not_choose_the_updates_of_single_samples(shape):
    """Gradients of rank one leave a null space for a hundred steps, where the projected gradient is rounding errors."""
    columns, rows, noise = (torch.randn(20, d, generator=torch.Generator().manual_seed(d)) for d in (*shape, shape[0]))
    grads, moved = ([x.outer(y) for x, y in zip(c, rows, strict=True)] for c in (columns, columns * (1 + 1e-6 * noise)))
    for D, E in zip(updates(grads), updates(moved), strict=True):
        assert relative(E, D) < 0.10
    assert relative(updates(moved, noise_floor=0.0)[-1], updates(grads, noise_floor=0.0)[-1]) > 0.5


@pytest.mark.parametrize("rule", [Soap(), KLSoap(), Shampoo(), KLShampoo()], ids=lambda rule: rule.name)
@pytest.mark.parametrize(("m", "n"), [(1024, 1024), (2500, 500), (500, 2500), (1024, 512)])
def test_a_first_refresh_is_at_most_three_later_ones(rule, m, n):
    """In counted FLOPs, those in float64 twice; and nothing but the shorter side is decomposed."""
    every = replace(rule, precondition_frequency=5)
    first, usual = first_work(every, m, n), work(every, m, n)
    without = usual.always().total
    assert first.total - without <= 3 * (usual.now().total - without)
    assert {part.size for part in first.parts if part.kind == "eigh"} == {min(m, n)}


def left_of_a_quadratic(condition, seed, **options):
    """What is left of a rotated quadratic after 400 steps, with a learning rate that falls to 0."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for d in (24, 16))
    a, b = (torch.logspace(0, -math.log10(condition) / 2, d, dtype=torch.float64) for d in (24, 16))
    A, B = ((U * a) @ U.T).float(), ((V * b) @ V.T).float()
    W, (T,) = torch.nn.Parameter(torch.zeros(24, 16)), gradients((24, 16))
    opt = steepest.SOAP([W], lr=0.1, weight_decay=0.0, **options)
    for step in range(400):
        opt.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 400))
        W.grad = A @ (W.detach() - T) @ B
        opt.step()
    error = U.T @ (W.detach() - T).double() @ V
    return (a[:, None] * b * error.square()).sum().item() / 2


@pytest.mark.parametrize("condition", [1e8, 1e12])
def test_the_noise_floor_costs_nothing_where_small_entries_count(condition):
    """A constant floor leaves hundreds to tens of thousands of times as much. Rounding alone makes a factor of 4."""
    ratios = [
        left_of_a_quadratic(condition, seed) / left_of_a_quadratic(condition, seed, noise_floor=0.0)
        for seed in range(4)
    ]
    assert math.prod(ratios) ** (1 / 4) < 10
