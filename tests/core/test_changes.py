"""What others write to ``param_groups`` and ``state`` is used as torch.optim would use it, or refused by name."""

import copy
from collections import defaultdict
from itertools import permutations

import pytest
import torch

import steepest
from steepest.engine.optimizer import Optimizer
from steepest.rules import RULES

SHAPES = [(6, 4), (6, 4), (4, 6), (5,), (3, 2, 2)]
MATRIX_RULES = [name for name in RULES if name not in ("adamw", "lion")]


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(s, generator=seeded(i)).to(dtype)) for i, s in enumerate(shapes)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def optimizer(params, rule, **options):
    return Optimizer(params, rule=rule, **{"lr": 0.05, "weight_decay": 0.1} | options)


def train(opt, params, steps, seed=0):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=seeded(100 * seed + 10 * step + i)).to(p.dtype)
        opt.step()


def of(params):
    return [p.detach().clone() for p in params]


def everything(opt, params):
    """Weights, the state of each parameter, and the options, as copies."""
    return copy.deepcopy(([p.detach() for p in params], [dict(opt.state[p]) for p in params], opt.param_groups))


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def assert_same(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return request.param


# State.


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


# Parameters.


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


# Options.


@pytest.mark.parametrize("name", sorted(set(MATRIX_RULES)))
def test_options_that_are_no_layout_count_from_the_next_step_on(name):
    params = parameters()
    opt = optimizer(params, name)
    train(opt, params, 2)
    before = of(params)
    opt.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(opt, params, 1)
    assert same(before, params)


VIEWS = ("block_size", "heads", "split", "transpose", "merge_dims")
LAYOUTS = {
    "max_precond_dim": 2,
    "precondition_1d": True,
    "graft": "none",
    "axis": "columns",
    "inner": "rmsprop",
    "rank_fraction": 0.9,
    "amsgrad": True,
    "moment_dtype": "int8",
    "block_size": 3,
    "heads": 2,
    "split": (2, 4),
    "transpose": True,
    "merge_dims": False,
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, rule in RULES.items()
        for option in (*rule.layout_options(), *(VIEWS if name in MATRIX_RULES else ()))
        if option != "basis_dtype"
    ],
)
def test_a_change_of_layout_is_refused_by_name_before_anything_moves(name, option):
    params = parameters(shapes=[(6, 4), (4, 3, 2) if option == "merge_dims" else (6, 8), (5,)])
    opt = optimizer(params, name)
    train(opt, params, 2)
    before = everything(opt, params)
    old = opt.param_groups[0][option]
    opt.param_groups[0][option] = LAYOUTS[option]
    for act in (opt.step, opt.state_dict, lambda: copy.deepcopy(opt)):
        with pytest.raises(ValueError, match=rf"its state was laid out by other options: {option}="):
            act()
    opt.param_groups[0][option] = old
    after = everything(opt, params)
    assert same(before[0], after[0])
    assert all(torch.equal(x, y[k]) for xs, y in zip(before[1], after[1], strict=True) for k, x in xs.items())
    train(opt, params, 2)
    # Who deletes the state may change the layout.
    opt.param_groups[0][option] = LAYOUTS[option]
    opt.state.clear()
    train(opt, params, 2)


def test_a_rule_cannot_be_changed_while_there_is_state():
    params = parameters()
    opt = optimizer(params, "muon")
    opt.param_groups[0]["rule"] = "adamuon"
    before = everything(opt, params)
    with pytest.raises(ValueError, match=r"rule='adamuon' in parameter group 0, which was under 'muon'"):
        opt.step()
    assert same(before[0], of(params))


@pytest.mark.parametrize("name", ["soap", "kl_soap"])
def test_bases_may_be_kept_in_another_dtype_from_some_step_on(name):
    params = parameters()
    opt = optimizer(params, name)
    train(opt, params, 3)
    kept = opt.state[params[0]]["Q_L"].clone()
    opt.param_groups[0].update(basis_dtype="bfloat16", lr=0.0, precondition_frequency=100)
    train(opt, params, 1)
    assert torch.equal(opt.state[params[0]]["Q_L"], kept.bfloat16())


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_option_on_which_the_layout_depends_says_so(name):
    """Options that `layout_options` doesn't name change no name, shape or dtype of the state."""
    from dataclasses import fields
    from typing import get_args, get_type_hints

    rule = RULES[name]
    hints = get_type_hints(rule)
    defaults = rule.defaults()
    tried = 0
    for f in fields(rule):
        if f.name in rule.layout_options():
            continue
        words = [w for w in get_args(hints[f.name]) if isinstance(w, str)]
        default = defaults[f.name]
        values = words or ([not default] if isinstance(default, bool) else [])
        if not values and isinstance(default, (int, float)):
            values = [default / 2, default + 1, 0, 1, 2]
        for value in values:
            try:
                other = rule(**{f.name: value})
            except ValueError:
                continue
            tried += 1
            for shape in ((2, 4, 4), (2, 4, 6), (1, 1, 5)):
                G = torch.empty(shape, device="meta")
                form = [{k: (x.shape, x.dtype) for k, x in r.init(G).items()} for r in (rule(), other)]
                assert form[0] == form[1], f.name
    assert tried > 0 or name == "lion"  # which has betas alone


# Groups.


def test_groups_share_stacks_and_keep_their_options(rule):
    """One group for each parameter, as with layer-wise rates: the stacks of one group, and each group's own options."""
    shapes = [(6, 4), (6, 4), (5,), (4, 6), (6, 4), (3, 2, 2)]
    rates = [0.1, 0.02, 0.05, 0.01, 0.1, 0.03]
    together, alone = parameters(shapes=shapes), parameters(shapes=shapes)
    extra = {"weight_decay_method": "l2"} if rule in MATRIX_RULES else {}
    groups = [{"params": [p], "lr": lr, "weight_decay": lr} | extra for p, lr in zip(together, rates, strict=True)]
    opt = optimizer(groups, rule)
    single = optimizer(parameters(shapes=shapes), rule)
    assert len(opt._stacks) == len(single._stacks)
    apart = [optimizer([p], rule, lr=lr, weight_decay=lr, **extra) for p, lr in zip(alone, rates, strict=True)]

    def step(seed):
        train(opt, together, 1, seed)
        for p, q in zip(together, alone, strict=True):
            q.grad = p.grad.clone()
        for one in apart:
            one.step()
        assert_same(together, alone)

    step(0)
    step(1)
    changed = {"eps": 1e-3} if "eps" in opt.param_groups[1] else {"weight_decay": 0.5}
    opt.param_groups[1].update(changed)  # from here on, its matrix is stepped in another way than its stack's others
    apart[1].param_groups[0].update(changed)
    step(2)
    together[0].grad = None
    step(3)
    for number, (p, one) in enumerate(zip(together, apart, strict=True)):
        saved = opt.state_dict()
        for name, x in one.state_dict()["state"][0].items():
            torch.testing.assert_close(saved["state"][number][name], x, rtol=1e-5, atol=1e-6)
        assert opt.state[p].keys() == one.state_dict()["state"][0].keys()
