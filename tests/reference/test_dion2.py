import pytest
import torch

from steepest.linalg.polar import polar_factor
from steepest.rule import Step
from steepest.rules.dion2 import Dion2
from steepest.rules.muon import Muon


def step(rule, G, state=None):
    state = rule.init(G) if state is None else state
    return rule.update(G, state, Step(torch.ones(len(G), 1, 1))), state


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tall", [False, True])
def test_which_rows_move_and_what_remains(golden, matrix, tall):
    case = golden("dion2_select")
    rule = Dion2(fraction=case["fraction"], ef_decay=case["ef_decay"], ns="exact", scale="none")
    M = torch.zeros(1, *case["shape"], dtype=torch.float64)
    state = rule.init(M.mT if tall else M)
    for t, expected in enumerate(case["steps"], start=1):
        M = M + matrix(*case["shape"], t)
        G = matrix(*case["shape"], t).unsqueeze(0)
        D, _ = step(rule, G.mT if tall else G, state)
        D, buffer = (x.mT if tall else x for x in (D, state["momentum_buffer"]))
        chosen = expected["idx"]
        assert D[0].any(dim=1).nonzero().flatten().tolist() == chosen
        torch.testing.assert_close(D[:, chosen], polar_factor(M[:, chosen], "exact"))
        M = buffer.clone()
        torch.testing.assert_close(M[0], torch.tensor(expected["M"], dtype=torch.float64), rtol=0, atol=1e-6)


def test_all_of_a_matrix_is_muon_on_sums():
    G = random(2, 5, 9)
    D, state = step(Dion2(fraction=1.0, ef_decay=0.0), G)
    torch.testing.assert_close(D, step(Muon(momentum=0.0), G)[0], rtol=0, atol=1e-6)
    assert not state["momentum_buffer"].any()


def test_each_matrix_of_a_stack_chooses_for_itself():
    G = random(3, 8, 20)
    together, _ = step(Dion2(), G)
    alone = [step(Dion2(), one.unsqueeze(0))[0] for one in G]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.any(dim=2).sum(dim=1).tolist() == [2, 2, 2]


def test_every_row_has_its_turn():
    G = random(1, 5, 6)
    rule = Dion2(fraction=0.2, ef_decay=0.0)
    state = rule.init(G)
    moved = torch.stack([step(rule, G, state)[0].any(dim=2) for _ in range(12)])
    assert (moved.sum(dim=2) == 1).all()
    assert moved.any(dim=0).all()
