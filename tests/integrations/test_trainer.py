"""The Trainer of transformers, installed, against plain loops."""

import logging

import pytest
import torch
from plain import (
    OPTIONS,
    assert_same,
    assert_same_state,
    examples,
    falling,
    host,
    model,
    optimizer_of,
    told,
    train,
)

import steepest
from steepest.integrations import TrainerFactory
from steepest.integrations.transformers import LogDiagnostics

transformers, _ = host("transformers.trainer", "accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {
    "per_device_train_batch_size": 4, "max_steps": 6, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "report_to": [], "logging_strategy": "no", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(net, where, settings=None, **kwargs):
    arguments = transformers.TrainingArguments(str(where), **SETTINGS | (settings or {}))
    return InOrder(net, arguments, train_dataset=examples(), **kwargs)


def with_factory(net, where, name="soap", options=OPTIONS, **settings):
    return trainer(net, where, settings, optimizer_cls_and_kwargs=(TrainerFactory, {"name": name, **options}))


@pytest.mark.parametrize("name", ["soap", "muon", "adamw"])
def test_a_factory_trains_as_a_plain_loop(name, tmp_path):
    made = with_factory(model(), tmp_path, name)
    made.train()
    net = model()
    assert_same(made.model, train(net, optimizer_of(net, name)))


def test_clipping_accumulation_and_a_schedule(tmp_path):
    made = with_factory(
        model(), tmp_path, max_grad_norm=0.1, gradient_accumulation_steps=2, lr_scheduler_type="linear", warmup_steps=2
    )
    made.train()
    net = model()
    optimizer = optimizer_of(net)
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=6)
    assert_same(made.model, train(net, optimizer, scheduler, accumulation=2, clip=0.1))


def test_bfloat16(tmp_path):
    made = with_factory(model(), tmp_path, bf16=True)
    made.train()
    net = model()
    assert_same(made.model, train(net, optimizer_of(net), dtype=torch.bfloat16))


def test_a_pair_of_optimizer_and_scheduler(tmp_path):
    net, other = model(), model()
    optimizer, theirs = optimizer_of(net), optimizer_of(other)
    trainer(net, tmp_path, optimizers=(optimizer, falling(optimizer))).train()
    assert_same(net, train(other, theirs, falling(theirs)))


def test_resumed_training_goes_on_bit_for_bit(tmp_path):
    settings = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    whole = with_factory(model(), tmp_path / "whole", **settings)
    whole.train()
    resumed = with_factory(model(seed=5), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same(whole.model, resumed.model)
    assert_same_state(whole.optimizer, resumed.optimizer)


def test_routes_are_logged_and_those_of_route(tmp_path, caplog):
    caplog.set_level(logging.INFO, "steepest.integrations")
    made = with_factory(model(), tmp_path, options={"lr": "3e-3", "betas": "[0.8, 0.9]", "stagger": "True"})
    optimizer = made.create_optimizer()
    table = repr(steepest.route(made.model, "soap"))
    assert caplog.messages == [f"TrainerFactory: soap\n{table}"]
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(made.model, "soap")}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def test_a_rate_that_is_missing_is_named(tmp_path):
    with pytest.raises(TypeError, match="the learning rate is missing"):
        with_factory(model(), tmp_path, options={}).create_optimizer()


def test_a_class_is_warned_of(tmp_path):
    net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9000, 8), "up": torch.nn.Linear(8, 8)})
    net["norm"] = torch.nn.LayerNorm(8)
    made = trainer(net, tmp_path, optimizer_cls_and_kwargs=(steepest.Muon, {"lr": 1e-3}))
    with pytest.warns(UserWarning, match=r"\[9000, 8\].* go to muon as matrices.*steepest.for_model"):
        made.create_optimizer()


def test_diagnostics_are_logged_when_it_is_time(tmp_path, readings):
    net = model()
    optimizer = optimizer_of(net)
    made = trainer(net, tmp_path, {"gradient_accumulation_steps": 2}, optimizers=(optimizer, falling(optimizer)))
    made.add_callback(LogDiagnostics(made, every=2))
    made.train()
    assert len(readings) == 3
    logs = {entry["step"]: entry for entry in made.state.log_history if "optimizer/skipped" in entry}
    expected = told(2, accumulation=2)
    assert list(logs) == list(expected) == [2, 4, 6]
    assert "soap/update_rms" in expected[4]
    for step, entry in expected.items():
        assert {key: x for key, x in logs[step].items() if "/" in key} == entry


def test_there_is_nothing_to_log_of_others(tmp_path):
    made = trainer(model(), tmp_path)
    made.add_callback(LogDiagnostics(made))
    with pytest.raises(TypeError, match="AdamW has no diagnostics to log"):
        made.train()
