"""MOSO against the numbers of its public implementation."""

import pytest
import torch

import steepest


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_moso(golden, trajectory, shape):
    m, n = shape
    want = golden("moso")[f"{m}x{n}"]
    weights, state = trajectory(lambda params: steepest.MOSO(params, **want["options"]), m, n, steps=6)
    side = "L" if m <= n else "R"
    for W, expected in zip(weights, want["params"], strict=True):
        torch.testing.assert_close(W, torch.tensor(expected), rtol=0, atol=2e-6)
    for ours, theirs in (("momentum_buffer", "momentum_buffer"), ("exp_avg_sq", "exp_avg_sq"), (side, "M")):
        torch.testing.assert_close(state[ours], torch.tensor(want[theirs]), rtol=0, atol=2e-6)
    assert state["step"] == want["step"]
    assert ("L" in state) + ("R" in state) == 1


def test_rmsprop_divides_the_projected_momentum_and_nothing_else(matrix):
    W = torch.nn.Parameter(torch.zeros(3, 5))
    opt = steepest.MOSO([W], lr=1.0, weight_decay=0.0, inner="rmsprop", eps=0.0)
    G = matrix(3, 5, 1, torch.float32)
    W.grad = G
    opt.step()
    M = 0.05 * G
    Q = torch.linalg.eigh(M @ M.T).eigenvectors.flip(-1)
    P = Q.T @ M
    expected = Q @ (P / (0.05 * P.square()).sqrt())
    torch.testing.assert_close(-W.detach(), expected, rtol=1e-4, atol=1e-4)
    assert "exp_avg" not in opt.state[W]
