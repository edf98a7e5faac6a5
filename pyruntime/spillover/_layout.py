"""Which tensors fill their memory without gaps, so that their elements can be copied as one run."""

from __future__ import annotations

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in any order of dimensions, none of them twice."""
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size != 1
    ):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a gapless copy: the tensor's own if it is dense, else row-major ones."""
    if is_dense(tensor):
        return tuple(tensor.stride())
    return tuple(torch.empty(tensor.shape, device="meta").stride())


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a dense tensor in memory order, as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
