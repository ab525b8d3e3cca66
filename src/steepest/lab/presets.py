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


FIRST = "first settings, not swept yet"


def _soap(rule: str = "soap", lr: float = 2e-2, **options: Any) -> Preset:
    """The SOAP family's shared settings."""
    shared = {"lr": lr, "betas": (0.9, 0.95), "shampoo_beta": 0.9, "weight_decay": WEIGHT_DECAY}
    return Preset(rule, shared | options, rates=(5e-3, 1e-2, 2e-2, 4e-2), provenance=FIRST)


PRESETS: Mapping[str, Preset] = {
    "adamw": Preset(
        "adamw",
        {"lr": 5e-3, "betas": (0.8, 0.95), "weight_decay": WEIGHT_DECAY},
        rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
        provenance=FIRST,
        elementwise=None,
    ),
    "soap": _soap(),
    "soap-f5": _soap(precondition_frequency=5),
    "soap-f10": _soap(precondition_frequency=10),
    "kl-soap": _soap(lr=1e-2, use_kl_shampoo=True),
    "rekls": _soap(rule="rekls", lr=1e-2),
    "moso": Preset(
        "moso",
        {"lr": 1e-2, "weight_decay": WEIGHT_DECAY},
        rates=(5e-3, 1e-2, 2e-2, 4e-2),
        provenance=FIRST,
    ),
}

QUICK = ("adamw", "soap", "soap-f5", "soap-f10")
"""Who runs when nobody is named: under three minutes on two cores."""
BASELINE = "adamw"
