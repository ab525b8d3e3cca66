"""Time of an optimizer step on GPT shapes, ours and a peer's in one process, in turn.

    python benchmarks/step_time.py                # needs: pip install pytorch_optimizer==4.1.0
    python benchmarks/step_time.py --steps 40 --frequency 1 --json benchmarks/results/step_time.json
    python benchmarks/step_time.py --family muon

Eight matrices (768×256, 256×256, 1024×256, 256×1024, twice), one thread, float32, CPU time of that thread. Contenders
take their steps alternately, a step each, on the same gradients, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import steepest

SHAPES = [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 2
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class MuonInFloat32(torch.optim.Muon):
    """torch.optim.Muon, its bfloat16 products made float32 ones."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, with `Tensor.bfloat16` standing for `Tensor.float`."""
        to_bfloat16, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.float
        try:
            return super().step(closure)
        finally:
            torch.Tensor.bfloat16 = to_bfloat16


def muons() -> dict[str, Make]:
    """The orthogonalizing family, and torch's own Muon as it is and in float32."""
    options = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95}
    return {
        "steepest.Muon": lambda params: steepest.Muon(params, **options),
        "steepest.Muon in float32": lambda params: steepest.Muon(params, **options, ns_dtype="float32"),
        "steepest.NorMuon": lambda params: steepest.NorMuon(params, **options),
        "torch.optim.Muon": lambda params: torch.optim.Muon(params, **options),
        "torch.optim.Muon in float32": lambda params: MuonInFloat32(params, **options),
    }


def soaps(frequency: int) -> dict[str, Make]:
    """SOAP and AdamW; peers join if they are installed."""
    options = {"lr": 1e-3, "betas": (0.95, 0.95), "precondition_frequency": frequency}
    makers: dict[str, Make] = {
        "steepest.SOAP": lambda params: steepest.SOAP(params, **options),
        "steepest.SOAP(stagger=True)": lambda params: steepest.SOAP(params, **options, stagger=True),
        "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    }
    try:
        import pytorch_optimizer
    except ImportError:
        print("pytorch_optimizer is not installed: no peer in this run")
    else:
        makers["pytorch_optimizer.SOAP"] = lambda params: pytorch_optimizer.SOAP(params, **options)
    return makers


def measure(makers: dict[str, Make], steps: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time per step, by contender."""
    crew = {}
    for name, make in makers.items():
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        crew[name] = (params, make(params))
    times: dict[str, list[float]] = {name: [] for name in crew}
    generator = torch.Generator().manual_seed(0)
    for step in range(warmup + steps):
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for name, (params, optimizer) in crew.items():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            start = time.thread_time()
            optimizer.step()
            if step >= warmup:
                times[name].append(1e3 * (time.thread_time() - start))
    return times


def report(times: dict[str, list[float]]) -> list[dict[str, float | str]]:
    """Print a table, ratios being to the last contender, a peer if there is one, and return its rows."""
    means = {name: statistics.mean(values) for name, values in times.items()}
    peer = list(means)[-1]
    print(f"{'':32}{'mean':>8}{'median':>8}{'p95':>8}{'max':>8}{'max/mean':>10}   ratio to {peer}")
    rows: list[dict[str, float | str]] = []
    for name, values in times.items():
        ordered = sorted(values)
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        row = {
            "mean": means[name],
            "median": statistics.median(values),
            "p95": p95,
            "max": ordered[-1],
            "max_over_mean": ordered[-1] / means[name],
            "ratio": means[name] / means[peer],
        }
        numbers = "".join(f"{row[key]:8.1f}" for key in ("mean", "median", "p95", "max"))
        print(f"{name:32}{numbers}{row['max_over_mean']:10.2f}{row['ratio']:10.2f}")
        rows.append({"optimizer": name, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps measured; a multiple of the frequency")
    parser.add_argument("--warmup", type=int, default=11, help="steps before: first bases, first refreshes")
    parser.add_argument("--family", choices=["soap", "muon"], default="soap")
    parser.add_argument("--frequency", type=int, default=10, help="steps from refresh to refresh")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, ms of CPU time")
    print(f"refreshes every {args.frequency} steps")
    crew = soaps(args.frequency) if args.family == "soap" else muons()
    rows = report(measure(crew, args.steps, args.warmup))
    if args.json:
        about = {"torch": torch.__version__, "frequency": args.frequency, "steps": args.steps, "rows": rows}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
