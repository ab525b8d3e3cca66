"""Triton kernels for CUDA, and the decision whether they are used.

Every kernel has a twin in plain torch, in the function that calls it, with the same result up to rounding. By default a
kernel is used for tensors on a CUDA device where Triton works, from the sizes on at which it is faster (`Gates`). See
docs/kernels.md.

The environment variable ``STEEPEST_KERNELS`` and the context manager `use` set another mode than this "auto": "never"
uses the twins only, "always" ignores the gates. In the mode "always" kernels also run on CPU tensors if the process was
started with ``TRITON_INTERPRET=1``, which is how they are tested.

This module does not import Triton; the kernels' modules do and are imported when a kernel is needed.
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

from steepest.kernels.precision import INTERPRETED, product_precision
from steepest.linalg.untraced import untraced

MODES = ("auto", "never", "always")
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class Gates:
    """The smallest sizes at which kernels are used, where None means never.

    The defaults are not measured; docs/kernels.md says how to measure them on a GPU. Symmetric products in Triton are
    reported to be faster than torch's from about 2048 rows on. The arithmetic behind the other gates is in
    `steepest.kernels.symmetric` and `steepest.kernels.adam`.
    """

    bfloat16: int | None = 2048
    """Rows of a symmetric product in bfloat16 or float16, which GPUs multiply at one speed."""
    tf32: int | None = 2048
    """Rows of a symmetric product in TF32."""
    float32: int | None = None
    """Rows of a symmetric product in full float32. Triton computes it without tensor cores, slower than cuBLAS, which
    may lose the half that symmetry saves."""
    columns: int = 256
    """Columns of X in X Xᵀ. With fewer, reading and writing the result takes most of the time, and the kernel saves at
    most a quarter of that."""
    entries: int | None = 2**20
    """Entries of a stack of moments, or of state that may be restored. With fewer, launches cost more than memory."""


gates = Gates()
"""The gates in force. Assign others, or pass them to `use`."""


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}={mode!r}: must be one of {', '.join(map(repr, MODES))}")
    return mode


_mode = _checked(os.environ.get("STEEPEST_KERNELS", "auto"), "STEEPEST_KERNELS")
_working: dict[torch.device, bool] = {}


@contextmanager
def use(mode: str, sizes: Gates | None = None) -> Iterator[None]:
    """Set the mode of the kernels inside a ``with`` block.

    Args:
        mode: "auto", "never" or "always"; see `steepest.kernels`.
        sizes: the gates inside the block; by default the gates in force.

    Raises:
        ValueError: if ``mode`` is another word.

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
    """Return whether kernels can be used for ``x``, whatever its size.

    >>> available(torch.zeros(2, 2))
    False
    """
    return _candidate(x) and (INTERPRETED or _works(x.device))


def product_pays(X: Tensor) -> bool:
    """Return whether to use the kernel for a symmetric product of ``X [..., d, k]`` with a matrix ``[..., k, d]``.

    Args:
        X: the first factor. float32 is multiplied in TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    if not _candidate(X) or X.dtype not in (torch.float32, torch.bfloat16, torch.float16):
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
    """Return whether to use the kernels for Adam's moments: for large float32 tensors ``[B, m, n]``.

    They are not used while torch.compile traces, since it fuses the twin itself.
    """
    if not _candidate(g) or torch.compiler.is_compiling():
        return False
    if any(x.dtype != torch.float32 for x in (g, exp_avg, exp_avg_sq)):
        return False
    if not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()) or g.numel() == 0 or g[0].numel() >= 2**30:
        return False
    return _enough(g) and available(g)


def keeping_pays(x: Tensor) -> bool:
    """Return whether to use the kernel that saves and restores slots of ``x [B, ...]``, state of a stack.

    Every slot must be contiguous by rows or by columns. The gate is that of Adam's moments, since both kernels save
    reading and writing memory.
    """
    if not _candidate(x) or torch.compiler.is_compiling() or x.dim() == 0 or x.numel() == 0 or x[0].numel() >= 2**30:
        return False
    if not (x.is_contiguous() or (x.dim() > 2 and x.mT.is_contiguous())):
        return False
    return _enough(x) and available(x)


def _enough(x: Tensor) -> bool:
    """Return whether ``x`` has as many entries as the gate asks for, or the mode asks for none."""
    return _mode == "always" or (gates.entries is not None and x.numel() >= gates.entries)


def _candidate(x: Tensor) -> bool:
    """Return whether kernels can take ``x``, by what torch.compile can trace and no device is asked."""
    if _mode == "never" or not HAS_TRITON:
        return False
    if INTERPRETED:
        device = x.device.type == "cpu" and _mode == "always"
    else:
        device = x.is_cuda and torch.version.cuda is not None
    # A subclass may hold no memory of its own, and kernels have no derivative.
    return device and type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())


@untraced  # asked once per device, and no part of a graph
def _works(device: torch.device) -> bool:
    """Return whether Triton compiles and runs kernels on this device, tried once. It may lack a C compiler, say."""
    if device not in _working:
        if torch.cuda.is_current_stream_capturing():
            return False  # the trial waits for the device, which cannot be captured
        _working[device] = torch.cuda.get_device_capability(device) >= (8, 0) and _passes_trial(device)
    return _working[device]


def _passes_trial(device: torch.device) -> bool:
    """Return whether a kernel compiles, runs and is right on a device; warn if it isn't."""
    try:
        from steepest.kernels.symmetric import trial

        trial(device)
    except Exception as error:  # whatever went wrong, the twins do not need Triton
        warnings.warn(
            f"Triton is installed, but its kernels don't work on {device}, so torch's operations are used: {error!r}. "
            f"STEEPEST_KERNELS=never skips the trial.",
            stacklevel=2,
        )
        return False
    return True
