"""Models of many kinds, tiny, with the structure and the names that people give them; only routing looks at them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Held(nn.Module):
    """Modules and parameters under names, without a forward pass: nothing says how they are used."""

    def __init__(self, **members: nn.Module | Tensor) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member if isinstance(member, nn.Module) else nn.Parameter(member))


class Net(Held):
    """One network, with a forward pass that is of no interest here."""

    def forward(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError


class Attention(Net):
    pass


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# Several networks.


def actor_critic() -> nn.Module:
    return Held(actor=mlp(8, 32, 32, 4), critic=mlp(8, 32, 32, 1), log_std=torch.zeros(4))


def shared_actor_critic() -> nn.Module:
    """As in stable-baselines3: two bodies, whose outputs two layers read."""
    bodies = Net(policy_net=mlp(8, 32, 32), value_net=mlp(8, 32, 32))
    return Net(mlp_extractor=bodies, action_net=nn.Linear(32, 4), value_net=nn.Linear(32, 1))


def cleanrl() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(4, 8, 8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 20 * 20, 128), nn.ReLU())
    return Held(network=body, actor=nn.Linear(128, 6), critic=nn.Linear(128, 1))


def ddpg() -> nn.Module:
    """The critic reads what the actor makes, beside the state."""
    return nn.ModuleDict({"actor": mlp(10, 32, 4), "critic": mlp(14, 32, 1)})


def twin_critics() -> nn.Module:
    return Net(actor=mlp(10, 32, 4), critics=nn.ModuleList([mlp(14, 32, 1), mlp(14, 32, 1)]))


def dueling() -> nn.Module:
    return Net(features=mlp(8, 32, 32), advantage=mlp(32, 32, 4), value=mlp(32, 32, 1))


def dcgan() -> nn.Module:
    generator = nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()
    )
    discriminator = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(), nn.Conv2d(32, 1, 4))
    return Net(generator=generator, discriminator=discriminator)


def gan() -> nn.Module:
    return nn.ModuleDict({"netG": mlp(16, 32, 784), "netD": mlp(784, 32, 1)})


def vae() -> nn.Module:
    return Net(encoder=mlp(784, 64, 32), mu=nn.Linear(32, 8), logvar=nn.Linear(32, 8), decoder=mlp(8, 32, 64, 784))


def convolutional_vae() -> nn.Module:
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten())
    decoder = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1))
    return Net(
        encoder=encoder,
        fc_mu=nn.Linear(16 * 49, 4),
        fc_var=nn.Linear(16 * 49, 4),
        decoder_input=nn.Linear(4, 16 * 49),
        decoder=decoder,
    )


def autoencoder_in_a_dict() -> nn.Module:
    return nn.ModuleDict({"encoder": mlp(64, 32, 8), "decoder": mlp(8, 32, 64)})


def transformer(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def clip(image_width: int = 24, text_width: int = 16, shared: int = 12) -> nn.Module:
    image = Net(
        conv1=nn.Conv2d(3, image_width, 4, 4, bias=False),
        class_embedding=torch.zeros(image_width),
        positional_embedding=torch.zeros(17, image_width),
        transformer=transformer(image_width, 2),
        proj=nn.Linear(image_width, shared, bias=False),
    )
    text = Net(
        token_embedding=nn.Embedding(50, text_width),
        positional_embedding=torch.zeros(8, text_width),
        transformer=transformer(text_width, 2),
        proj=nn.Linear(text_width, shared, bias=False),
    )
    return Net(visual=image, text=text, logit_scale=torch.tensor(1.0))


def two_towers() -> nn.Module:
    return Net(user=mlp(30, 32, 16), item=mlp(50, 32, 16))


def multi_task() -> nn.Module:
    heads = nn.ModuleDict({"age": mlp(32, 16, 1), "kind": mlp(32, 16, 7)})
    return Net(backbone=mlp(12, 32, 32), heads=heads)


def fusion() -> nn.Module:
    """One network: two branches, whose features are read side by side."""
    return Net(image=mlp(20, 32, 16), text=mlp(30, 32, 8), joint=mlp(24, 16, 3))


# Single networks.


class GatedMLP(Net):
    """As in ModernBERT: `Wi` makes inputs and gates in one product."""

    def __init__(self, width: int) -> None:
        super().__init__(Wi=nn.Linear(width, 4 * width, bias=False), Wo=nn.Linear(2 * width, width, bias=False))


def modern_bert(width: int = 16) -> nn.Module:
    layers = nn.ModuleList(
        Net(attn=Attention(Wqkv=nn.Linear(width, 3 * width), Wo=nn.Linear(width, width)), mlp=GatedMLP(width))
        for _ in range(2)
    )
    return Net(
        embeddings=Net(tok_embeddings=nn.Embedding(50, width), norm=nn.LayerNorm(width)),
        layers=layers,
        head=Net(dense=nn.Linear(width, width), norm=nn.LayerNorm(width)),
        decoder=nn.Linear(width, 50),
    )


def t5_gated(width: int = 16) -> nn.Module:
    def feed_forward() -> nn.Module:
        return Net(
            wi_0=nn.Linear(width, 40, bias=False),
            wi_1=nn.Linear(width, 40, bias=False),
            wo=nn.Linear(40, width, bias=False),
        )

    def stack() -> nn.Module:
        return Net(block=nn.ModuleList(Net(DenseReluDense=feed_forward()) for _ in range(2)))

    shared = nn.Embedding(50, width)
    return Net(shared=shared, encoder=stack(), decoder=stack(), lm_head=nn.Linear(width, 50, bias=False))


def timm_vit(width: int = 16) -> nn.Module:
    blocks = nn.Sequential(
        *(
            Net(
                norm1=nn.LayerNorm(width),
                attn=Attention(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
                norm2=nn.LayerNorm(width),
                mlp=Net(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
            )
            for _ in range(2)
        )
    )
    return Net(
        cls_token=torch.zeros(1, 1, width),
        pos_embed=torch.zeros(1, 17, width),
        patch_embed=Net(proj=nn.Conv2d(3, width, 4, 4)),
        blocks=blocks,
        norm=nn.LayerNorm(width),
        head=nn.Linear(width, 10),
    )


def timm_convnext(widths: Sequence[int] = (8, 16)) -> nn.Module:
    def block(width: int) -> nn.Module:
        return Net(
            conv_dw=nn.Conv2d(width, width, 7, padding=3, groups=width),
            norm=nn.LayerNorm(width),
            mlp=Net(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
            gamma=torch.ones(width),
        )

    def stage(inputs: int, width: int) -> nn.Module:
        down = nn.Identity() if inputs == width else nn.Sequential(nn.LayerNorm(inputs), nn.Conv2d(inputs, width, 2, 2))
        return Net(downsample=down, blocks=nn.Sequential(block(width), block(width)))

    first, last = widths[0], widths[-1]
    return Net(
        stem=nn.Sequential(nn.Conv2d(3, first, 4, 4), nn.LayerNorm(first)),
        stages=nn.Sequential(*(stage(a, b) for a, b in zip((first, *widths), widths, strict=False))),
        head=Net(norm=nn.LayerNorm(last), fc=nn.Linear(last, 10)),
    )


def unet() -> nn.Module:
    def double(inputs: int, outputs: int) -> nn.Module:
        convolutions = (nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.Conv2d(outputs, outputs, 3), nn.ReLU())
        return Net(double_conv=nn.Sequential(*convolutions))

    def up(inputs: int, outputs: int) -> nn.Module:
        return Net(up=nn.ConvTranspose2d(inputs, outputs, 2, 2), conv=double(inputs, outputs))

    return Net(
        inc=double(3, 8),
        down1=Net(maxpool_conv=nn.Sequential(nn.MaxPool2d(2), double(8, 16))),
        down2=Net(maxpool_conv=nn.Sequential(nn.MaxPool2d(2), double(16, 32))),
        up1=up(32, 16),
        up2=up(16, 8),
        outc=Net(conv=nn.Conv2d(8, 2, 1)),
    )


def diffusion_unet() -> nn.Module:
    """A U-Net of residual blocks, each of which reads the time's embedding, with skips that are joined."""

    def block(inputs: int, outputs: int) -> nn.Module:
        return Net(
            in_layers=nn.Sequential(nn.GroupNorm(2, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)),
            emb_layers=nn.Sequential(nn.SiLU(), nn.Linear(32, 2 * outputs)),
            out_layers=nn.Sequential(nn.GroupNorm(2, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)),
        )

    return Net(
        time_embed=mlp(8, 32, 32),
        label_emb=nn.Embedding(10, 32),
        input_blocks=nn.ModuleList([nn.Sequential(nn.Conv2d(3, 8, 3)), block(8, 8), block(8, 16)]),
        middle_block=nn.Sequential(block(16, 16), Attention(qkv=nn.Conv1d(16, 48, 1), proj_out=nn.Conv1d(16, 16, 1))),
        output_blocks=nn.ModuleList([block(32, 16), block(24, 8), block(16, 8)]),
        out=nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3)),
    )


