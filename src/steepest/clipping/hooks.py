"""Hooks on the projections of queries and keys, by which training passes tell what attention's logits are.

Those of a copied or unpickled module do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steepest.clipping.attention import Attention


def listen(found: Attention, module: nn.Module) -> list[Any]:
    """Have an attention module report its logits to ``found``; return the handles that remove the hooks."""
    if isinstance(module, nn.MultiheadAttention):
        return [module.register_forward_pre_hook(_Inputs(found, module), with_kwargs=True)]
    return [part.owner.register_forward_hook(_Outputs(found, role, part.owner)) for role, part in found.parts.items()]


class _Hook:
    def __init__(self, attention: Attention, owner: nn.Module) -> None:
        self.attention, self.owner = attention, owner

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()

    def hears(self, module: nn.Module) -> bool:
        return module is self.owner and module.training and torch.is_grad_enabled()


class _Nothing:
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class _Outputs(_Hook):
    def __init__(self, attention: Attention, role: str, owner: nn.Module) -> None:
        super().__init__(attention, owner)
        self.role = role

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.hears(module):
            with torch.no_grad():
                self.attention.hear(self.role, output)


class _Inputs(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        if self.hears(module):
            assert isinstance(module, nn.MultiheadAttention)
            x = dict(zip(("query", "key"), args[:2], strict=False)) | dict(kwargs)
            with torch.no_grad():
                rows, b = 2 * module.embed_dim, module.in_proj_bias  # those of values are left out
                makes = partial(
                    nn.functional.linear, weight=module.in_proj_weight[:rows], bias=b if b is None else b[:rows]
                )
                made = makes(x["query"])
                self.attention.hear("q", made)
                self.attention.hear("k", made if x["key"] is x["query"] else makes(x["key"]))
