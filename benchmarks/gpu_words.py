"""What gpu.py prints at its end: plain text, to be pasted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpu_profile import table

Figures = Mapping[str, Any]


def summary(content: Figures) -> str:
    """All sections in short: what was measured, checked, left out, and what failed."""
    lines = [f"gpu.py: {content['command']}", f"{content['seconds']:.0f} s of {content['budget']:.0f} s"]
    for name, section in content["sections"].items():
        reason = f": {section['reason']}" if section["reason"] else ""
        lines += ["", f"== {name}: {section['status']}{reason} ({section['seconds']:.1f} s)"]
        lines += WORDS[name](section["figures"]) if section["figures"] else []
        if section["left_out"]:
            lines.append(f"  left out: {'; '.join(section['left_out'])}")
    return "\n".join(lines)


def _machine(found: Figures) -> Iterator[str]:
    environment = found["environment"]
    versions = " ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield f"  {environment['device']}, Python {environment['python']}, {versions}, CUDA {environment['cuda']}"
    if environment.get("nvidia_smi"):
        yield "  " + ", ".join(f"{key} {value}" for key, value in environment["nvidia_smi"].items())
    for row in found.get("products", ()):
        rates = ", ".join(f"{name} {_number(row[name])}" for name in row if name != "d")
        yield f"  products of {row['d']}: {rates} TFLOP/s"
    for row in found.get("copies", ()):
        yield f"  copies of {row['megabytes']:g} MiB: {_number(row['gigabytes_per_second'])} GB/s"
    if "launch_us" in found:
        yield f"  a launch: {_number(found['launch_us'])} µs"


def _checks(found: Figures) -> Iterator[str]:
    checks = found.get("checks", [])
    passed = sum(row["ok"] is True for row in checks)
    unknown = [row for row in checks if row["ok"] is None]
    yield f"  {passed} of {len(checks) - len(unknown)} checks hold, {len(unknown)} can't be made here"
    for row in checks:
        if row["ok"] is False:
            yield f"  FAILED {row['check']}: {_number(row['value'])} > {_number(row['limit'])} {row['note']}"
    for name, counts in found.get("waits", {}).items():
        yield f"  {name} waits for the device: " + ", ".join(f"{n} times {kind}" for kind, n in counts.items())


def _gates(found: Figures) -> Iterator[str]:
    for row in found.get("figures", ()):
        size = f"{row['batch']} × {row['size']}"
        yield f"  {row['what']:20} {row['precision']:9} {size:>9}: kernel over twin {row['ratio']:.2f}"
    for shape, ratio in found.get("blocks", {}).items():
        yield f"  blocks over whole products on a CPU, {shape}: {ratio:.2f}"
    if "undoing" in found:
        kernel, twin = found["undoing"]["kernel_ms"], found["undoing"]["twin_ms"]
        yield f"  a pass that could be undone: {_number(kernel)} ms by the kernel, {_number(twin)} ms by torch"
    if "suggested" in found:
        yield f"  suggested: {found['suggested']}"


def _solvers(found: Figures) -> Iterator[str]:
    for row in found.get("rows", ()):
        quality = "".join(f", {name} {row[name]:.1e}" for name in ("off_diagonal", "orthogonality") if name in row)
        size = f"{row['batch']} × {row['d']}"
        yield f"  {size:>10} {row['solver']:12}{row['precision']:9}{_number(row['ms']):>9} ms{quality}"


def _steps(found: Figures) -> Iterator[str]:
    for one in found.get("sets", ()):
        yield f"  {one['title']}; {one['steps']} steps"
        yield f"    {'mean':>9}{'p50':>9}{'max':>9}{'host':>9}{'/floor':>8}{'ratio':>7}  ms"
        for row in one["rows"]:
            if row["error"]:
                yield f"    {row['contender']}: {row['error']}"
                continue
            times = "".join(f"{_number(row[one['clock']][key]):>9}" for key in ("mean", "p50", "max"))
            rest = f"{_number(row['host_ms']):>9}{_number(row['over_floor']):>8}{row['ratio']:7.2f}"
            yield f"    {times}{rest}  {row['contender']} ({row['steps']} steps)"
        first = one["first_bases_seconds"]
        seconds = first if isinstance(first, str) else f"{first:.3g} s"
        yield f"    SOAP's first bases, made up here, would take: {seconds}"
        for package in one["missing"]:
            yield f"    {package} is not installed: its optimizers are missing"
    for row in found.get("goals", ()):
        yield f"  {row['goal']}: goal {row['limit']:g} {row['unit']}".rstrip() + "".join(_outcomes(row))


def _outcomes(row: Figures) -> Iterator[str]:
    for way in ("float32", "tf32"):
        if row[way] is None:
            yield f"; {way} not measured"
        else:
            verdict = "met" if row[f"{way}_met"] else f"missed {row[f'{way}_of_limit']:.2f} times"
            yield f"; {way} {_number(row[way])}, {verdict}"


def _precision(found: Figures) -> Iterator[str]:
    yield "  degrees from float64: one step, its maximum, at a refresh, a run, its maximum;"
    yield "  of the bases: orthogonality, and what is left off the diagonal"
    for row in found.get("rows", ()):
        angles = ("one_step_degrees", "one_step_degrees_max", "at_refresh_degrees", "run_degrees", "run_degrees_max")
        numbers = "".join(f"{_number(row[name], '.3g'):>10}" for name in angles)
        bases = "".join(f"{_number(row[name], '.2e'):>10}" for name in ("orthogonality", "off_diagonal"))
        yield f"  {numbers}{bases}  {row['rule']}: {row['variant']}"
    if "suggested" in found:
        yield f"  suggested: {found['suggested']}"


def _profile(found: Figures) -> Iterator[str]:
    yield f"  {found['shapes']}"
    for name, step in found.get("steps", {}).items():
        times = f"{_number(step['step_ms'])} ms, busy {step['busy_share']:.0%}, host {_number(step['host_ms'])} ms"
        yield f"  {name}: {times}, {step['launches']} launches, {step['copies']} copies"
        yield from table(step)


def _number(value: float | None, form: str = ".4g") -> str:
    return "?" if value is None else format(value, form)


WORDS = {
    "machine": _machine,
    "kernels": _checks,
    "engine": _checks,
    "gates": _gates,
    "solvers": _solvers,
    "steps": _steps,
    "precision": _precision,
    "profile": _profile,
}
