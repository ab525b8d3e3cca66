"""Heads where several networks share a module, where one is declared first, and where nothing can be known."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from torch import nn
from zoo_models import Held, Net, mlp

from steepest.routing import for_model, route


def heads(model: Any) -> list[str]:
    """The weights of at least two rows that are heads."""
    return [row.name for row in route(model) if row.why.startswith("output head")]


def pasted(warning: str) -> dict[str, str]:
    """The override that a warning shows."""
    found = re.search(r"overrides=(\{.*?\})", warning)
    assert found, warning
    return dict(ast.literal_eval(found[1]))


# Several networks.


@pytest.mark.parametrize("hold", [nn.ModuleDict, lambda nets: Held(**nets), lambda nets: Net(**nets), dict])
def test_every_network_has_its_head(hold: Any) -> None:
    nets = {"policy": mlp(8, 16, 4), "value": mlp(8, 16, 3), "world": mlp(12, 16, 8)}
    assert heads(hold(nets)) == ["policy.2.weight", "value.2.weight", "world.2.weight"]


@pytest.mark.parametrize("hold", [nn.ModuleList, list, tuple])
def test_lists_of_networks(hold: Any) -> None:
    assert heads(hold([mlp(8, 16, 4), mlp(8, 16, 3)])) == ["0.2.weight", "1.2.weight"]


def test_heads_within_a_network_among_others() -> None:
    agent = Held(body=mlp(8, 32, 32), actor=nn.Linear(32, 4), critic=nn.Linear(32, 3))
    assert heads(Net(agent=agent, novelty=mlp(8, 32, 16))) == [
        "agent.actor.weight",
        "agent.critic.weight",
        "novelty.2.weight",
    ]


@pytest.mark.parametrize("hold", [Held, Net])
def test_outputs_as_wide_as_hidden_layers(hold: Any) -> None:
    assert heads(hold(a=mlp(4, 16, 16), b=mlp(4, 16, 3))) == ["a.2.weight", "b.2.weight"]


def test_a_time_embedding_is_no_head() -> None:
    assert heads(Net(time=mlp(8, 16, 16), net=mlp(4, 16, 16, 3))) == ["net.4.weight"]


def test_a_frozen_copy_hides_no_head() -> None:
    assert heads(Net(q=mlp(8, 32, 4), target=mlp(8, 32, 4).requires_grad_(False))) == ["q.2.weight"]


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_networks(wrap: Any) -> None:
    def net(outputs: int) -> nn.Module:
        return nn.Sequential(wrap(nn.Linear(8, 32)), nn.ReLU(), wrap(nn.Linear(32, outputs)))

    found = heads(Net(actor=net(4), critic=net(3)))
    assert [name.split(".")[:2] for name in found] == [["actor", "2"], ["critic", "2"]]


def test_networks_that_share_a_body() -> None:
    body = mlp(8, 32, 16)
    assert heads([nn.Sequential(body, nn.Linear(16, 4)), nn.Sequential(body, nn.Linear(16, 3))]) == [
        "0.1.weight",
        "1.1.weight",
    ]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: Net(model=model, metric=nn.Identity())])
def test_wrappers_hide_no_network(wrap: Any) -> None:
    found = heads(wrap(nn.ModuleDict({"actor": mlp(8, 32, 4), "critic": mlp(8, 32, 3)})))
    assert [name.split(".", 1)[1] for name in found] == ["actor.2.weight", "critic.2.weight"]


def test_a_decoder_beside_other_heads() -> None:
    """Its outputs are as wide as the encoder's inputs, but are read by nothing."""
    model = Net(encoder=mlp(64, 32, 8), decoder=mlp(8, 32, 64), kind=mlp(8, 16, 5))
    assert heads(model) == ["decoder.2.weight", "kind.2.weight"]


def test_a_predictor_reads_what_a_network_as_wide_makes() -> None:
    assert heads(Net(online=mlp(64, 32, 16), predictor=mlp(16, 32, 16))) == ["predictor.2.weight"]


