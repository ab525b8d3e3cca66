"""The sweeps from which the race's presets come: for every contender the same number of trials.

    python benchmarks/sweeps.py                     # all, about 45 minutes on two cores
    python benchmarks/sweeps.py soap muon           # some
    python benchmarks/sweeps.py --collect runs/sweeps   # only gather what was run before

Each contender tries four learning rates times two values of the option that matters most to it, 300 steps on `stdlib`,
one seed. Every trial's settings and final validation loss go to benchmarks/results/sweeps.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from steepest.lab.contenders import parse_sweep

RESULTS = Path(__file__).parent / "results" / "sweeps.json"
FACTOR_DECAY = "shampoo_beta=0.9,0.95"
MOMENTUM = "momentum=0.9,0.95"
AXES = {
    "adamw": ("lr=2.5e-3,5e-3,1e-2,2e-2", "betas=(0.8,0.95),(0.9,0.95)"),
    "soap": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "soap-f5": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "soap-f10": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "kl-soap": ("lr=5e-3,1e-2,2e-2,4e-2", "kl_floor=1e-4,0.0"),
    "rekls": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "moso": ("lr=6e-4,1.25e-3,2.5e-3,5e-3", "inner='adam','rmsprop'"),
    "muon": ("lr=1e-2,2e-2,4e-2,8e-2", MOMENTUM),
    "normuon": ("lr=1e-2,2e-2,4e-2,8e-2", MOMENTUM),
    "adamuon": ("lr=5e-3,1e-2,2e-2,4e-2", MOMENTUM),
    "shampoo": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "kl-shampoo": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "dion": ("lr=5e-3,1e-2,2e-2,4e-2", MOMENTUM),
    "dion2": ("lr=5e-3,1e-2,2e-2,4e-2", "ef_decay=0.9,0.95"),
    "lion": ("lr=5e-4,1e-3,2e-3,4e-3", "betas=(0.9,0.99),(0.95,0.98)"),
}


def command(name: str, folder: Path) -> list[str]:
    """What runs one contender's sweep."""
    sweep = [word for axis in AXES[name] for word in ("--sweep", axis)]
    return ["steepest", "race", "--optimizers", name, *sweep, "--steps", "300", "--seeds", "1", "--out", str(folder)]


def collect(name: str, folder: Path) -> list[dict[str, Any]]:
    """Settings and final validation loss of each trial of a contender's grid in a race's folder, best first."""
    axes = dict(axis.partition("=")[::2] for axis in AXES[name])
    wanted = {
        option: [repr(value) for value in parse_sweep(f"{option}={text}")[option]] for option, text in axes.items()
    }
    trials = []
    for path in folder.glob("runs/*.json"):
        run = json.loads(path.read_text())
        contender, record = run["identity"]["contender"], run["record"]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in contender["options"].items()}
        if any(repr(values.get(option)) not in texts for option, texts in wanted.items()):
            continue
        final = record["validation"][-1][1] if record["status"] == "finished" else None
        kept = {"options": contender["options"], "seed": run["identity"]["seed"], "steps": run["identity"]["steps"]}
        trials.append(kept | {"status": record["status"], "final_loss": final})
    return sorted(trials, key=lambda trial: (trial["final_loss"] is None, trial["final_loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="contenders; all unless given")
    parser.add_argument("--collect", type=Path, help="a folder of earlier sweeps, one folder a contender")
    args = parser.parse_args()
    base = args.collect or Path("runs/sweeps")
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names or AXES:
        words = command(name, base / name)
        if args.collect is None:
            subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:]], check=True)
        trials = collect(name, base / name)
        if trials:
            known[name] = {"command": " ".join(words[:-2]), "trials": trials}
            best = trials[0]
            print(f"{name:12} {len(trials):3} trials, best {best['final_loss']} at {best['options']}")
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
