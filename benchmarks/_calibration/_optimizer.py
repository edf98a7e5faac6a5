"""The optimizer of a run in mixed precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class FlatAdam:
    """AdamW on fp32 masters of half-precision weights, kept in one flat tensor.

    So do FSDP, of whose shards this is one, and apex's fused optimizers. The half-precision
    gradients and weights of the shard are flat as well, as FSDP has them.
    """

    def __init__(self, parameters: Iterable[Tensor], *, shards: int) -> None:
        self._parameters = list(parameters)
        total = sum(parameter.numel() for parameter in self._parameters)
        self._half = torch.zeros(-(-total // shards), dtype=torch.bfloat16, device="cuda")
        self._master = torch.nn.Parameter(self._half.float())
        self._master.grad = torch.zeros_like(self._master)
        self._optimizer = torch.optim.AdamW([self._master], fused=True)

    def step(self) -> None:
        """One update of the shard."""
        assert self._master.grad is not None
        self._master.grad.copy_(self._half)
        self._optimizer.step()
        with torch.no_grad():
            self._half.copy_(self._master)

    def zero_grad(self) -> None:
        """Drop the gradients of the weights."""
        for parameter in self._parameters:
            parameter.grad = None
