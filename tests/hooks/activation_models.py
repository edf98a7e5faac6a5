"""Models, inputs and comparisons for the tests of activation offloading."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SMALL = {"min_bytes": 1, "keep_on_device": 0, "in_flight_max": "64KiB", "prefetch": "64KiB"}


class Attention(nn.Module):
    """Causal attention whose q, k and v are chunks of one projection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.project_in(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        joined = mixed.transpose(1, 2).reshape(batch, length, width)
        return functional.dropout(self.project_out(joined), self.dropout, self.training)


class Block(nn.Module):
    """A transformer block; ``mode`` says whether it is checkpointed."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.mode = "plain"
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def run(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "plain":
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.mode == "reentrant")


def make_gpt(depth: int = 3, mode: str = "plain") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(depth)]).cuda()
    for block in model:
        block.mode = mode
    return model


def make_mlp(width: int = 64, depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers).cuda()


def make_leaf(rows: int = 48, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, 64, device="cuda").requires_grad_()


def gradients_of(model: nn.Module) -> list[torch.Tensor | None]:
    """Gradients of the parameters, None for those that have none."""
    return [parameter.grad for parameter in model.parameters()]


def gradients(
    model: nn.Module,
    inputs: torch.Tensor,
    context: contextlib.AbstractContextManager[Any] | None = None,
    *,
    loss: Callable[[torch.Tensor], torch.Tensor] = lambda out: out.square().mean(),
    backward_inside: bool = False,
) -> list[torch.Tensor]:
    """Loss, input gradient and parameter gradients of one seeded step, on the CPU."""
    torch.manual_seed(5)
    model.zero_grad()
    x = inputs.detach().clone().requires_grad_()
    # A non-leaf, so that the first operator's saved input can leave as well.
    with context or contextlib.nullcontext():
        value = loss(model(x * 1))
        if backward_inside:
            value.backward()
    if not backward_inside:
        value.backward()
    assert x.grad is not None
    found = [value.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [tensor.cpu() for tensor in found]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(left, right), f"result {index} differs"
