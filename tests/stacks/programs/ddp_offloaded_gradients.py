"""DistributedDataParallel with gradients off the device, two processes: what one process learns."""

from __future__ import annotations

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F
from _ranks import RANKS, run_ranks
from ddp_gloo import batch, new_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spillover.optim import AdamW, clip_grad_norm_


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor
) -> list[float]:
    """Losses of six steps; in every second a backward accumulates before that which reduces."""
    losses = []
    for step in range(6):
        if step % 2 and isinstance(model, DistributedDataParallel):
            with model.no_sync():
                F.cross_entropy(model(inputs), labels).backward()
        elif step % 2:
            F.cross_entropy(model(inputs), labels).backward()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        clip = clip_grad_norm_ if step < 3 else nn.utils.clip_grad_norm_
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step != 2)
        losses.append(loss.item())
    return losses


def rank_main(rank: int) -> dict[str, tuple[list[float], list[list[float]], list[int]]]:
    """One rank: losses, final weights and figures, of each way of making buckets."""
    inputs, labels = (tensor.chunk(RANKS)[rank].cuda() for tensor in batch())
    found = {}
    for name, options, is_late in (
        ("copies", {}, False),
        ("views", {"gradient_as_bucket_view": True}, False),
        # Nobody can find it then: what reads gradients in backward shows.
        ("late", {}, True),
    ):
        module = new_model().cuda()
        optimizer = None
        if is_late:
            optimizer = AdamW(module.parameters(), lr=5e-3, offload_gradients=True)
        model = DistributedDataParallel(module, bucket_cap_mb=0.01, **options)
        if optimizer is None:
            optimizer = AdamW(model.parameters(), lr=5e-3, offload_gradients=True)
        losses = train(model, optimizer, inputs, labels)
        stats = optimizer.gradients.stats()
        weights = [p.detach().flatten().tolist() for p in model.parameters()]
        found[name] = losses, weights, [stats.left, stats.late, stats.fetched]
    return found


def run() -> None:
    """Train on two ranks, and on the CPU with the whole batch."""
    first, second = run_ranks(rank_main)
    host = new_model()
    optimizer = torch.optim.AdamW(host.parameters(), lr=5e-3)
    expected = train(host, optimizer, *batch())
    count = len(list(host.parameters()))
    for name, (losses, weights, (left, late, fetched)) in first.items():
        other_losses, other_weights, _ = second[name]
        assert weights == other_weights
        mean = [(a + b) / RANKS for a, b in zip(losses, other_losses, strict=True)]
        assert_learns(mean)
        assert_close(mean, expected, tolerance=1e-4)
        for actual, wanted in zip(weights, host.parameters(), strict=True):
            assert torch.allclose(torch.tensor(actual), wanted.flatten(), atol=1e-3), name
        if name != "late":
            # Six reductions; of three steps' micro-steps sums came back once to be reduced.
            assert (left, late) == (9 * count, 6 * count), (name, left, late)
            assert fetched <= 4 * count, (name, fetched)


if __name__ == "__main__":
    main(run)
