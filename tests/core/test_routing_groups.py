"""From a routing to an optimizer: overrides, groups, and what is warned about or refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.routing import Routing, for_model, route


def seen(model: nn.Module, **arguments: Any) -> dict[str, str]:
    """What goes to the matrix rule, and as which matrices."""
    return {row.name: row.layout for row in route(model, **arguments) if row.view is not None}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Holder(nn.Module):
    """A module of one's own, with parameters and modules by name."""

    def __init__(self, **members: nn.Module | Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member))


class Attention(Holder):
    pass


# Overrides.


def test_override_by_pattern_and_by_type() -> None:
    routing = route(mlp(), overrides={nn.Linear: "adamw", "2.*": "moso"})
    assert [(row.name, row.rule) for row in routing if row.param.ndim > 1] == [
        ("0.weight", "adamw"),
        ("2.weight", "moso"),
        ("4.weight", "adamw"),
    ]
    assert routing["2.bias"].rule == "adamw"  # matrix rules leave vectors alone
    assert routing["2.weight"].why == "override (else weight of Linear)"


def test_override_by_a_type_around_the_parameter() -> None:
    model = nn.Sequential(Attention(q=nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))
    assert set(seen(model, overrides={Attention: "adamw"})) == {"1.weight"}


def test_override_of_a_view_and_of_options() -> None:
    routing = route(mlp(), overrides={"2.weight": {"heads": 4, "lr": 0.5}})
    assert routing["2.weight"].layout == "4 × 2×8"
    hidden = [group for group in routing.groups({"lr": 0.1}) if group["rule"] == "soap"]
    assert [(group["heads"], group["lr"]) for group in hidden] == [(1, 0.1), (4, 0.5)]


def test_override_takes_an_optimizers_spelling() -> None:
    groups = route(mlp(), overrides={"2.weight": {"rule": "rekls", "shampoo_beta": 0.9}}).groups({"lr": 0.1})
    rekls = next(group for group in groups if ("2.weight") in [name for name, _ in group["params"]])
    assert (rekls["rule"], rekls["solver"], rekls["shampoo_beta"], rekls["lr"]) == ("kl_soap", "eigh", 0.9, 0.1)


def test_a_later_override_changes_or_replaces_an_earlier_one() -> None:
    overrides: Any = {nn.Linear: "rekls", "0.weight": {"lr": 0.5}, "2.weight": "adamw"}
    by_name = settings(route(mlp(), overrides=overrides), {"lr": 0.1})
    assert (by_name["0.weight"]["solver"], by_name["0.weight"]["lr"]) == ("eigh", 0.5)
    assert (by_name["2.weight"]["rule"], by_name["2.weight"]["lr"]) == ("adamw", 0.1)


def test_an_override_may_give_other_names_of_options() -> None:
    by_name = settings(route(mlp(), overrides={"2.weight": {"use_eigh": True, "guards": False}}), {"lr": 0.1})
    assert [by_name["2.weight"][name] for name in ("solver", "noise_floor", "momentum_floor")] == ["eigh", 0.0, False]
    assert route(mlp(), overrides={"2.weight": {"use_kl_shampoo": True}})["2.weight"].rule == "kl_soap"


def test_an_override_of_what_is_no_matrix_by_itself() -> None:
    model = Holder(strange=torch.randn(3, 8, 8), head=nn.Linear(8, 2))
    assert seen(model, overrides={"strange": "soap"}) == {"strange": "3×(8·8)"}
    assert seen(model, overrides={"strange": {"rule": "soap", "merge_dims": False}}) == {"strange": "3 × 8×8"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"2.wieght": "adamw"}, "override '2.wieght' matches no parameter; the nearest is '2.weight'"),
        ({nn.Conv2d: "adamw"}, "override Conv2d matches no parameter; modules with parameters are Linear"),
        ({"*.bias": "soap"}, "override '\\*.bias' is about matrices and matches vectors only, such as '0.bias'"),
        ({"0.weight": "saop"}, "no such rule.*did you mean 'soap'"),
        ({"0.weight": {"heads": 3}}, "0.weight: heads=3: must divide the 8 rows"),
        ({"4.weight": {"split": (1, 2)}}, "4.weight: split mean nothing to adamw"),
    ],
)
def test_overrides_that_make_no_sense(overrides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(mlp(), overrides=overrides)


def test_override_of_a_frozen_parameter() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen parameters only: '0.weight'"):
        route(model, overrides={"0.*": "adamw"})


# Groups.


def settings(routing: Routing, *arguments: Any, **keywords: Any) -> dict[str, dict[str, Any]]:
    return {name: group for group in routing.groups(*arguments, **keywords) for name, _ in group["params"]}


def test_groups_are_by_rule_view_and_decay() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), *mlp())
    groups = route(model).groups({"lr": 0.1, "weight_decay": 0.2, "shampoo_beta": 0.9})
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["1.weight", "3.weight"],
        ["0.weight", "5.weight"],
        ["1.bias", "3.bias", "5.bias"],
    ]
    assert [(group["rule"], group["weight_decay"]) for group in groups] == [
        ("soap", 0.2),
        ("adamw", 0.2),
        ("adamw", 0.0),
    ]
    assert groups[0]["shampoo_beta"] == 0.9
    assert "shampoo_beta" not in groups[1]
    assert "heads" not in groups[1]


