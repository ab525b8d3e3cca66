"""The base of optimizers that see all parameters as one vector, and evaluate the loss as often as they like.

They are optimizers of their own and no rules, because they have no direction for each matrix. Their state is a few
tensors under the first parameter, where torch.optim.LBFGS keeps its own, too. It is there from the construction on,
because distributed checkpoints would otherwise make it by a step without a closure.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from steepest.exchange.assign import peers_of
from steepest.exchange.shards import is_dtensor
from steepest.newton.carried import columns, matched


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
    counts: ClassVar[tuple[str, ...]] = ("step", "skipped", "pairs")
    """Entries of the state that are integers on the host; the others are with the parameters, in float32 at least."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Entries of the state whose last dimension has an entry for each of the parameters'."""
    _order: list[Tensor] | None = None
    """The trainable parameters at the last look, in the order of the vectors' entries."""

    def __init__(self, params: Iterable[Any] | nn.Module, defaults: dict[str, Any]) -> None:
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)
        self._memory()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in (*self.copied, "_order")}

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

    @abstractmethod
    def _layout(self, length: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the state's entries, for ``length`` entries of the parameters."""

    def _begin(self) -> dict[str, float]:
        """Return the entries that don't begin at 0, and what they begin at."""
        return {}

    @torch.no_grad()
    def _memory(self) -> dict[str, Any]:
        """Return the state, which stands under the first trainable parameter; none where no parameter is trainable.

        It follows parameters that others have reordered, and begins anew where parameters were frozen, thawed, replaced
        or added, where its size has changed by an option, or where others have deleted it.
        """
        params, layout = self.trainable, self._layout(sum(p.numel() for p in self.trainable))
        own = layout.keys() - {"step"}  # which each parameter has, because distributed checkpoints miss those without
        order, self._order = self._order or params, params
        holders = [p for p, entries in self.state.items() if isinstance(p, Tensor) and not own.isdisjoint(entries)]
        if [*map(id, order)] != [*map(id, params)] or [*map(id, holders)] != [*map(id, params[:1])]:
            kept = self._take_out(holders, layout)
            if kept and params and {*order} == {*params}:
                at = columns(order, params)
                self.state[params[0]] |= {k: x[..., at] if k in self.vectors else x for k, x in kept.items()}
        if not params:
            return {}
        p = params[0]
        state: dict[str, Any] = self.state[p]
        if layout.keys() - state.keys() or any(len(state[k]) != shape[0] for k, shape in layout.items() if shape[1:]):
            start = self._begin()
            for k, shape in layout.items():
                device, dtype = self._place(k, p)
                state[k] = torch.full(shape, start.get(k, 0), device=device, dtype=dtype)
        self._check_layout(state, layout)
        for k in layout:
            state[k] = state[k].to(*self._place(k, p))
        for p in params:
            self.state[p]["step"] = state["step"]
        return state

    def _place(self, name: str, p: Tensor) -> tuple[torch.device, torch.dtype]:
        """Return where an entry is, and its dtype, for parameters like p."""
        if name in self.counts:
            return torch.device("cpu"), torch.int64
        return p.device, torch.promote_types(p.dtype, torch.float32)

    def _check_layout(self, state: Mapping[str, Any], layout: Mapping[str, tuple[int, ...]]) -> None:
        """Raise a ValueError unless all entries are there, in their shapes."""
        for name, shape in layout.items():
            x = state.get(name)
            if not isinstance(x, Tensor) or x.shape != shape:
                seen = "missing" if x is None else list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(
                    f"{name} of {type(self).__name__}'s state is {seen}, must be a tensor of shape {list(shape)}"
                )

    def _take_out(self, holders: Iterable[Tensor], names: Iterable[str]) -> dict[str, Any]:
        """Take entries of these names out of the state, and leave what others put there; return the first holder's."""
        taken: dict[Tensor, dict[str, Any]] = {}
        for p in [p for p in self.state if isinstance(p, Tensor)]:
            entries = self.state[p]
            taken[p] = {name: entries.pop(name) for name in names if name in entries}
            if not entries:
                del self.state[p]
        return next((taken[p] for p in holders), {})

    def state_dict(self) -> dict[str, Any]:
        """Return the options and the state, as torch.optim's do."""
        self._memory()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state in, by parameter names where there are some; dtypes stay as they are here.

        Raises:
            ValueError: if it doesn't fit: other groups, missing or misshapen state, options out of range. Nothing has
                changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        keys = matched(self.param_groups, state_dict)
        state = {keys.get(k, k): copy.deepcopy(entries) for k, entries in state_dict["state"].items()}
        order = [p for p in keys.values() if p.requires_grad]
        before = [dict(group) for group in self.param_groups]
        try:
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                group |= {k: copy.deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")}
            self._check()
            if order:
                self._check_layout(state.get(order[0], {}), self._layout(sum(p.numel() for p in order)))
        except Exception:
            for group, old in zip(self.param_groups, before, strict=True):
                group.clear()
                group |= old
            raise
        self.state.clear()
        self.state.update(state)
        self._order = order
        self._memory()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def falls(loss: float, below: float) -> bool:
    """Return whether a loss is finite and below another one.

    >>> falls(1.0, 2.0), falls(math.nan, 2.0), falls(2.0, math.nan)
    (True, False, False)
    """
    return math.isfinite(loss) and loss < below
