"""Triton kernels for CUDA, and the one place that decides whether they are used.

Whatever a kernel does, plain torch does too: its twin, in the function that calls it. Twin and kernel agree up to
rounding. A kernel is used only for tensors on a CUDA device where Triton works, and from sizes on at which it pays
(`Gates`). See docs/kernels.md.

The environment variable ``STEEPEST_KERNELS`` and the scope `use` overrule that: "auto" is what stands above, "never"
means the twins, and "always" lets the gates of size go. In "always" kernels run on CPU tensors, too, if the process was
started with ``TRITON_INTERPRET=1``; so they are tested.

This module imports no Triton; the modules of the kernels do, and are imported when one is needed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it imports no compiler until there is one

from steepest.kernels.precision import INTERPRETED, product_precision

MODES = ("auto", "never", "always")
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Gates:
    """From which sizes on a kernel is used. benchmarks/gates.py measures what they should be.

    None of the defaults was measured here. A symmetric product in Triton is reported to pay from about 2048 rows up and
    to lose below. The others are arithmetic: see `steepest.kernels.symmetric` and `steepest.kernels.adam`.
    """

    bfloat16: int | None = 2048
    """Rows of a symmetric product in bfloat16; None: never."""
    tf32: int | None = 2048
    """Rows of one in TF32; None: never."""
    float32: int | None = None
    """Rows of one in full float32; None: never. Triton does it without tensor cores, which cuBLAS is known to do
    better: the half that symmetry saves may be lost again."""
    columns: int = 256
    """Columns of X in X Xᵀ: with fewer, the time goes into reading and writing the result, of which the kernel saves at
    most a quarter."""
    entries: int | None = 2**20
    """Entries of a stack of moments, or of state that may be put back; None: never. With fewer, launches cost more than
    memory does."""


gates = Gates()
"""Those in force. Assign others, or pass them to `use`."""


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    return mode


_mode = _checked(os.environ.get("STEEPEST_KERNELS", "auto"), "STEEPEST_KERNELS")
_working: dict[torch.device, bool] = {}


@contextmanager
def use(mode: str, sizes: Gates | None = None) -> Iterator[None]:
    """Use kernels as ``mode`` says inside the ``with`` block: "auto", "never" or "always".

    Args:
        mode: see above.
        sizes: gates to be in force meanwhile; by default those that are.

    Raises:
        ValueError: for another mode.

    Example:
        >>> with use("never"):
        ...     available(torch.zeros(2, 2))
        False
    """
    global _mode, gates
    before = _mode, gates
    _mode, gates = _checked(mode, "mode"), sizes or gates
    try:
        yield
    finally:
        _mode, gates = before


def available(x: Tensor) -> bool:
    """Whether kernels can be used for ``x`` at all, whatever its size.

    >>> available(torch.zeros(2, 2))
    False
    """
    return _candidate(x) and (INTERPRETED or _works(x.device))


def product_pays(X: Tensor) -> bool:
    """Whether the kernel multiplies ``X [..., d, k]`` by some ``[..., k, d]`` to a symmetric result faster than torch.

    Args:
        X: the first factor. float32 is multiplied in TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    if not _candidate(X) or X.dtype not in (torch.float32, torch.bfloat16):
        return False
    if X.numel() == 0 or X.shape[-1] * X.shape[-2] >= 2**31 or X.shape[-2] ** 2 >= 2**31:  # 32-bit offsets in a matrix
        return False
    if _mode == "always":
        return available(X)
    least = [rows for rows in (gates.bfloat16, gates.tf32, gates.float32) if rows is not None]
    if X.shape[-1] < gates.columns or not least or X.shape[-2] < min(least):
        return False
    rows = getattr(gates, product_precision(X))
    return rows is not None and X.shape[-2] >= rows and available(X)


def adam_pays(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether the kernels take Adam's two moments on faster than torch: all are ``[B, m, n]`` in float32.

    While torch.compile traces, they don't: it fuses the twin itself.
    """
    if not _candidate(g) or torch.compiler.is_compiling():
        return False
    if any(x.dtype != torch.float32 for x in (g, exp_avg, exp_avg_sq)):
        return False
    if not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()) or g.numel() == 0 or g[0].numel() >= 2**30:
        return False
    enough = gates.entries is not None and g.numel() >= gates.entries
    return (enough or _mode == "always") and available(g)


def keeping_pays(x: Tensor) -> bool:
    """Whether the kernel keeps slots of ``x [B, ...]`` and puts them back faster than torch.

    Each must be one piece of memory. The gate is that of moments: where they are worth a kernel, so is what saves
    touching them.
    """
    if not _candidate(x) or torch.compiler.is_compiling() or x.dim() == 0 or x.numel() == 0 or x[0].numel() >= 2**30:
        return False
    if not (x.is_contiguous() or (x.dim() > 2 and x.mT.is_contiguous())):
        return False
    enough = gates.entries is not None and x.numel() >= gates.entries
    return (enough or _mode == "always") and available(x)


def _candidate(x: Tensor) -> bool:
    """What can be told without asking the device, and what torch.compile can trace."""
    if _mode == "never" or not HAS_TRITON:
        return False
    if INTERPRETED:
        device = x.device.type == "cpu" and _mode == "always"
    else:
        device = x.is_cuda and torch.version.cuda is not None
    # A subclass may have no memory of its own. Kernels have no derivative.
    return device and type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())


@_disable_dynamo  # asked once, and no part of a graph
def _works(device: torch.device) -> bool:
    """Whether Triton compiles and runs kernels on this device; tried once. It needs a C compiler, for one thing."""
    if device not in _working:
        if torch.cuda.is_current_stream_capturing():
            return False  # a trial can't be captured
        _working[device] = torch.cuda.get_device_capability(device) >= (8, 0) and _tried(device)
    return _working[device]


def _tried(device: torch.device) -> bool:
    try:
        from steepest.kernels.symmetric import trial

        trial(device)
    except Exception as error:  # whatever it is, the twins do without
        warnings.warn(
            f"Triton is installed, but its kernels don't work on {device}, so torch's are used: {error!r}. "
            f"STEEPEST_KERNELS=never stops the trial.",
            stacklevel=2,
        )
        return False
    return True
