"""Views cut any parameter into matrices and put them back, whatever its layout in memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.view import View

CASES = [
    (View(()), [(1, 1, 1)]),
    (View((7,)), [(1, 1, 7)]),
    (View((0, 3)), []),
    (View((3, 5)), [(1, 3, 5)]),
    (View((3, 5), transpose=True), [(1, 5, 3)]),
    (View((4, 2, 3, 3)), [(1, 4, 18)]),
    (View((4, 2, 3), merge_dims=False), [(4, 2, 3)]),
    (View((2, 2, 2, 3), merge_dims=False), [(4, 2, 3)]),
    (View((2, 6, 3), merge_dims=False, split=(4, 2)), [(2, 4, 3), (2, 2, 3)]),
    (View((2, 3, 6), merge_dims=False, split=(4, 2), transpose=True), [(2, 4, 3), (2, 2, 3)]),
    (View((8, 3), split=(4, 2, 2), heads=2), [(2, 2, 3), (2, 1, 3), (2, 1, 3)]),
    (View((8, 3), split=(4, 2, 2), heads=(4, 1, 2)), [(4, 1, 3), (1, 2, 3), (2, 1, 3)]),
    (View((2, 6, 3), merge_dims=False, split=(4, 2), heads=(2, 1)), [(4, 2, 3), (2, 2, 3)]),
    (View((3, 6), split=(4, 2), heads=(2, 1), transpose=True), [(2, 2, 3), (1, 2, 3)]),
    (View((3, 8), split=(4, 4), transpose=True), [(1, 4, 3), (1, 4, 3)]),
    (View((6, 2, 2), split=(4, 2)), [(1, 4, 4), (1, 2, 4)]),
    (View((7, 4), block_size=4), [(1, 3, 4), (1, 4, 4)]),
    (View((6, 4), block_size=3), [(1, 3, 2)] * 4),
    (View((6, 4), block_size=3, transpose=True), [(1, 2, 3)] * 4),
    (View((4, 3, 2, 2), block_size=6), [(1, 4, 6)] * 2),
    (View((2, 6, 4), block_size=3, merge_dims=False), [(2, 3, 2)] * 4),
    (View((6, 4), block_size=3, split=(4, 2)), [(1, 2, 2)] * 6),
]


@pytest.mark.parametrize(("view", "pieces"), CASES, ids=str)
def test_there_and_back(view, pieces):
    assert view.pieces == pieces
    x = torch.randn(view.shape)
    back = torch.full(view.shape, torch.nan)
    for k, shape in enumerate(pieces):
        G = view.matrices(x, k)
        assert tuple(G.shape) == shape
        view.cut(back, k).copy_(view.unbatch(G.clone(), k))
    assert torch.equal(back, x)


def test_rows_are_outputs():
    weight = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(View((3, 4)).matrices(weight, 0)[0], weight)
    assert torch.equal(View((4, 3), transpose=True).matrices(weight.T.contiguous(), 0)[0], weight)


def test_a_cut_is_a_view_in_any_layout():
    conv = torch.zeros(6, 3, 2, 2).to(memory_format=torch.channels_last)
    view = View((6, 3, 2, 2), split=(4, 2))
    view.cut(conv, 1).fill_(1.0)
    assert conv.sum() == 2 * 12
    assert conv[4:].min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": (2, 2)}, "split=(2, 2): must be positive row counts that add up to 6"),
        ({"split": (7, -1)}, "split=(7, -1)"),
        ({"heads": 4}, "heads=4: must divide the 6 rows"),
        ({"heads": 0}, "heads=0"),
        ({"heads": (2,)}, "heads=(2,): must be one number, or one for each of the 0 blocks"),
        ({"heads": ()}, "heads=()"),
        ({"heads": (2, 1), "split": (2, 2, 2)}, "one for each of the 3 blocks of split"),
        ({"heads": (1, 4), "split": (4, 2)}, "heads=(1, 4): must divide the 2 rows"),
        ({"heads": (1, 2), "split": (4, 2), "block_size": 2}, "block_size=2 with heads=(1, 2)"),
        ({"block_size": -1}, "block_size=-1"),
        ({"block_size": 2, "heads": 2}, "block_size=2 with heads=2"),
    ],
)
def test_impossible_views_are_refused(options, message):
    with pytest.raises(ValueError, match="must") as error:
        View((6, 4), **options)
    assert message in str(error.value)


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4), st.booleans(), st.booleans(), st.integers(1, 3),
    st.integers(0, 3),
)  # fmt: skip
def test_any_view_covers_every_entry_once(shape, merge, transpose, heads, block_size):
    if transpose and merge and len(shape) > 2:
        transpose = False
    rows = shape[-1] if transpose else (shape[0] if merge or len(shape) == 2 else shape[-2])
    if rows % heads:
        heads = 1
    if heads > 1:
        block_size = 0
    view = View(tuple(shape), merge_dims=merge, transpose=transpose, heads=heads, block_size=block_size)
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    pieces = [view.matrices(x, k) for k in range(len(view.pieces))]
    assert sorted(entry for G in pieces for entry in G.flatten().tolist()) == sorted(x.flatten().tolist())
    for k, G in enumerate(pieces):
        assert tuple(G.shape) == view.pieces[k]
        assert block_size == 0 or max(G.shape[1:]) <= block_size
        assert torch.equal(view.unbatch(G, k), view.cut(x, k))