def dit(width: int = 16) -> nn.Module:
    def block() -> nn.Module:
        return Net(
            attn=Attention(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)),
            mlp=Net(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
        )

    return Net(
        x_embedder=Net(proj=nn.Conv2d(4, width, 2, 2)),
        t_embedder=Net(mlp=mlp(64, width, width)),
        y_embedder=Net(embedding_table=nn.Embedding(11, width)),
        blocks=nn.ModuleList([block(), block()]),
        final_layer=Net(
            norm_final=nn.LayerNorm(width, elementwise_affine=False),
            linear=nn.Linear(width, 2 * 2 * 5),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        ),
    )


def mamba(width: int = 16, states: int = 4) -> nn.Module:
    inner = 2 * width

    def mixer() -> nn.Module:
        return Net(
            in_proj=nn.Linear(width, 2 * inner, bias=False),
            conv1d=nn.Conv1d(inner, inner, 4, groups=inner, padding=3),
            x_proj=nn.Linear(inner, 2 + 2 * states, bias=False),
            dt_proj=nn.Linear(2, inner),
            A_log=torch.randn(inner, states),
            D=torch.ones(inner),
            out_proj=nn.Linear(inner, width, bias=False),
        )

    layers = nn.ModuleList(Net(norm=nn.LayerNorm(width), mixer=mixer()) for _ in range(2))
    backbone = Net(embedding=nn.Embedding(50, width), layers=layers, norm_f=nn.LayerNorm(width))
    model = Net(backbone=backbone, lm_head=nn.Linear(width, 50, bias=False))
    model.lm_head.weight = backbone.embedding.weight
    return model


