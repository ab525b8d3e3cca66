"""Race optimizers on a task of your own.

    steepest race --workload examples/race_my_task.py --optimizers "adamw, soap, moso"

A race needs four methods: a model, a batch, a loss and a validation. Here, a network learns the position of the hand of
a robot arm from the angles of its joints.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.lab import Workload

LENGTHS = torch.tensor([1.0, 0.8, 0.6, 0.4])
Poses = tuple[Tensor, Tensor]


class RobotArm(Workload):
    """An arm with four joints in a plane; every batch is new."""

    steps = 200
    measure = "validation loss (squared distance)"

    def __init__(self) -> None:
        self.held_out = poses(2048, torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        """Return a fresh network; the random state is seeded already."""
        hidden = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        return nn.Sequential(*hidden, nn.Linear(64, 2))

    def batch(self, generator: torch.Generator) -> Poses:
        """Return one training batch, drawn with this generator, so that all contenders get the same batches."""
        return poses(256, generator)

    def loss(self, model: nn.Module, batch: Poses) -> Tensor:
        """Return the scalar to be minimised."""
        angles, hands = batch
        return F.mse_loss(model(angles), hands)

    def validation(self, model: nn.Module) -> float:
        """Return the number by which contenders are compared; lower is better."""
        return self.loss(model, self.held_out).item()


def poses(count: int, generator: torch.Generator) -> Poses:
    """Return random angles ``[count, 4]`` and the positions of the hand ``[count, 2]``."""
    angles = 2 * torch.rand(count, 4, generator=generator) - 1
    directions = (2 * angles).cumsum(dim=1)
    return angles, torch.stack([directions.cos() @ LENGTHS, directions.sin() @ LENGTHS], dim=1)
