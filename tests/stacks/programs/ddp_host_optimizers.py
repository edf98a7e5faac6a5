"""DistributedDataParallel with optimizers on the host, two processes: what one process learns."""

from __future__ import annotations

from _program import assert_close, assert_learns, main

# isort: split
from typing import Any

import torch
from _ranks import RANKS, run_ranks
from ddp_gloo import batch, new_model
from ddp_offloaded_gradients import train
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from spillover.optim import SGD, Adagrad, Adam, AdamW, Lion

OPTIONS: dict[Any, dict[str, Any]] = {
    AdamW: {"lr": 5e-3},
    Adam: {"lr": 5e-3},
    SGD: {"lr": 0.2, "momentum": 0.9},
    Adagrad: {"lr": 2e-2},
    Lion: {"lr": 1e-3},
}
Result = tuple[list[float], list[list[float]]]


def rank_main(rank: int) -> dict[str, Result]:
    """One rank: losses and final weights of each class, gradients here and off the device."""
    inputs, labels = (tensor.chunk(RANKS)[rank].cuda() for tensor in batch())

    def run_one(make: Any) -> Result:
        model = DistributedDataParallel(new_model().cuda(), bucket_cap_mb=0.01)
        losses = train(model, make(model.parameters()), inputs, labels)
        return losses, [p.detach().flatten().tolist() for p in model.parameters()]

    found = {}
    for make, options in OPTIONS.items():
        for offloads in (False, True):
            found[f"{make.__name__} {offloads}"] = run_one(
                lambda params, make=make, options=options, offloads=offloads: make(
                    params, offload_gradients=offloads, **options
                )
            )
    found["AdamW sharded"] = run_one(
        lambda params: ZeroRedundancyOptimizer(params, optimizer_class=AdamW, lr=5e-3)
    )
    return found


def run() -> None:
    """Train on two ranks, and on the CPU with the whole batch."""
    first, second = run_ranks(rank_main)
    expected: dict[str, list[float]] = {}
    for make, options in OPTIONS.items():
        host = new_model()
        reference = getattr(torch.optim, make.__name__, make)
        expected[make.__name__] = train(host, reference(host.parameters(), **options), *batch())
    for name, (losses, weights) in first.items():
        other_losses, other_weights = second[name]
        assert weights == other_weights, name
        mean = [(a + b) / RANKS for a, b in zip(losses, other_losses, strict=True)]
        assert_learns(mean)
        assert_close(mean, expected[name.split()[0]], tolerance=1e-3 if "Lion" in name else 2e-4)


if __name__ == "__main__":
    main(run)
