"""The benchmark of variants: what they change, how it searches, and that the documentation says what it found."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
import variants as benchmark
from torch import nn

from steepest.engine.optimizer import Optimizer
from steepest.lab.race.training import Schedule
from steepest.linalg.polar import polar_factor
from steepest.rules import RULES

FOUND = json.loads(benchmark.RESULTS.read_text())["trials"]

# What the variants change.


def trained(hook: str, steps: int) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    """The parameters after steps of Muon, with a hook or without, and what they were after each of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs, parameters = torch.randn(16, 6), list(model.parameters())
    optimizer = benchmark.contender(f"muon+{hook}" if hook else "muon", steps=steps).optimizer(model)
    seen = [[p.detach().clone() for p in parameters]]
    for _ in range(steps):
        model.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        seen.append([p.detach().clone() for p in parameters])
    return parameters, seen


def test_the_sphere_keeps_the_norms_of_hidden_matrices_alone() -> None:
    parameters, seen = trained("ball", 3)
    norms = [(p.norm().item(), first.norm().item()) for p, first in zip(parameters, seen[0], strict=True)]
    kept = [math.isclose(*pair, rel_tol=1e-5) for pair in norms]
    assert [tuple(p.shape) for p, same in zip(parameters, kept, strict=True) if same] == [(8, 6), (8, 8)]
    assert not any(map(torch.equal, parameters, seen[0]))


def test_the_weights_end_as_the_mean_of_the_last_fifth() -> None:
    _, plain = trained("", 10)
    parameters, seen = trained("tail", 10)
    for before, same in zip(seen[:-1], plain[:-1], strict=True):
        assert all(map(torch.equal, before, same))
    for p, last, one_before in zip(parameters, plain[-1], plain[-2], strict=True):
        torch.testing.assert_close(p.detach(), (last + one_before) / 2)


def test_gradients_are_taken_ahead_of_the_weights() -> None:
    """By steps of SGD along a gradient of 1."""
    x = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([x], lr=0.5)
    after_step = torch.no_grad()(benchmark.lookahead(nn.ParameterList([x]), optimizer, 3, gamma=0.75, beta=0.4))
    optimizer.param_groups[0]["lr"] = 0.25  # half of the highest
    weight, E, ahead = 2.0, 0.0, 2.0
    for _ in range(3):
        x.grad = torch.ones(1)
        optimizer.step()
        after_step()
        moved = ahead - 0.25 - weight
        weight, E = weight + moved, 0.75 * E + 0.25 * moved
        ahead = weight + 0.4 / 2 * E
        assert x.item() == pytest.approx(ahead)


@pytest.fixture
def direction(monkeypatch):
    """The direction of a rule's second step, and the names of what its state holds."""

    def made(rule, m: int, n: int, **options: object) -> tuple[torch.Tensor, set[str]]:
        monkeypatch.setitem(RULES, rule.name, rule)
        generator = torch.Generator().manual_seed(0)
        W = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
        optimizer = Optimizer([W], rule.name, lr=1.0, weight_decay=0.0, precondition_frequency=1, **options)
        for _ in range(2):
            before, W.grad = W.detach().clone(), torch.randn(m, n, dtype=torch.float64, generator=generator)
            optimizer.step()
        return before - W.detach(), set(optimizer.state[W])

    return made


def test_soap_through_the_polar_factor(direction) -> None:
    D, _ = direction(benchmark.Soap, 4, 6)
    ours, _ = direction(benchmark.PolarSoap, 4, 6)
    torch.testing.assert_close(ours, polar_factor(D) * 0.2 * 6**0.5)


@pytest.mark.parametrize(("m", "n", "side"), [(4, 6, "L"), (6, 4, "R"), (5, 5, "L")])
def test_one_sided_soap_rotates_the_shorter_side(direction, m, n, side) -> None:
    D, names = direction(benchmark.OneSidedSoap, m, n)
    assert names & {"L", "R", "Q_L", "Q_R"} == {side, f"Q_{side}"}
    if m != n:
        torch.testing.assert_close(D, direction(benchmark.Soap, m, n, max_precond_dim=4)[0])


