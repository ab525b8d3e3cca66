"""Which tricks gain anything? Options and small changes, each on top of the optimizer that it belongs to.

    python benchmarks/experiments/variants.py                                        # all
    python benchmarks/experiments/variants.py --budget 20                            # minutes of CPU time
    python benchmarks/experiments/variants.py --variants muon soap --workloads lstm  # some
    python benchmarks/experiments/variants.py --write                                # tables of what was run before

All runs have 1,200 steps and the schedule of the race. The rates of an optimizer, that of hidden matrices and that of
the rest together, are its preset's times 2^k for integers k. First a base walks along k from 0, until the best rate
has a worse one on both sides. A variant tries the best k of its base and both neighbours, and one further if the best
of the three has no worse one on both sides. All this with one seed; then the best rate runs with the other seeds.

Two bases: Muon, and SOAP with a refresh every 5 steps. Everything else is as in their presets, momentum too.

Each run is kept in benchmarks/results/experiments.json when it ends, so that the same command goes on where it stopped.
The tables of docs/tried.md are made from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial, loss
from steepest.lab.shared.contenders import Contender, hidden_matrices, preset
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.suite.protocol import scaled, significant
from steepest.lab.workloads.workload import load_workload
from steepest.linalg.polar import polar_factor
from steepest.rule import State, Step
from steepest.rules import RULES
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.scales import SCALES
from steepest.rules.soap import Soap

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/experiments.json", ROOT / "docs/tried.md"
WORKLOADS = ("lstm", "mlp", "photo")
STEPS, SEEDS = 1200, 3
MOST, MOST_OF_BASE = 4, 8
"""The most rates that a variant tries, and a base, whose preset may be far off."""

# Changes of rules.


@dataclass(frozen=True, kw_only=True)
class PolarSoap(Soap):
    """The polar factor of SOAP's direction, on Muon's scale."""

    name: ClassVar[str] = "soap+polar"

    @override
    def direction(self, G: Tensor, factors: Factors, step: Step) -> Tensor:
        D = super().direction(G, factors, step)
        return polar_factor(D) * SCALES["match_rms_adamw"](*D.shape[1:])


@dataclass(frozen=True, kw_only=True)
class OneSidedSoap(Soap):
    """SOAP that rotates the shorter side only, the rows of a square matrix."""

    name: ClassVar[str] = "soap+one-sided"

    @override
    def init(self, G: Tensor) -> State:
        longer = "L" if G.shape[1] > G.shape[2] else "R"
        return {name: x for name, x in super().init(G).items() if name not in (longer, f"Q_{longer}")}


# Changes around a step, as hooks.


def ball(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], None]:
    """Hidden matrices go back to the sphere of their first norm: ``W ← R W / ‖W‖``."""
    matrices = list(hidden_matrices(model).values())
    radii = [torch.linalg.vector_norm(W.detach()) for W in matrices]

    def after_step() -> None:
        for W, R in zip(matrices, radii, strict=True):
            W.mul_(R / torch.linalg.vector_norm(W))

    return after_step


def lookahead(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, gamma: float = 0.97, beta: float = 0.3
) -> Callable[[], None]:
    """EMA-Nesterov (arXiv:2605.25395): gradients are taken ahead, where the average displacement leads to.

    E ← γ E + (1-γ) (x - x of the last step),  x ← x + β lr/lr_max E
    """
    groups = [(group, group["lr"]) for group in optimizer.param_groups]
    before = {p: p.detach().clone() for p in model.parameters()}
    E = {p: torch.zeros_like(p) for p in before}

    def after_step() -> None:
        for group, highest in groups:
            for p in group["params"]:
                E[p].lerp_(p - before[p], 1 - gamma)
                before[p].copy_(p)
                p.add_(E[p], alpha=beta * group["lr"] / highest)

    return after_step


def tail(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, share: float = 0.2) -> Callable[[], None]:
    """At the end, weights are the mean of those after each step of the last fifth."""
    means = {p: torch.zeros_like(p) for p in model.parameters()}
    count, wanted = 0, round(share * steps)

    def after_step() -> None:
        nonlocal count
        count += 1
        for p, mean in means.items() if count > steps - wanted else ():
            mean.add_(p, alpha=1 / wanted)
            if count == steps:
                p.copy_(mean)

    return after_step


HOOKS: Mapping[str, Callable[[nn.Module, torch.optim.Optimizer, int], Callable[[], None]]] = {
    "ball": ball,
    "lookahead": lookahead,
    "tail": tail,
}


@dataclass(frozen=True)
class Hooked(Contender):
    """A contender after each of whose steps something else happens."""

    hook: str = ""
    steps: int = STEPS

    @override
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        after_step = torch.no_grad()(HOOKS[self.hook](model, optimizer, self.steps))
        optimizer.register_step_post_hook(lambda *_: after_step())
        return optimizer


# The variants.


class Variant(NamedTuple):
    """What it is called on the page, what it is compared with, and how it differs from that."""

    title: str
    base: str
    rule: str = ""
    options: Mapping[str, Any] = {}
    hook: str = ""
    preset: str = ""
    """Where options come from instead; what is no hidden matrix is stepped as by the base."""


def on_both(name: str, title: str, **changes: Any) -> dict[str, Variant]:
    """The same change of Muon and of SOAP."""
    titles = {"muon": "Muon", "soap": "SOAP"}
    return {f"{base}+{name}": Variant(f"{titles[base]}, {title}", base, **changes) for base in titles}


VARIANTS: Mapping[str, Variant] = {
    "muon": Variant("Muon", "", preset="muon"),
    "soap": Variant("SOAP", "", preset="soap-f5"),
    "normuon": Variant("NorMuon, `beta2=0.95`", "muon", "normuon", {"beta2": 0.95}),
    **on_both("cautious", "cautious decay", options={"weight_decay_method": "cautious"}),
    **on_both("lookahead", "lookahead", hook="lookahead"),
    "kl-soap": Variant("KL-SOAP, f = 4", "soap", "kl-soap", {"precondition_frequency": 4}),
    **on_both("ball", "weights on a sphere", hook="ball"),
    **on_both("tail", "mean of the last fifth", hook="tail"),
    "soap+one-sided": Variant("SOAP, shorter side only", "soap", "soap+one-sided"),
    "moso": Variant("MOSO", "soap", preset="moso"),
    **on_both("palm", 'decay "palm"', options={"weight_decay_method": "palm"}),
    "muon-0.95": Variant("Muon, `momentum=0.95`", "muon", "", {"momentum": 0.95}),
    "soap-0.95": Variant("SOAP, `betas=(0.95, 0.95)`", "soap", "", {"betas": (0.95, 0.95)}),
    "kl-soap-f1": Variant("KL-SOAP, f = 1", "kl-soap", "", {"precondition_frequency": 1}),
    "kl-soap-f10": Variant("KL-SOAP, f = 10", "kl-soap", "", {"precondition_frequency": 10}),
    "kl-soap-0.95": Variant("KL-SOAP, `shampoo_beta=0.95`", "kl-soap", "", {"shampoo_beta": 0.95}),
    "kl-soap-0.99": Variant("KL-SOAP, `shampoo_beta=0.99`", "kl-soap", "", {"shampoo_beta": 0.99}),
    "soap+polar": Variant("SOAP, then the polar factor", "soap", "soap+polar", {"lr": 6e-2}),
    "adamuon": Variant("AdaMuon", "muon", "adamuon"),
    "normuon-0.99": Variant("NorMuon, `beta2=0.99`", "normuon", "", {"beta2": 0.99}),
    "normuon-0.9": Variant("NorMuon, `beta2=0.9`", "normuon", "", {"beta2": 0.9}),
}
"""In the order in which they run: what most people would like to know comes first."""

TABLES: Mapping[str, Sequence[str]] = {
    "normuon": ("muon", "normuon", "adamuon", "normuon-0.9", "normuon-0.99"),
    "kl": ("soap", "kl-soap", "kl-soap-f1", "kl-soap-f10", "kl-soap-0.95", "kl-soap-0.99"),
    "one-sided": ("soap", "soap+one-sided", "moso"),
    "decay": ("muon", "muon+cautious", "muon+palm", "soap", "soap+cautious", "soap+palm"),
    "memory": ("muon", "muon+lookahead", "muon-0.95", "soap", "soap+lookahead", "soap-0.95"),
    "averaging": ("muon", "muon+tail", "soap", "soap+tail"),
    "norms": ("muon", "muon+ball", "soap", "soap+ball", "soap+polar"),
}
SAME_DECAY = 1.382
"""The sum of a schedule's rates by that of their squares, where the highest is 1."""