def moe(width: int = 16, inner: int = 24, experts: int = 4) -> nn.Module:
    """Experts that nothing calls so."""

    def block() -> nn.Module:
        return Net(
            gate=nn.Linear(width, experts, bias=False),
            w1=torch.randn(experts, inner, width),
            w2=torch.randn(experts, width, inner),
        )

    blocks = nn.ModuleList(Net(attn=nn.MultiheadAttention(width, 2), ffn=block()) for _ in range(2))
    return Net(embed=nn.Embedding(50, width), blocks=blocks, head=nn.Linear(width, 50))


def moe_of_modules(width: int = 16, experts: int = 4) -> nn.Module:
    block = Net(gate=nn.Linear(width, experts), mlps=nn.ModuleList(mlp(width, 24, width) for _ in range(experts)))
    return Net(embed=nn.Embedding(50, width), block=block, head=nn.Linear(width, 50))


def adaptive_softmax() -> nn.Module:
    loss = nn.AdaptiveLogSoftmaxWithLoss(24, 200, [20, 80], div_value=2.0)
    return Net(embed=nn.Embedding(200, 16), rnn=nn.LSTM(16, 24), loss=loss)


def lora(width: int = 32, rank: int = 4) -> nn.Module:
    """As peft makes it: frozen layers with trainable factors beside them."""

    def adapted(inputs: int, outputs: int) -> nn.Module:
        down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        return Net(
            base_layer=nn.Linear(inputs, outputs).requires_grad_(False),
            lora_A=nn.ModuleDict({"default": down}),
            lora_B=nn.ModuleDict({"default": up}),
        )

    layers = nn.ModuleList(Net(q_proj=adapted(width, width), v_proj=adapted(width, width // 2)) for _ in range(2))
    embed, head = nn.Embedding(50, width), nn.Linear(width, 50)
    return Net(embed=embed.requires_grad_(False), layers=layers, lm_head=head.requires_grad_(False))


def pinn() -> nn.Module:
    widths = (2, 20, 20, 20, 1)
    return Net(linears=nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def detr(width: int = 16) -> nn.Module:
    """Heads before the backbone, which is declared last."""
    bbox = Net(layers=nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)]))
    body = nn.Sequential(*(Net(conv=nn.Conv2d(a, b, 3)) for a, b in ((3, 8), (8, 32))))
    return Net(
        transformer=transformer(width, 2),
        class_embed=nn.Linear(width, 12),
        bbox_embed=bbox,
        query_embed=nn.Embedding(5, width),
        input_proj=nn.Conv2d(32, width, 1),
        backbone=Net(body=body),
    )


def head_first() -> nn.Module:
    return Net(out=nn.Linear(64, 10), fc1=nn.Linear(32, 64), fc2=nn.Linear(64, 64), fc3=nn.Linear(64, 64))


def inception() -> nn.Module:
    def convolution(inputs: int, outputs: int) -> nn.Module:
        return Net(conv=nn.Conv2d(inputs, outputs, 1, bias=False), bn=nn.BatchNorm2d(outputs))

    def mixed(inputs: int, pool: int) -> nn.Module:
        return Net(
            branch1=convolution(inputs, 8), branch2=convolution(inputs, 12), branch_pool=convolution(inputs, pool)
        )

    return Net(stem=convolution(3, 16), mixed1=mixed(16, 4), mixed2=mixed(24, 6), fc=nn.Linear(26, 10))


def densenet(growth: int = 4) -> nn.Module:
    layers = {
        f"denselayer{i}": Net(conv1=nn.Conv2d(8 + i * growth, 16, 1), conv2=nn.Conv2d(16, growth, 3)) for i in range(3)
    }
    features = nn.Sequential(nn.Conv2d(3, 8, 7), nn.ModuleDict(layers), nn.BatchNorm2d(20))
    return Net(features=features, classifier=nn.Linear(20, 10))
