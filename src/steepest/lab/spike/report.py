"""The spike study's report: one HTML file that explains itself and works offline."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape

from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.page import card, dot, figure, render, row, section, table
from steepest.lab.spike import figures
from steepest.lab.spike.measures import OFFSETS, Study
from steepest.lab.spike.study import FLOOR, GUARDS
from steepest.lab.spike.text import Table, angle, angles, apart, eigenvalues, findings, headline, products, share


def page(study: Study, command: str) -> str:
    """The whole file."""
    body = [
        _opening(study),
        _legend(),
        _jump(study),
        _steady_state(study),
        _cause(study),
        _truth(study),
        _remedies(study),
        _summary(study),
        _provenance(study, command),
    ]
    return render("steepest spike", body)


def tf32(study: Study) -> str:
    """How "high" was computed.

    >>> from steepest.lab.spike.study import Setup
    >>> tf32(Study(Setup()))
    'TF32 emulated'
    """
    return "TF32 emulated" if study.setup.emulated else "real TF32"


def _opening(study: Study) -> str:
    setup = study.setup
    m, n = setup.shape
    today = datetime.now(UTC).strftime("%d %B %Y")
    kicker = ["steepest spike", f"{m}×{n}", f"step {setup.spike_at + 1} ×{setup.scale:g}", tf32(study), today]
    claim, more = headline(study)
    return f"""<header>
