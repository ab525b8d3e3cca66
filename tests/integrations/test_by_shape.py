"""Routing by shapes and by names, for hosts that hand over parameters; the hosts' ways to call it, by hand."""

import ast
import copy
import io
import logging
import warnings
from functools import partial

import pytest
import torch
from plain import model, train
from torch import nn

import steepest
from steepest.integrations import ByShape, TrainerFactory
from steepest.testing import check_optimizer

VOCABULARY = 9000
SEVERAL_GROUPS = {"added_group", "moved_parameter", "parameter_forms", "reordered_parameters", "resume_by_name"}


def tensors(*shapes):
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def rules(optimizer):
    return {p: group["rule"] for group in optimizer.param_groups for p in group["params"]}


def routed(params, **options):
    """Return the rules of parameters, in their order."""
    found = rules(ByShape(params, **{"lr": 1e-3} | options))
    return [found[p] for p in params]


# Shapes.


def test_tables_vectors_and_convolutions():
    params = tensors((VOCABULARY, 16), (32, 16), (32,), (16, 4, 3, 3), (8, 1, 3, 3), (1, 8, 4), (16, 32), (32, 16))
    assert routed(params) == ["adamw", "soap", "adamw", "soap", "adamw", "adamw", "soap", "soap"]


def test_tables_beside_a_vocabulary():
    params = tensors((VOCABULARY, 16), (64, 16), (2, 16), (16,), (16, 16), (16, 16))
    assert routed(params) == ["adamw", "adamw", "adamw", "adamw", "soap", "soap"]


