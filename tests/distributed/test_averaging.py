"""Statistics are averaged on the rank that steps the matrix, in a fixed order, whoever has captured some."""

from __future__ import annotations

import averages
import torch
from ranks import Ranks

from steepest.exchange.averaging import Target

HEARD = [[0, 1, 2, 3], [0], [2, 3], [1, 2], [0, 1, 3]]


def test_inputs_average_over_ranks_that_heard_and_gradients_over_all(four: Ranks) -> None:
    found = four.run(averages.averaged, HEARD)
    assert [sorted(of_rank) for of_rank in found] == [[0, 4], [1], [2], [3]]
    for job, heard in enumerate(HEARD):
        A, B = found[job % 4][job]
        target = Target((job, 0), job % 4, tuple(A.shape), tuple(B.shape))
        own = [averages.statistics(target, rank) for rank in heard]
        torch.testing.assert_close(A, sum(a for a, _ in own) / len(heard), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(B, sum(b for _, b in own) / 4, rtol=1e-14, atol=1e-14)
        assert torch.equal(A, A.mT)


def test_the_order_of_ranks_is_fixed(four: Ranks) -> None:
    first, again = four.run(averages.averaged, HEARD), four.run(averages.averaged, HEARD)
    same = [all(map(torch.equal, x[j], y[j])) for x, y in zip(first, again, strict=True) for j in x]
    assert len(same) == len(HEARD)
    assert all(same)
    A = averages.statistics(Target((0, 0), 0, (2, 3, 3), (2, 1, 1)), 0)[0]
    for rank in range(1, 4):
        A = A + averages.statistics(Target((0, 0), 0, (2, 3, 3), (2, 1, 1)), rank)[0]
    assert torch.equal(first[0][0][0], A / 4)


def test_nan_of_one_rank_arrives(two: Ranks) -> None:
    assert two.run(averages.poisoned) == [False, True]
