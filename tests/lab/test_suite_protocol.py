"""The suite's decisions, on results that are made up."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.lab.shared.contenders import preset
from steepest.lab.suite import protocol
from steepest.lab.suite.command import CONTENDERS
from steepest.lab.suite.protocol import Ratio, Tried, next_length, next_setting, significant, steps_ratio

LOSSES = st.one_of(st.floats(0.1, 9.0), st.just(math.inf))


def tune(name, ending):
    """Tune a contender, whose trials end as a function of their settings says."""
    start, tried = preset(name), []
    while (setting := next_setting(start, [trial.loss for trial in tried])) is not None:
        tried.append(Tried(setting, ending(setting)))
    return tried


def bowl(best):
    """A loss that is lowest at a learning rate, and grows with the distance from it."""
    return lambda setting: 1 + abs(math.log2(setting.lr / best))


@given(st.sampled_from(CONTENDERS), st.lists(LOSSES, min_size=8, max_size=8))
def test_everybody_tries_the_same_number_of_different_settings_whatever_happens(name, losses) -> None:
    endings = iter(losses)
    tried = tune(name, lambda setting: next(endings))
    assert len(tried) == protocol.TRIALS
    assert len({json.dumps(trial.contender.settings()) for trial in tried}) == protocol.TRIALS
    assert sum(trial.contender.lr == preset(name).lr for trial in tried) >= 1


@given(st.sampled_from(CONTENDERS), st.integers(3, 16), st.lists(LOSSES, min_size=16, max_size=16))
def test_fewer_and_more_trials_are_of_different_settings_too(name, trials, losses) -> None:
    start, tried = preset(name), []
    while (setting := next_setting(start, losses[: len(tried)], trials)) is not None:
        tried.append(setting)
    assert min(trials, protocol.TRIALS) <= len(tried) <= trials
    assert len({json.dumps(setting.settings()) for setting in tried}) == len(tried)
    assert tried[:3] == [next_setting(start, losses[:count]) for count in range(3)]


@pytest.mark.parametrize("name", ["adamw", "soap-f5", "sgd", "kfac"])
@pytest.mark.parametrize("factor", [1e5, 1e-5])
def test_more_trials_let_the_walk_go_further(name, factor) -> None:
    start, ending, tried = preset(name), bowl(preset(name).lr * factor), []
    while (setting := next_setting(start, [trial.loss for trial in tried], 14)) is not None:
        tried.append(Tried(setting, ending(setting)))
    assert protocol.edges(tried) == ()


@pytest.mark.parametrize("name", ["adamw", "soap-f5", "sgd", "kfac"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 1 / 4, 30.0, 1 / 30])
def test_the_walk_finds_the_best_rate_within_half_a_step(name, factor) -> None:
    best = preset(name).lr * factor
    tried = tune(name, bowl(best))
    assert abs(math.log2(protocol.best_of(tried).contender.lr / best)) <= 0.5
    assert protocol.edges(tried) == ()


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_a_best_rate_that_was_not_passed_is_at_the_edge(factor) -> None:
    tried = tune("soap-f5", bowl(preset("soap-f5").lr * factor))
    assert protocol.rates_only([trial.loss for trial in tried]) == protocol.WALK + 2
    assert protocol.edges(tried) == ("lr",)


def test_diverged_runs_bound_the_best_rate() -> None:
    start = preset("adamw").lr
    tried = tune("adamw", lambda setting: math.inf if setting.lr > start else bowl(start)(setting))
    assert protocol.best_of(tried).contender.lr == start
    assert protocol.edges(tried) == ()


def test_if_all_diverge_the_rate_goes_down() -> None:
    rates = [trial.contender.lr for trial in tune("adamw", lambda setting: math.inf)]
    assert rates[:5] == [0.01, 0.04, 0.01 / 4, 0.01 / 16, 0.01 / 64]


def test_rates_of_matrices_and_of_the_rest_walk_together_then_apart() -> None:
    tried = tune("soap-f5", bowl(preset("soap-f5").lr))
    rates = [(trial.contender.lr, trial.contender.elementwise["lr"]) for trial in tried]
    assert rates[:5] == [(0.02, 0.02), (0.08, 0.08), (0.005, 0.005), (0.04, 0.04), (0.01, 0.01)]
    assert rates[5:7] == [(0.02, 0.08), (0.02, 0.005)]
    last = tried[7].contender
    assert (last.options["weight_decay"], last.elementwise["weight_decay"]) == (0.0, 0.0)
    assert str(tried[5].contender) == "soap-f5 lr 0.02, elementwise 0.08"


def test_a_better_rate_of_the_rest_is_kept_and_flagged() -> None:
    start = preset("muon").lr

    def ending(setting):
        return bowl(start)(setting) - 0.1 * math.log2(setting.elementwise["lr"] / setting.lr)

    tried = tune("muon", ending)
    assert tried[7].contender.elementwise["lr"] == 0.08  # without decay, and with the rate that was better
    assert protocol.edges(tried) == ("elementwise",)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("adamw", "betas", [(0.9, 0.95), (0.9, 0.99)]),
        ("sgd", "momentum", [0.95, 0.8]),
        ("kfac", "damping", [0.1, 0.001]),
    ],
)
def test_what_steps_all_parameters_alike_tries_its_other_settings(name, option, values) -> None:
    tried = tune(name, bowl(preset(name).lr))
    assert [trial.contender.options[option] for trial in tried[5:7]] == values


def test_weight_decay_is_tried_where_the_preset_has_none() -> None:
    last = tune("kfac", bowl(1.0))[7].contender
    assert last.options["weight_decay"] * last.lr == protocol.DECAY


# Comparison.


@given(st.lists(LOSSES, min_size=len(protocol.LADDER), max_size=len(protocol.LADDER)), st.floats(0.1, 9.0))
def test_the_ladder_brackets_the_target_with_few_runs(losses, target) -> None:
    table, run = dict(zip(protocol.LADDER, losses, strict=True)), {}
    while (share := next_length(run, target)) is not None:
        assert share not in run
        run[share] = table[share]
    reached = [share for share in run if run[share] <= target]
    ratio = steps_ratio(run, target)
    assert min(run) <= ratio.value <= max(run)
    if ratio.bound == "≥":
        assert not reached
        assert set(run) == {1.0, 1.4, 2.0}
    else:
        assert ratio.value <= min(reached)
        below = [share for share in run if share < min(reached)]
        assert ratio.bound == ("" if below and math.isfinite(run[max(below)]) else "≤")


@given(st.floats(1.01, 1.99), st.floats(1.01, 1.99))
def test_a_lower_target_takes_more_steps(a, b) -> None:
    losses = {0.5: 2.0, 0.7: 1.7, 1.0: 1.4, 1.4: 1.0}
    low, high = sorted([a, b])
    assert steps_ratio(losses, low).value >= steps_ratio(losses, high).value


def test_without_a_target_only_the_whole_length_is_run() -> None:
    assert next_length({}, math.inf) == 1.0
    assert next_length({1.0: 2.0}, math.inf) is None


def test_a_diverged_neighbour_makes_a_bound() -> None:
    assert steps_ratio({0.7: math.inf, 1.0: 1.0}, 2.0) == Ratio(1.0, "≤")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], True),
        ([1.0, 1.2, 1.4], [1.2, 1.4, 1.6], False),  # 0.2 √3 = 0.35 < 2 · 0.2
        ([1.0, 1.2, 1.4], [1.25, 1.45, 1.65], True),  # 0.25 √3 = 0.43
        ([1.0], [2.0], False),
        ([1.0, 1.0, math.inf], [1.0, 1.1, 1.2], True),
        ([1.0, 1.0, math.inf], [1.0, 1.1, math.inf], False),
    ],
)
def test_significance(ours, theirs, expected) -> None:
    assert significant(ours, theirs) is expected
    assert significant(theirs, ours) is expected


# One setting for all.


@given(st.lists(st.floats(0.5, 5.0), min_size=4, max_size=4), LOSSES, LOSSES)
def test_a_lower_loss_is_worth_more_steps(heights, a, b) -> None:
    curve = dict(zip(protocol.BASELINE_LENGTHS, heights, strict=True))
    low, high = sorted([a, b])
    lengths = [protocol.equivalent_length(curve, loss) for loss in (low, high)]
    assert 0.25 - 1e-9 <= lengths[1] <= lengths[0] + 1e-9 <= 4.0 + 2e-9


def test_a_loss_of_the_baseline_is_worth_its_length() -> None:
    curve = {0.7: 2.0, 1.0: 1.5, 1.4: 1.2, 2.0: 1.0}
    for share, loss in curve.items():
        assert protocol.equivalent_length(curve, loss) == pytest.approx(share)


@given(st.lists(st.lists(st.floats(0.25, 4.0), min_size=3, max_size=3), min_size=1, max_size=5), st.data())
def test_the_one_setting_is_complete_and_the_best_of_those_that_are(table, data) -> None:
    names = "abc"
    known = [dict(data.draw(st.sets(st.sampled_from(list(zip(names, row, strict=True)))))) for row in table]
    while (choice := protocol.choose(known, names))[1]:
        best, missing = choice
        known[best] |= {name: table[best][names.index(name)] for name in missing[:1]}
    means = [math.prod(row) for row in table]
    complete = [i for i, row in enumerate(known) if len(row) == 3]
    assert choice[0] in complete
    assert means[choice[0]] == pytest.approx(max(means[i] for i in complete))
