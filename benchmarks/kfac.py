"""What a training step of K-FAC costs: milliseconds, and the overhead over SGD, beside EKFAC's and SOAP's.

    python benchmarks/kfac.py                   # all, about 2 minutes on one core
    python benchmarks/kfac.py --rounds 3        # quick and rough
    python benchmarks/kfac.py --table           # only print the tables of what was measured

Two nets: an MLP 256-512-512-10 with batches of 256, and a convolutional net with 1-16-32 channels and a last layer of
512 by 10, with batches of 128. All optimizers train copies of one net in one process and take turns: in each round each
takes one whole period of its frequencies, and its time is that period's CPU time, divided by the steps; the figure is
the median of the rounds. The first steps, in which K-FAC is busier (``settle``), are left out.

With ``pip install asdfghjkl`` its K-FAC of the empirical Fisher matrix is measured too, by inverses as ours. Everything
goes to benchmarks/results/kfac.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steepest

RESULTS = Path(__file__).parent / "results" / "kfac.json"
Step = Callable[[], None]

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
        (256, 256),
    ),
    "CNN": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(512, 10)),
        ),
        (128, 1, 16, 16),
    ),
}
"""A net, and the shape of its batches."""


@dataclass(frozen=True)
class Row:
    """An optimizer: how it is made, and after how many steps all of its frequencies repeat."""

    make: Callable[[nn.Module], torch.optim.Optimizer]
    period: int
    backward: Callable[[nn.Module], Callable[[Tensor, Tensor], object]] | None = None
    """Makes a function that computes a batch's gradients, where that is not the plain backward pass."""


def kfac(kind: str, statistics: int, every: int, **options: Any) -> Row:
    frequencies = {"statistics_frequency": statistics, "precondition_frequency": every}
    return Row(lambda model: getattr(steepest, kind)(model, 1e-3, settle=0, **frequencies, **options), every)


def soap(every: int) -> Row:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return steepest.SOAP(model.parameters(), 1e-3, precondition_frequency=every)

    return Row(make, every)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def peer(statistics: int, every: int) -> Row:
    """ASDL's K-FAC, which preconditions gradients in its own forward and backward pass, and SGD."""

    def backward(model: nn.Module) -> Callable[[Tensor, Tensor], object]:
        import asdl

        if not torch.cuda.is_available():  # it marks ranges for a profiler that a CPU's build of torch has not
            setattr(torch.cuda.nvtx, "range", lambda *message: nullcontext())  # noqa: B010
        config = asdl.PreconditioningConfig(
            curvature_upd_interval=statistics,
            preconditioner_upd_interval=every,
            data_size=1,  # a scale of the statistics only, which takes no time
            damping=1e-2,
        )
        maker = asdl.KfacGradientMaker(model, config, fisher_type=asdl.FISHER_EMP)

        def gradients(x: Tensor, y: Tensor) -> object:
            maker.setup_loss_call(cross_entropy, maker.setup_model_call(model, x), y)
            return maker.forward_and_backward()

        return gradients

    return Row(sgd, every, backward)


FREQUENCIES = ((1, 1), (1, 10), (10, 100))
"""Steps from statistics to statistics, and from inversion to inversion."""
ROWS: dict[str, Row] = {
    "SGD": Row(sgd, 1),
    "AdamW": Row(lambda model: torch.optim.AdamW(model.parameters(), 1e-3), 1),
    **{f"KFAC {s}/{f}": kfac("KFAC", s, f) for s, f in FREQUENCIES},
    **{f"KFAC eigen {s}/{f}": kfac("KFAC", s, f, form="eigen") for s, f in FREQUENCIES},
    **{f"EKFAC {s}/{f}": kfac("EKFAC", s, f) for s, f in FREQUENCIES},
    **{f"SOAP {f}": soap(f) for _, f in FREQUENCIES},
    "KFAC, nothing due": kfac("KFAC", 10**6, 10**6),
}
PEERS = {f"ASDL KFAC {s}/{f}": peer(s, f) for s, f in FREQUENCIES}


def trained(row: Row, model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Return one training step of a copy of the model."""
    model = copy.deepcopy(model)
    backward = None if row.backward is None else row.backward(model)
    optimizer = row.make(model)

    def step() -> None:
        optimizer.zero_grad()
        if backward is None:
            cross_entropy(model(x), y).backward()
        else:
            backward(x, y)
        optimizer.step()

    return step


def measured(net: str, rows: Mapping[str, Row], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a step, by row."""
    torch.manual_seed(0)
    make, shape = NETS[net]
    x, y = torch.randn(shape), torch.randint(10, (shape[0],))
    model = make()
    steps = {name: trained(row, model, x, y) for name, row in rows.items()}
    periods = {name: row.period if row.period <= 100 else 10 for name, row in rows.items()}
    for name, step in steps.items():  # buffers are there, and phases begin anew
        for _ in range(max(periods[name], 2)):
            step()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds):
        for name in rotated(list(rows), number):
            calls = periods[name] * -(-10 // periods[name])  # ten steps at least
            start = time.process_time()
            for _ in range(calls):
                steps[name]()
            times[name].append((time.process_time() - start) / calls)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def table(net: str, found: Mapping[str, float]) -> str:
    """Return a markdown table: overheads are divided by SGD's time of a step."""
    base = found["SGD"]
    lines = [f"| {net} | ms per step | overhead over SGD, ms | in steps of SGD |", "|---|---|---|---|"]
    lines += [f"| {name} | {ms:.1f} | {ms - base:.1f} | {ms / base - 1:.2f} |" for name, ms in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each optimizer takes its turn")
    parser.add_argument("--nets", default=",".join(NETS), help=f"of {', '.join(NETS)}")
    parser.add_argument("--rows", default="", help="only rows whose names hold one of these words; SGD is one always")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures go")
    arguments = parser.parse_args()
    if arguments.table:
        results = json.loads(arguments.json.read_text())
    else:
        torch.set_num_threads(1)
        rows = ROWS | (PEERS if importlib.util.find_spec("asdl") else {})
        words = arguments.rows.split(",")
        rows = {name: row for name, row in rows.items() if name == "SGD" or any(word in name for word in words)}
        results = {"torch": torch.__version__, "rounds": arguments.rounds, "milliseconds": {}}
        for net in arguments.nets.split(","):
            results["milliseconds"][net] = measured(net, rows, arguments.rounds)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(table(net, found) for net, found in results["milliseconds"].items()))


if __name__ == "__main__":
    main()
