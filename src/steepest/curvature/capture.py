"""The capture of K-FAC's statistics: second moments of layers' inputs and of the gradients at their outputs."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from steepest.curvature.layer import Layer, layers
from steepest.curvature.likelihoods import LIKELIHOODS, rows_of, sampled_gradient
from steepest.curvature.moments import Inbox, exactly
from steepest.curvature.taps import Hook, Listener, OutputTap, Tap
from steepest.linalg.surroundings import without_autocast
from steepest.linalg.untraced import untraced

LossTerms = str | float | Callable[[], float | Tensor]
Bases = Callable[[Tensor], tuple[Tensor, Tensor] | None]

WORDS = {"fisher": ("empirical", "sampled"), "sharing": ("expand", "reduce")}


@dataclass(frozen=True)
class Statistics:
    """The statistics of one weight over a step. ``B ⊗ A`` stands for the Fisher block of ``[W, b]``, for G groups."""

    A: Tensor
    """The mean of ``ā āᵀ`` over rows of inputs, ``[G, n̄, n̄]``; a bias' row and column are the last."""
    B: Tensor
    """The mean over loss terms of ``δ δᵀ``, for gradients δ of single terms at the layer's outputs, ``[G, m, m]``."""
    S: Tensor | None = None
    """The second moments of single samples' gradients in the bases that were given, ``[G, m, n̄]``."""


