import torch

from steepest.engine.optimizer import Optimizer
from steepest.rules.lion import Lion


def test_three_steps(golden):
    case = golden("lion")
    W = torch.nn.Parameter(torch.tensor(case["p0"], dtype=torch.float64))
    opt = Optimizer([W], "lion", **case["hp"])
    for grad, params, exp_avg in zip(case["grads"], case["params"], case["exp_avg"], strict=True):
        W.grad = torch.tensor(grad, dtype=torch.float64)
        opt.step()
        for x, expected in ((W.detach(), params), (opt.state[W]["exp_avg"], exp_avg)):
            torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_all_at_once_is_one_at_a_time(matrix):
    lion = Lion()
    alone, together = (
        [[start.clone() for start in (matrix(3, 4, t), matrix(5, 2, t))] for t in (1, 2, 3)] for _ in "ab"
    )
    lion.move(*together, lr=0.1, weight_decay=0.5)
    for one in zip(*alone, strict=True):
        lion.move(*([x] for x in one), lr=0.1, weight_decay=0.5)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_every_entry_moves_by_lr_and_zero_stays():
    W = torch.nn.Parameter(torch.ones(2, 3, 4))
    opt = Optimizer([W], "lion", lr=torch.tensor([0.25]), weight_decay=0.0)
    W.grad = torch.zeros_like(W)
    W.grad[0] = -1e-20
    opt.step()
    assert torch.equal(W[0], torch.full((3, 4), 1.25))
    assert torch.equal(W[1], torch.ones(3, 4))
