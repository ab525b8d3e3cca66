"""Models that people use, routed: each table was read by a person, and is kept as text.

A table leaves out norms, biases and vectors, which are all elementwise (checked here, too), and the state's bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import EncoderClassifier, NanoGPT, RecurrentLM, ResNet18, mlp
from torch import Tensor, nn

from steepest.routing import for_model, route
from steepest.routing.table import common_name, fold

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (it is in the dev extra)"
)
Loss = Callable[[Any], Tensor]


def on_tokens(model: Any) -> Tensor:
    return model(torch.arange(16).view(2, 8)).square().mean()


def on_images(model: Any) -> Tensor:
    return model(torch.randn(2, 3, 32, 32)).square().mean()


# Models from transformers, randomly initialised and tiny.

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}


def hugging_face(name: str, **config: Any) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**config))


def on_hf_tokens(model: Any) -> Tensor:
    tokens = torch.arange(16).view(2, 8)
    return model(input_ids=tokens, labels=tokens).loss


def on_hf_images(model: Any) -> Tensor:
    return model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss


def on_hf_sequences(model: Any) -> Tensor:
    return model(torch.arange(16).view(2, 8), labels=torch.tensor([0, 1])).loss


CASES: dict[str, tuple[Callable[[], nn.Module], Loss, str]] = {
    "mlp": (
        mlp,
        lambda model: model(torch.randn(4, 8, 8)).square().mean(),
        """
        1.weight  48×64  soap  weight of Linear
        {3,5}.weight ×2  48×48  soap  weight of Linear
        7.weight  –  adamw  output head: the last projection
        """,
    ),
    "resnet18": (
        ResNet18,
        on_images,
        """
        conv1.weight  4×(3·7·7)  soap  convolution, flattened
        layer1.{0..1}.conv1.weight ×2  4×(4·3·3)  soap  convolution, flattened
        layer1.{0..1}.conv2.weight ×2  4×(4·3·3)  soap  convolution, flattened
        layer2.0.conv1.weight  8×(4·3·3)  soap  convolution, flattened
        layer2.{0..1}.conv2.weight ×2  8×(8·3·3)  soap  convolution, flattened
        layer2.0.downsample.0.weight  8×4  soap  convolution, flattened
        layer2.1.conv1.weight  8×(8·3·3)  soap  convolution, flattened
        layer3.0.conv1.weight  16×(8·3·3)  soap  convolution, flattened
        layer3.{0..1}.conv2.weight ×2  16×(16·3·3)  soap  convolution, flattened
        layer3.0.downsample.0.weight  16×8  soap  convolution, flattened
        layer3.1.conv1.weight  16×(16·3·3)  soap  convolution, flattened
        layer4.0.conv1.weight  32×(16·3·3)  soap  convolution, flattened
        layer4.{0..1}.conv2.weight ×2  32×(32·3·3)  soap  convolution, flattened
        layer4.0.downsample.0.weight  32×16  soap  convolution, flattened
        layer4.1.conv1.weight  32×(32·3·3)  soap  convolution, flattened
        fc.weight  –  adamw  output head: the last projection
        """,
    ),
    "nanogpt": (
        NanoGPT,
        on_tokens,
        """
        transformer.wte.weight  –  adamw  embedding, tied to the output head
        transformer.wpe.weight  –  adamw  embedding: rows are looked up
        transformer.h.{0..1}.attn.c_attn.weight ×2  3 × 32×32 (q, k, v)  soap  fused, one matrix each
        transformer.h.{0..1}.attn.c_proj.weight ×2  32×32  soap  weight of Linear
        transformer.h.{0..1}.mlp.c_fc.weight ×2  128×32  soap  weight of Linear
        transformer.h.{0..1}.mlp.c_proj.weight ×2  32×128  soap  weight of Linear
        """,
    ),
    "lstm": (
        RecurrentLM,
        on_tokens,
        """
        encoder.weight  –  adamw  embedding: rows are looked up
        rnn.weight_ih_l0  4 × 24×16 (i, f, g, o)  soap  gates, one matrix each
        rnn.weight_hh_l0  4 × 24×24 (i, f, g, o)  soap  gates, one matrix each
        rnn.weight_ih_l1  4 × 24×24 (i, f, g, o)  soap  gates, one matrix each
        rnn.weight_hh_l1  4 × 24×24 (i, f, g, o)  soap  gates, one matrix each
        decoder.weight  –  adamw  output head: the last projection
        """,
    ),
    "encoder": (
        EncoderClassifier,
        lambda model: model(torch.randn(2, 8, 12)).square().mean(),
        """
        pos  –  adamw  learnt table: added, not multiplied
        embed.weight  16×12  soap  weight of Linear
        encoder.layers.{0..1}.self_attn.in_proj_weight ×2  3 × 16×16 (q, k, v)  soap  fused, one matrix each
        encoder.layers.{0..1}.self_attn.out_proj.weight ×2  16×16  soap  weight of Linear
        encoder.layers.{0..1}.linear1.weight ×2  32×16  soap  weight of Linear
        encoder.layers.{0..1}.linear2.weight ×2  16×32  soap  weight of Linear
        head.1.weight  –  adamw  output head: the last projection
        """,
    ),
    "llama": (
        lambda: hugging_face("LlamaForCausalLM", num_key_value_heads=2, **TINY),
        on_hf_tokens,
        """
        model.embed_tokens.weight  –  adamw  embedding: rows are looked up
        model.layers.{0..1}.self_attn.q_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.k_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.v_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.o_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.mlp.gate_proj.weight ×2  48×32  soap  weight of Linear
        model.layers.{0..1}.mlp.up_proj.weight ×2  48×32  soap  weight of Linear
        model.layers.{0..1}.mlp.down_proj.weight ×2  32×48  soap  weight of Linear
        lm_head.weight  –  adamw  output head: get_output_embeddings()
        """,
    ),
    "gpt2": (
        lambda: hugging_face("GPT2LMHeadModel", **TINY, n_positions=16),
        on_hf_tokens,
        """
        transformer.wte.weight  –  adamw  embedding, tied to the output head
        transformer.wpe.weight  –  adamw  embedding: rows are looked up
        transformer.h.{0..1}.attn.c_attn.weight ×2  3 × 32×32 (q, k, v; transposed)  soap  fused, one matrix each
        transformer.h.{0..1}.attn.c_proj.weight ×2  32×32 (transposed)  soap  weight of Conv1D
        transformer.h.{0..1}.mlp.c_fc.weight ×2  128×32 (transposed)  soap  weight of Conv1D
        transformer.h.{0..1}.mlp.c_proj.weight ×2  32×128 (transposed)  soap  weight of Conv1D
        """,
    ),
    "bert_mlm": (
        lambda: hugging_face("BertForMaskedLM", **TINY),
        on_hf_tokens,
        """
        bert.embeddings.word_embeddings.weight  –  adamw  embedding, tied to the output head
        bert.embeddings.position_embeddings.weight  –  adamw  embedding: rows are looked up
        bert.embeddings.token_type_embeddings.weight  –  adamw  embedding: rows are looked up
        bert.encoder.layer.{0..1}.attention.self.query.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.self.key.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.self.value.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.output.dense.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.intermediate.dense.weight ×2  48×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.output.dense.weight ×2  32×48  soap  weight of Linear
        cls.predictions.transform.dense.weight  32×32  soap  weight of Linear
        """,
    ),
    "bert_classifier": (
        lambda: hugging_face("BertForSequenceClassification", **TINY),
        on_hf_sequences,
        """
        bert.embeddings.word_embeddings.weight  –  adamw  embedding: rows are looked up
        bert.embeddings.position_embeddings.weight  –  adamw  embedding: rows are looked up
        bert.embeddings.token_type_embeddings.weight  –  adamw  embedding: rows are looked up
        bert.encoder.layer.{0..1}.attention.self.query.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.self.key.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.self.value.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.attention.output.dense.weight ×2  32×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.intermediate.dense.weight ×2  48×32  soap  weight of Linear
        bert.encoder.layer.{0..1}.output.dense.weight ×2  32×48  soap  weight of Linear
        bert.pooler.dense.weight  32×32  soap  weight of Linear
        classifier.weight  –  adamw  output head: the last projection
        """,
    ),
    "vit": (
        lambda: hugging_face("ViTForImageClassification", **TINY, image_size=16, patch_size=4),
        on_hf_images,
        """
        vit.embeddings.position_embeddings  –  adamw  learnt table: added, not multiplied
        vit.embeddings.patch_embeddings.projection.weight  32×(3·4·4)  soap  patches: a Linear over flattened pixels
        vit.layers.{0..1}.attention.q_proj.weight ×2  32×32  soap  weight of Linear
        vit.layers.{0..1}.attention.k_proj.weight ×2  32×32  soap  weight of Linear
        vit.layers.{0..1}.attention.v_proj.weight ×2  32×32  soap  weight of Linear
        vit.layers.{0..1}.attention.o_proj.weight ×2  32×32  soap  weight of Linear
        vit.layers.{0..1}.mlp.fc1.weight ×2  48×32  soap  weight of Linear
        vit.layers.{0..1}.mlp.fc2.weight ×2  32×48  soap  weight of Linear
        classifier.weight  –  adamw  output head: the last projection
        """,
    ),
    "t5": (
        lambda: hugging_face("T5ForConditionalGeneration", **T5),
        on_hf_tokens,
        """
        shared.weight  –  adamw  embedding, tied to the output head
        encoder.block.{0..1}.layer.0.SelfAttention.q.weight ×2  32×32  soap  weight of Linear
        encoder.block.{0..1}.layer.0.SelfAttention.k.weight ×2  32×32  soap  weight of Linear
        encoder.block.{0..1}.layer.0.SelfAttention.v.weight ×2  32×32  soap  weight of Linear
        encoder.block.{0..1}.layer.0.SelfAttention.o.weight ×2  32×32  soap  weight of Linear
        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight  –  adamw  embedding: rows are looked up
        encoder.block.{0..1}.layer.1.DenseReluDense.wi.weight ×2  48×32  soap  weight of Linear
        encoder.block.{0..1}.layer.1.DenseReluDense.wo.weight ×2  32×48  soap  weight of Linear
        decoder.block.{0..1}.layer.0.SelfAttention.q.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.0.SelfAttention.k.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.0.SelfAttention.v.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.0.SelfAttention.o.weight ×2  32×32  soap  weight of Linear
        decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight  –  adamw  embedding: rows are looked up
        decoder.block.{0..1}.layer.1.EncDecAttention.q.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.1.EncDecAttention.k.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.1.EncDecAttention.v.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.1.EncDecAttention.o.weight ×2  32×32  soap  weight of Linear
        decoder.block.{0..1}.layer.2.DenseReluDense.wi.weight ×2  48×32  soap  weight of Linear
        decoder.block.{0..1}.layer.2.DenseReluDense.wo.weight ×2  32×48  soap  weight of Linear
        """,
    ),
    "mixtral": (
        lambda: hugging_face("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, **TINY),
        on_hf_tokens,
        """
        model.embed_tokens.weight  –  adamw  embedding: rows are looked up
        model.layers.{0..1}.self_attn.q_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.k_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.v_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.o_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.mlp.gate.weight ×2  –  adamw  router: its rows are the experts' logits
        model.layers.{0..1}.mlp.experts.gate_up_proj ×2  4 experts of 2 × 48×32 (gate, up)  soap  stacked experts, fused
        model.layers.{0..1}.mlp.experts.down_proj ×2  4 experts of 32×48  soap  stacked experts
        lm_head.weight  –  adamw  output head: get_output_embeddings()
        """,
    ),
    "gpt_oss": (
        lambda: hugging_face("GptOssForCausalLM", num_key_value_heads=2, num_local_experts=4, head_dim=8, **TINY),
        on_hf_tokens,
        """
        model.embed_tokens.weight  –  adamw  embedding: rows are looked up
        model.layers.{0..1}.self_attn.q_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.k_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.v_proj.weight ×2  16×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.o_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.mlp.router.weight ×2  –  adamw  router: its rows are the experts' logits
        model.layers.{0..1}.mlp.experts.gate_up_proj ×2  4 experts of 96×32 (transposed)  soap  stacked experts, gate and up interleaved
        model.layers.{0..1}.mlp.experts.down_proj ×2  4 experts of 32×48 (transposed)  soap  stacked experts
        lm_head.weight  –  adamw  output head: get_output_embeddings()
        """,  # noqa: E501
    ),
    "phi3": (
        lambda: hugging_face("Phi3ForCausalLM", num_key_value_heads=2, **TINY),
        on_hf_tokens,
        """
        model.embed_tokens.weight  –  adamw  embedding: rows are looked up
        model.layers.{0..1}.self_attn.o_proj.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.self_attn.qkv_proj.weight ×2  32×32 + 2 × 16×32 (q, k, v)  soap  fused, one matrix each
        model.layers.{0..1}.mlp.gate_up_proj.weight ×2  2 × 48×32 (gate, up)  soap  fused, one matrix each
        model.layers.{0..1}.mlp.down_proj.weight ×2  32×48  soap  weight of Linear
        lm_head.weight  –  adamw  output head: get_output_embeddings()
        """,
    ),
}
CASES |= {
    "modernbert": (
        lambda: hugging_face("ModernBertForMaskedLM", **TINY, cls_token_id=1, sep_token_id=2),
        on_hf_tokens,
        """
        model.embeddings.tok_embeddings.weight  –  adamw  embedding, tied to the output head
        model.layers.{0..1}.attn.Wqkv.weight ×2  3 × 32×32 (q, k, v)  soap  fused, one matrix each
        model.layers.{0..1}.attn.Wo.weight ×2  32×32  soap  weight of Linear
        model.layers.{0..1}.mlp.Wi.weight ×2  2 × 48×32  soap  fused, one matrix each
        model.layers.{0..1}.mlp.Wo.weight ×2  32×48  soap  weight of Linear
        head.dense.weight  32×32  soap  weight of Linear
        """,
    ),
    "mamba": (
        lambda: hugging_face("MambaForCausalLM", vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2),
        on_hf_tokens,
        """
        backbone.embeddings.weight  –  adamw  embedding, tied to the output head
        backbone.layers.{0..1}.mixer.A_log ×2  –  adamw  diagonals of a state space: multiplied entrywise
        backbone.layers.{0..1}.mixer.conv1d.weight ×2  –  adamw  depthwise convolution: one filter per channel
        backbone.layers.{0..1}.mixer.in_proj.weight ×2  2 × 64×32  soap  fused, one matrix each
        backbone.layers.{0..1}.mixer.x_proj.weight ×2  10×64  soap  weight of Linear
        backbone.layers.{0..1}.mixer.dt_proj.weight ×2  64×2  soap  weight of Linear
        backbone.layers.{0..1}.mixer.out_proj.weight ×2  32×64  soap  weight of Linear
        """,
    ),
}
PLAIN = ["mlp", "resnet18", "nanogpt", "lstm", "encoder"]


def cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in PLAIN else needs_transformers) for name in CASES]


def table(model: nn.Module) -> str:
    """The routing as printed, less the elementary rows and the bytes, columns two spaces apart."""
    lines = []
    for rows in fold(route(model).rows):
        row, name = rows[0], common_name([row.name for row in rows])
        if row.why in ("norm", "bias", "vector"):
            assert (row.view, row.rule) == (None, "adamw"), name
        else:
            lines.append(f"{name}  {row.layout if row.view else '–'}  {row.rule}  {row.why}")
    return "\n".join(lines)


@pytest.mark.parametrize("name", cases())
def test_table(name: str) -> None:
    build, _, expected = CASES[name]
    model = build()
    assert table(model).splitlines() == [line.strip() for line in expected.strip().splitlines()]
    assert not route(model).warnings


@pytest.mark.parametrize("name", cases())
def test_every_parameter_is_stepped_once(name: str) -> None:
    torch.manual_seed(0)
    build, loss, _ = CASES[name]
    model = build()
    optimizer = for_model(model, "soap", lr=1e-3)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))

    loss(model).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        moved = not torch.equal(p, before[name])
        assert moved == (p.grad is not None and bool(p.grad.any())), name
