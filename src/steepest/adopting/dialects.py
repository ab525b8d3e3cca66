"""What the entries of other optimizers mean: the same few things, under other names and in other conventions.

================================  =====================================================================
torch.optim's Adam, AdamW, NAdam  averages from zero, which a step corrects by their bias
Lion                              an average of gradients
torch.optim.SGD, Moonlight        ``momentum_buffer`` is a sum, M ← μ M + G; times 1-μ it is an average
other Muons                       ``momentum_buffer`` is an average, M ← μ M + (1-μ) G
microsoft/dion                    ``momentum`` is Dion's own, a sum for Muon, an average for AdamW and Lion
nikhilvyas/SOAP                   both moments in the basis; ``step`` leaves out the call that only seeds
pytorch_optimizer's SOAP          the first moment in the gradients' coordinates; the group's ``step`` counts every call
heavyball                         averages whose bias has been corrected, in names with a prefix and a number
================================  =====================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steepest.adopting.saved import NoCounterpart, Saved

Shape = Sequence[int]


@dataclass(frozen=True)
class Average:
    """An average of the gradients, in the parameter's shape: ``M ← μ M + (1-μ) G`` from zero."""

    momentum: Tensor


@dataclass(frozen=True)
class Moments(Average):
    """Adam's two moments, as averages from zero, in the parameter's shape."""

    squares: Tensor
    updates: int
    """The number of gradients that they have seen, for bias corrections."""
    largest: Tensor | None = None
    """AMSGrad's largest second moment."""


@dataclass(frozen=True)
class InBasis:
    """SOAP's two moments as a matrix ``[m, n]`` in the bases of its two covariances."""

    momentum: Tensor
    squares: Tensor
    updates: int
    factors: tuple[tuple[Tensor, Tensor] | None, ...]
    """The covariance of each side and its basis, ``[d, d]``; None for a side without."""
    kl: bool = False
    """Whether the covariances are KL-Shampoo's."""


@dataclass(frozen=True)
class Feedback:
    """Dion's momentum, which keeps what has not been applied, and the basis ``[d, r]`` that follows it."""

    momentum: Tensor
    basis: Tensor


Found = Average | InBasis | Feedback


def read(saved: Saved, shape: Shape) -> Found:
    """Return what a saved parameter's entries mean.

    Raises:
        NoCounterpart: if they mean nothing that is known here.
        ValueError: if they are damaged.
    """
    if not saved.entries:
        raise NoCounterpart("the saved state has nothing for it")
    for dialect in DIALECTS:
        found = dialect(saved, shape)
        if found is not None:
            return found
    raise NoCounterpart(f"no optimizer known here has the entries {', '.join(map(str, saved.entries))}")


def adam(saved: Saved, shape: Shape) -> Moments | None:
    """Read Adam's moments."""
    if not _has(saved, "exp_avg exp_avg_sq", "step max_exp_avg_sq mu_product"):
        return None
    largest = saved.like("max_exp_avg_sq", shape) if "max_exp_avg_sq" in saved.entries else None
    return Moments(saved.like("exp_avg", shape), saved.like("exp_avg_sq", shape), saved.count("step"), largest)


def lion(saved: Saved, shape: Shape) -> Average | None:
    """Read Lion's momentum."""
    return Average(saved.like("exp_avg", shape)) if _has(saved, "exp_avg", "step") else None


def momentum(saved: Saved, shape: Shape) -> Average | None:
    """Read the momentum of SGD and of Muon; only the options of their groups tell a sum from an average."""
    if not _has(saved, "momentum_buffer", "use_muon second_momentum_buffer"):
        return None
    if saved.entries["momentum_buffer"] is None:
        raise NoCounterpart("the saved state has no momentum")
    M, options = saved.like("momentum_buffer", shape), saved.options
    if options.get("dampening", 0) != 0:
        raise NoCounterpart(f"dampening={options['dampening']!r} leaves no average of gradients")
    if any(signs <= options.keys() for signs in SUMS):
        return Average(M * (1 - saved.option("momentum")))
    if any(signs <= options.keys() for signs in AVERAGES) or options.keys() <= KELLER:
        return Average(M)
    raise NoCounterpart("the options of its group don't tell whether 'momentum_buffer' is a sum or an average")