def test_stages_named_after_networks_are_stages() -> None:
    model = Net(actor_features=mlp(8, 32, 16), actor=mlp(16, 32, 4), critic=mlp(8, 32, 3))
    assert heads(model) == ["actor.2.weight", "critic.2.weight"]


@pytest.mark.parametrize(("first", "second"), [("generator", "discriminator"), ("netG", "netD"), ("G", "D")])
def test_a_generator_is_known_by_its_name(first: str, second: str) -> None:
    for model in (
        {first: mlp(16, 32, 784), second: mlp(784, 32, 2)},
        {second: mlp(784, 32, 2), first: mlp(16, 32, 784)},
    ):
        assert set(heads(model)) == {f"{first}.2.weight", f"{second}.2.weight"}
        assert not route(model).warnings


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_networks_of_which_one_may_read_the_other(order: tuple[int, int]) -> None:
    nets = [mlp(16, 32, 784), mlp(784, 32, 2)]
    model = [nets[i] for i in order]
    maker = order.index(0)
    (warning,) = route(model).warnings
    assert f"{1 - maker}.0.weight may read its outputs; it is taken for an output head" in warning
    assert pasted(warning) == {f"{maker}.2.weight": "soap"}
    assert len(heads(model)) == 2
    settled = route(model, overrides=pasted(warning))
    assert not settled.warnings
    assert settled[f"{maker}.2.weight"].rule == "soap"


def test_blocks_in_a_list_before_their_head() -> None:
    assert heads([mlp(16, 32, 16), mlp(16, 32, 16), nn.Linear(16, 5)]) == ["2.weight"]


# Heads that are declared first.

BODY = {"fc1": (32, 64), "fc2": (64, 64), "fc3": (64, 64)}


def net(names: list[str], head: tuple[str, int], **renamed: str) -> nn.Module:
    layers = {renamed.get(name, name): nn.Linear(*BODY[name]) for name in names}
    return Net(**{head[0]: nn.Linear(64, head[1])}, **layers)


@pytest.mark.parametrize("width", [10, 64])
@pytest.mark.parametrize("names", [["fc1", "fc2", "fc3"], ["fc3", "fc2", "fc1"], ["fc2", "fc1", "fc3"]])
@pytest.mark.parametrize("head", ["out", "head", "classifier", "lm_head"])
def test_a_head_by_name_is_declared_first(head: str, names: list[str], width: int) -> None:
    model = net(names, (head, width))
    assert heads(model) == [f"{head}.weight"]
    assert not route(model).warnings


def test_a_head_without_a_name_is_declared_first() -> None:
    model = net(["fc1", "fc2", "fc3"], ("a", 10))
    assert heads(model) == ["a.weight"]
    (warning,) = route(model).warnings
    assert "fc3.weight is declared last, but a.weight may read its outputs; it is taken for a hidden matrix" in warning
    assert pasted(warning) == {"fc3.weight": "adamw"}
    with pytest.warns(UserWarning, match=r"fc3.weight is declared last"):
        for_model(model, "soap", lr=0.1)
    assert not route(model, overrides=pasted(warning)).warnings


@pytest.mark.parametrize("build", [lambda: nn.Linear(64, 10), lambda: mlp(64, 32, 10)])
def test_a_body_in_one_module_after_its_head(build: Any) -> None:
    model = Net(head=build(), body=mlp(32, 64, 64))
    assert not [name for name in heads(model) if name.startswith("body")]
    assert not route(model).warnings


@pytest.mark.parametrize("first", ["projection", "in_proj", "embedder"])
def test_what_is_declared_first_may_read_inputs_as_wide_as_the_outputs(first: str) -> None:
    model = Net(**{first: nn.Linear(64, 32)}, body=mlp(32, 48, 32), out=nn.Linear(32, 64))
    assert heads(model) == ["out.weight"]
    assert not route(model).warnings


