"""Where gradients come from: they are drawn, made by a model's backward pass, or those of a loss in a closure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from steepest.testing.draws import drawn, gradient
from steepest.testing.evidence import NotApplicable
from steepest.testing.layers import Layers

Params = Mapping[str, Tensor]
Closure = Callable[[], Any]


@dataclass(frozen=True)
class Batch:
    """What the gradients of a step are made from."""

    k: int = 0
    """The number of the step."""
    missing: Collection[str] = ()
    """Parameters that get no gradient."""
    scale: float = 1.0
    """A factor of the loss."""
    poison: Mapping[str, float] = field(default_factory=dict)
    """Parameters of whose gradient one entry is a bad number, and that number."""
    convert: Callable[[Tensor], Tensor] | None = None
    """What each gradient is converted by in the end."""

    def gradient(self, name: str, p: Tensor) -> Tensor:
        """Return the gradient of a parameter, as it is drawn."""
        grad = self.scale * gradient(self.k, name, p)
        if name in self.poison:
            grad.view(-1)[0] = self.poison[name]
        return grad

    def spoil(self, params: Params) -> None:
        """Put bad numbers into gradients as they are, and convert them."""
        for name, p in params.items():
            if p.grad is not None and name in self.poison:
                p.grad.view(-1)[0] = self.poison[name]
            if p.grad is not None and self.convert is not None:
                p.grad = self.convert(p.grad)


class Source(ABC):
    """How the parameters of a run get the gradients of a batch."""

    @abstractmethod
    def given(self, params: Params) -> Any:
        """Return what the optimizer is constructed from."""

    @abstractmethod
    def set_gradients(self, params: Params, batch: Batch, optimizer: Any) -> None:
        """Give every parameter its gradient, and None to those whose gradient is missing."""

    @abstractmethod
    def loss(self, params: Params, batch: Batch, optimizer: Any = None) -> Tensor:
        """Return a loss in its graph, whose gradients are the batch's."""

    def closure(self, params: Params, batch: Batch) -> Closure | None:
        """Return the closure that a step gets, if it needs one.

        Raises:
            NotApplicable: if there is none for this batch.
        """
        return None


@final
class Drawn(Source):
    """Gradients are drawn; no loss is computed."""

    def given(self, params: Params) -> Any:
        """Return the parameters, or a model of them."""
        return list(params.values())

    def set_gradients(self, params: Params, batch: Batch, optimizer: Any) -> None:
        """Give every parameter its gradient."""
        for name, p in params.items():
            p.grad = None if name in batch.missing or not p.requires_grad else batch.gradient(name, p)
        batch.spoil(params)

    def loss(self, params: Params, batch: Batch, optimizer: Any = None) -> Tensor:
        """Return the loss in its graph."""
        return torch.stack([(p * batch.gradient(name, p)).sum() for name, p in params.items()]).sum()


@final
class Propagated(Source):
    """The same gradients, made by a backward pass through `Layers`, for an optimizer that takes the model.

    Between forward and backward pass ``optimizer.sample(outputs, "normal")`` is called if the optimizer has it.
    """

    def __init__(self, params: Params) -> None:
        self.model = Layers(params)

    def given(self, params: Params) -> Any:
        """Return the parameters, or a model of them."""
        return self.model

    def set_gradients(self, params: Params, batch: Batch, optimizer: Any) -> None:
        """Give every parameter its gradient, as a training loop does."""
        if hasattr(optimizer, "zero_grad"):  # may forget more than gradients
            optimizer.zero_grad()
        for p in params.values():
            p.grad = None
        with torch.enable_grad(), torch.autocast(next(iter(params.values())).device.type, enabled=False):
            loss = self.loss(params, batch, optimizer)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        batch.spoil(params)

    def loss(self, params: Params, batch: Batch, optimizer: Any = None) -> Tensor:
        """Return the loss in its graph."""
        outputs, terms = self.model.loss(batch.k, lambda name: batch.gradient(name, params[name]), batch.missing)
        if outputs is not None and hasattr(optimizer, "sample"):
            optimizer.sample(outputs, "normal")
        p = next(iter(params.values()))
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=p.dtype, device=p.device)