class Curvature(Listener):
    """Capture of the statistics of a model's layers, in forward and backward passes that go on as they would without.

    Args:
        model: the module whose `steepest.curvature.layers` get hooks. `detach` removes them; so does the garbage
            collection of this object.
        fisher: "empirical": the gradients of the training loss, from the backward pass that is made anyway;
            "sampled": those for targets drawn from the model, from one more backward pass, in `sample`.
        sharing: what is done with positions that share a weight (tokens, pixels): "expand" takes each for a row,
            "reduce" takes means of inputs and sums of gradients (Eschenhagen et al. 2023, arXiv:2311.00636).
        loss_terms: for fisher="empirical", how many terms the training loss is the mean of: "rows", the product of
            all dimensions but the last of the model's outputs; "batch", their first dimension; a function, called in
            each backward pass; a number, of the whole step. Or "sum": the loss is not a mean but a sum.
        grad_scaler: the `torch.amp.GradScaler` that scales the training loss, if there is one.
        only: the weights to capture, by default those of all layers; as a mapping, each with the bias that is captured
            along, or None.
        seed: of the draws; they leave the global random numbers as they are.
        rank: of the draws; ranks with different samples need different ones.

    Raises:
        ValueError: for words and numbers that are not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> curvature = Curvature(model)
        >>> curvature.listening = True
        >>> model(torch.randn(5, 3)).square().sum(-1).mean().backward()
        >>> statistics = curvature.collect()[model[0].weight]
        >>> statistics.A.shape, statistics.B.shape
        (torch.Size([1, 4, 4]), torch.Size([1, 4, 4]))
    """

    _pushing: ClassVar[Curvature | None] = None
    """Whose own backward pass runs now: nobody else captures that."""

    def __init__(
        self,
        model: nn.Module,
        *,
        fisher: str = "empirical",
        sharing: str = "expand",
        loss_terms: LossTerms = "rows",
        grad_scaler: Any = None,
        only: Collection[Tensor] | Mapping[Tensor, Tensor | None] | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        for option, value in (("fisher", fisher), ("sharing", sharing)):
            if value not in WORDS[option]:
                raise ValueError(f"{option}={value!r}: must be {' or '.join(map(repr, WORDS[option]))}")
        check_loss_terms(loss_terms)
        self.model, self.fisher, self.sharing, self.loss_terms = model, fisher, sharing, loss_terms
        self.grad_scaler, self.seed, self.rank = grad_scaler, seed, rank
        self.listening: bool | Callable[[], bool] = False
        """Whether statistics are due, or a function that says so; asked in every forward pass."""
        self.any_mode = False
        """Whether passes in evaluation mode count, too."""
        self.bases: Bases | None = None
        """From a weight to its bases ``Q_A [G, n̄, n̄]``, ``Q_B [G, m, m]``, or to None where S is not wanted."""
        self.samplings = 0
        """How often targets have been drawn."""
        wanted = None if only is None else set(only)
        self.layers = [layer for layer in layers(model).values() if wanted is None or layer.weight in wanted]
        if isinstance(only, Mapping):
            self.layers = [replace(layer, bias=only[layer.weight]) for layer in self.layers]
        self.nodes = []
        self._heard: set[Tensor] = set()
        self._first = self._warned = False
        self._inbox: dict[Tensor, Inbox] = {}
        self._terms: float | Tensor = 0.0
        self._scale, self._task = 1.0, -1
        reference = weakref.ref(self)
        hooks: list[Hook] = [Tap(reference, layer) for layer in self.layers]
        hooks.append(OutputTap(reference, model))
        self._finalizer = weakref.finalize(self, _remove, [hook.put_on() for hook in hooks])

    def detach(self) -> None:
        """Remove all hooks. Nothing is captured any more."""
        self._finalizer()

    # What taps ask and report.

    def hears(self, module: nn.Module) -> bool:
        """Return whether statistics are due, in training mode and with gradients."""
        if not (self.listening() if callable(self.listening) else self.listening):
            return False
        mode = module.training or self.model.training or self.any_mode
        return mode and torch.is_grad_enabled()

    @property
    def feeding(self) -> bool:
        """Whether the gradients of the backward pass that runs now are captured."""
        pushing = Curvature._pushing
        return pushing is self or (pushing is None and self.fisher == "empirical")

    @untraced
    @without_autocast
    @torch.no_grad()
    def feed(self, layer: Layer, inputs: Tensor, gradients: Tensor) -> None:
        """Add a layer's inputs ``[N, ...]`` and the gradients at its outputs to its sums."""
        self._begin()
        box = self._inbox.setdefault(layer.weight, Inbox())
        bases = self.bases(layer.weight) if self.bases is not None else None
        for rows, deltas in layer.blocks(inputs, gradients):
            if self._scale != 1.0 and Curvature._pushing is None:
                deltas = deltas / self._scale
            if bases is not None:
                box.add_second_moments(rows, deltas, *bases, exact=exactly(len(inputs), layer.shape))
            if Curvature._pushing is None or self._first:
                box.add_inputs(rows, self.sharing)
            box.add_gradients(deltas, self.sharing)
            each = rows.shape[2] if self.loss_terms == "rows" and not layer.is_convolution else 1
            box.terms += rows.shape[1] * each
        self._heard.add(layer.weight)

    def count(self, shape: torch.Size) -> None:
        """Count the loss terms of a backward pass that begins at outputs of the model of this shape."""
        if Curvature._pushing is not None or self.fisher != "empirical":
            return
        self._begin()
        if self.loss_terms == "rows":
            self._terms += rows_of(shape)
        elif self.loss_terms == "batch":
            self._terms += shape[0] if shape else 1
        elif callable(self.loss_terms):
            self._terms += self.loss_terms()

    def _begin(self) -> None:
        """Ask for the loss' scale once in a backward pass: on an accelerator that waits for the device."""
        task = torch._C._current_graph_task_id()
        if self.grad_scaler is None or Curvature._pushing is not None or task == self._task:
            return
        self._task, scale = task, float(self.grad_scaler.get_scale())
        if scale != self._scale:
            self.discard()  # of a step that the scaler has skipped: otherwise it would have been collected
            self._scale = scale

    # Backward passes for the statistics alone.

    def sample(self, outputs: Tensor, likelihood: str) -> None:
        """Draw targets from the model, and capture the gradients for these. Call it between forward and backward pass.

        Does nothing unless statistics are due and ``fisher="sampled"``. Neither ``.grad`` nor a reducer of gradients
        between ranks notices it.

        Args:
            outputs: of the model, ``[..., C]``, in their graph.
            likelihood: "categorical" for logits of classes (the last dimension), "normal" for means of variance 1,
                "bernoulli" for logits of yes and no.

        Raises:
            ValueError: for another likelihood.
        """
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood={likelihood!r}: must be one of {', '.join(map(repr, LIKELIHOODS))}")
        if self.fisher != "sampled" or not outputs.requires_grad or not self.hears(self.model):
            return
        seed = random.Random(f"{self.seed}/{self.samplings}/{self.rank}").getrandbits(63)
        self.samplings += 1
        generator = torch.Generator(outputs.device).manual_seed(seed)
        self.push(
            outputs, sampled_gradient(outputs.detach(), likelihood, generator), rows_of(outputs.shape, likelihood)
        )

    @untraced
    def push(self, outputs: Tensor, gradient: Tensor, terms: float, first: bool = True) -> None:
        """Make one backward pass from a gradient at outputs, which taps alone notice. The graph stays.

        Args:
            outputs: a tensor that the layers' outputs lead to.
            gradient: of its shape.
            terms: the number of loss terms to count.
            first: whether the inputs are captured, too; False for further passes through one graph.

        Raises:
            RuntimeError: if a part of the graph does not exist yet (reentrant checkpoints).
        """
        nodes = [node for node in (reference() for reference in self.nodes) if node is not None]
        self.nodes = [weakref.ref(node) for node in nodes]
        if not nodes:
            return
        edges = [GradientEdge(*node.next_functions[0]) for node in nodes]
        Curvature._pushing, self._first = self, first
        try:
            torch.autograd.grad(outputs, edges, gradient, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                "fisher='sampled' needs a graph that a second backward pass can go through: give "
                "torch.utils.checkpoint use_reentrant=False"
            ) from error
        finally:
            Curvature._pushing = None
        self._terms += terms

    # What was captured.

    @property
    def pending(self) -> set[Tensor]:
        """Return the weights of which `collect` has something."""
        return {weight for weight, box in self._inbox.items() if box.A is not None and box.B is not None}

    def collect(self, terms: float | Tensor | None = None) -> dict[Tensor, Statistics]:
        """Return what was captured since the last time, by weight, and forget it.

        Args:
            terms: what the sums of gradients are divided by; by default what was counted, as ``loss_terms`` says.
        """
        found = {}
        for weight, box in self._inbox.items():
            if box.A is not None and box.B is not None:
                factor = self._factor(box) if terms is None else 1 / terms
                S = None if box.S is None else box.S.mul_(factor)  # in place, since the sums are forgotten
                found[weight] = Statistics(box.A.div_(box.rows), box.B.mul_(factor), S)
        self.discard()
        return found

    def _factor(self, box: Inbox) -> float | Tensor:
        """What B's sum is multiplied by, so that it is a mean over loss terms."""
        if self.fisher == "sampled":
            return 1 / self._terms
        if self.loss_terms == "sum":
            return 1.0
        if isinstance(self.loss_terms, int | float):
            return self.loss_terms
        if isinstance(self._terms, Tensor) or self._terms:
            return self._terms
        if callable(self.loss_terms):
            return self.loss_terms()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"loss_terms={self.loss_terms!r}: the model was not called itself, but modules within it, so its "
                "outputs were not seen; each layer's own inputs are counted instead; give loss_terms a number or a "
                "function",
                stacklevel=2,
            )
        return box.terms

    def discard(self) -> None:
        """Forget what was captured since the last time."""
        self._inbox, self._terms = {}, 0.0
        self.nodes = [reference for reference in self.nodes if reference() is not None]

    def uncalled(self) -> list[str]:
        """Return the names of trained layers of which nothing was ever captured."""
        return [x.name for x in self.layers if x.weight.requires_grad and x.weight not in self._heard]


def check_loss_terms(loss_terms: LossTerms) -> None:
    """Raise ValueError unless loss_terms is a word that is known, a positive number or a function."""
    number = isinstance(loss_terms, int | float) and not isinstance(loss_terms, bool) and loss_terms > 0
    if not (number or callable(loss_terms) or loss_terms in ("rows", "batch", "sum")):
        raise ValueError(
            f"loss_terms={loss_terms!r}: must be 'rows', 'batch', 'sum', a positive number, or a function that "
            "returns one"
        )


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
