"""K-FAC's factors of a model over a data set, for influence functions, Laplace approximations and studies."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature.capture import Curvature, LossTerms, Statistics, check_loss_terms
from steepest.curvature.hessians import Loss, random_column, root_columns
from steepest.curvature.likelihoods import rows_of
from steepest.curvature.taps import first_tensor

FISHERS = ("empirical", "sampled", "type2")


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """The curvature of one layer, ``B ⊗ A``, a matrix of ``m n̄`` rows that acts on matrices ``V [m, n̄]``.

    A convolution of G > 1 groups has G of them, and all tensors a leading dimension of G.

    Example:
        >>> factors = KroneckerFactors(A=torch.diag(torch.tensor([1.0, 2.0])), B=torch.tensor([[3.0]]))
        >>> factors @ torch.ones(1, 2)
        tensor([[3., 6.]])
        >>> factors.solve(torch.ones(1, 2), damping=1.0)
        tensor([[0.2500, 0.1429]])
    """

    A: Tensor
    """Second moments of inputs, ``[n̄, n̄]``; a bias' row and column are the last."""
    B: Tensor
    """Second moments of gradients at outputs, ``[m, m]``."""
    S: Tensor | None = None
    """EKFAC's eigenvalues ``[m, n̄]``: second moments of samples' gradients in the bases. Without, ``λ_B λ_Aᵀ``."""
    bases: tuple[Tensor, Tensor] | None = None
    """What S is in: ``Q_A [n̄, n̄]`` and ``Q_B [m, m]``."""

    @cached_property
    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """The bases ``Q_A [n̄, n̄]`` and ``Q_B [m, m]``."""
        return self.bases or (self._decomposed[0].eigenvectors, self._decomposed[1].eigenvectors)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues ``[m, n̄]``: their sum is the trace."""
        if self.S is not None:
            return self.S
        A, B = self._decomposed
        product: Tensor = B.eigenvalues[..., :, None] * A.eigenvalues[..., None, :]
        return product

    def __matmul__(self, V: Tensor) -> Tensor:
        """Return the product with ``V [m, n̄]``, ``B V A``."""
        return self.B @ V @ self.A if self.S is None else self._scaled(V, self.S)

    def solve(self, V: Tensor, damping: float) -> Tensor:
        """Return ``X [m, n̄]`` with ``(B ⊗ A + damping · I) X = V``."""
        return self._scaled(V, 1 / (self.eigenvalues + damping))

    def _scaled(self, V: Tensor, scale: Tensor) -> Tensor:
        Q_A, Q_B = self.eigenvectors
        return Q_B @ ((Q_B.mT @ V @ Q_A) * scale) @ Q_A.mT

    @cached_property
    def _decomposed(self) -> tuple[Any, Any]:
        return torch.linalg.eigh(self.A), torch.linalg.eigh(self.B)


def kfac_factors(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    *,
    fisher: str = "empirical",
    sharing: str = "expand",
    loss_terms: LossTerms | None = None,
    eigenvalues: bool = False,
    seed: int = 0,
) -> dict[str, KroneckerFactors]:
    """Return the K-FAC factors of a model's layers, by the name of the module, over all batches.

    The model stays in the mode that it is in: call ``model.eval()`` before, unless dropout and batch statistics are
    meant to be as in training. Neither its parameters nor their ``.grad`` change.

    Args:
        model: called with a batch's inputs. Layers whose weight is frozen are left out.
        batches: pairs of inputs and targets. With ``eigenvalues`` they are run through twice: a list or a DataLoader.
        loss: from outputs and targets to a scalar, as `torch.nn.functional.cross_entropy`.
        fisher: "empirical": from gradients of the loss; "type2": the exact Gauss-Newton factors of a convex loss, by
            C backward passes for outputs ``[..., C]``; "sampled": unbiased for these, by one backward pass.
        sharing: "expand" or "reduce", as in `Curvature`.
        loss_terms: as in `Curvature`, of each batch. By default the loss of the first batch is compared with that of
            the batch twice over: if it is the same, the loss is a mean over "rows"; if it doubles, a "sum".
        eigenvalues: whether to compute EKFAC's, too.
        seed: of the draws of "sampled".

    Returns:
        For a mean loss the factors of the mean over all terms of all batches, for a sum those of the sum.

    Raises:
        ValueError: for words that are not allowed; if loss_terms is not given and can't be found out; or if
            "type2" does not exist for the loss.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> batches = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))]
        >>> factors = kfac_factors(model, batches, nn.functional.cross_entropy, fisher="type2")
        >>> {name: (tuple(f.A.shape), tuple(f.B.shape)) for name, f in factors.items()}
        {'0': ((4, 4), (4, 4)), '2': ((5, 5), (2, 2))}
    """
    if fisher not in FISHERS:
        raise ValueError(f"fisher={fisher!r}: must be one of {', '.join(map(repr, FISHERS))}")
    if loss_terms is not None:
        check_loss_terms(loss_terms)
    curvature = Curvature(model, fisher="sampled", sharing=sharing)
    curvature.listening = curvature.any_mode = True
    run = _Run(curvature, loss, fisher, loss_terms, seed)
    try:
        bases: dict[Tensor, tuple[Tensor, Tensor]] = {}
        found = run.over(batches)
        if eigenvalues:
            bases = {weight: KroneckerFactors(s.A, s.B).eigenvectors for weight, s in found.items()}
            curvature.bases = bases.get
            second = run.over(batches)
            found = {weight: Statistics(s.A, s.B, second[weight].S) for weight, s in found.items()}
        return {x.name: _factors(found[x.weight], bases.get(x.weight)) for x in curvature.layers if x.weight in found}
    finally:
        curvature.detach()


@dataclass
class _Run:
    """Passes over batches, of which nothing but sums remains."""

    curvature: Curvature
    loss: Loss
    fisher: str
    loss_terms: LossTerms | None
    seed: int

    def over(self, batches: Iterable[tuple[Any, Any]]) -> dict[Tensor, Statistics]:
        """The statistics by weight."""
        total: float | Tensor = 0.0
        for number, (inputs, targets) in enumerate(batches):
            with torch.inference_mode(False), torch.enable_grad():
                outputs = self.curvature.model(inputs)
                if self.loss_terms is None:
                    self.loss_terms = find_loss_terms(self.loss, outputs, targets)
                terms = 1.0 if self.loss_terms == "sum" else self._count(outputs)
                # The sums are divided by the terms of all batches. A sum is one term, however many batches there are.
                total = 1.0 if self.loss_terms == "sum" else total + terms
                first = True
                for source, gradient in self._gradients(outputs, targets, terms, number):
                    self.curvature.push(source, gradient, 0, first)
                    first = False
        return self.curvature.collect(total)

    def _gradients(self, outputs: Any, targets: Any, terms: Any, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Where backward passes begin, and with which gradients: of one term, times the root of their number."""
        if self.fisher == "empirical":
            value = self.loss(outputs, targets)
            yield value, torch.ones_like(value) * terms
            return
        if not isinstance(outputs, Tensor):
            raise ValueError(f"fisher={self.fisher!r}: the model must return a tensor, not a {type(outputs).__name__}")
        if self.fisher == "type2":
            columns = root_columns(self.loss, outputs, targets)
        else:
            drawn = random.Random(f"{self.seed}/{number}").getrandbits(63)
            generator = torch.Generator(outputs.device).manual_seed(drawn)
            columns = iter([random_column(self.loss, outputs, targets, generator)])
        for column in columns:
            yield outputs, column * terms**0.5

    def _count(self, outputs: Any) -> float | Tensor:
        """The number of loss terms of one batch."""
        if callable(self.loss_terms):
            return self.loss_terms()
        if isinstance(self.loss_terms, int | float):
            return self.loss_terms
        first = first_tensor(outputs)
        if first is None:
            raise ValueError(
                f"loss_terms={self.loss_terms!r}: the model returns no tensor; give a number or a function"
            )
        return rows_of(first.shape) if self.loss_terms == "rows" else len(first)


