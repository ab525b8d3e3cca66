"""timm, installed: its factory makes our optimizers by name."""

import pytest
import torch
from plain import host

import steepest
from steepest.integrations import ByShape

timm, optim, scheduler = host("timm", "timm.optim", "timm.scheduler")
names = host("steepest.integrations.timm")
pytestmark = pytest.mark.filterwarnings("ignore")


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )


def step(net, optimizer, schedule=None, steps=6, *, accumulation=1, clip=None, dtype=None):
    torch.manual_seed(1)
    for number in range(steps):
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net(torch.randn(4, 3, 32, 32)).square().mean()
            (loss / accumulation).backward()
        if clip is not None:
            clip(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step_update(number + 1)
    return net


def rules(net, optimizer):
    of = {p: group["rule"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in net.named_parameters()}


@pytest.mark.parametrize("ours", sorted(names.REGISTERED))
def test_every_name_makes_its_optimizer(ours):
    net = vit()
    optimizer = optim.create_optimizer_v2(net, opt=names.REGISTERED[ours], lr=1e-3, weight_decay=0.05)
    step(net, optimizer, steps=1)
    assert optimizer.param_groups[0]["rule"] in {steepest.optimizers.NAMES[ours].rule, "adamw"}


def test_names_of_timm_stay_its_own():
    assert optim.get_optimizer_class("muon", bind_defaults=False).__module__.startswith("timm")
    assert names.REGISTERED["muon"] == "steepestmuon"
    assert names.register() == names.REGISTERED  # once more changes nothing


class Falling:
    """A schedule, written plainly."""

    def __init__(self, optimizer):
        self.groups = [(group, group["lr"]) for group in optimizer.param_groups]
        self.step_update(0)

    def step_update(self, number):
        for group, lr in self.groups:
            group["lr"] = lr * 0.5 ** (number // 2)


@pytest.mark.parametrize("how", [{}, {"accumulation": 2}, {"dtype": torch.bfloat16}, {"clipped": True}])
def test_weights_are_those_of_a_plain_loop(how):
    net, other = vit(), vit()
    how, clipped = {key: x for key, x in how.items() if key != "clipped"}, "clipped" in how
    optimizer = optim.create_optimizer_v2(net, opt="soap", lr=3e-3, weight_decay=0.05)
    schedule = scheduler.StepLRScheduler(optimizer, decay_t=2, decay_rate=0.5, t_in_epochs=False)
    step(net, optimizer, schedule, clip=timm.utils.dispatch_clip_grad if clipped else None, **how)
    table = {"pos_embed": {"weight_decay": 0.0}}  # which timm exempts
    optimizer = steepest.for_model(other, "soap", lr=3e-3, weight_decay=0.05, overrides=table)
    step(other, optimizer, Falling(optimizer), clip=torch.nn.utils.clip_grad_norm_ if clipped else None, **how)
    mine, theirs = net.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(net.head.weight, vit().head.weight)


def test_routes_are_those_of_route():
    net = vit()
    optimizer = optim.create_optimizer_v2(net, opt="soap", lr=3e-3, weight_decay=0.05)
    assert rules(net, optimizer) == {row.name: row.rule for row in steepest.route(net, "soap")}


def test_a_fallback_list_is_heeded():
    net = vit()
    optimizer = optim.create_optimizer_v2(net, opt="soap", lr=3e-3, weight_decay=0.05, fallback_list=["*.qkv.weight"])
    assert rules(net, optimizer)["blocks.0.attn.qkv.weight"] == "adamw"
    assert rules(net, optimizer)["blocks.0.attn.proj.weight"] == "soap"


def test_layer_decay_is_that_of_other_optimizers_of_timm():
    rates = []
    for opt in ("adamw", "soap"):
        net = vit()
        optimizer = optim.create_optimizer_v2(net, opt=opt, lr=1e-3, weight_decay=0.05, layer_decay=0.5)
        schedule = scheduler.CosineLRScheduler(
            optimizer, t_initial=10, warmup_t=2, warmup_lr_init=1e-5, t_in_epochs=False
        )
        step(net, optimizer, schedule, steps=3)
        of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.append({name: of[p] for name, p in net.named_parameters()})
    assert rates[0] == rates[1]
    assert len(set(rates[0].values())) > 2


def test_resumed_training_goes_on_bit_for_bit():
    whole, resumed = vit(), vit()
    first, second = (optim.create_optimizer_v2(net, opt="klsoap", lr=3e-3) for net in (whole, resumed))
    step(whole, first)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    step(whole, first)
    step(resumed, second)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_lookahead_wraps_it():
    net = vit()
    optimizer = optim.create_optimizer_v2(net, opt="lookahead_soap", lr=3e-3)
    assert {type(inner) for inner in vars(optimizer).values() if isinstance(inner, torch.optim.Optimizer)} == {ByShape}
    step(net, optimizer)
