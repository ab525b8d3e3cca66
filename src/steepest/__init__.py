"""steepest: matrix-aware optimizers for PyTorch.

Example:
    >>> import torch, steepest
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> opt = steepest.for_model(model, "soap", lr=3e-3)
    >>> model(torch.randn(2, 8)).square().mean().backward()
    >>> opt.step()
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steepest.optimizers.public import *  # noqa: F403
else:
    # The command line imports this module first, and its help must not wait seconds for torch.

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of this package, when it is used for the first time."""
        from importlib import import_module
        from importlib.util import find_spec

        if not name.startswith("_") and find_spec(f"steepest.{name}"):
            return import_module(f"steepest.{name}")
        api = import_module("steepest.optimizers.public")
        if name == "__all__" or name in api.__all__:
            globals()[name] = getattr(api, name)
            return globals()[name]
        raise AttributeError(f"module 'steepest' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names too, which may not have been imported yet."""
        from steepest.optimizers.public import __all__

        return sorted({*globals(), *__all__})