@final
class Evaluated(Source):
    """A closure computes a loss, which is strictly convex and has no minimum at the weights of any other batch.

        r = √c h(w - t)        h(x) = x + tanh(x) / 2        loss = ½ Σ r²

    with c and t drawn for each entry, so that the gradient of one parameter never depends on another. Its curvature is
    between 0.5 and 3.4. It is no quadratic function, since a Newton step would forget where it began.

    Args:
        answer: what the closure returns, see `ANSWERS`.
        takes_model: whether the optimizer is constructed from a model.
    """

    def __init__(self, answer: str, params: Params, takes_model: bool) -> None:
        self.answer = answer
        self.model: nn.Module | None = Layers(params) if takes_model else None

    @property
    def makes_gradients(self) -> bool:
        """Whether the closure, and not the optimizer, makes gradients."""
        return self.answer == "loss after backward"

    def given(self, params: Params) -> Any:
        """Return the parameters, or a model of them."""
        return list(params.values()) if self.model is None else self.model

    def set_gradients(self, params: Params, batch: Batch, optimizer: Any) -> None:
        """Give every parameter its gradient."""
        if self.makes_gradients:
            with torch.enable_grad():
                self._backward(params, batch)

    def loss(self, params: Params, batch: Batch, optimizer: Any = None) -> Tensor:
        """Return the loss in its graph."""
        return self._outputs_and_loss(params, batch)[1]

    def closure(self, params: Params, batch: Batch) -> Closure:
        """Return a closure that evaluates the batch's loss."""
        if not self.makes_gradients and not params.keys() - set(batch.missing):
            raise NotApplicable("its closure returns a loss in a graph, which has some parameter in it")
        if not self.makes_gradients and batch.convert is not None:
            raise NotApplicable("makes its gradients itself")
        return lambda: ANSWERS[self.answer](self, params, batch)

    def _residuals(self, params: Params, batch: Batch) -> Tensor:
        """Return r ``[P]``."""
        residuals = []
        for name, p in params.items():
            if name in batch.missing:
                continue
            x = p - drawn(1 + batch.k, name, p.shape).to(p.device, p.dtype)
            c = batch.scale * (0.5 + drawn(-1 - batch.k, name, p.shape).sigmoid())
            r = (c.sqrt().to(p.device, p.dtype) * (x + x.tanh() / 2)).flatten()
            if name in batch.poison and not self.makes_gradients:
                r = torch.cat([r[:1] * batch.poison[name], r[1:]])
            residuals.append(r)
        return torch.cat(residuals) if residuals else next(iter(params.values())).new_zeros(0)

    def _outputs_and_loss(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a row of outputs, and a loss that is the negative log likelihood of means with unit variance."""
        outputs = self._residuals(params, batch)[None]  # [1, P]
        squares = (outputs * outputs.conj()).real if outputs.is_complex() else outputs * outputs
        return outputs, squares.sum() / 2

    def _backward(self, params: Params, batch: Batch) -> Tensor:
        for p in params.values():
            p.grad = None
        loss = self.loss(params, batch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        batch.spoil(params)
        return loss


ANSWERS: dict[str, Callable[[Evaluated, Params, Batch], Any]] = {
    "loss after backward": Evaluated._backward,
    "residuals": Evaluated._residuals,
    "outputs and loss": Evaluated._outputs_and_loss,
    "loss": Evaluated.loss,
}
"""What a closure may have to return, in the order in which they are tried: the loss after a backward pass, as torch
documents it; or in a graph and without a backward pass residuals, whose squares' sum is twice the loss; outputs and
the loss of these; the loss."""
