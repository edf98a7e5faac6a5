"""torch.compile with the aot_eager backend: losses equal those of the eager model."""

from __future__ import annotations

import copy

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a gated perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, width))
        n = self.norm_2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


def train(model: nn.Module) -> list[float]:
    """Losses of six steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1)).cuda()
    losses = []
    for _ in range(6):
        loss = F.mse_loss(model(x), x.roll(1, dims=1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run() -> None:
    """Train the eager and the compiled model from the same weights."""
    eager = Block(32, 4).cuda()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = train(eager)
    losses = train(compiled)
    assert_close(losses, expected, tolerance=1e-5)
    assert_learns(losses)


if __name__ == "__main__":
    main(run)
