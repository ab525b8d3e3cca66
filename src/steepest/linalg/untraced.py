"""The decorator of functions that torch.compile leaves alone when it meets them in what it compiles.

torch's own is private, but imports no compiler until such a function is first called; the public one imports it at
once, which takes longer than all of ``import steepest``.
"""

from __future__ import annotations

try:
    from torch._compile import _disable_dynamo as untraced
except ImportError:
    from torch.compiler import disable as untraced  # type: ignore[no-redef]

__all__ = ["untraced"]
