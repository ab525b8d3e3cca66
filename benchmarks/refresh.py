"""How an eigenbasis follows its matrix: time, accuracy and orthogonality of each solver; and how often it should.

    python benchmarks/refresh.py --json benchmarks/results/refresh.json
    python benchmarks/refresh.py --device cuda --sides 256,1024,4096 --batch 8
    python benchmarks/refresh.py --kl --json benchmarks/results/refresh_kl.json
    python benchmarks/refresh.py --first --shapes 512x512,8x4096
    python benchmarks/refresh.py --study --widths 64,128 --steps 100

Matrices drift as in training: K is an average (β = 0.95) of ``G Gᵀ`` for gradients whose singular values fall as
i^-1/2 and whose left singular vectors turn a little at every step. Each solver follows the same K with a basis of its
own, in turn, one refresh each; times are medians, of CPU time of one thread, or of the device's. Off the diagonal:
``‖offdiag(Qᵀ K Q)‖ / ‖K‖`` before and after, medians; orthogonality: the largest entry of ``QᵀQ - I`` ever seen.

``--kl`` measures what KL-Shampoo's covariances cost, on eight matrices of a GPT: SOAP without them and with them, a
step each in turn. Eight periods are measured, or twenty steps where each refreshes.

``--first`` compares the first refresh of one matrix, a decomposition, with later ones, for each rule that has both. A
step without a refresh is subtracted from each.

The study trains the race's GPT at several widths with refreshes every so many steps, in lockstep and staggered.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steepest
from steepest.lab.workloads import gpt
from steepest.lab.workloads.stdlib import ALPHABET, CONTEXT, StandardLibrary
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.solvers import SOLVERS

BETA = 0.95
TURN = 0.003
SETTINGS: dict[str, dict[str, Any]] = {
    "f=1": {"precondition_frequency": 1},
    "f=5": {"precondition_frequency": 5},
    "f=10": {"precondition_frequency": 10},
    "f=10, staggered": {"precondition_frequency": 10, "stagger": True},
    "f from 1 to 10": {"precondition_frequency": steepest.LinearSchedule(1, 10, 100)},
}


def drifting(d: int, batch: int, every: int, device: str) -> Iterator[Tensor]:
    """K at each refresh, ``[batch, d, d]``."""
    generator = torch.Generator(device).manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    A = torch.linalg.qr(randn(batch, d, d)).Q
    S = TURN * randn(d, d) / d**0.5
    turn = torch.matrix_exp(S - S.T)
    A = A * torch.arange(1, d + 1, device=device) ** -0.5
    K = torch.zeros(batch, d, d, device=device)
    for step in range(1, 10**9):
        G = A @ randn(d, d // 2)
        K = BETA * K + (1 - BETA) * G @ G.mT
        A = turn @ A
        if step >= 20 and step % every == 0:
            yield K


def timed(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What it returns, and milliseconds."""
    if device == "cpu":
        start = time.thread_time()
        return call(), 1e3 * (time.thread_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def off_diagonal(K: Tensor, Q: Tensor) -> float:
    """``‖offdiag(Qᵀ K Q)‖ / ‖K‖``, of the first of the batch."""
    C = Q[0].mT.double() @ K[0].double() @ Q[0].double()
    return float((C - C.diagonal().diag()).norm() / K[0].double().norm())


def solve(
    d: int,
    every: int,
    refreshes: int,
    batch: int,
    device: str,
    solvers: Mapping[str, Callable[..., Any]] = SOLVERS,
    start: Callable[[Tensor], Tensor] = eigenvectors,
) -> list[dict[str, Any]]:
    """A row for each solver, of bases that begin as ``start`` says."""
    matrices = drifting(d, batch, every, device)
    bases = dict.fromkeys(solvers, start(next(matrices)))
    seen: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in solvers}
    for _ in range(refreshes + 1):
        K = next(matrices)
        for name, follow in solvers.items():
            before = off_diagonal(K, bases[name])
            (Q, _), ms = timed(lambda f=follow, Q=bases[name], K=K: f(K, Q, 1), device)  # type: ignore[misc]
            gram = Q.mT.double() @ Q.double()
            error = float((gram - torch.eye(d, device=device)).abs().max())
            seen[name].append((ms, before, off_diagonal(K, Q), error))
            bases[name] = Q
    rows = []
    for name, values in seen.items():
        ms, before, after, error = zip(*values[1:], strict=True)  # the first call of each allocates and warms up
        row = {"d": d, "every": every, "solver": name, "ms": statistics.median(ms)}
        row |= {"off_diagonal_before": statistics.median(before), "off_diagonal": statistics.median(after)}
        rows.append(row | {"orthogonality": max(error)})
    for row in rows:
        row["ratio_to_qr"] = row["ms"] / rows[0]["ms"]
        numbers = f"{row['ms']:9.2f}{row['ratio_to_qr']:7.2f}{row['off_diagonal_before']:10.1e}"
        print(f"{d:6}{every:6}  {row['solver']:12}{numbers}{row['off_diagonal']:10.1e}{row['orthogonality']:10.1e}")
    return rows


