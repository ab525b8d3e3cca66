"""Options of groups: what is read as which value, and what is refused by name before anything has moved."""

from __future__ import annotations

import io
import math
from decimal import Decimal
from fractions import Fraction
from itertools import cycle
from typing import Any

import fed
import numpy as np
import pytest
import torch
from plain_groups import CLASSES, arguments, expect_same, parameters, snapshot
from torch import Tensor, nn

import steepest
from steepest import Optimizer
from steepest.engine.group import STACK_OPTIONS, option_defaults, plain_options
from steepest.rule.words import DecayMethod
from steepest.rules import RULES
from steepest.view import OPTIONS as VIEW_OPTIONS

DECAY_METHODS = DecayMethod.__args__


# What is refused, for every option of every rule.

NO_NUMBERS = [math.nan, math.inf, "high", "", True, 1j, Decimal("0.5"), torch.tensor(0.5), [0.5], np.ones(2), object()]
NO_BOOLS = ["off", "yes", "true", "", 1, 0, 0.0, torch.tensor(True), []]
NO_PAIRS = [0.9, "ab", (0.9,), (0.9, 1.0), (0.9, math.nan), (0.9, True), {0.9, 0.5}, torch.tensor([0.9, 0.5]), None]
NO_WORDS = ["foo", "", 3, None, True, ("qr",), torch.tensor(0), np.array(["qr", "eigh"])]


def wrong(name: str, default: Any) -> list[Any]:
    """Values that an option can't have."""
    may_be_none = [] if name in ("correct_shampoo_beta_bias", "exponent") else [None]
    if name == "rule":
        return [*NO_WORDS, []]
    if name == "precondition_frequency":
        return [*NO_NUMBERS, 0, -1, 2.5, None]
    if name == "exponent":
        return [*NO_NUMBERS, 0.0, 0.5]
    if name == "split":
        return [*NO_BOOLS[:-1], (0,), (-2, 8), (2.5,), (True,), None]
    if name == "heads":  # a sequence is refused by its view where it has not a number for each block of the split
        return [*(x for x in NO_NUMBERS if not isinstance(x, np.ndarray)), -7, 2.5, (), (2, 0), None]
    if name == "rounding_seed":
        return [*NO_NUMBERS, 0.5, None]
    if isinstance(default, bool) or name == "correct_shampoo_beta_bias":
        return NO_BOOLS + may_be_none
    if isinstance(default, int):
        return [*NO_NUMBERS, -7, 2.5, None]
    if isinstance(default, tuple):
        return NO_PAIRS
    if isinstance(default, str):
        return NO_WORDS
    # a tensor may be a learning rate
    return [*NO_NUMBERS[: None if name != "lr" else -4], -1.0, *may_be_none]


CASES = [(rule, name) for rule in RULES for name in option_defaults(rule)]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_an_option_that_is_wrong_is_refused_by_name(rule: str, name: str) -> None:
    optimizer = fed.optimizer(parameters(), rule, lr=0.1)
    group, before = optimizer.param_groups[0], snapshot(optimizer)
    good = group[name]
    values = wrong(name, option_defaults(rule)[name])
    for value in values:
        group[name] = value
        with pytest.raises(ValueError, match=name):
            plain_options(group)
    for value in (values[0], values[-1], values[-2]):
        group[name] = value
        with pytest.raises(ValueError, match=name):
            fed.optimizer(parameters(), **({"rule": rule, "lr": 0.1} | {name: value}))
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        with pytest.raises(ValueError, match=name):
            optimizer.add_param_group({"params": parameters(), name: value})
    group[name] = good
    assert len(optimizer.param_groups) == 1
    expect_same(optimizer, before)
    optimizer.step()
    assert not torch.equal(snapshot(optimizer)[0], before[0])


@pytest.mark.parametrize("optimizer", CLASSES)
def test_every_argument_of_a_class_is_checked(optimizer: type[Optimizer]) -> None:
    defaults = optimizer(parameters()).defaults | STACK_OPTIONS
    for name, default in arguments(optimizer).items():
        values = wrong(name, default if default is not None else defaults.get(name))
        if name == "kl_floor":
            values = [*NO_NUMBERS, 1.0, None]
        if name == "preconditioner_decay":
            values = [value for value in NO_NUMBERS if value is not None]
        for value in values:
            with pytest.raises(ValueError, match=name):
                optimizer(parameters(), **{name: value})


