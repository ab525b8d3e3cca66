"""The text of the spike study: headline, tables and JSON, for the console and the report alike.

N counts steps from the last basis without the spike: at N = 1 the spike is in the covariances, and at N = 2 the
gradient after it, whitened by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steepest.lab.shared.table import Table
from steepest.lab.spike.study import ALL_BUT_QUOTIENTS, GUARDS, OFFSETS, ONLY_QUOTIENTS, PRECISIONS, Study, Trace

BEFORE = [-n for n in OFFSETS[::-1]]


def headline(study: Study) -> tuple[str, str]:
    """Return the study in one sentence, and a further one."""
    high, highest = (study.after(study.trace("REKLS", "absolute", p)["leading_deg"], 2) for p in PRECISIONS)
    claim = (
        f"One step after the spike, the eigenbasis has turned by {angle(high)}° at “high” precision, "
        f"and by {angle(highest)}° at “highest”."
    )
    return claim, (
        f"That is with the absolute eps, where the covariances at the two precisions soon differ by "
        f"{share(study.apart('absolute'))}. With the relative floor it is {share(study.apart('relative'))}."
    )


def angles(study: Study, gradients: str = "isotropic", offsets: Sequence[int] = (*BEFORE, *OFFSETS)) -> Table:
    """Return the angles of the top eigenvector and of the leading ones to those before the spike."""
    rows = [
        [GUARDS[case.guard], case.solver, precision, *(both(study, trace, n) for n in offsets)]
        for case, pair in study.pairs.items()
        for precision, trace in pair.traces.items()
        if case.gradients == gradients
    ]
    return Table(["guard", "solver", "precision", *columns(offsets)], rows, labels=3)


def products(study: Study) -> Table:
    """Return the same angles, with the absolute eps, when only some of the products are in TF32."""
    names: dict[tuple[str, str], str] = {ONLY_QUOTIENTS: "Rayleigh quotients", ALL_BUT_QUOTIENTS: "everything else"}
    rows = [
        [names[precisions], solver, *(both(study, trace, n) for n in OFFSETS)]
        for (solver, precisions), trace in study.quotients.items()
    ]
    return Table(["only in TF32", "solver", *columns(OFFSETS)], sorted(rows), labels=2)


def floors(study: Study) -> Table:
    """Return how far REKLS' L differs between the precisions, by relative floor."""
    return Table(["relative floor", "difference"], [[f"{floor:g}", share(x)] for floor, x in study.floors.items()])


def as_json(study: Study) -> dict[str, Any]:
    """Return all series of all paths around the spike, and the tables, as plain values."""

    def around(series: Sequence[float]) -> dict[str, float] | None:
        offsets = (*BEFORE, 0, *OFFSETS, 20)
        return {f"{n:+d}": float(f"{study.after(series, n):.4g}") for n in offsets} if series else None

    return {
        "headline": " ".join(headline(study)),
        "setup": vars(study.setup) | {"tf32": study.setup.tf32},
        "cases": [
            {
                "gradients": case.gradients,
                "guard": GUARDS[case.guard],
                "solver": case.solver,
                "kl_floor": case.kl_floor,
                "apart": around(pair.apart),
                **{p: {name: around(series) for name, series in trace.items()} for p, trace in pair.traces.items()},
            }
            for case, pair in study.pairs.items()
        ],
        "products": products(study).records(),
        "apart_by_floor": {f"{floor:g}": float(f"{x:.3g}") for floor, x in study.floors.items()},
    }


def columns(offsets: Sequence[int]) -> list[str]:
    """Return the titles of columns of angles."""
    return [f"N = {abs(n)}\n{'before' if n < 0 else 'after'}" for n in offsets]


def both(study: Study, trace: Trace, offset: int) -> str:
    """Return the angle of the top eigenvector and that of the leading ones."""
    return f"{angle(study.after(trace['top1_deg'], offset))} / {angle(study.after(trace['leading_deg'], offset))}"


def angle(degrees: float) -> str:
    """Format an angle to a tenth, and below a degree to a hundredth.

    >>> angle(86.272), angle(0.0049)
    ('86.3', '0.00')
    """
    return f"{degrees:.{1 if degrees >= 0.95 else 2}f}"


def share(x: float) -> str:
    """Format a relative difference.

    >>> share(0.0184), share(19.04)
    ('1.8%', '19 times their norm')
    """
    return f"{x:.2g} times their norm" if x >= 1 else f"{100 * x:.2g}%"
