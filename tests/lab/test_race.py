from __future__ import annotations

import math

import pytest

from steepest.lab.race.race import Entry, Plan, Runs, race, shorter_distances
from steepest.lab.race.results import StepCount, find_results
from steepest.lab.race.store import Store
from steepest.lab.race.text import as_json, headline, notes
from steepest.lab.shared.contenders import preset


class Bars:
    """Progress bars that record what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name):
        return lambda *args: self.told.append(name)


class PaperPool:
    """Runs trials on paper: each gets a record without training, or an exception."""

    def __init__(self, make_record, stop_after: int = 10**6, fails=lambda trial: False) -> None:
        self.bars, self.make_record, self.stop_after, self.fails = Bars(), make_record, stop_after, fails
        self.ran = []

    def run(self, trials, ended) -> None:
        for trial in trials:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(trial)
            record = self.make_record(abs(math.log(trial.contender.lr / 0.01)), trial.steps)
            ended(trial, "it broke" if self.fails(trial) else record)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path, "fingerprint")


def test_everybody_is_tuned_then_the_best_runs_the_shorter_distances(make_plan, make_record, store) -> None:
    plan = make_plan("adamw", "soap", swept=True, shorter=(5, 8))
    pool = PaperPool(make_record)
    race(plan, pool, store, Runs(plan))
    tuning, finals = pool.ran[:8], pool.ran[8:]  # four rates each, one seed
    assert {(trial.steps, trial.seed) for trial in tuning} == {(10, 0)}
    assert len(set(map(str, tuning))) == 8
    further = [(5, 0), (8, 0), (5, 1), (8, 1), (10, 1)]
    assert {(t.contender.label, t.contender.lr, t.steps, t.seed) for t in finals} == {
        (name, 0.01, steps, seed) for name in ("adamw", "soap") for steps, seed in further
    }
    assert sorted(plan.distances) == sorted(trial.steps for trial in pool.ran)


def test_a_race_that_was_broken_off_continues(make_plan, make_record, store) -> None:
    plan = make_plan("adamw", "soap", "moso")
    first = PaperPool(make_record, stop_after=4)
    runs = Runs(plan)
    with pytest.raises(KeyboardInterrupt):
        race(plan, first, store, runs)
    assert len(runs.finished) == 4
    second = PaperPool(make_record)
    runs = Runs(plan)
    race(plan, second, store, runs)
    assert len(second.ran) == 2
    assert len(runs.finished) == 6
    assert second.bars.told.count("skipped") == 4


def test_a_broken_off_race_has_seen_every_contender(make_plan) -> None:
    plan = make_plan("adamw", "soap", "moso", swept=True)
    assert [trial.contender.label for trial in plan.tuning()[:3]] == ["adamw", "soap", "moso"]


def test_a_trial_that_fails_leaves_the_others_alone(make_plan, make_record, store) -> None:
    plan = make_plan("adamw", "soap")
    pool = PaperPool(make_record, fails=lambda trial: trial.contender.label == "soap")
    runs = Runs(plan)
    race(plan, pool, store, runs)
    assert len(runs.finished) == 2
    assert [(trial.contender.label, reason) for trial, reason in runs.failures] == [("soap", "it broke")] * 2


def test_distances_are_shares_of_the_whole() -> None:
    assert shorter_distances(300) == (135, 150, 170, 200, 240)
    assert shorter_distances(1) == ()


def test_steps_to_the_target_lie_between_distances(make_plan, make_runs) -> None:
    losses = {("adamw", 10): 2.0, ("soap", 10): 1.0, ("soap", 8): 1.5, ("soap", 4): 2.5}
    plan = make_plan("adamw", "soap", shorter=(4, 8))
    found = find_results(make_runs(plan, lambda t: losses.get((t.contender.label, t.steps), 3.0), optimizer_ms=10.0))
    soap, adamw = found.entries
    assert found.target == 2.0
    assert adamw.steps_to_target == StepCount(10)
    assert soap.steps_to_target == StepCount(6.0)
    assert soap.steps_share == soap.time_share == pytest.approx(0.6)
    claim, losses = headline(found)
    assert claim == "soap reaches adamw's final loss after 60% of adamw's steps and 60% of adamw's CPU time."
    assert losses == "After 10 steps, adamw ends at a loss of 2.000, and soap at 1.000."


def test_fewer_steps_that_take_longer_are_no_gain_in_time(make_plan, make_runs, make_record) -> None:
    losses = {("adamw", 10): 2.0, ("soap", 10): 1.0, ("soap", 8): 1.5, ("muon", 10): 1.9, ("muon", 8): 2.1}
    plan = make_plan("adamw", "soap", "muon", shorter=(4, 8))
    runs = make_runs(plan, lambda t: losses.get((t.contender.label, t.steps), 3.0))
    slow = {"adamw": 0.0, "soap": 0.05, "muon": 0.002}
    for run in runs.finished:
        run.record.optimizer_seconds = [slow[run.trial.contender.label]] * run.trial.steps
    claim, losses = headline(find_results(runs))
    assert claim.endswith("; no contender is shown to need less CPU time.")
    assert "and soap, the lowest, at 1.000" in losses
    for run in runs.finished:
        run.record.optimizer_seconds = [0.0 if run.trial.contender.label == "muon" else 0.05] * run.trial.steps
    assert ", and muon after " in headline(find_results(runs))[0]


def test_without_distances_the_crossing_is_an_upper_bound(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap")
    found = find_results(make_runs(plan, lambda t: 2.0 if t.contender.label == "adamw" else 1.0))
    assert found.entries[0].steps_to_target == StepCount(pytest.approx(20 / 3), "≤")
    assert "after at most 67% of adamw's steps" in headline(found)[0]


def test_what_does_not_get_there_is_said_not_to(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap")
    found = find_results(make_runs(plan, lambda t: 1.0 if t.contender.label == "adamw" else 2.0))
    assert found.entries[1].steps_to_target is None
    assert headline(found)[0] == "No contender is ahead of adamw by more than the noise between seeds."


def test_differences_within_the_noise_are_no_lead(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap")
    finals = {("adamw", 0): 2.0, ("adamw", 1): 1.8, ("soap", 0): 1.9, ("soap", 1): 1.7}
    found = find_results(make_runs(plan, lambda t: finals[t.contender.label, t.seed]))
    assert "No contender is ahead" in headline(found)[0]
    assert found.noise == pytest.approx(0.2)


def test_the_best_setting_is_the_best_on_average_and_edges_are_flagged(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap", swept=True)
    found = find_results(
        make_runs(plan, lambda t: t.contender.lr if t.contender.label == "soap" else abs(t.contender.lr - 0.01))
    )
    by_name = {line.label: line for line in found.entries}
    assert by_name["soap"].best.lr == min(c.lr for c in by_name["soap"].entry.candidates)
    assert by_name["soap"].best_at_edge_of == ("lr",)
    assert by_name["adamw"].best_at_edge_of == ()
    assert any("edge" in note for note in notes(found))
    assert any("same number of trials: 4 settings × 2 seeds" in note for note in notes(found))


def test_divergence_counts_as_infinitely_bad(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap", swept=True)
    found = find_results(make_runs(plan, lambda t: math.inf if t.contender.lr > 0.01 else 2 - t.contender.lr))
    soap = next(line for line in found.entries if line.label == "soap")
    assert soap.best.lr == 0.01
    assert soap.runs_diverged == 4
    everybody = find_results(make_runs(make_plan("adamw", "soap"), lambda t: math.inf))
    assert everybody.target is None
    assert headline(everybody)[0]
    assert as_json(everybody)["contenders"][0]["final"] is None


def test_unequal_tuning_is_admitted(make_plan, make_runs) -> None:
    tuned, preset = make_plan("adamw", swept=True).entries, make_plan("soap").entries
    plan = make_plan("adamw")
    plan = type(plan)(plan.workload, (*tuned, *preset), plan.steps, plan.seeds)
    assert any(note.startswith("Not tuned equally") for note in notes(find_results(make_runs(plan, lambda t: 1.0))))


def test_the_first_entry_is_the_baseline_where_adamw_is_not(make_plan) -> None:
    assert make_plan("soap", "adamw").baseline.label == "adamw"
    assert make_plan("soap", "moso").baseline.label == "soap"


def test_what_else_was_tuned_is_said(make_runs) -> None:
    entry = Entry.of(preset("soap"), {"lr": [0.1], "warmup": [0.1, 0.2, 0.3]})
    plan = Plan("digits", (entry,), steps=10, seeds=1)
    found = find_results(make_runs(plan, lambda trial: 1 - trial.contender.warmup))
    assert "Best of what was tuned besides lr: soap warmup=0.3*." in notes(found)
    assert str(plan.tuning()[1]) == "soap lr 0.1, warmup 0.2, 10 steps, seed 0"
