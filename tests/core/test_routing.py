"""Routing's parts: places, heads, views, overrides, groups, warnings. Whole models are in test_routing_models.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.routing import route
from steepest.view import View


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


class Experts(Holder):
    pass


class Attention(Holder):
    pass


# The table.


def test_the_table_in_full() -> None:
    model = nn.Sequential(nn.Embedding(20, 6), *mlp())
    assert str(route(model)) == repr(route(model))
    assert repr(route(model)).splitlines() == [
        "parameter      shape  rule   state   why",
        "0.weight       20×6   adamw  964 B   embedding: rows are looked up",
        "1.weight       8×6    soap   1.2 kB  weight of Linear",
        "{1,3}.bias ×2  8      adamw  136 B   bias",
        "3.weight       8×8    soap   1.5 kB  weight of Linear",
        "5.weight       3×8    adamw  196 B   output head: the last projection",
        "5.bias         3      adamw  28 B    bias",
        "",
        "soap: 2 parameters, 112 entries (40.7%), state 2.7 kB",
        "adamw: 5 parameters, 163 entries (59.3%), state 1.3 kB",
    ]


def test_long_reasons_go_on_in_the_next_line() -> None:
    lines = repr(route(nn.Sequential(Attention(in_proj=nn.Linear(32, 96)), nn.Linear(32, 4)))).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[3:5] == [
        "1.weight          4×32                 adamw  1.0 kB   output head: the last",
        "                                                       projection",
    ]


def test_rows_carry_the_view_and_can_be_had_by_name() -> None:
    routing = route(nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8, 2)))
    row = routing["0.weight"]
    assert (row.rule, row.view, row.layout, row.shape) == ("soap", View((8, 3, 5, 5)), "8×(3·5·5)", (8, 3, 5, 5))
    assert routing["0.bias"].view is None
    assert len(routing) == 4
    with pytest.raises(KeyError):
        routing["1.weight"]


def test_layers_fold_into_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)), nn.Linear(8, 2, bias=False))
    assert "{0..11}.weight ×12  8×8" in str(route(model))


def test_a_notebook_shows_a_table_with_names_escaped() -> None:
    class Strange(Experts):
        pass

    Strange.__name__ = "<script>"
    page = route(nn.Sequential(nn.Linear(4, 4), Strange(w_1=torch.randn(4, 4)), nn.Linear(4, 2)))._repr_html_()
    assert page.startswith("<table><tr><th>parameter</th>")
    assert "<td>0.weight</td><td>4×4</td><td>soap</td>" in page
    assert "<td>matrix by its name in &lt;script&gt;</td>" in page
    assert "<script>" not in page
    assert "soap: 2 parameters" in page


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
    routing = route(model, "muon")
    assert {row.name: (row.layout, row.why) for row in routing} == {
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
