"""How parameters are called in messages and matched in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameter_name(group: Mapping[str, Any], number: int, index: int) -> str:
    """The name of the parameter at ``index`` of group ``number``; by its position where there are no names.

    >>> parameter_name({"param_names": ["head.weight"]}, 0, 0), parameter_name({}, 1, 2)
    ('head.weight', 'parameter 2 of group 1')
    """
    names = group.get("param_names")
    return bare(names[index]) if names else f"parameter {index} of group {number}"


def bare(name: str) -> str:
    """A parameter's name without what DDP, torch.compile and activation checkpointing put around modules.

    So a state that was saved under one wrapper loads under another.

    >>> bare("module.layers.0._orig_mod.up.weight")
    'layers.0.up.weight'
    """
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
