"""Gauss-Newton by conjugate gradients: its preconditioner, its directions, closures, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F
from networks import fit, flat, network, random, step_closure
from torch import nn

from steepest import GaussNewton
from steepest.newton import gauss_newton as module
from steepest.newton.dense import Dense
from steepest.newton.iterative import Iterative
from steepest.newton.nystrom import Nystrom

# Conjugate gradients.


def test_with_a_full_rank_the_preconditioner_is_the_inverse():
    A = random(6, 6)
    A = A @ A.mT
    sketch = Nystrom(lambda v: A @ v, A[0], rank=9, seed=3)
    assert sketch.trace == pytest.approx(A.trace().item())
    v, mu = random(6, seed=1), 0.3
    expected = torch.linalg.solve(A + mu * torch.eye(6).double(), v) * (sketch.S[-1] + mu)
    torch.testing.assert_close(sketch.preconditioner(mu)(v), expected)


def test_the_trace_is_that_of_all_directions():
    sketch = Nystrom(lambda v: 2 * v, random(9), rank=3, seed=0)
    assert sketch.trace == pytest.approx(18.0)


def test_the_sketch_finds_what_is_large():
    Q = torch.linalg.qr(random(40, 40))[0]
    A = Q * torch.logspace(0, -12, 40, dtype=torch.float64) @ Q.mT
    sketch = Nystrom(lambda v: A @ v, A[0], rank=20, seed=0)
    torch.testing.assert_close(sketch.U * sketch.S @ sketch.U.mT, A, rtol=0, atol=1e-4)
    M = torch.stack([sketch.preconditioner(1e-4)(column) for column in (A + 1e-4 * torch.eye(40).double()).T])
    eigenvalues = torch.linalg.eigvals(M).real
    assert eigenvalues.max() / eigenvalues.min() < 10  # 1e4 without


@pytest.mark.parametrize("dual", [False, True], ids=["more residuals", "more parameters"])
def test_cg_finds_the_dense_direction(dual):
    model, residual = network(2, 5, 1), fit(8 if dual else 40)
    closure = step_closure(residual, model)
    r = closure().detach()
    J = torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(x, model.parameters(), retain_graph=True)])
                     for x in closure()])  # fmt: skip
    dense = Dense(J, r)
    params = list(model.parameters())
    system = Iterative(lambda: (closure(), None), params, None, products=100, rank=60, seed=0)
    assert (system.loss, system._scale) == pytest.approx((dense.loss, dense.scale))
    for damping in (1e-2, 1e-6):
        (d, slope), (expected, steepness) = system.solve(damping), dense.solve(damping)
        torch.testing.assert_close(d, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert slope == pytest.approx(steepness, rel=1e-4)


def test_a_start_that_points_upwards_is_not_followed():
    model, residual = network(2, 5, 1), fit()
    closure, params = step_closure(residual, model), list(model.parameters())
    d, _ = Iterative(lambda: (closure(), None), params, None, products=100, rank=60, seed=0).solve(1e-3)
    system = Iterative(lambda: (closure(), None), params, -1e6 * d, products=1, rank=1, seed=0)
    _, slope = system.solve(1e-3)
    assert slope > 0


def test_logistic_regression_comes_to_its_minimum():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), random(60, 4)
    y = (x @ random(4, 3, seed=1) + random(60, 3, seed=2)).argmax(1)
    optimizer = GaussNewton(model)

    def closure():
        outputs = model(x)
        return outputs, F.cross_entropy(outputs, y)

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses == sorted(losses, reverse=True)
    gradients = torch.autograd.grad(closure()[1], list(model.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-8
    assert all(p.grad is None for p in model.parameters())


def test_a_dense_closure_makes_the_step_of_its_residuals():
    models = [network(2, 4, 1), network(2, 4, 1)]
    residual = fit()
    optimizers = [GaussNewton(model, solver="dense") for model in models]
    for _ in range(3):
        optimizers[0].step([residual])
        optimizers[1].step(step_closure(residual, models[1]))
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-7, atol=1e-9)


def test_auto_takes_cg_for_what_is_too_large(monkeypatch):
    model, residual = network(2, 5, 1), fit(30)
    optimizer = GaussNewton(model)
    assert "no step yet" in repr(optimizer)
    optimizer.step([residual])
    assert "dense, primal, 30 residuals, 21 parameters" in repr(optimizer)
    optimizer.step([fit(20)])
    assert "dense, dual, 20 residuals" in repr(optimizer)
    monkeypatch.setattr(module, "SIDE", 20)
    optimizer.step([residual])
    assert "cg, Nyström preconditioner of rank 50, 30 outputs, 21 parameters" in repr(optimizer)
    monkeypatch.setattr(module, "SIDE", 30)
    monkeypatch.setattr(module, "ENTRIES", 21 * 30 - 1)
    optimizer.step([residual])
    assert "cg" in repr(optimizer)
    before = flat(model)
    with pytest.raises(ValueError, match=r"solver='dense' with 30 residuals and 21 parameters.*solver='cg'"):
        GaussNewton(model, solver="dense").step([residual])
    with pytest.raises(ValueError, match="fewer points"):
        GaussNewton(model, solver="dense").step(step_closure(residual, model))
    assert torch.equal(flat(model), before)
