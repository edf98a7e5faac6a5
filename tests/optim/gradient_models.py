"""A small GPT in two equal copies, for the tests of gradients off the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spillover.optim import OffloadedGradients

VOCABULARY = 61


class Gpt(nn.Module):
    """Embedding and head are tied; ``mode`` may be ``"checkpoint"``."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.mode = "plain"
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.mode == "checkpoint":
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return self.head(hidden)

    def loss(self, seed: int) -> torch.Tensor:
        """Of data that the seed makes: each token is the one before plus one."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, VOCABULARY, (4, 1), generator=generator)
        tokens = ((first + torch.arange(9)) % VOCABULARY).cuda()
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())


def make_gpt(dtype: torch.dtype = torch.float32, **options: int) -> Gpt:
    """The same weights at each call, on the device."""
    torch.manual_seed(5)
    return Gpt(**options).to("cuda", dtype)


#: A model, one with its weights whose gradients are offloaded, and the handle of those.
Twins: TypeAlias = tuple[Gpt, Gpt, OffloadedGradients]


def backward(*models: Gpt, seed: int = 0) -> None:
    for model in models:
        model.loss(seed).backward()


def is_offloaded(gradient: torch.Tensor | None) -> bool:
    return type(gradient).__name__ == "OffloadedGradient"


def all_offloaded(model: nn.Module) -> bool:
    return all(is_offloaded(one.grad) for one in model.parameters() if one.grad is not None)


def assert_gradients_equal(
    found: Iterable[nn.Parameter],
    expected: Iterable[nn.Parameter],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    for one, other in zip(found, expected, strict=True):
        if other.grad is None:
            assert one.grad is None
        else:
            assert one.grad is not None
            torch.testing.assert_close(one.grad.clone(), other.grad.clone(), rtol=rtol, atol=atol)


def assert_twins_equal(twins: Twins, **tolerance: float) -> None:
    plain, offloaded, _ = twins
    assert_gradients_equal(offloaded.parameters(), plain.parameters(), **tolerance)
