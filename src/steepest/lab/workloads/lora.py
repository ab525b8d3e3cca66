"""Low-rank adaptation (LoRA): a GPT that has read source code is taught prose through thin matrices beside its own.

The base is the network of `stdlib`, trained for 600 steps on the standard library's source. The prose is what Python's
``help("topics")`` shows: its language reference, in English sentences. W stays as it is in

    y = W x + B A x        A [rank, n], B [m, rank], which starts as zero        (Hu et al., arXiv:2106.09685)

The base is trained at the first use, which takes about half a minute, and kept (`steepest.lab.workloads.cache`).
"""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.fingerprints import code_hash, digest
from steepest.lab.workloads import gpt, text
from steepest.lab.workloads.cache import cached
from steepest.lab.workloads.stdlib import StandardLibrary
from steepest.lab.workloads.workload import at_least_one

BASE_STEPS = 600
BASE_RATE = 5e-3
ADAPTED = ("q", "k", "v", "o", "up", "down")


class LoRA(text.Characters):
    """18,432 parameters are trained, beside the six frozen matrices of each of two blocks; the rank is 8."""

    suite_steps = 200
    batch_size = 16
    held_out_windows = (2, 64)

    def __init__(self, *, scale: float = 1.0, rank: int = 8) -> None:
        at_least_one(rank=rank)
        self.rank = rank
        self.source = StandardLibrary(scale=scale)
        train, validation = prose()
        self.characters = f"{len(train):,} to train on, {len(validation):,} held out"
        self.sha256 = hashlib.sha256(f"{train}\0{validation}".encode()).hexdigest()
        super().__init__(text.symbols_of(train), text.symbols_of(validation))
        self.base = cached_base(self.source)

    @override
    def model(self) -> nn.Module:
        model = self.source.model()
        model.load_state_dict(self.base)
        model.requires_grad_(False)
        for block in list(model.modules()):
            if isinstance(block, gpt.Block):
                for name in ADAPTED:
                    setattr(block, name, Adapted(getattr(block, name), self.rank))
        return model

    @override
    def describe(self) -> dict[str, str]:
        weights = b"".join(weight.numpy().tobytes() for weight in self.base.values())
        return {
            "text": "topics of Python's help",
            "characters": self.characters,
            "sha256": self.sha256,
            "base": f"{BASE_STEPS} steps on other text; sha256 {hashlib.sha256(weights).hexdigest()}",
        }


class Adapted(nn.Module):
    """A frozen linear layer, to whose outputs ``[..., m]`` two trained layers add."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the frozen layer's outputs plus the adaptation."""
        y: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return y


def prose() -> tuple[str, str]:
    """Return the topics of Python's help as text to train on, and every tenth of them as text for validation."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise BadInput("this Python comes without the topics of its help: race on another workload") from error
    found = [text.clean(topics[name]) for name in sorted(topics)]
    return "".join(topic for i, topic in enumerate(found) if i % 10), "".join(found[::10])


def cached_base(source: StandardLibrary) -> dict[str, Tensor]:
    """Return the weights of the base, from the cache if it was trained before."""
    code = code_hash(__file__, text.__file__, gpt.__file__)
    key = digest([code, source.describe(), source.width, BASE_STEPS, torch.__version__])
    return cached(f"lora-base-{key[:16]}", lambda: pretrained(source))


def pretrained(source: StandardLibrary) -> dict[str, Tensor]:
    """Train the base by AdamW in one thread, so that its weights are the same in each process, and return them."""
    print("training the base of lora, once", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = source.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BASE_STEPS)
    data = torch.Generator().manual_seed(0)
    for _ in range(BASE_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(source.loss(model, source.batch(data)))
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return model.state_dict()