def test_decay_by_the_square_of_the_rate_is_as_much_in_all() -> None:
    found, base = benchmark.contender("muon+palm", 1), benchmark.contender("muon", 1)
    schedule = Schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base.lr), base.warmup, benchmark.STEPS)
    rates = [base.lr * schedule.factor(step) for step in range(1, benchmark.STEPS + 1)]
    squares = sum(rate**2 for rate in rates)
    assert found.options["weight_decay"] * squares == pytest.approx(0.1 * sum(rates), rel=1e-3)


@pytest.mark.parametrize("name", benchmark.VARIANTS)
def test_all_rates_walk_together(name) -> None:
    one, other = benchmark.contender(name), benchmark.contender(name, 1)
    assert (other.lr, other.elementwise) == (2 * one.lr, one.elementwise | {"lr": 2 * one.elementwise["lr"]})
    base = benchmark.contender(benchmark.VARIANTS[name].base or name)
    assert (one.elementwise, one.warmup) == (base.elementwise, base.warmup)


# How it searches.


@pytest.mark.parametrize(
    ("best", "start", "most", "tried"),
    [
        (0, 0, 4, {-1, 0, 1}),
        (1, 0, 4, {0, 1, 2}),
        (2, 0, 4, {0, 1, 2, 3}),
        (3, 0, 4, {0, 1, 2, 3}),
        (-1, 0, 4, {1, 0, -1, -2}),
        (5, 0, 8, set(range(7))),
    ],
)
def test_rates_are_tried_until_the_best_has_worse_neighbours(best, start, most, tried) -> None:
    found: dict[int, dict[int, float]] = {}
    while run := benchmark.next_run(found, start, most, 3):
        index, seed = run
        assert seed == 0 or set(found) == tried, "the other seeds come last"
        found.setdefault(index, {})[seed] = (index - best) ** 2 + 0.1 * seed
    lowest = min(tried, key=lambda index: abs(index - best))
    assert {index: set(seeds) for index, seeds in found.items()} == {
        index: {0, 1, 2} if index == lowest else {0} for index in tried
    }


@pytest.fixture
def fast(monkeypatch, tmp_path):
    """Trials that were run, best at twice the preset's rate; the clock counts a second for each."""
    trials = []

    def train(trial, workload, progress):
        trials.append(trial)
        return SimpleNamespace(final=1 + abs(math.log2(trial.contender.lr / 0.12)) + 0.1 * trial.seed)

    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark, "load_workload", lambda spec: None)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "found.json")
    monkeypatch.setattr(benchmark.time, "process_time", lambda: float(len(trials)))
    return trials


def test_what_was_run_is_not_run_again(fast, capsys) -> None:
    def measure(budget: float) -> bool:
        path = benchmark.RESULTS
        kept = json.loads(path.read_text())["trials"] if path.exists() else []
        return benchmark.measure(kept, ["muon", "muon+cautious"], ["lstm"], 3, benchmark.STEPS, budget)

    assert not measure(2)
    assert len(fast) == 3
    assert measure(math.inf)
    assert [trial.contender.lr for trial in fast] == [0.06, 0.12, 0.24, 0.12, 0.12, 0.12, 0.24, 0.06, 0.12, 0.12]
    assert len(json.loads(benchmark.RESULTS.read_text())["trials"]) == 10
    assert measure(0)
    assert len(fast) == 10
    capsys.readouterr()


def made_up(name: str, *losses: float | None, index: int = 0) -> list[dict[str, object]]:
    """Trials of a variant whose best rate has these losses, between two that have 9 and 8."""
    ends = [(index - 1, 0, 9.0), (index + 1, 0, 8.0), *((index, seed, loss) for seed, loss in enumerate(losses))]
    kept = {"variant": name, "workload": "lstm", "steps": benchmark.STEPS}
    return [kept | {"index": index, "seed": seed, "final_loss": loss} for index, seed, loss in ends]


