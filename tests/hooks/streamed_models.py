"""Small models and a training loop for the tests of stream_parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spillover import stream_parameters

VOCABULARY = 53


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )
        self.inner_checkpoint = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(hidden)
        hidden = hidden + self.attention(normed, normed, normed, need_weights=False)[0]
        if self.inner_checkpoint:
            return hidden + checkpoint(
                lambda inner: self.mlp(self.norm2(inner)), hidden, use_reentrant=False
            )
        return hidden + self.mlp(self.norm2(hidden))


class Gpt(nn.Module):
    """Embedding and head are tied; ``mode`` says where activations are checkpointed."""

    def __init__(self, *, width: int = 16, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.mode = "plain"

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.mode in ("outer", "reentrant"):
                hidden = checkpoint(block, hidden, use_reentrant=self.mode == "reentrant")
            else:
                hidden = block(hidden)
        return self.head(self.norm(hidden))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def make_gpt(**options: Any) -> Gpt:
    torch.manual_seed(7)
    return Gpt(**options)


def make_tokens(count: int = 4, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (2, 9), generator=generator) for _ in range(count)]


@dataclass
class Outcome:
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train(
    model: Gpt, *, stream: dict[str, Any] | None, accumulate: int = 1, steps: int = 3
) -> Outcome:
    """Train a copy of ``model``, all resident where ``stream`` is None."""
    model = copy.deepcopy(model)
    handle = None
    if stream is None:
        model.cuda()
    else:
        handle = stream_parameters(model, **stream)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    losses = []
    gradients: dict[str, torch.Tensor] = {}
    torch.cuda.manual_seed(5)
    for index, tokens in enumerate(make_tokens(steps * accumulate)):
        loss = model.loss(tokens.cuda())
        loss.backward()
        losses.append(loss.item())
        if (index + 1) % accumulate == 0:
            gradients = gradients_of(model)
            optimizer.step()
            optimizer.zero_grad()
    weights = weights_of(model)
    if handle is not None:
        handle.remove()
    return Outcome(losses, gradients, weights)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"these differ: {different}"


def assert_same_outcome(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses
    assert_same(one.gradients, other.gradients)
    assert_same(one.weights, other.weights)