<p class="kicker">{escape(" · ".join(kicker))}</p>
<h1>{escape(claim)}</h1>
<p class="sub">{escape(more)}</p>
<div class="cards">{"".join(_cards(study))}</div>
</header>"""


def _cards(study: Study) -> list[str]:
    jump = study.trace("REKLS", "absolute", "high")
    truth = study.trace("REKLS", "relative", "highest", "directional")
    frozen = study.trace("REKLS", "absolute", "highest", "directional")
    return [
        card("Turned at N = 2, “high”", f"{angle(study.after(jump.leading, 2))}°", "absolute eps, REKLS"),
        card("“high” from “highest”, in L", share(apart(study, "relative")).split()[0], "of L's norm, relative floor"),
        card("Basis from the truth", f"{angle(study.after(truth.to_truth, 0))}°", "before the spike, relative floor"),
        card("Basis from the truth", f"{angle(study.after(frozen.to_truth, 0))}°", "before the spike, absolute eps"),
    ]


def _legend() -> str:
    """Buttons that show and hide a path in all figures."""
    buttons = (
        f'<button type="button" aria-pressed="true" data-label="{escape(figures.name(*path))}">'
        f"{dot(colour)}{escape(figures.name(*path))}</button>"
        for path, colour in figures.PAINT.items()
    )
    return f'<nav aria-label="Show or hide paths">{"".join(buttons)}</nav>'


def _jump(study: Study) -> str:
    top = study.setup.top
    return section(
        "Does the basis turn?",
        "One matrix, gradients of independent normal entries, one of them a thousand times as large. At “high” "
        "products are TF32, at “highest” float32; otherwise the paths are the same.",
        figure(
            "Absolute eps",
            figures.turned(study, "absolute"),
            f"Angle between the top {top} eigenvectors of L and those before the spike (the dotted line). Dashed: "
            "“highest”.",
        ),
        figure(
            "Relative floor",
            figures.turned(study, "relative"),
            "The same. Both precisions turn, and at once: here the spike reaches L, and outweighs all that was in it.",
        ),
    ) + _show(angles(study), labels=3)


def _steady_state(study: Study) -> str:
    return (
        section(
            "What stands still before the spike?",
            "With the absolute eps L starts 1/eps too large, and then falls by its decay: it is the first gradient's, "
            "and nothing that came later counts. So its basis can't move.",
            figure(
                "Absolute eps",
                figures.top_eigenvalue(study, "absolute"),
                "L's largest eigenvalue. The straight fall is the first gradient, forgotten by 5% a step.",
            ),
            figure(
                "Relative floor",
                figures.top_eigenvalue(study, "relative"),
                "The same. Here L follows the gradients, and leaps when the spike comes.",
            ),
        )
        + _show(eigenvalues(study, "absolute", "high"), "Eigenvalues of L: REKLS, absolute eps, “high”")
        + "".join(
            _fold(eigenvalues(study, guard, precision), f"REKLS, {GUARDS[guard]}, “{precision}”")
            for guard, precision in (("absolute", "highest"), ("relative", "high"), ("relative", "highest"))
        )
    )


def _cause(study: Study) -> str:
    m, n = study.setup.shape
    return section(
        "Where does the jump come from?",
        "KL-Shampoo divides by Rayleigh quotients, diag(Qᵀ K Q). After the spike R's span more than TF32 can tell from "
        "zero: some come out negative, eps takes their place, and the next gradient enters L with the weight 1/eps.",
        figure(
            f"Quotients of R that eps stands in for, of {n}",
            figures.lost_quotients(study, "R"),
            "None until the spike. Those after it feed L.",
        ),
        figure(
            f"Quotients of L that eps stands in for, of {m}",
            figures.lost_quotients(study, "L"),
            "Half of L is the null space of the first gradient: rounding decides which of its quotients are positive. "
            "They feed R, from the first step on.",
        ),
    ) + _show(products(study), "The same angles, with TF32 in some products only", labels=2)


def _truth(study: Study) -> str:
    top = study.setup.top
    return section(
        "How far is the basis from the truth?",
        f"Gradients that prefer directions, {top} on either side, so that there is a right answer. Standing still is "
        "no virtue in itself.",
        figure(
            "Absolute eps",
            figures.from_truth(study, "absolute"),
            f"Angle between the top {top} eigenvectors of L and the true ones. What TF32 does after the spike looks "
            "like damage, and is the first time that L hears of a gradient.",
        ),
        figure(
            "Relative floor",
            figures.from_truth(study, "relative"),
            "The same. The spike costs some degrees: for a while L is that one gradient.",
        ),
    ) + _fold(angles(study, "directional"), "Angles to the basis before the spike", labels=3)


def _remedies(study: Study) -> str:
    return section(
        "What helps?",
        "A relative floor makes the precisions agree. Against the spike itself, clip gradients.",
        figure(
            "How large a floor must be",
            figures.apart_by_floor(study),
            f"How far L differs between “high” and “highest”, relative to its norm, at N = {OFFSETS[-1]}. "
            f"REKLS; the large point is the default, {FLOOR:g}.",
        ),
        figure(
            "How far a step goes",
            figures.update_sizes(study),
            "Root mean square of an update, in learning rates: REKLS at “highest”. Adam's second moment remembers the "
            "spike longest, whatever the covariances do.",
        ),
    )


def _summary(study: Study) -> str:
    remarks = "".join(f"<li>{escape(finding)}</li>" for finding in findings(study))
    return (
        f"<h2>In words</h2><ul class='notes'>{remarks}</ul>"
        "<p class='soft'>N counts steps from the last basis without the spike: at N = 1 the spike is in. Angles stand "
        f"as top eigenvector / top {study.setup.top}.</p>"
    )


def _provenance(study: Study, command: str) -> str:
    facts = {"command": command, "“high”": tf32(study), **versions(), "machine": machine(), **_sizes(study)}
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f"<h2>How to get this again</h2><dl>{pairs}</dl>"


def _sizes(study: Study) -> dict[str, str]:
    setup = study.setup
    return {"steps": f"{setup.steps}, spike at {setup.spike_at + 1}", "seed": str(setup.seed), "device": setup.device}


def _show(found: Table, title: str = "", labels: int = 1) -> str:
    head, rows = found
    lines = [row(escape(", ".join(cells[:labels])), cells[labels:]) for cells in rows]
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return heading + table([", ".join(head[:labels]), *head[labels:]], lines)


def _fold(found: Table, title: str, labels: int = 1) -> str:
    return f"<details><summary>{escape(title)}</summary>{_show(found, labels=labels)}</details>"
