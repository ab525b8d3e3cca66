"""Routing's parts: places, heads, views, overrides, groups, warnings. Whole models are in test_routing_models.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.routing import Routing, for_model, route
from steepest.views import View


def seen(model: nn.Module, **arguments: Any) -> dict[str, str]:
    """What goes to the matrix rule, and as which matrices."""
    return {row.name: row.seen for row in route(model, **arguments) if row.view is not None}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Holder(nn.Module):
    """A module of one's own, with parameters and modules by name."""

    def __init__(self, **members: nn.Module | Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member))


class Experts(Holder):
    pass


class Attention(Holder):
    pass


# The table.


def test_the_table_in_full() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), *mlp())
    assert [line.rstrip() for line in str(route(model)).splitlines()] == [
        "parameter      shape  view  rule   why                               state",
        "0.weight       20×6   –     adamw  embedding: rows are looked up     964 B",
        "1.weight       8×6    8×6   soap   weight of Linear                  1.2 kB",
        "{1,3}.bias ×2  8      –     adamw  bias                              136 B",
        "3.weight       8×8    8×8   soap   weight of Linear                  1.5 kB",
        "5.weight       3×8    –     adamw  output head: the last projection  196 B",
        "5.bias         3      –     adamw  bias                              28 B",
        "",
        "soap: 2 parameters, 112 entries (40.7%), state 2.7 kB",
        "adamw: 5 parameters, 163 entries (59.3%), state 1.3 kB",
    ]


def test_rows_carry_the_view_and_can_be_had_by_name() -> None:
    routing = route(nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8, 2)))
    row = routing["0.weight"]
    assert (row.rule, row.view, row.seen, row.shape) == ("soap", View((8, 3, 5, 5)), "8×(3·5·5)", (8, 3, 5, 5))
    assert routing["0.bias"].view is None
    assert len(routing) == 4
    with pytest.raises(KeyError):
        routing["1.weight"]


def test_layers_fold_into_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)), nn.Linear(8, 2, bias=False))
    assert "{0..11}.weight ×12  8×8" in str(route(model))


def test_state_bytes_can_be_replaced() -> None:
    routing = route(mlp(), state_bytes=lambda rule, pieces: 100 * len(pieces))
    assert {row.state_bytes for row in routing} == {100}


def test_empty_model() -> None:
    assert "parameter" in str(route(nn.Identity()))
    assert route(nn.Identity()).groups({"lr": 0.1}) == []


# Heads, by position.


def test_the_last_projection_is_the_head() -> None:
    assert seen(mlp()) == {"0.weight": "8×6", "2.weight": "8×8"}


def test_a_head_as_wide_as_the_hidden_layers() -> None:
    assert "4.weight" not in seen(nn.Sequential(*mlp()[:4], nn.Linear(8, 8)))


def test_no_hidden_layer_is_a_head_because_its_width_is_the_vocabulary() -> None:
    blocks = nn.ModuleList(Holder(up=nn.Linear(16, 16), down=nn.Linear(16, 16)) for _ in range(2))
    model = Holder(table=nn.Embedding(16, 16), blocks=blocks, out=nn.Linear(16, 16))
    assert set(seen(model)) == {
        "blocks.0.up.weight",
        "blocks.0.down.weight",
        "blocks.1.up.weight",
        "blocks.1.down.weight",
    }


def test_a_head_written_before_the_body() -> None:
    blocks = nn.ModuleList(Holder(fc=nn.Linear(16, 16)) for _ in range(2))
    routing = route(Holder(head=nn.Linear(16, 50), blocks=blocks))
    assert routing["head.weight"].why == "output head: its outputs feed nothing"
    assert routing["blocks.1.fc.weight"].rule == "soap"


def test_policy_and_value() -> None:
    model = Holder(body=nn.Linear(4, 32), policy=nn.Linear(32, 5), value=nn.Linear(32, 1))
    assert set(seen(model)) == {"body.weight"}


def test_branches_that_are_concatenated_are_no_heads() -> None:
    model = Holder(state=nn.Linear(10, 32), action=nn.Linear(4, 32), joint=nn.Linear(64, 64), out=nn.Linear(64, 1))
    assert set(seen(model)) == {"state.weight", "action.weight", "joint.weight"}


def test_wrappers_hide_no_head() -> None:
    model = Holder(module=Holder(body=nn.Linear(4, 32), policy=nn.Linear(32, 5), value=nn.Linear(32, 3)))
    assert set(seen(model)) == {"module.body.weight"}


def test_a_backbone_has_no_head_and_says_so() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    routing = route(encoder)
    assert routing["layers.1.linear2.weight"].rule == "soap"
    assert [text.split(";")[0] for text in routing.warnings] == ["no output head was recognised"]


def test_an_override_names_a_head_that_was_not_found() -> None:
    model = nn.ModuleList(nn.Sequential(Holder(fc=nn.Linear(8, 8)), nn.Linear(8, 8)) for _ in range(2))
    assert route(model).warnings
    assert not route(model, overrides={"1.1.weight": "adamw"}).warnings


