"""What integrations say at the start: the routing to the log, and what may be wrong as one warning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch

from steepest.routing.table import Routing

logger = logging.getLogger("steepest.integrations")
"""The log of routings, at the level INFO; on the first rank only."""


def tell(who: str, routing: Routing, notes: Sequence[str], stacklevel: int) -> None:
    """Log a routing and notes on what a host has passed, and give the routing's warnings as one.

    ``stacklevel`` is the number of frames up to the caller who is to be warned.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        logger.info("%s\n%s", who, "\n".join([repr(routing), *notes]))
    if routing.warnings:
        warnings.warn(f"{who}: {'; '.join(routing.warnings)}", stacklevel=stacklevel + 1)