def kl(every: int, steps: int) -> list[dict[str, Any]]:
    """A row for plain factors and one for KL-Shampoo's, on eight matrices of a GPT of width 256."""
    shapes = [(768, 256), (256, 256), (1024, 256), (256, 1024)] * 2
    crew: dict[str, tuple[list[torch.nn.Parameter], steepest.Optimizer, list[float]]] = {}
    for name in ("plain", "kl"):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        rule = "soap" if name == "plain" else "kl_soap"
        optimizer = steepest.Optimizer(params, rule, lr=1e-3, precondition_frequency=every)
        crew[name] = (params, optimizer, [])
    generator = torch.Generator().manual_seed(0)
    for step in range(every + 1 + steps):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for params, optimizer, times in crew.values():
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            _, ms = timed(optimizer.step, "cpu")
            if step > every:
                times.append(ms)
    rows = []
    plain = crew["plain"][2]
    for name, (_, _, times) in crew.items():
        row = {
            "every": every,
            "factors": name,
            "ms_mean": statistics.mean(times),
            "ms_median": statistics.median(times),
        }
        row["ratio_of_means"] = row["ms_mean"] / statistics.mean(plain)
        row["ratio_of_medians"] = row["ms_median"] / statistics.median(plain)
        print(f"{every:6}  {name:18}{row['ms_mean']:9.1f}{row['ms_median']:9.1f}", end="")
        print(f"{row['ratio_of_means']:9.2f}{row['ratio_of_medians']:9.2f}")
        rows.append(row)
    return rows


def first(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """A row for each rule: milliseconds of the first refresh, and of a later one."""
    rows = []
    for rule in ("soap", "kl_soap", "shampoo", "kl_shampoo"):
        W = torch.nn.Parameter(torch.zeros(shape))
        optimizer = steepest.Optimizer([W], rule, lr=1e-3, precondition_frequency=2)
        generator, times = torch.Generator().manual_seed(0), []
        for _ in range(6):
            W.grad = torch.randn(shape, generator=generator)
            times.append(timed(optimizer.step, "cpu")[1])
        without = min(times[1::2])
        start, later = times[0] - without, min(times[2::2]) - without
        print(f"{'x'.join(map(str, shape)):>10}  {rule:12}{start:9.1f}{later:9.1f}{start / later:7.1f}")
        rows.append({"shape": shape, "rule": rule, "ms_first": start, "ms_later": later, "ratio": start / later})
    return rows


def study(width: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """A row for each frequency: loss on held-out text, and the optimizer's CPU time for a step."""
    workload = StandardLibrary()
    crew = {}
    for name, options in SETTINGS.items():
        torch.manual_seed(seed)
        model = gpt.GPT(len(ALPHABET), CONTEXT, d=width, heads=max(4, width // 32))
        rest = {"lr": 5e-3, "betas": (0.9, 0.95)}
        shared = {"lr": 2e-2 * (64 / width) ** 0.5, "betas": (0.9, 0.95), "shampoo_beta": 0.9, "weight_decay": 0.1}
        optimizer = steepest.for_model(model, "soap", elementwise=rest, **shared, **options)
        peak = [group["lr"] for group in optimizer.param_groups]
        crew[name] = (model, optimizer, peak, torch.Generator().manual_seed(seed), [])
    for step in range(steps):  # in turn, a step each
        rise = min(1.0, (step + 1) / (0.3 * steps)) * min(1.0, (steps - step) / (0.7 * steps))
        for model, optimizer, peak, generator, times in crew.values():
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * rise
            optimizer.zero_grad()
            workload.loss(model, workload.batch(generator)).backward()
            start = time.thread_time()
            optimizer.step()
            times.append(1e3 * (time.thread_time() - start))
    rows = []
    for name, (model, _, _, _, times) in crew.items():
        with torch.no_grad():
            loss = workload.validation(model.eval())
        row = {"width": width, "steps": steps, "seed": seed, "frequency": name, "loss": loss}
        row |= {"ms_mean": statistics.mean(times), "ms_max": max(times)}
        print(f"{width:6}  {name:18}{loss:8.4f}{row['ms_mean']:9.1f}{row['ms_max']:9.1f}")
        rows.append(row)
    return rows


def integers(words: str) -> list[int]:
    """ "64,128" as numbers."""
    return [int(word) for word in words.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=integers, default=[64, 128, 256, 512, 768, 1024])
    parser.add_argument("--every", type=integers, default=[1, 10], help="steps between refreshes")
    parser.add_argument("--refreshes", type=int, default=9, help="of each solver, measured")
    parser.add_argument("--batch", type=int, default=1, help="matrices at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kl", action="store_true", help="what KL-Shampoo's covariances cost")
    parser.add_argument("--first", action="store_true", help="the first refresh beside later ones")
    parser.add_argument("--shapes", default="64x64,256x256,512x512,1024x1024,2048x2048,8x4096", help="for --first")
    parser.add_argument("--study", action="store_true", help="train instead")
    parser.add_argument("--widths", type=integers, default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, one thread"
    print(f"torch {torch.__version__}, {machine}")
    rows: list[dict[str, Any]] = []
    if args.kl:
        print(f"{'every':>6}  {'factors':18}{'ms mean':>9}{'median':>9}{'ratios':>9}")
        for every in args.every:
            rows += kl(every, steps=8 * every if every > 1 else 20)
    elif args.first:
        first((32, 32))  # whatever is imported and allocated once
        print(f"{'shape':>10}  {'rule':12}{'ms first':>9}{'later':>9}{'ratio':>7}")
        for shape in args.shapes.split(","):
            m, n = map(int, shape.split("x"))
            rows += first((m, n))
    elif args.study:
        print(f"{'width':>6}  {'refreshes':18}{'loss':>8}{'ms mean':>9}{'ms max':>9}")
        for width in args.widths:
            rows += study(width, args.steps, args.seed)
    else:
        print(f"{'d':>6}{'every':>6}  {'solver':12}{'ms':>9}{'/ qr':>7}{'before':>10}{'after':>10}{'QᵀQ-I':>10}")
        for every in args.every:
            for d in args.sides:
                rows += solve(d, every, args.refreshes, args.batch, args.device)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "machine": machine, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
