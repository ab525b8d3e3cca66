"""What others write to ``param_groups`` counts from the next step on, or is refused by name."""

import copy

import pytest
import torch
from changing import MATRIX_RULES, assert_same, everything, of, optimizer, parameters, same, train

from steepest.rules import RULES


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return request.param


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
    "bias": True,
    "form": "eigen",
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
    if option == "bias":
        with pytest.raises(ValueError, match="no group has a bias of its layer"):
            opt.step()
    else:
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


def test_a_rate_that_is_a_tensor_is_saved_as_a_copy_and_checked_at_every_step(rule):
    params = parameters()
    rate = torch.tensor(0.1)
    opt = optimizer(params, rule, lr=rate)
    train(opt, params, 1)
    saved = opt.state_dict()["param_groups"][0]["lr"]
    assert opt.param_groups[0]["lr"] is rate
    before = of(params)
    for bad in (torch.nan, -1.0, torch.inf):
        rate.fill_(bad)
        with pytest.raises(ValueError, match="lr=tensor"):
            opt.step()
        assert same(before, of(params))
    opt.param_groups[0]["lr"] = 0.1
    train(opt, params, 1)
    before = of(params)
    opt.param_groups[0]["lr"] = rate.fill_(0.1)  # one that was no tensor at construction
    opt.state_dict()
    rate.fill_(torch.nan)
    with pytest.raises(ValueError, match="lr=tensor"):
        opt.step()
    assert same(before, of(params))
    assert saved == torch.tensor(0.1)
    rate.fill_(0.0)
    opt.param_groups[0]["weight_decay"] = 0.0
    opt.step()
    assert same(before, of(params))
