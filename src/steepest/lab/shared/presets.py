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
ROUNDS = "best of two rounds of 8 settings, and of 3 for other parameters, one seed, 2026-11-22"
"""Provenance of settings whose trials, with their commands, are in sweeps.json and sweeps_memory.json there."""


def _swept(name: str, options: Mapping[str, Any], rates: tuple[float, ...], rule: str = "", **more: Any) -> Preset:
    """Return the preset with the best settings of a sweep."""
    provenance = ROUNDS if more.get("elementwise") is TUNED else SWEEP.format(name=name)
    return Preset(rule or name, {**options, "weight_decay": WEIGHT_DECAY}, rates, provenance, **more)


def _soap(name: str, rule: str = "soap", **options: Any) -> Preset:
    """Return a preset of SOAP's family, whose sweeps all found these settings best, or equal to the best."""
    shared = {"lr": 2e-2, "betas": (0.8, 0.95), "shampoo_beta": 0.9}
    return _swept(name, shared | options, rates=LOW, rule=rule, elementwise=TUNED)


FORGETFUL: Mapping[str, Any] = {"betas": (0.85, 0.95), "shampoo_beta": 0.7}
"""Settings of KL-SOAP that end 0.0007 behind the best in sweeps.json at 300 steps, and ahead at 152, over 3 seeds."""
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
"""Contenders of a race that names none; they take about two minutes on two free cores."""
BASELINE = "adamw"