def test_options_of_the_optimizer_count_even_where_every_group_has_its_own() -> None:
    (W,) = parameters()
    with pytest.raises(ValueError, match="eps=-1"):
        Optimizer([{"params": [W], "eps": 1e-8, "lr": 0.1}], "soap", eps=-1)
    assert Optimizer([{"params": [W], "lr": 0.1}], "soap").defaults["lr"] is None
    with pytest.raises(ValueError, match="lr=None"):
        Optimizer([W], "soap")


# What is read as what.

READ = [
    ("lr", "1e-3", 0.001),
    ("lr", np.float32(0.5), 0.5),
    ("lr", np.array(0.5), 0.5),
    ("lr", Fraction(1, 4), 0.25),
    ("lr", 1, 1),
    ("weight_decay", "0", 0),
    ("eps", "1e-12", 1e-12),
    ("shampoo_beta", np.float64(0.5), 0.5),
    ("betas", [0.9, "0.95"], (0.9, 0.95)),
    ("betas", np.array([0.5, 0.25]), (0.5, 0.25)),
    ("precondition_frequency", 10.0, 10),
    ("precondition_frequency", "10", 10),
    ("precondition_frequency", np.int64(10), 10),
    ("power_iter_steps", 1.0, 1),
    ("max_precond_dim", "1e3", 1000),
    ("rounding_seed", 0.0, 0),
    ("rounding_seed", str(2**60 + 1), 2**60 + 1),
    ("heads", 2.0, 2),
    ("split", [2, np.int32(4)], (2, 4)),
    ("nesterov", np.bool_(True), True),
    ("correct_shampoo_beta_bias", np.bool_(False), False),
    ("solver", np.str_("eigh"), "eigh"),
]


@pytest.mark.parametrize(("name", "value", "plain"), READ)
def test_other_ways_to_write_a_value_are_read(name: str, value: Any, plain: Any) -> None:
    made = [
        Optimizer(parameters(), "soap", **({"lr": 0.1} | {name: value})),
        Optimizer([{"params": parameters(), name: value}], "soap", lr=0.1),
        Optimizer(parameters(), "soap", lr=0.1),
    ]
    made[2].param_groups[0][name] = value
    reads = [plain_options(made[2].param_groups[0])]
    for optimizer in made if name not in VIEW_OPTIONS else made[:2]:
        optimizer.step()
        reads.append(optimizer.param_groups[0])
    for group in reads:
        assert group[name] == plain
        assert type(group[name]) is type(plain)
    if isinstance(plain, tuple):
        assert [type(x) for x in group[name]] == [type(x) for x in plain]


