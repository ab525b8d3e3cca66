"""A tap sees a layer's inputs and the gradients at its outputs together, and changes neither.

It is a forward hook that passes the layer's output through an autograd function. This works where hooks on tensors or
full backward hooks don't: under an activation in place that follows, in checkpointed and in compiled models.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steepest.curvature.layer import Layer
from steepest.linalg.untraced import untraced


class Listener(ABC):
    """What taps report to. They hold it weakly: when it is gone, they do nothing."""

    nodes: list[weakref.ref[Any]]
    """The taps' nodes in autograd graphs that exist."""

    @abstractmethod
    def hears(self, module: nn.Module) -> bool:
        """Return whether what is called now is to be captured."""

    @abstractmethod
    def count(self, shape: torch.Size) -> None:
        """Take note of a backward pass that begins at outputs of the model of this shape."""

    @abstractmethod
    def feed(self, layer: Layer, inputs: Tensor, gradients: Tensor) -> None:
        """Take in a layer's inputs ``[N, ...]`` and the gradients at its outputs."""

    @property
    @abstractmethod
    def feeding(self) -> bool:
        """Whether the backward pass that runs now is one whose gradients are captured."""


class _Through(torch.autograd.Function):
    """The identity, in place, whose backward pass has the layer's inputs beside the gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, listener: weakref.ref[Listener], layer: Layer) -> Tensor:
        """Save the inputs, in their own dtype."""
        ctx.mark_dirty(output)  # otherwise no operation in place could follow
        ctx.save_for_backward(inputs)
        ctx.listener, ctx.layer = listener, layer
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Feed inputs and gradients, if this pass is one that is captured."""
        listener = ctx.listener()
        if listener is not None and listener.feeding:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{ctx.layer.name!r}: backward with create_graph=True: K-FAC's statistics don't exist for losses "
                    "that contain derivatives of the network; use steepest.GaussNewton for these"
                )
            listener.feed(ctx.layer, *ctx.saved_tensors, gradient)
        return gradient, None, None, None


class Hook:
    """A forward hook on a module. A copy or a pickle of it does nothing, since the module in that is another one."""

    first = True
    """Whether it runs before the hooks of others."""

    def __init__(self, listener: weakref.ref[Any] | None, module: nn.Module | None) -> None:
        self.listener = listener
        self.module = None if module is None else weakref.ref(module)
        self.handle: RemovableHandle | None = None

    def put_on(self) -> RemovableHandle:
        """Hook it to its module, and remove hooks whose listeners are gone."""
        module = self.module() if self.module is not None else None
        assert module is not None
        for number in [number for number, hook in module._forward_hooks.items() if is_inert(hook)]:
            for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs):
                hooks.pop(number, None)
        self.handle = module.register_forward_hook(self, prepend=self.first, with_kwargs=True)
        return self.handle

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """Return the output as it is; while the listener hears it, what `heard` makes of it.

        A module calls it with keyword arguments and the output; with the output alone if the hook was removed after
        the module had begun to call its hooks, as garbage collection may do at any time.
        """
        listener = self.listener() if self.listener is not None else None
        if len(rest) < 2 or listener is None or not listener.hears(module):
            return rest[-1]
        return self.heard(listener, args, *rest)

    def heard(self, listener: Listener, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return what takes the output's place."""
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, (self.handle.id if self.handle is not None else 0,)


class Tap(Hook):
    """The hook of one layer, whose output it passes through an autograd function."""

    def __init__(self, listener: weakref.ref[Any], layer: Layer) -> None:
        super().__init__(listener, layer.module)
        self.layer = layer

    @untraced
    def heard(self, listener: Listener, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the output itself, or another tensor with its memory, with the tap in its graph."""
        layer, inputs = self.layer, args[0] if args else kwargs["input"]
        if not (layer.weight.requires_grad and output.requires_grad) or in_functorch():
            return output
        if output._is_view():
            # An autograd function in place would rewrite the history of the view's base, and leave its own edge out.
            # This is no view, with the same memory; linear layers and convolutions don't need their output again.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        output = _Through.apply(output, inputs, self.listener, layer)  # type: ignore[no-untyped-call]
        listener.nodes.append(weakref.ref(output.grad_fn))
        return output


class OutputTap(Hook):
    """The hook of the model, which has its outputs counted when a backward pass begins at them."""

    first = False

    @untraced
    def heard(self, listener: Listener, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output as it is."""
        first, reference = first_tensor(output), self.listener
        if first is not None and first.grad_fn is not None and not in_functorch():
            shape = first.shape

            def count(_: Any) -> None:
                listener = reference() if reference is not None else None
                if listener is not None:
                    listener.count(shape)

            first.grad_fn.register_prehook(count)
        return output


def first_tensor(output: Any) -> Tensor | None:
    """Return a model's outputs: the tensor itself, "logits" of a mapping, or the first tensor that is no scalar.

    >>> first_tensor({"loss": torch.ones(()), "hidden": [torch.ones(1)], "logits": torch.ones(2)})
    tensor([1., 1.])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return cast(Tensor, output["logits"])
        output = tuple(output.values())
    if not isinstance(output, tuple | list):
        return None
    found = (first_tensor(part) for part in output)
    return next((x for x in found if x is not None and x.dim()), None)


def _inert(number: int) -> Hook:
    """A hook that does nothing, in a module that was copied or loaded together with its hooks."""
    # Hooks are numbered by process. Without this a hook that is added later could get the number of this one.
    RemovableHandle.next_id = max(RemovableHandle.next_id, number + 1)
    return Hook(None, None)


def is_inert(hook: Any) -> bool:
    """Return whether a hook is one of these, and reports to nobody any more."""
    return isinstance(hook, Hook) and (hook.listener is None or hook.listener() is None)


def in_functorch() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp) is going on: taps pass by then."""
    return torch._C._functorch.peek_interpreter_stack() is not None
