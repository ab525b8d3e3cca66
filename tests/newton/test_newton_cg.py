"""NewtonCG: it converges, escapes saddles, never raises the loss, and says what is wrong with a closure."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steepest import NewtonCG, Residual


def parameter(*numbers):
    return nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def classification(seed, n=40, features=6, hidden=5, dtype=torch.float64):
    """A small network, and a closure with its outputs and cross entropy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=dtype)
    y = (x @ torch.randn(features, 3, generator=generator, dtype=dtype)).argmax(1)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)

    def closure():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y)

    return net, closure


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def options(curvature):
    return {"curvature": curvature, "likelihood": "categorical" if curvature == "fisher" else None}


CURVATURES = ["hessian", "ggn", "fisher"]


# What it reaches.


def test_a_quadratic_takes_one_step_where_the_region_holds_its_minimum():
    A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b, x = torch.tensor([1.0, -1.0], dtype=torch.float64), parameter(5.0, 5.0)
    optimizer = NewtonCG([x], radius=100.0, tolerance=0.0)
    assert float(optimizer.step(lambda: 0.5 * x @ A @ x - b @ x)) == 75.0 + 12.5  # before the step
    torch.testing.assert_close(x.detach(), torch.linalg.solve(A, b))


@pytest.mark.parametrize("start", [(-1.2, 1.0), (2.0, -3.0), (0.5, 0.5, -1.0, 2.0), (-1.5,) * 6])
def test_rosenbrock(start):
    x = parameter(*start)
    optimizer = NewtonCG([x])
    for _ in range(60):
        optimizer.step(lambda: rosenbrock(x))
    torch.testing.assert_close(x.detach(), torch.ones_like(x))


def test_logistic_regression_reaches_a_vanishing_gradient():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(100, 10, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 10, dtype=torch.float64)
    y = (torch.rand(100, generator=generator, dtype=torch.float64) < X[:, 0].sigmoid()).double()
    w = nn.Parameter(torch.zeros(10, dtype=torch.float64))

    def loss():
        return F.binary_cross_entropy_with_logits(X @ w, y) + 1e-3 * w.square().sum()

    optimizer = NewtonCG([w])
    for _ in range(20):
        optimizer.step(loss)
    (gradient,) = torch.autograd.grad(loss(), w)
    assert float(gradient.abs().max()) < 1e-7


def test_it_leaves_a_saddle_along_negative_curvature():
    """Gradient descent of step 0.1 needs 190 steps here for the factor 1e8."""
    x = parameter(1.0, 1e-8)

    def loss():
        return 0.5 * x[0] ** 2 - 0.5 * x[1] ** 2 + 0.25 * x[1] ** 4

    optimizer = NewtonCG([x])
    for _ in range(8):
        optimizer.step(loss)
    torch.testing.assert_close(x.detach(), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("seed", range(3))
def test_a_network_learns_and_its_loss_never_rises(curvature, seed):
    net, closure = classification(seed)
    optimizer = NewtonCG(net.parameters(), **options(curvature))
    losses = [float(optimizer.step(closure)) for _ in range(25)] + [float(closure()[1].detach())]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]


def test_fisher_and_gauss_newton_are_one_for_a_likelihoods_own_loss():
    steps = {}
    for curvature in ("ggn", "fisher"):
        net, closure = classification(0)

        def scaled(closure=closure):
            outputs, loss = closure()
            return outputs, 0.2 * loss

        optimizer = NewtonCG(net.parameters(), **options(curvature))
        for _ in range(3):
            optimizer.step(scaled)
        steps[curvature] = flat(net.parameters())
    torch.testing.assert_close(steps["ggn"], steps["fisher"], rtol=1e-9, atol=1e-9)


def test_only_trainable_parameters_move_and_gradients_stay_as_they_are():
    net, closure = classification(0)
    net[0].bias.requires_grad_(False)
    net[2].bias.grad = torch.ones(3, dtype=torch.float64)
    before = net[0].bias.clone()
    NewtonCG([{"params": net[0].parameters()}, {"params": net[2].parameters()}]).step(lambda: closure()[1])
    assert torch.equal(net[0].bias, before)
    assert torch.equal(net[2].bias.grad, torch.ones(3, dtype=torch.float64))
    assert net[2].weight.grad is None


