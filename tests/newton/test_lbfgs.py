"""L-BFGS against torch's with the same line search, against the two-loop recursion, and where steps fail."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn

import steepest
from steepest.newton import pairs
from steepest.newton.line_search import DECREASE, FLATNESS, Point, strong_wolfe

Function = Callable[[Tensor], Tensor]
EXACT: dict[str, Any] = {"tolerance_grad": 0, "tolerance_change": 0, "max_eval": 10_000}


def quadratic(n: int, condition: float) -> Function:
    g = torch.Generator().manual_seed(n)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = Q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T
    b = torch.randn(n, generator=g, dtype=torch.float64)
    return lambda x: x @ A @ x / 2 - b @ x


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def closure_of(optimizer: torch.optim.Optimizer, x: Tensor, f: Function) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        return loss

    return closure


def torchs(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, line_search_fn="strong_wolfe", **options)


def iterates(make: Any, f: Function, start: Tensor, steps: int, **options: Any) -> Tensor:
    """Return the weights after each step, ``[steps, P]``."""
    x = nn.Parameter(start.clone())
    optimizer = make([x], **options)
    found = []
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, x, f))
        found.append(x.detach().clone())
    return torch.stack(found)


F64 = torch.float64
PROBLEMS: dict[str, tuple[Function, Tensor, int]] = {
    "quadratic 20": (quadratic(20, 1e3), torch.zeros(20, dtype=F64), 40),
    "quadratic 50": (quadratic(50, 1e4), torch.ones(50, dtype=F64), 30),
    "rosenbrock 2": (rosenbrock, torch.tensor([-1.2, 1.0], dtype=F64), 20),
    "rosenbrock 10": (rosenbrock, torch.full((10,), -1.0, dtype=F64), 25),
}


# Against torch's.


@pytest.mark.parametrize("history", [3, 10, 100])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_iterates_are_torchs(problem: str, history: int) -> None:
    """Later iterates of Rosenbrock's function differ, because each doubles the difference that rounding has made."""
    f, start, steps = PROBLEMS[problem]
    options = EXACT | {"max_iter": 1, "history_size": history}
    ours, theirs = (iterates(make, f, start, steps, **options) for make in (steepest.LBFGS, torchs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert f(ours[-1]) < f(start)


@pytest.mark.parametrize("lr", [0.3, 1.0])
def test_steps_of_many_iterations_and_other_rates_are_torchs(lr: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    ours, theirs = (
        iterates(make, f, start, 3, lr=lr, max_iter=7, max_eval=10_000) for make in (steepest.LBFGS, torchs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("max_iter", [1, 5])
def test_without_line_search_steps_are_torchs(max_iter: int) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    options = {"lr": 0.5, "max_iter": max_iter, "max_eval": 100}
    ours = iterates(steepest.LBFGS, f, start, 20, line_search=None, **options)
    theirs = iterates(torch.optim.LBFGS, f, start, 20, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_float32_is_float64_up_to_rounding() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    exact = iterates(steepest.LBFGS, f, start, 8, max_iter=1)
    rounded = iterates(steepest.LBFGS, f, start.float(), 8, max_iter=1)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-4)
    assert f(iterates(steepest.LBFGS, f, start.float(), 3)[-1]) < 1e-8


def pinn(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a network for u'' = -π² sin πx, u(0) = u(1) = 0, and its loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x = torch.linspace(0, 1, 32, dtype=F64)[:, None].requires_grad_(True)
    source, ends = math.pi**2 * torch.sin(math.pi * x.detach()), torch.tensor([[0.0], [1.0]], dtype=F64)

    def loss() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (bend + source).square().mean() + model(ends).square().mean()

    return model, loss


def test_small_losses_of_a_pinn_end_lower_than_torchs() -> None:
    """torch's drops pairs whose sᵀy is below 1e-10, which all are in the end."""
    ends: dict[Any, list[float]] = {steepest.LBFGS: [], torchs: []}
    for seed in range(2):
        for make, logs in ends.items():
            model, loss = pinn(seed)
            optimizer = make(model.parameters(), **EXACT | {"max_iter": 400})

            def closure(optimizer: Any = optimizer, loss: Any = loss) -> Tensor:
                optimizer.zero_grad()
                value = loss()
                value.backward()
                return value

            optimizer.step(closure)
            logs.append(math.log10(float(loss().detach())))
    ours, theirs = (sum(logs) / len(logs) for logs in ends.values())
    assert ours < theirs
    assert max(ends[steepest.LBFGS]) < -4.5


# The direction.


def two_loops(S: list[Tensor], Y: list[Tensor], g: Tensor) -> Tensor:
    """Nocedal and Wright, Algorithm 7.4."""
    q, alphas = g.clone(), []
    for s, y in zip(reversed(S), reversed(Y), strict=True):
        alphas.append(s @ q / (y @ s))
        q -= alphas[-1] * y
    r = q * (S[-1] @ Y[-1] / (Y[-1] @ Y[-1]))
    for s, y, alpha in zip(S, Y, reversed(alphas), strict=True):
        r += s * (alpha - y @ r / (y @ s))
    return -r


@pytest.mark.parametrize("count", [1, 3, 5, 6, 12])
def test_the_direction_is_that_of_the_two_loops(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    p = torch.zeros(9, dtype=F64)
    M = torch.randn(9, 9, generator=g, dtype=F64)
    state = pairs.new_state(5, 9, p)
    S, Y = [], []
    for _ in range(count):
        S.append(torch.randn(9, generator=g, dtype=F64))
        Y.append(M @ M.T @ S[-1] + S[-1])
        pairs.remember(state, S[-1], Y[-1])
        assert torch.equal(pairs.direction(state, Y[-1]), pairs.direction(copy.deepcopy(state), Y[-1]))
    v = torch.randn(9, generator=g, dtype=F64)
    torch.testing.assert_close(pairs.direction(state, v), two_loops(S[-5:], Y[-5:], v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pairs.direction(state, Y[-1]), -S[-1], rtol=1e-9, atol=1e-9)  # the secant equation


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_pairs_need_positive_curvature_at_any_scale(scale: float) -> None:
    state = pairs.new_state(4, 2, torch.zeros(2, dtype=F64))
    s = torch.tensor([1.0, 0.0], dtype=F64)
    for y, count in (([-1.0, 0.0], 0), ([0.5e-10, 1.0], 0), ([2e-10, 1.0], 1), ([math.nan, 1.0], 1), ([1.0, 5.0], 2)):
        pairs.remember(state, s, scale * torch.tensor(y, dtype=F64))
        assert state["pairs"] == count
    pairs.forget(state)
    assert torch.equal(pairs.direction(state, s), -s)


# The line search.

LINES: dict[str, Callable[[Tensor], Tensor]] = {
    "convex": lambda t: (t - 3) ** 2,
    "steep": lambda t: (t - 0.01) ** 2,
    "far": lambda t: (t - 1e4) ** 2,
    "wavy": lambda t: 0.05 * (t - 2) ** 2 + torch.sin(3 * t + 2),
    "quartic": lambda t: t**4 - 3 * t**3 - t,
    "log": lambda t: -torch.log(2 * t + 1e-3) + 8 * t,
    "undefined from 0.4 on": lambda t: -torch.log(0.4 - t) - 5 * t,
    "infinite from 1.5 on": lambda t: torch.where(t < 1.5, -t + 0.2 * t**2, math.inf),
}


def line(f: Function, calls: list[float] | None = None) -> Callable[[float], Point]:
    def at(t: float) -> Point:
        if calls is not None:
            calls.append(t)
        x = torch.tensor(t, dtype=F64, requires_grad=True)
        value = f(x)
        (slope,) = torch.autograd.grad(value, x)
        finite = bool(value.isfinite() & slope.isfinite())
        return Point(t, value.item() if finite else math.inf, slope.item(), slope)

    return at


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("name", LINES)
def test_the_point_meets_the_strong_wolfe_conditions(name: str, first: float) -> None:
    calls: list[float] = []
    at = line(LINES[name], calls)
    start = at(0.0)
    found = strong_wolfe(at, start, first, most=60)
    assert found.loss <= start.loss + DECREASE * found.t * start.slope
    assert abs(found.slope) <= FLATNESS * abs(start.slope)
    assert len(calls) <= 31
    assert min(calls) >= 0


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_the_number_of_evaluations_is_kept(most: int) -> None:
    for f in LINES.values():
        calls: list[float] = []
        at = line(f, calls)
        start = line(f)(0.0)
        found = strong_wolfe(at, start, 50.0, most)
        assert len(calls) <= most
        assert found is start or found.loss < start.loss


def test_a_line_without_a_lower_point_returns_the_start() -> None:
    start = Point(0.0, 1.0, -1.0, torch.zeros(1))
    for bad in (math.inf, 2.0):
        for narrow, calls in ((0.0, 1100), (0.1, 6)):
            seen: list[float] = []

            def at(t: float, bad: float = bad, seen: list[float] = seen) -> Point:
                seen.append(t)
                return Point(t, bad, 1.0, torch.ones(1))

            assert strong_wolfe(at, start, 1.0, 2000, narrow) is start
            assert len(seen) < calls


# Steps that fail.


def bounded(max_eval: int, f: Function, start: Tensor, **options: Any) -> tuple[list[int], Tensor]:
    """Return the calls of the closure in each of five steps, and the weights."""
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_eval=max_eval, **options)
    calls = []
    for _ in range(5):
        before = optimizer.evaluations
        optimizer.step(closure_of(optimizer, x, f))
        calls.append(optimizer.evaluations - before)
    return calls, x.detach()


@pytest.mark.parametrize("max_eval", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_max_eval_holds_in_the_line_search_too(max_eval: int, line_search: str | None) -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    calls, x = bounded(max_eval, f, start, line_search=line_search, lr=1.0 if line_search else 1e-2)
    assert max(calls) <= max_eval
    if max_eval > 2:
        assert f(x) < f(start)


def test_a_search_that_is_cut_off_keeps_the_pairs() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_iter=30)
    counts = []
    for max_eval in range(3, 14):
        optimizer.param_groups[0]["max_eval"] = max_eval
        optimizer.step(closure_of(optimizer, x, f))
        counts.append(int(optimizer.state[x]["pairs"]))
    assert counts == sorted(counts)
    assert counts[-1] > 20


@pytest.mark.parametrize("log", [torch.log, lambda x: torch.log(x.clamp(min=0))], ids=["nan", "inf"])
def test_regions_without_a_finite_loss_are_too_far(log: Function) -> None:
    x = nn.Parameter(torch.tensor([5.0, 0.1], dtype=F64))
    optimizer = steepest.LBFGS([x], lr=100.0, max_eval=100)
    barrier = closure_of(optimizer, x, lambda x: (x - log(x)).sum())
    for _ in range(5):
        optimizer.step(barrier)
        assert bool((x > 0).all())
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=F64), rtol=0, atol=1e-6)


def test_a_failed_search_leaves_the_weights_and_begins_anew() -> None:
    f, start, _ = PROBLEMS["rosenbrock 10"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_iter=5)
    optimizer.step(closure_of(optimizer, x, f))
    assert optimizer.state[x]["pairs"] == 5
    before = x.detach().clone()

    def kink(x: Tensor) -> Tensor:  # a loss that rises in every direction, with a gradient that points nowhere
        return f(before) + (x - before).abs().sum() * 1e6 + (x - x.detach()).sum()

    optimizer.step(closure_of(optimizer, x, kink))
    assert torch.equal(x, before)
    assert optimizer.state[x]["pairs"] == 0
    optimizer.step(closure_of(optimizer, x, f))
    assert f(x) < f(before)


def test_without_line_search_a_loss_that_is_not_finite_is_undone() -> None:
    x = nn.Parameter(torch.tensor([3.0], dtype=F64))
    optimizer = steepest.LBFGS([x], lr=10.0, line_search=None)
    optimizer.step(closure_of(optimizer, x, lambda x: x.sum() - torch.log(x).sum()))
    assert optimizer.evaluations == 2
    assert torch.equal(x, torch.tensor([3.0], dtype=F64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_step_that_starts_at_a_bad_point_does_nothing(bad: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    straight, x = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, other = (steepest.LBFGS([p], max_iter=3) for p in (straight, x))
    for k in range(4):
        if k in (0, 2):
            returned = other.step(closure_of(other, x, lambda x: f(x) + (x * bad).sum()))
            assert returned.requires_grad
        one.step(closure_of(one, straight, f))
        other.step(closure_of(other, x, f))
    assert other.skipped == 2
    assert torch.equal(straight, x)
    same(one.state[straight], other.state[x])


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_zero_gradient_stops_a_step() -> None:
    x = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = steepest.LBFGS([x], **EXACT)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, x, lambda x: x.square().sum()))
    assert torch.equal(x, torch.zeros(3, dtype=F64))
    assert optimizer.evaluations == 2


def test_parameters_without_a_gradient_stay() -> None:
    a, b = (nn.Parameter(torch.full((2,), value, dtype=F64)) for value in (2.0, 3.0))
    frozen = nn.Parameter(torch.ones(3, dtype=F64), requires_grad=False)
    optimizer = steepest.LBFGS([{"params": []}, {"params": [a, frozen]}, {"params": [b]}], max_iter=3)

    def closure(both: bool) -> Tensor:
        optimizer.zero_grad()
        loss = ((a - 1).square() * (1 + a.square())).sum() + (((a + b) ** 4).sum() if both else 0.0)
        loss.backward()
        return loss

    optimizer.step(lambda: closure(both=True))
    assert not torch.equal(b, torch.full((2,), 3.0, dtype=F64))
    before, moving = b.detach().clone(), a.detach().clone()
    optimizer.step(lambda: closure(both=False))
    assert torch.equal(b, before)
    assert not torch.equal(a, moving)
    assert torch.equal(frozen, torch.ones(3, dtype=F64))


def test_nothing_to_train_is_no_error() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = steepest.LBFGS([{"params": [frozen]}, {"params": [nn.Parameter(torch.zeros(0, 3))]}])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert steepest.LBFGS([frozen]).step(lambda: 5.0) == 5


def test_an_error_in_the_closure_restores_the_weights() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x])
    inner = closure_of(optimizer, x, f)

    def closure() -> Tensor:
        if optimizer.evaluations == 9:
            raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(x, start)


def test_closures_are_required_and_return_the_loss() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = steepest.LBFGS([x])
    with pytest.raises(TypeError, match=r"LBFGS.step\(None\): must be a function"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure returned None"):
        optimizer.step(lambda: x.sum().backward())
    with torch.no_grad():
        assert float(optimizer.step(closure_of(optimizer, x, lambda x: x.square().sum()))) == 2


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(c: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    best = f(iterates(steepest.LBFGS, f, start, 10, **EXACT)[-1])
    scaled = iterates(steepest.LBFGS, lambda x: c * f(x), start, 10, **EXACT)
    torch.testing.assert_close(f(scaled[-1]), best, rtol=1e-10, atol=0)


def test_closures_under_autocast_change_no_product_of_the_step() -> None:
    def trained(inside: bool, outside: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        x, y = torch.randn(16, 8), torch.randn(16, 4)
        optimizer = steepest.LBFGS(model.parameters(), max_iter=6)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss = (model(x).float() - y).square().mean()
                loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            for _ in range(3):
                loss = optimizer.step(closure)
        assert loss < 2
        return model.weight.detach()

    assert torch.equal(trained(True, True), trained(True, False))
    assert torch.equal(trained(False, True), trained(False, False))


# Options and state.


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be a number >= 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": torch.tensor(-1.0)}, "lr=tensor"),
        ({"max_iter": 0}, "max_iter=0: must be an integer >= 1"),
        ({"max_iter": 2.5}, "max_iter=2.5"),
        ({"max_eval": 0}, "max_eval=0"),
        ({"history_size": 0}, "history_size=0"),
        ({"history_size": True}, "history_size=True"),
        ({"tolerance_grad": -1.0}, "tolerance_grad=-1.0"),
        ({"tolerance_change": math.inf}, "tolerance_change=inf"),
        ({"line_search": "armijo"}, "line_search='armijo': must be 'strong_wolfe' or None"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        steepest.LBFGS([nn.Parameter(torch.ones(2))], **options)
    optimizer = steepest.LBFGS([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=complaint):
        optimizer.step(lambda: torch.tensor(1.0))


def test_groups_share_their_options() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1.0, 0.5)]
    with pytest.raises(ValueError, match=r"lr=0.5 in group 1, 1.0 in group 0"):
        steepest.LBFGS(groups)


class Run:
    """Two parameters of a coupled quartic loss, and their optimizer."""

    def __init__(self, named: bool = True, backwards: bool = False, dtype: torch.dtype = F64, **options: Any) -> None:
        g = torch.Generator().manual_seed(3)
        self.params = {
            name: nn.Parameter(torch.randn(shape, generator=g, dtype=F64).to(dtype))
            for name, shape in (("W", (3, 2)), ("b", (4,)))
        }
        order = dict(reversed(self.params.items())) if backwards else self.params
        self.optimizer = steepest.LBFGS(
            list(order.items()) if named else list(order.values()), **{"max_iter": 3, "history_size": 4} | options
        )

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        W, b = self.params["W"], self.params["b"]
        loss = (W.square().sum() - b.sum()) ** 2 + (b**4).sum() + (W.flatten()[:4] - b).square().sum()
        loss.backward()
        return loss

    def steps(self, n: int) -> Run:
        for _ in range(n):
            self.optimizer.step(self.closure)
        return self

    def carry(self, other: Run) -> Run:
        """Take weights over."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(other.params[name])
        return self

    def expect(self, other: Run) -> None:
        """Expect the same weights and state, bit for bit."""
        for name, p in self.params.items():
            assert torch.equal(p, other.params[name]), name
            same(self.optimizer.state[p], other.optimizer.state[other.params[name]])


def by_file(run: Run, **options: Any) -> Run:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    new = Run(dtype=run.params["W"].dtype, **options).carry(run)
    new.optimizer.load_state_dict(torch.load(file, weights_only=True))
    return new


def by_copy(run: Run, duplicate: Callable[[Any], Any] = copy.deepcopy) -> Run:
    new = Run()
    new.optimizer, params = duplicate((run.optimizer, run.params))
    new.params = params
    return new


def by_distributed(run: Run, flat: bool) -> Run:
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    new = Run().carry(run)
    saved = dcp.get_optimizer_state_dict(nn.ParameterDict(run.params), run.optimizer, options=options)
    dcp.set_optimizer_state_dict(nn.ParameterDict(new.params), new.optimizer, copy.deepcopy(saved), options=options)
    return new


WAYS: dict[str, Callable[[Run], Run]] = {
    "file": by_file,
    "deepcopy": by_copy,
    "pickle": lambda run: by_copy(run, lambda x: pickle.loads(pickle.dumps(x))),
    "distributed": lambda run: by_distributed(run, flat=False),
    "flattened": lambda run: by_distributed(run, flat=True),
}


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_training_resumes_bit_for_bit(way: str, after: int) -> None:
    straight, first = Run().steps(after), Run().steps(after)
    second = WAYS[way](first)
    second.expect(straight)
    second.steps(2).expect(straight.steps(2))
    first.expect(Run().steps(after))


@pytest.mark.parametrize("options", [{"line_search": None, "lr": 1e-2}, {"dtype": torch.bfloat16}])
def test_others_resume_too(options: dict[str, Any]) -> None:
    straight, first = Run(**options).steps(2), Run(**options).steps(2)
    resumed = by_file(first, **{k: v for k, v in options.items() if k != "dtype"})
    resumed.steps(3).expect(straight.steps(3))
    assert resumed.optimizer.state[resumed.params["W"]]["steps"].dtype in (torch.float32, F64)


def test_a_used_optimizer_begins_anew_with_an_unused_state() -> None:
    saved = copy.deepcopy(Run().optimizer.state_dict())
    used = Run().steps(2)
    used.carry(Run()).optimizer.load_state_dict(saved)
    used.steps(2).expect(Run().steps(2))


def close(run: Run, expected: Run) -> None:
    for name, p in run.params.items():
        torch.testing.assert_close(p, expected.params[name], rtol=0, atol=1e-12)


def test_states_are_matched_by_name_and_follow_reordered_parameters() -> None:
    expected, first = Run().steps(4), Run().steps(2)
    backwards = by_file(first, backwards=True)
    close(backwards.steps(2), expected)

    reordered = Run().steps(2)
    reordered.optimizer.param_groups[0]["params"].reverse()
    reordered.optimizer.param_groups[0]["param_names"].reverse()
    close(by_file(reordered), first)
    close(by_file(reordered).steps(2), expected)
    close(by_copy(reordered).steps(2), expected)
    close(reordered.steps(2), expected)


@pytest.mark.parametrize("named", [True, False])
def test_what_does_not_fit_is_refused_and_nothing_has_changed(named: bool) -> None:
    run, expected = Run(named).steps(2), Run(named).steps(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = steepest.LBFGS([nn.Parameter(torch.ones(3))]).state_dict()
    damages: list[tuple[Any, str]] = [
        ({"state": saved["state"]}, "no 'state' and 'param_groups'"),
        (other, r"groups have \[1\] parameters, the optimizer's groups have \[2\]"),
    ]
    for name, value in (("steps", None), ("pairs", "gone"), ("curvature", torch.zeros(3, 3, dtype=F64))):
        damaged = copy.deepcopy(saved)
        damaged["state"][0][name] = value
        damages.append((damaged, f"{name} of L-BFGS' state is"))
    for option, value in (("lr", -1.0), ("history_size", 5)):
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0][option] = value
        damages.append((damaged, "lr=-1.0" if option == "lr" else "steps of L-BFGS' state"))
    if named:
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0]["param_names"] = ["W", "c"]
        damages.append((damaged, "other parameters: b is in one only"))
    for damaged, complaint in damages:
        with pytest.raises(ValueError, match=complaint):
            run.optimizer.load_state_dict(damaged)
    run.steps(1).expect(expected.steps(1))


def test_parameters_that_thaw_or_are_added_begin_anew() -> None:
    a, b, c = (nn.Parameter(torch.full((2,), value, dtype=F64)) for value in (2.0, 3.0, 4.0))
    a.requires_grad_(False)
    optimizer = steepest.LBFGS([a, b])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in (a, b, c)) + (a * b * c).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[b]["steps"].shape == (100, 2)
    a.requires_grad_(True)
    optimizer.step(closure)
    assert optimizer.state[a]["steps"].shape == (100, 4)
    assert optimizer.state[b].keys() == {"step"}
    optimizer.add_param_group({"params": [c]})
    optimizer.param_groups[0]["history_size"] = optimizer.param_groups[1]["history_size"] = 7
    optimizer.step(closure)
    assert optimizer.state[a]["steps"].shape == (7, 6)
    assert optimizer.state_dict()["state"][2].keys() == {"step"}
    optimizer.state[a]["steps"] = torch.zeros(7, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"steps of L-BFGS' state is \[7, 3\], must be a tensor of shape \[7, 6\]"):
        optimizer.step(closure)
