"""The zoo, routed: each table was read by a person, and is kept as text.

A line is a matrix under SOAP with its layout, or a parameter under AdamW with the reason. Norms, biases and vectors are
left out; the only row of a projection to one output is such a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import zoo_models
from torch import nn

from steepest.routing import route
from steepest.routing.table import common_name, fold

TABLES: dict[Callable[[], nn.Module], str] = {
    zoo_models.actor_critic: """
        actor.0.weight  32×8
        actor.2.weight  32×32
        actor.4.weight  output head: the last projection of actor
        critic.0.weight  32×8
        critic.2.weight  32×32
    """,
    zoo_models.shared_actor_critic: """
        mlp_extractor.policy_net.0.weight  32×8
        mlp_extractor.policy_net.2.weight  32×32
        mlp_extractor.value_net.0.weight  32×8
        mlp_extractor.value_net.2.weight  32×32
        action_net.weight  output head: its outputs feed nothing
    """,
    zoo_models.cleanrl: """
        network.0.weight  8×(4·8·8)
        network.3.weight  128×3200
        actor.weight  output head: its outputs feed nothing
    """,
    zoo_models.ddpg: """
        actor.0.weight  32×10
        actor.2.weight  output head: the last projection of actor
        critic.0.weight  32×14
    """,
    zoo_models.twin_critics: """
        actor.0.weight  32×10
        actor.2.weight  output head: the last projection of actor
        critics.{0..1}.0.weight ×2  32×14
    """,
    zoo_models.dueling: """
        features.0.weight  32×8
        features.2.weight  32×32
        advantage.0.weight  32×32
        advantage.2.weight  output head: the last projection of advantage
        value.0.weight  32×32
    """,
    zoo_models.dcgan: """
        generator.0.weight  (32·4·4)×16 (transposed)
        generator.3.weight  output head: the last projection of generator
        discriminator.0.weight  32×(3·4·4)
        discriminator.2.weight  output head: the last projection
    """,
    zoo_models.gan: """
        netG.0.weight  32×16
        netG.2.weight  output head: the last projection of netG
        netD.0.weight  32×784
    """,
    zoo_models.vae: """
        encoder.0.weight  64×784
        encoder.2.weight  32×64
        mu.weight  8×32
        logvar.weight  8×32
        decoder.0.weight  32×8
        decoder.2.weight  64×32
        decoder.4.weight  output head: the last projection
    """,
    zoo_models.convolutional_vae: """
        encoder.0.weight  8×(1·3·3)
        encoder.2.weight  16×(8·3·3)
        fc_mu.weight  4×784
        fc_var.weight  4×784
        decoder_input.weight  784×4
        decoder.0.weight  (8·4·4)×16 (transposed)
        decoder.2.weight  output head: the last projection
    """,
    zoo_models.autoencoder_in_a_dict: """
        encoder.0.weight  32×64
        encoder.2.weight  8×32
        decoder.0.weight  32×8
        decoder.2.weight  output head: the last projection
    """,
    zoo_models.clip: """
        visual.positional_embedding  learnt table: added, not multiplied
        visual.conv1.weight  24×(3·4·4)
        visual.transformer.layers.{0..1}.self_attn.in_proj_weight ×2  3 × 24×24 (q, k, v)
        visual.transformer.layers.{0..1}.self_attn.out_proj.weight ×2  24×24
        visual.transformer.layers.{0..1}.linear1.weight ×2  48×24
        visual.transformer.layers.{0..1}.linear2.weight ×2  24×48
        visual.proj.weight  output head: the last projection of visual
        text.positional_embedding  learnt table: added, not multiplied
        text.token_embedding.weight  embedding: rows are looked up
        text.transformer.layers.{0..1}.self_attn.in_proj_weight ×2  3 × 16×16 (q, k, v)
        text.transformer.layers.{0..1}.self_attn.out_proj.weight ×2  16×16
        text.transformer.layers.{0..1}.linear1.weight ×2  32×16
        text.transformer.layers.{0..1}.linear2.weight ×2  16×32
        text.proj.weight  output head: the last projection
    """,
    zoo_models.two_towers: """
        user.0.weight  32×30
        user.2.weight  output head: the last projection of user
        item.0.weight  32×50
        item.2.weight  output head: the last projection
    """,
    zoo_models.multi_task: """
        backbone.0.weight  32×12
        backbone.2.weight  32×32
        heads.age.0.weight  16×32
        heads.kind.0.weight  16×32
        heads.kind.2.weight  output head: the last projection
    """,
    zoo_models.fusion: """
        image.0.weight  32×20
        image.2.weight  16×32
        text.0.weight  32×30
        text.2.weight  8×32
        joint.0.weight  16×24
        joint.2.weight  output head: the last projection
    """,
    zoo_models.modern_bert: """
        embeddings.tok_embeddings.weight  embedding: rows are looked up
        layers.{0..1}.attn.Wqkv.weight ×2  3 × 16×16 (q, k, v)
        layers.{0..1}.attn.Wo.weight ×2  16×16
        layers.{0..1}.mlp.Wi.weight ×2  2 × 32×16
        layers.{0..1}.mlp.Wo.weight ×2  16×32
        head.dense.weight  16×16
        decoder.weight  output head: the last projection
    """,
    zoo_models.t5_gated: """
        shared.weight  embedding: rows are looked up
        encoder.block.{0..1}.DenseReluDense.wi_{0..1}.weight ×4  40×16
        encoder.block.{0..1}.DenseReluDense.wo.weight ×2  16×40
        decoder.block.{0..1}.DenseReluDense.wi_{0..1}.weight ×4  40×16
        decoder.block.{0..1}.DenseReluDense.wo.weight ×2  16×40
        lm_head.weight  output head: the last projection
    """,
    zoo_models.timm_vit: """
        pos_embed  learnt table: added, not multiplied
        patch_embed.proj.weight  16×(3·4·4)
        blocks.{0..1}.attn.qkv.weight ×2  3 × 16×16 (q, k, v)
        blocks.{0..1}.attn.proj.weight ×2  16×16
        blocks.{0..1}.mlp.fc1.weight ×2  64×16
        blocks.{0..1}.mlp.fc2.weight ×2  16×64
        head.weight  output head: the last projection
    """,
    zoo_models.timm_convnext: """
        stem.0.weight  8×(3·4·4)
        stages.0.blocks.{0..1}.conv_dw.weight ×2  depthwise convolution: one filter per channel
        stages.0.blocks.{0..1}.mlp.fc1.weight ×2  32×8
        stages.0.blocks.{0..1}.mlp.fc2.weight ×2  8×32
        stages.1.downsample.1.weight  16×(8·2·2)
        stages.1.blocks.{0..1}.conv_dw.weight ×2  depthwise convolution: one filter per channel
        stages.1.blocks.{0..1}.mlp.fc1.weight ×2  64×16
        stages.1.blocks.{0..1}.mlp.fc2.weight ×2  16×64
        head.fc.weight  output head: the last projection
    """,
    zoo_models.unet: """
        inc.double_conv.0.weight  8×(3·3·3)
        inc.double_conv.2.weight  8×(8·3·3)
        down1.maxpool_conv.1.double_conv.0.weight  16×(8·3·3)
        down1.maxpool_conv.1.double_conv.2.weight  16×(16·3·3)
        down2.maxpool_conv.1.double_conv.0.weight  32×(16·3·3)
        down2.maxpool_conv.1.double_conv.2.weight  32×(32·3·3)
        up1.up.weight  (16·2·2)×32 (transposed)
        up1.conv.double_conv.0.weight  16×(32·3·3)
        up1.conv.double_conv.2.weight  16×(16·3·3)
        up2.up.weight  (8·2·2)×16 (transposed)
        up2.conv.double_conv.0.weight  8×(16·3·3)
        up2.conv.double_conv.2.weight  8×(8·3·3)
        outc.conv.weight  output head: the last projection
    """,
    zoo_models.diffusion_unet: """
        time_embed.0.weight  32×8
        time_embed.2.weight  32×32
        label_emb.weight  embedding: rows are looked up
        input_blocks.0.0.weight  8×(3·3·3)
        input_blocks.1.in_layers.2.weight  8×(8·3·3)
        input_blocks.1.emb_layers.1.weight  16×32
        input_blocks.1.out_layers.2.weight  8×(8·3·3)
        input_blocks.2.in_layers.2.weight  16×(8·3·3)
        input_blocks.2.emb_layers.1.weight  32×32
        input_blocks.2.out_layers.2.weight  16×(16·3·3)
        middle_block.0.in_layers.2.weight  16×(16·3·3)
        middle_block.0.emb_layers.1.weight  32×32
        middle_block.0.out_layers.2.weight  16×(16·3·3)
        middle_block.1.qkv.weight  3 × 16×16 (q, k, v)
        middle_block.1.proj_out.weight  16×16
        output_blocks.0.in_layers.2.weight  16×(32·3·3)
        output_blocks.0.emb_layers.1.weight  32×32
        output_blocks.0.out_layers.2.weight  16×(16·3·3)
        output_blocks.1.in_layers.2.weight  8×(24·3·3)
        output_blocks.{1..2}.emb_layers.1.weight ×2  16×32
        output_blocks.{1..2}.out_layers.2.weight ×2  8×(8·3·3)
        output_blocks.2.in_layers.2.weight  8×(16·3·3)
        out.2.weight  output head: the last projection
    """,
    zoo_models.dit: """
        x_embedder.proj.weight  16×(4·2·2)
        t_embedder.mlp.0.weight  16×64
        t_embedder.mlp.2.weight  16×16
        y_embedder.embedding_table.weight  embedding: rows are looked up
        blocks.{0..1}.attn.qkv.weight ×2  3 × 16×16 (q, k, v)
        blocks.{0..1}.attn.proj.weight ×2  16×16
        blocks.{0..1}.mlp.fc1.weight ×2  64×16
        blocks.{0..1}.mlp.fc2.weight ×2  16×64
        blocks.{0..1}.adaLN_modulation.1.weight ×2  96×16
        final_layer.linear.weight  output head: the last projection
        final_layer.adaLN_modulation.1.weight  32×16
    """,
    zoo_models.mamba: """
        backbone.embedding.weight  embedding, tied to the output head
        backbone.layers.{0..1}.mixer.A_log ×2  diagonals of a state space: multiplied entrywise
        backbone.layers.{0..1}.mixer.in_proj.weight ×2  2 × 32×16
        backbone.layers.{0..1}.mixer.conv1d.weight ×2  depthwise convolution: one filter per channel
        backbone.layers.{0..1}.mixer.x_proj.weight ×2  10×32
        backbone.layers.{0..1}.mixer.dt_proj.weight ×2  32×2
        backbone.layers.{0..1}.mixer.out_proj.weight ×2  16×32
    """,
    zoo_models.moe: """
        embed.weight  embedding: rows are looked up
        blocks.{0..1}.attn.in_proj_weight ×2  3 × 16×16 (q, k, v)
        blocks.{0..1}.attn.out_proj.weight ×2  16×16
        blocks.{0..1}.ffn.w1 ×2  4 experts of 24×16
        blocks.{0..1}.ffn.w2 ×2  4 experts of 16×24
        blocks.{0..1}.ffn.gate.weight ×2  router: its rows are the experts' logits
        head.weight  output head: the last projection
    """,
    zoo_models.moe_of_modules: """
        embed.weight  embedding: rows are looked up
        block.gate.weight  router: its rows are the experts' logits
        block.mlps.{0..3}.0.weight ×4  24×16
        block.mlps.{0..3}.2.weight ×4  16×24
        head.weight  output head: the last projection
    """,
    zoo_models.adaptive_softmax: """
        embed.weight  embedding: rows are looked up
        rnn.weight_ih_l0  4 × 24×16 (i, f, g, o)
        rnn.weight_hh_l0  4 × 24×24 (i, f, g, o)
        loss.head.weight  output head: one row for each class
        loss.tail.0.0.weight  12×24
        loss.tail.0.1.weight  output head: one row for each class
        loss.tail.1.0.weight  6×24
        loss.tail.1.1.weight  output head: one row for each class
    """,
    zoo_models.lora: """
        layers.{0..1}.q_proj.lora_A.default.weight ×2  4×32
        layers.{0..1}.q_proj.lora_B.default.weight ×2  32×4
        layers.{0..1}.v_proj.lora_A.default.weight ×2  4×32
        layers.{0..1}.v_proj.lora_B.default.weight ×2  16×4
    """,
    zoo_models.pinn: """
        linears.0.weight  20×2
        linears.{1..2}.weight ×2  20×20
    """,
    zoo_models.detr: """
        transformer.layers.{0..1}.self_attn.in_proj_weight ×2  3 × 16×16 (q, k, v)
        transformer.layers.{0..1}.self_attn.out_proj.weight ×2  16×16
        transformer.layers.{0..1}.linear1.weight ×2  32×16
        transformer.layers.{0..1}.linear2.weight ×2  16×32
        class_embed.weight  output head: its outputs feed nothing
        bbox_embed.layers.{0..1}.weight ×2  16×16
        bbox_embed.layers.2.weight  output head: the last projection of bbox_embed
        query_embed.weight  embedding: rows are looked up
        input_proj.weight  16×32
        backbone.body.0.conv.weight  8×(3·3·3)
        backbone.body.1.conv.weight  32×(8·3·3)
    """,
    zoo_models.head_first: """
        out.weight  output head: its outputs feed nothing
        fc1.weight  64×32
        fc2.weight  64×64
        fc3.weight  64×64
    """,
    zoo_models.inception: """
        stem.conv.weight  16×3
        mixed1.branch1.conv.weight  8×16
        mixed1.branch2.conv.weight  12×16
        mixed1.branch_pool.conv.weight  4×16
        mixed2.branch1.conv.weight  8×24
        mixed2.branch2.conv.weight  12×24
        mixed2.branch_pool.conv.weight  6×24
        fc.weight  output head: the last projection
    """,
    zoo_models.densenet: """
        features.0.weight  8×(3·7·7)
        features.1.denselayer0.conv1.weight  16×8
        features.1.denselayer0.conv2.weight  4×(16·3·3)
        features.1.denselayer1.conv1.weight  16×12
        features.1.denselayer1.conv2.weight  4×(16·3·3)
        features.1.denselayer2.conv1.weight  16×16
        features.1.denselayer2.conv2.weight  4×(16·3·3)
        classifier.weight  output head: the last projection
    """,
}


def table(model: nn.Module) -> list[str]:
    lines = []
    for rows in fold(route(model).rows):
        row = rows[0]
        assert row.rule == ("adamw" if row.view is None else "soap")
        if row.why not in ("norm", "bias", "vector"):
            lines.append(f"{common_name([row.name for row in rows])}  {row.layout if row.view else row.why}")
    return lines


@pytest.mark.parametrize("build", TABLES, ids=lambda build: build.__name__)
def test_table(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert table(model) == [line.strip() for line in TABLES[build].strip().splitlines()]
    assert not route(model).warnings
