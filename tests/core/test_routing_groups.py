"""From a routing to an optimizer: overrides, groups, several modules, thin factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizers import NAMES
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


# Several modules, and thin factors.


@pytest.mark.parametrize("several", [list, tuple])
def test_several_modules_are_one_model(several: Any) -> None:
    optimizer = for_model(several([mlp(), nn.Linear(3, 3)]), "soap", lr=0.1)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted([*(f"0.{name}" for name, _ in mlp().named_parameters()), "1.weight", "1.bias"])


def test_a_dict_of_modules_has_its_keys_as_names() -> None:
    routing = route({"net.G": mlp(), "type": nn.Linear(3, 2)}, overrides={"net.G.2.*": "adamw"})
    assert routing["net.G.0.weight"].rule == "soap"
    assert routing["net.G.2.weight"].rule == routing["type.weight"].rule == "adamw"


def lora(width: int = 64, rank: int = 8) -> nn.Module:
    def adapted() -> nn.Module:
        factors = {"lora_A": nn.Linear(width, rank, bias=False), "lora_B": nn.Linear(rank, width, bias=False)}
        return Holder(base_layer=nn.Linear(width, width).requires_grad_(False), **factors)

    return nn.Sequential(adapted(), adapted(), nn.Linear(width, 3).requires_grad_(False))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lion"])
def test_lora_costs_at_most_three_times_the_state_of_adamw(name: str) -> None:
    model = lora()
    optimizer = for_model(model, name, lr=0.01)
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    assert sum(tensor.nbytes for state in states for tensor in state.values()) <= 3 * 8 * entries
    if name not in ("kfac", "ekfac"):  # which are fed by calls of the layers
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loras_long_side_has_no_basis_unless_overridden() -> None:
    default, overridden = route(lora()), route(lora(), overrides={"*lora_?.*": {"max_precond_dim": 64}})
    assert {row.why for row in default} == {"LoRA factor of rank 8, without a basis of its long side"}
    assert {row.why for row in overridden} == {"override (else LoRA factor of rank 8)"}
    for routing, names in ((default, ["L", "Q_L"]), (overridden, ["L", "Q_L", "Q_R", "R"])):
        optimizer = steepest.Optimizer(routing.groups({"lr": 0.1}), rule="soap", lr=0.1)
        factor = routing["0.lora_A.weight"]
        state = optimizer.state[factor.param]
        assert sorted(name for name in state if name[0] in "LRQ") == names
        assert factor.state_bytes == sum(x.nbytes for name, x in state.items() if name != "step" and x.ndim > 1)


def test_a_smaller_limit_of_ones_own_stays_smaller() -> None:
    (group,) = for_model(lora(), "soap", lr=0.1, max_precond_dim=4).param_groups
    assert group["max_precond_dim"] == 4
    (group,) = for_model(lora(), "soap", lr=0.1, max_precond_dim=4096).param_groups
    assert group["max_precond_dim"] == 8


@pytest.mark.parametrize("name", ["lora_A", "lora_embedding_A", "lora_down"])
def test_only_b_of_lora_may_go_to_the_matrix_rule(name: str) -> None:
    b = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B", "lora_down": "lora_up"}[name]
    factors = {name: nn.Linear(16, 2, bias=False), b: nn.Linear(2, 16, bias=False)}
    model = nn.Sequential(Holder(**factors), nn.Linear(16, 3))
    routing = route(model, "muon", lora="b")
    assert [(row.rule, row.why) for row in routing][:2] == [
        ("adamw", 'LoRA factor A: by lora="b"'),
        ("muon", "LoRA factor of rank 2"),
    ]
    assert [row.rule for row in route(model, "muon")][:2] == ["muon", "muon"]
    groups = for_model(model, "muon", lr=0.1, lora="b", elementwise={"lr": 0.01}).param_groups
    rates = {n: group["lr"] for group in groups for n in group["param_names"]}
    assert (rates[f"0.{name}.weight"], rates[f"0.{b}.weight"]) == (0.01, 0.1)
    assert route(model, "muon", lora="b", overrides={f"0.{name}.*": "soap"})[f"0.{name}.weight"].rule == "soap"


def test_lora_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match=r"lora='b': the model has no trainable factor B"):
        for_model(mlp(), "muon", lr=0.1, lora="b")
    with pytest.raises(ValueError, match=r"lora='a': must be one of both, b"):
        route(lora(), lora="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lora='b' with kfac: must be 'both'"):
        for_model(lora(), "kfac", lora="b")


def test_heads_of_grouped_queries() -> None:
    """Each head steps as it would alone, with as many for keys and values as there are."""
    model = nn.Sequential(Attention(qkv=nn.Linear(16, 32, bias=False)), nn.Linear(32, 3))
    options = {"split": (16, 8, 8), "heads": (4, 2, 2)}
    routing = route(model, "soap", overrides={"0.qkv.weight": options})
    assert routing["0.qkv.weight"].layout == "4 × 4×16 + 2 × 2 × 4×16"
    whole, parts = nn.Parameter(torch.randn(32, 16)), []
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(4)]
    fused, apart = steepest.SOAP([whole], lr=0.1, **options), steepest.SOAP(parts, lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn(32, 16)
        for part, grad in zip(parts, whole.grad.split(4), strict=True):
            part.grad = grad
        fused.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))
    assert [tuple(fused.state[whole][f"L.{i}"].shape) for i in range(3)] == [(4, 4, 4), (2, 4, 4), (2, 4, 4)]
    other = steepest.SOAP([nn.Parameter(torch.zeros(32, 16))], lr=0.1, **options | {"heads": [4, 2, 2]})
    other.load_state_dict(fused.state_dict())
    for heads, message in (("4,2", "heads='4,2': must be an integer >= 1, or a sequence"), ((4, 2), "of the 3 blocks")):
        with pytest.raises(ValueError, match=message):
            steepest.SOAP([whole], lr=0.1, split=(16, 8, 8), heads=heads)


@pytest.mark.parametrize("name", ["lora_embedding_A.default", "lora_down.weight", "lora_up.weight", "lora_a.weight"])
def test_other_names_of_lora_factors(name: str) -> None:
    module, _, local = name.partition(".")
    model = nn.Sequential(Holder(**{module: Holder(**{local: torch.randn(2, 16)})}), nn.Linear(16, 3))
    assert "LoRA factor of rank 2" in route(model)[f"0.{name}"].why


def test_a_lora_of_a_convolution() -> None:
    model = nn.Sequential(Holder(lora_A=nn.Conv2d(16, 2, 3, bias=False), lora_B=nn.Conv2d(2, 16, 1, bias=False)))
    assert [(row.layout, row.longest_basis) for row in route(model)] == [("2×(16·3·3)", 2), ("16×2", 2)]