def contender(name: str, index: int = 0, steps: int = STEPS) -> Contender:
    """The variant with 2^index times the rates of its preset."""
    _, base, rule, options, hook, start = VARIANTS[name]
    found = preset(start) if start else contender(base)
    if start and base:
        found = replace(found, elementwise=contender(base).elementwise)
    found = scaled(replace(found.varied(**options), label=name, rule=rule or found.rule), 2.0**index)
    if options.get("weight_decay_method") == "palm":  # all in all as much decay as without
        found = found.varied(weight_decay=found.options["weight_decay"] * SAME_DECAY / found.lr)
    return Hooked(**{**vars(found), "hook": hook, "steps": steps}) if hook else found


# The search.

Trials = Sequence[Mapping[str, Any]]
Losses = Mapping[int, Mapping[int, float]]
"""By the rate's index and the seed."""


def losses(trials: Trials, name: str, workload: str, steps: int = STEPS) -> Losses:
    """The losses of a variant on a workload; infinite where it diverged."""
    found: dict[int, dict[int, float]] = {}
    for t in trials:
        if (t["variant"], t["workload"], t["steps"]) == (name, workload, steps):
            found.setdefault(t["index"], {})[t["seed"]] = math.inf if t["final_loss"] is None else t["final_loss"]
    return found


