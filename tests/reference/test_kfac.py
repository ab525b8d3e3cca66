"""K-FAC and EKFAC: five steps, exact natural gradients and π-damping, against numbers that two routes gave."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import steepest
from steepest.rule import State, Statistics, Step
from steepest.rules.ekfac import Ekfac
from steepest.rules.kfac import Kfac, LayerFisher


def values(*shape: int, t: float) -> Tensor:
    """Entry k, row by row from 1, is sin(1.3 k + 2.1 t) + 0.5 cos(0.9 k (t + 1))."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return (torch.sin(1.3 * k + 2.1 * t) + 0.5 * torch.cos(0.9 * k * (t + 1))).view(shape)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (6, 3)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)),
        (5, 2, 2, 3),
    ),
}


@pytest.mark.parametrize("number", range(10))
def test_five_steps(golden, number):
    case = golden("kfac_steps")["cases"][number]
    make, shape = NETS[case["net"]]
    model, options = make().double(), dict(case["options"])
    for k, p in enumerate(model.parameters()):
        p.data = 0.3 * values(*p.shape, t=0.3 + k)
    make_optimizer = {"kfac": steepest.KFAC, "ekfac": steepest.EKFAC}[options.pop("method")]
    optimizer = make_optimizer(model, settle=0, solver="eigh", damping_form="relative", clip_with="gradient", **options)
    for s, expected in enumerate(case["params"]):
        optimizer.zero_grad()
        mse_loss(model(values(*shape, t=s + 0.1)), values(shape[0], 2, t=s + 0.6)).backward()
        optimizer.step()
        for p, numbers in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(numbers, dtype=p.dtype), rtol=1e-9, atol=1e-9)


def first_step(rule: LayerFisher, G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, State]:
    """The direction of a first step from ``G [m, n]`` and statistics, and the state after it."""
    state = rule.init(G.unsqueeze(0))
    t, statistics = G.new_ones(1, 1, 1), Statistics(A.unsqueeze(0), B.unsqueeze(0))
    D = rule.update(G.unsqueeze(0), state, Step(t, rule.stage(0), slice(0, 1), statistics=statistics))
    assert D is not None
    return D[0], state


def test_pi_damping(golden):
    numbers = {name: torch.tensor(x, dtype=torch.float64) for name, x in golden("kfac_pi").items()}
    A, B, inverse = numbers["A"], numbers["G"], numbers["inv_kron"]
    rule = Kfac(damping=float(numbers["damping"]), damping_form="absolute")
    for k in range(6):  # of each unit vector: the columns of the inverse
        G = torch.eye(6, dtype=torch.float64)[k].view(2, 3)
        D, state = first_step(rule, G, A, B)
        # The authors' damping was rounded to float32, which the inverses of condition 60 magnify.
        torch.testing.assert_close(D.flatten(), inverse[:, k], rtol=1e-7, atol=1e-8)
    for name, damped in (("P_A", "A_damped"), ("P_B", "G_damped")):
        torch.testing.assert_close(torch.inverse(state[name][0]), numbers[damped], rtol=1e-8, atol=1e-8)


def test_the_natural_gradient_of_a_linear_layer(golden):
    """Where B is the identity, damping the product and its eigenvalues are the same thing."""
    case = golden("kfac_exact")["cases"][0]
    A, B, V, expected = (torch.tensor(case[name], dtype=torch.float64) for name in ("A", "B", "V", "natural_direction"))
    rule = Kfac(form="eigen", damping=case["damping"], damping_form="absolute")
    torch.testing.assert_close(first_step(rule, V, A, B)[0], expected, rtol=1e-12, atol=1e-12)


def test_factored_damping_is_that_of_damped_factors():
    """Where S is the product of eigenvalues, EKFAC's direction is K-FAC's with damped inverses."""
    root_A, root_B, G = values(3, 3, t=0.1), values(2, 2, t=0.2), values(2, 3, t=0.3)
    A, B = root_A @ root_A.mT, root_B @ root_B.mT
    expected, _ = first_step(Kfac(damping=0.03), G, A, B)
    torch.testing.assert_close(first_step(Ekfac(damping=0.03), G, A, B)[0], expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(first_step(Ekfac(damping=0.03, damping_form="relative"), G, A, B)[0], expected, rtol=0.01)


@pytest.mark.parametrize("clip_with", ["momentum", "gradient"])
def test_the_clip_goes_by_the_momentum_or_by_the_gradient(clip_with):
    """After gradients of both signs the two differ; ⟨D, M⟩ is never negative, and bounds the step."""
    model, κ = nn.Linear(3, 2).double(), 1e-4
    optimizer = steepest.KFAC(model, kl_clip=κ, clip_with=clip_with)
    for s in range(4):
        optimizer.zero_grad()
        (mse_loss(model(values(6, 3, t=s + 0.1)), values(6, 2, t=s + 0.6)) * (-1) ** s).backward()
        before = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
        optimizer.step()
        state, G = optimizer.state[model.weight], torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        M = state["exp_avg"] / (1 - 0.9 ** (s + 1))
        D = state["P_B"] @ M @ state["P_A"]
        assert (D * M).sum() > 0
        scale = (κ / (D * (M if clip_with == "momentum" else G)).sum().abs()).sqrt().clamp(max=1)
        after = torch.cat([model.weight.detach(), model.bias.detach()[:, None]], 1)
        torch.testing.assert_close(before - after, scale * D, rtol=1e-9, atol=1e-12)
