"""What ``steepest plan --gpu here`` predicts, against what the same steps take here.

    python benchmarks/predict.py --json benchmarks/results/predict.json
    python benchmarks/predict.py --shapes moe --depth 2 --optimizers "soap-f10, muon"

In each round the machine is measured and a step is predicted for each optimizer, and then all of them take steps in
turn on the same gradients, one thread, CPU time. A prediction knows the optimizer only by its counts of FLOPs and bytes
and by what a step of tiny matrices costs. Shown are medians over the rounds: of the mean over a period, and of the
longest step, in which all matrices refresh.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from steepest.lab.bench.entrants import Entrant, parse_entrants
from steepest.lab.bench.measure import measure
from steepest.lab.bench.shapes import ShapeSet, shape_set
from steepest.lab.plan.here import here
from steepest.lab.plan.models import Model, Weight
from steepest.lab.plan.plan import look, mesh
from steepest.lab.plan.time import period_of
from steepest.rule import Rule
from steepest.rules.adamw import AdamW
from steepest.view import View

OPTIMIZERS = "soap-f1, soap-f10, soap-f10(stagger=True), kl-soap-f10, moso, muon, adamw"
CPU = torch.device("cpu")
STEPS = 10
"""In a round; a multiple of every period."""


def model_of(entrant: Entrant, shapes: ShapeSet) -> Model:
    """Return the matrices of a set as a model to plan for, float32."""
    weights = tuple(
        Weight(f"{number:03}", shape, View(shape) if isinstance(entrant.rule, Rule) else None, 4)
        for number, shape in enumerate(shapes.matrices)
    )
    elementwise = AdamW() if isinstance(entrant.rule, Rule) else entrant.rule
    return Model(shapes.name, weights, entrant.label, entrant.rule, elementwise)


def predicted(entrant: Entrant, shapes: ShapeSet) -> tuple[float, float, int]:
    """Return milliseconds on the average and of the longest step, and bytes of state."""
    model = model_of(entrant, shapes)
    found = look(model, mesh("fsdp", 1), tokens=1, device=here(model, CPU))
    assert found.forecast is not None
    longest = found.forecast.staggered if entrant.settings.get("stagger") else found.forecast.worst
    return 1e3 * found.forecast.step, 1e3 * longest, round(found.state_max)


def rounds(entrants: Sequence[Entrant], shapes: ShapeSet, count: int) -> Iterator[list[dict[str, Any]]]:
    """Yield a row for each optimizer, after each round."""
    rows = [
        {"optimizer": one.label, "predicted_ms": [], "measured_ms": [], "predicted_longest_ms": []} for one in entrants
    ]
    warmup = 1 + max(period_of(one.rule) for one in entrants)
    for _ in range(count):
        for row, one in zip(rows, entrants, strict=True):
            mean, longest, state = predicted(one, shapes)
            row["predicted_ms"].append(mean)
            row["predicted_longest_ms"].append(longest)
            row["predicted_state_bytes"] = state
        found = measure(entrants, shapes.matrices, CPU, STEPS, warmup)
        for row, one in zip(rows, found, strict=True):
            if one.error:
                raise SystemExit(f"{one.entrant.label}: {one.error}")
            row["measured_ms"].append([1e3 * seconds for seconds in one.seconds])
            row["measured_state_bytes"] = one.state_bytes
        yield [row | summary(row) for row in rows]


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Return the medians over the rounds."""
    means = [fmean(steps) for steps in row["measured_ms"]]
    ratios = [p / m for p, m in zip(row["predicted_ms"], means, strict=True)]
    return {
        "predicted": median(row["predicted_ms"]),
        "measured": median(means),
        "ratio": median(ratios),
        "ratios": ratios,
        "longest_predicted": median(row["predicted_longest_ms"]),
        "longest_measured": median(max(steps) for steps in row["measured_ms"]),
        "state_ratio": row["predicted_state_bytes"] / row["measured_state_bytes"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of docs/scaling.md."""
    lines = [
        ("", "predicted", "measured", "ratio", "of rounds", "longest, predicted", "measured"),
        ("---", *["--:"] * 6),
    ]
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("predicted", "measured"))
        longest = (f"{row[key]:.1f}" for key in ("longest_predicted", "longest_measured"))
        spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
        lines.append((row["optimizer"], *times, f"{row['ratio']:.2f}", spread, *longest))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="gpt-tiny", help="as in steepest bench")
    parser.add_argument("--depth", type=int, help="only so many layers")
    parser.add_argument("--optimizers", default=OPTIMIZERS, help="as in steepest bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where figures go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = shape_set(args.shapes, args.depth)
    entrants = parse_entrants(args.optimizers, shapes.longest)
    print(f"{shapes}; predicted, measured and their ratio, ms of CPU time; longest step; state")
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    rows: list[dict[str, Any]] = []
    for rows in rounds(entrants, shapes, args.rounds):
        if args.json:  # as far as it came
            args.json.write_text(json.dumps(machine | {"shapes": str(shapes), "rows": rows}, indent=1) + "\n")
    for row in rows:
        times = f"{row['predicted']:9.2f}{row['measured']:9.2f}{row['ratio']:7.2f}"
        longest = f"{row['longest_predicted']:9.2f}{row['longest_measured']:9.2f}"
        print(f"{row['optimizer']:24}{times}   {longest}{row['state_ratio']:9.4f}")


if __name__ == "__main__":
    main()
