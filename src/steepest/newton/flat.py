"""The base of optimizers that see all parameters as one vector, and evaluate the loss as often as they like.

They are optimizers of their own and no rules, because they have no direction for each matrix. Their state is a few
tensors under the first parameter, where torch.optim.LBFGS keeps its own, too.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steepest.exchange.assign import peers_of
from steepest.exchange.shards import is_dtensor


class FlatOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer of one vector ``θ [P]``, which joins all trainable parameters in order.

    Args:
        params: a model, tensors, groups, or ``(name, tensor)`` pairs. All groups have the same options.
        defaults: the options.

    Raises:
        ValueError: for options out of range, for groups with different options, and for parameters of different
            dtypes or devices.
        RuntimeError: for parameters that other ranks hold too.
    """

    checks: ClassVar[Mapping[str, tuple[Callable[[Any], bool], str]]]
    """For each option, whether a value is allowed, and what is allowed in words."""
    copied: ClassVar[tuple[str, ...]] = ()
    """Attributes that copies and pickles take along, such as a model: its parameters stay the optimizer's."""

    def __init__(self, params: Iterable[Any] | nn.Module, defaults: dict[str, Any]) -> None:
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self.copied}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the group's options, where it has some, must be those of the other groups."""
        super().add_param_group(param_group)
        try:
            self._check()
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def options(self) -> dict[str, Any]:
        """The options, which all groups share."""
        return {k: v for k, v in self.param_groups[0].items() if k in self.checks}

    @property
    def trainable(self) -> list[Tensor]:
        """The parameters that the vector joins."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _check(self) -> None:
        """Raise unless groups, parameters and options are what a step can work with."""
        first, params = self.param_groups[0], [p for group in self.param_groups for p in group["params"]]
        name = type(self).__name__
        for number, group in enumerate(self.param_groups):
            for option in self.checks:
                if group[option] != first[option]:
                    raise ValueError(
                        f"{option}={group[option]!r} in group {number}, {first[option]!r} in group 0: {name} moves all "
                        "parameters as one vector, so all groups must have the same options"
                    )
        for option, (allowed, words) in self.checks.items():
            if not allowed(first[option]):
                raise ValueError(f"{option}={first[option]!r}: must be {words}")
        for p in params:
            if not p.is_floating_point():
                raise ValueError(f"a parameter of shape {list(p.shape)} and dtype {p.dtype}: only real numbers work")
            if (p.dtype, p.device) != (params[0].dtype, params[0].device):
                raise ValueError(
                    f"parameters of {params[0].dtype} on {params[0].device} and of {p.dtype} on {p.device}: {name} "
                    "joins all in one vector, so they must be of one dtype and on one device"
                )
        if any(map(is_dtensor, params)) or (dist.is_available() and dist.is_initialized() and peers_of(params)):
            raise RuntimeError(f"{name} works on one rank only: give it the parameters of a model that is not sharded")

    # The vector.

    def _weights(self) -> Tensor:
        """Return a copy of θ."""
        return torch.cat([p.detach().reshape(-1) for p in self.trainable])

    @torch.no_grad()
    def _move_to(self, flat: Tensor) -> None:
        """Write ``flat [P]`` into the parameters."""
        params = self.trainable
        for p, x in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.copy_(x.view_as(p))

    def _join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return tensors of the trainable parameters' shapes as one vector ``[P]``; None is zero."""
        pairs = zip(self.trainable, tensors, strict=True)
        return torch.cat([torch.zeros_like(p).reshape(-1) if x is None else x.reshape(-1) for p, x in pairs])

    @contextmanager
    def _restoring(self) -> Iterator[Tensor]:
        """Yield a copy of θ; an error in the ``with`` block leaves the parameters as they were, bit for bit."""
        before = self._weights()
        try:
            yield before
        except BaseException:
            self._move_to(before)
            raise

    # State.

    def _entries(self) -> dict[str, Any]:
        """Return the optimizer's state, which stands under the first trainable parameter."""
        entries: dict[str, Any] = self.state[self.trainable[0]]
        return entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            ValueError: if its groups, or the shapes of its tensors, are others. Nothing has changed then.
        """
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in state_dict["param_groups"]] != sizes:
            raise ValueError(f"the saved groups have other numbers of parameters than these: {sizes}")
        for entries in state_dict["state"].values():
            for name, x in entries.items():
                length = sum(p.numel() for p in self.trainable)
                if isinstance(x, Tensor) and x.dim() and x.shape[-1] != length:
                    raise ValueError(
                        f"{name} of the saved state has shape {list(x.shape)}; the model has {length} numbers"
                    )
        super().load_state_dict(state_dict)


def falls(loss: float, below: float) -> bool:
    """Return whether a loss is finite and below another one.

    >>> falls(1.0, 2.0), falls(math.nan, 2.0), falls(2.0, math.nan)
    (True, False, False)
    """
    return math.isfinite(loss) and loss < below