def test_a_fully_convolutional_net_ends_in_a_convolution() -> None:
    assert set(seen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))) == {"0.weight"}


# Views.


def test_convolutions() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv1d(4, 8, 3),
            "point": nn.Conv2d(4, 8, 1),
            "patch": nn.Conv3d(3, 16, 2, stride=2),
            "grouped": nn.Conv2d(8, 12, 3, groups=4),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "up": nn.ConvTranspose2d(8, 4, 2, stride=2),
            "up_grouped": nn.ConvTranspose2d(8, 4, 2, groups=2),
            "head": nn.Linear(4, 2),
        }
    )
    routing = route(model)
    assert seen(model) == {
        "plain.weight": "8×(4·3)",
        "point.weight": "8×4",
        "patch.weight": "16×(3·2·2·2)",
        "grouped.weight": "4 groups of 3×(2·3·3)",
        "up.weight": "(4·2·2)×8 (transposed)",
        "up_grouped.weight": "2 groups of 4×(2·2·2)",
    }
    assert routing["depthwise.weight"].why == "depthwise convolution: one filter per channel"
    assert routing["patch.weight"].why == "patches: a Linear over flattened pixels"


def test_grouped_convolutions_are_seen_group_by_group() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.Flatten(), nn.Linear(12, 2))
    view = route(model)["0.weight"].view
    weight = model[0].weight.detach()
    assert view is not None
    assert torch.equal(view.matrices(weight, 0), torch.stack([w.flatten(1) for w in weight.chunk(4)]))


@pytest.mark.parametrize(
    ("name", "rows", "extra", "expected"),
    [
        ("qkv", 96, {}, "3 × 32×32 (q, k, v)"),
        ("to_qkv", 48, {}, "3 × 16×32 (q, k, v)"),  # fewer heads than the width would hold
        ("c_attn", 64, {"n_kv_heads": 2}, "32×32 + 2 × 16×32 (q, k, v)"),
        ("qkv_proj", 80, {"num_key_value_heads": 1}, "80×32"),  # q is not as wide as the model: no guess
        ("query_key_value", 96, {}, "96×32"),  # interleaved by head
        ("kv", 64, {}, "2 × 32×32 (k, v)"),
        ("gate_up_proj", 96, {}, "2 × 48×32 (gate, up)"),
        ("project_in", 96, {}, "3 × 32×32 (q, k, v)"),  # by shape, being in an attention module
        ("project_in", 64, {}, "64×32"),
    ],
)
def test_fused_projections(name: str, rows: int, extra: dict[str, int], expected: str) -> None:
    attention = Attention(**{name: nn.Linear(32, rows)})
    for attribute, value in extra.items():
        setattr(attention, attribute, value)
    model = nn.Sequential(attention, nn.Linear(32, 4))
    assert seen(model) == {f"0.{name}.weight": expected}


def test_a_threefold_mlp_is_no_attention() -> None:
    assert seen(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))) == {"0.weight": "24×8"}


def test_multihead_attention_with_widths_of_its_own() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2, kdim=8, vdim=12, add_bias_kv=True), nn.Linear(16, 3))
    assert seen(model) == {
        "0.q_proj_weight": "16×16",
        "0.k_proj_weight": "16×8",
        "0.v_proj_weight": "16×12",
        "0.out_proj.weight": "16×16",
    }


def test_recurrent_gates() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 8, proj_size=6, bidirectional=True),
            "gru": nn.GRUCell(4, 8),
            "rnn": nn.RNN(4, 8),
            "head": nn.Linear(8, 2),
        }
    )
    views = seen(model)
    assert views["lstm.weight_ih_l0"] == "4 × 8×4 (i, f, g, o)"
    assert views["lstm.weight_hh_l0_reverse"] == "4 × 8×6 (i, f, g, o)"
    assert views["lstm.weight_hr_l0"] == "6×8"
    assert views["gru.weight_hh"] == "3 × 8×8 (r, z, n)"
    assert views["rnn.weight_ih_l0"] == "8×4"


def moe(**experts: Tensor) -> nn.Module:
    block = Holder(gate=nn.Linear(16, 4, bias=False), experts=Experts(**experts), shared=nn.Linear(16, 16))
    return nn.Sequential(block, nn.Linear(16, 3))


def test_stacked_experts_and_their_router() -> None:
    model = moe(
        gate_up_proj=torch.randn(4, 48, 16), down_proj=torch.randn(4, 16, 24), down_proj_bias=torch.zeros(4, 16)
    )
    assert seen(model) == {
        "0.experts.gate_up_proj": "4 experts of 2 × 24×16 (gate, up)",
        "0.experts.down_proj": "4 experts of 16×24",
        "0.shared.weight": "16×16",
    }
    assert route(model)["0.gate.weight"].why == "router: its rows are the experts' logits"


def test_experts_stored_inputs_first_are_known_by_their_shapes() -> None:
    model = moe(gate_up_proj=torch.randn(4, 16, 48), down_proj=torch.randn(4, 24, 16))
    assert seen(model)["0.experts.gate_up_proj"] == "4 experts of 2 × 24×16 (gate, up; transposed)"
    assert seen(model)["0.experts.down_proj"] == "4 experts of 16×24 (transposed)"