SUMS = ({"dampening"}, {"wd", "adamw_betas"})
"""Options by which the groups of torch.optim.SGD and of Moonlight's Muon are known."""
AVERAGES = ({"ns_coefficients"}, {"ns_coeffs", "nesterov"})
"""Those of the Muons of torch.optim and pytorch_optimizer."""
KELLER = {"lr", "weight_decay", "momentum", "use_muon", "initial_lr"}
"""All that groups of K. Jordan's Muon have, with a scheduler."""


def moonlight_adam(saved: Saved, shape: Shape) -> Moments | None:
    """Read the moments that Moonlight's Muon keeps for parameters that are no matrices."""
    if not _has(saved, "moment1 moment2 step", "use_muon"):
        return None
    return Moments(saved.like("moment1", shape), saved.like("moment2", shape), saved.count("step"))


def microsoft(saved: Saved, shape: Shape) -> Found | None:
    """Read the state of microsoft/dion, whose groups name their algorithm."""
    algorithm = saved.options.get("algorithm")
    if algorithm == "adamw" and _has(saved, "momentum variance"):
        return Moments(saved.like("momentum", shape), saved.like("variance", shape), saved.count("step"))
    if algorithm == "lion" and _has(saved, "momentum"):
        return Average(saved.like("momentum", shape))
    if algorithm == "muon" and _has(saved, "momentum"):
        return Average(saved.like("momentum", shape) * (1 - saved.option("mu")))
    if algorithm == "dion" and _has(saved, "momentum Q"):
        Q = saved.entries["Q"]
        return Feedback(saved.like("momentum", shape), saved.tensor(Q, "Q", getattr(Q, "shape", ())))
    return None


def soap(saved: Saved, shape: Shape) -> InBasis | Moments | None:
    """Read SOAP as its authors keep it, or as pytorch_optimizer does."""
    if not _has(saved, "exp_avg exp_avg_sq GG Q", "step precondition_frequency shampoo_beta"):
        return None
    authors = "step" in saved.entries
    moments = Moments(
        saved.like("exp_avg", shape),
        saved.like("exp_avg_sq", shape),
        saved.count("step") if authors else max(saved.count("step") - 1, 0),
    )
    return _in_basis(saved, moments, saved.entries["GG"], saved.entries["Q"], turned=authors)


def heavyball(saved: Saved, shape: Shape) -> Found | None:
    """Read heavyball's AdamW, Muon, SOAP and KL-SOAP; a parameter's state is a dict of the state of its blocks."""
    if not all(isinstance(key, int) for key in saved.entries):
        return None
    blocks = list(saved.entries.values())
    if len(blocks) > 1 or not isinstance(blocks[0], Mapping):
        raise NoCounterpart("it was cut into several blocks")
    makers, entries = set(), {}
    for name, value in blocks[0].items():
        if name not in ("is_initialized", "step"):
            parts = _HEAVYBALL.fullmatch(str(name))
            makers.add(parts and parts["maker"])
            entries[parts and parts["entry"]] = value
    if len(makers) != 1:
        return None
    block = replace(saved, entries=entries)
    (maker,) = makers
    if maker == "nesterov_ema" and _has(block, "momentum"):
        return Average(block.like("momentum", shape))
    updates = block.count("step_count")
    if maker == "update_by_adam" and _has(block, "exp_avg exp_avg_sq"):
        return _biased(block, updates, shape)
    if maker in ("scale_by_soap", "scale_by_kl_soap") and _has(block, "exp_avg exp_avg_sq GG Q"):
        merged: Shape = tuple(getattr(block.entries["exp_avg"], "shape", ()))  # [1, ...], with some dimensions merged
        if merged[:1] != (1,) or math.prod(merged) != math.prod(shape):
            raise ValueError(f"{saved.name}: 'exp_avg' was saved with shape {list(merged)}, and is for {list(shape)}")
        moments = _biased(block, max(updates - 1, 0), merged)
        squeezed = replace(moments, momentum=moments.momentum[0], squares=moments.squares[0])
        GG, Q = ([_only(x) for x in block.entries[name]] for name in ("GG", "Q"))
        return _in_basis(block, squeezed, GG, Q, turned=True, kl="kl" in maker)
    return None


