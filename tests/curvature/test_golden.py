"""Factors, operators and exact cases against numbers of a second route (their notes stand in the files)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import Curvature, KroneckerFactors, kfac_factors, layers

GOLDEN = Path(__file__).parents[1] / "reference" / "golden"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def tensor(x: Any, *shape: int) -> Tensor:
    out = torch.as_tensor(x, dtype=torch.float64)
    return out.reshape(shape) if shape else out


def close(x: Tensor, y: Any, tolerance: float) -> None:
    torch.testing.assert_close(x, tensor(y), rtol=tolerance, atol=tolerance)


def module_of(case: dict[str, Any]) -> nn.Module:
    outputs, inputs = case["weight_shape"][:2]
    if case["module"] == "Linear":
        module = nn.Linear(inputs, outputs, bias=case["bias"], dtype=torch.float64)
    else:
        how = {key: case[key] for key in ("kernel_size", "stride", "padding", "dilation", "groups", "bias")}
        how = {key: tuple(value) if isinstance(value, list) else value for key, value in how.items()}
        module = nn.Conv2d(inputs * case["groups"], outputs, **how, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(tensor(case["weight"], *case["weight_shape"]))
        if module.bias is not None:
            module.bias.copy_(tensor(case["b"]))
    return module


def backward(module: nn.Module, case: dict[str, Any]) -> None:
    """A mean loss over samples whose single gradients are the case's δ."""
    x = tensor(case["x"], *case["x_shape"])
    out = module(x)
    close(out.detach(), tensor(case["out"], *out.shape), 1e-12)
    (out * tensor(case["delta"], *out.shape)).sum().div(len(x)).backward()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", cases("kfac_factors"), ids=lambda case: case["name"])
def test_factors(case, sharing):
    module = module_of(case)
    curvature = Curvature(module, sharing=sharing, loss_terms="batch")
    curvature.listening = True
    backward(module, case)
    (statistics,) = curvature.collect().values()
    close(statistics.A, case[f"A_{sharing}"], 1e-12)
    close(statistics.B, case[f"B_{sharing}"], 1e-12)


@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("case", cases("kfac_factors"), ids=lambda case: case["name"])
def test_ekfac(case, per, monkeypatch):
    if per == "token":
        monkeypatch.setattr("steepest.curvature.moments.EXACT_ENTRIES", 0)
    monkeypatch.setattr("steepest.curvature.moments.BLOCK_ENTRIES", 1)  # one sample at a time
    module = module_of(case)
    A, B = tensor(case["A_expand"]), tensor(case["B_expand"])
    curvature = Curvature(module, loss_terms="batch")
    curvature.listening = True
    bases = torch.linalg.eigh(A)[1], torch.linalg.eigh(B)[1]
    curvature.bases = {module.weight: bases}.get
    backward(module, case)
    (statistics,) = curvature.collect().values()
    found = statistics.S.flatten(1).sort().values
    if f"ekfac_eigenvalues_sorted_per_{per}" in case:
        close(found, case[f"ekfac_eigenvalues_sorted_per_{per}"], 1e-12)
    if f"ekfac_direction_per_{per}" in case:
        factors = KroneckerFactors(A, B, statistics.S, bases)
        close(factors.solve(tensor(case["V"]), case["damping"]), case[f"ekfac_direction_per_{per}"], 1e-12)


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss whose Fisher is that of normal targets with variance 1: rows' mean."""
    return (outputs - targets).square().sum(-1).mean() / 2


def test_a_linear_layer_is_exact():
    case = cases("kfac_exact")[0]
    x, W = tensor(case["x_with_ones"]), tensor(case["W"])
    model = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(W[:, :-1])
        model.bias.copy_(W[:, -1])
    factors = kfac_factors(model, [(x[:, :-1], torch.zeros(len(x), 2).double())], half_squares, fisher="type2")[""]
    close(factors.A, case["A"], 1e-12)
    close(factors.B, case["B"], 1e-12)
    close(torch.kron(factors.B, factors.A), case["fisher_dense"], 1e-12)
    close(factors.solve(tensor(case["V"]), case["damping"]), case["natural_direction"], 1e-12)


