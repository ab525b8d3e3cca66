"""Parameters that others move, replace or change keep what is theirs, or start afresh."""

from itertools import permutations

import pytest
import torch
from changing import assert_same, of, optimizer, parameters, same, seeded, train

import steepest
from steepest.rules import RULES


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return request.param


def test_a_state_belongs_to_its_parameter_wherever_that_stands(rule):
    a, b = parameters(), parameters()
    opts = [optimizer([{"params": x[:3]}, {"params": x[3:]}], rule) for x in (a, b)]
    train(opts[0], a, 3)
    train(opts[1], b, 3)
    groups = opts[0].param_groups
    groups[0]["params"].reverse()
    groups[0]["params"].append(groups[1]["params"].pop(0))
    groups[1]["params"].insert(0, groups[0]["params"].pop(1))
    train(opts[0], a, 3, seed=1)
    train(opts[1], b, 3, seed=1)
    assert same(a, b)
    loaded = opts[0].state_dict()
    again = optimizer([{"params": g["params"]} for g in groups], rule)
    again.load_state_dict(loaded)
    train(again, a, 2, seed=2)
    train(opts[1], b, 2, seed=2)
    assert same(a, b)


def test_names_move_with_their_parameters():
    params = parameters()
    names = list("abcde")
    pairs = list(zip(names, params, strict=True))
    opt = steepest.SOAP([{"params": pairs[:2]}, {"params": pairs[2:]}], lr=0.1)
    opt.param_groups[0]["params"].reverse()
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())
    train(opt, params, 1)
    assert [g["param_names"] for g in opt.param_groups] == [["b"], ["c", "d", "e", "a"]]
    opt.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="parameter group 0 has 2 parameters, and names for others"):
        opt.step()


def test_names_move_with_their_parameters_where_groups_change_places_or_become_empty():
    params = parameters()
    pairs = list(zip("abcde", params, strict=True))
    opt = steepest.SOAP([{"params": pairs[:2]}, {"params": pairs[2:4]}, {"params": pairs[4:]}], lr=0.1)
    opt.param_groups[0]["params"].reverse()
    opt.param_groups.insert(0, opt.param_groups.pop(1))
    opt.param_groups[0]["params"].append(opt.param_groups[2]["params"].pop())
    train(opt, params, 1)
    assert [g["param_names"] for g in opt.param_groups] == [["c", "d", "e"], ["b", "a"], []]
    for key in ("params", "param_names"):
        opt.param_groups[2][key].append(opt.param_groups[0][key].pop())
    opt.param_groups[1]["params"].reverse()
    train(opt, params, 1)
    assert [g["param_names"] for g in opt.param_groups] == [["c", "d"], ["a", "b"], ["e"]]


@pytest.mark.parametrize("shape", [(6, 4), (9, 4), (4, 6)])
def test_a_parameter_that_is_replaced_starts_afresh_and_the_others_go_on(rule, shape):
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 4)
    old = params[0]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = optimizer(twins, rule)
    reference.load_state_dict(opt.state_dict())
    params[0] = opt.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(shape))
    fresh = torch.nn.Parameter(torch.ones(shape))
    alone = optimizer([fresh], rule)
    train(opt, params, 3, seed=1)
    for step in range(3):
        for i, p in enumerate([fresh, *twins[1:]]):
            p.grad = torch.randn(p.shape, generator=seeded(100 + 10 * step + i))
        alone.step()
        reference.step()
    assert_same(params, [fresh, *twins[1:]])
    assert old not in opt.state
    assert opt.state_dict()["state"].keys() == set(range(len(params)))


@pytest.mark.parametrize("moves", [True, False])
def test_a_parameter_that_grows_in_place_starts_afresh(rule, moves):
    """As code that grows, prunes or replaces layers does it, with the old state moved along or not."""
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 4)
    if moves:
        new = torch.nn.Parameter(torch.ones(9, 4))
        opt.state[new] = opt.state.pop(params[0])
        params[0] = opt.param_groups[0]["params"][0] = new
    else:
        params[0].data = torch.ones(9, 4)
        params[0].grad = None
    fresh = torch.nn.Parameter(torch.ones(9, 4))
    alone = optimizer([fresh], rule)
    train(opt, params, 3, seed=1)
    train(alone, [fresh], 3, seed=1)
    assert_same(params[:1], [fresh])


