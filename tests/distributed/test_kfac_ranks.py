"""K-FAC on several ranks: factors are averages over all samples, and training is that of one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import curved
import pytest
import torch
from ranks import Ranks


def slowly(*values: Any) -> Any:
    """Mark a case that runs on demand."""
    return pytest.param(*values, marks=pytest.mark.slow)


def farthest(results: list[tuple[float, ...]]) -> list[float]:
    """Return the largest of each figure, over the ranks."""
    return [max(figures) for figures in zip(*results, strict=True)]


@pytest.mark.parametrize("layout", ["ddp", "units", slowly("fsdp")])
def test_factors_and_weights_are_those_of_one_process(two: Ranks, layout: str) -> None:
    found = two.run(curved.as_one_process, layout, torch.float64, 5)
    factors, moved = farthest(found)
    assert factors < 1e-12
    assert moved < 1e-10
    assert found[0][1] == found[1][1], "all ranks have the same weights"


@pytest.mark.parametrize("layout", ["ddp", slowly("units")])
def test_factors_in_float32(two: Ranks, layout: str) -> None:
    assert farthest(two.run(curved.as_one_process, layout, torch.float32, 1))[0] < 1e-6


@pytest.mark.parametrize("layout", ["units", slowly("fsdp"), slowly("ddp")])
def test_checkpointed_activations(two: Ranks, layout: str) -> None:
    factors, moved = farthest(two.run(curved.as_one_process, layout, torch.float64, 3, True))
    assert factors < 1e-12
    assert moved < 1e-10


@pytest.mark.parametrize("layout", ["hsdp", slowly("ddp"), slowly("units")])
def test_four_ranks(four: Ranks, layout: str) -> None:
    factors, moved = farthest(four.run(curved.as_one_process, layout, torch.float64, 5))
    assert factors < 1e-12
    assert moved < 1e-10


@pytest.mark.parametrize(
    ("layout", "fisher", "checkpointed"),
    [
        ("ddp", "empirical", False),
        ("ddp", "sampled", False),
        ("units", "sampled", True),
        slowly("units", "sampled", False),
        slowly("fsdp", "sampled", False),
        slowly("ddp", "sampled", True),
    ],
)
def test_factors_are_means_of_the_ranks_own(two: Ranks, layout: str, fisher: str, checkpointed: bool) -> None:
    """As gradients are, so a sample of the rank with fewer samples counts for more; and draws leave gradients alone."""
    factors, gradients = farthest(two.run(curved.averaged, layout, fisher, (11, 4), checkpointed))
    assert factors < 1e-13
    assert gradients < 1e-13


@pytest.mark.slow
def test_draws_leave_gradients_alone_between_replicas(four: Ranks) -> None:
    factors, gradients = farthest(four.run(curved.averaged, "hsdp", "sampled", (5, 4, 3, 4)))
    assert factors < 1e-13
    assert gradients < 1e-13


@pytest.mark.parametrize("layout", ["ddp", slowly("units")])
def test_nan_on_one_rank_leaves_no_trace(two: Ranks, layout: str) -> None:
    for moved, same, goes_on in two.run(curved.poisoned, layout):
        assert moved == []
        assert same
        assert goes_on


@pytest.mark.parametrize(("layout", "fisher"), [("units", "sampled"), slowly("ddp", "empirical")])
def test_a_checkpoint_resumes_bit_for_bit(two: Ranks, tmp_path: Path, layout: str, fisher: str) -> None:
    assert two.run(curved.resumes, layout, fisher, str(tmp_path)) == [[], []]


@pytest.mark.parametrize("layout", ["units", slowly("ddp")])
def test_one_process_goes_on_from_consolidated_state(two: Ranks, layout: str) -> None:
    for same, apart in two.run(curved.consolidated, layout):
        assert same
        assert apart < 1e-10


def test_a_layer_that_some_ranks_leave_out(two: Ranks) -> None:
    assert farthest(two.run(curved.left_out, timeout=60)) < [1e-13, 1e-13]


@pytest.mark.parametrize("layout", ["ddp", slowly("units")])
def test_accumulated_gradients(two: Ranks, layout: str) -> None:
    factors, moved = farthest(two.run(curved.accumulated, layout))
    assert factors < 1e-12
    assert moved < 1e-10


@pytest.mark.parametrize(("poison_first", "steps"), [(False, [0, 4, 6]), (True, [0, 2, 4, 6])])
def test_all_ranks_capture_in_the_same_steps(two: Ranks, poison_first: bool, steps: list[int]) -> None:
    listens, sent, received = zip(*two.run(curved.listens, poison_first, timeout=60), strict=True)
    for of_rank in listens:
        assert [step for step, due in enumerate(of_rank) if due] == steps
    for outgoing, incoming in zip(zip(*sent, strict=True), zip(*received, strict=True), strict=True):
        assert list(zip(*outgoing, strict=True)) == [tuple(row) for row in incoming], "one sends what another expects"


@pytest.mark.slow
@pytest.mark.parametrize(("written", "read"), [("hsdp", "ddp"), ("ddp", "units"), ("units", "fsdp")])
def test_checkpoints_in_other_layouts(four: Ranks, two: Ranks, tmp_path: Path, written: str, read: str) -> None:
    state = four.run(curved.saved, written, str(tmp_path))[0]
    found = two.run(curved.loaded, read, str(tmp_path))[0]
    assert len(state) == 4
    assert state.keys() == found.keys()
    assert all(torch.equal(x, found[name][key]) for name, entries in state.items() for key, x in entries.items())


REFUSED = {
    "tensor parallel": r"inner.weight is cut by tensor parallelism.*overrides=\{'inner.weight': 'soap'\}",
    "tensor parallel, drawn": r"inner.weight is cut by tensor parallelism",
    "not called": r"a gradient, but no statistics",
    "apart": r"inner.weight and inner.bias lie on different ranks.*shard or replicate both",
    "static graph": r"static_graph=True.*fisher='empirical'",
    "ekfac": r"on several ranks.*take 'kfac'",
    "wrapped later": r"wrapped with DistributedDataParallel after.*wrap the model first",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(two: Ranks, what: str) -> None:
    for said in two.run(curved.refused, what):
        assert re.search(REFUSED[what], said), said
