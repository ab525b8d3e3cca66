"""The names of parameters in messages and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put into the names of parameters."""


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the parameters of all groups, or their positions where they have no names.

    >>> parameter_names([{"params": [0], "param_names": ["head.weight"]}])
    ['head.weight']
    >>> parameter_names([{"params": [0]}, {"params": [0, 0]}])
    ['parameter 0 of group 0', 'parameter 0 of group 1', 'parameter 1 of group 1']
    """
    named = [group.get("param_names") or [] for group in groups]
    plain = iter(bare([name for names in named for name in names]))
    return [
        next(plain) if index < len(names) else f"parameter {index} of group {number}"
        for number, (group, names) in enumerate(zip(groups, named, strict=True))
        for index in range(len(group["params"]))
    ]


def bare(names: Sequence[str]) -> list[str]:
    """Remove what DDP, torch.compile and activation checkpointing add to the names of parameters.

    A state that was saved under one wrapper can then be loaded under another. DDP's ``module.`` is removed only if all
    names have it, and nothing is removed that would make two names equal.

    >>> bare(["module.layers.0._orig_mod.up.weight", "module.head.bias"])
    ['layers.0.up.weight', 'head.bias']
    >>> bare(["module.proj", "proj"])
    ['module.proj', 'proj']
    """
    plain = [str(name) for name in names]
    for wrapper in WRAPPERS:
        plain = [name.replace(wrapper, "") for name in plain]
    if len(set(plain)) < len(plain):
        plain = [str(name) for name in names]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    return plain
