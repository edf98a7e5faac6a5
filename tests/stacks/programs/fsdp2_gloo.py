"""FSDP2 (``fully_shard``) over gloo, two processes: it learns what one process learns."""

from __future__ import annotations

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from _ranks import RANKS, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

ROWS = 4
WIDTH = 32


def new_model() -> nn.Sequential:
    """The same weights at each call."""
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        for _ in range(2)
    ]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 8))


def batch() -> tuple[Tensor, Tensor]:
    """The data of all ranks."""
    inputs = torch.randn(RANKS * ROWS, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, 0, :8].argmax(1)


def train(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[float]:
    """Losses of four steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(inputs).mean(1).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_sharded(
    rank: int, precision: MixedPrecisionPolicy, offload: OffloadPolicy, *, reshard: bool
) -> list[float]:
    """Losses of one rank."""
    mesh = init_device_mesh("cuda", (RANKS,))
    model = new_model().cuda()
    for layer in (*model, model):
        fully_shard(
            layer,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard,
        )
    inputs, labels = (tensor.chunk(RANKS)[rank].cuda() for tensor in batch())
    return train(model, inputs, labels)


def rank_main(rank: int) -> dict[str, list[float]]:
    """One rank: losses of each configuration."""
    full = MixedPrecisionPolicy()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kept = OffloadPolicy()
    return {
        "float32": train_sharded(rank, full, kept, reshard=True),
        "bfloat16": train_sharded(rank, half, kept, reshard=False),
        "offloaded": train_sharded(rank, full, CPUOffloadPolicy(pin_memory=True), reshard=True),
    }


def run() -> None:
    """Train on two ranks, and on the CPU with the whole batch."""
    first, second = run_ranks(rank_main)
    expected = train(new_model(), *batch())
    for name, tolerance in (("float32", 1e-4), ("bfloat16", 0.05), ("offloaded", 1e-4)):
        losses = [(a + b) / RANKS for a, b in zip(first[name], second[name], strict=True)]
        assert_learns(losses)
        assert_close(losses, expected, tolerance=tolerance)


if __name__ == "__main__":
    main(run)
