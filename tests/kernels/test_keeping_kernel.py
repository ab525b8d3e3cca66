"""The kernel saves and restores state with the same bits as torch."""

import pytest
import torch

from steepest.kernels import use
from steepest.stack.undo import undoing

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, device):
    """Make blocks so small that a matrix has several, the last one not full."""
    from steepest.kernels import keeping

    monkeypatch.setattr(keeping, "BLOCK", 64)


def tensors(normal):
    """Tensors of every dtype and layout that state has: by rows, by columns, one number per matrix."""
    for dtype in DTYPES:
        yield (50 * normal(3, 9, 17)).to(dtype)
        yield (50 * normal(3, 9, 9, seed=1)).to(dtype).mT
        yield (50 * normal(3, seed=2)).to(dtype)


def stepped(xs, finite, mode):
    """Return the tensors after a step that is undone for some matrices."""
    with use(mode):
        undo = undoing(finite, xs)
        for x in xs:
            x.add_(1)
        undo()
    return xs


@pytest.mark.parametrize("finite", [(True, False, True), (False, False, False), (True, True, True)], ids=str)
def test_it_is_its_twin(launched, normal, finite):
    finite = torch.tensor(finite, device=normal(1).device).view(3, 1, 1)
    expected = stepped(list(tensors(normal)), finite, "never")
    assert not launched
    found = stepped(list(tensors(normal)), finite, "always")
    assert launched.count("put_back") == 2 * len(found)
    for before, x, y in zip(tensors(normal), found, expected, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == before.stride()
        for b, fine in enumerate(finite.flatten().tolist()):
            assert torch.equal(x[b], before[b] + 1 if fine else before[b])


def test_nan_stays_where_it_is(launched, normal):
    """NaN is tried in tensors that are kept, in restored ones, and in others."""
    x = torch.full((2, 40), torch.nan, device=normal(1).device)
    finite = torch.tensor([True, False], device=x.device)
    with use("always"):
        undo = undoing(finite, [x])
        x[1] = 0
        undo()
    assert launched
    assert x.isnan().all()


def test_what_lies_in_pieces_is_left_to_torch(launched, normal):
    x = normal(2, 6, 8)[:, ::2]
    stepped([x], torch.zeros(2, dtype=torch.bool, device=x.device), "always")
    assert not launched
    assert torch.equal(x, normal(2, 6, 8)[:, ::2])


def test_nothing_is_kept_of_what_is_finite(launched, normal, monkeypatch):
    """The kernel does not touch a byte of matrices with finite gradients, which is its purpose."""
    x = normal(2, 100)
    marked = torch.full_like(x, 7.0)
    monkeypatch.setattr(torch, "empty_like", lambda x: marked)
    with use("always"):
        undoing(torch.tensor([True, False], device=x.device), [x])
    assert launched
    assert bool((marked[0] == 7).all())
    assert torch.equal(marked[1], x[1])
