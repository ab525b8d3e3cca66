"""The record of one section: its figures, how much time is left, and the file that keeps them all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FILE = "gpu.json"


class Unavailable(Exception):
    """A section needs something that is missing here; the message names it."""


@dataclass
class Record:
    """What a section is given, and where it leaves its figures."""

    device: torch.device
    tiny: bool = False
    """Whether sizes are those of a test, at which figures mean nothing."""
    until: float = math.inf
    """The time by ``clock`` at which the section should end."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Filled step by step, so that a section that fails keeps what it had."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """The figures of the sections before, by name."""
    left_out: list[str] = field(default_factory=list)
    """The parts for which time was too short."""
    write: Callable[[], None] = lambda: None
    """Writes the file as it stands."""
    clock: Callable[[], float] = time.monotonic
    out: Path = Path()
    trace: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.until - self.clock()

    def fits(self, part: str, expected: float = 0.0) -> bool:
        """Return whether there is time for a part that takes so many seconds. One that doesn't fit is noted."""
        if expected < self.left:
            print(f"  {part}", flush=True)
            return True
        self.left_out.append(part)
        return False


def load(folder: Path) -> dict[str, Any]:
    """Return the content of the file in a folder; it is empty if there is none."""
    try:
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def save(content: Mapping[str, Any], folder: Path) -> None:
    """Replace the file in a folder at once, so that it is never half written."""
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)
