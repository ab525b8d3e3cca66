"""The sweeps from which the race's presets come: for every contender the same number of trials.

    python benchmarks/sweeps.py                     # all, about 45 minutes on two cores
    python benchmarks/sweeps.py soap muon           # some
    python benchmarks/sweeps.py --workload convnet  # a few contenders on another workload, 10 minutes
    python benchmarks/sweeps.py --collect runs/sweeps   # only gather what was run before

Each contender tries four learning rates times two values of the option that matters most to it, 300 steps on `stdlib`,
one seed. On the other workloads the second axis is the learning rate of what is no hidden matrix, except for AdamW,
where all have the same. Every trial's settings and final validation loss go to benchmarks/results/sweeps.json, those of
other workloads to sweeps_WORKLOAD.json. Whatever is no axis is as in the presets, or as in `STARTS`, which the presets
had before a second round (benchmarks/results/sweeps_memory.json).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from steepest.lab.shared.contenders import parse_sweep

RESULTS = Path(__file__).parent / "results"
FACTOR_DECAY = "shampoo_beta=0.9,0.95"
MOMENTUM = "momentum=0.9,0.95"
AXES: dict[str, tuple[str, ...]] = {
    "adamw": ("lr=2.5e-3,5e-3,1e-2,2e-2", "betas=(0.7,0.95),(0.8,0.95)"),
    "soap": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "soap-f5": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "soap-f10": ("lr=1e-2,2e-2,4e-2,8e-2", FACTOR_DECAY),
    "kl-soap": ("lr=5e-3,1e-2,2e-2,4e-2", "kl_floor=1e-4,0.0"),
    "kl-soap-f4": ("lr=1e-2,2e-2", "shampoo_beta=0.7,0.9", "betas=(0.8,0.95),(0.85,0.95)"),
    "rekls": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "moso": ("lr=6e-4,1.25e-3,2.5e-3,5e-3", "inner='adam','rmsprop'"),
    "muon": ("lr=1e-2,2e-2,4e-2,8e-2", MOMENTUM),
    "normuon": ("lr=1e-2,2e-2,4e-2,8e-2", MOMENTUM),
    "adamuon": ("lr=2e-2,4e-2,8e-2,1.6e-1", "momentum=0.8,0.9"),
    "shampoo": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "kl-shampoo": ("lr=5e-3,1e-2,2e-2,4e-2", FACTOR_DECAY),
    "dion": ("lr=1e-2,2e-2,4e-2,8e-2", "momentum=0.7,0.8"),
    "dion2": ("lr=2e-2,4e-2,8e-2,1.6e-1", "ef_decay=0.5,0.65"),
    "lion": ("lr=7.5e-4,1.5e-3,3e-3,6e-3", "betas=(0.7,0.8),(0.8,0.9)"),
}

OTHERS = "elementwise={'lr':5e-3,'betas':(0.9,0.95)}"
STARTS = dict.fromkeys(("soap", "soap-f5", "soap-f10", "kl-soap", "rekls"), f"betas=(0.9,0.95),{OTHERS}") | {
    "muon": f"momentum=0.9,{OTHERS}"
}
"""The settings of contenders whose presets have changed since."""

BETAS = "betas=(0.8,0.95),(0.9,0.95)"
REST_OF_CONVNET = "elementwise={'lr':4e-2},{'lr':8e-2}"
REST_OF_PHOTO = "elementwise={'lr':5e-3},{'lr':1e-2}"
WORKLOADS: dict[str, dict[str, tuple[str, ...]]] = {
    "stdlib": AXES,
    "convnet": {
        "adamw": ("lr=4e-2,8e-2,1.6e-1,3.2e-1", BETAS),
        "soap": ("lr=4e-2,8e-2,1.6e-1,3.2e-1", REST_OF_CONVNET),
        "kl-soap": ("lr=4e-2,8e-2,1.6e-1,3.2e-1", REST_OF_CONVNET),
        "muon": ("lr=4e-2,8e-2,1.6e-1,3.2e-1", REST_OF_CONVNET),
    },
    "photo": {
        "adamw": ("lr=5e-3,1e-2,2e-2,4e-2", BETAS),
        "soap": ("lr=5e-3,1e-2,2e-2,4e-2", REST_OF_PHOTO),
        "kl-soap": ("lr=5e-3,1e-2,2e-2,4e-2", REST_OF_PHOTO),
        "muon": ("lr=1e-2,2e-2,4e-2,8e-2", REST_OF_PHOTO),
    },
}
"""By workload and contender, the axes of its grid."""


def started(name: str) -> str:
    """A contender as it stood when its first sweep began, as the command line takes it."""
    return f"{name}({STARTS[name]})" if name in STARTS else name


def command(name: str, workload: str, folder: Path) -> list[str]:
    """What runs one contender's sweep."""
    sweep = [word for axis in WORKLOADS[workload][name] for word in ("--sweep", axis)]
    where = ["--steps", "300"] if workload == "stdlib" else ["--workload", workload]
    return ["steepest", "race", "--optimizers", started(name), *sweep, *where, "--seeds", "1", "--out", str(folder)]


def collect(sweep: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """Settings and final validation loss of each trial of a contender's grid in a race's folder, best first."""
    axes = [axis for text in sweep for axis in parse_sweep(text).items()]
    trials = []
    for path in folder.glob("runs/*.json"):
        run = json.loads(path.read_text())
        contender, record = run["identity"]["contender"], run["record"]
        if not all(any(has(contender, option, value) for value in values) for option, values in axes):
            continue
        final = record["validation"][-1][1] if record["status"] == "finished" else None
        kept = {"options": contender["options"]} | {
            x: contender[x] for x, values in axes if isinstance(values[0], dict)
        }
        kept |= {"seed": run["identity"]["seed"], "steps": run["identity"]["steps"]}
        trials.append(kept | {"status": record["status"], "final_loss": final})
    return sorted(trials, key=lambda trial: (trial["final_loss"] is None, trial["final_loss"]))


def has(contender: dict[str, Any], option: str, value: Any) -> bool:
    """Whether a contender, as a race's record has it, has this value of an option; a dict may be part of its own."""
    if isinstance(value, dict):
        return value.items() <= contender[option].items()
    return bool(contender["options"].get(option) == (list(value) if isinstance(value, tuple) else value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="contenders; all unless given")
    parser.add_argument("--workload", choices=WORKLOADS, default="stdlib")
    parser.add_argument("--workers", help="trials side by side; one per core unless given")
    parser.add_argument("--collect", type=Path, help="a folder of earlier sweeps, one folder a contender")
    args = parser.parse_args()
    sweeps, suffix = WORKLOADS[args.workload], "" if args.workload == "stdlib" else f"_{args.workload}"
    base = args.collect or Path(f"runs/sweeps{suffix}")
    results = RESULTS / f"sweeps{suffix}.json"
    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for name in args.names or sweeps:
        words = command(name, args.workload, base / name)
        if args.collect is None:
            workers = ["--workers", args.workers] if args.workers else []
            subprocess.run([str(Path(sys.executable).parent / words[0]), *words[1:], *workers], check=True)
        trials = collect(sweeps[name], base / name)
        if trials:
            known[name] = {"command": shlex.join(words[:-2]), "trials": trials}
            best = trials[0]
            print(f"{name:12} {len(trials):3} trials, best {best['final_loss']} at {best['options']}")
    results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
