"""Gauss-Newton against dense algebra and golden numbers; what it does where a step fails, and what it refuses."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from networks import fit, flat, network, random
from torch import nn
from torch.func import grad

import steepest
from steepest import GaussNewton, Residual
from steepest.lab.workloads.problems import PROBLEMS
from steepest.newton import gauss_newton as module
from steepest.newton.dense import Dense
from steepest.newton.residual import half_square, joined

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
    assert optimizer._search(10.0, torch.ones(2).double(), before, lambda _: float(next(left))) == length
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
    assert loss < 1e-6  # 1.07e-7 on an AMD EPYC, below 1e-7 on an Intel Xeon
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


def test_the_example_solves_poissons_equation_and_draws_it(capsys, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "poisson.py"))
    try:
        assert example["main"](["--steps", "14", "--plot", str(tmp_path / "poisson.png")]) < 0.2
    finally:
        torch.set_default_dtype(torch.float32)
    assert "step   0   relative error of u = 1.3e+00" in capsys.readouterr().out
    assert (tmp_path / "poisson.png").read_bytes().startswith(b"\x89PNG")
