"""QK-clip: after a step, heads whose attention logits have grown too large have their queries and keys scaled down.

    S_h = max q·k · scale                       of head h, over what was trained on since the last clip
    γ_h = min(1, τ / S_h)
    W_q, W_k of the head ← γ_h^½ W_q, γ_h^½ W_k       grouped queries: γ of the group's largest logit, for all of it
    latent attention (MLA): γ^½ for the parts without positions, γ for W_q's rotary part; the shared key stays

Moonshot AI, "Kimi K2", arXiv:2507.20534, Section 2.1 (MuonClip), with τ = 100.

  attention    the rows of weights that make queries and keys: their logits, and how they are scaled
  finding      which modules of a model are attention, and which rows of which weights
  hooks        what training passes tell of logits
  clip         `QKClip`, which puts these together
"""

from steepest.clipping.clip import QKClip, qk_clip

__all__ = ["QKClip", "qk_clip"]