@pytest.mark.filterwarnings("ignore:ByShape")
def test_biases_and_neighbours_tell_how_weights_are_stored():
    def layouts(*shapes):
        return [row.layout for row in ByShape(tensors(*shapes), lr=1e-3).routing if len(row.shape) > 1]

    attention, feed_forward = [(8, 24), (24,), (8, 8), (8,)], [(8, 32), (32,), (32, 8), (8,)]
    assert layouts(*attention, *feed_forward, *attention, *feed_forward)[:4] == [
        "3 × 8×8 (q, k, v; transposed)", "8×8 (transposed)", "32×8 (transposed)", "8×32 (transposed)"
    ]  # fmt: skip
    assert layouts((32, 8), (8,), (8, 8), (8, 8)) == [
        "32×8",
        "8×8",
        "8×8",
    ]  # of a norm, after a layer without bias
    assert layouts((24, 8), (24,), (8, 8), (8,), (8, 8), (8,))[0] == "3 × 8×8 (q, k, v)"
    assert layouts((24, 8), (24,), (8, 24), (8,), (8, 24), (8,))[0] == "24×8"
    assert layouts((24, 8, 1), (24,), (8, 8, 1), (8,), (8, 8), (8,))[0] == "3 × 8×8 (q, k, v)"
    up, norm = (32, 16, 2, 2), [(16,), (16,)]
    assert layouts(up, (16,), up, (16,), *norm, up, *norm, (16, 16)) == [
        *["(16·2·2)×32 (transposed)"] * 2, "32×(16·2·2)", "16×16"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ByShape")
def test_first_and_last_convolutions():
    assert routed(tensors((8, 1, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (2, 16, 1, 1))) == ["soap"] * 3 + ["adamw"]
    assert routed(tensors((8, 3, 3, 3), (8, 1, 3, 3), (16, 8, 3, 3))) == ["soap", "adamw", "soap"]


def test_many_long_layers_are_no_tables():
    assert routed(tensors(*[(VOCABULARY, 600)] * 3), max_precond_dim=8) == ["soap"] * 3


def test_experts_are_batches_and_their_router_is_none():
    params = tensors((4, 32), (4, 64, 32), (4, 32, 64), (32, 32), (32, 32))
    with pytest.warns(UserWarning, match="guessed by shape alone: .* use steepest.for_model") as caught:
        optimizer = ByShape(params, lr=1e-3, name="muon")
    assert len([w for w in caught if "guessed" in str(w.message)]) == 1
    assert [rules(optimizer)[p] for p in params] == ["adamw", "muon", "muon", "muon", "muon"]
    assert optimizer.state[params[1]]["momentum_buffer"].shape == (4, 64, 32)
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    start = params[1].detach().clone()
    optimizer.step()
    single = nn.Parameter(start[2].clone())
    single.grad = params[1].grad[2].clone()
    steepest.Muon([single], lr=1e-3).step()
    torch.testing.assert_close(params[1][2], single)


def test_lora_factors_of_long_layers_are_matrices():
    params = tensors((8, 64), (VOCABULARY, 8), (8, 64), (64, 8))
    optimizer = ByShape(params, lr=1e-3)
    assert set(rules(optimizer).values()) == {"soap"}
    assert optimizer.state[params[1]].keys() >= {"Q_R"}
    assert "Q_L" not in optimizer.state[params[1]]


@pytest.mark.filterwarnings("ignore:ByShape")
def test_a_head_is_last_and_unlike_all_others():
    body = [(16, 8), (8, 16), (16, 8), (8, 16)]
    assert routed(tensors(*body, (10, 8), (10,)))[-2] == "adamw"
    assert routed(tensors(*body))[-1] == "soap"
    assert routed(tensors((40, 8), *body, (40, 8))) == ["adamw", *["soap"] * 4, "adamw"]


def test_what_the_host_exempts_from_decay_is_no_matrix():
    matrix, table, other = tensors((16, 16), (31, 4), (16, 16))
    groups = [{"params": [matrix, other], "weight_decay": 0.1}, {"params": [table], "weight_decay": 0.0}]
    assert rules(ByShape(groups, lr=1e-3)) == {matrix: "soap", other: "soap", table: "adamw"}


# Names.


def test_names_decide_as_route_does():
    net = model()
    optimizer = ByShape(net.named_parameters(), lr=1e-3)
    assert {name: rules(optimizer)[p] for name, p in net.named_parameters()} == {
        row.name: row.rule for row in steepest.route(net, "soap")
    }
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == [
        name for group in steepest.for_model(net, lr=1e-3).param_groups for name in group["param_names"]
    ]


def test_weights_are_those_of_for_model():
    net, other = model(), model()
    train(net, ByShape(net.named_parameters(), lr=3e-3, weight_decay=0.1))
    train(other, steepest.for_model(other, lr=3e-3, weight_decay=0.1))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SMALL | {"num_key_value_heads": 1, "vocab_size": 96}
FAMILIES = {
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 96, "n_positions": 64},
    "LlamaForCausalLM": GROUPED,
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "ViTForImageClassification": SMALL | {"image_size": 32, "patch_size": 8},
    "ResNetForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
    "T5ForConditionalGeneration": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 96},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_routed_by_their_names_alone(family):
    kind = getattr(pytest.importorskip("transformers"), family)
    with torch.device("meta"):
        net = kind(kind.config_class(**FAMILIES[family]))
    by_name = {row.name: (row.rule, row.view) for row in ByShape(net.named_parameters(), lr=1e-3).routing}
    assert by_name == {row.name: (row.rule, row.view) for row in steepest.route(net, "soap")}


def test_overrides_need_names():
    net = model()
    optimizer = ByShape(net.named_parameters(), lr=1e-3, overrides={"layers.0.*": "adamw"})
    assert rules(optimizer)[net.layers[0][1].weight] == "adamw"
    with pytest.raises(ValueError, match="the parameters have no names"):
        ByShape(net.parameters(), lr=1e-3, overrides={"layers.0.*": "adamw"})


# What hosts pass.


def test_strings_and_arguments_for_everybody(caplog):
    caplog.set_level(logging.INFO, "steepest.integrations")
    params = tensors((8, 8), (8, 8), (8,))
    optimizer = ByShape(
        params, lr="1e-3", name="muon", betas="(0.8, 0.9)", eps="1e-6", foreach=None, fused=True, weight_decay="0.1"
    )
    matrices, rest = optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["eps"]) == (1e-3, 0.1, 1e-7)
    assert (rest["betas"], rest["eps"], rest["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.0)
    assert "betas=(0.8, 0.9) goes to adamw: muon has no betas" in caplog.text
    assert "eps=1e-06 goes to adamw: muon keeps its own, 1e-07" in caplog.text
    assert "fused=True is ignored: muon has no such option" in caplog.text
    assert "params.{0..1} ×2" in caplog.text


def test_an_option_out_of_range_is_named_though_nothing_is_stepped_by_it():
    with pytest.raises(ValueError, match=r"eps=-1.0: must be"):
        ByShape(tensors((8, 8)), lr=1e-3, name="muon", eps=-1.0)


def test_a_misspelt_option_is_an_error():
    with pytest.raises(ValueError, match=r"momentun=0.9: muon has no such option \(did you mean 'momentum'\?\)"):
        ByShape(tensors((8, 8)), lr=1e-3, name="muon", momentun=0.9)
    with pytest.raises(TypeError, match="the learning rate is missing"):
        ByShape(tensors((8, 8)))
    with pytest.raises(ValueError, match="maximize=True: not supported"):
        TrainerFactory()(model(), lr=1e-3, maximize=True)


def test_groups_keep_rates_decays_and_what_schedulers_read():
    a, b, c, d = tensors((8, 8), (8,), (8, 8), (8,))
    groups = [
        {"params": [a, b], "lr": 1e-2, "lr_scale": 0.5, "wd_mult": 0.0},
        {"params": [c, d], "weight_decay": 0.3, "lr_mult": 2.0, "note": "second"},
    ]
    optimizer = ByShape(groups, lr=1e-3, weight_decay=0.1, elementwise={"lr": 1e-4})
    assert [(g["rule"], g["params"], round(g["lr"], 9), g["weight_decay"]) for g in optimizer.param_groups] == [
        ("soap", [a], 1e-2, 0.1), ("adamw", [b], 1e-3, 0.0), ("soap", [c], 1e-3, 0.3), ("adamw", [d], 1e-4, 0.3)
    ]  # fmt: skip
    assert [(g.get("lr_scale"), g.get("wd_mult")) for g in optimizer.param_groups] == [(0.5, 0.0)] * 2 + [
        (None, None)
    ] * 2
    assert [g.get("note") for g in optimizer.param_groups] == [None, None, "second", "second"]


def test_as_kohyas_scripts_call_it():
    """A dotted path, arguments as ``key=value`` that are read as literals, and train() and eval() if they are there."""
    path, arguments = "steepest.integrations.ByShape", ["name='muon'", "elementwise={'lr':1e-4}", "weight_decay=0.1"]
    module, _, name = path.rpartition(".")
    kwargs = {key: ast.literal_eval(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    optimizer = getattr(__import__(module, fromlist=[name]), name)(tensors((8, 8), (8,)), lr=1e-3, **kwargs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.train()
    optimizer.eval()
    assert [(group["rule"], group["lr"]) for group in optimizer.param_groups] == [("muon", 1e-3), ("adamw", 1e-4)]


def test_groups_that_come_later_are_cut_too():
    a, b, c, d = tensors((8, 8), (8,), (8, 8), (8,))
    optimizer = ByShape([a, b], lr=1e-3, name="muon")
    optimizer.add_param_group({"params": [c, d], "lr": 1e-4})
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": tensors((8, 8), (8,))})
    expected = ["muon", "adamw", "muon", "adamw"]
    assert [group["rule"] for group in optimizer.param_groups] == expected
    assert [group["rule"] for group in copied.param_groups] == [*expected, "muon", "adamw"]


@pytest.mark.filterwarnings("ignore:ByShape")
def test_resumed_training_goes_on_bit_for_bit():
    whole, resumed = model(), model()
    first, second = (ByShape(net.parameters(), lr=3e-3, name="kl-soap") for net in (whole, resumed))
    train(whole, first)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert all(
        torch.equal(p, q)
        for p, q in zip(train(whole, first).parameters(), train(resumed, second).parameters(), strict=True)
    )


def test_an_elementwise_rule_takes_everything():
    assert routed(tensors((8, 8), (8,), (VOCABULARY, 8)), name="lion") == ["lion"] * 3


# Classes that are given a whole model.


def test_a_class_warns_of_a_whole_models_tables():
    params = tensors((VOCABULARY, 8), (8, 8), (8,), (8,))
    for make in (steepest.SOAP, steepest.Muon, steepest.Dion2):
        with pytest.warns(
            UserWarning, match=r"parameters of shape \[9000, 8\] look like an embedding.*for_model"
        ) as said:
            optimizer = make(params, lr=1e-3)
        assert len(said) == 1
        (group,) = optimizer.param_groups
        silent = f'into a group that names its rule: {{"params": [...], "rule": {group["rule"]!r}}}'
        assert silent in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make([{"params": params, "rule": group["rule"]}], lr=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        lambda: tensors((VOCABULARY, 8)),
        lambda: tensors((8, 64), (VOCABULARY, 8), (8, 64), (64, 8)),
        lambda: tensors(*[(VOCABULARY, 600)] * 3, (8,)),
        lambda: [{"params": tensors((VOCABULARY, 8), (8, 8), (8,), (8,)), "rule": "muon"}],
        lambda: [{"params": tensors((8, 8), (8,), (8,))}, {"params": tensors((VOCABULARY, 8)), "rule": "adamw"}],
    ],
    ids=["one matrix", "LoRA", "layers", "meant", "elementwise"],
)
def test_and_of_nothing_else(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steepest.Muon(params(), lr=1e-3)


def test_the_contract_is_kept_but_for_what_several_groups_change():
    """Names route otherwise than shapes, and so does another order; parameters of one group end up in several."""
    report = check_optimizer(partial(ByShape, lr=1e-2, name="muon"))
    assert {finding.clause.name for finding in report.broken} == SEVERAL_GROUPS, report
