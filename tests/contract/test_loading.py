"""A state is loaded as a whole or not at all, whatever is wrong with it; what an older steepest wrote still loads."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import steepest
from steepest.engine.checkpoint import FORMAT
from steepest.testing.evidence import Snapshot, expect_same, snapshot

MAKE = runpy.run_path(str(Path(__file__).parent / "states/make.py"))


def everything(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Snapshot:
    """All that loading could change."""
    state = {name: dict(optimizer.state[p]) for name, p in params.items() if p in optimizer.state}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return snapshot({"weights": params, "state": state, "groups": groups})


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(steps: int = 2) -> tuple[dict[str, nn.Parameter], steepest.Optimizer]:
    params, optimizer = MAKE["start"]()
    MAKE["train"](params, optimizer, range(steps))
    return params, optimizer


def refuses(optimizer: steepest.Optimizer, params: dict[str, nn.Parameter], saved: Any, message: str) -> None:
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    expect_same(everything(params, optimizer), before, "an optimizer that refused to be as before")


# States of older versions.


NUDGES = 5
Weights = dict[str, Tensor]


def nudge(params: dict[str, nn.Parameter], seed: int) -> None:
    """Change weights by about one rounding error, differently for each seed; not at all for seed 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in params.values():
            p.mul_(1 + bool(seed) * 2.0**-23 * torch.randn(p.shape, generator=generator))


def expect_near(run: Callable[[int], Weights], expected: Weights, close: float) -> None:
    """Expect weights that differ from others by no more than rounding errors make them differ here, or by ``close``.

    Machines round differently, and KL-Shampoo's roots, or SOAP's steps without guards, make that a thousand times
    larger where a covariance has directions that no gradient had.
    """
    first, *others = (run(seed) for seed in range(NUDGES))
    for name, W in first.items():
        spread = max(float((other[name] - W).abs().max()) for other in others)
        torch.testing.assert_close(W, expected[name], rtol=close, atol=close + 3 * spread, msg=name)


def continued(name: str, saved: dict[str, Any], seed: int = 0) -> Weights:
    params, optimizer = MAKE["MADE"][name]()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["middle"][name])
    nudge(params, seed)
    options = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    assert [set(group) for group in optimizer.param_groups] == options, "options that no longer exist"
    MAKE["train"](params, optimizer, range(MAKE["BEFORE"], MAKE["BEFORE"] + MAKE["AFTER"]))
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("number", [1, 0])
@pytest.mark.parametrize("file", MAKE["MADE"])
def test_an_old_state_trains_on(file: str, number: int) -> None:
    """Format 0 is format 1 without its number."""
    saved = torch.load(MAKE["FOLDER"] / file, weights_only=True)
    assert {group["format"] for group in saved["optimizer"]["param_groups"]} == {1}
    if number == 0:
        for group in saved["optimizer"]["param_groups"]:
            del group["format"]
    expect_near(lambda seed: continued(file, saved, seed), saved["end"], close=1e-5)


@pytest.mark.parametrize("file", MAKE["MADE"])
def test_the_file_is_what_the_script_makes(file: str, tmp_path: Path) -> None:
    MAKE["make"](tmp_path / file, MAKE["MADE"][file])
    new, old = (torch.load(folder / file, weights_only=True) for folder in (tmp_path, MAKE["FOLDER"]))

    def trained_from(seed: int) -> Weights:
        params, optimizer = MAKE["MADE"][file]()
        nudge(params, seed)
        MAKE["train"](params, optimizer, range(MAKE["BEFORE"] + MAKE["AFTER"]))
        return {name: p.detach() for name, p in params.items()}

    expect_near(trained_from, old["end"], close=1e-4)  # since then, SOAP's noise floor falls from step to step
    theirs = {key: {name: x.shape for name, x in named.items()} for key, named in old["optimizer"]["state"].items()}
    assert theirs == {
        key: {name: x.shape for name, x in named.items()} for key, named in new["optimizer"]["state"].items()
    }


# The number.


