"""The model families whose gradients have to be those of the plain run, small, and their steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from activation_contexts import TIGHT, check_equal, on_disk
from activation_models import gradients, make_gpt
from torch import nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Written out, in float32 inside, as Llama's is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * (wide * scale).to(x.dtype)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and SwiGLU."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, width: int, heads: int, groups: int, length: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, groups * self.size, bias=False)
        self.value = nn.Linear(width, groups * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        rates = 1e4 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(length), rates).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat([-second, first], -1) * self.sine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.norm_1(x)
        query, key, value = (
            layer(y).view(batch, length, -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.rotate(query), self.rotate(key)
        shape = (batch, self.groups, self.heads // self.groups, length, self.size)
        key, value = (
            part.unsqueeze(2).expand(shape).reshape(batch, self.heads, length, self.size)
            for part in (key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.norm_2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, width: int = 32, depth: int = 3, vocabulary: int = 53) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[LlamaBlock(width, 4, 2, 16) for _ in range(depth)])
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.detach().abs().mul(100).long() % self.embedding.num_embeddings
        # The input takes part, so that it has a gradient.
        hidden = self.embedding(tokens) + x.unsqueeze(-1)
        scores = self.head(self.norm(self.blocks(hidden)))
        return functional.cross_entropy(scores.flatten(0, 1), tokens.roll(1, 1).flatten())


class ViT(nn.Module):
    """Patches, a class token, and torch's own encoder with nn.MultiheadAttention and dropout."""

    def __init__(self, width: int = 32, patch: int = 4, side: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(len(x), -1, -1), rows], 1) + self.positions
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows[:, 0])


def convolution(channels_in: int, channels: int, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Batch and group normalization, pooling, transposed convolutions, skip connections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down_1 = convolution(3, width, nn.BatchNorm2d(width))
        self.down_2 = convolution(width, 2 * width, nn.GroupNorm(4, 2 * width))
        self.middle = convolution(2 * width, 4 * width, nn.BatchNorm2d(4 * width))
        self.up_2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.merge_2 = convolution(4 * width, 2 * width, nn.GroupNorm(2, 2 * width))
        self.up_1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge_1 = convolution(2 * width, width, nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.down_1(x)
        second = self.down_2(functional.max_pool2d(first, 2))
        middle = self.middle(functional.avg_pool2d(second, 2))
        second = self.merge_2(torch.cat([self.up_2(middle), second], 1))
        first = self.merge_1(torch.cat([self.up_1(second), first], 1))
        return self.head(first)


class Recurrent(nn.Module):
    """A bidirectional LSTM of two layers over packed sequences, and a cell that is unrolled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, 2, dropout=0.2, bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = [x.shape[1] - 2 * index for index in range(x.shape[0])]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        rows, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        state = None
        outputs = []
        for row in rows.unbind(1):
            state = self.cell(row, state)
            outputs.append(self.head(state[0]))
        return torch.stack(outputs)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "gpt": (lambda: make_gpt(depth=2), (2, 12, 32)),
    "llama": (Llama, (2, 16)),
    "vit": (ViT, (3, 3, 12, 12)),
    "unet": (UNet, (2, 3, 16, 16)),
    "lstm": (Recurrent, (3, 9, 16)),
}


def step_of(name: str) -> Callable[[contextlib.AbstractContextManager[Any]], list[torch.Tensor]]:
    """Runs one step of a network in a context, from the same state each time.

    It gives the loss, all gradients and the buffers that the step changed.
    """
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().cuda()
    inputs = torch.randn(shape, device="cuda")
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step(context: contextlib.AbstractContextManager[Any]) -> list[torch.Tensor]:
        model.load_state_dict(state)
        found = gradients(model, inputs, context)
        return found + [buffer.cpu() for buffer in model.buffers()]

    step.model = model  # type: ignore[attr-defined]
    return step


def check_network(name: str, folder: Any = None, **options: Any) -> None:
    """Two steps of a network, with every saved tensor moved, give the bits of the plain run."""
    step = step_of(name)
    tier = {} if folder is None else on_disk(folder)
    check_equal(step, steps=2, **TIGHT, **tier, **{"model": step.model, **options})  # type: ignore[attr-defined]
