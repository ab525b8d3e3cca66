"""The formula of Adam between two inverse roots, taken literally."""

import torch

import steepest
from steepest.linalg.roots import matrix_power


def test_literal_formula(golden, matrix):
    want = golden("inverse_root")
    W = torch.nn.Parameter(torch.tensor(want["W0"], dtype=torch.float64))
    opt = steepest.InverseRootSOAP(
        [W], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, damping=1e-6, root=4,
        preconditioner_decay=0.95, correct_shampoo_beta_bias=False, precondition_frequency=1,
    )  # fmt: skip
    for step, expected in enumerate(want["params"], start=1):
        W.grad = matrix(4, 4, step) + 2 * torch.eye(4, dtype=torch.float64)
        opt.step()
        torch.testing.assert_close(W.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def update(scale, graft, matrix):
    W = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    opt = steepest.InverseRootSOAP([W], lr=1.0, weight_decay=0.0, damping=0.0, graft=graft)
    W.grad = scale * matrix(4, 6, 1)
    opt.step()
    return W.detach().norm()


def test_it_preconditions_twice_unless_grafted(matrix):
    ratio = update(100.0, "none", matrix) / update(1.0, "none", matrix)
    torch.testing.assert_close(ratio, torch.tensor(0.01, dtype=torch.float64), rtol=1e-5, atol=0)
    ratio = update(100.0, "adam", matrix) / update(1.0, "adam", matrix)
    torch.testing.assert_close(ratio, torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_grafted_it_has_the_norm_of_adams_step(matrix):
    torch.testing.assert_close(
        update(1.0, "adam", matrix), torch.tensor(24.0, dtype=torch.float64).sqrt(), rtol=1e-6, atol=0
    )


def test_l2_is_a_part_of_the_gradient_for_covariances_too(matrix):
    """Otherwise the roots of zero covariances, 1/sqrt(damping), would lift the decay of a matrix without gradient."""
    wd, lr, damping, (beta1, beta2, beta) = 0.3, 0.01, 1e-6, (0.9, 0.999, 0.95)
    W = matrix(4, 4, 9)
    P = torch.nn.Parameter(W.clone())
    opt = steepest.InverseRootSOAP(
        [P], lr=lr, weight_decay=wd, weight_decay_method="l2", precondition_frequency=1, damping=damping
    )
    L = R = m = v = torch.zeros_like(W)
    for t in range(1, 6):
        G = matrix(4, 4, t) if t > 2 else torch.zeros_like(W)
        P.grad = G.clone()
        opt.step()
        G = G + wd * W
        one_minus_beta = (1 - beta) / (1 - beta**t)
        L, R = L.lerp(G @ G.T, one_minus_beta), R.lerp(G.T @ G, one_minus_beta)
        m, v = m.lerp(G, 1 - beta1), v.lerp(G.square(), 1 - beta2)
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        W = W - lr * matrix_power(L, -0.25, eps=damping) @ u @ matrix_power(R, -0.25, eps=damping)
        torch.testing.assert_close(P.detach(), W, rtol=0, atol=1e-10)
