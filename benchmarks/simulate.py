"""Simulate how evenly plans divide a step among 8 to 4096 ranks, and what they send; no rank is started.

    python benchmarks/simulate.py                 # prints, and writes benchmarks/results/scaling.json
    python benchmarks/simulate.py --plot          # draws docs/scaling.svg from that file; needs matplotlib
    python benchmarks/simulate.py --tables        # the tables of docs/scaling.md
    python benchmarks/simulate.py --time          # how long planning itself takes

docs/scaling.md says what is simulated and what is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from steepest.exchange.plan import Job, Plan, make_plan
from steepest.lab.plan.models import Model, preset
from steepest.lab.plan.plan import Mesh, jobs, look, mesh

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/scaling.json"
PLOT = ROOT / "docs/scaling.svg"
MODELS = ("7b", "70b")
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKS = (8192, 4096, 2048)
FREQUENCY = 10
TOKENS = 2**22

WAYS = {
    "cost": ("most expensive first, by cost", "#2f7de1", "-"),
    "bytes": ("largest first, by bytes", "#98990f", "--"),
    "round-robin": ("in turn", "#7d8799", ":"),
    "blocks 8192": ("by cost, blocks of 8192", "#8a5cf0", "-"),
    "blocks 4096": ("by cost, blocks of 4096", "#f0842c", "-"),
    "blocks 2048": ("by cost, blocks of 2048", "#12a48b", "-"),
}
"""The ways to assign matrices to ranks: in words, and as a line."""


def model(name: str) -> Model:
    return preset(name, "soap", {"precondition_frequency": FREQUENCY})


def loads(name: str, way: str, world: int) -> Sequence[float]:
    """Return the FLOPs of a step of each rank."""
    block_size = int(way.split()[1]) if way.startswith("blocks") else 0
    listed = list(jobs(model(name).cut(block_size), mesh("fsdp", world)))
    if way == "round-robin":
        return Plan(tuple(listed), world, tuple(j % world for j in range(len(listed))), ()).loads()
    if way == "bytes":
        owners = make_plan([replace(job, cost=float(job.rectangle.size)) for job in listed], world).owners
        return Plan(tuple(listed), world, owners, ()).loads()
    return make_plan(listed, world).loads()


def balance(name: str, way: str, world: int) -> float:
    """Return the largest load divided by the mean load."""
    found = loads(name, way, world)
    return round(max(found) * world / sum(found), 4)


def waiting(name: str, world: int, in_order: bool) -> float:
    """Time from the first bucket to the last if ranks wait for each other after each, divided by the mean load.

    Buckets are those of the plan, or ``in_order`` of the model's layers, each as large as the plan's on average.
    """
    plan = make_plan(jobs(model(name), mesh("fsdp", world)), world)
    if in_order:
        sizes = [job.rectangle.size for job in plan.jobs]
        edges = [0]
        for j in range(1, len(sizes)):
            if sum(sizes[: j + 1]) * len(plan.buckets) > len(edges) * sum(sizes):
                edges.append(j)
        buckets = tuple(tuple(range(a, b)) for a, b in pairwise([*edges, len(sizes)]))
        plan = replace(plan, buckets=buckets)
    return round(plan.lockstep() * world / sum(plan.loads()), 4)


def outlook(name: str, block_size: int, on: Mesh) -> dict[str, float]:
    """Return what a rank holds, sends and computes."""
    one = look(model(name).cut(block_size), on, TOKENS)
    return {
        "matrices": one.matrices,
        "state_max": round(one.state_max),
        "state_mean": round(one.state_mean),
        "sent_in_max": one.sent_in_max,
        "sent_out_max": one.sent_out_max,
        "sent_out_mean": round(one.sent_out_mean),
        "share": round(one.share, 6),
    }


def simulate() -> dict[str, Any]:
    found: dict[str, Any] = {"frequency": FREQUENCY, "tokens": TOKENS, "balance": {}, "waiting": {}, "outlook": {}}
    for name in MODELS:
        for way in WAYS:
            found["balance"][f"{name}, {way}"] = {world: balance(name, way, world) for world in WORLDS}
            print(name, way, found["balance"][f"{name}, {way}"], flush=True)
        for kind, in_order in (("by cost", False), ("in order", True)):
            found["waiting"][f"{name}, {kind}"] = {world: waiting(name, world, in_order) for world in WORLDS}
        for size in (0, *BLOCKS):
            found["outlook"][f"{name}, {size}"] = {
                world: outlook(name, size, mesh("fsdp", world)) for world in WORLDS if world >= 64
            }
            print(name, size, found["outlook"][f"{name}, {size}"], flush=True)
    return found


def clock(matrices: int = 10_000, world: int = 4096) -> None:
    """Print the CPU time of a plan, and of what a rank asks of it."""
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    layouts = [mesh("fsdp", world).layout(shape) for shape in shapes]
    listed = [
        Job(f"w{k}", (layout := layouts[k % 4]), layout.whole, float(layout.whole.size), layout.whole.size, (2, 4))
        for k in range(matrices)
    ]

    def timed(what: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = call()
        print(f"{what}: {time.process_time() - start:.2f} s")
        return found

    print(f"{matrices} matrices of {len(shapes)} shapes, {world} ranks")
    plan = timed("plan", lambda: make_plan(listed, world))
    timed("digest", plan.digest)
    timed("traffic", plan.traffic)
    buckets = range(len(plan.buckets))
    timed("transfers of a rank", lambda: [(plan.inward(b, 0), plan.outward(b, 0)) for b in buckets])


def tables(found: dict[str, Any]) -> list[str]:
    """Return the tables of docs/scaling.md."""
    few = ("64", "256", "1024", "4096")
    shared = [("", *few)]
    for name in MODELS:
        shared += [(f"{name}, {WAYS[way][0]}", *_ratios(found["balance"][f"{name}, {way}"], few)) for way in WAYS]
    some = ("8", "16", "32", "64", "128", "256")
    waited = [("", *some), *((key, *_ratios(found["waiting"][key], some)) for key in found["waiting"])]
    held = [("", "blocks", "ranks", "state, GB", "on average", "in, MB", "out, MB", "on average", "share")]
    for name in MODELS:
        for size in (0, 4096, 2048):
            for world in few:
                one = found["outlook"][f"{name}, {size}"][world]
                gigabytes = (f"{one[key] / 1e9:.2f}" for key in ("state_max", "state_mean"))
                megabytes = (f"{one[key] / 1e6:.0f}" for key in ("sent_in_max", "sent_out_max", "sent_out_mean"))
                held.append((name, str(size or "–"), world, *gigabytes, *megabytes, f"{one['share']:.2%}"))
    return [_markdown(rows) for rows in (shared, waited, held)]


def _ratios(row: dict[str, float], worlds: Sequence[str]) -> list[str]:
    return [f"{row[world]:.2f}" for world in worlds]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def plot(found: dict[str, Any]) -> None:
    """Draw the balance against the number of ranks, in a panel for each model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "steepest", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(10, 4.2), sharey=True, layout="constrained")
    for ax, name in zip(axes, MODELS, strict=True):
        for way, (label, colour, line) in WAYS.items():
            points = found["balance"][f"{name}, {way}"]
            ax.plot(list(map(int, points)), list(points.values()), "o", ls=line, ms=3, color=colour, label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(WORLDS, [str(world) for world in WORLDS])
        ax.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        ax.set_title(f"Llama 2 {name.upper()}")
        ax.set_xlabel("ranks")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("largest load by mean load (simulated)")
    axes[0].legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw what was simulated before")
    parser.add_argument("--time", action="store_true", help="time a plan instead")
    parser.add_argument("--tables", action="store_true", help="print the page's tables of what was simulated before")
    args = parser.parse_args()
    if args.time:
        clock()
        return
    if args.tables:
        print("\n\n".join(tables(json.loads(RESULTS.read_text()))))
        return
    if args.plot:
        plot(json.loads(RESULTS.read_text()))
        return
    RESULTS.write_text(json.dumps(simulate(), indent=1) + "\n")


if __name__ == "__main__":
    main()