def test_float32_stops_at_rounding_without_losing_its_radius():
    x = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = NewtonCG([x], tolerance=1e-6)
    for _ in range(20):
        optimizer.step(lambda: (x - 1).square().sum() + 1.0)
    torch.testing.assert_close(x.detach(), torch.ones(2), atol=1e-3, rtol=0)
    assert float(optimizer.state[x]["radius"]) >= 0.5


# Steps that fail.


def test_a_failed_step_leaves_the_weights_bit_for_bit():
    x, calls = parameter(0.1, 0.7, -0.3), []

    def rising():
        calls.append(1)
        return x.square().sum() + (0 if len(calls) == 1 else 100)

    optimizer, before = NewtonCG([x]), x.detach().clone()
    optimizer.step(rising)
    assert torch.equal(x.detach(), before)
    assert len(calls) == 12
    radius = float(optimizer.state[x]["radius"])
    assert radius < 1e-3
    for _ in range(30):  # and it goes on afterwards
        optimizer.step(lambda: x.square().sum())
    assert float(x.detach().norm()) < 1e-6


def test_steps_to_where_the_loss_is_not_finite_are_shortened():
    x = parameter(3.0)
    optimizer = NewtonCG([x], radius=100.0)
    for _ in range(30):
        optimizer.step(lambda: (x - x.log()).sum())  # its first Newton step from 3 goes to -3
        assert float(x.detach()) > 0
    torch.testing.assert_close(x.detach(), torch.ones_like(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing(bad):
    x = parameter(1.0, 2.0)
    optimizer = NewtonCG([x])
    optimizer.step(lambda: (x * torch.tensor([1.0, bad], dtype=torch.float64)).square().sum())
    assert x.tolist() == [1.0, 2.0]
    assert {name: float(value) for name, value in optimizer.state[x].items()} == {"step": 1, "skipped": 1, "radius": 1}


def test_products_that_are_not_finite_move_nothing():
    x = parameter(0.0, 1.0)
    optimizer = NewtonCG([x])
    optimizer.step(lambda: x[0].abs().pow(1.5) + x[1])  # its second derivative at 0 is infinite
    assert x.isfinite().all()


def test_an_error_in_the_closure_puts_the_weights_back():
    x, calls = parameter(1.0, 2.0), []

    def breaking():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the data are gone")
        return x.square().sum()

    with pytest.raises(RuntimeError, match="the data are gone"):
        NewtonCG([x]).step(breaking)
    assert x.tolist() == [1.0, 2.0]


# State.


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_repeats_every_bit(curvature, dtype):
    def steps(net, closure, optimizer, count):
        for _ in range(count):
            optimizer.step(closure)
        return flat(net.parameters())

    net, closure = classification(1, dtype=dtype)
    optimizer = NewtonCG(net.parameters(), radius=0.3, **options(curvature))
    steps(net, closure, optimizer, 3)
    weights, state = copy.deepcopy(net.state_dict()), pickle.loads(pickle.dumps(optimizer.state_dict()))
    expected = steps(net, closure, optimizer, 3)
    other, closure = classification(1, dtype=dtype)
    other.load_state_dict(weights)
    resumed = NewtonCG(other.parameters(), **options(curvature))
    resumed.load_state_dict(state)
    assert torch.equal(steps(other, closure, resumed, 3), expected)


def test_copies_go_on():
    x = parameter(1.0, 2.0)
    optimizer = NewtonCG([x])
    optimizer.step(lambda: rosenbrock(x))
    copied = copy.deepcopy(optimizer)
    (y,) = copied.param_groups[0]["params"]
    optimizer.step(lambda: rosenbrock(x))
    copied.step(lambda: rosenbrock(y))
    assert torch.equal(x, y)


# Bad use.


def closures():
    x = parameter(1.0, 2.0)
    o, y = x.view(1, 2) * 3, torch.tensor([0])
    ce = F.cross_entropy(o, y)
    gone = (x**3).sum()
    gone.backward()
    return x, {
        "none": None,
        "not callable": 3.0,
        "float": lambda: 1.0,
        "nothing": lambda: None,
        "detached": lambda: ce.detach(),
        "backward": lambda: gone,
        "vector": lambda: x * 2,
        "stranger": lambda: parameter(1.0).sum(),
        "loss": lambda: ce,
        "three": lambda: (o, o, ce),
        "apart": lambda: (o, (x**2).sum()),
        "detached outputs": lambda: (o.detach(), ce),
        "other likelihood": lambda: (o, (o**4).sum()),
        "outputs without rows": lambda: (o[0], ce),
        "residual": [Residual(lambda u, t: u(t), torch.zeros(1, 1))],
        "pair": lambda: (o, ce),
    }


@pytest.mark.parametrize(
    ("name", "curvature", "error", "words"),
    [
        ("none", "hessian", TypeError, r"NewtonCG.step\(\) needs a closure that returns the loss without calling back"),
        ("none", "ggn", TypeError, r"needs a closure that returns \(outputs, loss\)"),
        ("not callable", "hessian", TypeError, r"NewtonCG.step\(float\): must be a closure"),
        ("float", "hessian", TypeError, "the closure returned a float: NewtonCG needs the loss as a tensor"),
        ("nothing", "hessian", TypeError, "the closure returned None"),
        ("detached", "hessian", ValueError, "no graph behind the loss"),
        ("backward", "hessian", ValueError, r"the graph of the loss is gone: the closure must not call backward\(\)"),
        ("vector", "hessian", ValueError, r"a loss of shape \[2\]: must be one number"),
        ("stranger", "hessian", ValueError, "none of the optimizer's parameters is in the graph of the loss"),
        ("loss", "ggn", TypeError, r"the closure returned the loss alone: NewtonCG needs \(outputs, loss\)"),
        ("three", "ggn", TypeError, "the closure returned a tuple of Tensor, Tensor, Tensor"),
        ("apart", "ggn", ValueError, "the loss does not depend on the outputs"),
        ("detached outputs", "ggn", ValueError, "no graph behind the outputs"),
        ("other likelihood", "fisher", ValueError, "the loss is no multiple of the negative log likelihood"),
        ("outputs without rows", "fisher", ValueError, r"outputs of shape \[2\] for likelihood='categorical'"),
        ("residual", "hessian", TypeError, "not residuals: steepest.GaussNewton takes these"),
    ],
)
def test_a_wrong_closure_is_told_what_is_wrong(name, curvature, error, words):
    x, given = closures()
    optimizer = NewtonCG([x], **options(curvature))
    with pytest.raises(error, match=words):
        optimizer.step(given[name])
    assert x.tolist() == [1.0, 2.0]
    assert all(float(entries["step"]) == 0 for entries in optimizer.state.values())


def test_the_right_closure_serves_every_curvature():
    for curvature in CURVATURES:
        x, given = closures()
        NewtonCG([x], **options(curvature)).step(given["pair"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"curvature": "newton"}, "curvature='newton': must be 'hessian', 'ggn' or 'fisher'"),
        ({"curvature": "fisher"}, "likelihood=None: must be one of 'categorical', 'normal', 'bernoulli'"),
        ({"curvature": "fisher", "likelihood": "poisson"}, "likelihood='poisson': must be one of"),
        ({"likelihood": "normal"}, "likelihood='normal' with curvature='hessian': is for curvature='fisher'"),
        ({"curvature": "ggn", "loss_scale": 2.0}, "loss_scale=2.0 with curvature='ggn'"),
        ({"radius": 0.0}, "radius=0.0: must be a number above 0"),
        ({"tolerance": 1.0}, r"tolerance=1.0: must be a number in \[0, 1\)"),
        ({"progress": -1}, "progress=-1: must be a number >= 0"),
        ({"products": 0}, "products=0: must be an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        NewtonCG([parameter(1.0)], **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(dtype):
    with pytest.raises(ValueError, match=f"parameters of {dtype}: NewtonCG needs float32 or float64"):
        NewtonCG([nn.Parameter(torch.zeros(2, dtype=dtype))])
