import pytest
import torch

from steepest.engine.optimizer import Optimizer
from steepest.linalg.polar import TABLES, polar_factor
from steepest.rule import Step
from steepest.rules.adamuon import AdaMuon
from steepest.rules.muon import Muon
from steepest.rules.parts.scales import SCALES

SHAPES = {"4x6": (4, 6), "6x4": (6, 4)}
# In the golden file's words: arithmetic, Muon's options, and how near bfloat16 leaves the trajectories.
VARIANTS = {
    "f64_exact_original": ({"scale": "original"}, 1e-12),
    "torch_original": ({"scale": "original"}, 2e-3),
    "torch_match_rms": ({"scale": "match_rms_adamw"}, 2e-3),
    "torch_no_nesterov": ({"scale": "original", "nesterov": False}, 2e-3),
    "KellerJordan": ({"scale": "original"}, 2e-3),
}


def step(rule, G, state=None):
    state = rule.init(G) if state is None else state
    t = torch.ones(len(G), 1, 1, dtype=G.dtype)
    return rule.update(G, state, Step(t)), state


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_steps(golden, trajectory, variant, shape):
    case = golden("muon_3steps")[shape]
    options, tolerance = VARIANTS[variant]
    weights, state = trajectory(
        lambda params: Optimizer(params, "muon", **case["hp"], **options), *SHAPES[shape], 3, torch.float64
    )
    expected = torch.tensor(case[variant], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(weights), expected, rtol=0, atol=tolerance)
    buffer = torch.tensor(case["momentum_buffer"], dtype=torch.float64)  # computed in float32
    torch.testing.assert_close(state["momentum_buffer"], buffer, rtol=0, atol=1e-7)


def test_torch_steps_alike_in_float32(trajectory):
    def theirs(params):
        return torch.optim.Muon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    def ours(params):
        return Optimizer(params, "muon", lr=0.02, weight_decay=0.1, ns_dtype="float32")

    (expected, _), (weights, _) = (trajectory(make, 24, 16, 3) for make in (theirs, ours))
    for W, reference in zip(weights, expected, strict=True):  # torch iterates in bfloat16
        torch.testing.assert_close(W, reference, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 32), (1, 48, 6)])
def test_match_rms_adamw_moves_entries_by_a_fifth(shape):
    D, _ = step(Muon(ns="exact", scale="match_rms_adamw"), random(*shape))
    rms = D.square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "wide", "tall"),
    [
        ("none", 1.0, 1.0),
        ("original", 1.0, 2.0),
        ("match_rms_adamw", 0.8, 0.8),
        ("mup", 0.5, 2.0),
        ("shape_scaling", 1.0, 2.0),
        ("rms_norm", 0.8, 0.8),
        ("spectral_norm", 0.5, 2.0),
        ("unit_rms_norm", 0.5, 2.0),
    ],
)
def test_scales(scale, wide, tall):
    for shape, expected in (((4, 16), wide), ((16, 4), tall)):
        D, _ = step(Muon(ns="exact", scale=scale), random(1, *shape))
        assert torch.linalg.matrix_norm(D, 2).item() == pytest.approx(expected)
    assert scale in SCALES


def test_the_direction_is_the_polar_factor_of_the_momentum():
    rule = Muon(ns="exact", scale="none", momentum=0.9, nesterov=False)
    first, second = random(2, 5, 7), random(2, 5, 7, seed=1)
    _, state = step(rule, first)
    D, _ = step(rule, second, state)
    torch.testing.assert_close(D, polar_factor(0.9 * first + second, "exact"))


def test_rotations_of_the_gradient_rotate_the_direction():
    G, U, V = random(1, 6, 9), torch.linalg.qr(random(6, 6)).Q, torch.linalg.qr(random(9, 9)).Q
    for table in TABLES:
        rule = Muon(ns=table)
        torch.testing.assert_close(step(rule, U @ G @ V.mT)[0], U @ step(rule, G)[0] @ V.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sign", [True, False])
def test_adamuon_by_its_formula(sign):
    rule = AdaMuon(momentum=0.9, nesterov=False, scale="match_rms_adamw", sign=sign)
    M = v = torch.zeros(1, 5, 8, dtype=torch.float64)
    state = rule.init(M)
    for seed in range(3):
        G = random(1, 5, 8, seed=seed)
        M = 0.9 * M + 0.1 * G
        O = polar_factor(M.sign() if sign else M, "keller")
        v = 0.9 * v + 0.1 * O**2
        adapted = O / (v.sqrt() + 1e-8)
        D, _ = step(rule, G, state)
        torch.testing.assert_close(D, 0.2 * 40**0.5 * adapted / adapted.norm(), rtol=1e-9, atol=0)
        assert D.square().mean().sqrt().item() == pytest.approx(0.2)
    torch.testing.assert_close(state["exp_avg_sq"], v)


def test_adamuon_forgets_the_scale_of_entries():
    G = random(1, 4, 4)
    directions = [step(AdaMuon(eps=0.0), G * factor)[0] for factor in (1.0, 1e-3, torch.rand_like(G) + 0.1)]
    for D in directions[1:]:
        torch.testing.assert_close(D, directions[0])
