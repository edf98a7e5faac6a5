"""Activation checkpointing, both kinds and selective: gradients equal those without."""

from __future__ import annotations

from collections.abc import Callable

from _program import assert_equal_tensors, main

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)


def policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Keep the results of matrix products."""
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def gradients(forward: Callable[[nn.Sequential, Tensor], Tensor]) -> list[Tensor]:
    """Gradients of a network with dropout, at fixed seeds."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(
            nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(64))
            for _ in range(4)
        )
    ).cuda()
    x = torch.randn(16, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = forward(layers, x).square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in layers.parameters())]


def blockwise(**options: object) -> Callable[[nn.Sequential, Tensor], Tensor]:
    """Checkpoint each block by itself."""

    def forward(layers: nn.Sequential, x: Tensor) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, **options)
        return x

    return forward


def run() -> None:
    """Compare each kind with no checkpointing."""
    expected = gradients(lambda layers, x: layers(x))

    def selective() -> object:
        return create_selective_checkpoint_contexts(policy)

    for forward in (
        blockwise(use_reentrant=True),
        blockwise(use_reentrant=False),
        blockwise(use_reentrant=False, context_fn=selective),
        lambda layers, x: checkpoint_sequential(layers, 2, x, use_reentrant=False),
    ):
        assert_equal_tensors(gradients(forward), expected)


if __name__ == "__main__":
    main(run)
