"""The same race with and without poison: what it costs when 1% of the gradients are not finite.

    python benchmarks/poison.py                                   # all, about half an hour on two cores
    python benchmarks/poison.py --optimizers "soap, muon" --seeds 2 --json poison.json

Each contender runs 300 steps on `stdlib` twice with every seed: as it is, and with NaN or infinite entries put into
each parameter's gradient with probability 0.01 at each step. Both runs of a seed have the same initial weights and
batches, so losses are compared in pairs. How far apart a pair may end by chance is seen in clean runs whose learning
rate is changed by a ten-thousandth: ``--controls`` names contenders that run these, too. torch.optim.AdamW, which takes
its step with whatever it is given, runs beside them. All losses go to benchmarks/results/race_poisoned.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from steepest.lab.race.training import train
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import Contender, preset
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.presets import PRESETS
from steepest.lab.workloads.workload import load_workload

RESULTS = Path(__file__).parent / "results" / "race_poisoned.json"
STEPS = 300
NUDGES = (0.9999, 1.0001)


class Torchs(Contender):
    """torch.optim.AdamW, with the settings of the race's AdamW."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """One that steps all parameters alike."""
        return torch.optim.AdamW(model.parameters(), **self.options)


def race(args: argparse.Namespace, poison: float, out: Path) -> dict[str, dict[str, Any]]:
    """The lines of a race's results, by contender; what was run before isn't run again."""
    command = ["race", "--optimizers", args.optimizers, "--steps", str(STEPS), "--seeds", str(args.seeds)]
    command += ["--poison", str(poison), "--workers", str(args.workers), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "steepest.cli", *command], check=True)
    return {line["contender"]: line for line in json.loads((out / "results.json").read_text())["contenders"]}


def pair(name: str, clean: dict[str, Any], poisoned: dict[str, Any]) -> dict[str, Any]:
    """One contender's losses by seed, and what the poison changed."""
    pairs = zip(clean["finals"], poisoned["finals"], strict=True)
    differences = [round(bad - good, 6) for good, bad in pairs if None not in (good, bad)]
    return {
        "contender": name,
        "clean": clean["finals"],
        "poisoned": poisoned["finals"],
        "difference": differences,
        "mean_difference": round(fmean(differences), 6) if differences else None,
        "gradients_poisoned": poisoned["gradients_poisoned"],
        "updates_skipped": poisoned["updates_skipped"],
    }


def torchs_adamw(poison: float, seeds: int) -> list[dict[str, Any]]:
    """How torch.optim.AdamW ends, by seed."""
    ours = preset("adamw")
    contender = Torchs("torch.optim.AdamW", ours.rule, ours.options, None, ours.warmup)
    records = [run(contender, seed, poison) for seed in range(seeds)]
    finals = [record.final if math.isfinite(record.final) else None for record in records]
    return [
        {"status": record.status, "steps": len(record.model_seconds), "final": final}
        for record, final in zip(records, finals, strict=True)
    ]


def nudged(name: str, seeds: int) -> dict[str, list[float]]:
    """Final losses of clean runs, seed by seed, at learning rates that are as good as the same."""
    contender = preset(name)
    return {
        f"lr * {factor}": [run(contender.varied(lr=contender.lr * factor), seed).final for seed in range(seeds)]
        for factor in NUDGES
    }


def run(contender: Contender, seed: int, poison: float = 0.0) -> Record:
    """One run, in this process."""
    return train(Trial("stdlib", contender, STEPS, seed, poison), load_workload("stdlib"), lambda news: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default=", ".join(PRESETS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--poison", type=float, default=0.01)
    parser.add_argument("--controls", nargs="*", default=["soap", "muon", "lion"], metavar="NAME")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/poison"), help="folder for the races")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to keep the figures")
    args = parser.parse_args()
    clean, poisoned = race(args, 0.0, args.out / "clean"), race(args, args.poison, args.out / "poisoned")
    rows = [pair(name, line, poisoned[name]) for name, line in clean.items()]
    for row in rows:
        print(f"{row['contender']:12}", *(f"{difference:+.4f}" for difference in row["difference"]))
    about = {"poison": args.poison, "steps": STEPS, "versions": versions(), "machine": machine(), "contenders": rows}
    torch.set_num_threads(1)
    about["torch.optim.AdamW"] = torchs_adamw(args.poison, args.seeds)
    about["clean, lr nudged"] = {name: nudged(name, args.seeds) for name in args.controls}
    args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