def test_elementwise_options_and_decay_1d() -> None:
    routing = route(mlp())
    by_name = settings(routing, {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.01, "betas": (0.8, 0.9)}, decay_1d=True)
    assert (by_name["0.weight"]["lr"], by_name["4.weight"]["lr"], by_name["0.bias"]["lr"]) == (0.1, 0.01, 0.01)
    assert by_name["0.bias"]["betas"] == (0.8, 0.9)
    assert by_name["0.bias"]["weight_decay"] == 0.2


def test_an_overridden_matrix_takes_the_elementwise_options() -> None:
    by_name = settings(route(mlp(), overrides={"2.weight": "adamw"}), {"lr": 0.1}, {"lr": 0.01})
    assert by_name["2.weight"]["lr"] == 0.01


def test_an_elementwise_rule_takes_everything() -> None:
    routing = route(mlp(), "adamw")
    assert {row.rule for row in routing} == {"adamw"}
    assert not routing.warnings
    by_name = settings(routing, {"lr": 0.1, "eps": 1e-6}, {"lr": 0.01})
    assert (by_name["2.weight"]["lr"], by_name["4.weight"]["lr"]) == (0.1, 0.01)
    assert by_name["2.weight"]["eps"] == 1e-6


def test_views_are_no_options_of_a_whole_model() -> None:
    with pytest.raises(ValueError, match=r"merge_dims=False.*overrides=\{pattern: \{'merge_dims': ...\}\}"):
        for_model(mlp(), "soap", lr=0.1, merge_dims=False)


@pytest.mark.parametrize("where", ["options", "elementwise", "overrides"])
def test_unknown_options_are_refused(where: str) -> None:
    arguments: dict[str, Any] = {
        "options": {"shampo_beta": 0.9},
        "elementwise": {"elementwise": {"epss": 0.1}},
        "overrides": {"overrides": {"0.weight": {"shampo_beta": 0.9}}},
    }[where]
    with pytest.raises(ValueError, match=r"has no such option.*did you mean"):
        for_model(mlp(), "soap", lr=0.1, **arguments)


# The optimizer.


@pytest.mark.parametrize("name", ["soap", "rekls", "moso", "adamw"])
def test_for_model_trains(name: str) -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(32, 6)
    target = x @ torch.randn(6, 3)
    optimizer = for_model(model, name, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_for_model_steps_as_groups_written_by_hand() -> None:
    from steepest import Optimizer

    torch.manual_seed(0)
    ours, theirs, x = mlp(), mlp(), torch.randn(16, 6)
    theirs.load_state_dict(ours.state_dict())
    decay = {"weight_decay": 0.0}
    rest = [p for name, p in theirs.named_parameters() if name not in ("0.weight", "2.weight")]
    matrices = {"params": [theirs[0].weight, theirs[2].weight], "rule": "soap", **decay}
    by_hand = Optimizer([matrices, {"params": rest, "rule": "adamw", **decay}], lr=0.01)
    for model, optimizer in ((ours, for_model(ours, "soap", lr=0.01, weight_decay=0.0)), (theirs, by_hand)):
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_tensor_learning_rate() -> None:
    lr = torch.tensor(0.1)
    optimizer = for_model(mlp(), "soap", lr=lr)
    assert all(group["lr"] is lr for group in optimizer.param_groups)


def test_what_looks_wrong_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="no parameter goes to soap"):
        for_model(nn.Linear(4, 3), "soap", lr=0.1)


# What looks wrong, and what is refused.


def test_a_tied_embedding_under_a_matrix_rule() -> None:
    model = Holder(table=nn.Embedding(9, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
    model.head.weight = model.table.weight  # type: ignore[union-attr]
    assert route(model)["table.weight"].why == "embedding, tied to the output head"
    assert not route(model).warnings
    (warning,) = route(model, overrides={"head.weight": "soap"}).warnings
    assert warning.startswith("table.weight is an embedding and, as head.weight, the output head")


@pytest.mark.parametrize("shape", [(0,), (48,)])
def test_placeholders_of_sharded_weights(shape: tuple[int, ...]) -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.zeros(shape))
    routing = route(model)
    assert routing["0.weight"].rule == "adamw"
    assert "0.weight stand without their shape" in routing.warnings[0]


def test_frozen_parameters_with_gradients() -> None:
    model = mlp()
    model(torch.ones(1, 6)).sum().backward()
    model[0].requires_grad_(False)
    (warning,) = route(model).warnings
    assert warning == "0.weight and 1 more have gradients although frozen: they are not optimized"


def test_memory_tied_by_hand() -> None:
    model = Holder(table=nn.Embedding(9, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 9, bias=False))
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
    model = Holder(w=torch.randn(4, 4, dtype=torch.complex64))
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
    model = mlp()
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
