"""Lightning, installed, against plain loops; and its command line, which knows classes by their paths."""

import sys

import pytest
import torch
from plain import assert_same, examples, falling, host, model, optimizer_of, told, train

import steepest

lightning = host("lightning.pytorch")
log_diagnostics = host("steepest.integrations.lightning").LogDiagnostics
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.net = model(seed)

    def training_step(self, batch, _):
        return self.net(**batch)["loss"]

    def configure_optimizers(self):
        optimizer = optimizer_of(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling(optimizer), "interval": "step"}}


class Tuned(Module):
    """Its optimizer comes from the command line."""

    configure_optimizers = lightning.LightningModule.configure_optimizers


QUIET = {
    "accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def trainer(steps=6, **settings):
    return lightning.Trainer(max_steps=steps, **QUIET | settings)


def data(count=48):
    return torch.utils.data.DataLoader(examples(count), batch_size=4)


def plainly(**how):
    net = model()
    optimizer = optimizer_of(net)
    return train(net, optimizer, falling(optimizer), **how)


def test_it_trains_as_a_plain_loop_with_a_schedule():
    module = Module()
    trainer().fit(module, data())
    assert_same(module.net, plainly())


def test_clipping_and_accumulation():
    module = Module()
    trainer(accumulate_grad_batches=2, gradient_clip_val=0.1).fit(module, data())
    assert_same(module.net, plainly(accumulation=2, clip=0.1, in_groups=True))


def test_bfloat16():
    module = Module()
    trainer(precision="bf16-mixed").fit(module, data())
    assert_same(module.net, plainly(dtype=torch.bfloat16))


def test_routes_are_those_of_route():
    module = Module()
    made = trainer(2)
    made.fit(module, data())
    (optimizer,) = made.optimizers
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(module.net, "soap")}


def test_resumed_training_goes_on_bit_for_bit(tmp_path):
    whole, half, resumed = Module(), Module(), Module(seed=5)
    trainer(6).fit(whole, data(12))  # two epochs, since Lightning doesn't go on amid one
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=True)
    trainer(-1, max_epochs=1, callbacks=[saving], enable_checkpointing=True).fit(half, data(12))
    trainer(-1, max_epochs=2).fit(resumed, data(12), ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.net, whole.net)


def test_the_command_line_takes_a_class_by_its_path(monkeypatch, tmp_path):
    host("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        Tuned, trainer_defaults={"max_steps": 2, **QUIET}, run=False, save_config_callback=None,
        args=["--optimizer=steepest.integrations.ByShape", "--optimizer.lr=3e-3", "--optimizer.name=muon"],
    )  # fmt: skip
    cli.trainer.fit(cli.model, data())
    (optimizer,) = cli.trainer.optimizers
    rules = {p: group["rule"] for group in optimizer.param_groups for p in group["params"]}
    routes = {name: rules[p] for name, p in cli.model.net.named_parameters()}
    assert {name for name, rule in routes.items() if rule == "muon"} >= {"layers.0.1.weight", "layers.1.1.weight"}
    assert routes["head.weight"] == routes["layers.0.1.bias"] == "adamw"


class Logger(lightning.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logs = {}

    def log_metrics(self, metrics, step=None):
        self.logs[step] = metrics


def test_diagnostics_are_logged_when_it_is_time(readings):
    logger = Logger()
    trainer(logger=logger, accumulate_grad_batches=2, callbacks=[log_diagnostics(every=2)]).fit(Module(), data())
    assert len(readings) == 3
    expected = told(2, accumulation=2)
    assert list(expected) == [2, 4, 6]
    assert {step: metrics for step, metrics in logger.logs.items() if "optimizer/skipped" in metrics} == expected


class Adam(Module):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_there_is_nothing_to_log_of_others():
    with pytest.raises(TypeError, match="Adam has no diagnostics to log"):
        trainer(callbacks=[log_diagnostics()]).fit(Adam(), data())
