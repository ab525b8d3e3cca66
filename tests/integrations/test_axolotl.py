"""The plugin for Axolotl: beside Axolotl where it is installed, or beside a stand-in by its documentation.

The stand-in trainer does what those of Axolotl 0.18 to 0.21 do: it takes a factory from
``optimizer_cls_and_kwargs``, which plugins may set in ``post_trainer_create``, and calls it with the model, the
training arguments and the settings.
"""

import pytest
import torch
from plain import assert_same, assert_same_state, beside, examples, falling, host, model, optimizer_of, train

import steepest

RATES = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")
CONFIG = {"learning_rate": 3e-3, "weight_decay": 0.1, "optim_args": {"name": "soap", "elementwise": {"lr": 1e-3}}}


class Config(dict):
    """A configuration in which what isn't set is None, as Axolotl's."""

    def __missing__(self, key):
        return None

    __getattr__ = dict.__getitem__


class Trainer:
    def __init__(self, net):
        self.model, self.args, self.optimizer_cls_and_kwargs = net, object(), None

    def create_optimizer(self):
        factory, kwargs = self.optimizer_cls_and_kwargs
        return factory()(self.model, self.args, **kwargs)


@pytest.fixture(scope="module")
def plugin():
    with beside("axolotl", "axolotl.integrations.base", BasePlugin=object) as module:
        yield module.Plugin()


def created(plugin, net, **config):
    trainer = Trainer(net)
    plugin.post_trainer_create(Config(CONFIG | config), trainer)
    return trainer.create_optimizer()


def named(name):
    return {"optim_args": CONFIG["optim_args"] | {"name": name}}


@pytest.mark.parametrize("name", ["soap", "muon", "adamw"])
def test_it_trains_as_a_plain_loop(plugin, name):
    net, other = model(), model()
    optimizer, alone = created(plugin, net, **named(name)), optimizer_of(other, name)
    train(net, optimizer, falling(optimizer), clip=0.1)
    assert_same(net, train(other, alone, falling(alone), clip=0.1))


def test_resumed_training_goes_on_bit_for_bit(plugin):
    whole, resumed = model(), model(seed=5)
    first, second = created(plugin, whole), created(plugin, resumed)
    train(whole, first)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    assert_same(train(whole, first), train(resumed, second))
    assert_same_state(first, second)


def test_routes_are_those_of_route_and_adams_settings_go_to_adam(plugin):
    net = model()
    optimizer = created(plugin, net, **named("muon"), adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(net, "muon")}
    adams = {(group["betas"], group["eps"]) for group in optimizer.param_groups if group["rule"] == "adamw"}
    assert adams == {((0.8, 0.9), 1e-6)}


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"learning_rate": None}, TypeError, "learning_rate is missing"),
        ({"learning_rate": "much"}, ValueError, "lr='much': must be a finite number >= 0"),
        ({"optim_args": "name=soap"}, TypeError, "optim_args='name=soap': must be a mapping, such as {name: soap}"),
        ({"optim_args": {"name": "adafactor"}}, ValueError, "name='adafactor': no such rule; there are soap, kl-soap"),
        ({"optim_args": {"name": 3}}, TypeError, "name=3: must be the name of an optimizer"),
        ({"optim_args": {"solvr": "qr"}}, ValueError, "solvr='qr': soap has no such option .did you mean 'solver'"),
        ({"lr_groups": [{"lr": 1}]}, ValueError, "lr_groups=.* not supported; give rates in optim_args"),
        ({"adam_beta2": 0.9}, ValueError, "adam_beta1=None, adam_beta2=0.9: give both, or neither"),
    ],
)
def test_bad_settings_are_named_before_there_is_an_optimizer(plugin, config, error, said):
    trainer = Trainer(model())
    with pytest.raises(error, match=said):
        plugin.post_trainer_create(Config(CONFIG | config), trainer)
    assert trainer.optimizer_cls_and_kwargs is None


def test_an_optimizer_of_axolotl_is_no_silent_loser(plugin):
    trainer = Trainer(model())
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {})
    with pytest.raises(ValueError, match="optimizer='muon' is one of Axolotl's own: leave it out, or this plugin"):
        plugin.post_trainer_create(Config(CONFIG | {"optimizer": "muon"}), trainer)


@pytest.mark.filterwarnings("ignore")
def test_trainers_of_axolotl(tmp_path):
    """Axolotl's own trainer, with the plugin in its list, against a plain loop, whole and resumed halfway."""
    mixins, base, dicts = host(
        "axolotl.core.trainers.mixins.optimizer", "axolotl.integrations.base", "axolotl.utils.dict"
    )
    transformers = host("transformers")

    class InOrder(mixins.OptimizerMixin, transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    manager = base.PluginManager.get_instance()
    manager.register("steepest.integrations.axolotl.Plugin")
    where = {}
    for resumed in (False, True):
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=6, lr_scheduler_type="linear", max_grad_norm=0.1,
            report_to=[], logging_strategy="no", save_steps=3, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        for absent in RATES:
            setattr(arguments, absent, None)
        trainer = InOrder(model(seed=5 * resumed), arguments, train_dataset=examples())
        manager.post_trainer_create(dicts.DictDefault(CONFIG), trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resumed else None)
        where[resumed] = trainer.model
    net = model()
    optimizer = optimizer_of(net)
    scheduler = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=6)
    train(net, optimizer, scheduler, clip=0.1)
    assert_same(where[False], net)
    assert_same(where[True], net)
