"""LoRA's thin factors under SOAP: a basis of the short side only, as routing has it, or of both sides.

    python benchmarks/experiments/lora_sides.py   # about 3 minutes of CPU time

Prints the validation losses after 200 steps of the workload `lora`, by seed, at three learning rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

import steepest
from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial
from steepest.lab.shared.contenders import Contender, preset
from steepest.lab.suite.protocol import scaled
from steepest.lab.workloads.workload import load_workload

RATES, SEEDS = (0.01, 0.02, 0.04), 3


@dataclass(frozen=True)
class BothSides(Contender):
    """A contender whose LoRA factors have both bases."""

    @override
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        both = {"*lora_*": {"max_precond_dim": max(max(p.shape) for p in model.parameters())}}
        return steepest.for_model(model, self.rule, overrides=both, elementwise=self.elementwise, **self.options)


def main() -> None:
    torch.set_num_threads(1)
    workload = load_workload("lora")
    soap = preset("soap-f5")
    contenders = {
        "adamw": preset("adamw"),
        "soap-f5, short side": soap,
        "soap-f5, both sides": BothSides(**vars(soap)),
    }
    for name, contender in contenders.items():
        for lr in RATES:
            setting = scaled(contender, lr / contender.lr)  # presets have one rate for all parameters
            trials = [Trial("lora", setting, workload.suite_steps, seed) for seed in range(SEEDS)]
            losses = [train(trial, workload, lambda _: None).final for trial in trials]
            print(f"{name}, lr {lr:g}:", *(f"{loss:.4f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
