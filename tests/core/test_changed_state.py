"""What others write to ``optimizer.state`` is used as torch.optim would use it, or refused by name."""

import copy
from collections import defaultdict

import pytest
import torch
from changing import assert_same, everything, of, optimizer, parameters, same, seeded, train

from steepest.rules import RULES


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return request.param


def test_an_entry_that_is_replaced_counts_and_is_saved(rule):
    a, b = parameters(), parameters()
    opts = [optimizer(a, rule), optimizer(b, rule)]
    train(opts[0], a, 3)
    train(opts[1], b, 3)
    name = next(n for n in opts[0].state[a[0]] if n.startswith(("exp_avg", "momentum")))
    opts[0].state[a[0]][name] = torch.full((6, 4), 0.5, dtype=torch.float64)  # of another dtype
    opts[1].state[b[0]][name].fill_(0.5)
    saved = opts[0].state_dict()["state"][0][name]
    assert saved.dtype == torch.float32
    assert (saved == 0.5).all()
    train(opts[0], a, 3, seed=1)
    train(opts[1], b, 3, seed=1)
    assert same(a, b)
    assert torch.equal(opts[0].state[a[0]][name], opts[0].state_dict()["state"][0][name])


def clear(opt, p):
    opt.state[p].clear()


def delete(opt, p):
    del opt.state[p]


def replace_dict(opt, p):
    opt.state[p] = {}


def delete_entries(opt, p):
    for name in list(opt.state[p]):
        del opt.state[p][name]


@pytest.mark.parametrize("reset", [clear, delete, replace_dict, delete_entries])
def test_a_parameter_whose_state_is_deleted_starts_afresh(rule, reset):
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 4)
    reset(opt, params[1])
    others = [p for p in params if p is not params[1]]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    kept = optimizer([p for i, p in enumerate(twins) if i != 1], rule)
    for p, twin in zip(others, [t for i, t in enumerate(twins) if i != 1], strict=True):
        for name, x in opt.state[p].items():
            kept.state[twin][name].copy_(x)
    fresh = optimizer([twins[1]], rule)
    train(opt, params, 3, seed=1)
    for step in range(3):
        for i, p in enumerate(twins):
            p.grad = torch.randn(p.shape, generator=seeded(100 + 10 * step + i))
        kept.step()
        fresh.step()
    assert_same(params, twins)


@pytest.mark.parametrize("reset", ["clear", "defaultdict", "dict"])
def test_all_state_that_is_deleted_starts_afresh(rule, reset):
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 4)
    if reset == "clear":
        opt.state.clear()
    else:
        opt.state = defaultdict(dict) if reset == "defaultdict" else {}
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = optimizer(twins, rule)
    train(opt, params, 3, seed=1)
    train(fresh, twins, 3, seed=1)
    assert same(params, twins)
    mine, theirs = opt.state_dict()["state"], fresh.state_dict()["state"]
    assert all(torch.equal(x, theirs[key][name]) for key, entries in mine.items() for name, x in entries.items())