DIALECTS: tuple[Callable[[Saved, Shape], Found | None], ...] = (
    adam, lion, momentum, moonlight_adam, microsoft, soap, heavyball,
)  # fmt: skip

_HEAVYBALL = re.compile(r"(?P<maker>\w+?)_(?P<entry>exp_avg|exp_avg_sq|momentum|GG|Q)_\d+")


def _has(saved: Saved, needed: str, possible: str = "") -> bool:
    """Return whether the entries are all of the ``needed``, and beyond them only ``possible`` ones."""
    return set(needed.split()) <= saved.entries.keys() <= set((needed + " " + possible).split())


def _biased(saved: Saved, updates: int, shape: Shape) -> Moments:
    """Return moments whose bias has been corrected as averages from zero, which after t updates lack β^t."""
    if saved.options.get("palm"):
        raise NoCounterpart("palm=True changes the decay of its second moment from step to step")
    beta1, beta2 = saved.option("betas")
    momentum = saved.like("exp_avg", shape) * (1 - beta1**updates)
    return Moments(momentum, saved.like("exp_avg_sq", shape) * (1 - beta2**updates), updates)


def _in_basis(saved: Saved, moments: Moments, GG: Any, Q: Any, turned: bool, kl: bool = False) -> InBasis | Moments:
    """Return SOAP's state; where no side has a basis, its moments are Adam's.

    Args:
        saved: the saved parameter.
        moments: its moments, in the shape of the matrix or tensor that was preconditioned.
        GG: a covariance for each dimension of it; None or an empty list for a dimension without.
        Q: likewise their bases.
        turned: whether the first moment is in the basis.
        kl: whether the covariances are KL-Shampoo's.
    """
    if not isinstance(GG, list | tuple) or not isinstance(Q, list | tuple) or len(GG) != len(Q):
        raise ValueError(f"{saved.name}: 'GG' and 'Q' must be lists of one matrix for each dimension")
    if all(map(_absent, Q)):
        return moments
    momentum, squares = moments.momentum, moments.squares
    if squares.dim() == 1:  # a vector is a row here
        momentum, squares, GG, Q = momentum.unsqueeze(0), squares.unsqueeze(0), [None, *GG], [None, *Q]
    if not len(Q) == squares.dim() == 2:
        raise NoCounterpart(f"it has {len(Q)} covariances there, and here one of rows and one of columns")
    factors = tuple(
        None if _absent(q) else (saved.tensor(K, "GG", (d, d)), saved.tensor(q, "Q", (d, d)))
        for K, q, d in zip(GG, Q, squares.shape, strict=True)
    )
    if not turned:
        left, right = (None if side is None else side[1].to(momentum.dtype) for side in factors)
        momentum = momentum if left is None else left.mT @ momentum
        momentum = momentum if right is None else momentum @ right
    return InBasis(momentum, squares, moments.updates, factors, kl)


def _absent(x: Any) -> bool:
    """Return whether a dimension has no matrix."""
    return x is None or (isinstance(x, list | tuple | Tensor) and len(x) == 0)


def _only(x: Any) -> Any:
    """Return the one matrix of a batch of one."""
    return x[0] if isinstance(x, Tensor) and x.dim() == 3 and len(x) == 1 else x
