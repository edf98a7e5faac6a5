"""DistributedDataParallel over gloo, two processes: it learns what one process learns."""

from __future__ import annotations

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from _ranks import RANKS, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROWS = 8


def new_model() -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)
    )


def train(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[float]:
    """Losses of six steps; every second backward accumulates without a reduction under DDP."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(6):
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                F.cross_entropy(model(inputs), labels).backward()
        else:
            F.cross_entropy(model(inputs), labels).backward()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batch() -> tuple[Tensor, Tensor]:
    """The data of all ranks."""
    inputs = torch.randn(RANKS * ROWS, 32, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :8].argmax(1)


def rank_main(rank: int) -> tuple[list[float], list[list[float]]]:
    """One rank: its losses and its final weights."""
    inputs, labels = (tensor.chunk(RANKS)[rank].cuda() for tensor in batch())
    # Small buckets, so that reductions start while backward is still running.
    model = DistributedDataParallel(new_model().cuda(), bucket_cap_mb=0.01)
    losses = train(model, inputs, labels)
    return losses, [p.detach().flatten().tolist() for p in model.parameters()]


def run() -> None:
    """Train on two ranks, and on the CPU with the whole batch."""
    (first, weights), (second, other_weights) = run_ranks(rank_main)
    assert weights == other_weights
    losses = [(a + b) / RANKS for a, b in zip(first, second, strict=True)]
    assert_learns(losses)

    host = new_model()
    assert_close(losses, train(host, *batch()), tolerance=1e-4)
    for actual, expected in zip(weights, host.parameters(), strict=True):
        assert torch.allclose(torch.tensor(actual), expected.flatten(), atol=1e-3)


if __name__ == "__main__":
    main(run)
