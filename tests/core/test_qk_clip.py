"""QK-clip: afterwards no head's largest logit is above tau, and nothing else has changed."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import QKClip

TAU = 0.5


class Attention(nn.Module):
    """Separate projections, with grouped queries where there are fewer heads of keys and values."""

    def __init__(self, heads: int = 4, groups: int = 4, d: int = 3, names: str = "q_proj k_proj v_proj") -> None:
        super().__init__()
        self.num_heads, self.groups, self.d, self.names = heads, groups, d, names.split()
        for name, rows in zip(self.names, (heads, groups, groups), strict=True):
            self.add_module(name, nn.Linear(12, rows * d))
        self.o_proj = nn.Linear(heads * d, 12)

    def qkv(self, x: Tensor) -> list[Tensor]:
        made = (getattr(self, name)(x) for name in self.names)
        return [y.unflatten(-1, (-1, self.d)).transpose(-3, -2) for y in made]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.scaled_dot_product_attention(*self.qkv(x), enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(-3, -2).flatten(-2))
        return out

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The largest of each head."""
        q, k, _ = self.qkv(x)
        k = k.repeat_interleave(self.num_heads // self.groups, dim=-3)
        return (q @ k.mT).amax(dim=(0, 2, 3)) / self.d**0.5


class Fused(Attention):
    def __init__(self, heads: int = 4, groups: int = 2) -> None:
        super().__init__(heads, groups)
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = nn.Linear(12, (heads + 2 * groups) * 3)

    def qkv(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv_proj(x).split([3 * self.num_heads, 3 * self.groups, 3 * self.groups], dim=-1)
        return [y.unflatten(-1, (-1, 3)).transpose(-3, -2) for y in parts]


class Packed(nn.Module):
    """torch's own, whose logits are recomputed from its packed weight."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 4, batch_first=batch_first)
        nn.init.normal_(self.inner.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.inner.batch_first else x.transpose(0, 1)
        out: Tensor = self.inner(y, key=y, value=y, need_weights=False)[0]
        return out

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        made = nn.functional.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias)
        q, k, _ = (y.unflatten(-1, (4, 3)).transpose(-3, -2) for y in made.chunk(3, dim=-1))
        return (q @ k.mT).amax(dim=(0, 2, 3)) / 3**0.5


KINDS = {
    "multihead": lambda: Attention(),
    "grouped": lambda: Attention(4, 2),
    "multi-query": lambda: Attention(4, 1, names="wq wk wv"),
    "other names": lambda: Attention(names="query key value"),
    "fused": lambda: Fused(),
    "packed": lambda: Packed(batch_first=True),
    "packed, tokens first": lambda: Packed(batch_first=False),
}


@pytest.mark.parametrize("logits", ["products", "norms"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_is_above_tau_afterwards(kind: str, logits: str) -> None:
    torch.manual_seed(0)
    model: Any = KINDS[kind]()
    clip = QKClip(model, TAU, logits=logits)
    batches = [2 * torch.randn(3, 7, 12) for _ in range(2)]
    before = torch.stack([model.logits(x) for x in batches]).amax(dim=0)
    assert (before > TAU).any()
    clip.detach()
    clip = QKClip(model, TAU, logits=logits)
    for x in batches:  # as in an accumulation of gradients
        model(x)
    (told,) = clip.largest().values()
    if logits == "products":
        torch.testing.assert_close(torch.tensor(told), before)
    else:
        assert (torch.tensor(told) >= before - 1e-5).all()
    rest = {n: p.clone() for n, p in model.named_parameters()}
    clip.step()
    after = torch.stack([model.logits(x) for x in batches]).amax(dim=0)
    assert (after <= TAU * (1 + 1e-5)).all()
    assert logits == "norms" or after.amax().item() == pytest.approx(TAU, rel=1e-5)  # and no lower than it must be
    values = [n for n, p in model.named_parameters() if torch.equal(p, rest[n])]
    assert any("o_proj" in n or "out_proj" in n for n in values)
    for name in ("in_proj_weight", "qkv_proj.weight"):
        for n, p in model.named_parameters():
            if n.endswith(name):  # the rows of values
                assert torch.equal(p[-6:], rest[n][-6:])


def test_heads_below_tau_stay_bit_for_bit_and_groups_share_a_factor() -> None:
    torch.manual_seed(0)
    model = Attention(4, 2)
    with torch.no_grad():
        model.q_proj.weight[:3] *= 50  # the first query head, in the first group
    x = torch.randn(2, 5, 12)
    clip = steepest.qk_clip(model, tau=float(model.logits(x)[1:].max()) + 1.0)
    model(x)
    before, S = copy.deepcopy(model), model.logits(x)
    clip.step()
    γ = clip.tau / S[0]
    for name, rows in (("q_proj", 6), ("k_proj", 3)):
        W, old = getattr(model, name).weight, getattr(before, name).weight
        torch.testing.assert_close(W[:rows], old[:rows] * γ.sqrt())
        assert torch.equal(W[rows:], old[rows:])
        torch.testing.assert_close(getattr(model, name).bias[:rows], getattr(before, name).bias[:rows] * γ.sqrt())
    assert torch.equal(model.v_proj.weight, before.v_proj.weight)
    weights = [p.clone() for p in model.parameters()]
    clip.step()  # nothing was seen since
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


class Latent(nn.Module):
    """The projections of DeepSeek's attention, and what they make of positions that are turned at random."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=3)
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank = 4, 2, 5, 6
        self.q_a_proj, self.q_b_proj = nn.Linear(12, 7, bias=False), nn.Linear(7, 3 * 6, bias=False)
        self.q_a_layernorm = nn.LayerNorm(7)
        self.kv_a_proj_with_mqa, self.kv_b_proj = nn.Linear(12, 8), nn.Linear(6, 3 * 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (3, 6)).transpose(-3, -2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([6, 2], dim=-1)
        k = self.kv_b_proj(latent).unflatten(-1, (3, 9)).transpose(-3, -2)[..., :4]
        torch.manual_seed(1)
        angles = torch.randn(x.shape[-2])

        def turned(y: Tensor) -> Tensor:
            return torch.view_as_real(
                torch.view_as_complex(y.contiguous())
                * torch.polar(torch.ones_like(angles), angles).unsqueeze(-1)[..., 0]
            )

        rope = turned(q[..., 4:]) @ turned(k_rope).unsqueeze(-3).mT
        return ((q[..., :4] @ k.mT + rope) / 6**0.5).amax(dim=(0, 2, 3))


def test_latent_attention_scales_the_parts_of_its_heads() -> None:
    torch.manual_seed(0)
    model = Latent()
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    x = torch.randn(2, 5, 12)
    clip, before = QKClip(model, TAU, logits="products"), copy.deepcopy(model)
    largest = model(x)
    assert (largest > TAU).any()
    (told,) = clip.largest().values()
    assert (torch.tensor(told) >= largest - 1e-5).all()
    clip.step()
    assert (model(x) <= TAU * (1 + 1e-5)).all()
    γ = (TAU / torch.tensor(told)).clamp(max=1).view(3, 1, 1)
    q, old = (m.q_b_proj.weight.unflatten(0, (3, 6)) for m in (model, before))
    torch.testing.assert_close(q, torch.cat([old[:, :4] * γ.sqrt(), old[:, 4:] * γ], dim=1))
    kv, old = (m.kv_b_proj.weight.unflatten(0, (3, 9)) for m in (model, before))
    torch.testing.assert_close(kv, torch.cat([old[:, :4] * γ.sqrt(), old[:, 4:]], dim=1))
    assert torch.equal(model.kv_a_proj_with_mqa.weight, before.kv_a_proj_with_mqa.weight)


def test_hooks_hear_training_only_and_go_with_detach() -> None:
    model = Attention()
    clip = QKClip(model, TAU)
    model.eval()(torch.randn(2, 5, 12))
    with torch.no_grad():
        model.train()(torch.randn(2, 5, 12))
    assert clip.largest() == {}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(2, 5, 12))
    assert clip.largest() == {}
    model(torch.randn(2, 5, 12))
    clip.report("", torch.full((4,), 1e4))
    assert clip.largest() == {"": [1e4] * 4}
    clip.report("", torch.tensor([torch.inf, torch.nan, 0.0, 0.0]))  # tells nothing
    weights = [p.clone() for p in model.parameters()]
    clip.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.q_proj.weight[-1], weights[0][-1])
    assert torch.equal(model.q_proj.weight[:6], weights[0][:6])
    clip.detach()
    model(torch.randn(2, 5, 12))
    assert clip.largest() == {}


def test_logits_stay_bounded_in_a_training_that_makes_them_grow() -> None:
    torch.manual_seed(0)
    model = Attention(4, 2)
    optimizer = steepest.for_model(nn.ModuleList([model, nn.Linear(12, 2)]), "muon", lr=0.1, weight_decay=0.0)
    clip = QKClip(model, tau=2.0)
    x = torch.randn(4, 6, 12)
    for _ in range(10):
        q, k, _ = model.qkv(x)
        (-(q @ k.repeat_interleave(2, dim=-3).mT).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        model(x)  # whose logits are seen after the step
        clip.step()
        assert (model.logits(x) <= 2.0 * (1 + 1e-5)).all()


class Unknown(Attention):
    def __init__(self) -> None:
        super().__init__(names="alpha beta gamma")


class Normed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(3)


class Nameless(Attention):
    def __init__(self) -> None:
        super().__init__()
        del self.num_heads


class Interleaved(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(12, 36)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Unknown(), r"block: Unknown has no projections q and k by their names: leave it out by skip=\['block'\]"),
        (Normed(), r"block.q_norm normalizes queries or keys"),
        (Nameless(), r"block: Nameless doesn't tell its number of heads: give heads="),
        (Interleaved(), r"block: q, k and v are interleaved"),
        (nn.MultiheadAttention(12, 4, add_bias_kv=True), r"block: bias_k is a key"),
        (nn.MultiheadAttention(12, 4, kdim=5, vdim=5), r"block: kdim and vdim"),
        (Attention(5, 2), r"block: 15 rows of queries and 6 of keys aren't 5 heads"),
    ],
)
def test_what_is_not_recognized_is_refused_by_name(module: nn.Module, message: str) -> None:
    class UnknownAttention(nn.Module):
        pass

    if isinstance(module, Unknown):
        type(module).__name__ = "Unknown"
    name = "attn" if isinstance(module, Unknown) else "block"
    model = nn.ModuleDict({name: module, "other": Attention()})
    with pytest.raises(ValueError, match=message.replace("block", name)):
        QKClip(model)
    assert list(QKClip(model, skip=[name]).attention) == ["other"]


def test_options_are_checked() -> None:
    for options, message in (
        ({"tau": 0.0}, "tau=0.0: must be a finite number > 0"),
        ({"tau": "a"}, "tau='a'"),
        ({"logits": "exact"}, "logits='exact': must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            QKClip(Attention(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no attention"):
        QKClip(nn.Linear(2, 2))
    assert QKClip(Nameless(), heads=4, scale=0.25).attention[""].scale == 0.25
    rotary = nn.ModuleDict({"rotary_emb": nn.Identity(), "attention": Attention()})
    assert [a.exact for a in QKClip(rotary).attention.values()] == [False]
