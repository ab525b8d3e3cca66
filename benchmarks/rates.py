"""The best learning rate of AdamW, Muon and SOAP on the language model, over its width, its depth, and the steps.

    python benchmarks/rates.py                  # widths 32 to 256, depths 2 to 8, 150 to 1200 steps
    python benchmarks/rates.py --budget 20      # starts no run after 20 minutes of CPU time
    python benchmarks/rates.py --widths 64 512  # width 512 (and the base) instead
    python benchmarks/rates.py --write          # only the plot and the tables of what was run before

One of the three varies, the other two stay at 64, 2 and 300. Rates are 0.01 · 2^k for integers k. Each optimizer walks
along them until the best has a worse neighbour on both sides, but tries no more than five; then a parabola through
these three in the logarithm of the rate has the best rate at its lowest point. Muon and SOAP (a refresh every 5 steps)
move the hidden matrices. All other parameters stay at the rate and betas that AdamW's preset has, in all runs, except
under AdamW itself, whose one rate is for everything. Whatever else is set is as in the presets of the race.

Each run is kept in benchmarks/results/rates.json when it ends, so that the same command goes on where it stopped.
docs/rates.svg and the tables in docs/coming-from-adamw.md are made from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial
from steepest.lab.shared.contenders import Contender, preset
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.suite.log import rows_from_json
from steepest.lab.suite.protocol import scaled
from steepest.lab.workloads.workload import load_workload

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/rates.json"
SUITE = ROOT / "benchmarks/results/suite.json"
PLOT = ROOT / "docs/rates.svg"
PAGE = ROOT / "docs/coming-from-adamw.md"

UNIT = 1e-2
"""The rate that has the index 0."""
MOST = 5
"""The most rates that an optimizer tries in a cell."""
NOISE = 0.02
"""What seeds differ by, in loss (benchmarks/results/norm_control.json): rates that lose less are as good."""


class Entrant(NamedTuple):
    """An optimizer: its name on the page, the index of the first rate that it tries, and how it is drawn."""

    title: str
    first: int
    colour: str
    marker: str


OPTIMIZERS = {
    "adamw": Entrant("AdamW", 0, "#555555", "s"),
    "soap-f5": Entrant("SOAP", 1, "#1f77b4", "o"),
    "muon": Entrant("Muon", 2, "#d62728", "^"),
}


class Cell(NamedTuple):
    """A model and a length of training."""

    width: int
    depth: int
    steps: int

    @property
    def workload(self) -> str:
        """The language model with this width and depth; its heads are 16 wide."""
        return f"stdlib(width={self.width}, depth={self.depth}, heads={max(self.width // 16, 1)})"

    def distance(self, other: Cell) -> float:
        """How far another cell is, in factors."""
        return sum(abs(math.log(a / b)) for a, b in zip(self, other, strict=True))


BASE = Cell(64, 2, 300)
AXES = {"width": "width", "depth": "depth (blocks)", "steps": "steps"}


def cell_of(line: Mapping[str, Any]) -> Cell:
    """The cell of a run or of a best rate."""
    return Cell(*(line[axis] for axis in AXES))


class Best(NamedTuple):
    """The best rate of an optimizer in a cell."""

    lr: float
    loss: float
    low: float | None
    high: float | None
    """Between these two the parabola loses less than `NOISE`; None where there is no parabola."""

    @property
    def edge(self) -> bool:
        """Whether the best rate that was tried has no worse one on both sides."""
        return self.low is None


def cells(widths: Iterable[int], depths: Iterable[int], steps: Iterable[int]) -> list[Cell]:
    """The base, then what varies one of its three numbers, in the order of its cost."""
    varied = {BASE, *(BASE._replace(width=w) for w in widths), *(BASE._replace(depth=d) for d in depths)}
    varied |= {BASE._replace(steps=s) for s in steps}
    return sorted(varied, key=lambda cell: (cell != BASE, cell.width * cell.depth * cell.steps, cell))


def rate(index: int) -> float:
    return float(f"{UNIT * 2.0**index:.6g}")


def next_index(tried: Mapping[int, float], start: int) -> int | None:
    """The index of the rate to try next, given the losses of those tried so far; None where the walk has ended."""
    if not tried:
        return start
    if len(tried) == MOST:
        return None
    best = _lowest(tried)
    return next((index for index in (best + 1, best - 1) if index not in tried), None)


def best_rate(tried: Mapping[int, float], unit: float = UNIT) -> Best:
    """The best rate, by a parabola through the best one that was tried and its two neighbours."""
    k = _lowest(tried)
    below, here, above = (tried.get(index, math.inf) for index in (k - 1, k, k + 1))
    bend = (below - 2 * here + above) / 2
    if not math.isfinite(below + above) or bend <= 0:
        return Best(unit * 2.0**k, here, None, None)
    offset, reach = (below - above) / (4 * bend), math.sqrt(NOISE / bend)
    at = unit * 2 ** (k + offset)
    return Best(at, here - bend * offset**2, at / 2**reach, at * 2**reach)


def _lowest(tried: Mapping[int, float]) -> int:
    """The index of the lowest loss; the lowest index if all have diverged."""
    return min(tried, key=lambda index: (tried[index], index))


class Ledger:
    """All runs so far, in a file that is complete after each of them."""

    def __init__(self, path: Path, text: str, fresh: bool = False) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() and not fresh else {}
        if found.get("text", text) != text:
            sys.exit(f"{path} has runs on the text of another Python: run with --fresh, or with that Python")
        self.trials: list[dict[str, Any]] = found.get("trials", [])
        self.facts = {"text": text, "machine": machine(), "versions": versions()}

    def add(self, name: str, cell: Cell, index: int, seed: int, loss: float, seconds: float) -> None:
        """Keep a run; one that has diverged has no loss."""
        kept = round(loss, 5) if math.isfinite(loss) else None
        self.trials.append(
            {"optimizer": name, **cell._asdict(), "lr": rate(index), "seed": seed, "final_loss": kept}
            | {"cpu_seconds": round(seconds, 1)}
        )
        write(
            self.path, json.dumps(self.facts | {"best": summary(self.trials), "trials": self.trials}, indent=1) + "\n"
        )


def losses(trials: Iterable[Mapping[str, Any]], name: str, cell: Cell) -> dict[int, dict[int, float]]:
    """The losses of an optimizer in a cell, by the rate's index and the seed."""
    found: dict[int, dict[int, float]] = {}
    for trial in trials:
        if trial["optimizer"] == name and cell == cell_of(trial):
            loss = math.inf if trial["final_loss"] is None else trial["final_loss"]
            found.setdefault(round(math.log2(trial["lr"] / UNIT)), {})[trial["seed"]] = loss
    return found


