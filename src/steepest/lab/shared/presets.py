"""Presets: the settings that contenders have by default, their provenance, and the learning rates that sweeps try.

All presets have the same number of rates, since a race is fair only with equal tuning. AdamW is the baseline, so its
warm-up and momentum were tuned as well; the usual 10% and 0.9 would flatter every other contender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHT_DECAY = 0.1
WARMUP = 0.3
FINAL_RATE = 0.01

ELEMENTWISE: Mapping[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": WEIGHT_DECAY}
"""AdamW's options for parameters that are not hidden matrices: embeddings, head, norms, biases."""
TUNED: Mapping[str, Any] = {"lr": 2e-2, "betas": (0.7, 0.95), "weight_decay": WEIGHT_DECAY}
"""The same options, tuned with three learning rates at 160 steps; AdamW itself had a further sweep instead."""


@dataclass(frozen=True)
class Preset:
    """The default settings of a contender."""

    rule: str
    """Name of the rule for `steepest.for_model`."""
    options: Mapping[str, Any]
    rates: tuple[float, ...]
    """Values of ``lr`` that ``--full`` tries."""
    provenance: str
    """When and by which command the settings were found."""
    elementwise: Mapping[str, Any] | None = field(default_factory=lambda: ELEMENTWISE)
    """AdamW's options for parameters that are not hidden matrices; None if the rule itself is elementwise."""
    warmup: float = WARMUP


SWEEP = "best of 8 settings, 300 steps, one seed, 2026-11-22: python benchmarks/sweeps.py {name}"
"""Provenance of settings whose trials are in benchmarks/results/sweeps.json."""
AGAIN = "; then of 8 more (benchmarks/results/sweeps_memory.json)"
AND_OTHERS = ", and of 3 for the other parameters"
LIKE_F5 = "; the rest as soap-f5"
"""Provenance of settings that were changed after that sweep."""


def _swept(
    name: str, options: Mapping[str, Any], rates: tuple[float, ...], rule: str = "", then: str = "", **more: Any
) -> Preset:
    """Return the preset with the best settings of a sweep; ``then`` says what was changed after it."""
    provenance = SWEEP.format(name=name) + then
    return Preset(rule or name, {**options, "weight_decay": WEIGHT_DECAY}, rates, provenance, **more)


def _soap(name: str, then: str, rule: str = "soap", **options: Any) -> Preset:
    """Return a preset of SOAP's family, whose sweeps all found these settings best, or equal to the best."""
    shared = {"lr": 2e-2, "betas": (0.8, 0.95), "shampoo_beta": 0.9}
    return _swept(name, shared | options, rates=LOW, rule=rule, then=then, elementwise=TUNED)


FORGETFUL: Mapping[str, Any] = {"betas": (0.85, 0.95), "shampoo_beta": 0.7}
"""Settings of KL-SOAP that end 0.0007 behind the best in sweeps.json at 300 steps, and ahead at 152 over 3 seeds."""
LOW = (5e-3, 1e-2, 2e-2, 4e-2)
HIGH = (1e-2, 2e-2, 4e-2, 8e-2)
HIGHER = (2e-2, 4e-2, 8e-2, 1.6e-1)
PRESETS: Mapping[str, Preset] = {
    "adamw": _swept("adamw", {"lr": 1e-2, "betas": (0.7, 0.95)}, rates=(2.5e-3, 5e-3, 1e-2, 2e-2), elementwise=None),
    "soap": _soap("soap", AGAIN + LIKE_F5, precondition_frequency=1),
    "soap-f5": _soap("soap-f5", AGAIN + AND_OTHERS, precondition_frequency=5),
    "soap-f10": _soap("soap-f10", LIKE_F5, precondition_frequency=10),
    "kl-soap": _soap("kl-soap", AGAIN + LIKE_F5, precondition_frequency=1, use_kl_shampoo=True),
    "kl-soap-f4": _soap("kl-soap-f4", LIKE_F5, precondition_frequency=4, use_kl_shampoo=True, **FORGETFUL),
    "rekls": _soap("rekls", LIKE_F5, rule="rekls"),
    "moso": _swept("moso", {"lr": 2.5e-3, "inner": "rmsprop"}, rates=(6e-4, 1.25e-3, 2.5e-3, 5e-3)),
    "muon": _swept(
        "muon",
        {"lr": 6e-2, "momentum": 0.85},
        rates=(1.5e-2, 3e-2, 6e-2, 1.2e-1),
        then=AGAIN + AND_OTHERS,
        elementwise=TUNED,
    ),
    "normuon": _swept("normuon", {"lr": 4e-2, "momentum": 0.9}, rates=HIGH),
    "adamuon": _swept("adamuon", {"lr": 8e-2, "momentum": 0.8}, rates=HIGHER),
    "shampoo": _swept("shampoo", {"lr": 2e-2, "shampoo_beta": 0.9, "precondition_frequency": 5}, rates=LOW),
    "kl-shampoo": _swept("kl-shampoo", {"lr": 2e-2, "shampoo_beta": 0.9, "precondition_frequency": 5}, rates=LOW),
    "dion": _swept("dion", {"lr": 4e-2, "momentum": 0.7}, rates=HIGH),
    "dion2": _swept("dion2", {"lr": 8e-2, "ef_decay": 0.5}, rates=HIGHER),
    "lion": _swept("lion", {"lr": 3e-3, "betas": (0.7, 0.8)}, rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3), elementwise=None),
}

ENDLESS: Mapping[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
"""A race ends when its steps or its time are used, and not when a loss that is small by nature hardly moves."""
SAMPLED: Mapping[str, Any] = {"lr": 1.0, "fisher": "sampled"}
SECOND_ORDER: Mapping[str, Preset] = {
    "kfac": Preset("kfac", SAMPLED, (0.25, 0.5, 1.0, 2.0), "its defaults, with sampled targets", {}, warmup=0.0),
    "ekfac": Preset("ekfac", SAMPLED, (0.25, 0.5, 1.0, 2.0), "its defaults, with sampled targets", {}, warmup=0.0),
    "gauss-newton": Preset("gauss-newton", {}, (), "its defaults; it has no learning rate", None, warmup=0.0),
    "lbfgs": Preset("lbfgs", {"lr": 1.0, **ENDLESS}, (1.0,), "its defaults without tolerances", None, warmup=0.0),
    "newton-cg": Preset("newton-cg", {}, (), "its defaults; it has no learning rate", None, warmup=0.0),
    "natural-gradient": Preset(
        "natural-gradient",
        {"lr": 1.0, "likelihood": "categorical"},
        (0.25, 0.5, 1.0, 2.0),
        "its defaults, for classification",
        None,
        warmup=0.0,
    ),
    "torch.lbfgs": Preset(
        "torch.lbfgs",
        {"lr": 1.0, "history_size": 100, "line_search_fn": "strong_wolfe", **ENDLESS},
        (1.0,),
        "the settings of lbfgs; by torch's defaults it has no line search, and diverges",
        None,
        warmup=0.0,
    ),
}
"""Presets of optimizers that use curvature, which race where they are named: not every workload has what they need."""

PLAIN: Mapping[str, Preset] = {
    "sgd": Preset(
        "sgd",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        (2.5e-2, 5e-2, 0.1, 0.2),
        "usual settings; the decay is an L2 penalty",
        None,
    ),
}
"""Presets of torch.optim's that race where they are named."""

QUICK = ("adamw", "soap", "soap-f5", "kl-soap", "muon")
"""Contenders of a race that names none; they take about two minutes on two free cores."""
BASELINE = "adamw"
