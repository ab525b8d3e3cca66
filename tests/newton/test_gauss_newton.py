"""Gauss-Newton against dense algebra, golden numbers, and what an optimizer with a line search promises."""

import copy
import math
import pickle
import runpy
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import steepest
from steepest import GaussNewton, Residual
from steepest.lab.workloads.problems import PROBLEMS
from steepest.newton import gauss_newton as module
from steepest.newton.dense import Dense
from steepest.newton.iterative import Iterative
from steepest.newton.nystrom import Nystrom
from steepest.newton.residual import half_square, joined


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(count=12, seed=0):
    """Residuals of a network with two inputs and one output."""
    x = random(count, 2, seed=seed)
    return Residual(lambda u, x, y: u(x) - y, x, x.sin().sum(1))


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def step_closure(residual, model):
    """The same residuals as a closure returns them."""
    return lambda: residual.factor * residual.values(model).reshape(-1)


# The direction, and the loop.


@pytest.mark.parametrize("dual", [False, True], ids=["primal", "dual"])
def test_six_steps_are_the_golden_ones(golden, dual, monkeypatch):
    numbers = golden("curvature_products")
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model.load_state_dict(
        {name: torch.tensor(p, dtype=torch.float64) for name, p in numbers["cases"][0]["params"].items()}
    )
    x, y = (as_in_golden(12, 3, t) for t in (0.11, 0.7))
    monkeypatch.setattr(module, "Dense", lambda J, r: Dense(J, r, dual))
    optimizer = GaussNewton(model)
    for expected in numbers["levenberg"]:
        loss = optimizer.step([Residual(lambda u, x, y: u(x) - y, x, y)])
        assert loss.item() == pytest.approx(expected["loss_before"], rel=1e-8)
        torch.testing.assert_close(flat(model), double(expected["params"]), rtol=1e-8, atol=1e-8)
        damping = optimizer.state[model[0].weight]["damping"].item()
        assert damping == pytest.approx(expected["damping_next"], rel=1e-8)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def as_in_golden(m, n, t):
    k = torch.arange(1, m * n + 1, dtype=torch.float64)
    return ((1.3 * k + 2.1 * t).sin() + 0.5 * (0.9 * k * (t + 1)).cos()).view(m, n)


@pytest.mark.parametrize(
    ("losses", "length"),
    [
        ([9, 9.5, 3], 1.0),  # it stops at the first that does not fall, once one has
        ([11, math.nan, 9, 8, 8], 0.125),
        ([9, 8, 7, 6, 5, 4, 3, 2], 2.0**-7),
        ([math.inf, 10, 11, 12, 13, 14, 15, 16], 0.0),
    ],
)
def test_the_length_is_the_best_before_the_loss_rises(losses, length):
    model = network(1, 1)
    optimizer, left = GaussNewton(model), iter(losses)
    before = flat(model)
    assert optimizer._search(10.0, torch.ones(2).double(), before, lambda: float(next(left))) == length
    assert list(left) == ([3] if length == 1.0 else [])
    if length:
        torch.testing.assert_close(flat(model), before - length)


