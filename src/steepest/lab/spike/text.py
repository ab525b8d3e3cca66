"""What the spike study found, in words, tables and plain values, for the console and the report alike.

N counts steps from the last basis without the spike: at N = 1 the spike is in the covariances, and at N = 2 the
gradient after it, whitened by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steepest.lab.spike.measures import ALL_BUT_QUOTIENTS, BOTH, OFFSETS, ONLY_QUOTIENTS, Study, Trace
from steepest.lab.spike.study import GUARDS, SOLVERS

LATER = OFFSETS[1:]
WATCHED = (-5, -1, 0, 1, 4, 9, 19)
"""Steps of the table of eigenvalues, from the spike's on."""
RANKS = (1, 2, 5, 10)
"""Its eigenvalues; and the first that a covariance made of one gradient cannot have."""

Table = tuple[list[str], list[list[str]]]
"""Its head, and its rows."""


def headline(study: Study) -> tuple[str, str]:
    """The study in one sentence, and one more."""
    high, highest = (study.after(study.trace("REKLS", "absolute", p).leading, 2) for p in BOTH)
    claim = (
        f"One step after the spike, the eigenbasis has turned by {angle(high)}° at “high” precision, "
        f"and by {angle(highest)}° at “highest”."
    )
    return claim, (
        f"That is with the absolute eps, where the covariances at the two precisions soon differ by "
        f"{share(apart(study, 'absolute'))}. With the relative floor it is {share(apart(study, 'relative'))}."
    )


def findings(study: Study) -> list[str]:
    """What was found, each sentence or two with the numbers that it rests on."""
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
        f"everything but them in TF32: {with_quotients(ALL_BUT_QUOTIENTS)}.",
        f"What stood still until then is the first gradient. REKLS' basis is within "
        f"{angle(max(frozen.to_first[:spike]))}° of that gradient's singular vectors at “highest”, and the ratio of "
        f"L's two largest eigenvalues is {ratios[0]:.4f} after step 1 and {ratios[1]:.4f} after step {spike}.",
        f"Relative floor: the basis turns too, by {turned('relative', BOTH, (1,))} at N = 1, but at both precisions, "
        f"since a gradient so large outweighs all others. L differs by {share(apart(study, 'relative'))} between them.",
        f"Gradients clipped to the first one's norm: it turns by {turned('clipped', BOTH, (1,))} at N = 1, and by "
        f"{turned('clipped', BOTH, (-1,))} in the step before.",
        f"Where the true covariance is known, REKLS' basis at “highest” is {known[0]}° from it before the spike and "
        f"{known[1]}° after with the relative floor, {known[2]}° and {known[3]}° with the absolute eps.",
        f"An update's root mean square, {study.after(rms['relative'], 0):.2f} learning rates before the spike, is "
        f"{later['relative']} at N = 20 with the relative floor, {later['absolute']} with the absolute eps, "
        f"{later['clipped']} with clipped gradients.",
    ]


def angles(study: Study, gradients: str = "isotropic", before: Sequence[int] = OFFSETS[::-1]) -> Table:
    """Angles of the top eigenvector and of the leading ones to those before the spike."""
    around = [f"N = {n}\nbefore" for n in before] + [f"N = {n}\nafter" for n in OFFSETS]
    head = ["guard", "solver", "precision", *around]
    rows = []
    for case, pair in study.pairs.items():
        if case.gradients == gradients:
            for precision, trace in pair.traces.items():
                cells = [both(study, trace, n) for n in (*(-n for n in before), *OFFSETS)]
                rows.append([GUARDS[case.guard], case.solver, precision, *cells])
    return head, rows


def eigenvalues(study: Study, guard: str, precision: str) -> Table:
    """L's for REKLS, around the spike."""
    ranks = (*RANKS, study.setup.shape[1] + 1)
    head = ["after step", *map(_ordinal, ranks), "1st / 2nd"]
    rows = []
    for step in (study.setup.spike_at + away for away in WATCHED):
        values = study.trace("REKLS", guard, precision).eigenvalues[step]
        name = f"{step + 1}" + (" (spike)" if step == study.setup.spike_at else "")
        rows.append([name, *(f"{values[rank - 1]:.4g}" for rank in ranks), f"{values[0] / values[1]:.4f}"])
    return head, rows