def test_every_group_carries_the_format() -> None:
    """Groups that are added later, and groups of copies, carry it too."""
    _, optimizer = trained()
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))], "format": 7})
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert [group["format"] for group in each.state_dict()["param_groups"]] == [FORMAT] * 5


@pytest.mark.parametrize(
    ("number", "message"), [(FORMAT + 1, "written by a newer steepest"), (-1, "format=-1"), ("1", "format='1'")]
)
def test_a_newer_format_is_refused(number: Any, message: str) -> None:
    params, optimizer = trained()
    saved = trained(3)[1].state_dict()
    saved["param_groups"][-1]["format"] = number
    refuses(optimizer, params, saved, message)


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_keep_the_format(flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def start() -> tuple[nn.Module, steepest.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [{"params": model[0].parameters(), "rule": "soap"}, {"params": model[1].parameters(), "rule": "adamw"}]
        optimizer = steepest.Optimizer(groups, lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = start()
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
    again, other = start()
    set_optimizer_state_dict(again, other, saved, options=options)
    expect_same(
        snapshot(list(other.state_dict()["state"].values())),
        snapshot(list(optimizer.state_dict()["state"].values())),
        "the state to arrive",
    )
    if flatten:
        newer = {k: FORMAT + 1 if k.endswith(".format") else v for k, v in saved.items()}
    else:
        newer = saved | {"param_groups": [group | {"format": FORMAT + 1} for group in saved["param_groups"]]}
    before = snapshot(other.state_dict())
    with pytest.raises(ValueError, match="newer steepest"):
        set_optimizer_state_dict(again, other, newer, options=options)
    expect_same(snapshot(other.state_dict()), before, "nothing to be loaded")


# What is refused.


def frozen() -> tuple[dict[str, nn.Parameter], steepest.Optimizer]:
    """An optimizer whose second parameter has no state yet, and would get it from what is loaded."""
    params = {name: nn.Parameter(torch.ones(2, 3), requires_grad=name != "b") for name in "abc"}
    optimizer = steepest.Optimizer([{"params": list(params.items()), "rule": "soap"}], lr=0.1)
    return params, optimizer


@pytest.mark.parametrize("damage", ["shape", "missing", "options"])
def test_a_refused_state_thaws_nothing(damage: str) -> None:
    warm = {name: nn.Parameter(torch.ones(2, 3)) for name in "abc"}
    saved = steepest.Optimizer([{"params": list(warm.items()), "rule": "soap"}], lr=0.1).state_dict()
    params, optimizer = frozen()
    assert params["b"] not in optimizer.state
    if damage == "shape":
        saved["state"][2]["L"] = torch.zeros(3, 3)
    elif damage == "missing":
        del saved["state"][1]["Q_R"]
    else:
        saved["param_groups"][0]["eps"] = -1.0
    refuses(optimizer, params, saved, {"shape": "c: 'L'", "missing": "b: .*no 'Q_R'", "options": "eps=-1.0"}[damage])
    assert params["b"] not in optimizer.state
    assert len(optimizer._stacks) == 1
    assert len(optimizer._roster.frozen) == 1


Tamper = Callable[[dict[str, Any]], Any]


def put(value: Any, *path: Any) -> Tamper:
    """Write ``value`` at a path of keys."""

    def tamper(saved: dict[str, Any]) -> None:
        place: Any = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    return tamper


TAMPERED: dict[str, tuple[Tamper, str]] = {
    "clock negative": (put(torch.tensor(-1), "state", 0, "clock"), "'clock' was saved as -1: must be a count"),
    "clock a float": (put(torch.tensor(1.0), "state", 0, "clock"), "'clock' was saved as float32 tensor"),
    "step half": (put(torch.tensor(1.5), "state", 0, "step"), r"attention: 'step' was saved as 1.5: must be a count"),
    "step NaN": (put(torch.tensor(math.nan), "state", 3, "step"), "norm: 'step' was saved as nan"),
    "steps infinite": (put(torch.tensor([2.0, math.inf]), "state", 1, "step"), "experts: 'step'"),
    "int for float": (put(lambda x: x.long(), "state", 0, "L"), "'L' was saved as int64 tensor"),
    "bool for float": (put(lambda x: x > 0, "state", 3, "exp_avg"), "'exp_avg' was saved as bool tensor"),
    "complex": (put(lambda x: x.to(torch.complex64), "state", 2, "momentum_buffer"), "complex64 tensor"),
    "meta": (put(lambda x: x.to("meta"), "state", 0, "Q_L"), "float32 without values tensor"),
    "sparse": (put(lambda x: x.to_sparse(), "state", 0, "L"), "'L' was saved as"),
    "a list": (put(lambda x: x.tolist(), "state", 0, "L"), "'L' was saved as a list"),
    "transposed": (put(lambda x: x.mT, "state", 0, "exp_avg"), r"with shape \[3, 4\], and has shape \[4, 3\]"),
    "state a list": (put([], "state", 0), "attention: the saved state is a list"),
    "state a tensor": (put(torch.zeros(2, 2), "state", 0), "attention: the saved state is a float32 tensor"),
    "state empty": (put({}, "state", 0), "nothing for attention"),
    "state a word": (put("gone", "state", 0), "attention: the saved state is a str"),
    "states a list": (put([], "state"), "'state' is a list"),
    "groups a dict": (put({}, "param_groups"), "'param_groups' are a dict"),
    "a group a list": (put([], "param_groups", 1), "parameter group 1 of the saved state is not a dict"),
    "another group": (lambda s: s["param_groups"].append({"params": []}), "5 parameter groups, the optimizer has 4"),
    "no params": (lambda s: s["param_groups"][0].pop("params"), "group 0 of the saved state is not a dict with"),
    "twice": (put([0], "param_groups", 1, "params"), "group 1 of the saved state repeats 0"),
    "names too many": (put(["a", "b"], "param_groups", 0, "param_names"), "one name for each"),
    "lr a word": (put("high", "param_groups", 0, "lr"), "lr='high'"),
    "lr NaN": (put(math.nan, "param_groups", 0, "lr"), "lr=nan"),
    "betas a number": (put(0.9, "param_groups", 0, "betas"), r"betas=0.9: must be two numbers"),
    "a bool a word": (put("no", "param_groups", 0, "nesterov"), "nesterov='no' in parameter group 0"),
    "a tensor": (
        put(torch.ones(2, 2), "param_groups", 1, "eps"),
        "eps=tensor[^:]* group 1 of the saved state: must be a plain value",
    ),
    "a list for None": (put([], "param_groups", 0, "correct_shampoo_beta_bias"), "must be a plain value"),
    "another view": (put(True, "param_groups", 2, "transpose"), r"transpose=True \(here False\)"),
    "a bad view": (put((5,), "param_groups", 0, "split"), "split="),
    "another state": (put(True, "param_groups", 3, "amsgrad"), r"norm: .*amsgrad=True \(here False\)"),
    "fewer factors": (put(3, "param_groups", 0, "max_precond_dim"), r"max_precond_dim=3 \(here 8192\)"),
    "frequency infinite": (
        put(math.inf, "param_groups", 0, "precondition_frequency"),
        "precondition_frequency=inf: must be an integer",
    ),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_what_is_damaged_is_refused(tamper: Tamper, message: str) -> None:
    params, optimizer = trained()
    saved = trained(3)[1].state_dict()
    tamper(saved)
    refuses(optimizer, params, saved, message)


@pytest.mark.parametrize("what", [None, 3, [], torch.zeros(2)], ids=["none", "number", "list", "tensor"])
def test_what_is_no_state_at_all(what: Any) -> None:
    params, optimizer = trained()
    refuses(optimizer, params, what, "no 'state' and 'param_groups', it is a")


def test_nan_is_a_number() -> None:
    """Moments may have overflowed; a state with NaN is loaded, not refused."""
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"].fill_(math.nan)
    saved["state"][3]["exp_avg"] = saved["state"][3]["exp_avg"].double()
    params, other = trained(0)
    other.load_state_dict(saved)
    assert other.state[params["attention"]]["exp_avg"].isnan().all()
    assert other.state[params["norm"]]["exp_avg"].dtype == torch.float32


def test_a_state_that_wants_gradients_leaves_no_graph() -> None:
    params, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][0]["L"].requires_grad_()
    optimizer.load_state_dict(saved)
    assert not optimizer.state[params["attention"]]["L"].requires_grad


# Parameters that have come and gone.


def named(*names: str) -> tuple[dict[str, nn.Parameter], steepest.Optimizer]:
    params = {name: nn.Parameter(torch.ones(2, 3)) for name in names}
    optimizer = steepest.SOAP(list(params.items()), lr=0.1)
    for p in params.values():
        p.grad = torch.eye(2, 3)
    optimizer.step()
    return params, optimizer


def test_added_parameters_are_named_with_the_remedy() -> None:
    saved = named("a", "b")[1].state_dict()
    params, optimizer = named("a", "new", "b")
    refuses(optimizer, params, saved, "parameter group 0 has new, which .* load before they are added with add_para")
    params, optimizer = named("b", "a")
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 3)))]})
    assert torch.equal(optimizer.state[params["a"]]["L"], saved["state"][0]["L"])


