"""Inductor, except for graphs that it fails on: these run operation by operation, as without ``compile``.

Its code for CPUs fails on graphs of some shapes ("KeyError: 'buf9'", as of torch 2.9 to 2.14), and on all of them where
there is no C++ compiler. This shows when an update is first compiled, in the middle of a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph, as a backend of torch.compile; one that cannot be compiled is warned of and runs as it is."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    try:
        compiled: Callable[..., Any] = compile_fx(graph, inputs)  # type: ignore[assignment]
        return compiled
    except InductorError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"compile=True: an update can't be compiled, and runs without: {reason}", stacklevel=2)
        return graph.forward
