"""Correctness and speed on a GPU by one command of less than eight minutes.

    python benchmarks/gpu                             # in the repository; figures go to runs/gpu, or --out FOLDER
    python benchmarks/gpu --only steps,profile        # measure some sections again; the others' figures stay
    python benchmarks/gpu --tiny --device cpu         # every section at the sizes of a test, without a GPU

It needs torch alone. Peers that are installed take part; PYTHONPATH may name a folder of them. Each section runs in a
process of its own and writes its figures to gpu.json after every part, so they survive whatever happens later: if a
section raises, it is recorded; if it loses the device or doesn't end, later ones run without kernels. The summary goes
to gpu.txt and to the terminal. Sections share the time by their weights, and hand on what they leave. Parts that would
not fit are named.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gpu.record import Record, Unavailable, load, save
from gpu.summary import summary
from steepest.lab.shared.errors import one_line

SECTIONS: Mapping[str, float] = {
    "machine": 15,
    "correctness": 120,
    "gates": 50,
    "solvers": 40,
    "steps": 165,
    "precision": 30,
    "profile": 30,
}
"""The sections in their order, correctness before speed, with their shares of the time."""
LEAST, GRACE = 10.0, 20.0
"""A section is skipped if fewer seconds are left, and stopped if it takes so many more than its share."""
LOST = 3
"""The exit status of a section whose device no longer computes."""


def run_all(args: argparse.Namespace, names: Sequence[str], command: str) -> dict[str, Any]:
    """Run sections one after the other, each in a process of its own, and return what the file then holds."""
    began, environment = time.monotonic(), dict(os.environ)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = load(args.out)
    sections = kept.get("sections", {}) if kept.get("tiny") == args.tiny else {}
    save({"command": command, "tiny": args.tiny, "budget": args.budget, "sections": sections}, args.out)
    for i, name in enumerate(names):
        left = args.budget - (time.monotonic() - began)
        if left < (0 if args.tiny else LEAST):
            _note(args.out, name, "skipped", f"{left:.0f} s are left of the budget")
            continue
        share = max(left * SECTIONS[name] / sum(SECTIONS[later] for later in names[i:]), min(LEAST, left))
        print(f"== {name}: {share:.0f} s", flush=True)
        words = [sys.executable, str(Path(__file__).parent), "--section", name, "--budget", f"{share:.1f}"]
        words += ["--device", args.device, "--out", str(args.out)]
        words += ["--tiny"] * args.tiny + ["--trace"] * args.trace
        try:
            status = subprocess.run(words, env=environment, timeout=share + GRACE).returncode
        except subprocess.TimeoutExpired:
            status = LOST
            _note(args.out, name, "failed", f"was stopped after {share + GRACE:.0f} s")
        if status not in (0, LOST):
            _note(args.out, name, "failed", f"its process ended with status {status}")
        if status:
            environment["STEEPEST_KERNELS"] = "never"
            print(f"== {name}: failed; later sections run without kernels")
    content = load(args.out)
    content["seconds"] = time.monotonic() - began
    save(content, args.out)
    return content


def run_section(name: str, device: torch.device, out: Path, seconds: float, tiny: bool, trace: bool = False) -> int:
    """Run one section in this process, and return its exit status."""
    content = load(out)
    row: dict[str, Any] = {"status": "ran", "reason": "", "seconds": 0.0, "left_out": [], "figures": {}}
    row |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "kernels": os.environ.get("STEEPEST_KERNELS", "auto")}
    earlier = {section: one["figures"] for section, one in content.get("sections", {}).items()}
    content.setdefault("sections", {})[name] = row
    start = time.monotonic()

    def write() -> None:
        row["seconds"] = time.monotonic() - start
        save(content, out)

    write()
    record = Record(
        device, tiny, start + seconds, row["figures"], earlier, row["left_out"], write, out=out, trace=trace
    )
    try:
        import_module(f"gpu.{name}").run(record)
        if record.cuda:
            torch.cuda.synchronize(device)
    except Unavailable as error:
        row |= {"status": "skipped", "reason": str(error)}
    except Exception as error:
        row |= {"status": "failed", "reason": one_line(error), "traceback": traceback.format_exc().splitlines()[-12:]}
        print(f"  failed: {row['reason']}")
    write()
    return 0 if _computes(device) else LOST


def _computes(device: torch.device) -> bool:
    """Return whether a device still computes. After a fault in a kernel, nothing in its process does."""
    try:
        gc.collect()
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


def _note(out: Path, name: str, status: str, reason: str) -> None:
    """Note the outcome of a section from outside of its process; its figures stay."""
    content = load(out)
    row = content["sections"].setdefault(name, {"seconds": 0.0, "left_out": [], "figures": {}})
    row |= {"status": status, "reason": reason}
    print(f"== {name}: {status}, {reason}")
    save(content, out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a folder")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by name and separated by commas")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--trace", action="store_true", help="also write chrome traces of the profiled steps")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)  # this process is a section's
    args = parser.parse_args(arguments)
    names = [name.strip() for name in args.only.split(",")]
    if not set(names) <= set(SECTIONS):
        parser.error(f"--only {args.only}: there are {', '.join(SECTIONS)}")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(one_line(error))
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: must be cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; --tiny --device cpu tries every section without")
    if args.budget <= 0:
        parser.error(f"--budget {args.budget:g}: must be more than 0 seconds")
    if args.section:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        return run_section(args.section, device, args.out, args.budget, args.tiny, args.trace)
    command = shlex.join(["python", "benchmarks/gpu", *(sys.argv[1:] if arguments is None else arguments)])
    content = run_all(args, [name for name in SECTIONS if name in names], command)
    text = summary(content)
    (args.out / "gpu.txt").write_text(text + "\n")
    print(f"\n{text}\n\n{args.out / 'gpu.json'}")
    return int(any(section["status"] == "failed" for section in content["sections"].values()))
