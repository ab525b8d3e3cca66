"""What looks wrong in a model or its routing, and is warned about or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from zoo_models import Held, mlp

from steepest.routing import for_model, route


@pytest.mark.parametrize(
    "wrong",
    [
        mlp(6, 8, 8, 3).parameters(),
        list(mlp(6, 8, 8, 3).parameters()),
        dict(mlp(6, 8, 8, 3).named_parameters()),
        [mlp(6, 8, 8, 3), torch.zeros(2, 2)],
        [[mlp(6, 8, 8, 3)]],
        [],
        "model",
        None,
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    for call in (route, lambda model: for_model(model, "soap", lr=0.1)):
        with pytest.raises(TypeError, match=rf"model={type(wrong).__name__}: must be a module, or a list or dict of"):
            call(wrong)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="all 6 parameters of the model are frozen: thaw"):
        for_model(mlp(6, 8, 8, 3).requires_grad_(False), "soap", lr=0.1)
    with pytest.raises(ValueError, match="the model has no parameters"):
        for_model(nn.Identity(), "soap", lr=0.1)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embeddings_are_refused(kind: Any) -> None:
    model = nn.Sequential(kind(9, 6, sparse=True), *mlp(6, 8, 8, 3))
    with pytest.raises(ValueError, match=r"0.weight is an embedding with sparse=True.*build it with sparse=False"):
        for_model(model, "soap", lr=0.1)
    model[0].requires_grad_(False)
    assert len(route(model)) == 6


def test_options_of_the_other_rule_are_refused_with_their_place() -> None:
    with pytest.raises(
        ValueError, match=r"betas=\(0.9, 0.95\): muon has no such option, but adamw has: .*elementwise="
    ):
        for_model(mlp(6, 8, 8, 3), "muon", lr=0.1, betas=(0.9, 0.95))
    with pytest.raises(ValueError, match=r"momentum=0.9: adamw has no such option, but muon has"):
        for_model(mlp(6, 8, 8, 3), "muon", lr=0.1, elementwise={"momentum": 0.9})


def test_a_tied_embedding_under_a_matrix_rule() -> None:
    model = Held(table=nn.Embedding(9, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight = model.table.weight  # type: ignore[union-attr]
    assert route(model)["table.weight"].why == "embedding, tied to the output head"
    assert not route(model).warnings
    (warning,) = route(model, overrides={"head.weight": "soap"}).warnings
    assert warning.startswith("table.weight is an embedding and, as head.weight, the output head")


@pytest.mark.parametrize("shape", [(0,), (48,)])
def test_placeholders_of_sharded_weights(shape: tuple[int, ...]) -> None:
    model = mlp(6, 8, 8, 3)
    model[0].weight = nn.Parameter(torch.zeros(shape))
    routing = route(model)
    assert routing["0.weight"].rule == "adamw"
    assert "0.weight stand without their shape" in routing.warnings[0]


def test_frozen_parameters_with_gradients() -> None:
    model = mlp(6, 8, 8, 3)
    model(torch.ones(1, 6)).sum().backward()
    model[0].requires_grad_(False)
    (warning,) = route(model).warnings
    assert warning == "0.weight and 1 more have gradients although frozen: they are not optimized"


def test_memory_tied_by_hand() -> None:
    model = Held(table=nn.Embedding(9, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight.data = model.table.weight.data  # type: ignore[union-attr]
    assert "table.weight and head.weight are two parameters over one memory" in route(model).warnings[0]


def test_a_model_on_meta_can_be_routed() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 10))
    routing = route(model)
    assert routing["0.weight"].state_bytes == 4 * 6 * 4096**2
    assert "on the meta device" in routing.warnings[0]


def test_thin_matrices_whose_state_dwarfs_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 8, bias=False), nn.Linear(8, 10))
    warning = next(text for text in route(model).warnings if "so thin" in text)
    times = (2 * 8 * 4096 + 2 * 4096**2 + 2 * 8**2) // (8 * 4096)
    assert f"0.weight: so thin that soap keeps up to {times} times their memory" in warning


def test_complex_parameters_are_refused() -> None:
    model = Held(w=torch.randn(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"w is torch.complex64.*torch.view_as_real"):
        route(model)
    model.w.requires_grad_(False)  # type: ignore[operator]
    assert len(route(model)) == 0


def test_lazy_parameters_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet"):
        route(model)


def test_integer_parameters_are_left_out_when_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    assert "0.codes" not in [row.name for row in route(model)]


def test_routing_changes_nothing() -> None:
    model = mlp(6, 8, 8, 3)
    before = torch.get_rng_state(), {name: p.clone() for name, p in model.state_dict().items()}
    str(route(model))
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(p, before[1][name]) for name, p in model.state_dict().items())


def test_a_large_model_is_routed_in_a_moment() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        model = nn.Sequential(nn.Embedding(100, 64), nn.TransformerEncoder(layer, 200), nn.Linear(64, 100))
    routing = route(model)
    assert len(routing) == 2403
    assert math.isclose(sum(row.param.numel() for row in routing), sum(p.numel() for p in model.parameters()))
    assert len(str(routing).splitlines()) < 30
