"""Mixed precision: bfloat16 autocast, and float16 autocast with a GradScaler."""

from __future__ import annotations

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from torch import nn


def train(device: str, dtype: torch.dtype) -> list[float]:
    """Losses of ten steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 64),
        nn.LayerNorm(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, init_scale=2.0**8)
    x = torch.randn(16, 3, 8, 8).to(device)
    y = torch.arange(16).remainder(10).to(device)
    losses = []
    for _ in range(10):
        with torch.autocast(device, dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def run() -> None:
    """Train in both precisions; CPU and CUDA autocast run different operators in them."""
    for dtype in (torch.bfloat16, torch.float16):
        losses = train("cuda", dtype)
        assert_learns(losses)
        assert_close(losses, train("cpu", dtype), tolerance=0.1)


if __name__ == "__main__":
    main(run)
