"""Race optimizers on a task of your own.

    steepest race --workload examples/race_my_task.py --optimizers "adamw, soap, moso"

A race needs four methods: a model, a batch, a loss and a validation. Here, a network learns where the hand of a
robot arm is, given the angles of its joints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab import Workload

LENGTHS = torch.tensor([1.0, 0.8, 0.6, 0.4])
Poses = tuple[Tensor, Tensor]


class RobotArm(Workload):
    """Four joints in a plane; every batch is new."""

    steps = 200
    measure = "validation loss (squared distance)"

    def __init__(self) -> None:
        self.held_out = poses(2048, torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        """A fresh network. The random state is seeded already."""
        hidden = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(64, 2))

    def batch(self, generator: torch.Generator) -> Poses:
        """One training batch, drawn with this generator, so that all contenders see the same ones."""
        return poses(256, generator)

    def loss(self, model: nn.Module, batch: Poses) -> Tensor:
        """What is minimised."""
        angles, hands = batch
        return F.mse_loss(model(angles), hands)

    def validation(self, model: nn.Module) -> float:
        """What contenders are compared by; lower is better."""
        return self.loss(model, self.held_out).item()


def poses(count: int, generator: torch.Generator) -> Poses:
    """Angles ``[count, 4]`` and where the hand is then ``[count, 2]``."""
    angles = 2 * torch.rand(count, 4, generator=generator) - 1
    directions = (2 * angles).cumsum(dim=1)
    return angles, torch.stack([directions.cos() @ LENGTHS, directions.sin() @ LENGTHS], dim=1)