def test_what_numpy_wrote_is_saved_as_pythons() -> None:
    optimizer = steepest.SOAP(
        parameters(), lr=np.float32(0.5), betas=np.array([0.5, 0.25]), nesterov=np.bool_(True), heads=np.int64(2)
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert (group["lr"], group["betas"], group["nesterov"], group["heads"]) == (0.5, (0.5, 0.25), True, 2)


def test_a_list_that_a_caller_keeps_is_not_the_groups() -> None:
    betas = [0.9, 0.95]
    optimizer = steepest.SOAP(parameters(), betas=betas)
    betas[0] = 2.0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_schedules_read_and_check_their_numbers() -> None:
    assert steepest.LinearSchedule(1, np.int64(11), "1e2")(50) == 6
    assert steepest.StepSchedule({0: 1.0, "10": np.int64(5)})(10) == 5
    for schedule in (steepest.LinearSchedule, steepest.CosineSchedule):
        for name in ("start", "end", "transition_steps"):
            for value in (*NO_NUMBERS, 0, None):
                with pytest.raises(ValueError, match=name):
                    schedule(**({"start": 1, "end": 10, "transition_steps": 100} | {name: value}))
    for value in (*NO_NUMBERS, 0, 2.5, None):
        with pytest.raises(ValueError, match="frequencies"):
            steepest.StepSchedule({0: 1, 10: value})
    for frequencies in ({}, {1: 5}, {0: 1, -1: 2}, {0: 1, 2.5: 2}):
        with pytest.raises(ValueError, match="frequencies"):
            steepest.StepSchedule(frequencies)


@pytest.mark.parametrize(
    ("view", "plain"), [({"heads": 2.0}, 2), ({"heads": "2"}, 2), ({"split": [4, np.int64(4)]}, (4, 4))]
)
def test_a_routes_view_is_read_as_a_groups(view: dict[str, Any], plain: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = steepest.for_model(model, "soap", lr=0.1, overrides={"0.weight": view})
    (name,) = view
    assert plain in [group.get(name) for group in optimizer.param_groups]
    for wrong in ("no", 2.5, None):
        with pytest.raises(ValueError, match=f"0.weight: {name}="):
            steepest.for_model(model, "soap", lr=0.1, overrides={"0.weight": {name: wrong}})


def test_the_views_options_are_the_groups() -> None:
    assert VIEW_OPTIONS.items() <= STACK_OPTIONS.items()


# Learning rates that are tensors.

RATE = 2**-7  # the same number in every dtype
RATES = [
    torch.tensor(RATE),
    torch.tensor([RATE]),
    torch.tensor([[[RATE]]]),
    torch.tensor(RATE, dtype=torch.float64),
    torch.tensor([RATE], dtype=torch.float64),
    torch.tensor([RATE], dtype=torch.bfloat16),
    nn.Parameter(torch.tensor([RATE])),
]


def stepped(rule: str, dtype: torch.dtype, **options: Any) -> list[nn.Parameter]:
    """Parameters of every kind after two steps."""
    params = parameters((6, 4), (5,), (), (0, 3))
    for p in params:
        p.data, p.grad = p.data.to(dtype), p.grad.to(dtype)
    optimizer = fed.optimizer(params, rule, **options)
    optimizer.step()
    optimizer.step()
    return params


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_may_be_a_tensor_of_one_element_in_any_form(rule: str) -> None:
    methods = cycle(DECAY_METHODS if "weight_decay_method" in option_defaults(rule) else [None])
    for lr, method in zip(RATES, methods, strict=False):
        options = {"weight_decay": 0.1} | ({} if method is None else {"weight_decay_method": method})
        for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2))[: 2 if lr is RATES[1] else 1]:
            pair = [stepped(rule, dtype, lr=rate, **options) for rate in (lr, RATE)]
            for p, q in zip(*pair, strict=True):
                torch.testing.assert_close(p, q, rtol=error, atol=error / 10)


@pytest.mark.parametrize("rule", RULES)
def test_a_rate_that_is_a_tensor_stays_the_same_one(rule: str) -> None:
    lr = torch.tensor([0.01])
    optimizer = fed.optimizer(parameters(), rule, lr=lr)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is lr
    before = snapshot(optimizer)[0]
    lr.fill_(0.0)  # as schedulers do
    optimizer.step()
    assert torch.equal(snapshot(optimizer)[0], before)


@pytest.mark.parametrize(
    "lr",
    [
        torch.tensor(math.nan),
        torch.tensor(-1.0),
        torch.tensor([math.inf]),
        torch.tensor([0.1, 0.1]),
        torch.tensor([]),
        torch.tensor(True),
        torch.tensor(1j),
        torch.tensor(0.1, device="meta"),
    ],
)
def test_a_tensor_that_is_no_rate_is_refused(lr: Tensor) -> None:
    optimizer = steepest.Muon(parameters())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lr="):
        steepest.Muon(parameters(), lr=lr)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="lr="):
        optimizer.step()
    expect_same(optimizer, before)


# Checkpoints.


def test_a_saved_option_that_is_wrong_is_refused_and_nothing_changes() -> None:
    optimizer = steepest.SOAP(parameters())
    optimizer.step()
    saved, before = optimizer.state_dict(), snapshot(optimizer)
    for name, value in {"eps": math.nan, "nesterov": "yes", "guards": False, "weight_decay": None}.items():
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(saved | {"param_groups": [saved["param_groups"][0] | {name: value}]})
    expect_same(optimizer, before)