def lowest(tried: Losses) -> int:
    """The index of the best rate of the first seed; the lowest one if all have diverged."""
    return min(tried, key=lambda index: (tried[index][0], index))


def next_run(tried: Losses, start: int, most: int, seeds: int = SEEDS) -> tuple[int, int] | None:
    """The index of the rate, and the seed, to run next; None if nothing is left."""
    if not tried:
        return start, 0
    best = lowest(tried)
    if len(tried) < most and (beside := {best - 1, best + 1} - set(tried)):
        return max(beside), 0
    return next(((best, seed) for seed in range(seeds) if seed not in tried[best]), None)


def measure(
    trials: list[Any], names: Sequence[str], workloads: Sequence[str], seeds: int, steps: int, budget: float
) -> bool:
    """Run what is missing, keep each run, and return whether all was done within the budget of CPU seconds."""
    for name, workload in ((name, workload) for name in names for workload in workloads):
        base = VARIANTS[name].base
        start, most = (lowest(losses(trials, base, workload, steps)), MOST) if base else (0, MOST_OF_BASE)
        while run := next_run(losses(trials, name, workload, steps), start, most, seeds):
            if (began := time.process_time()) > budget:
                return False
            trial = Trial(workload, contender(name, run[0], steps), steps, run[1])
            final = train(trial, load_workload(workload), lambda _: None).final
            kept = {"variant": name, "workload": workload, "steps": steps, "index": run[0], "lr": trial.contender.lr}
            kept |= {"seed": run[1], "final_loss": float(f"{final:.6g}") if math.isfinite(final) else None}
            trials.append(kept | {"cpu_seconds": round(time.process_time() - began, 1)})
            content = {"machine": machine(), "versions": versions(), "trials": trials}
            write(RESULTS, json.dumps(content, indent=1) + "\n")
            print(f"{workload}, {trial}: {final:.6g}", flush=True)
    return True


# The page.


def outcome(trials: Trials, name: str, workload: str) -> tuple[list[float], bool] | None:
    """The losses of the best rate by seed, and whether a rate on one side of it was not tried; None before the end."""
    tried = losses(trials, name, workload)
    if not tried or next_run(tried, 0, MOST if VARIANTS[name].base else MOST_OF_BASE):
        return None
    best = lowest(tried)
    return [tried[best][seed] for seed in range(SEEDS)], not {best - 1, best + 1} <= set(tried)


def compared(trials: Trials, name: str, workload: str) -> tuple[float, bool] | None:
    """A variant's mean loss by its base's, less 1, and whether the difference counts; None before both have ended."""
    ours, base = outcome(trials, name, workload), outcome(trials, VARIANTS[name].base or name, workload)
    return (fmean(ours[0]) / fmean(base[0]) - 1, significant(ours[0], base[0])) if ours and base else None


def cell(trials: Trials, name: str, workload: str) -> str:
    """The mean final loss, and by how much it is above the base's, bold if that counts."""
    ours, found = outcome(trials, name, workload), compared(trials, name, workload)
    if ours is None or found is None:
        return ""
    shown = (loss(fmean(ours[0])) if math.isfinite(fmean(ours[0])) else "diverged") + " (edge)" * ours[1]
    more, counts = found
    return shown + (f", **{more:+.1%}**" if counts else f", {more:+.1%}") * bool(VARIANTS[name].base)


def table(trials: Trials, names: Sequence[str]) -> str:
    """One of the page's tables."""
    workloads = list(dict.fromkeys(trial["workload"] for trial in trials if trial["steps"] == STEPS))
    rows = [[VARIANTS[name].title, *(cell(trials, name, workload) for workload in workloads)] for name in names]
    head = f"| | {' | '.join(f'`{workload}`' for workload in workloads)} |\n|---{'|--:' * len(workloads)}|"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows if any(row[1:]))])


def with_tables(page: str, trials: Trials) -> str:
    """The page with what stands between its marks replaced."""
    for name, names in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n{table(trials, names)}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="all unless given")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), help=f"{' '.join(WORKLOADS)} unless given")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the best rate; {SEEDS} unless given")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"other than {STEPS}: a trial that no table shows")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes of CPU time after which no run starts")
    parser.add_argument("--write", action="store_true", help="run nothing; write the page's tables")
    args = parser.parse_args()
    trials = json.loads(RESULTS.read_text())["trials"] if RESULTS.exists() else []
    if not args.write:
        torch.set_num_threads(1)
        RULES.update({rule.name: rule for rule in (PolarSoap, OneSidedSoap)})
        if not measure(trials, args.variants, args.workloads, args.seeds, args.steps, args.budget * 60):
            print(f"stopped after {args.budget:g} minutes of CPU time; the same command goes on")
    write(PAGE, with_tables(PAGE.read_text(), trials))


if __name__ == "__main__":
    main()