def find_loss_terms(loss: Loss, outputs: Any, targets: Any) -> str:
    """Return whether a loss is a mean over "rows", or a "sum": the loss of a batch twice over tells.

    >>> find_loss_terms(nn.MSELoss(reduction="sum"), torch.ones(3, 2), torch.zeros(3, 2))
    'sum'
    """
    if all(isinstance(x, Tensor) and x.dim() for x in (outputs, targets)):
        with torch.no_grad():
            once = float(loss(outputs, targets))
            ratio = float(loss(torch.cat([outputs, outputs]), torch.cat([targets, targets]))) / (once or math.nan)
        for word, expected in (("rows", 1.0), ("sum", 2.0)):
            if abs(ratio - expected) < 1e-3:
                return word
    raise ValueError(
        "loss_terms=None: whether the loss is a mean or a sum of its terms can't be told from its values; say "
        "loss_terms='rows', 'batch', 'sum', a number or a function"
    )


def _factors(statistics: Statistics, bases: tuple[Tensor, Tensor] | None = None) -> KroneckerFactors:
    """The factors without the groups' dimension, if there is one group."""
    A, B, S = statistics.A, statistics.B, statistics.S
    if len(A) > 1:
        return KroneckerFactors(A, B, S, bases)
    return KroneckerFactors(A[0], B[0], None if S is None else S[0], bases and (bases[0][0], bases[1][0]))