def test_entries_of_the_new_shape_are_used_when_a_parameter_grows():
    """As densification of Gaussian splats does it under Adam: moments of new rows are zero, the count goes on."""
    ours, theirs = ([torch.nn.Parameter(torch.randn(6, 4, generator=seeded(0)))] for _ in range(2))
    opts = [optimizer(ours, "adamw"), torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)]
    for opt, params in zip(opts, (ours, theirs), strict=True):
        train(opt, params, 3)
        new = torch.nn.Parameter(torch.cat([params[0].detach(), torch.zeros(2, 4)]))
        entries = opt.state.pop(params[0])
        for name in ("exp_avg", "exp_avg_sq"):
            entries[name] = torch.cat([entries[name], torch.zeros(2, 4)])
        opt.state[new] = entries
        params[0] = opt.param_groups[0]["params"][0] = new
        train(opt, params, 3, seed=1)
    assert_same(ours, theirs)


def test_a_gradient_of_the_old_shape_is_refused():
    params = parameters()
    opt = optimizer(params, "adamw")
    train(opt, params, 2)
    params[0].data = torch.randn(256, 512)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 has shape \[256, 512\], and its gradient \[6, 4\]"):
        opt.step()


@pytest.mark.parametrize(("start", "then"), list(permutations([torch.float32, torch.bfloat16, torch.float64], 2)))
def test_state_follows_the_dtype_of_the_weights(rule, start, then):
    params = parameters(start)
    opt = optimizer(params, rule, weight_decay=0.0)
    train(opt, params, 3)
    for p in params:
        p.data = p.data.to(then)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = optimizer(twins, rule)
    train(fresh, twins, 1)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, params, 1, seed=1)
    formats = [{name: x.dtype for name, x in opt.state[p].items()} for p in params]
    assert formats == [{name: x.dtype for name, x in fresh.state[p].items()} for p in twins]
    other = optimizer([torch.nn.Parameter(p.detach().clone()) for p in params], rule)
    other.load_state_dict(opt.state_dict())
    before = of(params)
    train(opt, params, 1, seed=2)
    assert same(before, params)


def test_parameters_may_be_added_and_removed_by_hand(rule):
    params = parameters()
    opt = optimizer(params[:3], rule)
    train(opt, params[:3], 2)
    opt.param_groups[0]["params"] += params[3:]
    del opt.param_groups[0]["params"][1]
    left = [params[i] for i in (0, 2, 3, 4)]
    train(opt, left, 2)
    assert opt.state.keys() == set(left)
    opt.param_groups[0]["params"].append(params[0])
    with pytest.raises(ValueError, match="parameter 4 of group 0 is in the parameter groups twice"):
        opt.step()


def test_names_that_differ_by_a_prefix_of_wrappers_are_told_apart():
    """A model may have a submodule called "module" beside others, as DDP's wrapper is called."""

    def build():
        params = parameters(shapes=[(6, 4), (6, 4)])
        return params, steepest.SOAP(list(zip(["module.proj", "proj"], params, strict=True)), lr=0.1)

    a, opt = build()
    train(opt, a, 3)
    b, resumed = build()
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    saved = opt.state_dict()
    saved["param_groups"][0]["params"].reverse()
    saved["param_groups"][0]["param_names"].reverse()
    resumed.load_state_dict(saved)
    train(opt, a, 3, seed=1)
    train(resumed, b, 3, seed=1)
    assert same(a, b)
    wrapped = steepest.SOAP(list(zip(["module.module.proj", "module.proj"], b, strict=True)), lr=0.1)
    wrapped.load_state_dict(saved)
    assert torch.equal(wrapped.state[b[0]]["exp_avg"], saved["state"][0]["exp_avg"])
