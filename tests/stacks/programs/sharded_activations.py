"""Offloaded activations under DDP and FSDP2 over gloo, two processes: the bits of the plain run."""

from __future__ import annotations

import contextlib
from typing import Any

from _program import main

# isort: split
import ddp_gloo
import fsdp2_gloo
import torch
import torch.nn.functional as F
from _ranks import RANKS, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import spillover

Context = contextlib.AbstractContextManager[Any]


def train(
    model: nn.Module, inputs: Tensor, labels: Tensor, context: Context
) -> tuple[list[float], list[list[float]]]:
    """Losses of four steps, of which every second accumulates twice, and the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(4):
        for _ in range(1 + step % 2):
            with context:
                scores = model(inputs).float()
                loss = F.cross_entropy(scores.mean(1) if scores.dim() == 3 else scores, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return losses, [weight.detach().flatten().tolist() for weight in weights]


def sharded(dtype: torch.dtype | None, *, reshard: bool) -> nn.Module:
    """The blocks of the FSDP2 program, each a unit."""
    mesh = init_device_mesh("cuda", (RANKS,))
    model = fsdp2_gloo.new_model().cuda()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    return model


def rank_main(rank: int) -> dict[str, list[Any]]:
    """One rank: each configuration without and with offloading."""
    ddp = tuple(tensor.chunk(RANKS)[rank].cuda() for tensor in ddp_gloo.batch())
    fsdp = tuple(tensor.chunk(RANKS)[rank].cuda() for tensor in fsdp2_gloo.batch())
    cases = {
        "ddp": (lambda: DistributedDataParallel(ddp_gloo.new_model().cuda()), ddp),
        "fsdp2": (lambda: sharded(None, reshard=True), fsdp),
        "fsdp2 bfloat16": (lambda: sharded(torch.bfloat16, reshard=False), fsdp),
    }
    found: dict[str, list[Any]] = {}
    for name, (make, data) in cases.items():
        offload = spillover.offload_activations(min_bytes=1, keep_on_device=0, prefetch="16KiB")
        found[name] = [
            train(make(), *data, context) for context in (contextlib.nullcontext(), offload)
        ]
        found[name].append(offload.stats().offloaded_bytes)
    return found


def run() -> None:
    """Compare each rank's two runs."""
    for rank, found in enumerate(run_ranks(rank_main)):
        for name, (plain, offloaded, moved_bytes) in found.items():
            assert plain == offloaded, f"{name} differs on rank {rank}"
            assert moved_bytes > 0, name


if __name__ == "__main__":
    main(run)
