"""What the sections of gpu.py share: a section's time, its figures, timing on either device, and a place for rich."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class Unavailable(Exception):
    """A section, or a part of one, needs what isn't here; the message says what."""


@dataclass
class Job:
    """What a section is handed, and where it leaves what it finds."""

    device: torch.device
    tiny: bool = False
    """Sizes for a test: every line runs, and no figure means anything."""
    until: float = math.inf
    """By `clock`, when the section should be through."""
    clock: Callable[[], float] = time.monotonic
    figures: dict[str, Any] = field(default_factory=dict)
    """Filled as it goes, so that what raises keeps what it had."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """Figures of the sections before, by name."""
    left_out: list[str] = field(default_factory=list)
    """For want of time."""
    keep: Callable[[], None] = lambda: None
    """Writes everything down as it stands."""
    say: Callable[[str], None] = lambda what: None
    out: Path = Path()
    trace: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - self.clock()

    def fits(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something that is expected to take so long; if not, it is noted."""
        if seconds < self.left:
            self.say(what)
            return True
        self.left_out.append(what)
        return False

    def check(self, name: str, value: float | None, limit: float, note: str = "") -> None:
        """Note a check: ``value`` at most ``limit``; None could not be checked here, and NaN is a failure."""
        row: dict[str, Any] = {"check": name, "value": value, "limit": limit, "note": note}
        row["ok"] = None if value is None else bool(value <= limit)
        self.figures.setdefault("checks", []).append(row)

    def checked(self, name: str, work: Callable[[], Any]) -> None:
        """Have a check run; if it raises, that is its outcome, and the others go on."""
        if not self.fits(name):
            return
        try:
            work()
        except Unavailable as error:
            self.check(name, None, 0.0, str(error))
        except Exception as error:
            self.check(name, math.nan, 0.0, said(error))
            if self.cuda:
                torch.cuda.synchronize(self.device)  # raises where the device is lost: then nothing more can be checked


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 5, lasts: float = 0.01) -> float:
    """Of one call, the median of some timings, each of as many calls as take ``lasts`` seconds; on a GPU by events."""
    work()
    calls = max(1, min(1000, math.ceil(lasts / max(_seconds(work, device, 1), 1e-7))))
    return 1e3 * statistics.median(_seconds(work, device, calls) / calls for _ in range(repeats))


def _seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        start = time.thread_time()
        for _ in range(calls):
            work()
        return max(time.thread_time() - start, 1e-9)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory back that nobody holds any more."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def without_rich() -> bool:
    """Where rich is missing, put empty modules in its place, and say so.

    Modules of the lab that measure import others that draw tables with rich. Nothing is drawn here, so to be imported
    is all that is asked of it.
    """
    with suppress(ModuleNotFoundError):
        import_module("rich")
        return False
    for name in ("rich", "rich.box", "rich.console", "rich.markup", "rich.table", "rich.progress"):
        sys.modules[name] = _Empty(name)
    return True


class _Empty(ModuleType):
    """A module from which any name can be imported."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object
