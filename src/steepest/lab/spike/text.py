"""The text of the spike study: headline, findings, tables and JSON, for the console and the report alike.

N counts steps from the last basis without the spike: at N = 1 the spike is in the covariances, and at N = 2 the
gradient after it, whitened by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steepest.lab.shared.table import Table
from steepest.lab.spike.measures import ALL_BUT_QUOTIENTS, OFFSETS, ONLY_QUOTIENTS, PRECISIONS, Study, Trace
from steepest.lab.spike.study import GUARDS, SOLVERS

LATER = OFFSETS[1:]
STEPS = (-5, -1, 0, 1, 4, 9, 19)
"""Rows of the table of eigenvalues: steps, counted from the spike's."""
RANKS = (1, 2, 5, 10)
"""Its columns, and one more: the first eigenvalue that is zero for a covariance made of one gradient."""
KEYS = {
    "top1": "top1_deg",
    "leading": "leading_deg",
    "to_first": "to_first_gradient_deg",
    "to_truth": "to_truth_deg",
    "lost_left": "quotients_lost_left",
    "lost_right": "quotients_lost_right",
    "smallest_right": "smallest_quotient_right",
    "update_rms": "update_rms",
}
"""Names of a trace's series in JSON."""


def tf32(study: Study) -> str:
    """Say how TF32 was computed.

    >>> from steepest.lab.spike.study import Setup
    >>> tf32(Study(Setup()))
    'TF32 emulated'
    """
    return "TF32 emulated" if study.setup.emulated else "real TF32"


def headline(study: Study) -> tuple[str, str]:
    """Return the study in one sentence, and a further one."""
    high, highest = (study.after(study.trace("REKLS", "absolute", p).leading, 2) for p in PRECISIONS)
    claim = (
        f"One step after the spike, the eigenbasis has turned by {angle(high)}° at “high” precision, "
        f"and by {angle(highest)}° at “highest”."
    )
    return claim, (
        f"That is with the absolute eps, where the covariances at the two precisions soon differ by "
        f"{share(apart(study, 'absolute'))}. With the relative floor it is {share(apart(study, 'relative'))}."
    )


def findings(study: Study) -> list[str]:
    """Return the findings, each in a sentence or two with its numbers."""
    spike = study.setup.spike_at

    def turned(guard: str, precisions: Sequence[str], offsets: Sequence[int]) -> str:
        return turns(study, [study.trace(solver, guard, p) for solver in SOLVERS for p in precisions], offsets)

    def with_quotients(precisions: tuple[str, str]) -> str:
        return turns(study, [study.quotients[solver][precisions] for solver in SOLVERS], LATER)

    frozen, rounded = (study.trace("REKLS", "absolute", p) for p in ("highest", "high"))
    ratios = [values[0] / values[1] for values in (frozen.eigenvalues[0], frozen.eigenvalues[spike - 1])]
    truth = [study.trace("REKLS", guard, "highest", "directional").to_truth for guard in ("relative", "absolute")]
    known = [angle(study.after(series, n)) for series in truth for n in (0, 1)]
    rms = {guard: study.trace("REKLS", guard, "highest").update_rms for guard in GUARDS}
    later = {guard: f"{study.after(series, 20):.2f}" for guard, series in rms.items()}
    return [
        f"Absolute eps, from N = {LATER[0]} on: the basis has turned by {turned('absolute', ['high'], LATER)} at "
        f"“high”, by {turned('absolute', ['highest'], LATER)} at “highest”.",
        f"With the spike in R, REKLS at “highest” finds its smallest Rayleigh quotient at "
        f"{study.after(frozen.smallest_right, 1):.1e} of the largest; at “high”, at "
        f"{study.after(rounded.smallest_right, 1):.1e}, and {study.after(rounded.lost_right, 1)} of "
        f"{study.setup.shape[1]} below eps.",
        f"One product does it. With only the Rayleigh quotients in TF32: {with_quotients(ONLY_QUOTIENTS)}. With "
        f"everything but the quotients in TF32: {with_quotients(ALL_BUT_QUOTIENTS)}.",
        f"The basis that stood still until then is the first gradient's. REKLS' basis is within "
        f"{angle(max(frozen.to_first[:spike]))}° of that gradient's singular vectors at “highest”, and the ratio of "
        f"L's two largest eigenvalues is {ratios[0]:.4f} after step 1 and {ratios[1]:.4f} after step {spike}.",
        f"Relative floor: the basis turns too, by {turned('relative', PRECISIONS, (1,))} at N = 1, but at both "
        f"precisions, since a gradient so large outweighs all others. L differs by "
        f"{share(apart(study, 'relative'))} between them.",
        f"Gradients clipped to the first one's norm: it turns by {turned('clipped', PRECISIONS, (1,))} at N = 1, and "
        f"by {turned('clipped', PRECISIONS, (-1,))} in the step before.",
        f"Where the true covariance is known, REKLS' basis at “highest” is {known[0]}° from it before the spike and "
        f"{known[1]}° after with the relative floor, {known[2]}° and {known[3]}° with the absolute eps.",
        f"An update's root mean square, {study.after(rms['relative'], 0):.2f} learning rates before the spike, is "
        f"{later['relative']} at N = 20 with the relative floor, {later['absolute']} with the absolute eps, "
        f"{later['clipped']} with clipped gradients.",
    ]


