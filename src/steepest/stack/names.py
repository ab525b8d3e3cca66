"""The names of parameters in messages and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameter_name(group: Mapping[str, Any], number: int, index: int) -> str:
    """Return the name of the parameter at ``index`` of group ``number``, or its position if it has no name.

    >>> parameter_name({"param_names": ["head.weight"]}, 0, 0), parameter_name({}, 1, 2)
    ('head.weight', 'parameter 2 of group 1')
    """
    names = group.get("param_names")
    return bare(names[index]) if names else f"parameter {index} of group {number}"


def bare(name: str) -> str:
    """Remove the prefixes that DDP, torch.compile and activation checkpointing add to a parameter's name.

    A state that was saved under one wrapper can then be loaded under another.

    >>> bare("module.layers.0._orig_mod.up.weight")
    'layers.0.up.weight'
    """
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
