"""Chapters 13 and 14: low precision, and compiled steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steepest.testing.clause import NotApplicable, clause
from steepest.testing.evidence import expect, expect_close
from steepest.testing.saving import by_file
from steepest.testing.subject import Run, Subject


@clause(13, "bfloat16 parameters have float32 state")
def float32_state(subject: Subject) -> None:
    """Averages in bfloat16 stop moving, because 1/1000 of a gradient changes nothing in a number with 8 bits.

    The clause is checked after steps, and after a state was loaded.
    """
    run = subject.start(torch.bfloat16)
    run.steps(range(2))
    for where, each in (("", run), (" after loading", by_file(subject, run))):
        tensors = {path: x for path, x in each.state().items() if isinstance(x, Tensor) and x.is_floating_point()}
        if not tensors:
            raise NotApplicable("keeps no state")
        coarse = [f"{path} in {str(x.dtype)[6:]}" for path, x in tensors.items() if x.dtype.itemsize < 4]
        expect(not coarse, f"state in float32{where}", f"{len(coarse)} tensors coarser, as {coarse[:1]}")


@clause(14, "torch.compile(optimizer.step), without recompiling when lr changes", slow=True)
def compiled_step(subject: Subject) -> None:
    """The step can be compiled, trains as without, and does not recompile when a tensor learning rate changes.

    The clause counts how often tracing starts again, with a backend that runs graphs as they are.
    """
    subject.needs("lr")
    graphs = 0

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch.compiler.reset()
    eager, run = (subject.start(names=subject.one, lr=torch.tensor(subject.lr)) for _ in range(2))
    start = run.weights()
    step = torch.compile(run.optimizer.step, backend=backend)
    compiled = Run(run.params, _Stepper(step), by_closure=False)  # type: ignore[arg-type]
    counts = []
    for k in range(10):
        for each in (run, eager):
            each.set("lr", subject.lr / (1 + max(k - 5, 0)))
        compiled.step(k)
        eager.step(k)
        counts.append(graphs)
    torch.compiler.reset()
    expect(counts[-1] > 0, "something to be compiled", "no graph")
    expect(counts[-1] == counts[5], "no new graph when lr changes", f"graphs so far, step by step: {counts}")
    expect_close(run.weights(), eager.weights(), start, "the same training compiled as uncompiled")


class _Stepper:
    """An object with a compiled step, in place of an optimizer."""

    def __init__(self, step: Any) -> None:
        self.step = step
