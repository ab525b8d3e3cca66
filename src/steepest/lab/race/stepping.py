"""How a step is taken, which depends on the optimizer.

Most want gradients, and step along them. K-FAC does too, but needs targets drawn from the model between the forward and
the backward pass. Others evaluate the loss as often as they like, on the batch of the step, and get a closure: with
a backward pass (L-BFGS), or with the graph (Newton-CG). Gauss-Newton gets the workload's residuals.

`Stepper.prepare` is the model's part of a step, `Stepper.step` the optimizer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.workload import Workload
from steepest.newton.residual import Residual


class Stepper(ABC):
    """Takes the steps of one optimizer on one model."""

    scheduled: ClassVar[bool] = False
    """Whether a schedule changes the learning rate; optimizers that evaluate the loss choose lengths themselves."""
    own_passes: ClassVar[bool] = True
    """Whether the optimizer works during the model's passes or makes some itself, so that the model's time is its own
    and can't be compared with others'."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, workload: Workload, data: torch.Generator) -> None:
        self.model, self.workload, self.data = model, workload, data
        self.optimizer: Any = optimizer
        self.batch: Any = None

    def prepare(self) -> float | None:
        """Draw a batch, and return its loss if that is known before the optimizer's part."""
        self.batch = self.workload.batch(self.data)
        return None

    @abstractmethod
    def step(self) -> float:
        """Let the optimizer step, and return the loss of the batch before it moved."""


class ByGradients(Stepper):
    """One forward and one backward pass, and a step along the gradients."""

    scheduled = True
    own_passes = False
    loss = 0.0

    @override
    def prepare(self) -> float:
        super().prepare()
        self.loss = gradients(self.model, self.workload, self.batch).item()
        return self.loss

    @override
    def step(self) -> float:
        self.optimizer.step()
        return self.loss


class BySampling(ByGradients):
    """The same, for optimizers that listen to the model's passes; they may draw targets from its outputs."""

    own_passes = True

    def __init__(self, model: nn.Module, optimizer: Any, workload: Workload, data: torch.Generator) -> None:
        super().__init__(model, optimizer, workload, data)
        if (likelihood := workload.likelihood) is not None:

            def sample(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
                if module.training:
                    optimizer.sample(outputs, likelihood)

            model.register_forward_hook(sample)
        elif optimizer.fisher == "sampled":
            raise BadInput(
                'fisher="sampled" draws targets from the model, but the workload does not say how: give it a '
                '`likelihood`, such as "categorical", or the optimizer fisher="empirical"'
            )


class ByClosure(Stepper):
    """The optimizer calls for loss and gradients as often as it likes."""

    @override
    def step(self) -> float:
        return float(self.optimizer.step(lambda: gradients(self.model, self.workload, self.batch)))


class ByGraph(Stepper):
    """The optimizer gets the loss in its graph, and with it what the model returned where the likelihood is known."""

    def __init__(self, model: nn.Module, optimizer: Any, workload: Workload, data: torch.Generator) -> None:
        super().__init__(model, optimizer, workload, data)
        self.outputs: Tensor | None = None
        assumed = optimizer.options["likelihood"]
        if assumed not in (None, workload.likelihood):
            raise BadInput(f"likelihood={assumed!r}: that of the workload is {workload.likelihood!r}")
        if workload.likelihood is not None:
            model.register_forward_hook(self.keep)
        elif optimizer.options["curvature"] != "hessian":
            raise BadInput(
                "it needs the model's outputs and a loss that is convex in them, of which the workload says nothing: "
                'give it a `likelihood`, such as "categorical"'
            )

    def keep(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        """Take what the model returned."""
        self.outputs = outputs

    def closure(self) -> Any:
        """Return the outputs and the loss, or the loss alone."""
        loss = self.workload.loss(self.model, self.batch)
        return loss if self.outputs is None else (self.outputs, loss)

    @override
    def step(self) -> float:
        loss = float(self.optimizer.step(self.closure))
        self.outputs = None  # its graph is no longer needed
        return loss


class ByResiduals(Stepper):
    """The optimizer gets the residuals, and their derivatives with them."""

    def __init__(self, model: nn.Module, optimizer: Any, workload: Workload, data: torch.Generator) -> None:
        super().__init__(model, optimizer, workload, data)
        if workload.residuals(workload.batch(torch.Generator().manual_seed(0))) is None:
            raise BadInput(
                "it needs residuals, which this workload has not: `residuals(self, batch)` returns them where the "
                "loss is a sum of squares"
            )

    @override
    def step(self) -> float:
        residuals: Sequence[Residual] | None = self.workload.residuals(self.batch)
        return float(self.optimizer.step(residuals))


def stepper(model: nn.Module, optimizer: Optimizer, workload: Workload, data: torch.Generator) -> Stepper:
    """Return what takes this optimizer's steps, which draws batches with the generator ``data``.

    Raises:
        BadInput: if the workload lacks what the optimizer needs.
    """
    kind = next((kind for name, kind in KINDS.items() if type(optimizer).__name__ == name), ByGradients)
    return kind(model, optimizer, workload, data)


KINDS: dict[str, type[Stepper]] = {
    "GaussNewton": ByResiduals,
    "LBFGS": ByClosure,
    "NewtonCG": ByGraph,
    "NaturalGradient": ByGraph,
    "KFAC": BySampling,
    "EKFAC": BySampling,
}


def gradients(model: nn.Module, workload: Workload, batch: Any) -> Tensor:
    """Return the loss of a batch, and leave its gradients in the parameters."""
    loss = workload.loss(model, batch)
    model.zero_grad()
    torch.autograd.backward(loss)
    return loss.detach()
