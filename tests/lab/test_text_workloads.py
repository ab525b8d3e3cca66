"""Workloads on text beside the default one: the recurrent network, and a GPT that is adapted to other text."""

from __future__ import annotations

import pytest
import torch
from short_training import loss_after

import steepest
from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads import cache, lora
from steepest.lab.workloads.cache import folder
from steepest.lab.workloads.workload import load_workload


def test_the_gates_of_the_lstm_are_four_matrices(loaded) -> None:
    table = steepest.route(loaded("lstm").model())
    for name, shape in (("lstm.weight_ih_l0", "4 × 96×32"), ("lstm.weight_hh_l0", "4 × 96×96")):
        assert f"{name}  {shape} (i, f, g, o)" in str(table)
        assert table[name].rule == table.rule
    assert table["head.weight"].rule == table["embedding.weight"].rule == "adamw"


def test_layers_of_the_lstm() -> None:
    model = load_workload("lstm(width=8, depth=2)").model()
    assert model.lstm.weight_hh_l1.shape == (32, 8)


def test_the_lstm_sees_no_future(loaded) -> None:
    model, symbols = loaded("lstm").model(), torch.arange(64)[None]
    changed = symbols.clone()
    changed[0, 40] = 0
    before, after = model(symbols), model(changed)
    assert torch.equal(before[0, :40], after[0, :40])
    assert not torch.equal(before[0, 40:], after[0, 40:])


def test_an_adapted_model_starts_as_its_base(loaded) -> None:
    workload = loaded("lora")
    base = workload.source.model()
    base.load_state_dict(workload.base)
    symbols = workload.held_out[0][0][:2]
    assert torch.equal(workload.model()(symbols), base(symbols))


def test_only_adaptations_are_trained(loaded) -> None:
    model = loaded("lora").model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in trained)
    assert len(trained) == 2 * 2 * len(lora.ADAPTED)
    assert sum(p.numel() for p in trained.values()) == 18_432
    assert {row.rule for row in steepest.route(model) if row.name in trained} == {"soap"}


@pytest.mark.parametrize(
    "contender", ["soap-f5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "muon"))]
)
def test_gradients_that_are_zero_at_first_do_no_harm(loaded, contender) -> None:
    """While B is zero, so is the gradient of A."""
    before, after = loss_after(loaded("lora"), 8, contender)
    assert after < before


def test_training_and_validation_are_other_topics() -> None:
    train, validation = lora.prose()
    assert 8 < len(train) / len(validation) < 20
    assert validation[:200] not in train


def test_the_base_is_trained_once(loaded, tmp_path, monkeypatch) -> None:
    source = loaded("lora").source  # whose base is in another folder
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "cache")
    torch.manual_seed(1)  # no state that training could leave behind
    state = torch.get_rng_state()
    first = lora.cached_base(source)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".pt"]
    monkeypatch.setattr(lora, "pretrained", None)  # a call would fail
    again = lora.cached_base(source)
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert again.keys() == source.model().state_dict().keys()


def test_another_base_has_another_file(loaded, monkeypatch, tmp_path) -> None:
    source = loaded("lora").source
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(lora, "pretrained", lambda source: {"width": torch.tensor(source.width)})
    bases = [lora.cached_base(source)["width"].item()]
    bases.append(lora.cached_base(load_workload("stdlib(scale=0.5)"))["width"].item())
    monkeypatch.setattr(lora, "BASE_STEPS", 2)
    lora.cached_base(source)
    assert bases == [64, 32]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cache_that_cannot_be_written_to_gets_one_clear_line(loaded, tmp_path, monkeypatch) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    source = loaded("lora").source
    monkeypatch.setattr(cache, "folder", lambda: occupied / "steepest")
    with pytest.raises(BadInput, match=r"can't write to .*steepest: .*; set XDG_CACHE_HOME to another folder"):
        lora.cached_base(source)


def test_the_cache_is_where_users_say(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "steepest"


def test_the_lstm_learns(loaded) -> None:
    before, after = loss_after(loaded("lstm"), 25, "soap-f5")
    assert after < before - 1
