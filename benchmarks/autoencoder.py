"""What second order buys on a deep autoencoder, at equal tuning: AdamW, SOAP, K-FAC and EKFAC.

    python benchmarks/autoencoder.py                     # all, about 10 minutes on one core
    python benchmarks/autoencoder.py "soap f=1" kfac     # some rows; the others' figures stay
    python benchmarks/autoencoder.py --table             # only print the table of what was measured

Every row is tuned with 8 settings on seed 0, and the best runs with seeds 1, 2 and 3; the row "defaults" is not tuned.
The learning rate is constant in the first half and falls to 0 in the second. The excess over the entropy of the data is
that on all training images, every 10 steps (`steepest.lab.workloads.autoencoder`). Seconds are CPU time of one thread
without these evaluations, and rows take turns, seed by seed. All trials go to benchmarks/results/autoencoder.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steepest
from steepest.lab.race.meters import stopwatch
from steepest.lab.race.stepping import stepper
from steepest.lab.race.training import validate
from steepest.lab.workloads.autoencoder import Autoencoder

RESULTS = Path(__file__).parent / "results" / "autoencoder.json"
SEEDS, EVERY, LEVELS = (1, 2, 3), 10, (1.5, 0.9)
Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """An optimizer, the settings that it tries, and its number of steps."""

    make: Make
    """Returns the optimizer of a model with one setting."""
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    steps: int = 400

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All combinations along the axes."""
        return [dict(zip(self.axes, point, strict=True)) for point in itertools.product(*self.axes.values())]


def adamw(model: nn.Module, beta2: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, beta2), weight_decay=0.0, **options)


def soap(frequency: int) -> Make:
    """SOAP of all matrices, the first and the last one too."""

    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        every = {"precondition_frequency": frequency, "weight_decay": 0.0}
        return steepest.SOAP(model.parameters(), **every, **options)

    return make


def kfac(name: str, fisher: str) -> Make:
    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return getattr(steepest, name)(model, lr=1.0, fisher=fisher, **options)

    return make


ADAMWS = {"lr": (5e-3, 1e-2, 2e-2, 4e-2), "beta2": (0.95, 0.999)}
SOAPS = {"lr": (1e-2, 2e-2, 4e-2, 8e-2), "shampoo_beta": (0.9, 0.95)}
CLIPS = (1e-2, 3e-2)
KFACS = {"damping": (3e-4, 1e-3, 3e-3, 1e-2), "kl_clip": CLIPS}
DAMPED = {"damping": (1e-2, 3e-2, 1e-1, 3e-1), "kl_clip": CLIPS}
"""The empirical Fisher matrix is best with more damping."""
ROWS: dict[str, Row] = {
    "adamw": Row(adamw, ADAMWS),
    "adamw, 1400 steps": Row(adamw, ADAMWS, 1400),
    "soap f=1": Row(soap(1), SOAPS),
    "soap f=5": Row(soap(5), SOAPS),
    "kfac, defaults": Row(kfac("KFAC", "sampled")),
    "kfac": Row(kfac("KFAC", "sampled"), KFACS),
    "kfac, 730 steps": Row(kfac("KFAC", "sampled"), KFACS, 730),
    "kfac, empirical": Row(kfac("KFAC", "empirical"), DAMPED),
    "ekfac": Row(kfac("EKFAC", "sampled"), KFACS),
}


def rate(step: int, steps: int) -> float:
    """The factor on the learning rate in a step, counted from 1."""
    return min(1.0, 2 * (1 - (step - 1) / steps))


def train(row: Row, setting: Mapping[str, Any], seed: int, workload: Autoencoder) -> dict[str, Any]:
    """Train once; returns the excess at the end and where it passed the levels, seconds, and the held-out error."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = row.make(model, **setting)
    way = stepper(model, optimizer, workload, torch.Generator().manual_seed(seed))
    highest = [group["lr"] for group in optimizer.param_groups]
    _, clock = stopwatch(model)
    seconds, excess, passed = 0.0, math.inf, {}
    for step in range(1, row.steps + 1):
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * rate(step, row.steps)
        start = clock()
        way.prepare()
        way.step()
        seconds += clock() - start
        if step % EVERY == 0:
            excess = validate(model, workload)
            for level in LEVELS:
                if excess <= level:
                    passed.setdefault(str(level), {"steps": step, "seconds": round(seconds, 2)})
    with torch.no_grad():
        held_out = workload.held_out_error(model)
    finite = math.isfinite(excess)
    found = {"setting": dict(setting), "seed": seed, "excess": round(excess, 4) if finite else None, "passed": passed}
    return found | {"seconds": round(seconds, 2), "held_out_error": round(held_out, 3) if finite else None}


def measure(names: Sequence[str], known: dict[str, Any]) -> None:
    """Tune each row with seed 0, then run the best with the other seeds, and write what was found."""
    workload = Autoencoder()
    train(Row(adamw, steps=20), {"lr": 1e-3, "beta2": 0.95}, 0, workload)  # first allocations
    best: dict[str, dict[str, Any]] = {}
    for name in names:
        row = ROWS[name]
        trials = [train(row, setting, 0, workload) for setting in row.settings] if row.axes else []
        best[name] = min(
            trials, key=lambda t: math.inf if t["excess"] is None else t["excess"], default={"setting": {}}
        )
        known[name] = {"steps": row.steps, "best": best[name]["setting"], "tuning": trials, "runs": []}
        print(f"{name}: {best[name]['setting']} of {[trial['excess'] for trial in trials]}", flush=True)
    for seed, name in itertools.product(SEEDS, names):
        known[name]["runs"].append(train(ROWS[name], best[name]["setting"], seed, workload))
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def table(known: Mapping[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| | final excess | steps (s) to 1.5 | steps (s) to 0.9 | s for all | held-out error |",
        "|---|" + "---|" * 5,
    ]
    for name in (name for name in ROWS if name in known):
        runs = known[name]["runs"]
        cells = [", ".join(f"{run['excess']:.3g}" if run["excess"] is not None else "diverged" for run in runs)]
        cells += [_level(runs, str(level)) for level in LEVELS]
        cells += [_range([run["seconds"] for run in runs], ".1f")]
        cells += [_range([run["held_out_error"] for run in runs if run["held_out_error"] is not None], ".2f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _level(runs: Sequence[Mapping[str, Any]], level: str) -> str:
    found = [run["passed"][level] for run in runs if level in run["passed"]]
    if not found:
        return "never"
    missing = f", {len(runs) - len(found)} never" if len(found) < len(runs) else ""
    steps, seconds = (_range([x[key] for x in found], form) for key, form in (("steps", "d"), ("seconds", ".1f")))
    return f"{steps} ({seconds}){missing}"


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; all unless given")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}")
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.table:
        measure(args.rows or list(ROWS), known)
    print(table(known))


if __name__ == "__main__":
    main()