def test_states_that_are_swapped_are_swapped(rule):
    a, b = parameters(), parameters()
    opts = [optimizer(a, rule), optimizer(b, rule)]
    train(opts[0], a, 3)
    train(opts[1], b, 3)
    opts[0].state[a[0]], opts[0].state[a[1]] = opts[0].state[a[1]], opts[0].state[a[0]]
    for name, x in opts[1].state[b[0]].items():
        y = opts[1].state[b[1]][name]
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)
    train(opts[0], a, 3, seed=1)
    train(opts[1], b, 3, seed=1)
    assert same(a, b)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", torch.zeros(4, 6), r"parameter 0 of group 0: 'exp_avg' was set with shape \[4, 6\], and has"),
        ("exp_avg", "zero", r"parameter 0 of group 0: 'exp_avg' was set as a str"),
        ("exp_avg", torch.zeros(6, 4, dtype=torch.int64), "which can't be copied"),
        ("step", torch.tensor(-1.0), "must be a count of updates"),
        ("clock", torch.tensor(2.5), "must be a count of updates"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_and_nothing_moves(name, value, message):
    params = parameters()
    opt = optimizer(params, "soap")
    train(opt, params, 2)
    before = everything(opt, params)
    entry = opt.state[params[0]][name]
    opt.state[params[0]][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opt.step()
        with pytest.raises(ValueError, match=message):
            opt.state_dict()
    opt.state[params[0]][name] = entry
    assert same(before[0], of(params))
    train(opt, params, 2)


def test_tensors_that_others_hold_keep_what_they_show(rule):
    """Whoever keeps a state, deletes it, and puts it back, goes on from there."""
    a, b = parameters(), parameters()
    opts = [optimizer(a, rule), optimizer(b, rule)]
    for opt, params in zip(opts, (a, b), strict=True):
        train(opt, params, 3)
    kept, weights = dict(opts[0].state[a[0]]), of(a)
    opts[0].state[a[0]].clear()
    train(opts[0], a, 2, seed=5)
    opts[0].state[a[0]] = kept
    others = opts[1].state_dict()["state"]
    for i, p in enumerate(a[1:], start=1):
        for name, x in opts[0].state[p].items():
            x.copy_(others[i][name])
    with torch.no_grad():
        for p, W in zip(a, weights, strict=True):
            p.copy_(W)
    for opt, params in zip(opts, (a, b), strict=True):
        train(opt, params, 3, seed=1)
    assert same(a, b)


def test_no_graph_gets_into_the_state():
    params = parameters()
    opt = optimizer(params, "soap")
    opt.state[params[0]]["exp_avg"] = params[0] * 2
    opt.state_dict()
    assert not opt.state[params[0]]["exp_avg"].requires_grad
    params[1].data = params[1].data.double()
    opt.state[params[1]]["exp_avg"] = params[1] * 2
    opt.state_dict()
    assert not opt.state[params[1]]["exp_avg"].requires_grad


def test_an_entry_that_is_renamed_in_place_is_missing(rule):
    """All values are as they were then, in the same order."""
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 3)
    entries = opt.state[params[0]]
    last = list(entries)[-1]
    kept = entries.pop(last)
    entries["mine"] = kept
    fresh = optimizer(parameters(), rule)
    saved, anew = opt.state_dict()["state"][0], fresh.state_dict()["state"][0]
    assert torch.equal(saved[last], anew[last])
    assert torch.equal(saved["mine"], kept)


def test_loading_replaces_what_others_have_put_there(rule):
    """As torch's loading does."""
    params = parameters()
    opt = optimizer(params, rule)
    train(opt, params, 1)
    saved = opt.state_dict()
    opt.state[params[0]]["note"] = "text"
    opt.state["rounds"] = 3
    opt.load_state_dict(saved)
    assert "note" not in opt.state[params[0]]
    assert "rounds" not in opt.state


def test_a_count_may_be_set_as_a_number():
    params = parameters()
    opt = optimizer(params, "soap")
    train(opt, params, 2)
    opt.state[params[0]]["step"] = 7
    assert opt.state_dict()["state"][0]["step"] == 7


def test_a_number_keeps_all_its_digits():
    opt = optimizer([torch.nn.Parameter(torch.ones(1, dtype=torch.float64))], "adamw")
    ((p, entries),) = opt.state.items()
    entries["exp_avg"] = 0.1
    assert opt.state_dict()["state"][0]["exp_avg"] == 0.1
    assert opt.state[p]["exp_avg"] == 0.1


@pytest.mark.parametrize("resizes", [False, True])
def test_an_entry_may_require_a_gradient(resizes):
    params = parameters()
    opt = optimizer(params, "soap")
    shape = (9, 4) if resizes else (6, 4)
    params[0].data = torch.zeros(shape)
    opt.state[params[0]]["exp_avg"] = torch.ones(shape, requires_grad=True)
    opt.state[params[0]]["exp_avg_sq"] = torch.ones(shape)
    saved = opt.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(saved, torch.ones(shape))
    assert not opt.state[params[0]]["exp_avg"].requires_grad


@pytest.mark.parametrize("rule", ["adamw", "soap"])
@pytest.mark.parametrize("how", ["file", "copy", "order"])
def test_what_others_put_beside_a_frozen_parameter_gives_it_no_state(rule, how):
    params = parameters()
    params[1].requires_grad_(False)
    opt = optimizer(params, rule)
    opt.state[params[1]]["note"] = "text"
    if how == "file":
        saved = opt.state_dict()
        opt = optimizer(params, rule)
        opt.load_state_dict(saved)
    elif how == "copy":
        opt, params = copy.deepcopy((opt, params))
    else:
        opt.param_groups[0]["params"].reverse()
    assert opt.state_dict()["state"][3 if how == "order" else 1] == {"note": "text"}
    params[1].requires_grad_(True)
    train(opt, params, 1)
    assert opt.state[params[1]].keys() == opt.state[params[0]].keys() | {"note"}


def test_entries_of_others_are_kept_saved_loaded_and_ignored(rule):
    a, b = parameters(), parameters()
    opts = [optimizer(a, rule), optimizer(b, rule)]
    opts[0].state[a[0]]["slow"] = torch.ones(3)
    opts[0].state[a[0]]["note"] = "text"
    opts[0].state[a[3]]["count"] = 0
    opts[0].state["rounds"] = {"done": 3}
    for step in range(3):
        train(opts[0], a, 1, seed=step)
        train(opts[1], b, 1, seed=step)
        opts[0].state[a[3]]["count"] += 1
    assert same(a, b)
    saved = opts[0].state_dict()
    loaded = optimizer(b, rule)
    loaded.load_state_dict(saved)
    for opt, params in [(loaded, b), (copy.deepcopy(opts[0]), None)]:
        params = params or opt.param_groups[0]["params"]
        assert torch.equal(opt.state[params[0]]["slow"], torch.ones(3))
        assert opt.state[params[0]]["note"] == "text"
        assert opt.state[params[3]]["count"] == 3
        assert opt.state["rounds"] == {"done": 3}
    loaded.state[b[0]]["slow"].zero_()
    assert saved["state"][0]["slow"].sum() == 3
    train(opts[0], a, 2, seed=9)
    train(loaded, b, 2, seed=9)
    assert same(a, b)
