import pytest
import torch

from steepest.rule import Step
from steepest.rules.muon import Muon
from steepest.rules.normuon import NorMuon, equalize


def direction(rule, G, state):
    return rule.update(G, state, Step(torch.ones(len(G), 1, 1)))


def test_the_authors_normalization(golden, matrix):
    case = golden("normuon_core")  # float32
    v = torch.zeros(1, 4, 1)
    for t in (1, 2):
        out = equalize(matrix(4, 6, t, torch.float32).unsqueeze(0), v, case["beta2"], dim=-1)
        torch.testing.assert_close(out, torch.tensor(case[f"out{t}"]), rtol=0, atol=1e-6)
        torch.testing.assert_close(v, torch.tensor(case[f"V{t}"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix(4, 6, 1, torch.float32), torch.tensor(case["U1"])[0])


@pytest.mark.parametrize(("axis", "along"), [("rows", 2), ("columns", 1)])
def test_the_first_step_has_equal_rows_and_muons_norm(matrix, axis, along):
    G = torch.stack([matrix(6, 4, t) for t in (1, 2)])
    options = {"scale": "original", "ns": "exact"}
    rule, muon = NorMuon(axis=axis, **options), Muon(**options)
    D = direction(rule, G, rule.init(G))
    lengths = D.norm(dim=along)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths), rtol=1e-6, atol=0)
    torch.testing.assert_close(D.norm(dim=(1, 2)), direction(muon, G, muon.init(G)).norm(dim=(1, 2)))


def test_second_moments_take_a_number_per_row(matrix):
    G = torch.zeros(3, 6, 4)
    assert NorMuon(axis="rows").init(G)["exp_avg_sq"].shape == (3, 6, 1)
    assert NorMuon(axis="columns").init(G)["exp_avg_sq"].shape == (3, 1, 4)