def test_experts_as_a_list_of_modules() -> None:
    experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    model = nn.Sequential(Holder(router=nn.Linear(16, 4), experts=experts), nn.Linear(16, 3))
    assert set(seen(model)) == {f"0.experts.{i}.weight" for i in range(4)}


def test_lora_trains_its_thin_pairs_and_leaves_the_frozen_rest() -> None:
    def adapted(inputs: int, outputs: int) -> nn.Module:
        base = nn.Linear(inputs, outputs).requires_grad_(False)
        down, up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        return Holder(base_layer=base, lora_A=nn.ModuleDict({"default": down}), lora_B=nn.ModuleDict({"default": up}))

    model = nn.Sequential(adapted(16, 32), nn.ReLU(), adapted(32, 16), nn.Linear(16, 4).requires_grad_(False))
    routing = route(model)
    assert {row.name: (row.seen, row.why) for row in routing} == {
        "0.lora_A.default.weight": ("2×16", "LoRA factor of rank 2"),
        "0.lora_B.default.weight": ("32×2", "LoRA factor of rank 2"),
        "2.lora_A.default.weight": ("2×32", "LoRA factor of rank 2"),
        "2.lora_B.default.weight": ("16×2", "LoRA factor of rank 2"),
    }
    assert not routing.warnings


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights_are_weights(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Linear(6, 8)), nn.ReLU(), wrap(nn.Linear(8, 3)))
    assert list(seen(model).values()) == ["8×6"]


def test_bare_parameters() -> None:
    model = Holder(
        cls_token=torch.zeros(1, 1, 8),
        pos_embed=torch.zeros(1, 5, 8),
        layer_scale=torch.ones(8, 1, 1),
        w_in=torch.randn(16, 8),
        strange=torch.randn(8, 8),
        temperature=torch.tensor(1.0),
        head=nn.Linear(16, 2),
    )
    routing = route(model)
    assert {row.name: row.why for row in routing} == {
        "cls_token": "vector",
        "pos_embed": "learnt table: added, not multiplied",
        "layer_scale": "vector",
        "w_in": "matrix by its name in Holder",
        "strange": "bare parameter: nothing says it is a matrix",
        "temperature": "vector",
        "head.weight": "output head: the last projection",
        "head.bias": "bias",
    }
    assert routing.warnings == ("strange may or may not be matrices and run entry by entry; an override settles it",)


def test_a_linear_of_ones_own_is_a_matrix() -> None:
    class MyLinear(Holder):
        pass

    assert seen(nn.Sequential(MyLinear(weight=torch.randn(8, 4)), nn.Linear(8, 2))) == {"0.weight": "8×4"}


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
    assert routing["2.weight"].seen == "4 × 2×8"
    hidden = [group for group in routing.groups({"lr": 0.1}) if group["rule"] == "soap"]
    assert [(group["heads"], group["lr"]) for group in hidden] == [(1, 0.1), (4, 0.5)]


def test_override_takes_an_optimizers_spelling() -> None:
    groups = route(mlp(), overrides={"2.weight": {"rule": "rekls", "shampoo_beta": 0.9}}).groups({"lr": 0.1})
    rekls = next(group for group in groups if ("2.weight") in [name for name, _ in group["params"]])
    assert (rekls["rule"], rekls["refresh"], rekls["shampoo_beta"], rekls["lr"]) == ("soap", "eigh", 0.9, 0.1)


def test_a_later_override_changes_or_replaces_an_earlier_one() -> None:
    overrides: Any = {nn.Linear: "rekls", "0.weight": {"lr": 0.5}, "2.weight": "adamw"}
    by_name = settings(route(mlp(), overrides=overrides), {"lr": 0.1})
    assert (by_name["0.weight"]["refresh"], by_name["0.weight"]["lr"]) == ("eigh", 0.5)
    assert (by_name["2.weight"]["rule"], by_name["2.weight"]["lr"]) == ("adamw", 0.1)


def test_an_override_of_what_is_no_matrix_by_itself() -> None:
    model = Holder(strange=torch.randn(3, 8, 8), head=nn.Linear(8, 2))
    assert seen(model, overrides={"strange": "soap"}) == {"strange": "3×(8·8)"}
    assert seen(model, overrides={"strange": {"rule": "soap", "merge_dims": False}}) == {"strange": "3 × 8×8"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"2.wieght": "adamw"}, "override '2.wieght' matches no parameter; the nearest is '2.weight'"),
        ({nn.Conv2d: "adamw"}, "override Conv2d matches no parameter; they are held by Linear"),
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


def test_a_fused_projection_on_the_root_is_no_head() -> None:
    """Nothing reads 3·64 numbers, but what follows reads them as three blocks of 64."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 64)
            self.qkv, self.out = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)
            self.head = nn.Linear(64, 100, bias=False)

    routing = route(Flat())
    assert [routing[name].hidden for name in ("qkv.weight", "out.weight", "head.weight")] == [True, True, False]