def products(study: Study) -> Table:
    """What the angles are when only some of the products are in TF32."""
    names: dict[tuple[str, str], str] = {
        ONLY_QUOTIENTS: "only the Rayleigh quotients",
        ALL_BUT_QUOTIENTS: "all but the Rayleigh quotients",
    }
    rows = [
        [names[precisions], solver, *(both(study, trace, n) for n in OFFSETS)]
        for solver, traces in study.quotients.items()
        for precisions, trace in traces.items()
    ]
    return ["in TF32", "solver", *(f"N = {n}\nafter" for n in OFFSETS)], sorted(rows, reverse=True)


def as_json(study: Study) -> dict[str, Any]:
    """All that the tables show, and what stands behind the findings, as plain values."""

    def around(series: Sequence[float]) -> dict[str, float]:
        found = {n: study.after(series, n) for n in (*(-n for n in OFFSETS[::-1]), 0, *OFFSETS, 20)}
        return {f"{n:+d}": float(f"{value:.4g}") for n, value in found.items()}

    def values(trace: Trace) -> dict[str, Any]:
        return {
            "top1_deg": around(trace.top1),
            "leading_deg": around(trace.leading),
            "to_first_gradient_deg": around(trace.to_first),
            "to_truth_deg": around(trace.to_truth) if trace.to_truth else None,
            "quotients_lost_left": around(trace.lost_left),
            "quotients_lost_right": around(trace.lost_right),
            "smallest_quotient_right": around(trace.smallest_right),
            "update_rms": around(trace.update_rms),
        }

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
        "eigenvalues": {
            f"REKLS, {GUARDS[guard]}, {precision}": records(eigenvalues(study, guard, precision))
            for guard in GUARDS
            for precision in BOTH
        },
        "products": records(products(study)),
        "apart_by_floor": {f"{floor:g}": float(f"{x:.3g}") for floor, x in study.floors.items()},
    }


def records(table: Table) -> list[dict[str, str]]:
    """A table's rows, each with its head.

    >>> records((["step", "N = 1\\nafter"], [["51", "0.00"]]))
    [{'step': '51', 'N = 1 after': '0.00'}]
    """
    head, rows = table
    return [dict(zip((title.replace("\n", " ") for title in head), row, strict=True)) for row in rows]


def apart(study: Study, guard: str) -> float:
    """How far L is apart between the precisions at the last N, by the solver for which it is further."""
    pairs = (pair for case, pair in study.pairs.items() if (case.guard, case.gradients) == (guard, "isotropic"))
    return max(study.after(pair.apart, OFFSETS[-1]) for pair in pairs)


def turns(study: Study, traces: Iterable[Trace], offsets: Sequence[int]) -> str:
    """The angles of these traces at these N, of top and leading eigenvectors, from the least to the largest."""
    found = [study.after(series, n) for trace in traces for series in (trace.top1, trace.leading) for n in offsets]
    low, high = angle(min(found)), angle(max(found))
    return f"{low}°" if low == high else f"{low} to {high}°"


def both(study: Study, trace: Trace, offset: int) -> str:
    """The angle of the top eigenvector, and of the leading ones."""
    return f"{angle(study.after(trace.top1, offset))} / {angle(study.after(trace.leading, offset))}"


def angle(degrees: float) -> str:
    """To a tenth, and below a degree to a hundredth.

    >>> angle(86.272), angle(0.0049)
    ('86.3', '0.00')
    """
    return f"{degrees:.{1 if degrees >= 0.95 else 2}f}"


def share(x: float) -> str:
    """A relative difference in words.

    >>> share(0.0184), share(19.04)
    ('1.8%', '19 times their norm')
    """
    return f"{x:.2g} times their norm" if x >= 1 else f"{100 * x:.2g}%"


def _ordinal(rank: int) -> str:
    """1st, 2nd, 3rd, 5th; for ranks like those of the table.

    >>> _ordinal(2), _ordinal(65)
    ('2nd', '65th')
    """
    return f"{rank}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(rank, 'th') }"
