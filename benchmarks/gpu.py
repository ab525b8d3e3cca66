"""Everything about a GPU in one call of less than eight minutes: right or wrong, how fast, how exact, and why.

    python benchmarks/gpu.py                          # in the repository's root; to runs/gpu, or --out FOLDER
    python benchmarks/gpu.py --only steps,profile     # these anew; others' figures in the folder stay
    python benchmarks/gpu.py --tiny --device cpu      # every line of it on next to nothing, as its test does

torch is all that it needs; steepest may lie in src/ beside it. Peers that are installed take part (for a folder of
them: PYTHONPATH). The figures go to gpu.json after each section, the summary to gpu.txt and to the terminal.

Time is shared out between sections, and what one leaves goes to the next. A section that would not fit is skipped, and
parts that would not are named. One that raises is noted, and the rest goes on: in a process of its own and without
kernels if the device was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))
sys.path.insert(0, str(HERE.parent / "src"))  # before any other steepest

import torch  # noqa: E402
from gpu_job import Job, Unavailable, free, plain, said, wait, without_rich  # noqa: E402


@dataclass(frozen=True)
class Section:
    """A part of the whole."""

    name: str
    module: str
    function: str
    weight: float
    """Its share of the time, in seconds of the default budget."""
    least: float
    """Seconds; with less left it is skipped."""

    def run(self, job: Job) -> None:
        """Measure; modules are imported here, so that one that can't be is this section's error."""
        getattr(import_module(self.module), self.function)(job)


SECTIONS = (
    Section("machine", "gpu_machine", "measure", weight=15, least=1),
    Section("kernels", "gpu_kernels", "check", weight=55, least=10),
    Section("engine", "gpu_engine", "check", weight=35, least=10),
    Section("gates", "gpu_kernels", "gates", weight=70, least=10),
    Section("solvers", "gpu_solvers", "measure", weight=40, least=10),
    Section("steps", "gpu_steps", "measure", weight=175, least=20),
    Section("precision", "gpu_precision", "measure", weight=30, least=10),
    Section("profile", "gpu_profile", "measure", weight=30, least=10),
)
"""In the order in which they run: what is wrong or slow is known before what depends on it is measured."""


@dataclass
class Session:
    """One run of the sections, under a budget."""

    device: torch.device
    out: Path
    budget: float = 450.0
    tiny: bool = False
    trace: bool = False
    command: str = ""
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print

    def run(self, sections: Sequence[Section] = SECTIONS) -> dict[str, Any]:
        """Everything, as JSON has it; what the folder holds of other sections stays."""
        self.began = self.clock()
        self.out.mkdir(parents=True, exist_ok=True)
        self.content = self._kept() | {
            "command": self.command,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "tiny": self.tiny,
            "budget": self.budget,
        }
        for i, section in enumerate(sections):
            self._take(section, sum(one.weight for one in sections[i:]))
            if not self._alive():
                rest = [one.name for one in sections[i + 1 :]]
                self.say(f"the device is lost after {section.name}: a process of its own goes on with {rest}")
                self._start_anew(rest)
                break
        return self.content

    def _take(self, section: Section, weights: float) -> None:
        """One section, whose share of the time is its weight's of these."""
        left = self.budget - (self.clock() - self.began)
        row: dict[str, Any] = {"status": "skipped", "reason": "", "seconds": 0.0, "left_out": [], "figures": {}}
        row |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "budget": left}
        row["kernels"] = os.environ.get("STEEPEST_KERNELS", "auto")
        self.content["sections"][section.name] = row
        if left <= (0 if self.tiny else section.least):
            row["reason"] = f"{left:.0f} s are left of the budget, and it takes {section.least:g} s at least"
            self.say(f"== {section.name}: skipped, {row['reason']}")
            return self._write()
        start = self.clock()
        share = max(left * section.weight / weights, min(section.least, left))
        job = Job(
            self.device,
            self.tiny,
            until=start + share,
            clock=self.clock,
            figures=row["figures"],
            earlier={name: one["figures"] for name, one in self.content["sections"].items()},
            left_out=row["left_out"],
            keep=self._write,
            say=lambda what: self.say(f"{self.clock() - self.began:6.1f} s  {section.name}: {what}"),
            out=self.out,
            trace=self.trace,
        )
        self.say(f"== {section.name}: {share:.0f} s")
        row["status"] = "ran"
        try:
            section.run(job)
            wait(self.device)
        except Unavailable as error:
            row |= {"status": "skipped", "reason": str(error)}
        except Exception as error:
            row |= {"status": "failed", "reason": said(error), "traceback": traceback.format_exc().splitlines()[-12:]}
            self.say(f"== {section.name}: failed, {row['reason']}")
        row["seconds"] = self.clock() - start
        self._write()

    def _kept(self) -> dict[str, Any]:
        """What an earlier run left in the folder, if it was of the same kind."""
        try:
            found = json.loads((self.out / "gpu.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        return {"sections": found["sections"] if found.get("tiny") == self.tiny else {}}

    def _write(self) -> None:
        self.content["seconds"] = self.clock() - self.began
        partial = self.out / "gpu.json.partial"
        partial.write_text(json.dumps(plain(self.content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        partial.replace(self.out / "gpu.json")

    def _alive(self) -> bool:
        """Whether the device still computes; after a fault in a kernel, none of this process's calls do."""
        try:
            free(self.device)
            return float(torch.ones(2, device=self.device).sum()) == 2
        except RuntimeError:
            return False

    def _start_anew(self, names: Sequence[str]) -> None:
        """The rest of the sections, without kernels, in what is left of the time."""
        left = self.budget - (self.clock() - self.began)
        if not names or left <= 0:
            return
        words = [sys.executable, str(HERE / "gpu.py"), "--device", str(self.device), "--out", str(self.out)]
        words += ["--budget", f"{left:.0f}", "--only", ",".join(names)]
        words += ["--tiny"] * self.tiny + ["--trace"] * self.trace
        sys.stdout.flush()
        os.execve(sys.executable, words, os.environ | {"STEEPEST_KERNELS": "never"})


def chosen(words: str | None) -> list[Section]:
    """Sections by name, in their own order.

    Raises:
        ValueError: for a name that none has.
    """
    if words is None:
        return list(SECTIONS)
    names = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [name for name in names if name not in [section.name for section in SECTIONS]]
    if unknown or not names:
        known = ", ".join(section.name for section in SECTIONS)
        raise ValueError(f"--only {words}: there are {known}")
    return [section for section in SECTIONS if section.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a folder")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--only", help="sections, by name and separated by commas")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--trace", action="store_true", help="also write chrome traces of the profiled steps")
    args = parser.parse_args(arguments)
    try:
        sections = chosen(args.only)
        device = torch.device(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: must be cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; --tiny --device cpu tries every section without")
    if args.budget <= 0:
        parser.error(f"--budget {args.budget:g}: must be more than 0 seconds")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if without_rich():
        print("rich is not installed: nothing draws tables here, so empty modules stand in for it")
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    session = Session(device, args.out, args.budget, args.tiny, args.trace, command)
    content = plain(session.run(sections))

    from gpu_words import summary

    text = summary(content)
    (args.out / "gpu.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{args.out / 'gpu.json'}")
    return int(any(section["status"] == "failed" for section in content["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
