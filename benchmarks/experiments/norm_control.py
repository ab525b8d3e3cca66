"""Do steps or weights of constant norm train better? Three ways, as hooks around optimizers as they are.

    python benchmarks/experiments/norm_control.py --fresh                # all: 4 rates each, then the best with 3 seeds
    python benchmarks/experiments/norm_control.py --fresh soap soap+rms  # some

Of each hidden matrix W, whose optimizer steps along D, 300 steps on `stdlib`:

    +ball   W ← R · unit(W - lr · R · unit(D))       weights stay on the sphere of their first norm R; no decay
    +rms    W ← (1 - lr·wd) W - lr · 0.2 · rms(D)    a root mean square of 0.2, as Muon has it
    +polar  W ← (1 - lr·wd) W - lr · muon(D)         the polar factor of D, on Muon's scale

All that was run is in benchmarks/results/norm_control.json, with the best of each. About an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial
from steepest.lab.shared.contenders import Contender, hidden_matrices, parse_contenders, preset
from steepest.lab.workloads.workload import load_workload
from steepest.linalg.polar import polar_factor
from steepest.rules.parts.scales import SCALES

sys.path.append(str(Path(__file__).parents[1]))
from sweeps import started

RESULTS = Path(__file__).parents[1] / "results" / "norm_control.json"
STEPS, SEEDS = 300, (0, 1, 2)
ANGLES = (1.25e-2, 2.5e-2, 5e-2, 1e-1, 2e-1)
RATES = {
    "adamw": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "soap": (1e-2, 2e-2, 4e-2, 8e-2),
    "kl-soap": (5e-3, 1e-2, 2e-2, 4e-2),
    "muon": (1e-2, 2e-2, 4e-2, 8e-2),
    "adamw+ball": ANGLES[:4],
    **{f"{name}+ball": ANGLES[1:] for name in ("soap", "kl-soap", "muon")},
    **{f"{name}+{way}": (1e-2, 2e-2, 4e-2, 8e-2) for name in ("soap", "kl-soap") for way in ("rms", "polar")},
}
"""Learning rates: as many for a variant as for the optimizer that it is made of."""


def unit(X: Tensor) -> Tensor:
    """``X`` with a Frobenius norm of 1."""
    return X / torch.linalg.vector_norm(X)


def ball(W: Tensor, D: Tensor, R: Tensor, lr: float, decay: float) -> Tensor:
    """On the sphere of radius R."""
    return R * unit(W - lr * R * unit(D))


def rms(W: Tensor, D: Tensor, R: Tensor, lr: float, decay: float) -> Tensor:
    """Along D with a root mean square of 0.2."""
    return (1 - lr * decay) * W - lr * 0.2 * D.numel() ** 0.5 * unit(D)


def polar(W: Tensor, D: Tensor, R: Tensor, lr: float, decay: float) -> Tensor:
    """Along the polar factor of D."""
    return (1 - lr * decay) * W - lr * SCALES["match_rms_adamw"](*D.shape) * polar_factor(D)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, float, float], Tensor]] = {"ball": ball, "rms": rms, "polar": polar}


@dataclass(frozen=True)
class Controlled(Contender):
    """A contender whose hidden matrices move another way along its directions."""

    way: str = ""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Its optimizer without decay of the matrices, and hooks that take the step back and take another."""
        matrices = list(hidden_matrices(model).values())
        undecayed = {**self.options, "weight_decay": 0.0}
        if self.elementwise is None:  # the rest keeps its rate, while that of the matrices means something else
            hidden = set(matrices)
            rest = {"params": [p for p in model.parameters() if p not in hidden], **preset(self.rule).options}
            optimizer: torch.optim.Optimizer = Optimizer(
                [{"params": matrices, **undecayed}, rest], self.rule, lr=self.lr
            )
        else:
            optimizer = Contender.optimizer(replace(self, options=undecayed), model)
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        radii = [torch.linalg.vector_norm(W.detach()) for W in matrices]
        before: list[Tensor] = []

        def keep(*_: Any) -> None:
            before[:] = [W.detach().clone() for W in matrices]

        @torch.no_grad()
        def move(*_: Any) -> None:
            for W, old, R in zip(matrices, before, radii, strict=True):
                lr = groups[W]["lr"]
                W.copy_(WAYS[self.way](old, (old - W) / lr, R, lr, self.options["weight_decay"]))

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(move)
        return optimizer


def contender(name: str, lr: float) -> Contender:
    """An optimizer as its first sweep began, but for the learning rate, controlled or not."""
    base, _, way = name.partition("+")
    plain = parse_contenders(started(base))[0].varied(lr=lr)
    if not way:
        return plain
    return Controlled(**{**vars(plain), "label": name}, way=way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RATES)}; all unless given")
    parser.add_argument("--fresh", action="store_true", help="run again what stands in the results already")
    args = parser.parse_args()
    names = args.names or list(RATES)
    torch.set_num_threads(1)
    workload = load_workload("stdlib")
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.fresh:
        known = {name: found for name, found in known.items() if name not in names}

    def final(name: str, lr: float, seed: int) -> float:
        trials = known.setdefault(name, {"best": None, "trials": []})["trials"]
        for trial in trials:
            if (trial["lr"], trial["seed"]) == (lr, seed):
                return float("inf") if trial["final_loss"] is None else float(trial["final_loss"])
        record = train(Trial("stdlib", contender(name, lr), STEPS, seed), workload, lambda _: None)
        loss = round(record.final, 4) if record.status == "finished" else None
        trials.append({"lr": lr, "seed": seed, "final_loss": loss})
        print(f"{name:14} lr {lr:<7g} seed {seed}: {loss}", flush=True)
        return float("inf") if loss is None else loss

    for name in names:
        best = min(RATES[name], key=lambda lr: final(name, lr, SEEDS[0]))
        losses = [final(name, best, seed) for seed in SEEDS]
        known[name]["best"] = {"lr": best, "final_losses": losses, "mean": round(fmean(losses), 4)}
        print(f"{name:14} lr {best:g}: mean {fmean(losses):.4f}", flush=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
