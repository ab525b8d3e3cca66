"""Products with Jacobians, Hessians, Gauss-Newton and Fisher matrices; conjugate gradients on them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steepest.newton.conjugate_gradients import conjugate_gradients, truncated
from steepest.newton.products import (
    Jacobian,
    gauss_newton,
    hessian,
    likelihood_hessian,
    output_hessian,
)

LOSSES = {
    "ce": (F.cross_entropy, "categorical"),
    "mse": (lambda o, y: 0.5 * (o - y).square().sum(1).mean(), "normal"),
    "bce": (F.binary_cross_entropy_with_logits, "bernoulli"),
}


def close(actual, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["ce", "mse", "bce"])
def case(request, golden):
    """A case of the golden file: its numbers, and its net, outputs and loss in a graph."""
    (numbers,) = [c for c in golden("curvature_products")["cases"] if c["loss"] == request.param]
    return numbers, *graph(numbers)


def graph(numbers):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    net.load_state_dict({name: torch.tensor(x, dtype=torch.float64) for name, x in numbers["params"].items()})
    outputs = net(torch.tensor(numbers["x"], dtype=torch.float64))
    y = torch.tensor(numbers["y"], dtype=torch.long if numbers["loss"] == "ce" else torch.float64)
    return list(net.parameters()), outputs, LOSSES[numbers["loss"]][0](outputs, y)


def dense(product, size):
    return torch.stack([product(e) for e in torch.eye(size, dtype=torch.float64)], 1)


# Products.


def test_products_match_the_golden_numbers(case):
    numbers, params, outputs, loss = case
    v = torch.tensor(numbers["v"], dtype=torch.float64)
    gradient, product = hessian(loss, params)
    close(gradient, numbers["grad"])
    close(product(v), numbers["hessian_v"])
    ggn = gauss_newton(Jacobian(outputs, params), output_hessian(loss, outputs))
    close(ggn(v), numbers["ggn_v"])
    G = dense(ggn, len(v))
    close(G.diag(), numbers["ggn_diag"])
    close(G.trace(), numbers["ggn_trace"])


def test_products_match_dense_matrices(case):
    _, params, outputs, _ = case
    P, M = sum(p.numel() for p in params), outputs.numel()
    rows = [torch.autograd.grad(o, params, retain_graph=True) for o in outputs.flatten()]
    dense_J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    J, v = Jacobian(outputs, params), torch.linspace(-1, 2, P, dtype=torch.float64)
    u = torch.linspace(2, -1, M, dtype=torch.float64).view_as(outputs)
    close(J.times(v).flatten(), dense_J @ v)
    close(J.transposed_times(u), dense_J.T @ u.flatten())
    for chunk in (1, 7, 256):
        close(J.dense(chunk), dense_J)


def test_the_loss_hessian_of_a_likelihood_does_not_need_the_loss(case):
    """F_o is the Hessian of the mean over rows; torch's mean over entries has one third of it."""
    numbers, _, outputs, loss = case
    scale = 3.0 if numbers["loss"] == "bce" else 1.0
    u = torch.linspace(2, -1, outputs.numel(), dtype=torch.float64).view_as(outputs)
    close(likelihood_hessian(outputs, LOSSES[numbers["loss"]][1])(u), scale * output_hessian(loss, outputs)(u))


def test_tokens_are_rows():
    o = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = F.cross_entropy(o.flatten(0, 1), torch.arange(10) % 3)
    u = torch.linspace(-1, 1, 30, dtype=torch.float64).view_as(o)
    close(likelihood_hessian(o, "categorical")(u), output_hessian(loss, o)(u))


def test_parameters_that_do_not_matter_count_as_zeros():
    used, unused, linear = (nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (2.0, 3.0, 4.0))
    params = [used, unused, linear]
    o = used**2 + linear
    J, v = Jacobian(o, params), torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    close(J.times(v), [104.0])
    close(J.transposed_times(torch.ones_like(o)), [4.0, 0.0, 1.0])
    close(J.dense(), [[4.0, 0.0, 1.0]])
    gradient, product = hessian(o.sum(), params)
    close(gradient, [4.0, 0.0, 1.0])
    close(product(v), [2.0, 0.0, 0.0])
    close(output_hessian(o.sum(), o)(torch.ones_like(o)), [0.0])  # of a linear loss
    close(hessian((3 * linear).sum(), params)[1](v), [0.0, 0.0, 0.0])


def test_gradients_of_the_parameters_stay_untouched(case):
    _, params, outputs, loss = case
    v = torch.ones(sum(p.numel() for p in params), dtype=torch.float64)
    hessian(loss, params)[1](v)
    gauss_newton(Jacobian(outputs, params), output_hessian(loss, outputs))(v)
    Jacobian(outputs, params).dense()
    assert all(p.grad is None for p in params)


def test_what_has_no_graph_is_refused_in_words():
    W = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no graph behind the loss: return it as the model computed it"):
        hessian(torch.tensor(1.0), [W])
    o = W**2
    for used in (lambda J: J.times(o), lambda J: J.transposed_times(o), lambda J: J.dense()):
        with pytest.raises(ValueError, match="none of the optimizer's parameters is in the graph of the outputs"):
            used(Jacobian(nn.Parameter(torch.ones(2)) * 2, [W]))
        with pytest.raises(ValueError, match="no graph behind the outputs"):
            used(Jacobian(o.detach(), [W]))
    (loss := o.sum()).backward()
    with pytest.raises(ValueError, match=r"the graph of the loss is gone: the closure must not call backward\(\)"):
        hessian(loss, [W])
    o = W * 2
    with pytest.raises(ValueError, match="the loss does not depend on the outputs"):
        output_hessian((W * 2).sum(), o)
    with pytest.raises(ValueError, match="likelihood='gauss': must be one of 'categorical', 'normal', 'bernoulli'"):
        likelihood_hessian(o, "gauss")
    with pytest.raises(ValueError, match=r"outputs of shape \[2\] for likelihood='normal': must be \[rows"):
        likelihood_hessian(o, "normal")
    with pytest.raises(ValueError, match="single logits of yes or no are likelihood='bernoulli'"):
        likelihood_hessian(o.unsqueeze(1), "categorical")


