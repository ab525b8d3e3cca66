"""The benchmark of learning rates: how it searches, what it found, and that the documentation says the same."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import rates as benchmark
from rates import BASE, Best, Cell, Row

ROOT = Path(__file__).parents[2]
FOUND = json.loads(benchmark.RESULTS.read_text())
SUITE = json.loads(benchmark.SUITE.read_text())


def walk(loss, start: int) -> dict[int, float]:
    """All that the search tries under a loss by index."""
    tried: dict[int, float] = {}
    while (index := benchmark.next_index(tried, start)) is not None:
        tried[index] = loss(index)
    return tried


@pytest.mark.parametrize(
    ("best", "start", "tried"),
    [
        (0, 0, {-1, 0, 1}),
        (2, 0, {0, 1, 2, 3, -1} - {-1}),
        (-2, 0, {1, 0, -1, -2, -3}),
        (3, 0, {0, 1, 2, 3, 4}),
        (9, 0, {0, 1, 2, 3, 4}),
        (-9, 0, {1, 0, -1, -2, -3}),
    ],
)
def test_the_walk_ends_where_the_best_rate_has_worse_neighbours(best, start, tried) -> None:
    found = walk(lambda index: (index - best) ** 2, start)
    assert set(found) == tried
    assert benchmark.best_rate(found).edge == (best not in range(-2, 4))


def test_the_walk_turns_away_from_what_diverges() -> None:
    found = walk(lambda index: math.inf if index > -2 else float(index**2), 0)
    assert min(found) == -3
    best = benchmark.best_rate(found)
    assert best.edge, "no parabola goes through a loss that is infinite"
    assert best.lr == benchmark.UNIT / 4


def test_a_parabola_gives_its_lowest_point() -> None:
    def loss(index: int) -> float:
        return 1.5 + 0.08 * (index - 1.3) ** 2

    best = benchmark.best_rate({index: loss(index) for index in range(4)})
    assert (best.lr, best.loss) == (pytest.approx(benchmark.UNIT * 2**1.3), pytest.approx(1.5))
    assert best.high == pytest.approx(best.lr * 2**0.5)  # there it loses 0.08 · 0.5², the noise
    assert best.low == pytest.approx(best.lr / 2**0.5)
    assert not best.edge


def test_one_number_varies_at_a_time_and_the_base_comes_first() -> None:
    found = benchmark.cells([32, 64], [2, 8], [150])
    assert found[0] == BASE
    assert set(found) == {BASE, Cell(32, 2, 300), Cell(64, 8, 300), Cell(64, 2, 150)}
    assert Cell(128, 4, 300).workload == "stdlib(width=128, depth=4, heads=8)"


def test_all_but_hidden_matrices_stay_at_the_rate_of_adamw() -> None:
    adamw, muon = benchmark.contender("adamw", 0), benchmark.contender("muon", 3)
    assert (adamw.lr, muon.lr) == (0.01, 0.08)
    assert adamw.elementwise is None
    assert muon.elementwise == {key: adamw.options[key] for key in ("lr", "betas", "weight_decay")}


@pytest.fixture
def trained(monkeypatch):
    """Trials that were run, whose losses are a parabola around 0.02; the clock counts a second for each."""
    trials = []

    def train(trial, workload, progress):
        trials.append(trial)
        return SimpleNamespace(final=1 + math.log2(trial.contender.lr / 0.02) ** 2 + 0.1 * trial.seed)

    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark, "load_workload", lambda spec: None)
    monkeypatch.setattr(benchmark.time, "process_time", lambda: float(len(trials)))
    return trials


def test_what_was_run_is_not_run_again(trained, tmp_path, capsys) -> None:
    path, todo = tmp_path / "rates.json", [BASE, Cell(32, 2, 300)]
    assert not benchmark.measure(benchmark.Ledger(path, "text"), todo, ["adamw", "muon"], 1, budget=5)
    assert len(trained) == len(json.loads(path.read_text())["trials"]) == 6  # it had 5 s after the fifth
    assert benchmark.measure(benchmark.Ledger(path, "text"), todo, ["adamw", "muon"], 1, math.inf)
    assert len({(str(trial), trial.workload) for trial in trained}) == len(trained)
    content = json.loads(path.read_text())
    assert [line["lr"] for line in content["best"]] == [pytest.approx(0.02)] * 4
    again = len(trained)
    assert benchmark.measure(benchmark.Ledger(path, "text"), todo, ["adamw", "muon"], 1, math.inf)
    assert len(trained) == again
    capsys.readouterr()


def test_more_seeds_are_added_to_each_rate(trained, tmp_path, capsys) -> None:
    path = tmp_path / "rates.json"
    for seeds in (1, 2):
        assert benchmark.measure(benchmark.Ledger(path, "text"), [BASE], ["adamw"], seeds, math.inf)
    content = json.loads(path.read_text())
    assert sorted(trial["seed"] for trial in content["trials"]) == [0] * 3 + [1] * 3
    assert content["best"][0]["loss"] == pytest.approx(1.05)  # the mean of the seeds
    capsys.readouterr()


def test_runs_on_another_text_are_not_mixed(tmp_path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"text": "one", "trials": []}))
    with pytest.raises(SystemExit, match="of another Python: run with --fresh"):
        benchmark.Ledger(path, "other")
    assert benchmark.Ledger(path, "other", fresh=True).trials == []


def test_ratios_leave_out_what_is_not_known() -> None:
    def row(adamw: Best | None, muon: Best | None) -> Row:
        return Row("", {"adamw": adamw, "muon": muon})

    known, edge = Best(0.01, 1.0, 0.005, 0.02), Best(0.04, 1.0, None, None)
    assert row(known, known._replace(lr=0.03)).ratio("muon") == pytest.approx(3)
    assert row(known, edge).ratio("muon") is row(edge, known).ratio("muon") is row(None, known).ratio("muon") is None


# What it found.


def test_the_results_are_those_of_their_trials() -> None:
    assert FOUND["best"] == benchmark.summary(FOUND["trials"])
    for name in benchmark.OPTIMIZERS:
        assert any(line["optimizer"] == name and benchmark.cell_of(line) == BASE for line in FOUND["best"])


def test_the_documentation_has_the_tables() -> None:
    """Write them with ``python benchmarks/rates.py --write``."""
    page = benchmark.PAGE.read_text()
    assert benchmark.with_tables(page, FOUND) == page
    assert benchmark.table(benchmark.measured(FOUND["best"])) in page
    assert benchmark.table(benchmark.suited(SUITE), ends=True) in page
    assert benchmark.table_of_all(SUITE) in page


def test_what_the_documentation_says_of_width_depth_and_length_is_so() -> None:
    """Whoever runs more reads the page again."""
    rates = {(line["optimizer"], benchmark.cell_of(line)): line["lr"] for line in FOUND["best"]}
    adamw, soap, muon = ({cell: lr for (of, cell), lr in rates.items() if of == name} for name in benchmark.OPTIMIZERS)
    lengths = [BASE._replace(steps=steps) for steps in (150, 300, 600, 1200)]
    widths = [BASE._replace(width=width) for width in (32, 64, 128, 256)]
    depths = [BASE._replace(depth=depth) for depth in (2, 4, 8)]
    assert [round(muon[cell] / adamw[cell], 1) for cell in lengths] == [5.6, 7.3, 2.3, 2.1]
    assert [round(soap[lengths[i]] / adamw[lengths[i]], 1) for i in (0, -1)] == [2.6, 0.9]
    assert [round(of[widths[0]] / of[widths[-1]], 1) for of in (adamw, soap, muon)] == [4.1, 2.6, 2.5]
    for of in (soap, muon):
        ratios = [of[cell] / adamw[cell] for cell in widths[1:]]
        assert max(ratios) / min(ratios) < 1.6
    assert [round(of[depths[0]] / of[depths[-1]], 1) for of in (adamw, muon)] == [1.5, 1.5]

    def spread(of: dict[Cell, float], cells: list[Cell]) -> float:
        return max(of[cell] for cell in cells) / min(of[cell] for cell in cells)

    assert spread(soap, depths) < 1.1
    assert all(spread(of, widths[1:]) > 2**0.5 for of in (adamw, soap, muon))
    lines = [line for line in FOUND["best"] if not line["edge"]]
    reach = [line["high"] / line["lr"] for line in lines]
    assert (round(min(reach), 1), round(max(reach), 1)) == (1.3, 2.9)


def test_the_documentation_advises_what_was_measured() -> None:
    """The factor on AdamW's rate is the power of two that is nearest to the median ratio over the workloads."""
    ratios = {row.task.split("`")[1]: row for row in benchmark.suited(SUITE)}
    advised = re.search(
        r"rate of hidden matrices, `lr` \| x \| (\d*)x,[^|]*\| (\d*)x,[^|]*", benchmark.PAGE.read_text()
    )
    assert advised is not None
    near = {}
    for name, factor in zip(("soap-f5", "muon"), (int(x or 1) for x in advised.groups()), strict=True):
        assert 2 ** round(math.log2(median(benchmark.all_ratios(SUITE)[name]))) == factor, name
        near[name] = {task for task, row in ratios.items() if factor / 2 <= (row.ratio(name) or 0) <= factor * 2}
    assert near["soap-f5"] == ratios.keys()
    assert ratios.keys() - near["muon"] == {"stdlib", "pinn"}  # what it says of these:
    assert "for language models in short runs 4x first, for physics-informed networks x/2" in advised[0]
    assert all(said / 2 <= ratios[task].ratio("muon") <= said * 2 for task, said in (("stdlib", 4), ("pinn", 0.5)))
    assert [round(ratios[task].ratio("muon") or 0, 1) for task in ("stdlib", "pinn")] == [5.6, 0.4]
    assert len(ratios) == 10
    starts = {"soap-f5": 1, "soap-f10": 1, "kl-soap-f4": 1, "muon": 2, "normuon": 2, "adamuon": 4, "dion2": 4}
    medians = {name: median(found) for name, found in benchmark.all_ratios(SUITE).items()}
    assert {name: 2.0 ** round(math.log2(medians[name])) for name in starts} == starts
    assert round(medians["shampoo"], 1) == 1.5
    assert 0.1 < medians["lion"] < 0.4  # "a third to a tenth"


ADVISED = {"moso": "a quarter of AdamW's", "dion": "four times AdamW's", "dion2": "eight in short runs"}


@pytest.mark.parametrize(("name", "words"), ADVISED.items())
def test_the_page_on_optimizers_starts_where_sweeps_were_best(name, words) -> None:
    sweeps = json.loads((benchmark.RESULTS.parent / "sweeps.json").read_text())
    lr, adamw = (
        min(sweeps[of]["trials"], key=lambda trial: trial["final_loss"])["options"]["lr"] for of in (name, "adamw")
    )
    multiple = {0.25: "a quarter", 2: "twice", 4: "four", 8: "eight"}[2 ** round(math.log2(lr / adamw))]
    assert words.startswith(multiple)
    section = (ROOT / "docs/which-optimizer.md").read_text().split("## What a learning rate means")[1]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{name}`"))
    assert words in row.split(" | ")[-1]
