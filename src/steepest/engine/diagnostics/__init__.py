"""Diagnostics: what the latest step did, and how the factors and bases are that it was taken in.

A step only copies for them, and waits for nothing. `Diagnosed.diagnostics` computes everything when it is called,
from the state and from the directions of the latest step. Steps free those, unless somebody has called it before: from
the first call on, the optimizer keeps copies of the directions of its latest step.

  watch        what is kept of the latest step
  updates      what its directions were, noted to be read
  factors      how factors and bases are, likewise
  readings     numbers on devices, which are read together
  tallies      what was read, by rule and by parameter
  diagnosed    the part of the optimizer that asks for all of it
"""

from steepest.engine.diagnostics.diagnosed import Diagnosed

__all__ = ["Diagnosed"]