# Conjugate gradients.


def test_iterates_match_the_golden_numbers(case):
    numbers, params, outputs, loss = case
    ggn = gauss_newton(Jacobian(outputs, params), output_hessian(loss, outputs))
    b = hessian(loss, params)[0]
    for count, expected in numbers["cg_iterates"].items():
        solution = conjugate_gradients(lambda v: ggn(v) + 0.01 * v, b, products=int(count), progress=0.0)
        assert solution.products == int(count)
        close(solution.x, expected)


def system(seed=0, size=30, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    A = Q * torch.logspace(0, spread, size, dtype=torch.float64) @ Q.T
    return A, torch.randn(size, dtype=torch.float64, generator=generator)


def test_a_start_and_a_preconditioner_lead_to_the_same_solution():
    A, b = system()
    x = torch.linalg.solve(A, b)
    inverse = torch.linalg.inv(A + 0.3 * A.diag().diag())
    for start in (None, 0.7 * x, b):
        for preconditioner in (None, lambda r: inverse @ r):
            solution = conjugate_gradients(
                lambda v: A @ v, b, start=start, preconditioner=preconditioner, residual=1e-12, progress=0.0
            )
            assert solution.ended == "residual"
            close(solution.x, x, 1e-9)
            close(solution.value, 0.5 * x @ A @ x - b @ x, 1e-9)


def test_a_good_preconditioner_saves_products():
    A, b = system()
    inverse = torch.linalg.inv(A + 0.1 * A.diag().diag())
    plain = conjugate_gradients(lambda v: A @ v, b, residual=1e-8, progress=0.0)
    preconditioned = conjugate_gradients(
        lambda v: A @ v, b, preconditioner=lambda r: inverse @ r, residual=1e-8, progress=0.0
    )
    assert preconditioned.products < plain.products / 1.5


def test_it_stops_where_the_quadratic_falls_slowly():
    """Martens' test, evaluated afresh from the iterates of runs of every length."""
    A, b = system(spread=4.0, size=60)
    stopped = conjugate_gradients(lambda v: A @ v, b, progress=1e-3)
    assert stopped.ended == "progress"

    def q(count):
        x = conjugate_gradients(lambda v: A @ v, b, products=count, progress=0.0).x
        return float(0.5 * x @ A @ x - b @ x)

    def met(i):
        k = max(10, -(-i // 10))
        return i > k and (q(i) - q(i - k)) / q(i) < k * 1e-3

    assert [met(i) for i in range(1, stopped.products + 1)] == [False] * (stopped.products - 1) + [True]


def test_an_indefinite_or_broken_matrix_ends_the_iteration():
    A = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert conjugate_gradients(lambda v: A @ v, b).ended == "curvature"
    assert conjugate_gradients(lambda v: v * torch.nan, b)[1:] == (0.0, 1, "nonfinite")
    assert truncated(lambda v: v * torch.nan, b, 1.0).ended == "nonfinite"
    nothing = torch.zeros_like(b)
    assert conjugate_gradients(lambda v: A @ v, nothing)[1:] == (0.0, 0, "residual")
    assert truncated(lambda v: A @ v, nothing, 1.0)[1:] == (0.0, 0, "residual")


@pytest.mark.parametrize("seed", range(5))
def test_a_large_region_holds_the_solution_and_a_small_one_the_scaled_gradient(seed):
    A, b = system(seed)
    inside = truncated(lambda v: A @ v, b, radius=1e6, residual=1e-10)
    assert inside.ended == "residual"
    close(inside.x, torch.linalg.solve(A, b), 1e-8)
    at_edge = truncated(lambda v: A @ v, b, radius=1e-6)
    assert (at_edge.ended, at_edge.products) == ("boundary", 1)
    close(at_edge.x, 1e-6 * b / b.norm())


@pytest.mark.parametrize("seed", range(5))
def test_negative_curvature_is_followed_to_the_edge(seed):
    A, b = system(seed)
    A = A - 30.0 * torch.eye(30, dtype=torch.float64)
    solution = truncated(lambda v: A @ v, b, radius=0.5)
    assert solution.ended in {"curvature", "boundary"}
    close(solution.x.norm(), 0.5)
    x = solution.x
    close(solution.value, 0.5 * x @ A @ x - b @ x, 1e-8)
    cauchy = 0.5 * b / b.norm()  # at least as good as the best step along the gradient
    t = min(1.0, float(b @ cauchy / (cauchy @ A @ cauchy))) if cauchy @ A @ cauchy > 0 else 1.0
    assert solution.value <= float(0.5 * t * t * cauchy @ A @ cauchy - t * b @ cauchy) + 1e-12


def test_truncated_iterates_are_those_of_conjugate_gradients():
    A, b = system()
    for count in (1, 4, 9):
        close(
            truncated(lambda v: A @ v, b, 1e6, products=count).x,
            conjugate_gradients(lambda v: A @ v, b, products=count, progress=0.0).x,
        )
