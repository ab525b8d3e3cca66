"""Which modules are layers, and the reasons why others are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from steepest.curvature import layers, unsupported


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.free = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(4, 4)
        self.head.weight = self.table.weight


def merged() -> nn.Module:
    """A linear layer with a low-rank adapter that is merged into its weight at each use."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.zeros(4, 1))

        def forward(self, W):
            return W + self.b @ self.a

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Adapter())
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


def test_linear_layers_and_convolutions_are_layers():
    model = nn.Sequential(nn.Linear(4, 5), nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(1, 2, 2, bias=False), nn.ReLU())
    found = layers(model)
    assert {name: layer.shape for name, layer in found.items()} == {"0": (1, 5, 5), "1": (2, 3, 7), "2": (1, 2, 8)}
    assert [layer.module for layer in found.values()] == list(model[:3])
    assert found["0"].bias is model[0].bias
    assert found["2"].bias is None
    assert unsupported(model) == {}


def test_a_layer_can_be_the_model():
    assert list(layers(nn.Linear(2, 3))) == [""]


REASONS = [
    (lambda: nn.LSTM(3, 4), "fused"),
    (lambda: nn.GRUCell(3, 4), "recurrent cell"),
    (lambda: nn.Embedding(9, 4), "looked up"),
    (lambda: nn.EmbeddingBag(9, 4), "looked up"),
    (lambda: nn.ConvTranspose2d(3, 4, 2), "transposed convolutions"),
    (lambda: nn.Bilinear(3, 4, 5), "two inputs"),
    (lambda: nn.LayerNorm(4), "LayerNorm has no matrix"),
    (lambda: nn.BatchNorm2d(4), "BatchNorm2d has no matrix"),
    (Own, "Own has no matrix"),
    (lambda: Scaled(3, 4), "Scaled has a forward of its own"),
    (replaced, "forward of its own"),
    (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "parametrized"),
    (lambda: parametrizations.orthogonal(nn.Linear(4, 4, bias=False)), "parametrized"),
    (merged, "parametrized"),
    (old_weight_norm, "made from others"),
    (lambda: nn.LazyLinear(4), "no shape yet"),
    (lambda: nn.Linear(3, 4, dtype=torch.complex64), "complex64"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS)
def test_what_is_no_layer_has_a_reason(make, reason):
    model = nn.ModuleDict({"it": make(), "head": nn.Linear(4, 2)})
    assert list(layers(model)) == ["head"]
    found = unsupported(model)
    assert reason in found["it"]
    assert all(name == "it" or name.startswith("it.") for name in found)


def test_attention_multiplies_by_its_weights_itself():
    found = unsupported(nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2)}))
    assert "packed weight" in found["mha"]
    assert "doesn't call this module" in found["mha.out_proj"]


def test_shared_weights_are_named():
    found = unsupported(Tied())
    assert list(layers(Tied())) == ["free"]
    assert found["head"] == "its weight or bias is shared with 'table'"
    pair = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    pair["b"].weight = pair["a"].weight
    assert unsupported(pair) == {f: f"its weight or bias is shared with {t!r}" for f, t in (("a", "b"), ("b", "a"))}


def test_one_module_under_two_names_is_one_layer():
    layer = nn.Linear(4, 4)
    assert list(layers(nn.ModuleDict({"a": layer, "b": layer}))) == ["a"]


@pytest.mark.parametrize("groups", [1, 2])
def test_join_is_the_order_of_the_statistics(groups):
    module = nn.Conv2d(4, 6, 3, groups=groups)
    layer = layers(module)[""]
    matrix = layer.join(module.weight, module.bias).reshape(6, -1)
    torch.testing.assert_close(matrix[:, :-1], module.weight.flatten(1))
    torch.testing.assert_close(matrix[:, -1], module.bias)
    assert layer.join(module.weight, module.bias).shape == (layer.shape if groups > 1 else layer.shape[1:])