def test_softmax_with_one_datum_is_exact():
    case = cases("kfac_exact")[1]
    x, W = tensor(case["x_with_ones"]), tensor(case["W"])
    model = nn.Linear(W.shape[1], len(W), bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(W)
    factors = kfac_factors(model, [(x, torch.tensor([1]))], F.cross_entropy, fisher="type2")[""]
    close(factors.A, case["A"], 1e-12)
    close(factors.B, case["B"], 1e-12)
    close(torch.kron(factors.B, factors.A), case["fisher_dense"], 1e-12)


def test_every_block_of_a_deep_linear_network_is_exact():
    case = cases("kfac_exact")[2]
    weights = [tensor(block["W"]) for block in case["blocks"]]
    model = nn.Sequential(*(nn.Linear(W.shape[1] - 1, len(W), dtype=torch.float64) for W in weights))
    with torch.no_grad():
        for module, W in zip(model, weights, strict=True):
            module.weight.copy_(W[:, :-1])
            module.bias.copy_(W[:, -1])
    x = tensor(case["x"])
    data = [(x, torch.zeros(len(x), len(weights[-1])).double())]
    factors = kfac_factors(model, data, half_squares, fisher="type2")
    for block, found in zip(case["blocks"], factors.values(), strict=True):
        close(torch.kron(found.B, found.A), block["fisher_dense"], 1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_deep_linear_networks_with_sharing_are_exact(golden, sharing):
    case = golden("kfac_exactness")
    X, W1, W2 = (tensor(case[key]) for key in ("X", "W1", "W2"))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(W.shape[1], len(W), bias=False, dtype=torch.float64) for W in (W1, W2))

        def forward(self, x: Tensor) -> Tensor:
            out = self.b(self.a(x))
            return out.mean(1) if sharing == "reduce" else out

    model = Net()
    model.a.weight.data.copy_(W1)
    model.b.weight.data.copy_(W2)
    shape = (5, 2) if sharing == "reduce" else (5, 3, 2)
    data = [(X, torch.zeros(shape, dtype=torch.float64))]
    factors = kfac_factors(model, data, half_squares, fisher="type2", sharing=sharing)["a"]
    close(factors.A, case[f"A_{sharing}"], 1e-10)
    close(torch.kron(factors.B, factors.A), case[f"GGN_{sharing}"], 1e-10)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "tokens_pooled": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), Mean(), nn.Linear(4, 3)),
    "tokens_each": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1, stride=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
}


def rows_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def named(case: dict[str, Any]) -> str:
    return "-".join(case[key] for key in ("net", "loss", "fisher", "approx"))


@pytest.mark.parametrize("case", cases("kfac_operators"), ids=named)
def test_operators(case):
    model = NETS[case["net"]]().double()
    model.load_state_dict({name: tensor(value) for name, value in case["params"].items()})
    x = tensor(case["x"])
    y = torch.tensor(case["y"]) if case["loss"] == "ce" else tensor(case["y"])
    loss = {"ce": rows_entropy if y.dim() > 1 else F.cross_entropy, "mse": nn.MSELoss(reduction="sum")}[case["loss"]]
    fisher = case["fisher"].replace("-", "")
    options = {"fisher": fisher, "sharing": case["approx"]}
    kfac = kfac_factors(model, [(x, y)], loss, **options)
    for factors, A, B in zip(kfac.values(), case["A"], case["B"], strict=True):
        close(factors.A, A, 1e-12)
        close(factors.B, B, 1e-12)

    parts = tensor(case["v"]).split([p.numel() for p in model.parameters()])
    v = {name: part.view_as(p) for part, (name, p) in zip(parts, model.named_parameters(), strict=True)}

    def check(factors: dict[str, KroneckerFactors], apply: Any, wanted: Any) -> None:
        """Product by product, weight and bias as one matrix, in the order of the parameters."""
        wanted, start = tensor(wanted), 0
        for name, layer in layers(model).items():
            found = apply(factors[name], layer.join(v[f"{name}.weight"], v[f"{name}.bias"]))
            flat = torch.cat([found[:, :-1].flatten(), found[:, -1]])
            close(flat, wanted[start : start + len(flat)], 1e-10)
            start += len(flat)
        assert start == len(wanted)

    check(kfac, lambda factors, V: factors @ V, case["kfac_v"])
    check(kfac, lambda factors, V: factors.solve(V, 0.01), case["kfac_solve_v"])
    if "ekfac_v" in case:
        ekfac = kfac_factors(model, [(x, y)], loss, **options, eigenvalues=True)
        check(ekfac, lambda factors, V: factors @ V, case["ekfac_v"])
        check(ekfac, lambda factors, V: factors.solve(V, 0.01), case["ekfac_solve_v"])
        trace = sum(float(factors.eigenvalues.sum()) for factors in ekfac.values())
        assert trace == pytest.approx(case["ekfac_trace"], rel=1e-10)