@pytest.mark.parametrize("damping", [1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 3), (300, 260)], ids=str)
def test_primal_and_dual_agree_with_the_least_squares(shape, damping):
    J, r = random(*shape), random(shape[0], seed=1)
    mu = damping * J.square().sum().item() / shape[0]
    below = math.sqrt(mu) * torch.eye(shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([J, below]), torch.cat([r, r.new_zeros(shape[1])])).solution
    for dual in (False, True):
        d, slope = Dense(J, r, dual).solve(damping)
        assert (d - expected).norm() <= 1e-9 * expected.norm()
        assert slope == pytest.approx((d @ (J.mT @ r)).item(), rel=1e-9)
    assert Dense(J, r).dual == (shape[0] < shape[1])


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("seed", range(4))
def test_no_step_raises_the_loss(solver, seed):
    model, residual = network(2, 6, 1, seed=seed), fit(seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # far away, where full steps fail
    optimizer = GaussNewton(model, solver=solver)
    losses = []
    for _ in range(25):
        losses.append(optimizer.step([residual]).item())
        assert half_square(joined(model, [residual])) <= losses[-1]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01 * losses[0]


def test_at_the_minimum_nothing_moves():
    model, residual = network(2, 4, 1), fit(6)
    optimizer = GaussNewton(model)
    for _ in range(80):
        optimizer.step([residual])
    before = flat(model)
    damping = optimizer.state[model[0].weight]["damping"].item()
    for _ in range(3):
        optimizer.step([residual])
    assert half_square(joined(model, [residual])) < 1e-25
    assert (flat(model) - before).norm() < 1e-10
    assert optimizer.state[model[0].weight]["damping"].item() == damping < 1.0


def test_zero_derivatives_move_nothing():
    model = network(2, 1)
    before = flat(model)
    optimizer = GaussNewton(model)
    optimizer.step([Residual(lambda u, x: 0 * u(x) + 1, random(3, 2))])
    assert torch.equal(flat(model), before)
    assert optimizer.state[model[0].weight]["damping"].item() == 1e-3


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_a_loss_that_is_nan_did_not_fall(solver):
    """Half a step is allowed: beyond, the logarithm is NaN."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    optimizer = GaussNewton(model, damping=1e-9, solver=solver)
    residual = Residual(lambda u, x: u(x).log() + 1.5, torch.ones(1, 1).double())
    for _ in range(12):
        optimizer.step(residual)
    assert model.weight.item() == pytest.approx(math.exp(-1.5))


def test_poisson_comes_to_a_thousandth_in_40_steps():
    problem = PROBLEMS["poisson"]()
    torch.manual_seed(0)
    model = problem.network()
    optimizer = GaussNewton(model)
    for _ in range(40):
        optimizer.step(problem.residuals)
    assert problem.error(model) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_poisson_comes_below_a_millionth_in_200_steps(seed):
    problem = PROBLEMS["poisson"]()
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = GaussNewton(model)
    for _ in range(200):
        optimizer.step(problem.residuals)
    assert problem.error(model) < 1e-6


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


# Failed steps.


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_an_error_in_a_trial_leaves_the_weights(solver):
    model = network(2, 5, 1)
    before, calls = flat(model), []

    def function(u, x):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the third evaluation")
        return u(x) - x[0]

    optimizer = GaussNewton(model, solver=solver)
    with pytest.raises(RuntimeError, match="the third evaluation"):
        optimizer.step(Residual(function, random(6, 2)))
    assert len(calls) == 3
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_where_nothing_lowers_the_loss_the_weights_stay(solver, monkeypatch):
    model = network(2, 5, 1)
    before = flat(model)
    optimizer = GaussNewton(model, solver=solver)
    monkeypatch.setattr(optimizer, "_search", lambda *_: optimizer._move_to(before + 1) or 0.0)
    optimizer.step(fit())
    assert torch.equal(flat(model), before)
    assert optimizer.state[model[0].weight]["damping"].item() == module.HIGHEST


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_a_batch_that_is_not_finite_is_skipped(solver, bad):
    model, good = network(2, 5, 1), fit()
    optimizer = GaussNewton(model, solver=solver)
    optimizer.step(good)
    before = flat(model)
    damping = optimizer.state[model[0].weight]["damping"].clone()
    x = good.data[0].clone()
    x[3] = bad
    values = good.data[1].clone()
    values[2] = bad
    for data in ((x, good.data[1]), (good.data[0], values)):
        assert not math.isfinite(optimizer.step(Residual(good.function, *data)))
    assert torch.equal(flat(model), before)
    assert torch.equal(optimizer.state[model[0].weight]["damping"], damping)
    assert optimizer.skipped == 2
    assert optimizer.step(good) > half_square(joined(model, [good]))
    assert optimizer.skipped == 2


def test_derivatives_that_are_not_finite_are_skipped():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = GaussNewton(model)
    assert optimizer.step(Residual(lambda u, x: u(x).sqrt() - 1, torch.ones(1, 1).double())) == 0.5
    assert (model.weight.item(), optimizer.skipped) == (0.0, 1)


# State.


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_resuming_is_exact_to_the_bit(solver, dtype, how, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, residual = network(2, 5, 1).to(dtype), fit()
        residual = Residual(residual_function, *(x.to(dtype) for x in residual.data))
        optimizer = GaussNewton(model, solver=solver)
        for _ in range(3):
            optimizer.step(residual)
        if how == "state_dict":
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
            weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            other = network(2, 5, 1, seed=9).to(dtype)
            other.load_state_dict(weights)
            resumed = GaussNewton(other, solver=solver, damping=7.0)
            resumed.load_state_dict(state)
        else:
            resumed = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            other = resumed.model
    assert other is not model
    for _ in range(3):
        assert torch.equal(optimizer.step(residual), resumed.step(residual))
    assert torch.equal(flat(model), flat(other))
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours["param_groups"][0].keys() == theirs["param_groups"][0].keys()
    for name, x in ours["state"][0].items():
        assert torch.equal(x, theirs["state"][0][name]), name
        assert x.dim() == 0 or x.shape == (21,)


def residual_function(u, x, y):
    return u(x) - y


def test_a_copy_together_with_its_model_keeps_to_it():
    model = network(2, 5, 1)
    optimizer = GaussNewton(model)
    copied, other = copy.deepcopy((optimizer, model))
    assert copied.model is other
    copied.step(fit())
    assert not torch.equal(flat(other), flat(model))
    with pytest.raises(ValueError, match="damping=-1"):
        copied.add_param_group({"params": [nn.Parameter(random(2))], "damping": -1})


def test_groups_frozen_and_tied_parameters():
    """Two groups step like one; what is frozen stays; the weight that two layers share moves once."""

    def tied():
        model = network(3, 3, 3, 1)
        model[2].weight = model[0].weight
        model[2].bias.requires_grad_(False)
        return model

    models = [tied(), tied()]
    x = random(9, 3)
    residual = Residual(lambda u, x: u(x) - x.prod(), x)
    optimizers = [GaussNewton(models[0])]
    first, *rest = [p for p in models[1].parameters() if p.requires_grad]
    optimizers.append(GaussNewton(models[1], [{"params": [first]}, {"params": rest}]))
    for optimizer in optimizers:
        for _ in range(4):
            optimizer.step([residual])
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=0)
    assert torch.equal(models[0][2].bias, tied()[2].bias)
    assert models[0][2].weight is models[0][0].weight
    assert not torch.equal(models[0][0].weight, tied()[0].weight)


def test_some_parameters_alone_are_moved():
    model = network(2, 5, 1)
    last = model[2].weight
    others = [p.detach().clone() for p in model.parameters() if p is not last]
    GaussNewton(model, [last]).step(fit())
    assert all(torch.equal(a, b) for a, b in zip(others, [p for p in model.parameters() if p is not last], strict=True))
    assert not torch.equal(last, network(2, 5, 1)[2].weight)


def test_the_random_state_gradients_and_mode_are_left_alone():
    model = network(2, 5, 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    for solver in ("dense", "cg"):
        GaussNewton(model, solver=solver).step(fit())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.is_grad_enabled()


# Words.


MODEL = network(2, 3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": 0.0}, r"damping=0.0: must be a number above 0"),
        ({"damping": math.inf}, "damping=inf"),
        ({"damping": "much"}, "damping='much'"),
        ({"solver": "cholesky"}, "solver='cholesky': must be 'auto', 'dense' or 'cg'"),
        ({"products": 0}, "products=0: must be an integer above 0"),
        ({"rank": 1.5}, "rank=1.5: must be an integer above 0"),
        ({"params": [nn.Parameter(random(2))]}, "is not one of the model's"),
        ({"params": []}, "needs parameters"),
        ({"params": [{"params": [MODEL[0].weight], "damping": 1.0}, {"params": [MODEL[0].bias]}]}, "in group 1"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        GaussNewton(MODEL, **options)


def test_an_option_that_is_changed_later_is_checked_at_the_step():
    model = network(2, 3, 1)
    optimizer = GaussNewton(model)
    optimizer.param_groups[0]["rank"] = 0
    with pytest.raises(ValueError, match="rank=0"):
        optimizer.step(fit())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, r"step\(None\): give it residuals"),
        ([], "give it residuals"),
        (random(3), "give it residuals"),
        ([fit(), lambda: 0], "give it residuals"),
        (lambda: MODEL(random(3, 2)).square().mean(), "for a loss alone there is steepest.NewtonCG"),
        (lambda: 1.0, "returned 1.0"),
        (lambda: (MODEL(random(3, 2)), 1.0), "the loss must be a tensor"),
        (lambda: (MODEL(random(3, 2)), MODEL(random(3, 2))), "the loss must be a tensor"),
    ],
)
def test_what_no_step_can_be_made_of_is_refused_in_words(given, words):
    before = flat(MODEL)
    with pytest.raises(TypeError, match=words):
        GaussNewton(MODEL).step(given)
    assert torch.equal(flat(MODEL), before)


def test_a_dense_step_needs_least_squares():
    def closure():
        outputs = MODEL(random(3, 2))
        return outputs, outputs.square().mean()

    with pytest.raises(ValueError, match="for the outputs and another loss give solver='cg'"):
        GaussNewton(MODEL, solver="dense").step(closure)


def test_models_that_have_nothing_to_move_are_refused():
    with pytest.raises(ValueError, match="the model has none"):
        GaussNewton(nn.Tanh())
    with pytest.raises(ValueError, match=r"torch.bfloat16: GaussNewton needs float64"):
        GaussNewton(nn.Linear(1, 1).bfloat16())
    with pytest.raises(TypeError, match="the first argument is the model"):
        GaussNewton(MODEL.parameters())


def test_float32_is_said_once():
    with pytest.warns(UserWarning, match="float32") as said:
        optimizer = GaussNewton(nn.Linear(2, 1))
    x = random(5, 2).float()
    optimizer.step(Residual(lambda u, x: u(x) - x[0], x))
    assert len(said) == 1


def test_float32_systems_are_solved_in_float64():
    """With a condition of 1e9, Cholesky's decomposition in float32 would fail."""
    U, V = (torch.linalg.qr(random(6, 6, seed=seed))[0] for seed in (0, 1))
    J, r = (U * torch.logspace(0, -4.5, 6, dtype=torch.float64) @ V).float(), random(6).float()
    d, slope = Dense(J, r).solve(1e-9)
    expected, steepness = Dense(J.double(), r.double()).solve(1e-9)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, expected.float())
    assert slope == pytest.approx(steepness)


def test_float32_weights_come_to_what_float32_can():
    model = network(1, 8, 1).float()
    with pytest.warns(UserWarning, match="float32"):
        optimizer = GaussNewton(model)
    t = torch.linspace(0, 1, 20)[:, None]
    slope, start = Residual(lambda u, t: grad(u)(t)[0] + u(t), t), Residual(lambda u, t: u(t) - 1, t[:1])
    for _ in range(40):
        loss = optimizer.step([slope, start])
    assert loss < 1e-7
    assert loss.dtype == model[0].weight.dtype == torch.float32


def test_they_are_public():
    assert {"GaussNewton", "Residual"} <= set(steepest.__all__)


def test_the_example_finds_its_coefficient(capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pinn.py"))
    try:
        assert abs(example["main"](["--steps", "30"]) - example["TRUE_K"]) < 1e-6
    finally:
        torch.set_default_dtype(torch.float32)
    assert "step  30" in capsys.readouterr().out
