"""A few steps of training, as a race takes them, in the process of a test."""

from __future__ import annotations

import torch

from steepest.lab.shared.contenders import parse_contenders


def loss_after(workload, steps: int, contender: str) -> tuple[float, float]:
    """The validation loss before and after some steps."""
    torch.manual_seed(0)
    model = workload.model()
    optimizer = parse_contenders(contender)[0].optimizer(model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps + 1):
        if step in (0, steps):
            model.eval()
            with torch.no_grad():
                losses.append(workload.validation(model))
            model.train()
        optimizer.zero_grad()
        workload.loss(model, workload.batch(generator)).backward()
        optimizer.step()
    return losses[0], losses[1]
