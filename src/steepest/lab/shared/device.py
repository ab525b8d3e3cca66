"""Devices and threads that the commands measure on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steepest.lab.shared.errors import BadInput


def pick_device(name: str, allow_auto: bool = False) -> torch.device:
    """Return the device of this name: ``cpu``, ``cuda`` or, if allowed, ``auto``, which takes CUDA where it is there.

    >>> pick_device("tpu")
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: --device tpu: must be one of cpu, cuda
    """
    names = ("auto", "cpu", "cuda") if allow_auto else ("cpu", "cuda")
    if name not in names:
        raise BadInput(f"--device {name}: must be one of {', '.join(names)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread, so that sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