def angles(
    study: Study,
    gradients: str = "isotropic",
    before: Sequence[int] = OFFSETS[::-1],
    after: Sequence[int] = OFFSETS,
) -> Table:
    """Return the angles of the top eigenvector and of the leading ones to those before the spike."""
    head = ["guard", "solver", "precision", *(f"N = {n}\nbefore" for n in before), *(f"N = {n}\nafter" for n in after)]
    rows = [
        [GUARDS[case.guard], case.solver, precision, *(both(study, trace, n) for n in (*(-n for n in before), *after))]
        for case, pair in study.pairs.items()
        for precision, trace in pair.traces.items()
        if case.gradients == gradients
    ]
    return Table(head, rows, labels=3)


def eigenvalues(study: Study, guard: str, precision: str) -> Table:
    """Return the eigenvalues of REKLS' L around the spike."""
    ranks = (*RANKS, study.setup.shape[1] + 1)
    ordinals = [f"{rank}{ {1: 'st', 2: 'nd'}.get(rank, 'th') }" for rank in ranks]
    rows = []
    for step in (study.setup.spike_at + offset for offset in STEPS):
        values = study.trace("REKLS", guard, precision).eigenvalues[step]
        name = f"{step + 1}" + (" (spike)" if step == study.setup.spike_at else "")
        rows.append([name, *(f"{values[rank - 1]:.4g}" for rank in ranks), f"{values[0] / values[1]:.4f}"])
    return Table(["after step", *ordinals, "1st / 2nd"], rows)


def all_eigenvalues(study: Study) -> dict[str, Table]:
    """Return the tables of eigenvalues for each guard and precision, by title."""
    return {f"REKLS, {words}, {p}": eigenvalues(study, guard, p) for guard, words in GUARDS.items() for p in PRECISIONS}


def products(study: Study) -> Table:
    """Return the angles with only some of the products in TF32."""
    names = {ONLY_QUOTIENTS: "only the Rayleigh quotients", ALL_BUT_QUOTIENTS: "all but the Rayleigh quotients"}
    rows = [
        [names[precisions], solver, *(both(study, trace, n) for n in OFFSETS)]
        for solver, traces in study.quotients.items()
        for precisions, trace in traces.items()
    ]
    return Table(["in TF32", "solver", *(f"N = {n}\nafter" for n in OFFSETS)], sorted(rows, reverse=True), labels=2)


def floors(study: Study) -> Table:
    """Return how far L differs between the precisions, by relative floor."""
    return Table(["relative floor", "difference"], [[f"{floor:g}", share(x)] for floor, x in study.floors.items()])


def as_json(study: Study) -> dict[str, Any]:
    """Return the content of all tables, and the values behind the findings, as plain values."""

    def around(series: Sequence[float]) -> dict[str, float]:
        found = {n: study.after(series, n) for n in (*(-n for n in OFFSETS[::-1]), 0, *OFFSETS, 20)}
        return {f"{n:+d}": float(f"{value:.4g}") for n, value in found.items()}

    def values(trace: Trace) -> dict[str, Any]:
        return {key: around(series) if (series := getattr(trace, name)) else None for name, key in KEYS.items()}

    return {
        "headline": " ".join(headline(study)),
        "findings": findings(study),
        "setup": vars(study.setup) | {"tf32": "emulated" if study.setup.emulated else "real"},
        "cases": [
            {
                "gradients": case.gradients,
                "guard": GUARDS[case.guard],
                "solver": case.solver,
                "kl_floor": case.kl_floor,
                "apart": around(pair.apart),
                **{precision: values(trace) for precision, trace in pair.traces.items()},
            }
            for case, pair in study.pairs.items()
        ],
        "eigenvalues": {title: table.records() for title, table in all_eigenvalues(study).items()},
        "products": products(study).records(),
        "apart_by_floor": {f"{floor:g}": float(f"{x:.3g}") for floor, x in study.floors.items()},
    }


def apart(study: Study, guard: str) -> float:
    """Return how far L differs between the precisions at the last N, for the solver with the larger difference."""
    pairs = (pair for case, pair in study.pairs.items() if (case.guard, case.gradients) == (guard, "isotropic"))
    return max(study.after(pair.apart, OFFSETS[-1]) for pair in pairs)


def turns(study: Study, traces: Iterable[Trace], offsets: Sequence[int]) -> str:
    """Return the range of the angles, of top and leading eigenvectors, of these traces at these N."""
    found = [study.after(series, n) for trace in traces for series in (trace.top1, trace.leading) for n in offsets]
    low, high = angle(min(found)), angle(max(found))
    return f"{low}°" if low == high else f"{low} to {high}°"


def both(study: Study, trace: Trace, offset: int) -> str:
    """Return the angle of the top eigenvector and that of the leading ones."""
    return f"{angle(study.after(trace.top1, offset))} / {angle(study.after(trace.leading, offset))}"


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
