"""A small byte-level GPT and its data: the Python standard library's own sources."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256  # bytes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of the model. ``width`` must be a multiple of ``heads``."""

    layers: int = 20
    width: int = 384
    heads: int = 6
    context: int = 128


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations [batch, time, width] to the same shape."""
        batch, time, width = x.shape
        heads = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class GPT(nn.Module):
    """A decoder-only transformer whose output layer shares the embedding's weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of ``targets`` [batch, time] given ``tokens`` [batch, time]."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def standard_library_text(size_bytes: int) -> torch.Tensor:
    """The first ``size_bytes`` of the standard library's sources, in order of their names."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size_bytes:
            break
    return torch.frombuffer(text[:size_bytes], dtype=torch.uint8).clone()


def batches(
    text: torch.Tensor, *, steps: int, batch: int, context: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``steps`` random windows of the text: inputs and targets, int64 [batch, context] each."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(steps):
        starts = torch.randint(len(text) - context - 1, (batch,), generator=generator)
        windows = torch.stack([text[start : start + context + 1] for start in starts]).long()
        result.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return result