def test_removed_parameters_are_named_with_the_remedy() -> None:
    saved = named("a", "old", "b")[1].state_dict()
    params, optimizer = named("a", "b")
    refuses(
        optimizer, params, saved, "parameter group 0 has no old, which .* take them out of its 'params' and 'param_n"
    )
    (group,) = saved["param_groups"]
    at = group["param_names"].index("old")
    del group["param_names"][at], group["params"][at]
    saved["state"][2]["L"].fill_(7.0)
    optimizer.load_state_dict(saved)
    assert optimizer.state[params["b"]]["L"].eq(7).all()


def test_another_number_without_names() -> None:
    params = {"a": nn.Parameter(torch.ones(2, 3))}
    one, two = steepest.SOAP(params.values(), lr=0.1), steepest.SOAP([nn.Parameter(torch.ones(2, 3))] * 1, lr=0.1)
    saved = two.state_dict()
    saved["param_groups"][0]["params"].append(1)
    refuses(one, params, saved, "saved with 2 parameters and has 1 here")


# Anything at all.

WRONG = st.sampled_from(
    [None, "", -1, 2.5, math.nan, True, [], {}, (0.9,), torch.tensor(-1.0), torch.zeros(2, 2), torch.tensor([1, 2])]
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path to something in nested dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, child in children:
        found += [(*path, key), *places(child, (*path, key))]
    return found


STATE = trained(3)[1].state_dict()
PLACES = places(STATE)


Damages = list[tuple[tuple[Any, ...], Any]]
DAMAGES = st.lists(st.tuples(st.sampled_from(PLACES), st.one_of(st.just("drop"), WRONG)), min_size=1, max_size=3)
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@settings(COMMON, max_examples=20, derandomize=True)
@example([(("param_groups", 1, "param_names", 0), None)])
@given(DAMAGES)
def test_any_damage(damages: Damages) -> None:
    refused_or_trained_on(damages)


@pytest.mark.slow
@settings(COMMON, max_examples=500)
@given(DAMAGES)
def test_much_more_damage(damages: Damages) -> None:
    refused_or_trained_on(damages)


def refused_or_trained_on(damages: Damages) -> None:
    """Expect that a state with anything dropped or replaced raises ValueError and changes nothing, or trains on."""
    params, optimizer = trained()
    saved = copy.deepcopy(STATE)
    for path, value in damages:
        place: Any = saved
        with contextlib.suppress(KeyError, IndexError, TypeError):  # gone with an earlier damage
            for key in path[:-1]:
                place = place[key]
            if isinstance(value, str) and value == "drop":
                del place[path[-1]]
            elif isinstance(place, dict | list):
                place[path[-1]] = copy.deepcopy(value)
    before = everything(params, optimizer)
    try:
        optimizer.load_state_dict(saved)
    except ValueError:
        expect_same(everything(params, optimizer), before, "an optimizer that refused to be as before")
    MAKE["train"](params, optimizer, range(3, 5))
    for name, p in params.items():
        assert optimizer.state[p], name
