"""Tensors that take long to make and are kept between processes, in the folder ``steepest`` of the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from steepest.lab.shared.errors import BadInput

Tensors = dict[str, Tensor]


def folder() -> Path:
    """Return the folder: in ``XDG_CACHE_HOME``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steepest"


def cached(name: str, make: Callable[[], Tensors]) -> Tensors:
    """Return the tensors that are kept under this name; make them and keep them if there are none.

    Processes that do so at the same time leave one whole file. The name must tell apart what ``make`` may return.

    Raises:
        BadInput: if the folder can't be written to.
    """
    file = folder() / f"{name}.pt"
    if not file.is_file():
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()  # before the work, which would be lost
            torch.save(make(), partial)
            partial.replace(file)
        except OSError as error:
            remedy = "set XDG_CACHE_HOME to another folder"
            raise BadInput(f"can't write to {file.parent}: {error.strerror}; {remedy}") from error
        finally:
            with suppress(OSError):
                partial.unlink()
    tensors: Tensors = torch.load(file, weights_only=True)
    return tensors