def test_a_table_says_what_counts() -> None:
    base = made_up("muon", 1.0, 1.1, 1.2)
    assert benchmark.cell(base, "muon", "lstm") == "1.100"
    assert benchmark.cell(base + made_up("normuon", 1.5, 1.6, 1.7), "normuon", "lstm") == "1.600, **+45.5%**"
    assert benchmark.cell(base + made_up("normuon", 1.0, 1.1, 1.17), "normuon", "lstm") == "1.090, -0.9%"
    assert benchmark.cell(base + made_up("normuon", 1.0, 1.1), "normuon", "lstm") == "", "a seed is missing"
    assert benchmark.table(base, ("muon", "normuon")) == "| | `lstm` |\n|---|--:|\n| Muon | 1.100 |"


# What it found.


def test_the_documentation_has_the_tables() -> None:
    """Write them with ``python benchmarks/experiments/variants.py --write``."""
    page = benchmark.PAGE.read_text()
    assert benchmark.with_tables(page, FOUND) == page


def test_what_the_documentation_says_of_them_is_so() -> None:
    """Whoever runs more variants reads the page again."""
    found = {
        (name, workload): compared
        for name, variant in benchmark.VARIANTS.items()
        for workload in benchmark.WORKLOADS
        if variant.base and (compared := benchmark.compared(FOUND, name, workload))
    }
    counted = {key: more for key, (more, counts) in found.items() if counts}
    assert {key: round(100 * more, 1) for key, more in counted.items() if more < 0} == {
        ("muon+cautious", "lstm"): -0.9,
        ("muon+palm", "lstm"): -1.5,
        ("kl-soap", "lstm"): -0.5,
        ("kl-soap-f10", "mlp"): -5.1,
        ("normuon-0.9", "mlp"): -2.9,
        ("normuon-0.99", "mlp"): -5.6,
    }
    for name, low, high in (("+ball", 0.15, 0.26), ("adamuon", 0.01, 0.18)):
        everywhere = [more for (variant, _), more in counted.items() if variant.endswith(name)]
        assert len(everywhere) == (6 if name == "+ball" else 3)
        assert (round(min(everywhere), 2), round(max(everywhere), 2)) == (low, high)
    worse = {key for key, more in counted.items() if more > 0 and not key[0].endswith(("+ball", "adamuon"))}
    assert worse == {
        *((name, "photo") for name in ("muon+lookahead", "soap+one-sided", "soap-0.95", "soap+palm")),
        *((name, workload) for name in ("kl-soap-f10", "moso", "soap+polar") for workload in ("lstm", "photo")),
        ("muon-0.95", "lstm"),
        ("kl-soap-0.95", "lstm"),
        ("kl-soap-0.99", "photo"),
    }
    assert all(found["moso", workload][0] > 0 for workload in benchmark.WORKLOADS)
    assert all(found["soap+one-sided", workload][0] > 0 for workload in benchmark.WORKLOADS)


def test_the_documentation_says_how_small_a_difference_counts() -> None:
    def least(name: str, workload: str) -> float:
        """In percent, if the other side's seeds are as far apart."""
        losses = benchmark.outcome(FOUND, name, workload)[0]
        return 100 * 2 * stdev(losses) / 3**0.5 / fmean(losses)

    for workload, said in (("lstm", [0.3]), ("photo", [2, 4]), ("mlp", [6, 8])):
        ends = sorted(least(name, workload) for name in ("muon", "soap"))
        digits = 1 if workload == "lstm" else 0
        assert sorted({round(end, digits) for end in ends}) == said


def test_the_lookahead_is_lower_seed_by_seed_as_said() -> None:
    (ahead, _), (base, _) = (benchmark.outcome(FOUND, name, "mlp") for name in ("soap+lookahead", "soap"))
    lower = sorted(round(100 * (1 - ours / theirs)) for ours, theirs in zip(ahead, base, strict=True))
    assert (lower[0], lower[-1]) == (3, 7)