def means(found: Mapping[int, Mapping[int, float]]) -> dict[int, float]:
    """The mean loss of each rate, over the seeds that all of them have."""
    seeds = set.intersection(*map(set, found.values()))
    return {index: fmean(by_seed[seed] for seed in seeds) for index, by_seed in found.items()}


def summary(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best rate of each optimizer in each cell in which its walk has ended."""
    lines = []
    for name, cell in {(trial["optimizer"], cell_of(trial)): None for trial in trials}:
        tried = means(losses(trials, name, cell))
        if next_index(tried, 0) is None:
            best = best_rate(tried)
            figures = {key: value and float(f"{value:.4g}") for key, value in best._asdict().items()}
            lines.append({"optimizer": name, **cell._asdict(), **figures, "edge": best.edge})
    return lines


def contender(name: str, index: int) -> Contender:
    """The optimizer at a rate; what is no hidden matrix stays at the rate and betas of AdamW's preset."""
    theirs = preset(name)
    if theirs.elementwise is None:
        return theirs.varied(lr=rate(index))
    adamw = preset("adamw").options
    return theirs.varied(lr=rate(index), elementwise={"lr": adamw["lr"], "betas": adamw["betas"]})


def next_run(found: Mapping[int, Mapping[int, float]], start: int, seeds: int) -> tuple[int, int] | None:
    """The index of the rate, and the seed, to run next; None if nothing is left. Each rate has all seeds at once."""
    missing = [(index, seed) for index in found for seed in range(seeds) if seed not in found[index]]
    if missing:
        return missing[0]
    index = next_index(means(found) if found else {}, start)
    return None if index is None else (index, 0)


def measure(ledger: Ledger, todo: Sequence[Cell], names: Sequence[str], seeds: int, budget: float) -> bool:
    """Run what is missing, and return whether all was done within the budget of CPU seconds."""
    for cell, name in ((cell, name) for cell in todo for name in names):
        workload = load_workload(cell.workload)
        start = _start(ledger.trials, name, cell)
        while (run := next_run(losses(ledger.trials, name, cell), start, seeds)) is not None:
            if time.process_time() > budget:
                return False
            index, seed = run
            began, trial = time.process_time(), Trial(cell.workload, contender(name, index), cell.steps, seed)
            loss = train(trial, workload, lambda _: None).final
            ledger.add(name, cell, index, seed, loss, time.process_time() - began)
            print(f"{trial} of {cell.workload}: {loss:.4f}", flush=True)
    return True


def _start(trials: Sequence[Mapping[str, Any]], name: str, cell: Cell) -> int:
    """The index where the walk begins: at the best rate of the nearest cell that has one."""
    known = [line for line in summary(trials) if line["optimizer"] == name]
    if not known:
        return OPTIMIZERS[name].first
    nearest = min(known, key=lambda line: cell.distance(cell_of(line)))
    return round(math.log2(nearest["lr"] / UNIT))


class Row(NamedTuple):
    """The best rates of all optimizers on one task; None where an optimizer was not run to the end."""

    task: str
    best: Mapping[str, Best | None]

    def ratio(self, name: str) -> float | None:
        """An optimizer's best rate by AdamW's; None if one of them is not known, or at the edge of what was tried."""
        ours, theirs = self.best[name], self.best["adamw"]
        return None if ours is None or theirs is None or ours.edge or theirs.edge else ours.lr / theirs.lr


def measured(lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each cell."""
    found: dict[Cell, dict[str, Best | None]] = {}
    for line in lines:
        best = Best(line["lr"], line["loss"], line["low"], line["high"])
        found.setdefault(cell_of(line), dict.fromkeys(OPTIMIZERS))[line["optimizer"]] = best
    return [
        Row(f"width {cell.width}, depth {cell.depth}, {cell.steps} steps", found[cell])
        for cell in sorted(found, key=lambda cell: (cell.steps, cell.depth, cell.width))
    ]


def suited(results: Mapping[str, Any], names: Iterable[str] = OPTIMIZERS) -> list[Row]:
    """A row for each workload of the suite: the rate tuned there, between its neighbours, all of whose rates moved."""
    names = dict.fromkeys(names)
    losses = {
        (trial.workload, json.dumps(trial.settings, sort_keys=True)): trial.loss
        for trial in rows_from_json(results, str(SUITE))
        if trial.seed == 0 and trial.steps == _steps(results, trial.workload)
    }
    rows = []
    for workload in results["workloads"]:
        best: dict[str, Best | None] = dict.fromkeys(names)
        for name in results["cells"]["tuned"].keys() & names:
            if (cell := results["cells"]["tuned"][name].get(workload["name"])) is None:
                continue  # it can't train this one
            start = preset(name)
            k = round(math.log2(cell["settings"]["options"]["lr"] / start.lr))
            settings = {index: scaled(start, 2.0**index).settings() for index in (k - 1, k, k + 1)}
            keys = {index: (workload["name"], json.dumps(one, sort_keys=True)) for index, one in settings.items()}
            best[name] = best_rate({index: losses[key] for index, key in keys.items() if key in losses}, start.lr)
        rows.append(Row(f"`{workload['name']}`, {workload['steps']} steps", best))
    return rows


def _steps(results: Mapping[str, Any], name: str) -> int:
    """The length of a workload's runs."""
    steps: int = next(workload["steps"] for workload in results["workloads"] if workload["name"] == name)
    return steps


def table(rows: Sequence[Row], ends: bool = False) -> str:
    """A table of best rates; ``ends`` adds a line with the median of each ratio and the lowest and highest."""
    shown, others = [OPTIMIZERS[name].title for name in OPTIMIZERS], [name for name in OPTIMIZERS if name != "adamw"]
    lines = ["| | " + " | ".join(f"{title}'s best" for title in shown)]
    lines[0] += " | " + " | ".join(f"{OPTIMIZERS[name].title} / AdamW" for name in others) + " |"
    lines.append("|---" + "|--:" * (len(shown) + len(others)) + "|")
    for row in rows:
        cells = [
            row.task,
            *(_best(row.best[name]) for name in OPTIMIZERS),
            *(_ratio(row.ratio(name)) for name in others),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if ends:
        known = [[ratio for row in rows if (ratio := row.ratio(name)) is not None] for name in others]
        middle = [f"**{_ratio(median(of))}** ({_ratio(min(of))} to {_ratio(max(of))})" for of in known]
        lines.append("| **median (range)** |" + " |" * len(shown) + " " + " | ".join(middle) + " |")
    return "\n".join(lines)


def _best(best: Best | None) -> str:
    """A best rate with two digits, marked if it is at the edge of what was tried."""
    return "" if best is None else f"{best.lr:.2g}" + " (edge)" * best.edge


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}" if ratio >= 0.1 else f"{ratio:.1g}"


def all_ratios(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each optimizer's best rates by AdamW's over the workloads of the suite, for those of ours that it has."""
    names = [name for name in results["cells"]["tuned"] if "." not in name]  # others' have the name of their library
    rows = suited(results, names)
    return {
        name: sorted(ratio for row in rows if (ratio := row.ratio(name)) is not None)
        for name in names
        if name != "adamw"
    }


def table_of_all(results: Mapping[str, Any]) -> str:
    """The page's table of what each optimizer's best rates are by AdamW's."""
    lines = ["| | median | range | within a factor 2 of the median |", "|---|--:|--:|--:|"]
    for name, ratios in sorted(all_ratios(results).items(), key=lambda item: median(item[1])):
        middle = median(ratios)
        near = sum(middle / 2 <= ratio <= middle * 2 for ratio in ratios)
        ends = f"{_ratio(ratios[0])} to {_ratio(ratios[-1])}"
        lines.append(f"| `{name}` | {_ratio(middle)} | {ends} | {near} of {len(ratios)} |")
    return "\n".join(lines)


def with_tables(page: str, content: Mapping[str, Any]) -> str:
    """The page with what stands between its marks replaced."""
    suite = json.loads(SUITE.read_text())
    found = {
        "rates": table(measured(content["best"])),
        "workloads": table(suited(suite), ends=True),
        "ratios": table_of_all(suite),
    }
    for name, text in found.items():
        before, begin, rest = page.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"\n<!-- {name}:end -->")
        page = f"{before}{begin}{text}{end}{after}"
    return page


def plot(lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the best rates over width, depth and steps; bars reach as far as rates are as good as the best."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "steepest", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(AXES), figsize=(10, 4), sharey=True, layout="constrained")
    for ax, (axis, title) in zip(axes, AXES.items(), strict=True):
        ticks = set()
        for i, (name, style) in enumerate(OPTIMIZERS.items()):
            of = [line for line in lines if line["optimizer"] == name]
            along = sorted(
                (line[axis], line) for line in of if cell_of(line)._replace(**{axis: BASE._asdict()[axis]}) == BASE
            )
            ticks |= {x for x, _ in along}
            xs = [x * 1.04 ** (i - 1) for x, _ in along]  # side by side
            rates = [line["lr"] for _, line in along]
            ends = [
                (line["lr"] - (line["low"] or line["lr"]), (line["high"] or line["lr"]) - line["lr"])
                for _, line in along
            ]
            bars = [list(side) for side in zip(*ends, strict=True)]
            ax.errorbar(xs, rates, bars, color=style.colour, marker=style.marker, ms=5, capsize=3, label=style.title)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(sorted(ticks), [str(x) for x in sorted(ticks)])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
    rates = [rate(index) for index in range(-3, 5)]
    axes[0].set_yticks(rates, [f"{lr:g}" for lr in rates])
    axes[0].set_ylabel("best learning rate")
    axes[0].legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="32 64 128 256 unless given")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8], help="2 4 8 unless given")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[150, 300, 600, 1200], help="150 300 600 1200 unless given"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each run; 1 unless given")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes of CPU time after which no run starts")
    parser.add_argument("--fresh", action="store_true", help="run again what stands in the results already")
    parser.add_argument("--write", action="store_true", help="run nothing; draw the plot and write the page's tables")
    args = parser.parse_args()
    if not args.write:
        torch.set_num_threads(1)
        ledger = Ledger(RESULTS, load_workload("stdlib").describe()["sha256"], args.fresh)
        todo = cells(args.widths, args.depths, args.steps)
        if not measure(ledger, todo, list(OPTIMIZERS), args.seeds, args.budget * 60):
            print(f"stopped after {args.budget:g} minutes of CPU time; the same command goes on")
    content = json.loads(RESULTS.read_text())
    plot(content["best"])
    write(PAGE, with_tables(PAGE.read_text(), content))


if __name__ == "__main__":
    main()
