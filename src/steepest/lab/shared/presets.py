"""The settings that contenders start with, each with where it comes from, and the learning rates that a sweep tries.

All have the same number of rates: a race is fair when the tuning is. AdamW is the one to beat, so its own warm-up and
momentum were tuned as well; the usual 10% and 0.9 would flatter every other contender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHT_DECAY = 0.1
WARMUP = 0.3
FINAL_RATE = 0.01

ELEMENTWISE: Mapping[str, Any] = {"lr": 5e-3, "betas": (0.9, 0.95), "weight_decay": WEIGHT_DECAY}
"""AdamW for what is no hidden matrix: embeddings, head, norms, biases."""
TUNED: Mapping[str, Any] = {"lr": 2e-2, "betas": (0.7, 0.95), "weight_decay": WEIGHT_DECAY}
"""The same where it was tuned, with three learning rates at 160 steps; AdamW itself had a further sweep instead."""


@dataclass(frozen=True)
class Preset:
    """A contender's settings when nothing else is said."""

    rule: str
    """What `steepest.for_model` calls it."""
    options: Mapping[str, Any]
    rates: tuple[float, ...]
    """What ``--full`` tries for ``lr``."""
    provenance: str
    """When and by which command the settings were found."""
    elementwise: Mapping[str, Any] | None = field(default_factory=lambda: ELEMENTWISE)
    """Options of what is no hidden matrix; None: the contender's own, if it is elementwise itself."""
    warmup: float = WARMUP


SWEEP = "best of 8 settings, 300 steps, one seed, 2026-11-22: python benchmarks/sweeps.py {name}"
"""All trials are kept in benchmarks/results/sweeps.json."""
ROUNDS = "best of two rounds of 8 settings, and of 3 for what is no hidden matrix, one seed, 2026-11-22"
"""All trials, with their commands, are kept in benchmarks/results/sweeps.json and sweeps_memory.json."""


def _swept(name: str, options: Mapping[str, Any], rates: tuple[float, ...], rule: str = "", **more: Any) -> Preset:
    """A contender with the best of its sweep's settings."""
    provenance = ROUNDS if more.get("elementwise") is TUNED else SWEEP.format(name=name)
    return Preset(rule or name, {**options, "weight_decay": WEIGHT_DECAY}, rates, provenance, **more)


def _soap(name: str, rule: str = "soap", **options: Any) -> Preset:
    """The SOAP family: whoever of it was swept came out best at the same settings, or level with the best."""
    shared = {"lr": 2e-2, "betas": (0.8, 0.95), "shampoo_beta": 0.9}
    return _swept(name, shared | options, rates=LOW, rule=rule, elementwise=TUNED)


FORGETFUL: Mapping[str, Any] = {"betas": (0.85, 0.95), "shampoo_beta": 0.7}
"""At 300 steps level with the best of its 8 settings in sweeps.json, 0.0007 behind; at 152, over three seeds, ahead."""
LOW = (5e-3, 1e-2, 2e-2, 4e-2)
HIGH = (1e-2, 2e-2, 4e-2, 8e-2)
HIGHER = (2e-2, 4e-2, 8e-2, 1.6e-1)
PRESETS: Mapping[str, Preset] = {
    "adamw": _swept("adamw", {"lr": 1e-2, "betas": (0.7, 0.95)}, rates=(2.5e-3, 5e-3, 1e-2, 2e-2), elementwise=None),
    "soap": _soap("soap", precondition_frequency=1),
    "soap-f5": _soap("soap-f5", precondition_frequency=5),
    "soap-f10": _soap("soap-f10", precondition_frequency=10),
    "kl-soap": _soap("kl-soap", precondition_frequency=1, use_kl_shampoo=True),
    "kl-soap-f4": _soap("kl-soap-f4", precondition_frequency=4, use_kl_shampoo=True, **FORGETFUL),
    "rekls": _soap("rekls", rule="rekls"),
    "moso": _swept("moso", {"lr": 2.5e-3, "inner": "rmsprop"}, rates=(6e-4, 1.25e-3, 2.5e-3, 5e-3)),
    "muon": _swept("muon", {"lr": 6e-2, "momentum": 0.85}, rates=(1.5e-2, 3e-2, 6e-2, 1.2e-1), elementwise=TUNED),
    "normuon": _swept("normuon", {"lr": 4e-2, "momentum": 0.9}, rates=HIGH),
    "adamuon": _swept("adamuon", {"lr": 8e-2, "momentum": 0.8}, rates=HIGHER),
    "shampoo": _swept("shampoo", {"lr": 2e-2, "shampoo_beta": 0.9, "precondition_frequency": 5}, rates=LOW),
    "kl-shampoo": _swept("kl-shampoo", {"lr": 2e-2, "shampoo_beta": 0.9, "precondition_frequency": 5}, rates=LOW),
    "dion": _swept("dion", {"lr": 4e-2, "momentum": 0.7}, rates=HIGH),
    "dion2": _swept("dion2", {"lr": 8e-2, "ef_decay": 0.5}, rates=HIGHER),
    "lion": _swept("lion", {"lr": 3e-3, "betas": (0.7, 0.8)}, rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3), elementwise=None),
}

QUICK = ("adamw", "soap", "soap-f5", "kl-soap", "muon")
"""Who runs when nobody is named: about two minutes on two free cores."""
BASELINE = "adamw"