def test_a_classifier_before_an_autoencoder() -> None:
    model = Net(classifier=mlp(64, 48, 10), encoder=mlp(64, 32, 8), decoder=mlp(8, 32, 64))
    assert heads(model) == ["classifier.2.weight", "decoder.2.weight"]
    assert not route(model).warnings


def test_a_policy_before_a_model_of_its_inputs() -> None:
    model = Net(policy=mlp(8, 32, 4), dynamics=mlp(12, 32, 8))
    assert heads(model) == ["policy.2.weight", "dynamics.2.weight"]
    assert not route(model).warnings


def test_an_output_beside_the_last_is_no_contradiction() -> None:
    model = Net(body=nn.Linear(8, 64), policy=nn.Linear(64, 5), next_state=nn.Linear(64, 64))
    assert heads(model) == ["policy.weight", "next_state.weight"]
    assert not route(model).warnings


def test_layers_of_one_width_end_where_they_are_declared_to_end() -> None:
    model = Net(fc1=nn.Linear(64, 64), fc2=nn.Linear(64, 64), fc3=nn.Linear(64, 64))
    assert heads(model) == ["fc3.weight"]
    assert not route(model).warnings


def test_attention_on_its_own_has_no_heads_but_the_last() -> None:
    class Attention(Net):
        pass

    attention = Attention(q=nn.Linear(64, 64), k=nn.Linear(64, 16), v=nn.Linear(64, 16), o=nn.Linear(64, 64))
    assert heads(attention) == ["o.weight"]


# Routers and experts that nothing is called.


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bare_router(transposed: bool) -> None:
    gate = torch.randn(16, 4) if transposed else torch.randn(4, 16)
    model = Net(block=Net(w_g=gate, w1=torch.randn(4, 24, 16), w2=torch.randn(4, 16, 24)), head=nn.Linear(16, 3))
    assert route(model)["block.w_g"].why == "router: its rows are the experts' logits"
    assert route(model)["block.w1"].layout == "4 experts of 24×16"


def test_a_shortcut_beside_a_convolution_is_no_router() -> None:
    block = Net(conv=nn.Conv1d(16, 32, 3), shortcut=nn.Linear(16, 32, bias=False))
    routing = route(Net(block=block, head=nn.Linear(32, 3)))
    assert routing["block.shortcut.weight"].rule == routing["block.conv.weight"].rule == "soap"


def test_a_classifier_of_as_many_classes_as_there_are_layers_is_no_router() -> None:
    model = Net(layers=nn.ModuleList(mlp(16, 32, 16) for _ in range(4)), head=nn.Linear(16, 4))
    assert route(model)["head.weight"].why == "output head: the last projection"


# Two blocks in one product.


def test_gates_and_inputs_in_one_product_are_two_matrices() -> None:
    gated = Net(up=nn.Linear(16, 48), down=nn.Linear(24, 16))
    plain = Net(up=nn.Linear(16, 48), down=nn.Linear(48, 16))
    squeezed = Net(up=nn.Linear(16, 48), middle=nn.Linear(48, 24), down=nn.Linear(24, 16))
    layouts = [route(Net(ff=ff, head=nn.Linear(16, 3)))["ff.up.weight"].layout for ff in (gated, plain, squeezed)]
    assert layouts == ["2 × 24×16", "48×16", "48×16"]


@pytest.mark.parametrize("numbers", ["0", "01"])
def test_numbered_layers_in_a_dict_are_a_list_of_them(numbers):
    """A stage of a pipeline keeps some of a model's layers under their numbers; none of their matrices is a head."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)

        def forward(self, x):
            return x + self.w2(self.w1(x) * self.w3(x))

    rows = route(nn.ModuleDict({"layers": nn.ModuleDict({number: Layer() for number in numbers})}), "soap").rows
    assert {row.rule for row in rows if row.name.endswith("weight")} == {"soap"}
